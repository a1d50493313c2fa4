# SPDX-License-Identifier: Apache-2.0
"""Helpers that every room may use: nearest-name hints, entry points of installed packages, a server as a child process."""
