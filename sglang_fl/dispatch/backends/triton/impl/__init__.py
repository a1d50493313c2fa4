# SPDX-License-Identifier: Apache-2.0
"""The operators' signatures before the kernels, a file a family. Importing one imports Triton.

A kernel's tile comes from the sizes of the layer by arithmetic: nothing is tuned.
"""
