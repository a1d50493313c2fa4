# SPDX-License-Identifier: Apache-2.0
"""Hybrid models on a platform that keeps no snapshots of their states (SGLang's "extra buffers")."""

import logging
from typing import Any

from .. import compat

logger = logging.getLogger("sglang_fl")


def leave_out_snapshots(server_args: Any) -> None:
    """Have SGLang's prefix cache keep no snapshots, where it would choose them for a model by itself.

    SGLang chooses by model and asks the platform afterwards, in an assertion that ends the server. What the user gave stays. Without
    snapshots a page is one token, whatever the platform's default is.

    Raises:
        ValueError: the user gave another size of pages.
    """
    if compat.hybrid_problems():
        return
    from sglang.srt.arg_groups.overrides import _mamba_radix_cache_resolution, record_of, resolved_view

    record = record_of(server_args._cfg)
    view = resolved_view(record)
    resolution = _mamba_radix_cache_resolution(view)
    if not resolution:
        return
    strategy = resolution.get("mamba_radix_cache_strategy", view.mamba_radix_cache_strategy)
    if view.mamba_radix_cache_strategy == "auto" and strategy == "extra_buffer":
        strategy = server_args.mamba_radix_cache_strategy = "no_buffer"
        server_args.disable_overlap_schedule = True
        logger.info(
            "sglang-fl: this platform keeps no state snapshots of hybrid models: using --mamba-radix-cache-strategy no_buffer "
            "and --disable-overlap-schedule"
        )
    page_size = server_args.page_size
    if strategy == "no_buffer" and page_size not in (None, 1):
        if record._raw_input.get("page_size") == page_size:
            raise ValueError(
                f"--page-size {page_size}: this platform keeps no state snapshots of hybrid models, and without them SGLang's prefix cache "
                "has pages of one token; leave the argument out, or add --disable-radix-cache"
            )
        server_args.page_size = 1
        logger.info("sglang-fl: --page-size 1 instead of the platform's %d, which needs state snapshots of hybrid models", page_size)
