# SPDX-License-Identifier: Apache-2.0
"""Calls of torch_npu, a file a family of operators. Importing one imports torch_npu."""
