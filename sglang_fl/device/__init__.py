# SPDX-License-Identifier: Apache-2.0
"""Which chip this is: one table of vendors, one list of evidence, and what installed packages declare of their chips."""

from .declared import VendorPlatform, known_vendors
from .evidence import Device, detect, forced_vendor, probe, vendor_problems, why_unusable
from .vendors import ALIASES, VENDORS, Vendor, canonical

__all__ = [
    "ALIASES",
    "VENDORS",
    "Device",
    "Vendor",
    "VendorPlatform",
    "canonical",
    "detect",
    "forced_vendor",
    "known_vendors",
    "probe",
    "vendor_problems",
    "why_unusable",
]
