# SPDX-License-Identifier: Apache-2.0
"""What sglang-fl stands on in SGLang: signatures, checked against the SGLang that is installed, and its HookRegistry."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

#: What the platform relies on; checked while arguments resolve.
_PLATFORM = {
    "sglang.srt.platforms.interface:SRTPlatform.apply_server_args_defaults": ("self", "server_args"),
    "sglang.srt.platforms.interface:SRTPlatform.post_load_model": ("self", "model"),
    "sglang.srt.platforms.interface:SRTPlatform.get_default_attention_backend": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.get_compile_backend": ("self", "mode"),
    "sglang.srt.platforms.interface:SRTPlatform.get_group_coordinator_device": ("self", "local_rank"),
    "sglang.srt.platforms.interface:SRTPlatform.get_dispatch_key_name": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.get_graph_runner_cls": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.get_full_graph_backend_cls": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.get_piecewise_backend_cls": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.get_kv_pool_cls": ("self", "kind"),
    "sglang.srt.platforms.interface:SRTPlatform.get_paged_allocator_cls": ("self",),
    "sglang.srt.platforms.interface:SRTPlatform.init_backend": ("self",),
    "sglang.srt.platforms.device_mixin:DeviceMixin.get_torch_distributed_backend_str": ("self",),
    "sglang.srt.arg_groups.overrides:record_of": ("view",),
    "sglang.srt.arg_groups.overrides:model_config_of": ("server_args",),
    "sglang.srt.platforms.device_mixin:DeviceMixin.is_out_of_tree": ("self",),
}
#: What the bridges rely on; checked where a model was loaded, since importing it takes seconds.
_LAYERS = {
    "sglang.kernels.fused_op:BaseFusedOp._resolve_forward_method": ("self",),
    "sglang.kernels.fused_op:BaseFusedOp.enter_torch_compile": ("self", "num_tokens"),
    "sglang.kernels.fused_op:BaseFusedOp.leave_torch_compile": ("self",),
    "sglang.srt.layers.activation:GeluAndMul.forward_native": ("self", "x"),
    "sglang.srt.layers.activation:NewGELU.forward_native": ("self", "x"),
    "sglang.srt.layers.activation:QuickGELU.forward_native": ("self", "x"),
    "sglang.srt.layers.activation:ReLU2.forward_native": ("self", "x"),
    "sglang.srt.layers.activation:SiluAndMul.forward_native": ("self", "x"),
    "sglang.srt.layers.layernorm:Gemma3RMSNorm.forward_native": ("self", "x", "residual"),
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_native": ("self", "x"),
    "sglang.srt.layers.layernorm:GemmaRMSNorm.forward_native": ("self", "x", "residual", "post_residual_addition"),
    "sglang.srt.layers.layernorm:LayerNorm.forward_native": ("self", "x"),
    "sglang.srt.layers.layernorm:RMSNormWithoutScale.forward_native": ("self", "x"),
    "sglang.srt.layers.layernorm:RMSNorm.forward_native": ("self", "x", "residual", "post_residual_addition", "quant_linear"),
    "sglang.srt.layers.layernorm:_fp8_static_input_scale": ("linear",),
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native": (
        "self",
        "positions",
        "query",
        "key",
        "offsets",
        "fused_set_kv_buffer_arg",
    ),
    "sglang.srt.layers.rotary_embedding.mrope:MRotaryEmbedding.forward_native": (
        "self",
        "positions",
        "query",
        "key",
        "fused_set_kv_buffer_arg",
    ),
    "sglang.srt.runtime_context:get_exec": (),
    "sglang.srt.layers.moe.topk:TopK.forward_native": (
        "self",
        "hidden_states",
        "router_logits",
        "num_token_non_padded",
        "expert_location_dispatch_info",
        "dynamic_expert_bias",
        "router_logits_partials",
    ),
    "sglang.srt.layers.moe.topk:StandardTopKOutput": ("topk_weights", "topk_ids", "router_logits"),
    "sglang.srt.layers.moe.topk:StandardTopKOutputPacked": ("topk_weights", "topk_ids", "router_logits", "packed_topk_ids"),
    "sglang.srt.layers.moe.topk:has_forward_context": (),
    "sglang.srt.layers.moe.topk:get_forward_context": (),
    "sglang.srt.layers.moe.topk:routing_simulation_enabled": (),
    "sglang.srt.layers.moe.topk:_zero_topk_weights_padded_region": ("topk_weights", "num_token_non_padded"),
    "sglang.srt.layers.moe.utils:has_per_rank_fused_shared_slots": ("num_shared",),
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardDispatchOutput": (
        "hidden_states",
        "hidden_states_scale",
        "topk_output",
        "hidden_states_pre_quant",
    ),
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardCombineInput": ("hidden_states",),
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.forward_native": ("self", "layer", "dispatch_output"),
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.apply": ("self", "layer", "dispatch_output"),
}
#: What the hook on SGLang's groups reads of their arguments; checked where FlagCX is chosen.
_GROUP_ARGUMENTS = ("torch_distributed_backend", "use_pynccl")
#: What the bridges of the gated delta rule rely on; checked where a model has such layers.
_GATED_DELTA_RULE = {
    "sglang.kernels.ops.attention.fla.chunk:chunk_gated_delta_rule": (
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "initial_state_indices",
        "cu_seqlens",
        "head_first",
        "use_qk_l2norm_in_kernel",
        "inplace_update",
    ),
    "sglang.kernels.ops.attention.fla.fused_recurrent:fused_recurrent_gated_delta_rule": (
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "output_final_state",
        "cu_seqlens",
        "use_qk_l2norm_in_kernel",
    ),
    "sglang.kernels.ops.attention.fla.fused_recurrent:fused_recurrent_gated_delta_rule_packed_decode": (
        "mixed_qkv",
        "a",
        "b",
        "A_log",
        "dt_bias",
        "scale",
        "initial_state",
        "out",
        "ssm_state_indices",
        "use_qk_l2norm_in_kernel",
    ),
    "sglang.srt.configs.mamba_utils:mamba2_state_dtype": ("config",),
    "sglang.srt.layers.attention.linear.gdn_backend:GDNKernelDispatcher.__init__": (
        "self",
        "decode_backend",
        "prefill_backend",
        "verify_backend",
    ),
    "sglang.srt.plugins.hook_registry:HookRegistry.register": ("target", "hook", "hook_type", "source"),
    "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks": (),
}
_FUSED_OP_ATTRIBUTES = ("_forward_method", "_original_forward_method", "is_torch_compile")


class IncompatibleSGLang(RuntimeError):
    """The installed SGLang lacks something sglang-fl stands on."""


def installed_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "not installed"


def supported_versions() -> str:
    """The range of SGLang versions, as this package's metadata states it."""
    try:
        wanted = [line for line in requires("sglang-fl") or () if line.split(";")[0].strip().startswith("sglang")]
    except PackageNotFoundError:
        wanted = []
    return wanted[0].removeprefix("sglang") if wanted else "the one in sglang-fl's pyproject.toml"


def unsupported(problems: Iterable[str]) -> str:
    """The message for an SGLang that cannot be used."""
    lines = [
        f"sglang-fl cannot work with the installed SGLang {installed_version()} (supported: {supported_versions()}):",
        *(f"  - {problem}" for problem in problems),
        "Install a supported SGLang, or uninstall sglang-fl.",
    ]
    return "\n".join(lines)


def _look_up(path: str) -> Any:
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _problems(expected: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for path, parameters in expected.items():
        try:
            found = tuple(inspect.signature(_look_up(path)).parameters)
        except (ImportError, AttributeError) as error:
            yield f"{path} is missing ({error})"
            continue
        if found != parameters:
            yield f"{path} takes ({', '.join(found)}), not ({', '.join(parameters)})"


def check_platform() -> None:
    """Raises IncompatibleSGLang unless the platform interface is the one this package extends."""
    problems = list(_problems(_PLATFORM))
    if problems:
        raise IncompatibleSGLang(unsupported(problems))


def check_groups() -> None:
    """Raises IncompatibleSGLang unless SGLang's groups of ranks are made as the hook on them expects."""
    path = "sglang.srt.distributed.parallel_state:GroupCoordinator.__init__"
    try:
        found = inspect.signature(_look_up(path)).parameters
    except (ImportError, AttributeError) as error:
        raise IncompatibleSGLang(unsupported([f"{path} is missing ({error})"])) from error
    missing = [name for name in _GROUP_ARGUMENTS if name not in found]
    if missing:
        raise IncompatibleSGLang(unsupported([f"{path} takes no {' and no '.join(missing)}"]))


def check_layers() -> None:
    """Raises IncompatibleSGLang unless the layers are the ones the bridges are for."""
    problems = list(_problems(_LAYERS))
    if not problems:
        from sglang.srt.layers.activation import SiluAndMul

        layer = vars(SiluAndMul())
        problems = [f"BaseFusedOp has no attribute {name}" for name in _FUSED_OP_ATTRIBUTES if name not in layer]
    if problems:
        raise IncompatibleSGLang(unsupported(problems))


def check_gated_delta_rule() -> None:
    """Raises IncompatibleSGLang unless the functions of the gated delta rule are the ones the bridges are for."""
    problems = list(_problems(_GATED_DELTA_RULE))
    if problems:
        raise IncompatibleSGLang(unsupported(problems))


def hook(target: str, function: Callable[..., Any], when: str = "around") -> bool:
    """Have SGLang put a function around another one, or after it. Imports the target. SGLang logs what goes wrong with a hook, and goes on.

    Args:
        target: as ``package.module.name`` or ``package.module.Class.method``.
        when: a value of SGLang's HookType.

    Returns:
        Whether it stands there now. If not, another plugin has hooked it already, or SGLang's log says why.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    before = pkgutil.resolve_name(target)
    HookRegistry.register(target, function, HookType(when), source=HookSource("sglang_fl", "sglang-fl"))
    HookRegistry.apply_hooks()
    return pkgutil.resolve_name(target) is not before
