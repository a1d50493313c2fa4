# SPDX-License-Identifier: Apache-2.0
"""SGLang's server, with modules in the place of packages that are not there, before SGLang is imported.

``sglang-fl serve`` runs it as ``python -m sglang_fl.platform.serve``. A process that Python spawns first runs the main module of the
one that spawned it, under the name ``__mp_main__``: so it has those modules, too.
"""

import runpy

from ..device import probe
from .absent_packages import stand_in_for_absent_packages

if __name__ in ("__main__", "__mp_main__"):
    stand_in_for_absent_packages(probe())
if __name__ == "__main__":
    # Not as sys.modules["__main__"], which stays this module.
    runpy.run_module("sglang.launch_server", run_name="__main__")
