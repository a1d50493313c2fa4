# SPDX-License-Identifier: Apache-2.0
"""Imports FlagGems, and adapts it to the installed Triton. No other module imports it.

Importing FlagGems takes seconds and fails where it has no device, so nothing here does it but
:func:`load`, which is called in processes that run a model, and only when the settings ask for FlagGems.
"""

import ast
import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ....device import Device, known_vendors
from . import tuning

logger = logging.getLogger("sglang_fl.flaggems")

#: Where FlagGems keeps the class that knows its device, newer releases first.
_DETECTORS = ("flag_gems.runtime.backend.device_finder", "flag_gems.runtime.backend.device")

#: What we call of FlagGems, by file: function or class.method -> the parameters it must begin with, and behind "*" those that we
#: hand over by name. Others must have defaults.
_SIGNATURES: dict[str, dict[str, str]] = {
    "__init__.py": {"enable": "lib unused registrar", "only_enable": "lib include registrar"},
    "runtime/register.py": {"Register.register_impl": "self key fn", "Register.get_unused_ops": "self"},
    "fused/gelu_and_mul.py": {"gelu_and_mul": "x y approximate"},
    "ops/gelu.py": {"gelu": "self * approximate"},
    "fused/FLA/chunk_delta_h.py": {
        "chunk_gated_delta_rule_fwd_h": "k w u g gk initial_state output_final_state chunk_size save_new_value cu_seqlens"
    },
    "fused/FLA/chunk_o.py": {"chunk_fwd_o": "q k v h g scale cu_seqlens chunk_size"},
    "fused/FLA/chunk_scaled_dot_kkt.py": {"chunk_scaled_dot_kkt_fwd": "k g beta cu_seqlens chunk_size output_dtype"},
    "fused/FLA/cumsum.py": {"chunk_local_cumsum": "g chunk_size reverse cu_seqlens head_first output_dtype"},
    "fused/FLA/fused_recurrent.py": {
        "fused_recurrent_gated_delta_rule_fwd": "q k v g beta scale initial_state inplace_final_state cu_seqlens ssm_state_indices "
        "num_accepted_tokens use_qk_l2norm_in_kernel"
    },
    "fused/FLA/index.py": {"prepare_chunk_indices": "cu_seqlens chunk_size"},
    "fused/FLA/solve_tril.py": {
        "merge_16x16_to_64x64_inverse_kernel": "A Ai cu_seqlens chunk_indices T H BT USE_TMA IS_VARLEN DOT_PRECISION"
    },
    "fused/FLA/wy_fast.py": {"recompute_w_u_fwd": "k v beta g_cumsum A cu_seqlens"},
    "modules/activation.py": {"gems_silu_and_mul": "x y"},
    "modules/normalization.py": {"gems_rms_forward": "x residual weight eps"},
    "utils/libentry.py": {"LibEntry.run": "self", "LibTuner.get_key": "self args", "LibTuner.get": "cls name"},
    "fused/topk_softmax.py": {"topk_softmax": "topk_weights topk_indices token_expert_indices gating_output renormalize"},
    "fused/grouped_topk.py": {
        "grouped_topk": "scores n_group topk_group topk renormalize routed_scaling_factor bias scoring_func",
    },
    # All of them are of use to quantised experts; we hand over by name what stands behind topk_ids.
    "fused/fused_moe.py": {
        "fused_experts_impl": "hidden_states w1 w2 topk_weights topk_ids inplace activation apply_router_weight_on_input use_fp8_w8a8 "
        "use_int8_w8a8 use_int8_w8a16 use_int4_w4a16 ocp_mx_scheme per_channel_quant global_num_experts expert_map w1_scale w2_scale "
        "w1_zp w2_zp a1_scale a2_scale block_shape w1_bias w2_bias"
    },
    "modules/rotary_embedding.py": {"gems_rope_forward": "query key cos sin position_ids rotary_interleaved inplace"},
}
#: The names that we read: variables, classes, attributes.
_NAMES: dict[str, tuple[str, ...]] = {
    "__init__.py": ("_FULL_CONFIG", "FULL_CONFIG_BY_FUNC", "registrar", "vendor_name", "current_work_registrar"),
    "runtime/register.py": ("cpp_patched_ops", "reg_key"),
    "fused/fused_moe.py": ("logger",),
    "utils/codegen_config_utils.py": ("CODEGEN_COFIGS",),
    "utils/libentry.py": ("LibEntry", "major_version", "minor_version"),
}
#: How FlagGems tells the Tritons that it knows from others, in LibEntry.run; see _launch_with_all_arguments.
_KNOWN_TRITONS = re.compile(r"3 <= minor_version <= (\d+)")
_OF_DETECTOR = ("DeviceDetector", "vendor", "vendor_name")
#: The release that all of this was tried with.
TESTED = "5.0.2"
NOT_INSTALLED = "FlagGems is not installed (uv pip install flag_gems)"


def why_not_here(device: Device) -> str | None:
    """Why FlagGems cannot be used on a device, or None. Does not import it."""
    if not known_vendors()[device.vendor].flaggems:
        return f"FlagGems does not support {device.vendor}"
    if importlib.util.find_spec("flag_gems") is None:
        return NOT_INSTALLED
    return None


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """FlagGems, ready to compile kernels.

    Raises:
        ImportError: it is not installed.
        RuntimeError: FlagGems finds no device that it serves.
    """
    with tuning.keeping_results():
        module = importlib.import_module("flag_gems")
    libentry = importlib.import_module("flag_gems.utils.libentry")
    tuning.limit(libentry.LibTuner)
    if not block_pointers_are_tensors(importlib.import_module("triton.language")):
        _generate_without_block_pointers()
    _launch_with_all_arguments(libentry)
    return module


def detector() -> Any:
    """FlagGems's device object: ``vendor_name``, ``vendor``, ``name``, ``dispatch_key``."""
    for name in _DETECTORS:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name).DeviceDetector()
    raise ImportError(f"this FlagGems has no DeviceDetector in any of {', '.join(_DETECTORS)}")


def changed_signatures(root: Path | None = None) -> list[str]:
    """FlagGems functions that sglang-fl calls and that are missing or take other parameters; read from the source, without an import.

    Args:
        root: the package's directory; None: where it is installed.
    """
    if root is None:
        spec = importlib.util.find_spec("flag_gems")
        if spec is None or spec.origin is None:
            return []
        root = Path(spec.origin).parent
    return list(_changes(root))


def _changes(root: Path) -> Iterator[str]:
    files = [f"{name.removeprefix('flag_gems.').replace('.', '/')}.py" for name in _DETECTORS]
    detector = next((file for file in files if (root / file).exists()), None)
    if detector is None:
        yield f"flag_gems: DeviceDetector is in none of {', '.join(_DETECTORS)}"
    names = _NAMES if detector is None else {**_NAMES, detector: _OF_DETECTOR}
    for file in sorted(_SIGNATURES.keys() | names.keys()):
        where = f"flag_gems/{file}"
        try:
            text = (root / file).read_text(encoding="utf-8")
            body = ast.parse(text).body
        except (OSError, SyntaxError) as error:
            yield f"{where} cannot be read: {error}"
            continue
        functions = dict(_functions(body))
        for name, expected in _SIGNATURES.get(file, {}).items():
            found = functions.get(name)
            if found is None:
                yield f"{where}: there is no {name}"
            elif not _takes(found, expected):
                yield f"{where}: {name} takes ({', '.join(_parameters(found))}), not ({', '.join(expected.split())})"
        there = set(_defined(body))
        yield from (f"{where}: there is no {name}" for name in names.get(file, ()) if name not in there)
        if file == "utils/libentry.py" and "LibEntry.run" in functions and "minor_version" in there and not _KNOWN_TRITONS.search(text):
            yield f"{where}: LibEntry.run does not say with {_KNOWN_TRITONS.pattern!r} which Tritons it knows"


def _takes(function: ast.arguments, expected: str) -> bool:
    """Whether a function can be called as we do."""
    front, _, by_name = expected.partition("*")
    begin, named = front.split(), by_name.split()
    positional = [*function.posonlyargs, *function.args]
    optional = {argument.arg for argument in positional[len(positional) - len(function.defaults) :]}
    optional |= {argument.arg for argument, default in zip(function.kwonlyargs, function.kw_defaults, strict=True) if default is not None}
    may_be_named = {argument.arg for argument in (*function.args, *function.kwonlyargs)}
    return (
        [argument.arg for argument in positional[: len(begin)]] == begin
        and may_be_named.issuperset(named)
        and may_be_named.union(argument.arg for argument in positional) <= optional.union(begin, named)
    )


def _parameters(function: ast.arguments) -> Iterator[str]:
    yield from (argument.arg for argument in (*function.posonlyargs, *function.args))
    if function.kwonlyargs:
        yield from ("*", *(argument.arg for argument in function.kwonlyargs))


def _functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.arguments]]:
    """(name, parameters) of a module's functions and of its classes' methods."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node.args


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """The classes of a module, and everything that it assigns to, attributes too."""
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def block_pointers_are_tensors(language: ModuleType) -> bool:
    """Whether ``tl.make_block_ptr`` makes a tensor, as FlagGems's generated kernels expect.

    Triton 3.8 turned block pointers into a class of their own, without ``.type.element_ty``; until then
    its semantic layer made them.
    """
    semantic = getattr(language, "semantic", None)
    return hasattr(semantic, "make_block_ptr") or hasattr(getattr(semantic, "TritonSemantic", None), "make_block_ptr")


def _generate_without_block_pointers() -> None:
    """Have FlagGems generate its pointwise kernels on plain pointers.

    The configuration is read when a kernel is first generated, so this must come right after the import.
    """
    # "COFIGS" is FlagGems's spelling.
    configs = importlib.import_module("flag_gems.utils.codegen_config_utils").CODEGEN_COFIGS
    vendor = detector().vendor
    config = configs.get(vendor) or next(c for v, c in configs.items() if v.name == "NVIDIA")
    if config.prefer_block_pointer:
        config.prefer_block_pointer = False
        logger.debug("FlagGems generates its pointwise kernels without block pointers, which this Triton has changed")


def _launch_with_all_arguments(libentry: Any) -> None:
    """Have FlagGems hand all of a kernel's arguments to Triton, its compile-time constants included.

    Triton's launcher takes them by position since 3.3, and does not count them. FlagGems hands all of them over up
    to the last Triton that it knew, 3.6, and the run-time ones alone to others; in a newer Triton every argument
    behind a constant is then taken for another, or read from beyond the last.
    """
    launch = getattr(getattr(libentry, "LibEntry", None), "run", None)
    known = _KNOWN_TRITONS.search(inspect.getsource(launch)) if launch else None
    if known is None:
        logger.warning("this FlagGems launches kernels in a way that sglang-fl does not know: see 'sglang-fl doctor'")
    elif libentry.major_version == 3 and libentry.minor_version > int(known[1]):
        libentry.minor_version = int(known[1])
        logger.debug("FlagGems launches kernels as for Triton 3.%s, the last that it knew", known[1])
