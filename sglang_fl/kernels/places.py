# SPDX-License-Identifier: Apache-2.0
"""Finds a kernel of SGLang by its name in a module's source, and replaces it in the process.

SGLang's HookRegistry replaces a function in every module that has imported it. But it imports the target, and its replacement cannot
be launched with a grid (``kernel[grid]``). A hook object here supports both calls and launches. It is set in modules that are already
imported, and in the others when they are imported.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..utils.suggest import suggest

#: Decorators ending in one of these make a function a kernel that is launched with a grid.
_LAUNCHED = frozenset({"jit", "autotune", "heuristics"})


class KernelHook:
    """Replaces a kernel in its module. It is launched or called like the kernel.

    Attributes:
        forward: called with the hook, the launch's grid (None for a call) and the arguments. None: SGLang's own kernel runs.
        own: SGLang's kernel, set when its module is imported. Others get it as ``kernel.__wrapped__``.
    """

    def __init__(self) -> None:
        self.forward: Callable[..., Any] | None = None
        self.own: Any = None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        forward = self.forward
        if forward is None:
            launch: Callable[..., Any] = self.own[grid]
            return launch
        return lambda *args, **kwargs: forward(self, grid, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward
        return self.own(*args, **kwargs) if forward is None else forward(self, None, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # while a copy is being created
            raise AttributeError(name)
        return self.own if name == "__wrapped__" else getattr(self.own, name)


class _Loader(importlib.abc.Loader):
    """Runs a module's own loader, then sets the hooks in the module."""

    def __init__(self, own: Any, hooks: Mapping[str, KernelHook]) -> None:
        self._own = own
        self._hooks = hooks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        before = set(sys.modules)
        self._own.exec_module(module)
        # What the module has under a second name, and what it imports that imports from it in turn, has the kernel by now.
        others = [found for name, found in list(sys.modules.items()) if name not in before]
        _rebind(_put(module, self._hooks), [module, *others])

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._own, name)


class _Places(importlib.abc.MetaPathFinder):
    """An import finder for modules that need hooks. The finders after it do the work."""

    def __init__(self) -> None:
        self.hooks: dict[str, dict[str, KernelHook]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is not None:
            spec.loader = _Loader(spec.loader, self.hooks[fullname])
        return spec


_places = _Places()


def put_in_place(hooks: Mapping[str, KernelHook]) -> None:
    """Set hooks for SGLang's kernels, ``sglang.module:name``, now or when the module is imported.

    Imports nothing. A name that the module does not have on this device gets no hook. Kernels that SGLang keeps elsewhere than in a
    module's name (in a class, a table, a custom operator of PyTorch) are not replaced.
    """
    if _places not in sys.meta_path:
        sys.meta_path.insert(0, _places)
    replaced: list[KernelHook] = []
    for target, hook in hooks.items():
        module, _, name = target.partition(":")
        _places.hooks.setdefault(module, {})[name] = hook
        if module in sys.modules:
            replaced += _put(sys.modules[module], {name: hook})
    _rebind(replaced, list(sys.modules.values()))


def _put(module: ModuleType, hooks: Mapping[str, KernelHook]) -> list[KernelHook]:
    """Set the hooks in a module. Returns those that were set."""
    put = []
    for name, hook in hooks.items():
        own = vars(module).get(name)
        if own is not None and own is not hook:
            hook.own = own
            setattr(module, name, hook)
            put.append(hook)
    return put


def _rebind(placed: Sequence[KernelHook], modules: Sequence[ModuleType]) -> None:
    """Set hooks in modules that have a kernel under another name, or imported it before."""
    hooks = {id(hook.own): hook for hook in placed}
    for module in modules if hooks else ():
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in hooks:
                    setattr(module, name, hooks[id(value)])


def problem_with(target: str, takes_grid: bool = False) -> str | None:
    """Why a replacement does not fit: no such kernel, or it is not launched with a grid as expected. Or None. Imports nothing."""
    module, _, name = target.partition(":")
    file = _file(module)
    if file is None:
        return f"this SGLang has no module {module}{suggest(module, _modules_near(module))}"
    names = _names(file)
    if name not in names:
        return f"this SGLang has no {name!r} in {module}{suggest(name, _kernels(names))}"
    node = names[name][0]
    if isinstance(node, ast.ImportFrom):
        home = importlib.util.resolve_name("." * node.level + (node.module or ""), _package_of(module, file))
        return f"{target} is imported from {home}" + ("; name it there" if home.startswith("sglang.") else ", which is not SGLang's")
    if all(map(_no_kernel, names[name])):
        return f"{target} is {_no_kernel(node)}, and no kernel{suggest(name, _kernels(names))}"
    if takes_grid and isinstance(node, ast.FunctionDef) and not any(map(_is_launched, node.decorator_list)):
        return f"{target} is called, and not launched with a grid: leave out takes_grid"
    return None


def problems_with_objects(functions: Mapping[str, str]) -> Iterator[str]:
    """What only the imported modules show: a name that stands for no kernel, and two names of one kernel with two replacements.

    Args:
        functions: ``sglang.module:name`` -> the function that replaces it. A kernel that this device does not have is left out.
    """
    first: dict[int, str] = {}
    for target, function in functions.items():
        try:
            own = pkgutil.resolve_name(target)
        except Exception:  # a module of other devices
            continue
        own = own.own if isinstance(own, KernelHook) else own
        if isinstance(own, type) or not (callable(own) or hasattr(own, "run")):  # Triton's autotuner has no __call__
            what = "a class" if isinstance(own, type) else f"of type {type(own).__name__}"
            module, _, name = target.partition(":")
            file = _file(module)
            yield f"{target} is {what}, and no kernel{suggest(name, _kernels(_names(file))) if file else ''}"
        other = first.setdefault(id(own), target)
        if functions[other] != function:
            yield f"{other} and {target} are two names of one kernel: {functions[other]!r} and {function!r} cannot both replace it"


def _roots(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    yield from map(Path, (spec and spec.submodule_search_locations) or ())


def _file(module: str) -> Path | None:
    """A module's source file, found without importing its parent packages."""
    package, *rest = module.split(".")
    for root in _roots(package):
        path = root.joinpath(*rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def _modules_near(module: str) -> list[str]:
    """The modules in the deepest existing folder of a module's path."""
    package, *rest = module.split(".")
    folder = next(_roots(package), None)
    if folder is None:
        return []
    for part in rest:
        if (folder / part).is_dir():
            package, folder = f"{package}.{part}", folder / part
    return [f"{package}.{found.stem}" for found in folder.iterdir() if found.suffix == ".py" or found.is_dir()]


@lru_cache(maxsize=8)
def _names(file: Path) -> Mapping[str, Sequence[ast.AST]]:
    """The names that a module's source defines or imports at its top level, in any branch, each with its statements.

    The last goes first, and a definition before an import: on some devices it is the one, on others the other.
    """
    names: dict[str, list[ast.AST]] = {}
    for name, node in _defined(ast.parse(file.read_text(encoding="utf-8")).body):
        names.setdefault(name, []).insert(0, node)
    return {name: sorted(nodes, key=lambda node: isinstance(node, ast.ImportFrom)) for name, nodes in names.items()}


def _defined(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node.value or node) for target in targets if isinstance(target, ast.Name))
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _defined(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _defined(handler.body)


def _kernels(names: Mapping[str, Sequence[ast.AST]]) -> list[str]:
    """The names that may be kernels, of those that a module defines itself."""
    return [name for name, nodes in names.items() if not isinstance(nodes[0], ast.ImportFrom) and not all(map(_no_kernel, nodes))]


def _no_kernel(node: ast.AST) -> str | None:
    """What a name's statement makes of it, if that is certainly no kernel."""
    if isinstance(node, ast.ClassDef):
        return "a class"
    if isinstance(node, (ast.Constant, ast.JoinedStr, ast.Dict, ast.List, ast.Set, ast.Tuple, ast.Compare, ast.BinOp)):
        return f"the value {ast.unparse(node)[:40]}"
    return None


def _is_launched(decorator: ast.expr) -> bool:
    made = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(made).rpartition(".")[2] in _LAUNCHED
