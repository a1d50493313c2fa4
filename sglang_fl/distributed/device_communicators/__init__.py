# SPDX-License-Identifier: Apache-2.0
"""Bindings of collective libraries."""
