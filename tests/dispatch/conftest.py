# SPDX-License-Identifier: Apache-2.0
import gc
import secrets
from collections.abc import Iterator

import pytest
import torch

from sglang_fl.dispatch import SelectionPolicy, reset_global_policy, set_global_policy


@pytest.fixture
def rng() -> torch.Generator:
    """Other numbers in each run; the seed is printed where a test fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """A garbage collection looks at the test's own objects only: at all of SGLang's it takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def reference_policy() -> Iterator[None]:
    """The reference goes first."""
    set_global_policy(SelectionPolicy("reference"))
    yield
    reset_global_policy()
