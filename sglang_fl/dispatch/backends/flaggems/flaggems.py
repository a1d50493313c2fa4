# SPDX-License-Identifier: Apache-2.0
"""The FlagGems backend: FlagGems's kernels behind the operators' signatures."""

from .. import KernelBackend
from .library import why_unavailable


class FlagGemsBackend(KernelBackend):
    """Triton kernels, on every chip that FlagGems serves."""

    name = "flaggems"

    def why_unavailable(self) -> str | None:
        return why_unavailable()
