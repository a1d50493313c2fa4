# SPDX-License-Identifier: Apache-2.0
"""The device, as a platform of SGLang.

``platform_fl.py``  PlatformFL: the class for the device that is here, and the classes that it is made of
``hooks.py``        what sglang-fl does when SGLang calls its platform; comes first in every PlatformFL
``out_of_tree.py``  the platform of a device that SGLang does not know
``plain_cpu.py``    the same for a CPU without SGLang's CPU engine
``absent_packages.py``  modules in the place of packages that SGLang imports and that are not there; ``absent_triton.py``: of Triton
``serve.py``        SGLang's server behind them
``declared.py``     what comes with a chip that an installed package declares

On a device that SGLang knows, PlatformFL is SGLang's own platform with the hooks before it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .platform_fl import PlatformFL, platform_class

__all__ = ["PlatformFL", "platform_class"]


def __getattr__(name: str) -> Any:
    """SGLang asks for PlatformFL in the middle of its own import, which therefore has to begin first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sglang  # noqa: F401

    from . import platform_fl

    return getattr(platform_fl, name)
