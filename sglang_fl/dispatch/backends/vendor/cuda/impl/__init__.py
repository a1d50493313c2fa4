# SPDX-License-Identifier: Apache-2.0
"""Calls of CUDA kernels, a file a family of operators. Importing one loads its kernels."""
