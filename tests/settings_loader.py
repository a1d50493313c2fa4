# SPDX-License-Identifier: Apache-2.0
"""Settings from a YAML file's text and variables, for tests."""

from pathlib import Path

import pytest

from sglang_fl.config import Settings, SettingsError, Words, load_settings
from sglang_fl.device import Device
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.startup.words import flaggems_functions

CPU = Device("cpu", "cpu", None, "a test")
NVIDIA = Device("nvidia", "cuda", "cuda", "a test")
WORDS = Words(
    operators=frozenset(OPERATORS),
    classes=frozenset({"RMSNorm", "SiluAndMul", "RotaryEmbedding"}),
    vendors=frozenset({"nvidia", "ascend", "metax"}),
    impls=frozenset({"reference.torch", "vendor.ascend"}),
    flaggems=flaggems_functions() or frozenset({"mul", "add", "to_copy"}),
    not_covered=frozenset({"GemmaRMSNorm", "TopK", "mamba_scan"}),
)


class Loader:
    """Loads settings from the text of a YAML file and from variables; ``file`` is where the text is put."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.device = CPU
        self.words: Words | None = WORDS

    def __call__(self, text: str | bytes | None = None, /, **environ: str) -> Settings:
        if text is not None:
            self.file.write_bytes(text if isinstance(text, bytes) else text.encode())
            environ["SGLANG_FL_CONFIG"] = str(self.file)
        return load_settings(environ, device=self.device, words=self.words)

    def problems(self, text: str | bytes | None = None, /, **environ: str) -> tuple[str, ...]:
        with pytest.raises(SettingsError) as caught:
            self(text, **environ)
        return caught.value.problems
