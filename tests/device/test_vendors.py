# SPDX-License-Identifier: Apache-2.0
"""The table of vendors against the source of FlagGems and of SGLang, neither of which is imported."""

import ast
import importlib.util
from pathlib import Path

import pytest

from sglang_fl.config.options import DIST_BACKENDS
from sglang_fl.device import ALIASES, VENDORS, canonical


def directory_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def flaggems_vendors() -> set[str]:
    tree = ast.parse((directory_of("flag_gems") / "runtime" / "common.py").read_text(encoding="utf-8"))
    (enum,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "vendors"]
    return {
        target.id.lower() for node in enum.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)
    }


def test_every_vendor_of_flaggems_has_a_row_and_no_other_claims_to() -> None:
    found = flaggems_vendors()
    assert len(found) > 10
    assert found == {name for name, vendor in VENDORS.items() if vendor.flaggems}


@pytest.mark.parametrize("name", [name for name, vendor in VENDORS.items() if vendor.flaggems])
def test_device_type_and_tool_are_those_of_flaggems(name: str) -> None:
    tree = ast.parse((directory_of("flag_gems") / "runtime" / "backend" / f"_{name}" / "__init__.py").read_text(encoding="utf-8"))
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "VendorInfoBase"]
    info = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if isinstance(keyword.value, ast.Constant)}
    assert info["vendor_name"] == name
    assert VENDORS[name].device_type == info["device_name"]
    tool = info["device_query_cmd"].partition(" ")[0]
    if tool and tool != name:
        assert tool in VENDORS[name].commands


def test_in_tree_names_are_platforms_of_sglang() -> None:
    names = {}
    for file in (directory_of("sglang") / "srt" / "platforms").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = {n.target.id: n.value for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
                if isinstance(fields.get("device_name"), ast.Constant):
                    names[fields["device_name"].value] = file.name
    in_tree = {vendor.in_tree for vendor in VENDORS.values()} - {None}
    assert in_tree == names.keys() - {"cpu", "unknown"}


def test_rows_are_keyed_by_name_and_names_are_lower_case() -> None:
    assert all(name == vendor.name == name.lower() for name, vendor in VENDORS.items())


def test_collective_libraries_can_be_asked_for_by_name() -> None:
    assert {vendor.collective for vendor in VENDORS.values()} <= set(DIST_BACKENDS)


def test_no_two_vendors_answer_to_the_same_trace() -> None:
    for column in ("commands", "device_files", "card_names"):
        words = [word for vendor in VENDORS.values() for word in getattr(vendor, column)]
        assert len(words) == len(set(words)), column


def test_out_of_tree_vendors_name_an_attention_backend() -> None:
    """SGLang's own choice knows only its own platforms."""
    assert all(vendor.attention for vendor in VENDORS.values() if vendor.in_tree is None)


def test_aliases_lead_to_rows_and_hide_none() -> None:
    assert set(ALIASES.values()) <= set(VENDORS)
    assert not set(ALIASES) & set(VENDORS)
    assert {VENDORS[name].in_tree for name in ALIASES.values()} == {vendor.in_tree for vendor in VENDORS.values()} - {None}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cuda", "nvidia"),
        ("musa", "mthreads"),
        (" NPU ", "ascend"),
        ("NVIDIA", "nvidia"),
        ("Metax", "metax"),
        ("unheard-of", "unheard-of"),
        ("", ""),
    ],
)
def test_canonical(name: str, meant: str) -> None:
    assert canonical(name) == meant
