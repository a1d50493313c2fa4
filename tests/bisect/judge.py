# SPDX-License-Identifier: Apache-2.0
"""A command for ``sglang-fl bisect --run``: fails where a switch is on, as a server with this environment would have it.

python judge.py SWITCH [EXIT CODE]
"""

import sys

from sglang_fl.config import load_settings
from sglang_fl.dispatch.policy import SelectionPolicy

kind, _, name = sys.argv[1].partition(":")
settings = load_settings()
if kind == "aten":
    on = settings.use_flaggems and settings.flagos_exclusion_reason(name) is None
else:
    on = SelectionPolicy.from_settings(settings).order_for(name)[0] != "sglang"
print(f"{sys.argv[1]} is {'on' if on else 'off'}")
sys.exit(int(sys.argv[2]) if on and len(sys.argv) > 2 else int(on))
