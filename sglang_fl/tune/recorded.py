# SPDX-License-Identifier: Apache-2.0
"""Recorded calls as cases of ``sglang-fl check``, with the model's sizes, layouts and constants, and new numbers for each seed."""

import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..check.cases import OPERATORS_CHECKED, Call, Case, cases_of
from ..check.cases.call import Draw, Layer, rows_of
from ..check.constants import GRAPH, INPUTS, REPEATS, UNUSUAL
from ..dispatch.signature import parameters_of
from ..utils.graphs import graphs_of
from .layer_calls import TensorSpec, made

#: A call with a larger tensor is held against float64 once, and must repeat; its contract is that of smaller ones.
_MOST_NUMBERS = 1 << 21


class RecordedLayer(Layer):
    """Replaces the model's layer: its constants, and its weights with their numbers shuffled."""

    def __init__(self, state: dict[str, Any], rng: torch.Generator, device: torch.device):
        super().__init__()
        for name, value in state["attributes"].items():
            setattr(self, name, value)
        for name, x in state["parameters"].items():
            shuffled = x.flatten()[torch.randperm(x.numel(), generator=rng)].view(x.shape).to(device)
            setattr(self, name, nn.Parameter(shuffled, requires_grad=False) if x.is_floating_point() else shuffled)


def cases_of_recorded(data: bytes, name: str, device: torch.device) -> Iterator[Case]:
    """The checks of one recorded call: results, inputs, repeatability, and in a graph if the device has graphs."""
    recorded = pickle.loads(data)
    op, dtype = recorded["op"], str(recorded["dtype"]).removeprefix("torch.")
    parameters = parameters_of(op)
    if op not in OPERATORS_CHECKED or parameters is None:
        return
    names = [parameter.name for parameter in parameters]
    takes_layer = recorded["obj"] is not None
    inputs = dict(zip(names[1:] if takes_layer else names, recorded["arguments"], strict=False)) | recorded["named"]
    while inputs and inputs[next(reversed(inputs))] is None:
        inputs.popitem()
    like = _like(op, frozenset(inputs), device)
    if like.meaning:  # which was not recorded
        yield from cases_of_check(op, recorded["dtype"], device)
        return

    def make(draw: Draw) -> Call:
        layer = RecordedLayer(recorded["obj"], draw.rng, draw.device) if takes_layer else Layer()
        drawn = {name: made(value, draw.rng, draw.device) if isinstance(value, TensorSpec) else value for name, value in inputs.items()}
        return Call(layer, drawn, like.may_write & drawn.keys(), {}, tuple(x for x in like.updated if x in drawn), takes_layer)

    if any(math.prod(spec.shape) > _MOST_NUMBERS for spec in inputs.values() if isinstance(spec, TensorSpec)):
        yield from (Case(op, check, name, dtype, make) for check in (UNUSUAL, REPEATS))
        return
    for check in (INPUTS, REPEATS, *((GRAPH,) if OPERATORS_CHECKED[op].captured and graphs_of(device) is not None else ())):
        yield Case(op, check, name, dtype, make, make)


def cases_of_check(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The cases of ``sglang-fl check --quick`` of the same kinds, for a call that could not be saved."""
    yield from (case for case in cases_of(op, frozenset({dtype}), device, quick=True) if case.check in (INPUTS, REPEATS, GRAPH))


def _like(op: str, names: frozenset[str], device: torch.device) -> Call:
    """The call of ``sglang-fl check`` that shares most of these inputs. It says which of them may be written."""
    operator = OPERATORS_CHECKED[op]
    draw = Draw(torch.Generator().manual_seed(0), torch.float32, device)
    tables = (f"tokens=2 {row}" for row in operator.forms.split("|"))
    calls = [operator.form.of(words)(draw) for table in tables for words in rows_of(table)]
    return max(calls, key=lambda call: (len(names & call.inputs.keys()), -len(call.inputs.keys() - names)))
