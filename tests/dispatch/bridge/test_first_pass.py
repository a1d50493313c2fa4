# SPDX-License-Identifier: Apache-2.0
"""Layers that a model never calls are named, in the log and in the dispatch log, after its first whole pass."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sglang_fl.config import Settings
from sglang_fl.dispatch import OpManager, SelectionPolicy, policy_context, reset_global_policy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
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
    Binder(OpManager(), Settings(), log_level=level).bind(model)
    return model


def never_called(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "never called" in line]


@pytest.mark.parametrize("rope_first", [False, True])
def test_layers_that_are_fused_past_are_named_once_a_second_pass_begins(
    log: Path, caplog: pytest.LogCaptureFixture, rope_first: bool
) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    model(qk_norm=False, rope_first=rope_first)
    assert never_called(log) == [], "the pass may go on"
    for _ in range(3):
        model(qk_norm=False, rope_first=rope_first)
    places = "layers.*.attention.k_norm layers.*.attention.q_norm"
    assert never_called(log) == [f"[OOT-DISPATCH] RMSNorm → sglang(never called: {places})"]
    assert caplog.text.count("past 4 bound RMSNorm layers") == 1 and places in caplog.text


def test_nothing_is_said_where_every_layer_is_called(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    for _ in range(3):
        model(qk_norm=True)
    assert never_called(log) == [] and "past" not in caplog.text
    assert {line.split(" → ")[1] for line in log.read_text().splitlines()} == {"reference(reference.torch)"}


def test_each_class_has_its_line_and_a_single_layer_its_number(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = bound()
    model.layers[0].act(torch.ones(2, 2 * HIDDEN))
    for _ in range(2):
        model(qk_norm=False, act=False)
    assert [line.split(" → ")[0] for line in never_called(log)] == [], "the layer that was called first has not been called again"
    model.layers[0].act(torch.ones(2, 2 * HIDDEN))
    assert [line.split(" → ")[0] for line in never_called(log)] == ["[OOT-DISPATCH] RMSNorm", "[OOT-DISPATCH] SiluAndMul"]
    assert "past 1 bound SiluAndMul layer so" in caplog.text.replace(",", "")


def test_layers_left_to_sglang_are_not_waited_for(log: Path) -> None:
    set_global_policy(SelectionPolicy("reference", per_op_order=(("silu_and_mul", ("sglang",)),)))
    model = Decoder()
    Binder(OpManager(), Settings()).bind(model)
    for _ in range(3):
        model(qk_norm=True, act=False)
    assert never_called(log) == []


def test_calls_in_a_policy_context_are_no_pass(log: Path) -> None:
    model = bound()
    with policy_context(SelectionPolicy("reference")):
        for _ in range(3):
            model(qk_norm=False)
    assert never_called(log) == []
    for _ in range(2):
        model(qk_norm=False)
    assert len(never_called(log)) == 1


def test_other_ranks_keep_it_to_the_debug_log(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = bound(logging.DEBUG)
    for _ in range(2):
        model(qk_norm=False)
    assert "bound RMSNorm layers" not in caplog.text and len(never_called(log)) == 1


def test_the_forwards_left_in_place_are_the_plain_ones(log: Path) -> None:
    """No call after the second pays for the watch."""
    model = bound()
    for _ in range(3):
        model(qk_norm=True)
    functions = {block.norm._forward_method.__func__ for block in model.layers}
    assert len(functions) == 1 and next(iter(functions)).__name__ == "forward_reference.torch"
    assert next(iter(functions)).__code__.co_name == "forward"
