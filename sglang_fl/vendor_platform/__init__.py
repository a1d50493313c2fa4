# SPDX-License-Identifier: Apache-2.0
"""The name under which a vendor's package imports its declaration; see :mod:`sglang_fl.device`."""

from ..device.declared import CAPABILITIES, ENTRY_POINT_GROUP, KV_POOL_KINDS, VendorPlatform

__all__ = ["CAPABILITIES", "ENTRY_POINT_GROUP", "KV_POOL_KINDS", "VendorPlatform"]
