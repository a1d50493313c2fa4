# SPDX-License-Identifier: Apache-2.0
"""Which chip this is.

``vendors.py``      the table: one row a vendor, in the order in which chips are looked for
``drivers.py``      what drivers leave on a machine, and what the installed PyTorch is built for
``evidence.py``     :func:`detect` (with torch) and :func:`probe` (without): the one order in which all of it is asked
``declaration.py``  :class:`VendorPlatform`, which a package writes to bring a chip of its own
``kernels.py``      :class:`KernelReplacement`, what it may put in the place of SGLang's own kernels
``installed.py``    the declarations of installed packages, and whether their chips are here

Nothing here imports PyTorch or SGLang when it is imported.
"""

from .declaration import CAPABILITIES, ENTRY_POINT_GROUP, KV_POOL_KINDS, OUT_OF_TREE_ONLY, VendorPlatform, name_problem
from .evidence import Device, detect, has_triton, probe, vendor_problems, why_unusable
from .installed import declared, describe_platforms, known_vendors, platform_here
from .kernels import KernelReplacement, target_problem
from .vendors import ALIASES, VENDORS, Vendor, canonical
