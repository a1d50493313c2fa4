# SPDX-License-Identifier: Apache-2.0
"""Every Triton and JIT kernel that SGLang's runtime calls, read from the installed source: nothing of SGLang is imported.

A kernel runs on the device: a function decorated with ``triton.jit`` or similar, or a module that ``load_jit`` builds. SGLang's
runtime, ``sglang.srt``, launches a few kernels itself, and most through Python functions of ``sglang.kernels``. Both can be
replaced. A row of the list is such a kernel or function, with its call sites in the runtime.
"""

import ast
import contextlib
import gc
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..utils.files import write_whole
from ..utils.folders import NoHomeDirectory, user_folder
from .source import SourceFile

ROOM, RUNTIME = "sglang.kernels", "sglang.srt"
GRID, PLAIN = "kernel[grid]", "plain"

#: Decorators or calls that turn a Python function into a kernel: Triton's, and those of other compilers.
_TRITON = re.compile(r"(triton|gluon)\.(jit|autotune|heuristics)\b")
_OTHER = re.compile(r"(cute(\.experimental)?|tilelang|flyc|helion)\.(jit|kernel)\b")
#: Functions that build a kernel from C++, or find an installed one.
_LOADERS = frozenset({"load_jit", "load_inline", "get_kernel"})
_DEFINES = re.compile("|".join((_TRITON.pattern, _OTHER.pattern)))
_IMPORTS = re.compile(r"^\s*(?:from|import)\s+(sglang[\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class CallSite:
    """A place in ``sglang.srt`` that names a kernel, or a function of ``sglang.kernels``.

    Attributes:
        where: the function or ``Class.method`` around it.
        operator: the operator of sglang-fl that can take over the layer around it.
    """

    file: str
    line: int
    where: str
    operator: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a function that launches kernels, which can be replaced.

    Attributes:
        target: ``module:name``.
        call: :data:`GRID`, or :data:`PLAIN` for a Python function or class.
        launches: the kernels, as ``module:name``, that a Python function may launch. ``load_jit`` and ``get_kernel`` stand for
            one that is built from C++, or comes from an installed package such as ``sgl_kernel``.
        through: Python functions on the way to them, which can also be replaced.
        operator: the operator of sglang-fl that covers all call sites.
    """

    target: str
    call: str
    launches: tuple[str, ...]
    through: tuple[str, ...]
    sites: tuple[CallSite, ...]
    operator: str | None

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]


def _compiler(node: ast.AST) -> re.Pattern[str] | None:
    """The pattern of the compiler that makes a definition a kernel, or None."""
    made_by = node.decorator_list if isinstance(node, ast.FunctionDef) else [node.func] if isinstance(node, ast.Call) else []
    text = "\n".join(map(ast.unparse, made_by))
    return next((pattern for pattern in (_TRITON, _OTHER) if pattern.search(text)), None)


class _Source:
    """The files of the installed SGLang. Relevant ones are parsed on demand."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {
            name: path for room in ("kernels", "srt") for path in (root / room).rglob("*.py") if (name := _module_name(root, path))
        }

        texts = {name: path.read_text(encoding="utf-8") for name, path in self.files.items() if name.startswith(RUNTIME)}
        self._homes = {name for name, text in texts.items() if _DEFINES.search(text)}
        #: The runtime's modules that define kernels, or may import them.
        self.users = [
            name
            for name, text in texts.items()
            if name in self._homes or "from ." in text or any(map(self.is_home, _IMPORTS.findall(text)))
        ]

    @cache  # noqa: B019  (the source lives as long as the listing is made)
    def parsed(self, name: str) -> SourceFile:
        return SourceFile(name, self.files[name])

    def is_home(self, path: str) -> bool:
        """Whether a module, or the module that a dotted path begins with, defines kernels."""
        return path.startswith(ROOM) or path in self._homes or path.rpartition(".")[0] in self._homes

    @cache  # noqa: B019
    def definition(self, path: str) -> str | None:
        """``module:name`` of a dotted path, followed through re-exports. None: SGLang does not define it."""
        parts = path.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (name := ".".join(parts[:end])) in self.files:
                module = self.parsed(name)
                if parts[end] in module.defined:
                    return f"{name}:{parts[end]}"
                return next(filter(None, map(self.definition, module.imported.get(parts[end], set()) - {path})), None)
        return None

    @cache  # noqa: B019
    def compiler(self, target: str) -> re.Pattern[str] | None:
        return next(filter(None, map(_compiler, self._nodes(target))), None)

    def _nodes(self, target: str) -> list[ast.AST]:
        module, _, name = target.partition(":")
        return self.parsed(module).defined[name]

    @cache  # noqa: B019
    def next_to(self, target: str) -> frozenset[str]:
        """The definitions of SGLang that a definition refers to. Loaders are given by their bare name."""
        module = self.parsed(target.partition(":")[0])
        found: set[str | None] = set()
        for node in self._nodes(target):
            # An assignment's value is a single expression.
            for _, path in module.references(ast.Expr(node) if isinstance(node, ast.expr) else node):
                loader = path.rpartition(".")[2]
                found.add(loader if loader in _LOADERS else self.definition(path))
        return frozenset(filter(None, found))

    @cache  # noqa: B019
    def beneath(self, target: str) -> tuple[set[str], set[str]]:
        """The kernels (and loaders) that a function of ``sglang.kernels`` may reach, and the Python functions on the way."""
        pending, seen, kernels = [target], {target}, set()
        while pending:
            for found in self.next_to(pending.pop()) - seen:
                seen.add(found)
                if found in _LOADERS or self.compiler(found):
                    kernels.add(found)
                elif found.startswith(f"{ROOM}."):
                    pending.append(found)
        return kernels, seen - kernels - {target}


def _module_name(root: Path, path: Path) -> str:
    return ".".join(("sglang", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def _sites(source: _Source, module: SourceFile, operators: Mapping[str, str]) -> Iterator[tuple[str, CallSite]]:
    """The call sites of kernels, and of functions of ``sglang.kernels``, in a module of the runtime: (target, site)."""
    file = module.name.replace(".", "/") + ("/__init__.py" if module.is_package else ".py")
    names = [name for name, paths in module.imported.items() if any(map(source.is_home, paths))]
    names += [name for name in module.defined if source.compiler(f"{module.name}:{name}")]
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def visit(body: ast.AST, around: tuple[str, ...], operator: str | None) -> Iterator[tuple[str, CallSite]]:
        for node in ast.iter_child_nodes(body):
            if isinstance(node, ast.stmt) and not module.says(pattern, node):
                continue
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not _compiler(node):  # names inside a kernel belong to that kernel
                    op = operators.get(node.name, operator) if isinstance(node, ast.ClassDef) else operator
                    yield from visit(node, (*around, node.name), op)
                continue
            found = list(module.paths(node)) if isinstance(getattr(node, "ctx", None), ast.Load) else []
            for target in filter(None, map(source.definition, found)):
                yield target, CallSite(file, node.lineno, ".".join(around), operator)  # type: ignore[attr-defined]
            if not found:
                yield from visit(node, around, operator)

    if names:
        yield from visit(module.tree, (), None)


def kernels(root: Path, operators: Mapping[str, str]) -> list[Kernel]:
    """The kernels and functions that SGLang's runtime calls, by target. Parses 1,400 files, in about ten seconds.

    Args:
        root: the folder of the package ``sglang``.
        operators: layer class, or ``module:function`` -> the operator of sglang-fl that can replace it.
    """
    source = _Source(root)
    sites: dict[str, set[CallSite]] = {}
    for name in source.users:
        for target, site in _sites(source, source.parsed(name), operators):
            sites.setdefault(target, set()).add(site)
    found = []
    for target, places in sites.items():
        compiler = source.compiler(target)
        is_outer = not compiler and target.startswith(f"{ROOM}.")
        launches, through = source.beneath(target) if is_outer else (set(), set())
        if compiler or launches:
            around = {site.operator for site in places}
            operator = operators.get(target) or (around.pop() if len(around) == 1 else None)
            # Only functions that reach a kernel themselves.
            through = {name for name in through if source.beneath(name)[0]}
            ordered = tuple(sorted(places, key=lambda site: (site.file, site.line)))
            call = GRID if compiler is _TRITON else PLAIN
            found.append(Kernel(target, call, tuple(sorted(launches)), tuple(sorted(through)), ordered, operator))
    return sorted(found, key=lambda kernel: kernel.target)


def remembered_kernels(root: Path, operators: Mapping[str, str]) -> list[Kernel]:
    """The same, cached in the user's cache folder for these files."""
    facts = [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in sorted(root.rglob("*.py"))]
    code = [inspect.getsource(sys.modules[name]) for name in (__name__, SourceFile.__module__)]
    key = hashlib.sha256(repr((facts, sorted(operators.items()), code)).encode()).hexdigest()
    file = None
    with contextlib.suppress(NoHomeDirectory):
        file = user_folder("cache", "the list of kernels") / f"kernels-{key[:16]}.json"
    if file is not None and file.exists():
        return list(map(_from_data, json.loads(file.read_text())))
    was_enabled = gc.isenabled()
    gc.disable()  # the garbage collector would scan the growing trees for half of the time
    try:
        found = kernels(root, operators)
    finally:
        if was_enabled:
            gc.enable()
    with contextlib.suppress(OSError):  # without a writable cache the list is built each time
        if file is not None:
            write_whole(file, json.dumps([asdict(kernel) for kernel in found]))
    return found


def _from_data(data: dict[str, Any]) -> Kernel:
    sites = tuple(CallSite(**site) for site in data["sites"])
    return Kernel(**{**data, "launches": tuple(data["launches"]), "through": tuple(data["through"]), "sites": sites})
