# SPDX-License-Identifier: Apache-2.0
"""Which of SGLang's layers a model uses, read from its config.json and SGLang's source.

SGLang is not imported. The file that defines the model's architecture is parsed, with the model files whose
classes it uses.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Settings, SettingsError
from ..dispatch.catalog import CUSTOM_FORWARD, FUNCTIONS, LAYERS, NOT_COVERED_CLASSES, names_in_lists
from ..kernels.source import SourceFile, root_of

#: The config's rope type -> the class that ``get_rope`` creates.
_ROPE_CLASSES = {
    "default": "RotaryEmbedding",
    "llama3": "Llama3RotaryEmbedding",
    "linear": "LinearScalingRotaryEmbedding",
    "dynamic": "DynamicNTKScalingRotaryEmbedding",
    "yarn": "YaRNScalingRotaryEmbedding",
    "deepseek_yarn": "DeepseekScalingRotaryEmbedding",
    "longrope": "Phi3LongRoPEScaledRotaryEmbedding",
    "mrope": "MRotaryEmbedding",
}
#: SGLang's functions that create a rotary embedding.
_MAKE_ROPE = ("get_rope", "get_rope_wrapper")
#: SGLang's function that returns an activation, and the classes that have an operator.
_MAKE_ACTIVATION = "get_act_fn"
_ACTIVATION_CLASSES = {"gelu_new": "NewGELU", "relu2": "ReLU2"}
#: How SGLang's models create experts, and the class with an operator: experts that are not quantised.
_MAKE_EXPERTS = ("FusedMoE", "get_moe_impl_class")
_EXPERTS = "UnquantizedFusedMoEMethod"
_MODELS = "sglang.srt.models."
_MODULES_OF = {name: module for layers in LAYERS.values() for module, name in layers}
#: SGLang's layer of linear attention, and the functions that it calls if it is a gated delta rule.
_LINEAR_ATTENTION = "RadixLinearAttention"
_GATED_DELTA_RULE = tuple(name for _, name in FUNCTIONS.values())
_KNOWN = {name: op for op, layers in LAYERS.items() for _, name in layers} | {name: op for op, (_, name) in FUNCTIONS.items()}


@dataclass(frozen=True)
class LayerRow:
    """A layer class of a model. ``op`` is None if sglang-fl has no operator for it."""

    class_name: str
    op: str | None
    size: str
    destination: str


def model_layers(directory: Path, picked: dict[str, str], settings: Settings) -> list[LayerRow]:
    """The layer classes of the model in ``directory``.

    Args:
        directory: the folder with config.json, or that file itself.
        picked: operator -> what it would run on.

    Raises:
        SettingsError: config.json is missing or broken, or SGLang does not know the architecture.
    """
    config = read_config(directory)
    text = {**config, **(config.get("text_config") or {})}
    used: dict[str, None] = {}
    files = {name: _file_of(name) for name in config.get("architectures") or []}
    if not any(files.values()):
        raise SettingsError(
            f"{directory}: SGLang has no model of its own for the architecture {config.get('architectures')}. "
            "If SGLang serves it through its Transformers backend, sglang-fl replaces none of its layers"
        )
    for architecture, file in files.items():
        if file is not None:
            used |= dict.fromkeys(_classes_of(architecture, file))
    if _LINEAR_ATTENTION in used and "linear_num_value_heads" in text:
        used |= dict.fromkeys(_GATED_DELTA_RULE)
    used.pop(_LINEAR_ATTENTION, None)
    rows = []
    for class_name in dict.fromkeys(_made(name, text) for name in used):
        if class_name is None:
            continue
        op = _KNOWN.get(class_name)
        why = settings.exclusion_reason(names_in_lists(class_name, op)) if op else None
        if class_name == _MAKE_EXPERTS[0]:
            destination = "sglang (quantized experts)"
        elif op is None:
            destination = "sglang (sglang-fl has no operator for it)"
        elif class_name in CUSTOM_FORWARD:
            destination = "sglang (it overrides forward)"
        else:
            destination = f"sglang ({why})" if why else picked[op]
        rows.append(LayerRow(class_name, op, _size(op, text), destination))
    return rows


def read_config(directory: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        SettingsError: it is missing or broken.
    """
    path = directory / "config.json" if directory.is_dir() else directory
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"--model: there is no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model: {str(path)!r} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SettingsError(f"--model: {str(path)!r} is not a model configuration")
    problems = [f"--model: {str(path)!r}: {problem}" for problem in _wrong_values(config)]
    if problems:
        raise SettingsError(problems)
    return config


#: The keys of a configuration that are read, with their types. null counts as missing.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("text_config", "rope_scaling", "rope_parameters", "quantization_config"), dict),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "head_dim"), int),
    "architectures": list,
}


def _wrong_values(config: dict[str, Any]) -> Iterator[str]:
    for key, kind in _TYPES.items():
        value = config.get(key)
        is_right = value is None or isinstance(value, kind)
        if not is_right:
            yield f"{key} is {value!r}"
        elif key == "architectures" and not all(isinstance(name, str) for name in value or ()):
            yield f"{key} is {value!r}, not a list of names"
        elif key.startswith("rope") and value:
            yield from (f"{name} of {key} is {value[name]!r}" for name in ("rope_type", "type") if not isinstance(value.get(name, ""), str))
        elif key == "text_config" and value:
            yield from _wrong_values(value)


def _made(name: str, config: dict[str, Any]) -> str | None:
    """The layer class that a class's or a function's name stands for, or None if it is not relevant here."""
    if name in _MAKE_ROPE:
        return _rope_class(config)
    if name in _MAKE_EXPERTS:
        return _MAKE_EXPERTS[0] if config.get("quantization_config") else _EXPERTS
    if name == _MAKE_ACTIVATION:
        return _ACTIVATION_CLASSES.get(config.get("hidden_act") or config.get("activation_function") or "")
    return name


def _rope_class(config: dict[str, Any]) -> str:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "mrope_section" in rope:
        return "MRotaryEmbedding"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return _ROPE_CLASSES.get(kind, f"rotary embedding of type {kind}")


#: operator -> its sizes: how each is shown, and its names in configurations.
_NORM = (("hidden_size {}", "hidden_size"), ("eps {}", "rms_norm_eps", "layer_norm_eps", "norm_eps"))
_ACTIVATION = (("intermediate_size {}", "intermediate_size"),)
_ROTARY = (
    ("head_dim {}", "head_dim"),
    ("{} heads", "num_attention_heads"),
    ("{} kv heads", "num_key_value_heads", "num_attention_heads"),
)
_NUMBER_OF_EXPERTS = ("{} experts", "num_experts", "n_routed_experts", "num_local_experts")
_LINEAR = (
    ("{} heads", "linear_num_key_heads"),
    ("head_dim {}", "linear_key_head_dim"),
    ("{} value heads", "linear_num_value_heads"),
    ("value head_dim {}", "linear_value_head_dim"),
)
_SIZES: dict[str, tuple[tuple[str, ...], ...]] = {
    "fused_moe": (_NUMBER_OF_EXPERTS, _NORM[0], ("moe_intermediate_size {}", "moe_intermediate_size", "intermediate_size")),
    "topk": (_NUMBER_OF_EXPERTS, ("{} a token", "num_experts_per_tok")),
    **dict.fromkeys(("gelu_and_mul", "silu_and_mul"), _ACTIVATION),
    **dict.fromkeys(("rms_norm", "gemma_rms_norm"), _NORM),
    **dict.fromkeys(("rotary_embedding", "mrotary_embedding"), _ROTARY),
    **dict.fromkeys(_GATED_DELTA_RULE, _LINEAR),
}


def _size(op: str | None, config: dict[str, Any]) -> str:
    """An operator's sizes, as far as the configuration has them."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not config.get("head_dim"):
        config = {**config, "head_dim": hidden // heads if hidden and heads else None}
    found = [(shown, [config[name] for name in names if config.get(name) is not None]) for shown, *names in _SIZES.get(op or "", ())]
    return ", ".join(shown.format(values[0]) for shown, values in found if values)


def sglang_folder() -> Path:
    """Raises SettingsError if SGLang is not installed."""
    root = root_of()
    if root is None:
        raise SettingsError("SGLang is not installed: reinstall sglang-fl with its dependencies")
    return root


def _file_of(architecture: str) -> Path | None:
    """SGLang's file that defines or imports a model's class."""
    pattern = re.compile(rf"^class {re.escape(architecture)}\b[(:]|^EntryClass\b.*\b{re.escape(architecture)}\b", re.MULTILINE)
    files = sorted((sglang_folder() / "srt" / "models").glob("*.py"))
    return next((file for file in files if pattern.search(file.read_text(encoding="utf-8"))), None)


def _is_foreign(source: SourceFile, name: str) -> bool:
    """Whether a name of one of SGLang's layers stands for another class in a file of its models."""
    homes = [path.rpartition(".")[0] for path in source.imported.get(name, ())] or [source.name] * (name in source.defined)
    return any(home != _MODULES_OF.get(name) and (home.startswith(_MODELS) or not home.startswith("sglang.")) for home in homes)


def _classes_of(architecture: str, start: Path) -> Iterator[str]:
    """The layer classes that a model's file calls, together with the model files that it builds on."""
    wanted = {*_KNOWN, *NOT_COVERED_CLASSES, *_MAKE_ROPE, *_MAKE_EXPERTS, _MAKE_ACTIVATION, _LINEAR_ATTENTION}
    pending, seen = [(f"{_MODELS}{start.stem}", architecture)], set[tuple[str, str]]()
    files: dict[str, SourceFile] = {}
    while pending:
        module, name = pending.pop(0)
        path = start.with_name(f"{module.rpartition('.')[2]}.py")
        if (module, name) in seen or not path.exists():
            continue
        seen.add((module, name))
        if module not in files:
            files[module] = SourceFile(module, path)
        file = files[module]

        def elsewhere(name: str, file: SourceFile = file) -> list[tuple[str, str]]:
            """The model files and names that an imported name stands for."""
            paths = [path.rpartition(".") for path in file.imported.get(name, ()) if path.startswith(_MODELS)]
            return [(home, found) for home, _, found in paths]

        bodies = [node for node in file.defined.get(name, ()) if not isinstance(node, ast.FunctionDef)]
        if not bodies:
            pending += elsewhere(name)
            continue
        nodes = [node for body in bodies for node in ast.walk(body)]
        for node in nodes:
            # Called, or the default of an argument that is.
            makers = [node.func] if isinstance(node, ast.Call) else node.args.defaults if isinstance(node, ast.FunctionDef) else []
            names = [maker.id for maker in makers if isinstance(maker, ast.Name) and maker.id in wanted]
            yield from (name for name in names if not _is_foreign(file, name))
        for used in {node.id for node in nodes if isinstance(node, ast.Name)} - wanted:
            pending += elsewhere(used) or ([(module, used)] if used in file.defined else [])
