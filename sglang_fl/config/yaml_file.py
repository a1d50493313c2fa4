# SPDX-License-Identifier: Apache-2.0
"""A YAML mapping with the line of each entry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from .errors import SettingsError


@dataclass(frozen=True)
class Entry:
    """A value, the line it stands on, and the lines of its items by key or index."""

    value: Any
    line: int
    item_lines: dict[Any, int]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Loader(yaml.SafeLoader):
    """A scalar that looks like a date or a number and is none is an error of YAML's kind, with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            raise ConstructorError(None, None, f"{node.value!r}: {error}", node.start_mark) from None


def read_mapping(path: Path, *, what: str, problems: list[str]) -> dict[Any, Entry]:
    """The entries of a YAML file's top-level mapping; an empty file has none.

    Args:
        problems: takes what is wrong with single keys; of a duplicate key the first is returned.

    Raises:
        SettingsError: the file cannot be read, is no YAML, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{what}: there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{what}: {str(path)!r} cannot be read: {error}") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}:{_line(root)}: expected 'key: value' lines, found {loader.construct_object(root, deep=True)!r}")
        return _entries(loader, root, path, problems)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SettingsError(f"{path}:{line}: not valid YAML: {error.reason}: {chr(error.character)!r}") from None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise SettingsError(f"{where}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply") from None


def _entries(loader: yaml.SafeLoader, root: yaml.MappingNode, path: Path, problems: list[str]) -> dict[Any, Entry]:
    found: dict[Any, Entry] = {}
    for key_node, value_node in _pairs(loader, root, path, problems):
        item_lines: dict[Any, int] = {}
        if isinstance(value_node, yaml.MappingNode):
            pairs = _pairs(loader, value_node, path, problems)
            item_lines = {loader.construct_object(k): _line(k) for k, _ in pairs}
            value: Any = {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in pairs}
        else:
            value = loader.construct_object(value_node, deep=True)
            if isinstance(value_node, yaml.SequenceNode):
                item_lines = {i: _line(v) for i, v in enumerate(value_node.value)}
                item_lines |= {word: item_lines[i] for i, word in reversed(list(enumerate(value))) if isinstance(word, str)}
        found[loader.construct_object(key_node)] = Entry(value, _line(key_node), item_lines)
    return found


def _pairs(loader: yaml.SafeLoader, mapping: yaml.MappingNode, path: Path, problems: list[str]) -> list[tuple[yaml.Node, yaml.Node]]:
    """The mapping's pairs of nodes, less those whose key cannot be one."""
    lines: dict[Any, int] = {}
    pairs: list[tuple[yaml.Node, yaml.Node]] = []
    for key_node, value_node in mapping.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{path}:{_line(key_node)}: expected a name before the colon, found {key!r}")
        elif key in lines:
            problems.append(f"{path}:{_line(key_node)}: duplicate key {key!r}, first on line {lines[key]}")
        else:
            lines[key] = _line(key_node)
            pairs.append((key_node, value_node))
    return pairs
