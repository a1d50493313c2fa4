# SPDX-License-Identifier: Apache-2.0
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_fl.bisect.switches import FUNCTION, OPERATOR, Switches, prior_weights, switches_in_force
from sglang_fl.config import load_settings
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch import BackendImplKind, OpImpl
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.policy import SelectionPolicy
from sglang_fl.startup import check_settings

NVIDIA = Device("nvidia", "cuda", VENDORS["nvidia"].in_tree, "a test")
FLAGOS = {"SGLANG_FL_PREFER": "flagos"}
USERS = (
    FLAGOS,
    {**FLAGOS, "SGLANG_FL_FLAGOS_BLACKLIST": "add,mm"},
    {**FLAGOS, "SGLANG_FL_FLAGOS_WHITELIST": "add,mul,softmax"},
    {**FLAGOS, "USE_FLAGGEMS": "0", "SGLANG_FL_PER_OP": "RMSNorm=sglang;silu_and_mul=reference"},
    {"SGLANG_FL_PREFER": "reference", "SGLANG_FL_OOT_BLACKLIST": "RMSNorm"},
    {"SGLANG_FL_FLAGOS_WHITELIST": "add"},
)
#: A kernel that SGLang calls outside of its layers, with an implementation.
KERNEL = "sglang.kernels.ops.memory.common:get_last_loc_triton"
_manager = OpManager()
_manager.registry.register_impl(OpImpl(KERNEL, "reference.test", BackendImplKind.REFERENCE, lambda grid, *args: None))


def of(environ: dict[str, str]) -> Switches:
    return switches_in_force(check_settings(environ, NVIDIA, _manager), NVIDIA, _manager)


def in_force(environ: dict[str, str]) -> set[str]:
    """What a server with this environment would have on, by its own settings and policy."""
    return set(of(environ).names)


@pytest.fixture(scope="module", params=USERS, ids=str)
def users(request: pytest.FixtureRequest) -> tuple[dict[str, str], Switches]:
    return request.param, of(request.param)


def test_all_on_changes_nothing(users: tuple[dict[str, str], Switches]) -> None:
    environ, switches = users
    assert switches.environ(set(switches.names)) == {}
    assert in_force(environ) == set(switches.names)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_exactly_what_was_chosen_is_on(users: tuple[dict[str, str], Switches], data: st.DataObject) -> None:
    environ, switches = users
    on = data.draw(st.sampled_from([set(), {switches.names[0]}, {switches.names[-1]}]) | st.sets(st.sampled_from(switches.names)))
    changed = {**environ, **switches.environ(on)}
    run = {name: value for name, value in changed.items() if value is not None}
    assert in_force(run) == on
    before, after = (SelectionPolicy.from_settings(load_settings(given, device=NVIDIA)) for given in (environ, run))
    kept = [op for op in _manager.registry.list_operators() if OPERATOR + op in on]
    assert [before.order_for(op) for op in kept] == [after.order_for(op) for op in kept]


@pytest.mark.parametrize("count", [1, 2])
def test_the_setting_that_leaves_it_out(users: tuple[dict[str, str], Switches], count: int, tmp_path: Path) -> None:
    """Pasted into a file, or as variables where those of the user would override the file."""
    environ, switches = users
    off = {*switches.names[:count], *switches.names[-count:]}
    variables = [line for line in switches.exclusion(off).splitlines() if line.startswith(("SGLANG_FL_", "USE_FLAGGEMS="))]
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(line for line in switches.exclusion(off).splitlines() if line not in variables))
    set_by_shell = dict(shlex.split(line)[0].split("=", 1) for line in variables)
    assert in_force({**environ, **set_by_shell, "SGLANG_FL_CONFIG": str(file)}) == set(switches.names) - off


def test_what_is_pasted_into_a_file() -> None:
    switches = of({"SGLANG_FL_FLAGOS_WHITELIST": "add"})
    assert switches.exclusion(["op:topk"]) == "op_backends:\n  topk: [sglang]"
    assert switches.exclusion(["aten:add"]) == "USE_FLAGGEMS=0"
    assert of(FLAGOS).exclusion(["aten:mm", "aten:add"]) == "flagos_blacklist: [add, mm]"


def test_a_kernel_is_a_switch_where_sglangs_own_could_run() -> None:
    assert f"{OPERATOR}{KERNEL}" in of(FLAGOS).names
    cpu = Device("cpu", "cpu", None, "a test")
    assert f"{OPERATOR}{KERNEL}" not in switches_in_force(check_settings(FLAGOS, cpu, _manager), cpu, _manager).names


def test_a_function_that_a_profile_lists_as_broken_is_suspicious() -> None:
    found = prior_weights([f"{FUNCTION}mul", f"{FUNCTION}of_no_profile", f"{OPERATOR}mul"], None)
    assert found[f"{FUNCTION}mul"] > found[f"{FUNCTION}of_no_profile"] == found[f"{OPERATOR}mul"] == 1.0


def test_what_differs_in_a_report_is_suspicious() -> None:
    found = prior_weights([f"{FUNCTION}mul", f"{FUNCTION}cos", f"{OPERATOR}rms_norm"], {f"{OPERATOR}rms_norm": 50.0, f"{FUNCTION}mul": 1.5})
    assert found[f"{FUNCTION}mul"] > 1.5, "it is listed as broken, too"
    assert found[f"{OPERATOR}rms_norm"] == 50.0 and found[f"{FUNCTION}cos"] == 0.1
