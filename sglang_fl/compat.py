# SPDX-License-Identifier: Apache-2.0
"""What sglang-fl relies on in SGLang: signatures, compared with the SGLang that is installed, and its HookRegistry.

A *shape* is a path (``module:name`` or ``module:Class.method``) and the names of the parameters that sglang-fl expects there. Where
one is missing or different, everything is left to SGLang, and the names of what differs are logged (see
``platform/hooks.py``): a newer SGLang serves without sglang-fl rather than wrongly with it.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from .utils import packages

#: The environment variable that tells a server's worker processes that everything is left to SGLang.
LEFT_TO_SGLANG = "_SGLANG_FL_LEFT_TO_SGLANG"

#: The SGLang releases that sglang-fl was tested with. Others start with a warning.
TESTED = ">=0.5.23,<0.5.24"

Shapes = Mapping[str, str]

#: What the platform relies on.
PLATFORM: Shapes = {
    "sglang.srt.platforms.interface:SRTPlatform.apply_server_args_defaults": "self server_args",
    "sglang.srt.platforms.interface:SRTPlatform.post_load_model": "self model",
    "sglang.srt.platforms.interface:SRTPlatform.get_default_attention_backend": "self",
    "sglang.srt.platforms.interface:SRTPlatform.get_compile_backend": "self mode",
    "sglang.srt.platforms.interface:SRTPlatform.get_group_coordinator_device": "self local_rank",
    "sglang.srt.platforms.interface:SRTPlatform.get_dispatch_key_name": "self",
    "sglang.srt.platforms.interface:SRTPlatform.get_graph_runner_cls": "self",
    "sglang.srt.platforms.interface:SRTPlatform.get_full_graph_backend_cls": "self",
    "sglang.srt.platforms.interface:SRTPlatform.get_piecewise_backend_cls": "self",
    "sglang.srt.platforms.interface:SRTPlatform.get_kv_pool_cls": "self kind",
    "sglang.srt.platforms.interface:SRTPlatform.get_paged_allocator_cls": "self",
    "sglang.srt.platforms.interface:SRTPlatform.init_backend": "self",
    "sglang.srt.platforms.device_mixin:DeviceMixin.get_torch_distributed_backend_str": "self",
    "sglang.srt.platforms.device_mixin:DeviceMixin.is_out_of_tree": "self",
}
#: What the platform of a plain CPU needs to tell the user's arguments from SGLang's defaults.
ARGUMENTS: Shapes = {
    "sglang.srt.arg_groups.overrides:record_of": "view",
    "sglang.srt.arg_groups.overrides:model_config_of": "server_args",
}
#: What it takes to serve hybrid models on a platform that keeps no snapshots of their states.
HYBRIDS: Shapes = {
    "sglang.srt.arg_groups.overrides:_mamba_radix_cache_resolution": "view",
    "sglang.srt.arg_groups.overrides:resolved_view": "server_args",
}
#: What the bridges rely on. To import it takes seconds, in which a server imports nothing that it does not need later.
LAYERS: Shapes = {
    "sglang.kernels.fused_op:BaseFusedOp._resolve_forward_method": "self",
    "sglang.kernels.fused_op:BaseFusedOp.enter_torch_compile": "self num_tokens",
    "sglang.kernels.fused_op:BaseFusedOp.leave_torch_compile": "self",
    "sglang.srt.layers.activation:GeluAndMul.forward_native": "self x",
    "sglang.srt.layers.activation:NewGELU.forward_native": "self x",
    "sglang.srt.layers.activation:QuickGELU.forward_native": "self x",
    "sglang.srt.layers.activation:ReLU2.forward_native": "self x",
    "sglang.srt.layers.activation:SiluAndMul.forward_native": "self x",
    "sglang.srt.layers.layernorm:Gemma3RMSNorm.forward_native": "self x residual",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_native": "self x",
    "sglang.srt.layers.layernorm:GemmaRMSNorm.forward_native": "self x residual post_residual_addition",
    "sglang.srt.layers.layernorm:LayerNorm.forward_native": "self x",
    "sglang.srt.layers.layernorm:RMSNormWithoutScale.forward_native": "self x",
    "sglang.srt.layers.layernorm:RMSNorm.forward_native": "self x residual post_residual_addition quant_linear",
    "sglang.srt.layers.layernorm:_fp8_static_input_scale": "linear",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native": "self positions query key offsets fused_set_kv_buffer_arg",
    "sglang.srt.layers.rotary_embedding.mrope:MRotaryEmbedding.forward_native": "self positions query key fused_set_kv_buffer_arg",
    "sglang.srt.runtime_context:get_disagg": "",
    "sglang.srt.runtime_context:get_exec": "",
    "sglang.srt.runtime_context:get_flags": "",
    "sglang.srt.layers.moe.topk:TopK.forward_native": (
        "self hidden_states router_logits num_token_non_padded expert_location_dispatch_info dynamic_expert_bias router_logits_partials"
    ),
    "sglang.srt.layers.moe.topk:StandardTopKOutput": "topk_weights topk_ids router_logits",
    "sglang.srt.layers.moe.topk:StandardTopKOutputPacked": "topk_weights topk_ids router_logits packed_topk_ids",
    "sglang.srt.layers.moe.topk:has_forward_context": "",
    "sglang.srt.layers.moe.topk:get_forward_context": "",
    "sglang.srt.layers.moe.topk:routing_simulation_enabled": "",
    "sglang.srt.layers.moe.topk:_zero_topk_weights_padded_region": "topk_weights num_token_non_padded",
    "sglang.srt.layers.moe.utils:has_per_rank_fused_shared_slots": "num_shared",
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardDispatchOutput": (
        "hidden_states hidden_states_scale topk_output hidden_states_pre_quant"
    ),
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardCombineInput": "hidden_states",
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.forward_native": "self layer dispatch_output",
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.apply": "self layer dispatch_output",
}
#: Attributes of every layer, once made.
LAYER_ATTRIBUTES = ("_forward_method", "_original_forward_method", "is_torch_compile")
#: What the hook on SGLang's groups reads, among other parameters; checked where FlagCX is chosen.
GROUPS: Shapes = {
    "sglang.srt.distributed.parallel_state:GroupCoordinator.__init__": "torch_distributed_backend use_pynccl",
}
#: What the hooks around the capture of graphs and the model's passes rely on; checked where ATen operators are replaced.
GRAPHS: Shapes = {
    "sglang.srt.model_executor.runner_backend.utils:resolve_decode_backend": "cuda_graph_runner",
    "sglang.srt.model_executor.runner_backend.utils:resolve_prefill_backend": "cuda_graph_runner",
    "sglang.srt.model_executor.runner_backend.base_cuda_graph_backend:BaseCudaGraphBackend.capture_one": (
        "self shape_key forward_fn capture_inputs post_warmup_hook"
    ),
    "sglang.srt.distributed.parallel_state:GroupCoordinator.barrier": "self",
    "sglang.srt.model_executor.model_runner:ModelRunner.forward": (
        "self forward_batch skip_attn_backend_init pp_proxy_tensors reinit_attn_backend split_forward_count"
    ),
}
#: What the line relies on that says which graphs were captured.
START: Shapes = {"sglang.srt.managers.scheduler:Scheduler.init_all_cuda_graphs": "self"}
#: What ``sglang-fl tune`` relies on, in the processes of its engine.
TUNE: Shapes = {
    "sglang.srt.managers.scheduler:Scheduler.handle_rpc_request": "self recv_req",
    "sglang.srt.managers.tp_worker:TpModelWorker.init_cuda_graphs": "self capture_decode_cuda_graph",
    "sglang.srt.model_executor.model_runner:ModelRunner.init_cuda_graphs": "self capture_decode_cuda_graph",
}
#: What the server's metric relies on; checked when a model was bound.
METRICS: Shapes = {"sglang.srt.runtime_context:get_observability": ""}
#: What the bridges of hybrid models' functions rely on. Checked if a model has such layers.
GATED_DELTA_RULE: Shapes = {
    "sglang.kernels.ops.attention.fla.chunk:chunk_gated_delta_rule": (
        "q k v g beta scale initial_state initial_state_indices cu_seqlens head_first use_qk_l2norm_in_kernel inplace_update"
    ),
    "sglang.kernels.ops.attention.fla.fused_recurrent:fused_recurrent_gated_delta_rule_packed_decode": (
        "mixed_qkv a b A_log dt_bias scale initial_state out ssm_state_indices use_qk_l2norm_in_kernel"
    ),
    "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent:fused_sigmoid_gating_delta_rule_update": (
        "A_log a dt_bias softplus_beta softplus_threshold q k v b initial_state_source initial_state_indices scale "
        "use_qk_l2norm_in_kernel cu_seqlens is_kda lower_bound disable_state_update intermediate_states_buffer "
        "intermediate_state_indices cache_steps retrieve_parent_token cache_ring replayssm_rawv replayssm_rawk replayssm_g replayssm_beta "
        "match_cutedsl_decode"
    ),
    "sglang.kernels.ops.mamba.causal_conv1d_triton:causal_conv1d_fn": (
        "x weight bias conv_states query_start_loc seq_lens_cpu cache_indices has_initial_state activation pad_slot_id validate_data "
        "block_table kwargs"
    ),
    "sglang.kernels.ops.mamba.causal_conv1d_triton:causal_conv1d_update": (
        "x conv_state weight bias activation cache_seqlens conv_state_indices num_accept_tokens intermediate_conv_window "
        "intermediate_state_indices retrieve_next_token retrieve_next_sibling retrieve_parent_token pad_slot_id metadata validate_data"
    ),
    "sglang.srt.configs.mamba_utils:mamba2_state_dtype": "config",
    "sglang.srt.layers.attention.linear.gdn_backend:GDNKernelDispatcher.__init__": "self decode_backend prefill_backend verify_backend",
    "sglang.srt.plugins.hook_registry:HookRegistry.register": "target hook hook_type source",
    "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks": "",
}


class IncompatibleSGLang(RuntimeError):
    """The installed SGLang lacks something that sglang-fl relies on."""


def installed_version() -> str:
    """SGLang's version, as its metadata states it."""
    return packages.installed_version("sglang") or "of unknown version"


def version_warning() -> str | None:
    """What to say of an SGLang outside the tested range; None inside it."""
    installed = installed_version()
    try:
        if SpecifierSet(TESTED).contains(installed, prereleases=True):
            return None
    except InvalidVersion:
        pass  # nothing that was tested
    return f"SGLang {installed} is outside the range that sglang-fl was tested with ({TESTED})"


def differences_from(*groups: Shapes) -> Callable[[], tuple[str, ...]]:
    """A function that says what differs in SGLang from these shapes. It imports what they name, and looks once."""
    return cache(lambda: tuple(difference for shapes in groups for difference in _differences(shapes)))


platform_problems = differences_from(PLATFORM, ARGUMENTS)
#: In how SGLang keeps the user's arguments.
argument_problems = differences_from(ARGUMENTS)
#: In how SGLang chooses the prefix cache of hybrid models.
hybrid_problems = differences_from(ARGUMENTS, HYBRIDS)
gated_delta_rule_problems = differences_from(GATED_DELTA_RULE)
graph_problems = differences_from(GRAPHS)
metrics_problems = differences_from(METRICS)
start_problems = differences_from(START)
tune_problems = differences_from(TUNE)


@cache
def layer_problems() -> tuple[str, ...]:
    """What differs in SGLang from what the bridges rely on. Imports SGLang's layers."""
    return tuple(_differences(LAYERS)) or tuple(_attribute_differences())


def binding_problems() -> tuple[str, ...]:
    """What differs in SGLang from what it takes to bind a model. If anything does, everything is left to SGLang."""
    return platform_problems() + layer_problems()


def group_problems() -> tuple[str, ...]:
    """What differs in SGLang's groups of ranks from what the hook of FlagCX on them reads."""
    return tuple(_differences(GROUPS, all_parameters=False))


def refuse(problems: Collection[str]) -> None:
    """Raises IncompatibleSGLang if anything differs."""
    if problems:
        raise IncompatibleSGLang(stop_message(problems))


def leave_everything_message(problems: Iterable[str], kernels: Iterable[str] = ()) -> str:
    """The warning when everything is left to SGLang. ``kernels``: those that would have been replaced."""
    named = ", ".join(sorted(kernels))
    return _message(
        problems,
        "sglang-fl leaves everything to SGLang: no layer is bound, no ATen operator is replaced, and SGLang uses its own collectives "
        f"and kernels{f' ({named})' if named else ''}",
    )


def stop_message(problems: Iterable[str]) -> str:
    """What to raise where the user asked for what this SGLang has no place for."""
    return _message(problems, "sglang-fl cannot be used")


def _message(problems: Iterable[str], consequence: str) -> str:
    lines = [
        f"{consequence}. The installed SGLang {installed_version()} differs from what sglang-fl relies on (tested: {TESTED}):",
        *(f"  - {problem}" for problem in problems),
        "Install an SGLang of the tested range to use sglang-fl with it, or uninstall sglang-fl.",
    ]
    return "\n".join(lines)


def _differences(shapes: Shapes, *, all_parameters: bool = True) -> Iterator[str]:
    for path, names in shapes.items():
        expected = tuple(names.split())
        try:
            found = tuple(inspect.signature(_look_up(path)).parameters)
        except Exception as error:  # whatever the import of another SGLang's module comes to
            yield f"{path} is missing ({type(error).__name__}: {error})"
            continue
        missing = [name for name in expected if name not in found]
        if all_parameters and found != expected:
            yield f"{path} takes ({', '.join(found)}), not ({', '.join(expected)})"
        elif missing:
            yield f"{path} takes no {' and no '.join(missing)}"


def _attribute_differences() -> Iterator[str]:
    from sglang.srt.layers.activation import SiluAndMul

    layer = vars(SiluAndMul())
    yield from (f"BaseFusedOp has no attribute {name}" for name in LAYER_ATTRIBUTES if name not in layer)


def _look_up(path: str) -> Any:
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def hook(target: str, function: Callable[..., Any], when: str = "around") -> bool:
    """Register a hook around a function of SGLang, or after it. Imports the target. If a hook fails, SGLang logs it and continues.

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
