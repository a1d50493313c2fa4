# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch, on any device: the reference for the other backends."""
