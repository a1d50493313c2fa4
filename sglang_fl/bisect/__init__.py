# SPDX-License-Identifier: Apache-2.0
"""Bisect: find the operator that changes a model's output."""
