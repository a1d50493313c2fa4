# SPDX-License-Identifier: Apache-2.0
"""Matches an operator's signature with that of a function that implements it.

FlagOS's plugins call a vendor's function by keyword. Here an operator is called by position, and a function whose parameters stand in
that order is called as it is. Any other gets an adapter that hands each argument to the parameter of its name.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import Parameter
from typing import Any

from ..utils.suggest import suggest
from .ops import FLBackendBase
from .types import Refusal

Function = Callable[..., Any]

#: Arguments that FlagOS's plugins pass beyond an operator's signature, and their value in every call here.
CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "chunk_gated_delta_rule": {"head_first": False},
    "fused_recurrent_gated_delta_rule": {"ssm_state_indices": None, "num_accepted_tokens": None},
}
#: Arguments that FlagOS's plugins do not pass. A function may lack them; calls that need another value than the default are refused.
OURS: Mapping[str, frozenset[str]] = {
    "chunk_gated_delta_rule": frozenset({"inplace_update"}),
    # For the verification of drafted tokens; a function may support decode only.
    "fused_sigmoid_gating_delta_rule_update": frozenset(
        {"disable_state_update", "intermediate_states_buffer", "intermediate_state_indices", "cache_steps", "retrieve_parent_token"}
    ),
    "causal_conv1d_update": frozenset(
        {
            *("intermediate_conv_window", "intermediate_state_indices"),
            *("retrieve_next_token", "retrieve_next_sibling", "retrieve_parent_token"),
        }
    ),
}

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@cache
def parameters_of(op: str) -> tuple[Parameter, ...] | None:
    """The parameters of an operator; None: an operator that only a package has."""
    method = getattr(FLBackendBase, op, None)
    return None if method is None else tuple(inspect.signature(method).parameters.values())[1:]


def fitted(op: str, function: Function) -> Function:
    """What to call: the function itself, or an adapter to its parameters.

    Raises:
        TypeError: it is no function, a parameter is missing, or there is one that nothing is passed for; it names the parameter.
    """
    if not callable(function):
        raise TypeError(f"fn is {function!r}, and no function; import it, or give LazyFunction(module, name)")
    expected = parameters_of(op)
    if expected is None:
        return function
    found = _readable(function)
    if found is None:
        named = [p.name for p in expected if p.name not in OURS.get(op, ())]
        return _adapter(op, function, expected, [f"{name}={name}" for name in named] + _constants(op), set(named))
    kinds = {parameter.kind for parameter in found}
    takes_any = Parameter.VAR_KEYWORD in kinds
    found = tuple(p for p in found if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD))
    found = _with_layer_first(op, expected, found)
    by_name = {parameter.name: parameter for parameter in found}
    if Parameter.VAR_POSITIONAL in kinds and [*by_name] == [parameter.name for parameter in expected[: len(found)]]:
        return function  # *args: the rest in the operator's order
    _check(op, expected, by_name, takes_any)
    if _is_direct(op, expected, found):
        return function
    constants = CONSTANTS.get(op, {})
    arguments: list[str] = []
    for parameter in found:
        value = repr(constants[parameter.name]) if parameter.name in constants else parameter.name
        if parameter.kind is Parameter.POSITIONAL_ONLY or (parameter is found[0] and parameter.name == "obj"):
            arguments.append(value)
        elif parameter.name in constants or parameter.name in {p.name for p in expected}:
            arguments.append(f"{parameter.name}={value}")
    passed = {parameter.name for parameter in expected if parameter.name in by_name}
    if takes_any:
        rest = [p.name for p in expected if p.name not in passed | OURS.get(op, frozenset())]
        arguments += [f"{name}={name}" for name in rest]
        passed |= set(rest)
    return _adapter(op, function, expected, arguments, passed)


def _readable(function: Function) -> tuple[Parameter, ...] | None:
    """The parameters of a function, or None where they cannot be read: a built-in, or one that takes whatever it is given."""
    try:
        found = tuple(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in found}
    return None if Parameter.VAR_KEYWORD in kinds and kinds <= {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} else found


def _with_layer_first(op: str, expected: tuple[Parameter, ...], found: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The same with a first parameter ``obj``: the layer goes first whatever a function calls it, unless it has an ``obj``."""
    known = {parameter.name for parameter in expected} | set(CONSTANTS.get(op, ()))
    if expected[0].name != "obj" or not found or found[0].kind not in _BY_POSITION or found[0].name in known:
        return found
    if any(parameter.name == "obj" for parameter in found):  # a method of a class, not of an instance
        return found
    return (found[0].replace(name="obj"), *found[1:])


def _check(op: str, expected: tuple[Parameter, ...], by_name: Mapping[str, Parameter], takes_any: bool) -> None:
    names = [parameter.name for parameter in expected]
    unknown = [name for name in by_name if name not in names and name not in CONSTANTS.get(op, {})]
    missing = [name for name in names if name not in by_name and name not in OURS.get(op, ())]
    problems = [] if takes_any else [f"it has no parameter {name!r}{_near(name, unknown)}" for name in missing]
    problems += [f"nothing is passed for its parameter {name!r}" for name in unknown if by_name[name].default is Parameter.empty]
    if problems:
        raise TypeError(f"its parameters do not fit {op}({', '.join(names)}): {'; '.join(problems)}")


def _near(name: str, unknown: Iterable[str]) -> str:
    hint = suggest(name, unknown)
    return hint if "did you mean" in hint else ""


def _is_direct(op: str, expected: tuple[Parameter, ...], found: tuple[Parameter, ...]) -> bool:
    """Whether a call by position or by name, with or without the last arguments, means the same to both."""
    positional = [parameter for parameter in found if parameter.kind in _BY_POSITION]
    by_name = {parameter.name: parameter for parameter in found}
    for index, parameter in enumerate(expected):
        mine = by_name.get(parameter.name)
        if mine is None or not (parameter.default is Parameter.empty or _same(mine.default, parameter.default)):
            return False
        if parameter.kind in _BY_POSITION:
            if index >= len(positional) or positional[index] is not mine:
                return False
            if index and mine.kind is Parameter.POSITIONAL_ONLY:  # callers may name it
                return False
        elif mine.kind is Parameter.POSITIONAL_ONLY:
            return False
    return all(_same(by_name[name].default, value) for name, value in CONSTANTS.get(op, {}).items() if name in by_name)


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and one == other)


def _constants(op: str) -> list[str]:
    return [f"{name}={value!r}" for name, value in CONSTANTS.get(op, {}).items()]


def _adapter(op: str, function: Function, expected: tuple[Parameter, ...], arguments: list[str], passed: set[str]) -> Function:
    """A function of the operator's parameters that calls ``function``: one more Python call, and nothing that is made at each call.

    Its code is of the operators' own names and of those that were found among them.
    """
    parameters: list[str] = []
    for parameter in expected:
        if parameter.kind is Parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(parameter.name if parameter.default is Parameter.empty else f"{parameter.name}={parameter.default!r}")
    call = f"function({', '.join(arguments)})"
    for name in sorted({parameter.name for parameter in expected} - passed):
        default = next(parameter.default for parameter in expected if parameter.name == name)
        call = f"{call} if {name} is {default!r} else refuse({name!r})"

    def refuse(name: str) -> None:
        raise Refusal(f"it has no parameter {name!r}, and this call needs it")

    code = compile(f"lambda {', '.join(parameters)}: {call}", f"<{op}, by keyword>", "eval")
    adapter: Function = eval(code, {"function": function, "refuse": refuse})
    adapter.__name__ = getattr(function, "__name__", op)
    return adapter
