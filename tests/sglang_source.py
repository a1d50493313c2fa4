# SPDX-License-Identifier: Apache-2.0
"""The source of the installed SGLang's server, read and not run. Modules are named below ``sglang.srt``."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def _folder() -> Path:
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "srt"


def _modules(package: str = "") -> Iterator[tuple[str, str]]:
    """The name and the text of each module of a package."""
    folder = _folder()
    for file in (folder / package.replace(".", "/")).rglob("*.py"):
        name = str(file.relative_to(folder).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        yield name, file.read_text(encoding="utf-8")


@cache
def _texts() -> dict[str, str]:
    """Of each module that has to do with graphs, by its name."""
    return {name: text for name, text in _modules() if re.search(r"[Gg]raph", text)}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(_texts()[module])


def trees_below(package: str) -> dict[str, ast.Module]:
    """Of each module of a package, by its name."""
    return {name: ast.parse(text) for name, text in _modules(package)}


def calls_with(node: ast.AST, argument: str) -> list[ast.Call]:
    """Calls that pass True by this name."""
    calls = [found for found in ast.walk(node) if isinstance(found, ast.Call)]
    return [call for call in calls if any(word.arg == argument and text(word.value) == "True" for word in call.keywords)]


def text(node: ast.AST) -> str:
    return ast.unparse(node)


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function or method of this name."""
    return [found for found in ast.walk(node) if isinstance(found, ast.Call) and _last_name(found.func) == name]


def modules_that_call(*names: str) -> list[str]:
    named = [module for module, text in _texts().items() if any(f"{name}(" in text for name in names)]
    return sorted(module for module in named if any(calls(tree(module), name) for name in names))


def assigned(node: ast.AST, attribute: str) -> Iterator[ast.expr]:
    """The values that are assigned to an attribute of this name."""
    for found in ast.walk(node):
        if isinstance(found, ast.Assign) and any(isinstance(to, ast.Attribute) and to.attr == attribute for to in found.targets):
            yield found.value


def function(path: str) -> ast.FunctionDef:
    """By ``module:name`` or ``module:Class.name``."""
    module, _, names = path.partition(":")
    found: ast.AST = tree(module)
    for name in names.split("."):
        inner = [node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == name]
        assert inner, f"SGLang has no {path}"
        found = inner[0]
    assert isinstance(found, ast.FunctionDef)
    return found


def imported_from(module: str, name: str) -> set[str | None]:
    imports = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in imports if any(alias.name == name for alias in node.names)}


def captures(function: ast.FunctionDef) -> bool:
    """Whether it captures by a backend's capture_one."""
    return any(text(call.func).endswith(".backend.capture_one") for call in calls(function, "capture_one"))


def methods(name: str, *of: str) -> list[ast.FunctionDef]:
    """Those of a class that are among these."""
    return [node for node in classes()[name][1].body if isinstance(node, ast.FunctionDef) and node.name in of]


def mentions(node: ast.AST, name: str) -> bool:
    """Whether a function names another: calls it, passes it on, or takes it as a class to make."""
    return any(_last_name(found) == name for found in ast.walk(node))


def returned_classes(resolver: ast.FunctionDef) -> set[str]:
    """The classes whose instances a function returns; a call stands for a class that is asked for."""
    values = [found.value for found in ast.walk(resolver) if isinstance(found, ast.Return)]
    assert all(isinstance(value, ast.Call) for value in values), "a resolver returns what it does not make"
    made = {_last_name(value.func) for value in values if isinstance(value, ast.Call)}
    variables = {name: _assigned_to(resolver, name) for name in made}
    return {name for name in made if name and not variables[name]}.union(*variables.values())


def _assigned_to(node: ast.AST, variable: str | None) -> set[str]:
    found = set()
    for assignment in ast.walk(node):
        if isinstance(assignment, ast.Assign) and any(isinstance(to, ast.Name) and to.id == variable for to in assignment.targets):
            value = assignment.value
            if isinstance(value, ast.Call):
                found.add(f"{_last_name(value.func)}()")
            elif not isinstance(value, ast.Constant):
                found.add(text(value))
    return found


@cache
def classes() -> dict[str, tuple[str, ast.ClassDef]]:
    """Name -> (module, class), of all that have to do with graphs."""
    return {
        node.name: (module, node)
        for module, text in _texts().items()
        if re.search(r"^class [^:]*Graph(Runner|Backend)", text, re.MULTILINE)
        for node in tree(module).body
        if isinstance(node, ast.ClassDef)
    }


def subclasses(name: str) -> set[str]:
    """The names of all classes below this one."""
    below = {found for found, (_, node) in classes().items() if name in map(_last_name, node.bases)}
    return below.union(*(subclasses(found) for found in below))


def _last_name(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.keyword(arg=name):
            return name
    return None
