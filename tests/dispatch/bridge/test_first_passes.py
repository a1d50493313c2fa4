# SPDX-License-Identifier: Apache-2.0
"""Layers that a model does not call are named, in the log and in the dispatch log, after its first whole passes."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sglang_fl.dispatch import OpManager, SelectionPolicy, policy_context, reset_global_policy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.first_passes import _PASSES
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.logger_manager import open_dispatch_log

from .sglang_layers import HIDDEN, rotary, sglang_class


class Attention(nn.Module):
    def __init__(self, rope: nn.Module):
        super().__init__()
        self.q_norm, self.k_norm = sglang_class("RMSNorm")(HIDDEN), sglang_class("RMSNorm")(HIDDEN)
        self.rope = rope


class Block(nn.Module):
    def __init__(self, rope: nn.Module):
        super().__init__()
        self.norm = sglang_class("RMSNorm")(HIDDEN)
        self.attention = Attention(rope)
        self.act = sglang_class("SiluAndMul")()


class Decoder(nn.Module):
    """Two blocks that share one rotary embedding, as SGLang's models do."""

    def __init__(self) -> None:
        super().__init__()
        rope = rotary("RotaryEmbedding")
        self.layers = nn.ModuleList([Block(rope), Block(rope)])

    def run(self, passes: int, **what: bool) -> None:
        for _ in range(passes):
            self(**what)

    def forward(self, *, qk_norm: bool, act: bool = True, rope_first: bool = False) -> None:
        x, positions = torch.ones(2, HIDDEN), torch.arange(2)
        for block in self.layers:
            if rope_first:
                block.attention.rope(positions, x.clone(), x.clone())
            block.norm(x)
            if qk_norm:
                block.attention.q_norm(x)
                block.attention.k_norm(x)
            block.attention.rope(positions, x.clone(), x.clone())
            if act:
                block.act(torch.ones(2, 2 * HIDDEN))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "dispatch.log"
    open_dispatch_log(str(path))
    yield path
    open_dispatch_log(None)
    reset_global_policy()


def bound(level: int = logging.INFO) -> Decoder:
    set_global_policy(SelectionPolicy("reference"))
    model = Decoder()
    Binder(OpManager()).bind(model, Load(log_level=level))
    return model


ENOUGH = _PASSES + 1


def not_called(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "not called" in line]


@pytest.mark.parametrize("rope_first", [False, True])
def test_layers_that_are_fused_past_are_named_after_the_first_passes(log: Path, caplog: pytest.LogCaptureFixture, rope_first: bool) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    model.run(_PASSES, qk_norm=False, rope_first=rope_first)
    assert not_called(log) == [], "a pass may be one of several parts"
    model.run(3, qk_norm=False, rope_first=rope_first)
    places = "layers.*.attention.k_norm layers.*.attention.q_norm"
    assert not_called(log) == [f"[OOT-DISPATCH] RMSNorm → sglang(not called: {places})"]
    assert caplog.text.count("4 bound RMSNorm layers were never called") == 1 and places in caplog.text


def test_nothing_is_said_where_every_layer_is_called(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bound().run(ENOUGH, qk_norm=True)
    assert not_called(log) == [] and "were never called" not in caplog.text
    assert {line.split(" → ")[1] for line in log.read_text().splitlines()} == {"reference(reference.torch)"}


def test_parts_of_a_pass_that_take_turns(log: Path) -> None:
    """Two-batch overlap calls the first layer for each part before it goes on."""
    model = bound()
    model.layers[0].norm(torch.ones(2, HIDDEN))
    model.layers[0].norm(torch.ones(2, HIDDEN))
    model.run(ENOUGH, qk_norm=True)
    assert not_called(log) == []


def test_each_class_has_its_line_and_a_single_layer_its_number(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    for _ in range(ENOUGH):
        model.layers[0].act(torch.ones(2, 2 * HIDDEN))
        model(qk_norm=False, act=False)
    assert [line.split(" → ")[0] for line in not_called(log)] == ["[OOT-DISPATCH] RMSNorm", "[OOT-DISPATCH] SiluAndMul"]
    assert "1 bound SiluAndMul layer was never called" in caplog.text


def test_a_layer_that_is_called_later_is_taken_back(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    model.run(ENOUGH, qk_norm=False)
    assert "after all" not in caplog.text
    model.run(2, qk_norm=True)
    assert caplog.text.count("a bound RMSNorm layer is called after all") == 1


def test_layers_left_to_sglang_are_not_waited_for(log: Path) -> None:
    set_global_policy(SelectionPolicy("reference", per_op_order=(("silu_and_mul", ("sglang",)),)))
    model = Decoder()
    Binder(OpManager()).bind(model, Load())
    model.run(ENOUGH, qk_norm=True, act=False)
    assert not_called(log) == []


def test_layers_that_a_policy_moves_later_are_waited_for(log: Path) -> None:
    set_global_policy(SelectionPolicy(per_op_order=(("rms_norm", ("sglang",)), ("silu_and_mul", ("reference",)))))
    model = Decoder()
    binder = Binder(OpManager())
    binder.bind(model, Load())
    set_global_policy(SelectionPolicy("reference"))
    model.run(ENOUGH, qk_norm=False)
    assert len(not_called(log)) == 1


def test_a_policy_context_between_two_passes_loses_nothing(log: Path) -> None:
    model = bound()
    model(qk_norm=False)
    with policy_context(SelectionPolicy("reference")):
        model.run(ENOUGH, qk_norm=False)
    assert not_called(log) == [], "what is called in a context says nothing of the policy"
    model.run(_PASSES, qk_norm=False)
    assert len(not_called(log)) == 1


def test_other_ranks_keep_it_to_the_debug_log(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bound(logging.DEBUG).run(ENOUGH, qk_norm=False)
    assert "bound RMSNorm layers" not in caplog.text and len(not_called(log)) == 1


def test_the_forwards_left_in_place_are_the_plain_ones(log: Path) -> None:
    """No call after the first passes pays for the watch."""
    model = bound()
    model.run(ENOUGH, qk_norm=True)
    functions = {block.norm._forward_method.__func__ for block in model.layers}
    assert len(functions) == 1 and next(iter(functions)).__name__ == "forward_reference.torch"
    assert next(iter(functions)).__code__.co_name == "forward"
