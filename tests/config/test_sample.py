# SPDX-License-Identifier: Apache-2.0
"""The YAML files that the package brings along."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from settings_loader import CPU, Loader

import sglang_fl.config
from sglang_fl.config import OPTIONS, Words, load_settings
from sglang_fl.config.options import DIST_BACKENDS, PREFERENCES
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.startup.words import flaggems_functions, settings_words

DIRECTORY = Path(sglang_fl.config.__file__).parent
SAMPLE = DIRECTORY / "sample.yaml"
PROFILES = sorted(path.stem for path in DIRECTORY.glob("*.yaml") if path != SAMPLE)
IN_TREE_PROFILES = [name for name in PROFILES if name == "in_tree" or VENDORS[name].in_tree]


def parsed(name: str) -> dict[str, Any]:
    return yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")) or {}


@pytest.fixture(scope="module")
def words() -> Words:
    """Those that a server checks against, with the backends of this machine."""
    return settings_words(OpManager())


def test_words_are_there(words: Words) -> None:
    assert set(OPERATORS) <= (words.operators or set())
    assert {"RMSNorm", "SiluAndMul", "RotaryEmbedding"} <= (words.classes or set())
    assert set(VENDORS) <= (words.vendors or set())
    assert "reference.torch" in (words.impls or set())
    assert "reference.torch" not in (settings_words(None).impls or set())


def test_functions_of_flaggems_are_read_from_its_source() -> None:
    if importlib.util.find_spec("flag_gems") is None:
        pytest.skip("FlagGems is not installed")
    functions = flaggems_functions()
    assert functions is not None and {"mul", "add", "to_copy", "softmax"} <= functions and len(functions) > 100


def test_sample_is_valid(words: Words) -> None:
    settings = load_settings({"SGLANG_FL_CONFIG": str(SAMPLE)}, device=CPU, words=words)
    assert all(str(settings.source(name)).startswith(f"{SAMPLE}:") for name, option in OPTIONS.items() if option.yaml)


def test_sample_has_every_key() -> None:
    assert list(parsed("sample")) == [option.yaml for option in OPTIONS.values() if option.yaml]


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.yaml], ids=lambda option: option.name)
def test_sample_explains_every_key(option: Any) -> None:
    """A comment stands above each key, alone or above it and its neighbour, and names the variable."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{option.yaml}:"))
    block = []
    while at >= 0 and lines[at].strip():
        block.append(lines[at])
        at -= 1
    comments = [line for line in block if line.startswith("#")]
    assert any(option.env in line for line in comments)
    assert any(len(line.removeprefix("#").split()) > 4 for line in comments)


@pytest.mark.parametrize("key", ["op_backends", "prefer", "dist_backend"])
def test_sample_names_every_word_that_may_be_used(key: str) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    words = {"op_backends": ("vendor:", "impl:", "sglang"), "prefer": PREFERENCES, "dist_backend": DIST_BACKENDS}[key]
    assert [word for word in words if word not in text] == []


def test_every_profile_is_of_a_known_platform() -> None:
    assert {"nvidia", "ascend", "cpu", "in_tree"} <= set(PROFILES) <= {*VENDORS, "in_tree"}


@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_valid(name: str, words: Words) -> None:
    device = Device("cpu", "cpu", "cpu", "a test") if name == "in_tree" else CPU
    environ = {} if name == "in_tree" else {"SGLANG_FL_PLATFORM": name}
    settings = load_settings(environ, device=device, words=words)
    assert settings.profile_file == str(DIRECTORY / f"{name}.yaml")
    sources = {key: str(source).split(":")[0] for key, source in settings.sources.items()}
    sources.pop("flagos_scope", None)  # what the profile leaves open goes by whether the chip captures graphs
    assert set(sources.values()) == {f"profile {name}"}


@pytest.mark.parametrize("name", IN_TREE_PROFILES)
def test_profile_of_an_in_tree_platform_names_every_operator(name: str) -> None:
    assert set(parsed(name)["op_backends"]) == set(OPERATORS)


#: FlagGems functions that were reported as wrong, and that the release which we were tested with does not have.
OF_OTHER_RELEASES = {"index_copy_", "linear", "unique", "unique_dim", "nonzero_numpy"}
REPORTED = ("ascend", "mthreads", "kunlunxin")


@pytest.mark.parametrize("name", PROFILES)
def test_functions_that_a_profile_calls_broken_exist(name: str) -> None:
    known = flaggems_functions()
    if known is None:
        pytest.skip("FlagGems is not installed")
    assert set(parsed(name).get("flagos_broken", ())) <= known | OF_OTHER_RELEASES


@pytest.mark.parametrize("name", REPORTED)
def test_what_was_reported_says_who_did_and_when(name: str) -> None:
    """And stays out where FlagOS is preferred for everything."""
    text = (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.partition("flagos_broken:\n")[2].splitlines() if line.startswith("  - ")]
    functions = parsed(name)["flagos_broken"]
    assert len(lines) == len(functions) >= 7
    assert all("# reported by " in line and line.endswith((", 2026-08-06", ", noted on 2026-11-28")) for line in lines)
    settings = load_settings({"SGLANG_FL_PLATFORM": name, "SGLANG_FL_PREFER": "flagos"}, device=CPU)
    assert settings.flagos_functions is None, "all of them, but for those"
    assert all("flagos_broken" in (settings.flagos_exclusion_reason(function) or "") for function in functions)


@pytest.mark.parametrize("name", ["kunlunxin", "tsingmicro"])
def test_all_that_is_known_of_a_chip_out_of_tree_was_reported(name: str) -> None:
    entries = [line for line in (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    assert entries and all(line.endswith("# reported by FlagOS's SGLang plugin, 2026-08-06") for line in entries)


@pytest.mark.parametrize("name", IN_TREE_PROFILES)
def test_profile_of_an_in_tree_platform_never_falls_from_sglang_into_plain_torch(name: str) -> None:
    orders = parsed(name)["op_backends"]
    for op in OPERATORS:
        assert "sglang" in orders[op]
        assert "reference" not in orders[op][: orders[op].index("sglang")]


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_have_keys_of_their_own_for_what_was_measured(name: str) -> None:
    """The white and blacklists of functions are a user's; that of layers may say what was reported."""
    assert not {"flagos_whitelist", "flagos_blacklist", "oot_whitelist"} & set(parsed(name))
    assert ("oot_blacklist" in parsed(name)) == (name == "kunlunxin")


@pytest.mark.parametrize("vendor", [vendor for vendor in VENDORS.values() if vendor.in_tree], ids=lambda vendor: vendor.name)
def test_every_in_tree_platform_has_orders(load: Loader, vendor: Any) -> None:
    load.device = Device(vendor.name, vendor.device_type, vendor.in_tree, "a test")
    orders = dict(load().op_backends)
    assert all("sglang" in orders[op] for op in OPERATORS)
