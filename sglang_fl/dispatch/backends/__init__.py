# SPDX-License-Identifier: Apache-2.0
"""Sources of kernels. A backend knows its kernels and ``dispatch.types``, never SGLang, never another."""

from ..ops import FLBackendBase as Backend

__all__ = ["Backend"]
