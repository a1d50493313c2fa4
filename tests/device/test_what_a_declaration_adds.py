# SPDX-License-Identifier: Apache-2.0
"""What a package adds to a chip that SGLang knows, and what it says of speculative decoding, quantisation and server arguments.

SGLang's own code asks: its resolution of arguments, its choice of a quantisation config, its groups of ranks.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from installed_packages import Packages
from settings_loader import CPU
from sglang.srt import platforms
from sglang.srt.platforms.musa import MusaSRTPlatform

from sglang_fl import load_plugin, startup
from sglang_fl.config import Settings, SettingsError, load_settings
from sglang_fl.device import ENTRY_POINT_GROUP, OUT_OF_TREE_ONLY, Device, VendorPlatform, describe_platforms, detect, known_vendors
from sglang_fl.platform import platform_class
from sglang_fl.platform.declared import DeclaredAnswers

HYBRID = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 2, "max_position_embeddings": 512}
MUSA = Device("mthreads", "musa", "musa", "a test")
HERE = Device("mychip", "cpu", None, "a test")
CODE = """
from sglang_fl.vendor_platform import VendorPlatform
from sglang.srt.layers.quantization.base_config import QuantizationConfig

class Answers:
    def get_device_name(self, device_id=0):
        return "MTT of a test"

class Attention:
    def __init__(self, runner):
        self.runner = runner

class Int8(QuantizationConfig):
    def __init__(self): pass
    @classmethod
    def get_name(cls): return "mychip_int8"
    @classmethod
    def get_supported_act_dtypes(cls): return []
    @classmethod
    def get_min_capability(cls): return 0
    @staticmethod
    def get_config_filenames(): return []
    @classmethod
    def from_config(cls, config): return cls()
    def get_quant_method(self, layer, prefix): return None
    def get_scaled_act_names(self): return []

class Runner: pass
"""


def platform_of(packages: Packages, device: Device, monkeypatch: pytest.MonkeyPatch, **fields: str) -> Any:
    """A platform of a package, as SGLang's own."""
    classes = packages.install(CODE, {}, name="classes")
    more = ", ".join(f"{field}={value.replace('M:', f'{classes}:')}" for field, value in fields.items())
    code = f"from sglang_fl.vendor_platform import VendorPlatform\nPLATFORM = VendorPlatform(name={device.vendor!r}, {more})\n"
    packages.install(code, {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    platform = platform_class(device)()
    monkeypatch.setattr(platforms, "_current_platform", platform)
    return platform


def test_on_a_chip_that_sglang_knows_its_platform_stays(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = platform_of(
        packages,
        MUSA,
        monkeypatch,
        attention_backends="{'mt_attention': 'M:Attention'}",
        platform_class="'M:Answers'",
        graph_runner="'M:Runner'",
    )
    assert isinstance(platform, MusaSRTPlatform) and platform.is_musa() and not platform.is_out_of_tree()
    assert platform.capabilities == MusaSRTPlatform.capabilities
    assert platform.get_device_name() == "MTT of a test", "the package's methods stand on SGLang's"
    assert platform.get_graph_runner_cls().__name__ == "Runner"
    assert platform.get_paged_allocator_cls() is None
    monkeypatch.setattr(startup, "_current", Settings())
    assert platform.get_torch_distributed_backend_str() == "mccl"
    assert detect(environ={}).vendor == "cpu", "and its detection is SGLang's"
    row = known_vendors()["mthreads"]
    assert (row.in_tree, row.attention, row.in_tree_needs) == ("musa", "mt_attention", "torchada")
    assert describe_platforms()[0].endswith("adds to SGLang's musa platform")


def test_its_attention_can_be_asked_for_there(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", dict(attention_registry.ATTENTION_BACKENDS))
    for name in ("ATTENTION_BACKEND_CHOICES", "DRAFT_ATTENTION_BACKEND_CHOICES"):
        monkeypatch.setattr(choices, name, list(getattr(choices, name)))
    platform_of(packages, MUSA, monkeypatch, attention_backends="{'mt_attention': 'M:Attention'}")
    load_plugin()
    assert "mt_attention" in choices.ATTENTION_BACKEND_CHOICES
    assert attention_registry.ATTENTION_BACKENDS["mt_attention"]("a runner").runner == "a runner"


@pytest.mark.parametrize("field", OUT_OF_TREE_ONLY)
def test_what_sglang_does_not_ask_its_own_platforms_is_refused(field: str) -> None:
    value = {"mamba_extra_buffer": True, "draft_graph_runners": {"draft_decode": "a:B"}, "quantization": {"x": "a:B"}}.get(
        field, "a:b" if field == "graph_backend" else "cpu" if field.endswith(("_backend", "_device")) else ("EAGLE",)
    )
    with pytest.raises(ValueError, match=f"{field}: SGLang has a platform of its own for ascend .npu. and does not ask it for this"):
        VendorPlatform(name="ascend", **{field: value})


def arguments(*given: str) -> Any:
    from sglang.srt.server_args import prepare_server_args

    from sglang_fl.cli.demo_model import demo_model

    return prepare_server_args(["--model-path", str(demo_model()), "--device", "cpu", *given])


def resolved(packages: Packages, monkeypatch: pytest.MonkeyPatch, *given: str, **fields: str) -> Any:
    """SGLang's own resolution of a server's arguments on the chip."""
    from sglang.srt.arg_groups.overrides import resolving_view

    monkeypatch.setattr(startup, "resolve", lambda device: Settings())
    monkeypatch.setattr("sglang_fl.platform.plain_cpu._share_cores", lambda server_args: None)
    platform = platform_of(packages, HERE, monkeypatch, device_type="'cpu'", is_present="lambda: True", **fields)
    monkeypatch.setattr("sglang.srt.arg_groups.mamba_hook.current_platform", platform)
    server_args = arguments(*given)
    server_args.resolve_once()
    return resolving_view(server_args)


def test_server_arguments_get_its_defaults_where_the_user_gives_none(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = "{'page_size': 32, 'disable_overlap_schedule': True, 'max_running_requests': 7}"
    found = resolved(packages, monkeypatch, "--max-running-requests", "5", server_args=defaults)
    assert (found.page_size, found.disable_overlap_schedule, found.max_running_requests) == (32, True, 5)


@pytest.mark.parametrize(
    ("snapshots", "given", "found"),
    [
        ("False", (), ("no_buffer", True, 1)),
        ("False", ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"), ("no_buffer", True, 1)),
        ("True", (), ("extra_buffer", False, 32)),
    ],
)
def test_hybrid_models_are_served_with_its_defaults(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, snapshots: str, given: tuple[str, ...], found: tuple[Any, ...]
) -> None:
    """SGLang has larger pages for them only where the platform keeps snapshots of their states."""
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    arguments = ("--model-path", str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init", *given)
    cfg = resolved(packages, monkeypatch, *arguments, server_args="{'page_size': 32}", mamba_extra_buffer=snapshots)
    assert (cfg.mamba_radix_cache_strategy, cfg.disable_overlap_schedule, cfg.page_size) == found


@pytest.mark.parametrize(("given", "attention"), [((), "mt_attention"), (("--attention-backend", "torch_native"), "torch_native")])
def test_its_attention_serves_where_sglang_would_choose(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], attention: str
) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    server_args = "{'page_size': 64}"
    platform = platform_of(packages, MUSA, monkeypatch, attention_backends="{'mt_attention': 'M:Attention'}", server_args=server_args)
    record = arguments(*given)
    record._raw_input = {name: getattr(record, name) for name in type(record).__struct_fields__}
    seen = SimpleNamespace(_cfg=resolving_view(record))
    DeclaredAnswers.apply_server_args_defaults(platform, seen)
    assert getattr(seen, "attention_backend", given[-1] if given else None) == attention and seen.page_size == 64


def test_its_profile_names_functions_that_do_not_work_there(packages: Packages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("flagos_faster: [silu, softmax]\nflagos_broken: [softmax]\n")
    platform_of(packages, MUSA, monkeypatch, profile=repr(str(profile)))
    settings = load_settings({}, device=MUSA)
    assert settings.flagos_faster == ("silu", "softmax")
    assert {"count_nonzero", "mm", "softmax"} <= set(settings.flagos_broken or ()), "it adds to the shipped profile"
    assert {f"{profile}:2", "profile mthreads:26"} <= set(str(settings.source("flagos_broken")).split(" and "))
    assert dict(settings.op_backends)["rms_norm"] == ("sglang",), "and what it does not name is as shipped"


def test_its_profile_is_read_over_the_shipped_one(packages: Packages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("op_backends: {rms_norm: [vendor]}\n")
    platform_of(packages, MUSA, monkeypatch, profile=repr(str(profile)))
    settings = load_settings({}, device=MUSA)
    assert dict(settings.op_backends)["rms_norm"] == ("vendor",) and dict(settings.op_backends)["topk"] == ("sglang",)
    assert "mm" in (load_settings({"SGLANG_FL_PREFER": "flagos"}, device=MUSA).flagos_broken or ())
    profile.write_text("flagos_broken: null\nop_backends: null\n")
    settings = load_settings({}, device=MUSA)
    assert settings.flagos_broken is None and not settings.op_backends


def test_its_own_list_of_layers_takes_the_place_of_the_shipped_one(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("oot_whitelist: [RMSNorm]\n")
    chip = Device("kunlunxin", known_vendors()["kunlunxin"].device_type, None, "a test")
    more = f"name='kunlunxin', is_present=lambda: True, profile={str(profile)!r}"
    packages.install(
        f"from sglang_fl.vendor_platform import VendorPlatform\nPLATFORM = VendorPlatform({more})\n",
        {ENTRY_POINT_GROUP: "{module}:PLATFORM"},
    )
    settings = load_settings({}, device=chip)
    assert settings.oot_whitelist == ("RMSNorm",) and settings.oot_blacklist is None
    assert settings.flagos_broken and "argmax" in settings.flagos_broken


def test_speculative_decoding_is_what_it_says(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = "{'draft_decode': 'M:Runner'}"
    platform = platform_of(
        packages, HERE, monkeypatch, device_type="'cpu'", is_present="lambda: True", speculative_algorithms="('EAGLE',)",
        draft_graph_runners=runners, draft_attention="('triton',)", mamba_extra_buffer="True", group_device="'meta'",
        compile_backend="'eager'", quantization="{'mychip_int8': 'M:Int8'}", capabilities="('supports_pynccl',)",
    )  # fmt: skip
    from sglang.srt.arg_groups.mamba_hook import _platform_supports_mamba_cache_extra_buffer
    from sglang.srt.arg_groups.speculative_hook import _check_oot_speculative_algorithm
    from sglang.srt.distributed.parallel_state import _group_coordinator_device
    from sglang.srt.layers import quantization
    from sglang.srt.utils import get_compiler_backend

    for module in ("sglang.srt.arg_groups.mamba_hook", "sglang.srt.arg_groups.speculative_hook", "sglang.srt.layers.quantization"):
        monkeypatch.setattr(f"{module}.current_platform", platform)
    monkeypatch.setattr("sglang.srt.utils.common.current_platform", platform)
    _check_oot_speculative_algorithm("EAGLE", "cpu")
    with pytest.raises(ValueError, match="NGRAM speculative decoding is not supported"):
        _check_oot_speculative_algorithm("NGRAM", "cpu")
    assert platform.get_speculative_graph_runner_cls("EAGLE", "draft_decode").__name__ == "Runner"
    assert platform.get_speculative_graph_runner_cls("EAGLE", "draft_extend") is None
    assert platform.supports_speculative_draft_attention_backend("DFLASH", "triton")
    assert platform.get_default_speculative_draft_attention_backend("DFLASH") == "triton"
    assert _platform_supports_mamba_cache_extra_buffer()
    assert get_compiler_backend() == "eager"
    assert _group_coordinator_device(1) == torch.device("meta", 1), "where SGLang's groups of ranks put their tensors"
    assert platform.capabilities.supports_pynccl
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", dict(quantization.QUANTIZATION_METHODS))
    load_plugin()
    assert quantization.get_quantization_config("mychip_int8").__name__ == "Int8"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"server_args": "{'page_sise': 1}"}, "SGLang has no server argument 'page_sise'; did you mean 'page_size'?"),
        ({"server_args": "{'cuda_graph_max_bs': 1}"}, "cuda_graph_max_bs"),
        ({"server_args": "{'page_size': 'big'}"}, "server_args['page_size'] cannot be 'big': Expected `int | None`, got `str`"),
        ({"server_args": "{'disable_overlap_schedule': 1}"}, "server_args['disable_overlap_schedule'] cannot be 1: Expected `bool`"),
        ({"server_args": "{'schedule_policy': 'lpmm'}"}, "server_args['schedule_policy'] cannot be 'lpmm'; did you mean 'lpm'?"),
        ({"server_args": "{'attention_backend': 'tritn'}"}, "cannot be 'tritn'; did you mean 'triton'?"),
        ({"collective": "'glo'"}, "collective: PyTorch has no torch.distributed backend 'glo' here; did you mean 'gloo'?"),
        ({"graph_runner": "'M:Runer'"}, "has no attribute 'Runer'; did you mean 'Runner'?"),
        ({"speculative_algorithms": "('EAGEL',)"}, "unknown speculative algorithm 'EAGEL'; did you mean 'EAGLE'?"),
        (
            {"sglang_kernels": "{'sglang.kernels.ops.memory.common:get_last_loc_tritn': 'M:Runner'}"},
            "has no 'get_last_loc_tritn' in sglang.kernels.ops.memory.common; did you mean 'get_last_loc_triton'?",
        ),
        ({"sglang_kernels": "{'sglang.kernels.ops.memory.common:get_last_loc_triton': 'M:Runer'}"}, "has no attribute 'Runer'"),
        ({"draft_attention": "('trition',)"}, "unknown attention backend 'trition'; did you mean 'triton'?"),
        ({"group_device": "'cpuu'"}, "PyTorch has no device type 'cpuu'"),
        ({"compile_backend": "'indutor'"}, "compile_backend: PyTorch has no compiler 'indutor'; did you mean 'inductor'?"),
        (
            {"quantization": "{'x': 'M:Runner'}"},
            "is not a subclass of SGLang's sglang.srt.layers.quantization.base_config:QuantizationConfig",
        ),
    ],
)
def test_names_of_sglangs_are_checked(packages: Packages, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], message: str) -> None:
    platform = platform_of(packages, HERE, monkeypatch, device_type="'cpu'", is_present="lambda: True", **fields)
    (problem,) = platform.declaration_problems()
    assert message in problem and "mychip" in problem


def test_a_device_of_groups_that_sglang_does_not_ask_for_is_told(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"device_type": "'cpu'", "is_present": "lambda: True", "group_device": "'cpu'"}
    platform = platform_of(packages, HERE, monkeypatch, **fields)
    assert platform.declaration_problems() == []
    monkeypatch.setattr("sglang.srt.utils.is_cuda_alike", lambda: True)
    (problem,) = platform.declaration_problems()
    assert "SGLang's groups of ranks are on cuda, not on 'cpu'" in problem


def test_values_that_sglang_takes_are_taken(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"page_size": 16, "mem_fraction_static": 1, "attention_backend": "mine", "kv_cache_dtype": None, "schedule_policy": "lpm"}
    fields = {"server_args": repr(values), "quantization": "{'mychip_int8': 'M:Int8'}", "collective": "'cpu:gloo'"}
    platform = platform_of(packages, HERE, monkeypatch, device_type="'cpu'", is_present="lambda: True", **fields)
    assert [each for each in platform.declaration_problems() if "'mine'" not in each] == []
    assert len(platform.declaration_problems()) == 1, "mine is nobody's attention"


def test_its_variables_are_spelt_like_ours(packages: Packages) -> None:
    code = (
        "from sglang_fl.vendor_platform import VendorPlatform as V\n"
        "PLATFORM = V(name='mychip', device_type='x', commands=('no-tool',), variables=('MYCHIP_FUSE_ATTENTION', 'SGLANG_FL_MYCHIP_TRACE'))"
    )
    packages.install(code, {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    sound = {"MYCHIP_FUSE_ATTENTION": "1", "SGLANG_FL_MYCHIP_TRACE": "1", "MYCHIP_VISIBLE_DEVICES": "0"}
    load_settings(sound, device=CPU)
    with pytest.raises(SettingsError) as caught:
        load_settings({"MYCHIP_FUSE_ATENTION": "1", "SGLANG_FL_MYCHIP_TRACES": "1"}, device=CPU)
    assert caught.value.problems == (
        "MYCHIP_FUSE_ATENTION: no package has such a variable; did you mean 'MYCHIP_FUSE_ATTENTION'?",
        "SGLANG_FL_MYCHIP_TRACES: no package has such a variable; did you mean 'SGLANG_FL_MYCHIP_TRACE'?",
    )


def test_its_variables_do_not_make_a_misspelling_of_ours_valid(packages: Packages) -> None:
    code = "PLATFORM = V(name='mychip', device_type='x', commands=('no-tool',), variables=('SGLANG_FL_PREFR',))"
    packages.install(f"from sglang_fl.vendor_platform import VendorPlatform as V\n{code}", {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    with pytest.raises(SettingsError, match="SGLANG_FL_PREFR: there is no such setting; did you mean 'SGLANG_FL_PREFER'"):
        load_settings({"SGLANG_FL_PREFR": "flagos"}, device=CPU)
