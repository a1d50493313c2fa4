# SPDX-License-Identifier: Apache-2.0
"""The operators' functions, a file a family. Importing one imports PyTorch, and may import your kernels.

A function takes what the operator's method of ``sglang_fl.dispatch.ops.FLBackendBase`` takes; one that is added here is named in
``backend.BACKEND``, too.
"""
