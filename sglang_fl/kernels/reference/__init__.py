# SPDX-License-Identifier: Apache-2.0
"""Kernels of SGLang's in plain PyTorch."""

from collections.abc import Mapping

from ...device import KernelReplacement

#: ``sglang.module:name`` -> what runs in its place where the device has no Triton, or where an order says ``reference``.
REFERENCES: Mapping[str, KernelReplacement] = {}
