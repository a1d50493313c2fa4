# SPDX-License-Identifier: Apache-2.0
"""Hybrid models on a platform that keeps no snapshots of their states (SGLang's "extra buffers")."""

import logging
from typing import Any

from .. import compat

logger = logging.getLogger("sglang_fl")


def leave_out_snapshots(server_args: Any) -> None:
    """Have SGLang's prefix cache keep no snapshots, where it would choose them for a model by itself.

    SGLang chooses by model and asks the platform afterwards, in an assertion that ends the server. What the user gave stays.
    """
    if compat.hybrid_problems():
        return
    from sglang.srt.arg_groups.overrides import _mamba_radix_cache_resolution, record_of, resolved_view

    view = resolved_view(record_of(server_args._cfg))
    if _mamba_radix_cache_resolution(view).get("mamba_radix_cache_strategy") != "extra_buffer":
        return
    server_args.mamba_radix_cache_strategy = "no_buffer"
    server_args.disable_overlap_schedule = True
    logger.info(
        "sglang-fl: this platform keeps no state snapshots of hybrid models: using --mamba-radix-cache-strategy no_buffer "
        "and --disable-overlap-schedule"
    )
