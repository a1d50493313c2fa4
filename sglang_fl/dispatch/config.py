# SPDX-License-Identifier: Apache-2.0
"""``sglang_fl.config`` under the name that backends of FlagOS import it by."""

from ..config import get_config_path as get_config_path
from ..config import get_effective_config as get_effective_config
from ..config import get_flagos_blacklist as get_flagos_blacklist
from ..config import get_oot_blacklist as get_oot_blacklist
from ..config import get_per_op_order as get_per_op_order
from ..config import get_platform_name as get_platform_name
from ..config import load_platform_config as load_platform_config
