# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True, scope="module")
def small_tensors(one_thread: None) -> None:
    """All of these tests take one thread."""
