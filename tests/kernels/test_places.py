# SPDX-License-Identifier: Apache-2.0
"""Where SGLang has a kernel, by its source; and what stands there, in modules that are imported already and in later ones."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import triton
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_fl.kernels import places
from sglang_fl.kernels.places import KernelHook, problem_with, problem_with_function, problems_with_objects, put_in_place

COMMON = "sglang.kernels.ops.memory.common"
FLA = "sglang.kernels.ops.attention.fla"
WRITE = f"{COMMON}:write_req_to_token_pool_triton"

HOME = """
import triton

@triton.jit
def kernel(x, n: triton.language.constexpr):
    pass

def function(x):
    return ("SGLang's own", x)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules as SGLang's, which are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "home_of_a_test.py").write_text(HOME)
    (tmp_path / "user_of_a_test.py").write_text("from home_of_a_test import function, kernel as launched\n")
    yield tmp_path
    for name in ("home_of_a_test", "user_of_a_test"):
        sys.modules.pop(name, None)
        places._places.hooks.pop(name, None)
    if places._places in sys.meta_path:
        sys.meta_path.remove(places._places)
    HookRegistry.reset()


def replaced() -> dict[str, KernelHook]:
    hooks = {f"home_of_a_test:{name}": KernelHook() for name in ("kernel", "function")}
    for hook in hooks.values():
        hook.forward = lambda hook, grid, *args, **kwargs: ("ours", grid, args, kwargs)
    put_in_place(hooks)
    return hooks


def check_use(module: ModuleType) -> None:
    assert module.launched[(3,)](1, n=2) == ("ours", (3,), (1,), {"n": 2})
    assert module.function(1) == ("ours", None, (1,), {})


def test_modules_that_had_imported_a_name_have_the_hook(home: Path) -> None:
    user = importlib.import_module("user_of_a_test")
    hooks = replaced()
    check_use(user)
    assert user.function is hooks["home_of_a_test:function"] is importlib.import_module("home_of_a_test").function


def test_modules_that_are_imported_later_have_it_too_and_nothing_was_imported_for_it(home: Path) -> None:
    replaced()
    assert "home_of_a_test" not in sys.modules
    check_use(importlib.import_module("user_of_a_test"))
    check_use(importlib.reload(importlib.reload(sys.modules["home_of_a_test"]) and sys.modules["user_of_a_test"]))


def test_a_second_name_and_a_module_that_imports_in_a_circle_have_it_whenever_they_were_imported(home: Path) -> None:
    (home / "home_of_a_test.py").write_text(f"{HOME}\nsame = function\nimport user_of_a_test\n")
    replaced()
    check_use(importlib.import_module("user_of_a_test"))
    for name in ("home_of_a_test", "user_of_a_test"):
        del sys.modules[name]
    module = importlib.import_module("home_of_a_test")
    check_use(sys.modules["user_of_a_test"])
    assert module.same(1) == ("ours", None, (1,), {})


def test_what_is_taken_away_is_sglangs_own_again(home: Path) -> None:
    user = importlib.import_module("user_of_a_test")
    kernel = user.launched
    hooks = replaced()
    for hook in hooks.values():
        hook.forward = None
    assert user.function(5) == ("SGLang's own", 5)
    assert user.launched.__wrapped__ is kernel and user.launched.arg_names == ["x", "n"]
    assert type(user.launched[(1,)]) is type(kernel[(1,)])


def test_a_name_that_the_module_does_not_define_here_stays_without_one(home: Path) -> None:
    put_in_place({"home_of_a_test:of_another_device": KernelHook()})
    assert not hasattr(importlib.import_module("home_of_a_test"), "of_another_device")


def test_what_sglangs_hook_registry_puts_there_is_found_by_importers_and_cannot_be_launched(home: Path) -> None:
    """So a function of SGLang's is hooked through it, and a kernel is not."""
    user = importlib.import_module("user_of_a_test")
    for name in ("function", "kernel"):
        HookRegistry.register(f"home_of_a_test.{name}", lambda own, *args: ("hooked", *args), HookType.AROUND)
    HookRegistry.apply_hooks()
    assert user.function(5) == ("hooked", 5)
    with pytest.raises(TypeError, match="not subscriptable"):
        user.launched[(1,)](1, n=2)


def test_kernels_of_the_installed_sglang_are_found_in_its_source() -> None:
    assert problem_with(WRITE) is None
    assert problem_with(WRITE, takes_grid=True) is None
    assert problem_with(f"{COMMON}:get_last_loc_triton") is None
    assert problem_with("sglang.kernels.ops.attention.fla.layernorm_gated:_layer_norm_fwd") is None, "on Ascend it is imported"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (f"{COMMON}:write_req_to_token_pool_tritn", "has no 'write_req_to_token_pool_tritn' in"),
        (f"{COMMON}:write_req_to_token_pool_tritn", "did you mean 'write_req_to_token_pool_triton'?"),
        ("sglang.kernels.ops.memory.comon:write", f"has no module sglang.kernels.ops.memory.comon; did you mean '{COMMON}'?"),
        ("sglang.kernel.ops:write", "did you mean 'sglang.kernels'?"),
        ("sglang.srt.utils.common:HIP_FP8_E4M3_FNUZ_MAX", "is the value 224.0, and no kernel; did you mean "),
        (f"{FLA}.layernorm_gated:RMSNorm", "is a class, and no kernel; did you mean 'rms_norm_ref'?"),
        ("sglang.srt.mem_cache.allocation:write_req_to_token_pool_triton", f"is imported from {COMMON}; name it there"),
    ],
)
def test_one_that_is_not_there_is_told_with_the_nearest(target: str, told: str) -> None:
    assert told in (problem_with(target) or "")


def test_what_stands_behind_a_name_is_a_kernel_and_has_one_replacement() -> None:
    """Of this device: what its modules hold once they are imported."""
    rule, other_name = f"{FLA}.fused_recurrent:fused_recurrent_gated_delta_rule", f"{FLA}.fused_recurrent:fused_recurrent_gdn"
    logger = "sglang.srt.mem_cache.allocation:logger"
    assert problem_with(rule) is problem_with(other_name) is problem_with(logger) is None, "the source alone does not say"
    assert list(problems_with_objects({rule: "a:b", other_name: "a:b", WRITE: "a:c", f"{COMMON}:of_another_device": "a:d"})) == []
    of_no_kernel, of_two_names = problems_with_objects({logger: "a:b", rule: "a:b", other_name: "a:c"})
    assert of_no_kernel.startswith(f"{logger} is of type Logger, and no kernel; ")
    assert of_two_names == f"{rule} and {other_name} are two names of one kernel: 'a:b' and 'a:c' cannot both replace it"


def test_a_function_that_cannot_be_loaded_is_seen_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "eyechip.py").write_text("from math import floor\nSEVEN = 7\ndef last_locations(*args): ...\nraise SystemExit(3)\n")
    (tmp_path / "eyechip_more").mkdir()
    (tmp_path / "eyechip_more/__init__.py").write_text("from math import *\n")
    for loaded in ("eyechip:last_locations", "eyechip:floor", "eyechip_more:ceil", "os.path:join", "_json:scanstring"):
        assert problem_with_function(loaded) is None
    assert problem_with_function("eyechip:last_location") == (
        "'eyechip:last_location' cannot be loaded: eyechip has no 'last_location'; did you mean 'last_locations'?"
    )
    assert problem_with_function("eyechip:SEVEN") == "'eyechip:SEVEN' is the value 7, and no function"
    for module in ("eyechi", "eyechip_more.kv"):
        assert problem_with_function(f"{module}:f") == f"'{module}:f' cannot be loaded: there is no module {module}"


def test_what_is_called_has_no_grid() -> None:
    assert "leave out takes_grid" in (problem_with(f"{COMMON}:get_last_loc_triton", takes_grid=True) or "")


def test_triton_has_what_a_launch_needs() -> None:
    assert callable(triton.runtime.jit.KernelInterface.__getitem__), "what KernelHook imitates"
