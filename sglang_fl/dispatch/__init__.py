# SPDX-License-Identifier: Apache-2.0
"""Layer 2: one name per operator, several implementations, a policy that picks.

    from sglang_fl.dispatch import call_op, policy_context, SelectionPolicy

    y = call_op("rms_norm", layer, x)
    with policy_context(SelectionPolicy(prefer="reference")):
        y = call_op("rms_norm", layer, x)

This package, without ``bridge`` and ``backends``, is plain Python: it imports neither SGLang nor
FlagGems nor a vendor's package.
"""

from .builtin_ops import register_builtins as register_builtins
from .logger_manager import get_logger as get_logger
from .logger_manager import set_log_level as set_log_level
from .manager import OpManager as OpManager
from .manager import Plan as Plan
from .manager import call_op as call_op
from .manager import get_default_manager as get_default_manager
from .manager import reset_default_manager as reset_default_manager
from .manager import resolve_op as resolve_op
from .ops import OPERATORS as OPERATORS
from .ops import FLBackendBase as FLBackendBase
from .policy import PREFER_DEFAULT as PREFER_DEFAULT
from .policy import PREFER_REFERENCE as PREFER_REFERENCE
from .policy import PREFER_VENDOR as PREFER_VENDOR
from .policy import PolicyManager as PolicyManager
from .policy import SelectionPolicy as SelectionPolicy
from .policy import get_policy as get_policy
from .policy import policy_context as policy_context
from .policy import policy_from_config as policy_from_config
from .policy import reset_global_policy as reset_global_policy
from .policy import set_global_policy as set_global_policy
from .policy import with_allowed_vendors as with_allowed_vendors
from .policy import with_denied_vendors as with_denied_vendors
from .policy import with_preference as with_preference
from .policy import with_strict_mode as with_strict_mode
from .registry import OpRegistry as OpRegistry
from .registry import OpRegistrySnapshot as OpRegistrySnapshot
from .types import SGLANG as SGLANG
from .types import BackendImplKind as BackendImplKind
from .types import BackendPriority as BackendPriority
from .types import OpImpl as OpImpl
from .types import Refusal as Refusal
from .types import match_token as match_token
