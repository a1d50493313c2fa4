# SPDX-License-Identifier: Apache-2.0
"""Layer 1 of this process: which operators are replaced, and where."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from ..config import Settings
from ..config.settings import PROFILE
from ..device import Device
from ..dispatch.backends.flaggems.library import NOT_INSTALLED, why_not_here
from ..distributed.ranks import Ranks
from .operators import AtenOperators, AtenReport
from .scope import try_in_first_passes, use_in_graphs
from .trials import Trials

logger = logging.getLogger("sglang_fl.aten")

_operators: "AtenOperators | None" = None


def replace_operators(
    settings: Settings,
    device: Device,
    *,
    deterministic: bool = False,
    captures_graphs: bool = False,
    ranks: Ranks | None = None,
    excluded: Mapping[str, str] | None = None,
) -> AtenReport:
    """Switch Layer 1 on in a process that runs a model, if the settings ask for it. With other settings than
    the last time, what was on before is switched off first.

    Args:
        deterministic: the server runs with ``--enable-deterministic-inference``.
        captures_graphs: SGLang will capture graphs of the model; with ``flagos_scope: graphs`` the operators are in force there alone.
        ranks: that run the model together; None: this process alone.
        excluded: name -> why it is left out: what ended an earlier start.

    Raises:
        RuntimeError: another :class:`AtenOperators` is on; under ``strict``, FlagGems or an operator cannot be used, or a
            user asks for FlagGems where it is not installed.
    """
    global _operators
    if settings.flaggems_log_path and not settings.flaggems_record:
        logger.warning("SGLANG_FLAGGEMS_LOG_PATH is set but SGLANG_FLAGGEMS_RECORD is not: nothing will be recorded")
    off = why_off(settings, device, deterministic=deterministic, captures_graphs=captures_graphs)
    if off is not None:
        restore_operators()
        asked = settings.source("flagos_whitelist").precedence > PROFILE or settings.source("use_flaggems").precedence > PROFILE
        if settings.strict and off == NOT_INSTALLED and asked:
            raise RuntimeError(f"sglang-fl: no ATen operator is replaced: {off} (strict is set)")
        return AtenReport(off=off)
    if _operators is not None and _operators.settings != settings:
        restore_operators()
    if _operators is None:
        operators = AtenOperators(settings, Trials(captures_graphs), excluded)
        try:
            _put_in_force(operators, ranks or Ranks(), captures_graphs)
        except Exception as error:
            if settings.strict or AtenOperators._on is not None:
                raise
            message = f"FlagGems could not be switched on: {type(error).__name__}: {error}"
            logger.warning(message, exc_info=True)
            return AtenReport(off=message)
        _operators = operators
    return _operators.report


def restore_operators() -> None:
    """Switch Layer 1 off again in this process."""
    global _operators
    use_in_graphs(None)
    try_in_first_passes(None)
    if _operators is not None:
        _operators.disable()
        _operators = None


def in_force() -> AtenOperators | None:
    """The operators of this process, in force in their scope."""
    return _operators


def _put_in_force(operators: AtenOperators, ranks: Ranks, captures_graphs: bool) -> None:
    """Registering them comes last but for the hooks, so that an error leaves nothing behind."""
    operators.enable()
    try:
        if captures_graphs:
            use_in_graphs(operators, ranks)
        if operators.settings.flagos_scope == "graphs":
            operators.disable()
            operators.report = replace(operators.report, in_graphs=True)
        else:
            try_in_first_passes(operators, ranks)
    except BaseException:
        use_in_graphs(None)
        operators.disable()
        raise


def why_off(settings: Settings, device: Device, *, deterministic: bool = False, captures_graphs: bool = True) -> str | None:
    """Why no ATen operator is to be replaced, or None. FlagGems is not imported to find out.

    Args:
        deterministic: the server runs with ``--enable-deterministic-inference``, and no FlagGems
            function is declared batch-invariant.
        captures_graphs: whether SGLang will capture graphs of the model.
    """
    if not settings.use_flaggems:
        return f"USE_FLAGGEMS=0 ({settings.source('use_flaggems')})"
    if settings.flagos_functions == ():
        key = settings.flagos_key
        if getattr(settings, key):
            return f"{key} names only excluded functions ({settings.source(key)})"
        takes = ", and flagos_blacklist only removes functions; set prefer: flagos to use all others" if settings.flagos_blacklist else ""
        return f"{key} is empty ({settings.source(key)}){takes}"
    if deterministic:
        return "deterministic mode"
    if (reason := why_not_here(device)) is not None:
        return reason
    if settings.flagos_scope == "graphs" and not captures_graphs:
        return f"flagos_scope is graphs ({settings.source('flagos_scope')}), and this server captures none; everywhere works, but slower"
    return None
