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
from types import ModuleType
from typing import Any

from ..utils.suggest import suggest
from .source import SourceFile, file_of, root_of

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
            return self.own[grid]
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
        return self._own.create_module(spec)

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
    source = _source(module)
    if source is None:
        return f"this SGLang has no module {module}{suggest(module, _modules_near(module))}"
    # A definition goes before an import: on some devices the name is the one, on others the other.
    if nodes := source.defined.get(name):
        if all(map(_no_kernel, nodes)) and name not in source.imported:
            return f"{target} is {_no_kernel(nodes[-1])}, and no kernel{_nearest(source, name)}"
        if takes_grid and isinstance(nodes[-1], ast.FunctionDef) and not any(map(_is_launched, nodes[-1].decorator_list)):
            return f"{target} is called, and not launched with a grid: leave out takes_grid"
        return None
    if name not in source.imported:
        return f"this SGLang has no {name!r} in {module}{_nearest(source, name)}"
    home = min(source.imported[name]).rpartition(".")[0]
    return f"{target} is imported from {home}" + ("; name it there" if home.startswith("sglang.") else ", which is not SGLang's")


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
            source = _source(module)
            yield f"{target} is {what}, and no kernel{_nearest(source, name) if source else ''}"
        other = first.setdefault(id(own), target)
        if functions[other] != function:
            yield f"{other} and {target} are two names of one kernel: {functions[other]!r} and {function!r} cannot both replace it"


def problem_with_function(path: str) -> str | None:
    """Why a function, ``"module:name"``, certainly cannot be loaded, or None. Imports nothing."""
    module, _, name = path.partition(":")
    source = _source(module)
    if source is None:
        return None if _may_be_there(module) else f"{path!r} cannot be loaded: there is no module {module}"
    known = {*source.defined, *source.imported}
    if not {name.partition(".")[0], "*", "__getattr__"} & known:
        return f"{path!r} cannot be loaded: {module} has no {name!r}{suggest(name, source.defined.keys())}"
    values = list(map(_value, source.defined.get(name, ())))
    return f"{path!r} is {values[-1]}, and no function" if values and all(values) and name not in source.imported else None


def _may_be_there(module: str) -> bool:
    """Whether a module without Python source may exist: a compiled one, or one of a namespace package."""
    package, *rest = module.split(".")
    if importlib.util.find_spec(package) is None:
        return False
    root = root_of(package)
    return root is None or not rest or any(root.joinpath(*rest[:-1]).glob(f"{rest[-1]}*"))


@lru_cache(maxsize=8)
def _source(module: str) -> SourceFile | None:
    file = file_of(module)
    return SourceFile(module, file) if file is not None else None


def _modules_near(module: str) -> list[str]:
    """The modules in the deepest existing folder of a module's path."""
    package, *rest = module.split(".")
    folder = root_of(package)
    if folder is None:
        return []
    for part in rest:
        if (folder / part).is_dir():
            package, folder = f"{package}.{part}", folder / part
    return [f"{package}.{found.stem}" for found in folder.iterdir() if found.suffix == ".py" or found.is_dir()]


def _nearest(source: SourceFile, name: str) -> str:
    """A hint at the nearest name that may be a kernel's."""
    return suggest(name, [other for other, nodes in source.defined.items() if not all(map(_no_kernel, nodes))])


def _no_kernel(node: ast.AST) -> str | None:
    """What a name's statement makes of it, if that is certainly no kernel."""
    return "a class" if isinstance(node, ast.ClassDef) else _value(node)


def _value(node: ast.AST) -> str | None:
    """The value that a name's statement gives it, if that can certainly not be called."""
    if isinstance(node, (ast.Constant, ast.JoinedStr, ast.Dict, ast.List, ast.Set, ast.Tuple, ast.Compare, ast.BinOp)):
        return f"the value {ast.unparse(node)[:40]}"
    return None


def _is_launched(decorator: ast.expr) -> bool:
    made = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(made).rpartition(".")[2] in _LAUNCHED
