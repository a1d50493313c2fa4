# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings_loader import NVIDIA, Loader

from sglang_fl.config import (
    OPTIONS,
    Settings,
    Source,
    get_config_path,
    get_effective_config,
    get_flagos_blacklist,
    get_oot_blacklist,
    get_per_op_order,
    get_platform_name,
    hand_down,
    load_platform_config,
    settings_of_parent,
)
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch import config as config_of_dispatch
from sglang_fl.startup.words import flaggems_table

Profile = Callable[[str], None]

#: option -> two texts, for the variable and for the YAML key alike, with what they mean.
TEXTS: dict[str, tuple[tuple[str, Any], tuple[str, Any]]] = {
    "oot_enabled": (("0", False), ("on", True)),
    "prefer": (("vendor", "vendor"), ("Reference", "reference")),
    "op_backends": (
        ("rms_norm=vendor|flagos; silu_and_mul=reference", (("rms_norm", ("vendor", "flagos")), ("silu_and_mul", ("reference",)))),
        ("rotary_embedding = impl:reference.torch | sglang", (("rotary_embedding", ("impl:reference.torch", "sglang")),)),
    ),
    "strict": (("TRUE", True), ("no", False)),
    "triton_faster": (("rms_norm", ("rms_norm",)), ("rms_norm,silu_and_mul", ("rms_norm", "silu_and_mul"))),
    "oot_whitelist": (("RMSNorm", ("RMSNorm",)), ("SiluAndMul, RotaryEmbedding", ("SiluAndMul", "RotaryEmbedding"))),
    "oot_blacklist": (("RMSNorm", ("RMSNorm",)), ("SiluAndMul RotaryEmbedding", ("SiluAndMul", "RotaryEmbedding"))),
    "allow_vendors": (("ascend", ("ascend",)), ("metax,nvidia", ("metax", "nvidia"))),
    "deny_vendors": (("ascend", ("ascend",)), ("metax,metax,nvidia", ("metax", "nvidia"))),
    "dispatch_log": (("/tmp/a.log", "/tmp/a.log"), (" b.log ", "b.log")),
    "use_flaggems": (("off", False), ("1", True)),
    "flagos_whitelist": (("mul", ("mul",)), ("add,to_copy", ("add", "to_copy"))),
    "flagos_blacklist": (("mul", ("mul",)), ("add,to_copy", ("add", "to_copy"))),
    "flagos_faster": (("mul", ("mul",)), ("add,to_copy", ("add", "to_copy"))),
    "flagos_broken": (("mul", ("mul",)), ("add,to_copy", ("add", "to_copy"))),
    "flagos_slower": (("mul", ("mul",)), ("add,to_copy", ("add", "to_copy"))),
    "flagos_scope": (("graphs", "graphs"), ("Everywhere", "everywhere")),
    "trial_record": (("/tmp/trials.json", "/tmp/trials.json"), ("b.json", "b.json")),
    "trial_limit": (("30", 30.0), ("0.5", 0.5)),
    "flaggems_record": (("1", True), ("0", False)),
    "flaggems_log_path": (("/tmp/a.log", "/tmp/a.log"), ("b.log", "b.log")),
    "flaggems_log_once": (("0", False), ("yes", True)),
    "dist_backend": (("gloo", "gloo"), ("FlagCX", "flagcx")),
    "flagcx_path": (("/opt/flagcx", "/opt/flagcx"), ("other", "other")),
    "plugin_modules": (("one.module", ("one.module",)), ("two,three", ("two", "three"))),
    "log_level": (("debug", "DEBUG"), ("ERROR", "ERROR")),
    "dispatch_debug": (("1", True), ("false", False)),
    "patches": (("1", True), ("0", False)),
}
IN_FILES = [name for name, option in OPTIONS.items() if option.yaml]
WITH_VARIABLE = [name for name, option in OPTIONS.items() if option.env]


def test_the_texts_above_are_for_every_option() -> None:
    assert TEXTS.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", ["flagos_faster", "flagos_broken", "flagos_slower"])
def test_a_profile_has_keys_that_a_user_does_not(load: Loader, profile: Profile, name: str) -> None:
    for text, value in TEXTS[name]:
        profile(f"\n{name}: {text}\n")
        settings = load()
        assert getattr(settings, name) == value and str(settings.source(name)) == "profile cpu:2"
    profile(f"{name}: [of_another_release]\n")
    assert getattr(load(), name) == ("of_another_release",)


def test_defaults_of_options_and_of_settings_agree() -> None:
    assert {name: getattr(Settings(), name) for name in OPTIONS} == {name: option.default for name, option in OPTIONS.items()}


def test_the_interface_of_the_field() -> None:
    """Variables, defaults and keys as vendors and users write them today."""
    assert {(o.env, o.default, o.yaml) for o in OPTIONS.values()} == {
        ("SGLANG_FL_OOT_ENABLED", True, None),
        ("SGLANG_FL_PREFER", "flagos", "prefer"),
        ("SGLANG_FL_PER_OP", (), "op_backends"),
        ("SGLANG_FL_STRICT", False, "strict"),
        ("SGLANG_FL_OOT_WHITELIST", None, "oot_whitelist"),
        ("SGLANG_FL_OOT_BLACKLIST", None, "oot_blacklist"),
        ("SGLANG_FL_ALLOW_VENDORS", None, "allow_vendors"),
        ("SGLANG_FL_DENY_VENDORS", None, "deny_vendors"),
        ("SGLANG_FL_DISPATCH_LOG", None, None),
        ("USE_FLAGGEMS", True, None),
        ("SGLANG_FL_FLAGOS_WHITELIST", None, "flagos_whitelist"),
        ("SGLANG_FL_FLAGOS_BLACKLIST", None, "flagos_blacklist"),
        ("SGLANG_FL_FLAGOS_SCOPE", "everywhere", "flagos_scope"),
        ("SGLANG_FL_TRIAL_RECORD", None, "trial_record"),
        ("SGLANG_FL_TRIAL_LIMIT", 600.0, "trial_limit"),
        (None, None, None),  # the keys that only a profile has: flagos_faster, flagos_broken, flagos_slower, triton_faster
        ("SGLANG_FLAGGEMS_RECORD", False, None),
        ("SGLANG_FLAGGEMS_LOG_PATH", None, None),
        ("SGLANG_FLAGGEMS_LOG_ONCE", True, None),
        ("SGLANG_FL_DIST_BACKEND", None, "dist_backend"),
        ("FLAGCX_PATH", None, None),
        ("SGLANG_FL_PLUGIN_MODULES", None, None),
        ("SGLANG_FL_PATCHES", True, None),
        ("SGLANG_FL_LOG_LEVEL", "INFO", None),
        ("SGLANG_FL_DISPATCH_DEBUG", False, None),
    }


@pytest.mark.parametrize("name", WITH_VARIABLE)
def test_variable_sets_option(load: Loader, name: str) -> None:
    variable = OPTIONS[name].env
    assert variable is not None
    for text, value in TEXTS[name]:
        settings = load(**{variable: text})
        assert getattr(settings, name) == value
        assert str(settings.source(name)) == variable


@pytest.mark.parametrize("name", WITH_VARIABLE)
def test_empty_variable_is_as_if_unset(load: Loader, profile: Profile, name: str) -> None:
    profile("")
    variable = OPTIONS[name].env
    assert variable is not None
    settings = load(**{variable: "  "})
    assert getattr(settings, name) == OPTIONS[name].default
    assert str(settings.source(name)) == "default"


@pytest.mark.parametrize("name", IN_FILES)
def test_key_sets_option(load: Loader, name: str) -> None:
    for text, value in TEXTS[name]:
        settings = load(f"# first line\n\n{name}: {text}\n")
        assert getattr(settings, name) == value
        assert str(settings.source(name)) == f"{load.file}:3"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("strict: true", "strict", True),
        ("strict: off", "strict", False),
        ("strict: 1", "strict", True),
        ("oot_whitelist: [RMSNorm, SiluAndMul]", "oot_whitelist", ("RMSNorm", "SiluAndMul")),
        ("oot_whitelist: []", "oot_whitelist", ()),
        ("deny_vendors:\n- metax\n- metax\n- ascend", "deny_vendors", ("metax", "ascend")),
        ("op_backends: {}", "op_backends", ()),
        ("op_backends: {rms_norm: vendor|flagos}", "op_backends", (("rms_norm", ("vendor", "flagos")),)),
        ("op_backends:\n  rms_norm: [vendor:ascend, sglang]", "op_backends", (("rms_norm", ("vendor:ascend", "sglang")),)),
    ],
)
def test_shapes_of_yaml(load: Loader, text: str, name: str, value: Any) -> None:
    assert getattr(load(text), name) == value


def test_byte_order_mark_is_no_part_of_the_first_key(load: Loader) -> None:
    assert load(b"\xef\xbb\xbfprefer: vendor\n").prefer == "vendor"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}\n"])
def test_empty_file_sets_nothing(load: Loader, text: str) -> None:
    assert dict(load(text).sources) == dict(load().sources)


@pytest.mark.parametrize("name", [name for name in IN_FILES if name != "op_backends"])
def test_environment_over_file_over_profile_over_default(load: Loader, profile: Profile, name: str) -> None:
    """The higher value overrides the lower one: the two have nothing in common here. Orders are merged: see below."""
    (low_text, low), (high_text, high) = TEXTS[name]
    variable = OPTIONS[name].env
    assert variable is not None
    profile(f"\n{name}: {low_text}\n")

    settings = load()
    assert (getattr(settings, name), str(settings.source(name))) == (low, "profile cpu:2")
    settings = load(f"{name}: {high_text}\n")
    assert (getattr(settings, name), str(settings.source(name))) == (high, f"{load.file}:1")
    settings = load(f"{name}: {high_text}\n", **{variable: low_text})
    assert (getattr(settings, name), str(settings.source(name))) == (low, variable)
    settings = load(**{variable: high_text})
    assert (getattr(settings, name), str(settings.source(name))) == (high, variable)


def test_of_several_files_the_later_one_overrides(load: Loader, profile: Profile, tmp_path: Path) -> None:
    tuned, mine = tmp_path / "tuned.yaml", tmp_path / "mine.yaml"
    tuned.write_text("strict: true\nop_backends: {rms_norm: vendor, topk: vendor}\nflagos_faster: [mul]\nmeasured: {}\n")
    mine.write_text("strict: false\nop_backends: {topk: [sglang]}\n")
    profile("op_backends: {silu_and_mul: [sglang]}\n")
    settings = load(SGLANG_FL_CONFIG=f" {tuned}, {mine},")
    assert settings.strict is False and str(settings.source("strict")) == f"{mine}:1"
    assert dict(settings.op_backends) == {"silu_and_mul": ("sglang",), "rms_norm": ("vendor",), "topk": ("sglang",)}
    assert str(settings.source_of_order("rms_norm")) == f"{tuned}:2" and settings.flagos_functions == ("mul",)
    assert load(SGLANG_FL_CONFIG=f"{mine},{tuned}").strict is True
    mine.write_text("prefer: reference\n")
    assert load(SGLANG_FL_CONFIG=f"{tuned},{mine}").op_backends == ()
    assert load.problems(SGLANG_FL_CONFIG=f"{tuned},{tmp_path}/no.yaml") == (f"SGLANG_FL_CONFIG: there is no file '{tmp_path}/no.yaml'",)


@pytest.mark.parametrize("name", IN_FILES)
def test_null_resets_to_the_default(load: Loader, profile: Profile, name: str) -> None:
    profile(f"{name}: {TEXTS[name][0][0]}\n")
    settings = load(f"\n{name}: null\n")
    assert getattr(settings, name) == OPTIONS[name].default
    assert str(settings.source(name)) == f"{load.file}:2"


def test_null_for_the_scope_goes_by_the_chip(load: Loader) -> None:
    assert (
        load("flagos_scope: null\n", SGLANG_FL_PLATFORM="metax").flagos_scope == load(SGLANG_FL_PLATFORM="metax").flagos_scope == "graphs"
    )


def test_a_value_over_null(load: Loader) -> None:
    assert load("oot_whitelist: null\n", SGLANG_FL_OOT_WHITELIST="RMSNorm").oot_whitelist == ("RMSNorm",)


def test_absent_keys_leave_lower_sources_alone(load: Loader, profile: Profile) -> None:
    profile("strict: 1\nprefer: vendor\n")
    settings = load("prefer: reference\n", SGLANG_FL_DENY_VENDORS="metax")
    assert (settings.strict, settings.prefer, settings.deny_vendors) == (True, "reference", ("metax",))


ORDERS = "rms_norm=reference"


@pytest.mark.parametrize(
    ("prefer_from", "orders_from", "kept"),
    [
        ("file", "profile", False),
        ("environment", "profile", False),
        ("environment", "file", False),
        ("profile", "profile", True),
        ("file", "file", True),
        ("environment", "environment", True),
        ("profile", "file", True),
        ("profile", "environment", True),
        ("file", "environment", True),
    ],
)
def test_prefer_overrides_the_orders_of_lower_sources(
    load: Loader, profile: Profile, prefer_from: str, orders_from: str, kept: bool
) -> None:
    texts: dict[str, dict[str, str]] = {"profile": {}, "file": {}, "environment": {}}
    texts[prefer_from]["prefer"] = "vendor"
    texts[orders_from]["op_backends"] = ORDERS
    profile("".join(f"{key}: {value}\n" for key, value in texts["profile"].items()))
    file = "".join(f"{key}: {value}\n" for key, value in texts["file"].items())
    environ = {str(OPTIONS[key].env): value for key, value in texts["environment"].items()}

    settings = load(file, **environ)
    assert settings.prefer == "vendor"
    assert settings.op_backends == ((("rms_norm", ("reference",)),) if kept else ())
    source = str(settings.source("op_backends"))
    if not kept:
        lower = "profile cpu:1" if orders_from == "profile" else f"{load.file}:1"
        higher = "SGLANG_FL_PREFER" if prefer_from == "environment" else f"{load.file}:1"
        assert source == f"default; prefer from {higher} overrides the orders of {lower}"


def test_orders_are_joined_operator_by_operator(load: Loader, profile: Profile) -> None:
    profile("\nop_backends: {rms_norm: sglang, silu_and_mul: sglang, topk: sglang}\n")
    settings = load("op_backends: {silu_and_mul: vendor, topk: vendor}\n", SGLANG_FL_PER_OP="topk=flagos;fused_moe=flagos")
    expected = {"rms_norm": "sglang", "silu_and_mul": "vendor", "topk": "flagos", "fused_moe": "flagos"}
    assert dict(settings.op_backends) == {op: (order,) for op, order in expected.items()}
    assert str(settings.source("op_backends")) == f"SGLANG_FL_PER_OP and {load.file}:1 and profile cpu:2"
    places = {op: str(settings.source_of_order(op)) for op in ("rms_norm", "silu_and_mul", "topk", "fused_moe", "new_gelu")}
    assert places == {
        "rms_norm": "profile cpu:2",
        "silu_and_mul": f"{load.file}:1",
        "topk": "SGLANG_FL_PER_OP",
        "fused_moe": "SGLANG_FL_PER_OP",
        "new_gelu": "default",
    }
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("file", "variables", "expected", "source"),
    [
        ("op_backends: {rms_norm: vendor}", {}, {"rms_norm": "vendor"}, "{file}:1"),  # nothing of the profile's is left
        ("op_backends: {}", {}, {"rms_norm": "sglang"}, "profile cpu:1"),  # names nothing, so it changes nothing
        ("op_backends: null", {}, {}, "{file}:1"),
        ("op_backends: null", {"SGLANG_FL_PER_OP": "topk=vendor"}, {"topk": "vendor"}, "SGLANG_FL_PER_OP"),
        ("prefer: vendor", {"SGLANG_FL_PER_OP": "topk=vendor"}, {"topk": "vendor"}, "SGLANG_FL_PER_OP"),
        ("prefer: vendor\nop_backends: {topk: flagos}", {}, {"topk": "flagos"}, "{file}:2"),
        (
            "op_backends: {topk: flagos}",
            {"SGLANG_FL_PREFER": "vendor"},
            {},
            "default; prefer from SGLANG_FL_PREFER overrides the orders of {file}:1 and profile cpu:1",
        ),
        (
            "op_backends: {topk: flagos}",
            {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_PER_OP": "fused_moe=flagos"},
            {"fused_moe": "flagos"},
            "SGLANG_FL_PER_OP",
        ),
    ],
)
def test_what_drops_the_orders_of_lower_sources(
    load: Loader, profile: Profile, file: str, variables: dict[str, str], expected: dict[str, str], source: str
) -> None:
    profile("op_backends: {rms_norm: sglang}\n")
    settings = load(file + "\n", **variables)
    assert dict(settings.op_backends) == {op: (order,) for op, order in expected.items()}
    assert str(settings.source("op_backends")) == source.format(file=load.file)


def test_naming_one_operator_leaves_the_others_as_a_real_profile_has_them(on_nvidia: Loader) -> None:
    before, after = dict(on_nvidia().op_backends), dict(on_nvidia(SGLANG_FL_PER_OP="rms_norm=flagos|sglang").op_backends)
    assert after.pop("rms_norm") == ("flagos", "sglang") != before.pop("rms_norm")
    assert after == before


def test_prefer_overrides_the_orders_of_a_real_profile(on_nvidia: Loader) -> None:
    """But for this package's Triton kernels, where the profile has them as faster than FlagGems's."""
    assert on_nvidia().op_backends != ()
    preferred = on_nvidia(SGLANG_FL_PREFER="flagos")
    assert {op: order[:2] for op, order in preferred.op_backends} == dict.fromkeys(preferred.triton_faster or (), ("triton", "flagos"))
    orders = on_nvidia(SGLANG_FL_PREFER="vendor").op_backends
    assert {op: order[:3] for op, order in orders} == dict.fromkeys(preferred.triton_faster or (), ("vendor", "triton", "flagos"))
    assert on_nvidia(SGLANG_FL_PREFER="reference").op_backends == ()


def test_prefer_overrides_no_orders_where_there_are_none(on_nvidia: Loader) -> None:
    assert str(on_nvidia("op_backends: null\n", SGLANG_FL_PREFER="reference").source("op_backends")) == f"{on_nvidia.file}:1"
    assert "profile nvidia" in str(on_nvidia(SGLANG_FL_PREFER="reference").source("op_backends"))


def test_prefer_null_is_no_preference(on_nvidia: Loader) -> None:
    """It takes a preference back; the profile's orders have nothing that overrides them."""
    assert on_nvidia("prefer: null\n").op_backends == on_nvidia().op_backends != ()


PAIRS = [("oot_whitelist", "oot_blacklist"), ("flagos_whitelist", "flagos_blacklist")]
PLACES = ("profile", "file", "environment")


def _in_places(profile: Profile, **places: tuple[str, str]) -> tuple[str, dict[str, str]]:
    """Write key -> (place, text): the profile; returned are the file's text and the variables."""
    texts: dict[str, str] = dict.fromkeys(PLACES, "")
    environ: dict[str, str] = {}
    for key, (place, text) in places.items():
        texts[place] += f"{key}: {text}\n"
        if place == "environment":
            environ[str(OPTIONS[key].env)] = text
    profile(texts["profile"])
    return texts["file"], environ


@pytest.mark.parametrize(("white", "black"), PAIRS)
@pytest.mark.parametrize("white_place", PLACES)
@pytest.mark.parametrize("black_place", PLACES)
def test_whitelist_and_blacklist(load: Loader, profile: Profile, white: str, black: str, white_place: str, black_place: str) -> None:
    first, second = ("RMSNorm", "SiluAndMul") if white == "oot_whitelist" else ("mul", "add")
    file, environ = _in_places(profile, **{white: (white_place, first), black: (black_place, second)})
    if PLACES.index(white_place) > PLACES.index(black_place):
        settings = load(file, **environ)
        assert getattr(settings, white) == (first,)
        assert getattr(settings, black) is None and settings.source(black) == settings.source(white)
    else:
        (problem,) = load.problems(file, **environ)
        line_of_black = 2 if white_place == black_place else 1
        for key, place, line in ((white, white_place, 1), (black, black_place, line_of_black)):
            assert (str(OPTIONS[key].env) if place == "environment" else f".yaml:{line}: {key}") in problem
        assert "not both" in problem
        assert (f"{white}: null" in problem) == (white_place != black_place)


@pytest.mark.parametrize(("white", "black"), PAIRS)
def test_null_drops_a_lower_list(load: Loader, profile: Profile, white: str, black: str) -> None:
    name = "RMSNorm" if white == "oot_whitelist" else "mul"
    profile(f"{white}: {name}\n")
    settings = load(f"{white}: null\n{black}: {name}\n")
    assert (getattr(settings, white), getattr(settings, black)) == (None, (name,))
    settings = load(f"{white}: null\n", **{str(OPTIONS[black].env): name})
    assert (getattr(settings, white), getattr(settings, black)) == (None, (name,))


KNOWN = ("add", "mm", "mul")


@pytest.mark.parametrize(
    ("more", "environ", "orders", "source"),
    [
        ("", {"SGLANG_FL_PREFER": "flagos"}, {"rms_norm": "triton|flagos|vendor|reference"}, "profile cpu:2"),
        ("", {"SGLANG_FL_PREFER": "vendor"}, {"rms_norm": "vendor|triton|flagos|reference"}, "profile cpu:2"),
        ("", {"SGLANG_FL_PREFER": "reference"}, {}, "SGLANG_FL_PREFER"),
        (
            "",
            {"SGLANG_FL_PREFER": "flagos", "SGLANG_FL_PER_OP": "rms_norm=flagos;topk=sglang"},
            {"rms_norm": "flagos", "topk": "sglang"},
            "SGLANG_FL_PER_OP",
        ),
        ("op_backends: {rms_norm: [sglang]}", {}, {"rms_norm": "sglang"}, "profile cpu:3"),
        (
            "op_backends: {rms_norm: [sglang]}",
            {"SGLANG_FL_PREFER": "flagos"},
            {"rms_norm": "triton|flagos|vendor|reference"},
            "profile cpu:2",
        ),
    ],
)
def test_a_profile_puts_our_triton_kernels_before_those_of_flaggems(
    load: Loader, profile: Profile, more: str, environ: dict[str, str], orders: dict[str, str], source: str
) -> None:
    profile(f"\ntriton_faster: [rms_norm]\n{more}\n")
    settings = load(**environ)
    assert {op: "|".join(order) for op, order in settings.op_backends} == orders
    assert source in str(settings.source_of_order("rms_norm"))


FASTER_AND_BROKEN = "flagos_faster: [add, mul]\nflagos_broken: [mul]"


@pytest.mark.parametrize(
    ("profile_says", "file_says", "environ", "functions"),
    [
        ("", "", {}, "add mm mul"),
        ("flagos_faster: []", "", {}, ""),
        ("flagos_faster: [mul]", "", {}, "mul"),
        ("flagos_broken: [mul]", "", {}, "add mm"),
        ("flagos_slower: [mul]", "", {}, "add mm"),
        ("flagos_slower: [mul]", "flagos_whitelist: [mul]", {}, "mul"),
        (FASTER_AND_BROKEN, "", {}, "add"),
        (FASTER_AND_BROKEN, "prefer: flagos", {}, "add mm"),
        (FASTER_AND_BROKEN, "", {"SGLANG_FL_PREFER": "flagos"}, "add mm"),
        (FASTER_AND_BROKEN, "prefer: null", {}, "add"),
        (FASTER_AND_BROKEN, "prefer: vendor", {}, "add"),
        (f"prefer: flagos\n{FASTER_AND_BROKEN}", "", {}, "add"),
        (FASTER_AND_BROKEN, "flagos_blacklist: [add]", {}, ""),
        (FASTER_AND_BROKEN, "flagos_blacklist: null", {}, "add"),
        (FASTER_AND_BROKEN, "flagos_blacklist: [add]", {"SGLANG_FL_PREFER": "flagos"}, "mm"),
        (FASTER_AND_BROKEN, "", {"SGLANG_FL_FLAGOS_WHITELIST": "mul,mm"}, "mm mul"),  # also a broken one: they said so
        (FASTER_AND_BROKEN, "flagos_whitelist: []\nprefer: flagos", {}, ""),
        (FASTER_AND_BROKEN, "flagos_blacklist: [add]", {"SGLANG_FL_FLAGOS_WHITELIST": "add"}, "add"),
        ("flagos_whitelist: [mul]", "", {}, "mul"),  # a vendor's profile of before: values of a lower source
        ("flagos_whitelist: [mul]", "flagos_whitelist: [mm]", {}, "mm"),
        ("flagos_whitelist: [mul]", "flagos_whitelist: null\nflagos_blacklist: [mm]", {}, "add mul"),
        ("flagos_blacklist: [mul]", "prefer: flagos", {}, "add mm"),
        ("flagos_blacklist: [mul]", "flagos_blacklist: [mm]", {}, "add mul"),
    ],
)
def test_flaggems_functions_in_use(
    load: Loader, profile: Profile, profile_says: str, file_says: str, environ: dict[str, str], functions: str
) -> None:
    """What was measured decides by default; a user's lists mean what they say."""
    profile(profile_says)
    settings = load(file_says, **environ)
    in_use = [function for function in KNOWN if settings.flagos_exclusion_reason(function) is None]
    assert in_use == functions.split()
    assert settings.flagos_functions is None or sorted(settings.flagos_functions) == in_use
    assert Settings.from_json(settings.to_json()).flagos_functions == settings.flagos_functions


def test_the_reason_for_a_flaggems_function_that_is_not_in_use(load: Loader, profile: Profile) -> None:
    profile(FASTER_AND_BROKEN)
    settings = load("flagos_blacklist: [add]")
    assert settings.flagos_exclusion_reason("add") == f"flagos_blacklist ({load.file}:1)"
    assert settings.flagos_exclusion_reason("mul") == "flagos_broken (profile cpu:2)"
    assert settings.flagos_exclusion_reason("mm") == "not in flagos_faster (profile cpu:1)"
    settings = load(SGLANG_FL_FLAGOS_WHITELIST="add")
    assert settings.flagos_exclusion_reason("mul") == "not in flagos_whitelist (SGLANG_FL_FLAGOS_WHITELIST)"


def test_what_is_excluded_is_so_with_its_variants(load: Loader, profile: Profile) -> None:
    """They are the same kernel. A whitelist, and the name of a variant, are exact."""
    profile("flagos_broken: [mul]\nflagos_slower: [mm, tanh_]")
    settings = load(SGLANG_FL_PREFER="flagos", SGLANG_FL_FLAGOS_BLACKLIST="fill_scalar")
    reasons = {
        name: settings.flagos_exclusion_reason(name) for name in ("mul_", "mm_out", "fill_scalar_", "fill_scalar_out", "tanh", "addmm")
    }
    assert reasons == {
        "mul_": "flagos_broken: mul (profile cpu:1)",
        "mm_out": "flagos_slower: mm (profile cpu:2)",
        "fill_scalar_": "flagos_blacklist: fill_scalar (SGLANG_FL_FLAGOS_BLACKLIST)",
        "fill_scalar_out": "flagos_blacklist: fill_scalar (SGLANG_FL_FLAGOS_BLACKLIST)",
        "tanh": None,
        "addmm": None,
    }
    whitelist = load(SGLANG_FL_FLAGOS_WHITELIST="mul_")
    assert whitelist.flagos_exclusion_reason("mul_") is None and whitelist.flagos_exclusion_reason("mul") is not None


def test_no_form_of_what_is_wrong_or_slow_on_nvidia_is_left(on_nvidia: Loader) -> None:
    """By the ATen operators that FlagGems registers: ``bmm.out`` is as slow as ``bmm``."""
    settings = on_nvidia(SGLANG_FL_PREFER="flagos")
    listed = {*(settings.flagos_broken or ()), *(settings.flagos_slower or ())}
    rows = flaggems_table()
    assert rows and listed <= {function for _, function in rows}
    operators = {key.partition(".")[0] for key, function in rows if function in listed}
    variants = [(key, function) for key, function in rows if key.partition(".")[0].removesuffix("_") in operators]
    assert [row for row in variants if settings.flagos_exclusion_reason(row[1]) is None] == []


def test_lists_of_different_kinds_may_stand_together(load: Loader) -> None:
    settings = load("oot_whitelist: [RMSNorm]\nflagos_blacklist: [mul]\n")
    assert (settings.oot_whitelist, settings.flagos_blacklist) == (("RMSNorm",), ("mul",))


@pytest.mark.parametrize(
    ("environ", "library"),
    [
        ({}, None),
        ({"FLAGCX_PATH": "/opt/flagcx"}, "flagcx"),
        ({"FLAGCX_PATH": "/opt/flagcx", "SGLANG_FL_DIST_BACKEND": "nccl"}, "nccl"),
        ({"SGLANG_FL_DIST_BACKEND": "flagcx"}, "flagcx"),
    ],
)
def test_flagcx_path_alone_chooses_flagcx(load: Loader, environ: dict[str, str], library: str | None) -> None:
    assert load(**environ).collective == library


def test_config_file_in_the_home_directory(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("prefer: vendor\n")
    settings = load(SGLANG_FL_CONFIG="~/mine.yaml")
    assert (settings.prefer, str(settings.source("prefer"))) == ("vendor", "~/mine.yaml:1")


@pytest.mark.parametrize(
    ("environ", "vendor", "in_tree", "profile_name"),
    [
        ({}, "nvidia", "cuda", "nvidia"),
        ({}, "ascend", "npu", "ascend"),
        ({}, "amd", "rocm", "in_tree"),
        ({}, "metax", None, None),
        ({}, "cpu", None, "cpu"),
        ({}, "cpu", "cpu", "in_tree"),
        ({"SGLANG_FL_PLATFORM": "nvidia"}, "cpu", None, "nvidia"),
        ({"SGLANG_FL_PLATFORM": "cuda"}, "cpu", None, "nvidia"),
        ({"SGLANG_FL_PLATFORM": " NPU "}, "cpu", None, "ascend"),
        ({"SGLANG_FL_PLATFORM": "musa"}, "cpu", None, "mthreads"),
        ({"SGLANG_FL_PLATFORM": "mthreads"}, "cpu", None, "mthreads"),
        ({"SGLANG_FL_PLATFORM": "metax"}, "nvidia", "cuda", None),
        ({"SGLANG_FL_PLATFORM": "cpu"}, "nvidia", "cuda", "cpu"),
        ({"SGLANG_FL_PLATFORM": ""}, "nvidia", "cuda", "nvidia"),
    ],
)
def test_profile_of_platform(load: Loader, environ: dict[str, str], vendor: str, in_tree: str | None, profile_name: str | None) -> None:
    load.device = Device(vendor, VENDORS[vendor].device_type, in_tree, "a test")
    settings = load(**environ)
    assert (settings.profile_file and Path(settings.profile_file).stem) == profile_name
    wanted = environ.get("SGLANG_FL_PLATFORM", "").strip().lower()
    assert settings.platform == ({"cuda": "nvidia", "npu": "ascend", "musa": "mthreads"}.get(wanted, wanted) or vendor)


def test_without_words_names_are_taken_as_they_are(load: Loader) -> None:
    load.words = None
    settings = load("oot_blacklist: [Anything]\nop_backends: {any_op: 'impl:any.thing'}\n", SGLANG_FL_DENY_VENDORS="anyone")
    assert (settings.oot_blacklist, settings.deny_vendors) == (("Anything",), ("anyone",))
    assert settings.op_backends == (("any_op", ("impl:any.thing",)),)


NAMES = st.lists(st.text(), max_size=3).map(tuple)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    str: st.text(),
    str | None: st.none() | st.text(),
    float: st.floats(0, 1e5),
    tuple[str, ...] | None: st.none() | NAMES,
    tuple[tuple[str, tuple[str, ...]], ...]: st.lists(st.tuples(st.text(), NAMES), max_size=3).map(tuple),
    Mapping[str, Source]: st.dictionaries(st.sampled_from(list(OPTIONS)), st.builds(Source, st.integers(0, 3), st.text())),
}


@given(
    st.fixed_dictionaries({name: BY_TYPE[hint] for name, hint in get_type_hints(Settings).items()}).map(lambda values: Settings(**values))
)
def test_json_round_trip(settings: Settings) -> None:
    text = settings.to_json()
    assert Settings.from_json(text) == settings
    assert "\0" not in text and "\n" not in text, "it travels in an environment variable"


@pytest.mark.parametrize("name", WITH_VARIABLE)
def test_settings_reach_worker_processes(load: Loader, name: str) -> None:
    settings = load(**{str(OPTIONS[name].env): TEXTS[name][0][0]})
    environ = {str(OPTIONS[name].env): TEXTS[name][0][0]}
    hand_down(settings, environ)
    inherited = settings_of_parent(environ)
    assert inherited == settings
    assert inherited is not None and inherited.source(name) == settings.source(name)


def test_no_parent_no_settings() -> None:
    assert settings_of_parent({}) is None


def test_items_are_the_options_in_order(load: Loader) -> None:
    items = list(load(SGLANG_FL_STRICT="1").items())
    assert [name for name, _, _ in items] == list(OPTIONS)
    assert ("strict", True, "SGLANG_FL_STRICT") in [(name, value, str(source)) for name, value, source in items]
    json.dumps([value for _, value, _ in items])


@pytest.fixture
def nvidia_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for module in ("sglang_fl.config", "sglang_fl.config.loader"):
        monkeypatch.setattr(f"{module}.probe", lambda environ=None: NVIDIA)
    yield monkeypatch


def test_what_tools_of_flagos_ask(nvidia_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert get_platform_name() == "nvidia"
    assert Path(get_config_path() or "").name == "nvidia.yaml"
    orders = (load_platform_config() or {})["op_backends"]
    assert "rms_norm" in orders
    assert (load_platform_config("cpu") or {}) == {"prefer": "reference"}
    assert load_platform_config("metax") is None
    assert get_per_op_order() == orders
    assert get_oot_blacklist() is None
    measured = load_platform_config() or {}
    left_out = [*measured["flagos_broken"], *measured["flagos_slower"]]
    assert get_flagos_blacklist() == left_out
    nvidia_machine.setenv("SGLANG_FL_FLAGOS_BLACKLIST", "softmax")
    assert get_flagos_blacklist() == ["softmax", *left_out]
    nvidia_machine.delenv("SGLANG_FL_FLAGOS_BLACKLIST")
    assert get_effective_config().keys() == OPTIONS.keys()

    file = tmp_path / "mine.yaml"
    file.write_text("oot_blacklist: [RMSNorm]\nflagos_blacklist: []\nprefer: reference\n")
    nvidia_machine.setenv("SGLANG_FL_CONFIG", str(file))
    nvidia_machine.setenv("SGLANG_FL_PLATFORM", "metax")
    assert get_platform_name() == "metax"
    assert get_config_path() == str(file)
    nvidia_machine.setenv("SGLANG_FL_CONFIG", f"other.yaml,{file}")
    assert get_config_path() == str(file)
    nvidia_machine.setenv("SGLANG_FL_CONFIG", str(file))
    assert get_oot_blacklist() == ["RMSNorm"]
    assert get_flagos_blacklist() == []
    assert get_per_op_order() is None
    assert get_effective_config()["prefer"] == "reference"
    nvidia_machine.delenv("SGLANG_FL_CONFIG")
    assert get_config_path() is None


def test_backends_of_flagos_find_the_same_functions_under_dispatch() -> None:
    names = [name for name in vars(config_of_dispatch) if not name.startswith("_")]
    assert len(names) == 7
    for name in names:
        assert getattr(config_of_dispatch, name) is globals()[name]
