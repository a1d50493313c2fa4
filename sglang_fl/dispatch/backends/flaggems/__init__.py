# SPDX-License-Identifier: Apache-2.0
"""FlagGems: Triton kernels for every chip that FlagOS serves."""
