# SPDX-License-Identifier: Apache-2.0
"""The names that a vendor's package imports for its chip's declaration; see :mod:`sglang_fl.device`."""

from ..device import CAPABILITIES, ENTRY_POINT_GROUP, KV_POOL_KINDS, KernelReplacement, VendorPlatform, declared

__all__ = ["CAPABILITIES", "ENTRY_POINT_GROUP", "KV_POOL_KINDS", "KernelReplacement", "VendorPlatform", "declared"]
