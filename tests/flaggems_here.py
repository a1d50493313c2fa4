# SPDX-License-Identifier: Apache-2.0
"""The real FlagGems, imported on a machine with no device for it.

FlagGems asks ``torch.cuda`` about the device while it is imported; those answers alone are a stand-in
here, for a moment. Its registration with PyTorch's dispatcher is real; its kernels cannot run.
"""

import importlib.util
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sglang_fl.dispatch.backends.flaggems import library

_CARD = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20)
_ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": _CARD.name,
    "get_device_capability": (_CARD.major, _CARD.minor),
    "get_device_properties": _CARD,
}


@pytest.fixture(scope="session")
def gems() -> Iterator[ModuleType]:
    if importlib.util.find_spec("flag_gems") is None:
        pytest.skip("FlagGems is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("GEMS_VENDOR", "nvidia")
            for name, answer in _ANSWERS.items():
                patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        module = library.load()
    yield module
    library.load.cache_clear()
