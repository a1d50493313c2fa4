# SPDX-License-Identifier: Apache-2.0
"""A YAML mapping that remembers the line of each of its entries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import SettingsError


@dataclass(frozen=True)
class Entry:
    """A value, the line it stands on, and the lines of its items by key or index."""

    value: Any
    line: int
    item_lines: dict[Any, int]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def read_mapping(path: Path, *, what: str) -> dict[str, Entry]:
    """The entries of a YAML file's top-level mapping; an empty file has none.

    Raises:
        SettingsError: the file cannot be read, is no YAML, is no mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{what}: there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{what}: {str(path)!r} cannot be read: {error}") from None
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}:{_line(root)}: expected 'key: value' lines, found {root.value!r}")
        return dict(_entries(loader, root, path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


def _entries(loader: yaml.SafeLoader, root: yaml.MappingNode, path: Path) -> list[tuple[str, Entry]]:
    found: dict[str, Entry] = {}
    for key_node, value_node in root.value:
        key = loader.construct_object(key_node, deep=True)
        line = _line(key_node)
        if key in found:
            raise SettingsError(f"{path}:{line}: {key!r} is given twice, first on line {found[key].line}")
        item_lines: dict[Any, int] = {}
        if isinstance(value_node, yaml.MappingNode):
            for k, _ in value_node.value:
                name = loader.construct_object(k, deep=True)
                if name in item_lines:
                    raise SettingsError(f"{path}:{_line(k)}: {name!r} is given twice, first on line {item_lines[name]}")
                item_lines[name] = _line(k)
        elif isinstance(value_node, yaml.SequenceNode):
            item_lines = {
                loader.construct_object(v, deep=True) if isinstance(v, yaml.ScalarNode) else i: _line(v)
                for i, v in enumerate(value_node.value)
            }
        found[key] = Entry(loader.construct_object(value_node, deep=True), line, item_lines)
    return list(found.items())
