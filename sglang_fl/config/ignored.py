# SPDX-License-Identifier: Apache-2.0
"""Variables of FlagOS's other plugins that have no meaning here."""

from collections.abc import Iterator, Mapping

from .options import VARIABLES

#: Each with what does its work here.
IGNORED_VARIABLES = {
    "SGLANG_FL_TIMER_ENABLE": "SGLang's profiler (POST /start_profile) times a running server, and sglang-fl check an operator",
    "SGLANG_FL_LOG_DIR": "SGLANG_FL_DISPATCH_LOG names a file for what ran where; the rest is in the server's own log",
    "SGLANG_FL_STUB_MODULES_EXTRA": "VendorPlatform.stand_ins of a chip's package names the packages that it stands in for",
}


#: What the variables of FlagOS's vLLM plugin begin with. Many have a namesake here.
_OF_VLLM = "VLLM_FL_"


def ignored_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each that is set."""
    for variable, value in environ.items():
        instead = IGNORED_VARIABLES.get(variable)
        if variable.startswith(_OF_VLLM):
            namesake = f"SGLANG_FL_{variable.removeprefix(_OF_VLLM)}"
            instead = f"it is of FlagOS's vLLM plugin; {namesake if namesake in VARIABLES else 'sglang-fl config lists what'} is read here"
        if instead is not None and value:
            yield f"{variable} has no effect in sglang-fl: {instead}"
