# SPDX-License-Identifier: Apache-2.0
"""Chip vendors' own kernels: one folder a vendor, found by itself if it has register_ops.py."""
