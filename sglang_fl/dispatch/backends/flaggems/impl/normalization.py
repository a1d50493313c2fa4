# SPDX-License-Identifier: Apache-2.0
"""FlagGems's own signature is ours: ``(x, residual, weight, eps)``, in place where there is a residual."""

from ..library import load

rms_norm = load().modules.normalization.gems_rms_forward
