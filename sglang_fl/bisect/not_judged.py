# SPDX-License-Identifier: Apache-2.0
"""FlagGems functions whose calls cannot be judged, since PyTorch's own kernel cannot run beside them.

A PyTorch without ``torch.library.get_kernel`` can only switch them. They stay off in all passes then: whatever runs in place of
PyTorch's own would spoil the results that the layers' operators are compared with, and the measured effect of rounding. A model is
also loaded without them: while layers are tried, a function that fails would look like a failure of the layer's implementation.
"""

from collections.abc import Iterable

from ..config import Settings, SettingsError
from ..device import Device
from ..dispatch.kernel_implementations import is_kernel
from ..dispatch.manager import OpManager
from ..model_run import ModelRun, Replacement
from ..model_run.switches import ATEN
from ..startup.words import flaggems_table, used_functions
from ..utils.dispatcher import why_no_handles
from .switches import OPERATOR, switches_in_force

_INSTEAD = "use sglang-fl bisect --run 'CMD', or a PyTorch that has torch.library.get_kernel"


def functions_off(settings: Settings, device: Device, manager: OpManager) -> tuple[Replacement, ...]:
    """The FlagGems functions that these settings select and that stay off, as far as known before a model is loaded.

    Raises:
        SettingsError: they select nothing else that could be judged.
    """
    if why_no_handles() is None:
        return ()
    functions = {name: [key for key, function in flaggems_table() or () if function == name] for name in used_functions(settings, device)}
    switches = (name.removeprefix(OPERATOR) for name in switches_in_force(settings, device, manager).names if name.startswith(OPERATOR))
    if functions and all(map(is_kernel, switches)):
        raise SettingsError(f"bisect: {_cannot_judge(len(functions))}, and no operator of a layer is in force. Instead {_INSTEAD}")
    return tuple(Replacement(ATEN, name, ", ".join(keys)) for name, keys in functions.items())


def off_in(run: ModelRun, before: Iterable[Replacement]) -> dict[Replacement, str]:
    """The replacements that stay off in this process -> why.

    Args:
        before: those that it was started without.
    """
    why = why_no_handles()
    return {} if why is None else dict.fromkeys([*before, *(one for one in run.switches.replacements if one.kind == ATEN)], why)


def refuse(replacements: Iterable[Replacement]) -> None:
    """Raises RuntimeError if one of them needs PyTorch's own kernel beside it, and this PyTorch cannot keep it callable."""
    functions = [one for one in replacements if one.kind == ATEN]
    if functions and why_no_handles() is not None:
        raise RuntimeError(f"{_cannot_judge(len(functions))}: {', '.join(one.name for one in functions)}")


def said_of(count: int) -> str:
    """What a report says of so many functions that were off."""
    return f"{_cannot_judge(count)}; {'it is' if count == 1 else 'they are'} off. To judge {'it' if count == 1 else 'them'}, {_INSTEAD}."


def _cannot_judge(count: int) -> str:
    functions = "1 FlagGems function" if count == 1 else f"{count} FlagGems functions"
    return f"{functions} cannot be compared with PyTorch's own: {why_no_handles()}"
