# SPDX-License-Identifier: Apache-2.0
"""Variables of FlagOS's other plugins that have no meaning here."""

from collections.abc import Iterator, Mapping

#: Each with what does its work here.
IGNORED_VARIABLES = {
    "SGLANG_FL_TIMER_ENABLE": "SGLang's profiler (POST /start_profile) times a running server, and sglang-fl check an operator",
    "SGLANG_FL_LOG_DIR": "SGLANG_FL_DISPATCH_LOG names a file for what ran where; the rest is in the server's own log",
    "SGLANG_FL_STUB_MODULES_EXTRA": "VendorPlatform.stand_ins of a chip's package names the packages that it stands in for",
}


def ignored_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each that is set."""
    yield from (
        f"{variable} has no effect in sglang-fl: {instead}" for variable, instead in IGNORED_VARIABLES.items() if environ.get(variable)
    )
