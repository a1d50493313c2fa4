# SPDX-License-Identifier: Apache-2.0
"""What backends and users of FlagOS's plugin import."""

import importlib
from pathlib import Path

import pytest

from sglang_fl import config
from sglang_fl.dispatch.catalog import FUNCTIONS
from sglang_fl.dispatch.fla_patch import _MODULES, get_original

_CONFIG = (
    "get_config_path get_effective_config get_flagos_blacklist get_oot_blacklist get_per_op_order get_platform_name load_platform_config"
)
_POLICY = (
    "PREFER_DEFAULT PREFER_REFERENCE PREFER_VENDOR PolicyManager SelectionPolicy get_policy policy_context policy_from_config "
    "reset_global_policy set_global_policy with_allowed_vendors with_denied_vendors with_preference with_strict_mode"
)
_TYPES = "BackendImplKind BackendPriority OpImpl match_token"
_MANAGER = "OpManager get_default_manager reset_default_manager"
NAMES = {
    "dispatch": f"{_TYPES} {_POLICY} {_MANAGER} FLBackendBase OpRegistry OpRegistrySnapshot call_op get_logger resolve_op set_log_level",
    "dispatch.types": _TYPES,
    "dispatch.registry": "OpRegistry OpRegistrySnapshot",
    "dispatch.policy": _POLICY,
    "dispatch.manager": _MANAGER,
    "dispatch.ops": "FLBackendBase",
    "dispatch.backends": "Backend",
    "dispatch.builtin_ops": "register_builtins",
    "dispatch.logger_manager": "get_logger set_log_level",
    "dispatch.fla_patch": "get_original",
    "dispatch.config": _CONFIG,
    "config": _CONFIG,
}
METHODS = {
    "OpImpl": "is_available",
    "OpRegistry": "clear get_implementation get_implementations list_operators register_impl register_many snapshot",
    "PolicyManager": "get_global_policy get_instance get_policy get_policy_epoch reset_global_policy set_global_policy",
    "SelectionPolicy": "fingerprint from_dict get_default_order is_vendor_allowed per_op_order_dict",
    "OpManager": "bump_policy_epoch call ensure_initialized resolve resolve_candidates",
    "FLBackendBase": "is_available name vendor "
    "silu_and_mul rms_norm rotary_embedding gemma_rms_norm mrotary_embedding topk fused_moe chunk_gated_delta_rule "
    "fused_recurrent_gated_delta_rule fused_recurrent_gated_delta_rule_packed_decode",
}


@pytest.mark.parametrize("module", NAMES)
def test_the_names_are_where_they_are_imported_from(module: str) -> None:
    found = importlib.import_module(f"sglang_fl.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("of", METHODS)
def test_their_methods(of: str) -> None:
    found = getattr(importlib.import_module("sglang_fl.dispatch"), of)
    assert [
        name for name in METHODS[of].split() if not callable(getattr(found, name)) and not isinstance(getattr(found, name), property)
    ] == []


def test_the_folder_of_the_profiles() -> None:
    assert (Path(config._CONFIG_DIR) / "nvidia.yaml").is_file()


def test_sglangs_own_function_is_there_behind_a_hook() -> None:
    assert all(op == name for op, (_, name) in FUNCTIONS.items())
    module = importlib.import_module(_MODULES["fused_recurrent_gated_delta_rule_packed_decode"])
    own = module.fused_recurrent_gated_delta_rule_packed_decode
    with pytest.MonkeyPatch.context() as patch:
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        hooked = _wrap_fn(own, lambda original, *args, **kwargs: None, HookType.AROUND)
        patch.setattr(module, "fused_recurrent_gated_delta_rule_packed_decode", hooked)
        assert get_original("fused_recurrent_gated_delta_rule_packed_decode") is own
    with pytest.raises(KeyError, match="did you mean 'chunk_gated_delta_rule'"):
        get_original("chunk_gated_delta")
