# SPDX-License-Identifier: Apache-2.0
"""Helpers that every room may use: nearest-name hints and entry points of installed packages."""
