# SPDX-License-Identifier: Apache-2.0
"""Files of the installed SGLang, parsed: what their names stand for. Nothing of SGLang is imported."""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

_IMPORT = re.compile(r"^\s*(?:from|import)\s", re.MULTILINE)


def root_of(package: str = "sglang") -> Path | None:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(package)
    return next(map(Path, (spec and spec.submodule_search_locations) or ()), None)


def file_of(module: str) -> Path | None:
    """A module's source file, found without importing its parent packages."""
    package, *rest = module.split(".")
    root = root_of(package)
    if root is None:
        spec = importlib.util.find_spec(package)
        return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") and not rest else None
    path = root.joinpath(*rest)
    return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


class SourceFile:
    """A parsed file: its top-level definitions, and what its names stand for."""

    def __init__(self, name: str, path: Path):
        self.name, self.is_package = name, path.name == "__init__.py"
        text = path.read_text(encoding="utf-8")
        self.tree, self._lines = ast.parse(text), text.splitlines()
        self.defined: dict[str, list[ast.AST]] = {}
        for statement in _statements(self.tree.body, (ast.If, ast.Try)):
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self.defined.setdefault(statement.name, []).append(statement)
            elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                    if isinstance(target, ast.Name):
                        self.defined.setdefault(target.id, []).append(statement.value)

    @cached_property
    def imported(self) -> dict[str, set[str]]:
        """name -> the dotted paths that it stands for, from imports anywhere in the file."""
        found: dict[str, set[str]] = {}
        for node in _statements(statement for statement in self.tree.body if self.says(_IMPORT, statement)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name.partition(".")[0], set()).add(
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name, set()).add(f"{base}.{alias.name}")
        return found

    def says(self, pattern: re.Pattern[str], node: ast.stmt) -> bool:
        """Whether a statement's source matches. A quick filter: walking the syntax trees of all of SGLang takes a minute."""
        return pattern.search("\n".join(self._lines[node.lineno - 1 : node.end_lineno])) is not None

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        package = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*package, *filter(None, [node.module])])

    def paths(self, node: ast.AST) -> Iterator[str]:
        """The dotted paths that a name or a module's attribute may stand for."""
        if isinstance(node, ast.Name):
            yield from self.imported.get(node.id, ())
            if node.id in self.defined:  # the definition for devices on which it is not imported
                yield f"{self.name}.{node.id}"
        elif isinstance(node, ast.Attribute):
            yield from (f"{path}.{node.attr}" for path in self.paths(node.value))

    def references(self, body: ast.AST) -> Iterator[tuple[ast.AST, str]]:
        """Each name or attribute in ``body`` that may stand for something from another module or from this one's top level."""
        for node in ast.iter_child_nodes(body):
            found = list(self.paths(node)) if isinstance(getattr(node, "ctx", None), ast.Load) else []
            yield from ((node, path) for path in found)
            if not found:
                yield from self.references(node)


def _statements(given: Iterable[ast.stmt], inside: tuple[type[ast.stmt], ...] = (ast.stmt,)) -> Iterator[ast.stmt]:
    """Statements, and those nested in statements of these kinds. (Walking expressions as well takes ten times as long.)"""
    for statement in given:
        yield statement
        if isinstance(statement, inside):
            handlers = [line for handler in getattr(statement, "handlers", ()) for line in handler.body]
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, field, ()), inside)
            yield from _statements(handlers, inside)
