# SPDX-License-Identifier: Apache-2.0
"""The sizes of today's common models, from ``models.json``. Each row names the configuration class with these defaults."""

import json
from pathlib import Path
from typing import Any

MODELS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))["models"]


def numbers(*words: str) -> str:
    """The models' values for any of these words, for the braces of a table: ``4096,5120``."""
    return ",".join(str(number) for number in sorted({model[word] for model in MODELS for word in words if word in model}))


def sizes(*words: str) -> str:
    """The models' combinations of these words, for the braces of a table: ``experts=8 top_k=2,experts=16 top_k=1``."""
    rows = (" ".join(f"{word}={model[word]}" for word in words) for model in MODELS if set(words) <= set(model))
    return ",".join(dict.fromkeys(rows))
