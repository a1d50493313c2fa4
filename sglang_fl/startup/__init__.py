# SPDX-License-Identifier: Apache-2.0
"""The settings of a server, read and checked whole before it starts, and put in force in its processes."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from ..config import Settings, SettingsError, Words, hand_down, ignored_variables, load_settings, plugin_modules, settings_of_parent
from ..device import Device, declared, vendor_problems
from ..dispatch.logger_manager import open_dispatch_log, why_unwritable
from ..dispatch.manager import OpManager, get_default_manager
from ..dispatch.policy import PolicyManager
from ..distributed.device_communicators.flagcx_files import FlagCXError, find_library
from ..kernels.places import problem_with, problem_with_function
from .words import settings_words

logger = logging.getLogger("sglang_fl")
_current: Settings | None = None


def check_settings(environ: Mapping[str, str], device: Device, manager: OpManager) -> Settings:
    """Read the settings and check all of them, names and what installed packages bring included.

    Raises:
        SettingsError: with every problem that was found.
    """
    modules = plugin_modules(environ)
    discovery = manager.discover(modules)
    problems = [
        f"SGLANG_FL_PLUGIN_MODULES: {failure.module} cannot be used: {failure.reason}" for failure in discovery.failed if failure.module
    ]
    return _check(environ, device, settings_words(manager, modules), [*problems, *discovery.conflicts])


def check_names(environ: Mapping[str, str], device: Device, manager: OpManager) -> Settings:
    """As :func:`check_settings`, but packages are imported only if the settings are not valid with our own names."""
    if not plugin_modules(environ):
        try:
            return _check(environ, device, settings_words(None))
        except SettingsError:
            pass  # a name may be a package's
    return check_settings(environ, device, manager)


def _check(environ: Mapping[str, str], device: Device, words: Words, problems: Sequence[str] = ()) -> Settings:
    problems = [*problems, *vendor_problems(environ, device), *_kernel_problems(device)]
    try:
        settings = load_settings(environ, device=device, words=words)
    except SettingsError as error:
        raise SettingsError([*error.problems, *problems]) from None
    problems += _file_problems(settings, environ)
    if problems:
        raise SettingsError(problems)
    return settings


def _kernel_problems(device: Device) -> Iterator[str]:
    """What is wrong with the names of SGLang's kernels, and of their functions, that the chip's package declares. Imports nothing."""
    platforms, origins, *_ = declared()
    if device.vendor in platforms and find_spec("sglang") is not None:
        for target, given in platforms[device.vendor].kernels().items():
            if problem := problem_with(target, given.takes_grid) or problem_with_function(given.function):
                origin = origins[device.vendor]
                yield f"the platform {device.vendor} that {origin} declares cannot be used: sglang_kernels: {problem}"


def _file_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    for variable, path in (("SGLANG_FL_DISPATCH_LOG", settings.dispatch_log), ("SGLANG_FLAGGEMS_LOG_PATH", settings.flaggems_log_path)):
        if problem := why_unwritable(path):
            yield f"{variable}: {problem}"
    if settings.collective == "flagcx":
        try:
            find_library(settings.flagcx_path, environ)
        except FlagCXError as error:
            yield f"{settings.source('flagcx_path' if settings.flagcx_path else 'dist_backend')}: {error}"


def resolve(device: Device) -> Settings:
    """Read, check and put in force the settings of a server that starts in this process.

    Raises:
        SettingsError: with every problem that was found.
    """
    settings = check_settings(os.environ, device, get_default_manager())
    for message in ignored_variables(os.environ):
        logger.warning("sglang-fl: %s", message)
    apply(settings, device)
    hand_down(settings, os.environ)
    return settings


def settings_in_worker(device: Device) -> Settings:
    """The settings in a process that runs the model; put in force there on the first call."""
    if _current is None:
        inherited = settings_of_parent()
        if inherited is None:
            return resolve(device)
        get_default_manager().ensure_initialized(inherited.plugin_modules or ())
        apply(inherited, device)
        return inherited
    return _current


def apply(settings: Settings, device: Device) -> None:
    """Put settings in force in this process, all of them or none.

    Raises:
        RuntimeError: under ``strict``, a bound layer cannot follow them.
    """
    global _current
    manager = get_default_manager()
    before = manager.given
    manager.use(settings, device)
    try:
        PolicyManager.get_instance().use_settings(settings)
    except BaseException:
        manager.restore(before)
        raise
    _current = settings
    logging.getLogger("sglang_fl").setLevel("DEBUG" if settings.dispatch_debug else settings.log_level)
    open_dispatch_log(settings.dispatch_log)
