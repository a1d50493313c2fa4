# SPDX-License-Identifier: Apache-2.0
"""What SGLang cannot serve on a plain CPU; refused while arguments are resolved, before weights are loaded."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from .. import compat
from ..device import declared

_TRITON = "its kernels are Triton's, which do not run on a CPU"
_GPU = "it is made for a GPU's memory"

#: SGLang's argument -> why a plain CPU cannot serve it. docs/support.md has the list.
LIMITS = {
    "quantization": _TRITON,
    "enable_lora": _TRITON,
    "lora_paths": _TRITON,
    "speculative_algorithm": "SGLang has no draft-model attention for torch_native",
    "enable_dp_attention": "its gathers are GPU kernels",
    "enable_hierarchical_cache": _GPU,
    "enable_memory_saver": _GPU,
    "enable_hisparse": _GPU,
    "enable_pdmux": "it partitions a GPU's multiprocessors",
    "enable_deterministic_inference": "it needs an attention backend that SGLang has made deterministic, and a plain CPU has none",
}
#: Values of them that change nothing.
_HARMLESS: dict[str, frozenset[Any]] = {"quantization": frozenset({"unquant"})}
#: Arguments that name an attention backend, and SGLang's backends that run on a plain CPU.
_ATTENTION, _ON_CPU = ("attention_backend", "prefill_attention_backend", "decode_attention_backend"), frozenset({"torch_native"})
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"


def problems(given: Callable[[str], Any], model_config: Any) -> Iterator[str]:
    """The arguments that a plain CPU cannot serve, one sentence each.

    Args:
        given: what the user gave for an argument.
    """
    for name, reason in LIMITS.items():
        value = given(name)
        if value and value not in _HARMLESS.get(name, ()):
            yield f"{_spelled(name, value)}: {reason}"
    for name in _ATTENTION:
        value = given(name)
        if value is not None and value not in _ON_CPU | {
            name for platform in declared().platforms.values() for name in platform.attention_backends
        }:
            yield f"{_spelled(name, value)}: of SGLang's attention backends only torch_native runs on a plain CPU"
    if model_config.quantization not in (None, "unquant") and not given("quantization"):
        yield f"--model-path: the model's weights are quantised ({model_config.quantization}): {_TRITON}"
    if model_config.attention_arch.name == "MLA":
        yield "--model-path: the model has latent attention (MLA), which SGLang's torch_native does not have"
    if getattr(model_config.hf_text_config, "attn_logit_softcapping", None) and all(given(name) in (None, *_ON_CPU) for name in _ATTENTION):
        yield "--model-path: the model caps its attention logits (attn_logit_softcapping), and SGLang's torch_native ignores the cap"


def _spelled(name: str, value: Any) -> str:
    argument = f"--{name.replace('_', '-')}"
    return argument if value is True or not isinstance(value, str) else f"{argument} {value}"


@cache
def refuse_requests() -> None:
    """Answer requests that would crash the scheduler with an error."""
    for name in ("release_memory_occupation", "resume_memory_occupation"):
        compat.hook(f"{_CONTROL}.{name}", _no_memory)
    compat.hook(f"{_CONTROL}.start_profile", _profile)


async def _no_memory(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    raise ValueError("a plain CPU cannot release and resume memory")


async def _profile(original: Callable[..., Any], manager: Any, req: Any = None) -> Any:
    unknown = sorted(set(req.activities or ()) - {"CPU", "GPU"}) if req is not None else []
    if unknown:
        raise ValueError(f"a plain CPU supports only the activity CPU, not {', '.join(unknown)}")
    return await original(manager, req)
