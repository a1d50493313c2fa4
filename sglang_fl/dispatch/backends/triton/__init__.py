# SPDX-License-Identifier: Apache-2.0
"""This package's own kernels, in plain Triton, for every chip that has a Triton compiler."""
