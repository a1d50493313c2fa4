# SPDX-License-Identifier: Apache-2.0
"""Huawei Ascend: torch_npu's fused operators."""
