# SPDX-License-Identifier: Apache-2.0
"""Write a package for a new vendor: a backend, its registration, the chip's platform, and tests that run the check."""

import argparse
import os
import re
import shlex
from pathlib import Path

from ..config import SettingsError
from ..config.loader import PROFILES
from ..device import OUT_OF_TREE_ONLY, VENDORS, Vendor, declared, name_problem
from ..dispatch.manager import OpManager

#: Placeholders of the template: the vendor's name, and the chip's name, alone and in names of classes.
_NAME, _CLASS = "mychip", "MyChip"
_TEMPLATE = Path(__file__).parents[1] / "dispatch" / "backends" / "vendor" / "template"
#: The template's files have these suffixes. Others are left there by tools.
_SUFFIXES = (".py", ".toml", ".md", ".yaml")
#: Fields that a declaration leaves out where SGLang has a platform of its own for the chip.
_NOT_IN_TREE = ("device_type", "device_files", *OUT_OF_TREE_ONLY)
#: What the template says of a chip that neither SGLang nor our table knows.
_ELSE_ATTENTION = "without either it is torch_native."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the vendor's name, as in vendor:NAME: a Python identifier in lower case")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where the package goes (default: sglang-fl-NAME)")


def run(args: argparse.Namespace) -> int:
    problem = name_problem(args.name) or why_taken(args.name)
    if problem:
        raise SettingsError(f"new-vendor: {problem}")
    if args.directory == "":
        raise SettingsError("new-vendor: DIR is empty; name a directory, or leave it out")
    directory = Path(args.directory or f"sglang-fl-{args.name}")
    try:
        written = write(args.name, directory)
    except OSError as error:
        raise SettingsError(f"new-vendor: {str(error.filename or directory)!r} cannot be written: {error.strerror or error}") from None
    print(f"Wrote {directory}:")
    for file in written:
        print(f"  {file.relative_to(directory)}")
    row = VENDORS.get(args.name)
    if row is not None and row.in_tree is not None:
        print(f"SGLang has its own platform for {row.chip} ({row.in_tree}); platform.py says what this package adds to it.")
    package = shlex.quote(f"{directory}[test]")
    print(f"Next:\n  uv pip install -e {package}\n  sglang-fl check --vendor {args.name} --quick")
    return 0


def why_taken(name: str) -> str | None:
    """Why the name is taken, or None. That of a chip in our table which no package serves yet is free."""
    if name == "cpu":
        return "'cpu' is served by the reference backend; choose another name"
    manager = OpManager()
    discovery = manager.discover(())
    for (op, impl_id), origin in discovery.owners.items():
        impl = manager.registry.get_implementation(op, impl_id)
        if impl is not None and name in (impl.vendor, impl_id.removeprefix("vendor.")):
            return f"{name!r} already has a backend ({origin}); choose another name"
    if name in declared().origins:
        return f"{name!r} already has a platform ({declared().origins[name]}); choose another name"
    return None


def write(name: str, directory: Path) -> list[Path]:
    """Write the package. Existing files are not overwritten.

    Raises:
        SettingsError: the directory is not empty.
        OSError: it cannot be written.
    """
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise SettingsError(f"new-vendor: {str(directory)!r} exists and is not an empty directory; choose another")
    row = VENDORS.get(name)
    written = []
    for source in sorted(file for file in _TEMPLATE.rglob("*") if file.suffix in _SUFFIXES):
        file = directory / _named(str(source.relative_to(_TEMPLATE)), name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as out:
            out.write(_filled(source, name, row))
        written.append(file)
    return written


def _named(text: str, name: str) -> str:
    return (
        text.replace(_NAME, name)
        .replace(_NAME.upper(), name.upper())
        .replace(_CLASS, "".join(word.capitalize() for word in name.split("_")))
    )


def _filled(source: Path, name: str, row: Vendor | None) -> str:
    """A file's text for this vendor, filled with what our table knows of the chip."""
    text = source.read_text(encoding="utf-8")
    if row is not None:
        text = re.sub(rf"\b{_CLASS}\b", row.chip, text)
    if row is not None and row.in_tree is not None:
        text = _in_tree(source.name, text, row)
    elif row is not None:
        capabilities = ", ".join(f'"{item}"' for item in row.capabilities) + "," * (len(row.capabilities) == 1)
        known = {
            'device_type="mychip",': f'device_type="{row.device_type}",',
            'device_files=("/dev/mychip[0-9]*",),': _traces(row),
            '# collective="gloo",': f'collective="{row.collective}",',
            '# attention="mychip_attention",': f'attention="{row.attention}",',
            _ELSE_ATTENTION: f"without either it is {row.attention}.",
            "# capabilities=": f"capabilities=({capabilities}),\n    # capabilities=",
            "# flaggems=True,": f"flaggems={row.flaggems},",
        }
        if row.compile_backend != "inductor":
            known["# compile_backend="] = "compile_backend="
        for line, filled in known.items():
            text = text.replace(line, filled)
    return _named(text, name).rstrip("\n") + "\n"


def _in_tree(file: str, text: str, row: Vendor) -> str:
    """A file for a chip that SGLang has a platform for: without the fields that its platform decides; SGLang's operators stay."""
    if file == "platform.py":
        between = "    #\n"
        choices = text.replace(_ELSE_ATTENTION, "without either SGLang chooses it, as it does without this package.").split(between)
        return between.join(choice for choice in choices if not any(f" {field}=" in choice for field in _NOT_IN_TREE))
    if file == "profile.yaml":
        orders = (PROFILES / "in_tree.yaml").read_text(encoding="utf-8").partition("op_backends:")[2]
        head = f"# The settings on {row.chip} when the user gives none: this package's operators, else SGLang's own.\nop_backends:"
        return head + orders.replace("[sglang]", "[vendor:mychip, sglang]")
    return text


def _traces(row: Vendor) -> str:
    """How a chip of our table is detected, as lines of a declaration."""
    fields = {"device_files": row.device_files, "commands": row.commands}
    tuples = {field: ", ".join(f'"{item}"' for item in items) + "," * (len(items) == 1) for field, items in fields.items() if items}
    return "\n    ".join(f"{field}=({items})," for field, items in tuples.items())
