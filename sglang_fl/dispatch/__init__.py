# SPDX-License-Identifier: Apache-2.0
"""Layer 2: one name per operator, several implementations, a policy that picks.

    from sglang_fl.dispatch import call_op, policy_context, SelectionPolicy

    y = call_op("rms_norm", layer, x)
    with policy_context(SelectionPolicy(prefer="reference")):
        y = call_op("rms_norm", layer, x)

This package, without ``bridge`` and ``backends``, is plain Python: it imports neither SGLang nor
FlagGems nor a vendor's package.
"""

from .builtin_ops import register_builtins
from .logger_manager import get_logger, set_log_level
from .manager import OpManager, Plan, call_op, get_default_manager, reset_default_manager, resolve_op
from .ops import OPERATORS, FLBackendBase
from .policy import (
    PREFER_DEFAULT,
    PREFER_REFERENCE,
    PREFER_VENDOR,
    PolicyManager,
    SelectionPolicy,
    get_policy,
    policy_context,
    policy_from_config,
    reset_global_policy,
    set_global_policy,
    with_allowed_vendors,
    with_denied_vendors,
    with_preference,
    with_strict_mode,
)
from .registry import OpRegistry, OpRegistrySnapshot
from .types import SGLANG, BackendImplKind, BackendPriority, LazyFunction, OpImpl, Refusal, match_token
