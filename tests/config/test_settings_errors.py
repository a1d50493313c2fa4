# SPDX-License-Identifier: Apache-2.0
"""Whatever a setting cannot be: a SettingsError that says where it stands and which word was meant."""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from settings_loader import Loader

from sglang_fl.config import OPTIONS, Settings, SettingsError, load_platform_config, suggest
from sglang_fl.startup.words import settings_words

VARIABLES_ONLY = [(name, option.env) for name, option in OPTIONS.items() if not option.yaml and option.env]
VARIABLES = [str(option.env) for option in OPTIONS.values() if option.env]


def place_of(problem: str) -> str:
    """What stands before the sentence: ``file:line``, or a variable."""
    return re.split(r":? ", problem, maxsplit=1)[0]


@pytest.mark.parametrize(
    ("text", "line", "offending", "nearest"),
    [
        ("\nprefr: vendor\n", 2, "'prefr'", "prefer"),
        ("strict: 1\nOOT_blacklist: []\n", 2, "'OOT_blacklist'", "oot_blacklist"),
        ("1: vendor\n", 1, "1", None),
        ("on: vendor\n", 1, "True", None),
        ("# text\nprefer: vendr\n", 2, "'vendr'", "vendor"),
        ("prefer: [vendor]\n", 1, "['vendor']", "vendor"),
        ("prefer: no\n", 1, "False", None),
        ("dist_backend: ncl\n", 1, "'ncl'", "nccl"),
        ("strict: ture\n", 1, "'ture'", "true"),
        ("strict: 2\n", 1, "2", None),
        ("strict: ''\n", 1, "''", None),
        ("op_backends:\n  rms_norm: vendor\n  rms_nrm: vendor\n", 3, "'rms_nrm'", "rms_norm"),
        ("op_backends: {RMS_NORM: vendor}\n", 1, "'RMS_NORM'", "rms_norm"),
        ("op_backends:\n  rms_norm: vendor\n  silu_and_mul: flagos|refernce\n", 3, "'refernce'", "reference"),
        ("op_backends:\n  rms_norm: [vendor, 'sglng']\n", 2, "'sglng'", "sglang"),
        ("op_backends: {rms_norm: 'vendor:nvdia'}\n", 1, "'nvdia'", "nvidia"),
        ("op_backends: {rms_norm: 'impl:reference.trch'}\n", 1, "'reference.trch'", "reference.torch"),
        ("op_backends: {rms_norm: reference.torch}\n", 1, "'reference.torch'", "impl:reference.torch"),
        ("op_backends: {rms_norm: 'vendor:'}\n", 1, "missing after the colon", None),
        ("op_backends: {rms_norm: [vendor, vendor]}\n", 1, "'vendor|vendor'", None),
        ("op_backends:\n  rms_norm: [vendor]\n  silu_and_mul: 3\n", 3, "3", None),
        ("op_backends:\n  rms_norm: [vendor]\n  silu_and_mul: []\n", 3, "silu_and_mul", None),
        ("op_backends:\n  rms_norm: [vendor]\n  silu_and_mul:\n", 3, "None", None),
        ("op_backends:\n  rms_norm: [vendor]\n  silu_and_mul: flagos||vendor\n", 3, "'flagos||vendor'", None),
        ("op_backends:\n  rms_norm: [vendor]\n  7: vendor\n", 3, "7", None),
        ("op_backends: [rms_norm]\n", 1, "['rms_norm']", None),
        ("op_backends: rms_norm\n", 1, "'rms_norm'", None),
        ("op_backends: true\n", 1, "True", None),
        ("oot_whitelist: [rmsnorm]\n", 1, "'rmsnorm'", "RMSNorm"),
        ("oot_blacklist:\n- RMSNorm\n- SiluAndMull\n", 3, "'SiluAndMull'", "SiluAndMul"),
        ("allow_vendors: nvdia\n", 1, "'nvdia'", "nvidia"),
        ("deny_vendors:\n  - metax\n\n  - acsend\n", 4, "'acsend'", "ascend"),
        ("flagos_whitelist: [tocopy]\n", 1, "'tocopy'", "to_copy"),
        ("flagos_blacklist: [mul,\n  to_cop]\n", 2, "'to_cop'", "to_copy"),
        ("allow_vendors: {nvidia: 1}\n", 1, "{'nvidia': 1}", None),
        ("allow_vendors: 3\n", 1, "3", None),
        ("deny_vendors:\n  - metax\n  - 3\n", 3, "3", None),
        ("deny_vendors:\n  - metax\n  - [ascend]\n", 3, "['ascend']", None),
        ("- prefer\n", 1, "'prefer'", None),
        ("# text\nprefer vendor\n", 2, "'prefer vendor'", None),
        ("prefer: vendor\nstrict: 1\nprefer: flagos\n", 3, "'prefer'", "line 1"),
        ("op_backends:\n  rms_norm: vendor\n  silu_and_mul: vendor\n  rms_norm: flagos\n", 4, "'rms_norm'", "line 2"),
        ("prefer: vendor\n  strict: 1\n", 2, "not valid YAML", None),
        ("prefer: vendor\n\tstrict: 1\n", 2, "not valid YAML", None),
        ("prefer: 'vendor\n", 2, "not valid YAML", None),
        ("strict: 1\nprefer: !!python/name:os.system ''\n", 2, "not valid YAML", None),
        ("prefer: vendor\n---\nprefer: flagos\n", 2, "document", None),
        ("strict: 1\nprefer: fl\0agos\n", 2, "not valid YAML", None),
        ("strict: 1\nprefer: 2024-13-45\n", 2, "2024-13-45", None),
        ("strict: 1\nprefer: !!int ''\n", 2, "not valid YAML", None),
        ("strict: 1\nprefer: !!bool vendor\n", 2, "not valid YAML", None),
        ("strict: 1\nprefer: !!timestamp vendor\n", 2, "not valid YAML", None),
        ("strict: 1\n? [prefer, strict]\n: vendor\n", 2, "prefer", None),
        ("op_backends:\n  ? [rms_norm]\n  : vendor\n", 2, "rms_norm", None),
    ],
)
def test_file(load: Loader, text: str, line: int, offending: str, nearest: str | None) -> None:
    (problem,) = load.problems(text)
    assert place_of(problem) == f"{load.file}:{line}"
    assert offending in problem.removeprefix(str(load.file))
    if nearest:
        assert problem.partition(offending)[2].find(nearest) >= 0
    assert "Node(" not in problem, "that is PyYAML's, not the user's"


@pytest.mark.parametrize(
    ("variable", "text", "offending", "nearest"),
    [
        ("SGLANG_FL_OOT_ENABLED", "of", "'of'", "0"),
        ("SGLANG_FL_OOT_ENABLED", "ofF!", "'ofF!'", "0"),
        ("SGLANG_FL_PREFER", "flagems", "'flagems'", "flagos"),
        ("SGLANG_FL_PREFER", "VENDORS", "'VENDORS'", "vendor"),
        ("SGLANG_FL_PER_OP", "rms_norm", "expected OP=ORDER;OP=ORDER", "'rms_norm'"),
        ("SGLANG_FL_PER_OP", "rms_nrm=vendor", "'rms_nrm'", "rms_norm"),
        ("SGLANG_FL_PER_OP", "silu_and_mul=vendor;rms_norm=vender|flagos", "'vender'", "vendor"),
        ("SGLANG_FL_PER_OP", "rms_norm=vendor;rms_norm=flagos", "duplicate operator", "'rms_norm'"),
        ("SGLANG_FL_PER_OP", "rms_norm=flagos|flagos", "'flagos|flagos'", "never tried"),
        ("SGLANG_FL_PER_OP", "rms_norm=", "rms_norm", "'vendor|flagos'"),
        ("SGLANG_FL_PER_OP", "rms_norm=vendor:ascnd", "'ascnd'", "ascend"),
        ("SGLANG_FL_PER_OP", "rms_norm=impl:vendor.ascnd", "'vendor.ascnd'", "vendor.ascend"),
        ("SGLANG_FL_STRICT", "2", "'2'", "1"),
        ("SGLANG_FL_OOT_WHITELIST", "RMSNorm,RotaryEmbeding", "'RotaryEmbeding'", "RotaryEmbedding"),
        ("SGLANG_FL_OOT_BLACKLIST", "silu_and_mul", "'silu_and_mul'", "SiluAndMul"),
        ("SGLANG_FL_ALLOW_VENDORS", "huawei", "'huawei'", "ascend"),
        ("SGLANG_FL_DENY_VENDORS", "metx", "'metx'", "metax"),
        ("USE_FLAGGEMS", "nope", "'nope'", "0"),
        ("SGLANG_FL_FLAGOS_WHITELIST", "mull", "'mull'", "mul"),
        ("SGLANG_FL_FLAGOS_BLACKLIST", "mul,to-copy", "'to-copy'", "to_copy"),
        ("SGLANG_FLAGGEMS_RECORD", "ture", "'ture'", "true"),
        ("SGLANG_FLAGGEMS_LOG_ONCE", "fasle", "'fasle'", "false"),
        ("SGLANG_FL_DIST_BACKEND", "flagx", "'flagx'", "flagcx"),
        ("SGLANG_FL_LOG_LEVEL", "warn", "'warn'", "WARNING"),
        ("SGLANG_FL_DISPATCH_DEBUG", "?", "'?'", "1"),
        ("SGLANG_FL_PLATFORM", "nvdia", "'nvdia'", "nvidia"),
        ("SGLANG_FL_PLATFORM", "ascned", "'ascned'", "ascend"),
        ("SGLANG_FL_PREFFER", "vendor", "SGLANG_FL_PREFFER", "'SGLANG_FL_PREFER'"),
        ("SGLANG_FL_prefer", "vendor", "SGLANG_FL_prefer", "'SGLANG_FL_PREFER'"),
        ("SGLANG_FL_USE_FLAGGEMS", "0", "SGLANG_FL_USE_FLAGGEMS", "'USE_FLAGGEMS'"),
        ("SGLANG_FL_OOT_WHITELISTS", "", "SGLANG_FL_OOT_WHITELISTS", "'SGLANG_FL_OOT_WHITELIST'"),
        ("SGLANG_FLAGGEMS_RECORDS", "1", "SGLANG_FLAGGEMS_RECORDS", "'SGLANG_FLAGGEMS_RECORD'"),
    ],
)
def test_variable(load: Loader, variable: str, text: str, offending: str, nearest: str) -> None:
    (problem,) = load.problems(**{variable: text})
    assert place_of(problem) == variable
    assert nearest in problem.partition(offending)[2]


@pytest.mark.parametrize("text", ["=vendor", "rms_norm=vendor;=flagos"])
def test_operator_without_a_name(load: Loader, text: str) -> None:
    (problem,) = load.problems(SGLANG_FL_PER_OP=text)
    assert place_of(problem) == "SGLANG_FL_PER_OP"
    assert "colon" not in problem, "there is none"


def test_empty_name_in_a_list(load: Loader) -> None:
    (problem,) = load.problems("oot_blacklist: [RMSNorm, '']\n")
    assert place_of(problem) == f"{load.file}:1"
    assert "colon" not in problem, "there is none"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("USE_FLAGEMS", "USE_FLAGGEMS"),
        ("sglang_fl_prefer", "SGLANG_FL_PREFER"),
        ("use_flaggems", "USE_FLAGGEMS"),
        ("FLAGCX_PAHT", "FLAGCX_PATH"),
    ],
)
def test_variables_without_the_prefix_and_in_small_letters(load: Loader, variable: str, meant: str) -> None:
    (problem,) = load.problems(**{variable: "0"})
    assert place_of(problem) == variable and f"did you mean {meant!r}" in problem


@pytest.mark.parametrize("variable", ["USE_FLAGTREE", "USE_FLAG", "FLAGCX_DEBUG", "FLAGCX_PATHS_OF_OTHERS", "FLAGGEMS_SOURCE_DIR"])
def test_variables_of_other_programs(load: Loader, variable: str) -> None:
    load(**{variable: "0"})


@pytest.mark.parametrize("variable", ["SGLANG_FL_FOO", "SGLANG_FL_ROOT"])
def test_the_common_prefix_does_not_make_variables_alike(load: Loader, variable: str) -> None:
    (problem,) = load.problems(**{variable: "1"})
    assert place_of(problem) == variable
    assert "did you mean" not in problem


@pytest.mark.parametrize(("name", "variable"), VARIABLES_ONLY)
def test_key_of_a_setting_that_has_only_a_variable(load: Loader, name: str, variable: str) -> None:
    (problem,) = load.problems(f"strict: 1\n{name}: 1\n")
    assert place_of(problem) == f"{load.file}:2"
    assert repr(name) in problem and problem.endswith(f"variable {variable}")


@pytest.mark.parametrize(
    ("key", "own"), [("flagos_faster", "flagos_whitelist"), ("flagos_broken", "flagos_blacklist"), ("flagos_slower", "flagos_blacklist")]
)
def test_key_of_a_profile_in_a_users_file(load: Loader, key: str, own: str) -> None:
    for value in ("[mul]", "null"):
        (problem,) = load.problems(f"strict: 1\n{key}: {value}\n")
        assert place_of(problem) == f"{load.file}:2"
        assert f"{key!r} is a key of profiles" in problem and problem.endswith(f"in your own file use {own!r}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("per_op", "'op_backends'"),
        ("SGLANG_FL_PER_OP", "'op_backends'"),
        ("SGLANG_FL_PREFER", "'prefer'"),
        ("SGLANG_FL_DISPATCH_LOG", "variable SGLANG_FL_DISPATCH_LOG"),
        ("USE_FLAGGEMS", "variable USE_FLAGGEMS"),
    ],
)
def test_variable_written_as_a_key(load: Loader, key: str, meant: str) -> None:
    (problem,) = load.problems(f"strict: 1\n{key}: 1\n")
    assert place_of(problem) == f"{load.file}:2"
    assert meant in problem.partition(f"unknown key '{key}'")[2] and "valid:" not in problem


def test_key_written_as_a_variable(load: Loader) -> None:
    (problem,) = load.problems(SGLANG_FL_OP_BACKENDS="rms_norm=vendor")
    assert problem.endswith("did you mean 'SGLANG_FL_PER_OP'?")


def test_missing_file(load: Loader, tmp_path: Path) -> None:
    (problem,) = load.problems(SGLANG_FL_CONFIG=str(tmp_path / "none.yaml"))
    assert place_of(problem) == "SGLANG_FL_CONFIG"
    assert f"no file '{tmp_path}/none.yaml'" in problem


def test_directory_instead_of_file(load: Loader, tmp_path: Path) -> None:
    (problem,) = load.problems(SGLANG_FL_CONFIG=str(tmp_path))
    assert place_of(problem) == "SGLANG_FL_CONFIG"
    assert repr(str(tmp_path)) in problem and "directory" in problem


def test_home_directory_of_nobody(load: Loader) -> None:
    (problem,) = load.problems(SGLANG_FL_CONFIG="~nobody-of-this-name/x.yaml")
    assert place_of(problem) == "SGLANG_FL_CONFIG" and "home directory" in problem


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("{}", "found the directory"),
        ("{}/file/x.json", "in what is no directory"),
        ("{}/file/more/x.json", "in what is no directory"),
        ("{}/loop", "(Too many levels of symbolic links)"),
        ("{}/" + "x" * 256, "(File name too long)"),
        ("{}/socket", "which is no regular file"),
        ("~nobody-of-this-name/x.json", "a home directory of nobody"),
    ],
)
def test_a_record_where_no_file_can_be(load: Loader, tmp_path: Path, at: str, why: str) -> None:
    (tmp_path / "file").touch()
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = at.format(tmp_path)
    for problem in (*load.problems(f"strict: 1\ntrial_record: {path}\n"), *load.problems(SGLANG_FL_TRIAL_RECORD=path)):
        assert place_of(problem) in (f"{load.file}:2", "SGLANG_FL_TRIAL_RECORD")
        assert "expected a file, found" in problem and why in problem and repr(path) in problem


def test_a_record_where_a_file_can_be(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "no" / "such" / "folder" / "new"):
        assert load(SGLANG_FL_TRIAL_RECORD=str(path)).trial_record == str(path)


def test_file_that_is_nested_too_deeply(load: Loader) -> None:
    (problem,) = load.problems("op_backends: " + "[" * 5000)
    assert problem.endswith("nested too deeply")


def test_file_that_is_no_text(load: Loader) -> None:
    (problem,) = load.problems(b"prefer: \xff\xfe\n")
    assert place_of(problem) == "SGLANG_FL_CONFIG"
    assert repr(str(load.file)) in problem


def test_profile_is_checked_as_a_file_is(load: Loader, profile: Callable[[str], None], tmp_path: Path) -> None:
    profile("\nprefer: vendr\n")
    (problem,) = load.problems()
    assert place_of(problem) == f"{tmp_path}/profiles/cpu.yaml:2"


def test_unknown_platform_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"unknown platform 'ascnd'; did you mean 'ascend'\?"):
        load_platform_config("ascnd")


def test_all_problems_of_every_place_at_once(load: Loader) -> None:
    text = "prefer: vendr\nprefr: vendor\nallow_vendors: [nvdia, metax, acsend]\noot_whitelist: [RMSNorm]\noot_blacklist: [SiluAndMul]\n"
    problems = load.problems(text, SGLANG_FL_STRICT="2", SGLANG_FL_FLAGOS_BLACKLIST="mull", SGLANG_FL_STRCT="1")
    places = [place_of(problem).removeprefix(str(load.file)) for problem in problems]
    assert sorted(places) == sorted([":1", ":2", ":3", ":3", ":4", "SGLANG_FL_STRICT", "SGLANG_FL_FLAGOS_BLACKLIST", "SGLANG_FL_STRCT"])


def test_unknown_platform_does_not_hide_other_problems(load: Loader) -> None:
    problems = load.problems("prefr: vendor\n", SGLANG_FL_PLATFORM="nvdia", SGLANG_FL_STRICT="2")
    assert {place_of(problem) for problem in problems} == {"SGLANG_FL_PLATFORM", f"{load.file}:1", "SGLANG_FL_STRICT"}


def test_every_order_of_a_mapping_is_checked(load: Loader) -> None:
    problems = load.problems("op_backends:\n  rms_norm: 3\n  silu_and_mul: []\n  rotary_embedding:\n")
    assert [place_of(problem) for problem in problems] == [f"{load.file}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("op_backends:\n  rms_norm: 3\n  silu_and_mull: vendor\n  topk: vendr\n  relu2: vendor|vendor\n", (2, 3, 4, 5)),
        ("deny_vendors:\n  - 3\n  - metx\n", (2, 3)),
        ("oot_whitelist: [RMSNorm, 3]\noot_blacklist: [SiluAndMul]\n", (1, 1)),
    ],
)
def test_an_item_of_the_wrong_shape_hides_no_other_problem(load: Loader, text: str, lines: tuple[int, ...]) -> None:
    problems = load.problems(text)
    assert sorted(place_of(problem) for problem in problems) == [f"{load.file}:{line}" for line in lines]


def test_a_malformed_order_hides_no_other_problem_of_its_variable(load: Loader) -> None:
    problems = load.problems(SGLANG_FL_PER_OP="rms_norm;silu_and_mul=;topk=vendr;relu2=sglang|vendor;new_glu=vendor")
    assert [place_of(problem) for problem in problems] == ["SGLANG_FL_PER_OP"] * 5
    for part in ("'rms_norm'", "'new_glu'", "relu2: ", "silu_and_mul: ", "'vendr'"):
        assert len([problem for problem in problems if part in problem]) == 1


@pytest.mark.parametrize(
    ("order", "token", "earlier"),
    [
        ("sglang|vendor", "vendor", "sglang"),
        ("flagos|sglang|reference", "reference", "sglang"),
        ("flagos|vendor|flagos", "flagos", "flagos"),
        ("vendor:nvidia|vendor:cuda", "vendor:cuda", "vendor:nvidia"),
        ("vendor|flagos|vendor:ascend", "vendor:ascend", "vendor"),
        ("vendor|impl:vendor.ascend", "impl:vendor.ascend", "vendor"),
        ("vendor:ascend|flagos|impl:vendor.ascend", "impl:vendor.ascend", "vendor:ascend"),
        ("impl:reference.torch|impl:reference.torch", "impl:reference.torch", "impl:reference.torch"),
    ],
)
def test_a_token_that_is_never_tried(load: Loader, order: str, token: str, earlier: str) -> None:
    load.words = None
    for problem in (*load.problems(f"op_backends: {{rms_norm: '{order}'}}"), *load.problems(SGLANG_FL_PER_OP=f"rms_norm={order}")):
        assert f"rms_norm: {token!r} in {order!r} is never tried: {earlier!r} " in problem


@pytest.mark.parametrize("order", ["vendor:ascend|vendor|flagos|sglang", "impl:vendor.ascend|vendor:ascend|vendor", "flagos|reference"])
def test_an_order_from_the_special_to_the_general(load: Loader, order: str) -> None:
    assert dict(load(SGLANG_FL_PER_OP=f"rms_norm={order}").op_backends)["rms_norm"] == tuple(order.split("|"))


@pytest.mark.parametrize(
    ("allowed", "denied", "message"),
    [
        ("nvidia", "cuda", "'nvidia' is allowed and 'cuda', the same vendor, is denied; no vendor is left"),
        ("metax", "metax", "'metax' is allowed and 'metax', the same vendor, is denied; no vendor is left"),
        ("npu, metax", "ascend", "'npu' is allowed and 'ascend', the same vendor, is denied"),
    ],
)
def test_a_vendor_that_is_allowed_and_denied(load: Loader, allowed: str, denied: str, message: str) -> None:
    load.words = None
    (problem,) = load.problems(SGLANG_FL_ALLOW_VENDORS=allowed, SGLANG_FL_DENY_VENDORS=denied)
    assert problem == f"SGLANG_FL_ALLOW_VENDORS and SGLANG_FL_DENY_VENDORS: {message}"


def test_a_higher_source_may_deny_one_of_several_allowed_vendors(load: Loader) -> None:
    assert load("allow_vendors: [metax, ascend]\n", SGLANG_FL_DENY_VENDORS="ascend").deny_vendors == ("ascend",)
    (problem,) = load.problems("allow_vendors: [ascend]\n", SGLANG_FL_DENY_VENDORS="ascend")
    assert "no vendor is left" in problem


def test_whitespace_around_the_tokens_of_a_list_is_no_part_of_them(load: Loader) -> None:
    assert dict(load("op_backends: {rms_norm: [' vendor', 'flagos ']}\n").op_backends)["rms_norm"] == ("vendor", "flagos")


def test_key_given_twice_does_not_hide_other_problems(load: Loader) -> None:
    problems = load.problems("prefer: vendor\nprefer: flagos\nstrct: 1\n")
    assert [place_of(problem) for problem in problems] == [f"{load.file}:2", f"{load.file}:3"]


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("prefer: vendr\n", {"SGLANG_FL_PREFER": "vendor"}),
        ("oot_blacklist: [RMSNrm]\n", {"SGLANG_FL_OOT_BLACKLIST": "RMSNorm"}),
        ("oot_blacklist: [RMSNrm]\n", {"SGLANG_FL_OOT_WHITELIST": "RMSNorm"}),
        ("op_backends: {rms_nrm: vendor}\n", {"SGLANG_FL_PER_OP": "rms_norm=vendor"}),
        ("op_backends: {rms_norm: vendr}\n", {"SGLANG_FL_PREFER": "vendor"}),
    ],
)
def test_what_a_higher_source_overrides_is_checked_too(load: Loader, text: str, environ: dict[str, str]) -> None:
    (problem,) = load.problems(text, **environ)
    assert place_of(problem) == f"{load.file}:1"


def test_list_of_classes_says_where_they_are_listed(load: Loader) -> None:
    (problem,) = load.problems(SGLANG_FL_OOT_WHITELIST="Zzz")
    assert problem.endswith("(sglang-fl ops lists the classes)")


def test_message_of_one_problem_and_of_several() -> None:
    assert str(SettingsError("a: b")) == "sglang-fl: a: b"
    assert str(SettingsError(["a: b", "c: d"])) == "sglang-fl: 2 settings cannot be used:\n  - a: b\n  - c: d"


@pytest.mark.parametrize(
    ("word", "valid", "hint"),
    [
        ("vendr", ("vendor", "flagos"), "; did you mean 'vendor'?"),
        ("RMSNORM", ("RMSNorm", "LayerNorm"), "; did you mean 'RMSNorm'?"),
        ("xyz", ("vendor", "flagos"), "; valid: flagos, vendor"),
        ("xyz", (), ""),
        ("0", tuple(f"name{i:02}x" for i in range(20)), "; valid: " + ", ".join(f"name{i:02}x" for i in range(12)) + ", … (20 in all)"),
    ],
)
def test_suggest(word: str, valid: tuple[str, ...], hint: str) -> None:
    assert suggest(word, valid) == hint


VALID = ["reference", "flagos", "vendor", "CRITICAL", "WARNING", "rotary_embedding", "rms_norm", "RMSNorm", "oot_whitelist"]


@given(st.sampled_from(VALID), st.data())
def test_word_with_a_letter_left_out_is_understood(word: str, data: st.DataObject) -> None:
    gap = data.draw(st.integers(0, len(word) - 1))
    hint = suggest(word[:gap] + word[gap + 1 :], VALID)
    assert hint.lower().replace("_", "") == f"; did you mean {word!r}?".lower().replace("_", "")


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return Loader(tmp_path_factory.mktemp("any") / "settings.yaml")


SIGNS = [*"[]{}&*?|>%:-,#'~!@", ": ", "- ", "\n", "\n  ", "\t", '"', "<<", "&a", "*a", "!!int"]
WORDS = [*OPTIONS, "rms_norm", "vendor", "1", "null", "true", "3.5", "0x_", "2024-13-45"]
PIECES = st.sampled_from(SIGNS) | st.sampled_from(WORDS) | st.characters(codec="utf-8")


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=15).map("".join))
def test_any_file_gives_settings_or_a_settings_error(loader: Loader, text: str) -> None:
    try:
        assert isinstance(loader(text), Settings)
    except SettingsError as error:
        for problem in error.problems:
            assert place_of(problem).startswith((str(loader.file), "SGLANG_FL_CONFIG"))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(VARIABLES), st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_any_variable_gives_settings_or_a_settings_error(loader: Loader, variable: str, text: str) -> None:
    try:
        assert isinstance(loader(**{variable: text}), Settings)
    except SettingsError as error:
        for problem in error.problems:
            assert place_of(problem) == variable


@pytest.mark.parametrize("word", ["GemmaRMSNorm", "TopK"])
def test_what_is_not_covered_may_be_blacklisted(load: Loader, word: str) -> None:
    """It stays with SGLang, as asked."""
    assert load(SGLANG_FL_OOT_BLACKLIST=word).oot_blacklist == (word,)
    with pytest.raises(SettingsError, match=f"'{word}' is not covered by this version of sglang-fl"):
        load(SGLANG_FL_OOT_WHITELIST=word)


def test_an_order_for_an_operator_that_is_not_covered_is_refused(load: Loader) -> None:
    with pytest.raises(SettingsError, match="operator 'mamba_scan' is not covered by this version of sglang-fl"):
        load(SGLANG_FL_PER_OP="mamba_scan=vendor")


@pytest.mark.parametrize("word", ["cuda", "npu", "musa"])
def test_vendors_may_be_called_by_their_aliases(load: Loader, word: str) -> None:
    load.words = settings_words(None)
    assert load(SGLANG_FL_DENY_VENDORS=word).deny_vendors == (word,)


def test_an_unknown_vendor_for_flaggems(load: Loader) -> None:
    """FlagGems takes it for none, and says nothing."""
    assert load.problems(GEMS_VENDOR="nvida") == ("GEMS_VENDOR: unknown vendor 'nvida'; did you mean 'nvidia'?",)
    assert load(GEMS_VENDOR="metax").platform == "cpu"
