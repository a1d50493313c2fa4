# SPDX-License-Identifier: Apache-2.0
"""What backends of FlagOS import besides what other tests call."""

import importlib
from pathlib import Path

import pytest

from sglang_fl import config
from sglang_fl.dispatch.catalog import FUNCTIONS
from sglang_fl.dispatch.fla_patch import _MODULES, get_original


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
