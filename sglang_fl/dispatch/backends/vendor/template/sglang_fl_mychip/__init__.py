# SPDX-License-Identifier: Apache-2.0
"""MyChip for SGLang, through sglang-fl.

Import nothing here: this module is part of ``import sglang``.
"""
