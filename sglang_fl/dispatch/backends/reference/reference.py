# SPDX-License-Identifier: Apache-2.0
"""The reference backend: every operator in plain PyTorch."""

from .. import KernelBackend


class ReferenceBackend(KernelBackend):
    """fp32 inside, one rounding at the end, inputs never written."""

    name = "reference"
