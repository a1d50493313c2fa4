# SPDX-License-Identifier: Apache-2.0
"""What may know what: the package's imports, read from its source and not executed."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "sglang_fl"
#: A package of its own, which a vendor copies.
TEMPLATE = PACKAGE / "dispatch/backends/vendor/template"

#: Low to high: a module imports what is on its own line or further up. The longest prefix of its name decides.
LAYERS = (
    ("sglang_fl",),  # __version__; what it does itself is done on top of all others
    ("sglang_fl.utils",),
    ("sglang_fl.device", "sglang_fl.vendor_platform"),
    ("sglang_fl.kernels",),
    ("sglang_fl.config",),
    ("sglang_fl.trial",),
    ("sglang_fl.dispatch",),
    ("sglang_fl.dispatch.backends",),
    ("sglang_fl.compat",),
    ("sglang_fl.dispatch.bridge",),
    ("sglang_fl.aten", "sglang_fl.distributed"),
    ("sglang_fl.startup", "sglang_fl.fingerprint"),
    ("sglang_fl.bind",),
    ("sglang_fl.platform",),
    ("sglang_fl.model_run",),
    ("sglang_fl.check",),
    ("sglang_fl.bisect", "sglang_fl.tune"),
    ("sglang_fl.cli",),
    ("sglang_fl.__main__",),
)
#: What belongs to an engine or to one kind of chip, and the folders whose modules alone may import it, of those below.
FOREIGN = {
    "sglang": {"vendor.cuda"},
    "sgl_kernel": {"vendor.cuda"},
    "flashinfer": {"vendor.cuda"},
    "torch_npu": {"vendor.ascend"},
    "sgl_kernel_npu": {"vendor.ascend"},
    "flag_gems": {"flaggems"},
    "torchada": set[str](),
    "vllm": set[str](),
}
WITHOUT_FOREIGN = ("sglang_fl.utils", "sglang_fl.device", "sglang_fl.config", "sglang_fl.dispatch", "sglang_fl.dispatch.backends")
#: All that a backend's folder may import of sglang_fl, beside itself and the files that backends share.
OPEN_TO_BACKENDS = (
    *("sglang_fl.utils", "sglang_fl.device", "sglang_fl.config"),
    *("sglang_fl.dispatch.types", "sglang_fl.dispatch.registry", "sglang_fl.dispatch.ops"),
)
ROOT_FILES = {"__init__.py", "__main__.py", "bind.py", "aten.py", "compat.py"}
_BACKEND = ("register_ops", "impl")
#: The names under which a reader looks, folder by folder; each is a file or a folder.
SEED = {
    "": ("platform", "bind", "aten", "compat", "device", "config", "dispatch", "distributed", "startup", "check", "cli"),
    "config": ("__init__", "sample.yaml", "nvidia.yaml", "ascend.yaml", "cpu.yaml"),
    "dispatch": ("__init__", "types", "registry", "policy", "manager", "builtin_ops", "ops", "logger_manager", "config"),
    "dispatch/bridge": ("silu_and_mul", "rms_norm", "gemma_rms_norm", "rotary_embedding", "mrotary_embedding", "topk", "fused_moe"),
    "dispatch/backends": ("__init__", "flaggems", "reference", "vendor"),
    "dispatch/backends/flaggems": ("flaggems", *_BACKEND),
    "dispatch/backends/reference": ("reference", *_BACKEND),
    "dispatch/backends/vendor": ("ascend", "cuda", "template"),
    "dispatch/backends/vendor/ascend": ("ascend", *_BACKEND),
    "dispatch/backends/vendor/cuda": ("cuda", *_BACKEND),
    "distributed": ("communicator", "device_communicators/flagcx"),
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


@dataclass(frozen=True)
class Import:
    """One imported module or name, where it is written, and whether it is imported when the module is."""

    importer: str
    imported: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if TEMPLATE not in path.parents)


@cache
def modules() -> dict[str, Path]:
    """Module name -> file."""
    names = {path: ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__") for path in files()}
    return {name: path for path, name in names.items()}


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def _imports_of(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, now: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, child.lineno, now)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - child.level + 1]) if child.level else ""
                source = ".".join(filter(None, (base, child.module)))
                for alias in child.names:
                    submodule = f"{source}.{alias.name}"
                    yield Import(name, submodule if submodule in modules() else source, child.lineno, now)
            else:
                yield from visit(child, now and not _is_put_off(child))

    yield from visit(ast.parse(path.read_text()), True)


def _is_put_off(node: ast.AST) -> bool:
    """Whether what is inside is not run when the module is imported."""
    for_type_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return for_type_checkers or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def prefix_of(name: str) -> str:
    """The longest prefix of a module's name in LAYERS."""
    return max((prefix for row in LAYERS for prefix in row if is_in(name, prefix)), key=len)


def layer_of(name: str) -> int:
    (layer,) = [level for level, row in enumerate(LAYERS) if prefix_of(name) in row]
    return layer


def shown(problems: list[str]) -> str:
    return "\n" + "\n".join(problems)


def test_no_import_goes_up() -> None:
    """Imports inside functions and for type checkers count too."""
    up = [
        str(found)
        for found in imports()
        if found.imported in modules() and found.importer != "sglang_fl" and layer_of(found.imported) > layer_of(found.importer)
    ]
    assert not up, shown(up)


def test_every_room_has_a_layer() -> None:
    rooms = {".".join(name.split(".")[:2]) for name in modules()}
    assert rooms <= {prefix for row in LAYERS for prefix in row}


def test_the_package_itself_imports_nothing_of_its_own_at_import_time() -> None:
    early = [str(found) for found in imports() if found.importer == "sglang_fl" and found.at_import_time and found.imported in modules()]
    assert not early, shown(early)


def test_no_module_imports_itself_in_a_circle() -> None:
    edges: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.at_import_time and found.imported in modules():
            # Python runs the packages above a module first, but for those that it is running already.
            parts = found.imported.split(".")
            runs = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            edges[found.importer] |= {name for name in runs if name == found.imported or not is_in(found.importer, name)}
    done: set[str] = set()

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in way:
            return (*way[way.index(name) :], name)
        if name in done:
            return None
        found = next(filter(None, (circle(other, (*way, name)) for other in sorted(edges[name]))), None)
        done.add(name)
        return found

    circles = [" → ".join(found) for name in edges if (found := circle(name, ())) is not None]
    assert not circles, shown(circles)


@pytest.mark.parametrize("room", WITHOUT_FOREIGN)
def test_rooms_that_know_no_engine_and_no_chips_package(room: str) -> None:
    wrong = [
        str(found)
        for found in imports()
        if prefix_of(found.importer) == room
        and (foreign := found.imported.partition(".")[0]) in FOREIGN
        and not any(is_in(found.importer, f"sglang_fl.dispatch.backends.{folder}") for folder in FOREIGN[foreign])
    ]
    assert not wrong, shown(wrong)


def test_backends_know_the_dispatch_types_and_not_each_other() -> None:
    backends = "sglang_fl.dispatch.backends"
    shared = {name for name, path in modules().items() if path.parent == PACKAGE / "dispatch/backends"}
    homes = [f"{backends}.{folder}" for folder in ("flaggems", "reference", "triton")]
    homes += [f"{backends}.vendor.{path.name}" for path in (PACKAGE / "dispatch/backends/vendor").iterdir() if path.is_dir()]
    wrong = []
    for found in imports():
        if not is_in(found.importer, backends) or not is_in(found.imported, "sglang_fl"):
            continue
        own = [home for home in homes if is_in(found.importer, home)]
        if found.imported not in shared and not any(is_in(found.imported, name) for name in (*own, *OPEN_TO_BACKENDS)):
            wrong.append(str(found))
    assert not wrong, shown(wrong)


def test_what_lies_at_the_root() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= ROOT_FILES, "all else is in a room, and these may become one"


@pytest.mark.parametrize("folder", SEED)
def test_the_seeds_names_are_there(folder: str) -> None:
    missing = [name for name in SEED[folder] if not any((PACKAGE / folder / f"{name}{suffix}").exists() for suffix in ("", ".py"))]
    assert not missing, folder


def test_no_file_is_long() -> None:
    long = [f"{path.relative_to(CHECKOUT)}: {count}" for path in files() if (count := len(path.read_text().splitlines())) > MOST_LINES]
    assert not long, shown(long)


def test_no_function_has_to_be_scrolled() -> None:
    long = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                documented = ast.get_docstring(node) is not None
                first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
                if (count := (node.end_lineno or 0) - first.lineno + 1) > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path.relative_to(CHECKOUT)}:{node.lineno} {node.name}: {count}")
    assert not long, shown(long)


def test_benchmarks_leave_the_command_line_alone() -> None:
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in sorted((CHECKOUT / "benchmarks").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and is_in(node.module or "", "sglang_fl.cli"))
        or (isinstance(node, ast.Import) and any(is_in(alias.name, "sglang_fl.cli") for alias in node.names))
    ]
    assert not wrong, shown(wrong)
