# SPDX-License-Identifier: Apache-2.0
"""The operators in float64, a file a family, and how far from it an implementation may be (``judge.py``)."""
