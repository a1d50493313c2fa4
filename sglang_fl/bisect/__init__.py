# SPDX-License-Identifier: Apache-2.0
"""Bisect: which operator changes what a model answers."""
