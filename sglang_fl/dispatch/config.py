# SPDX-License-Identifier: Apache-2.0
"""``sglang_fl.config`` under the name that backends of FlagOS import it by."""

from ..config import (
    get_config_path,
    get_effective_config,
    get_flagos_blacklist,
    get_oot_blacklist,
    get_per_op_order,
    get_platform_name,
    load_platform_config,
)

__all__ = [
    "get_config_path",
    "get_effective_config",
    "get_flagos_blacklist",
    "get_oot_blacklist",
    "get_per_op_order",
    "get_platform_name",
    "load_platform_config",
]
