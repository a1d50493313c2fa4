# SPDX-License-Identifier: Apache-2.0
"""The operators in float64, one file per family, and the bounds of an implementation's error (``judge.py``)."""
