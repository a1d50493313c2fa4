# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch, on any device: what the other backends are measured by."""
