# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels, for NVIDIA's GPUs and those that run CUDA binaries."""
