# SPDX-License-Identifier: Apache-2.0
"""How recorded calls are told apart: what is measured is kept under their text."""

import re
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from sglang_fl.tune.layer_calls import LayerRecorder
from sglang_fl.tune.live import tell_apart


class Experts(torch.nn.Module):
    pass


def routed(tokens: int) -> StandardDispatchOutput:
    """What SGLang's dispatcher gives its experts."""
    routes = StandardTopKOutput(torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32), torch.rand(tokens, 4))
    return StandardDispatchOutput(torch.rand(tokens, 8, dtype=torch.bfloat16), None, routes)


def recorded(op: str, *calls: tuple[Any, ...]) -> list[str]:
    recorder = LayerRecorder([])
    socket: Any = SimpleNamespace(op=op, name="Method", trial_key=None, dtype=torch.bfloat16)
    for arguments in calls:
        recorder._count(socket, None, (Experts(), *arguments), arguments, {})
    return [call.describe() for call in recorder.calls.values()]


def test_experts_have_a_call_for_each_number_of_tokens() -> None:
    experts = Experts()
    one, two, many = recorded("fused_moe", (experts, routed(1)), (experts, routed(2)), (experts, routed(2)), (experts, routed(64)))
    assert one == "Experts, (1x8 bfloat16, None, (1x2 float32, 1x2 int32, 1x4 float32), None)"
    assert two.startswith("Experts, (2x8 bfloat16") and many.startswith("Experts, (64x8 bfloat16")


def test_a_part_of_a_wider_tensor_is_another_call() -> None:
    whole, part = recorded("silu_and_mul", (torch.ones(4, 8),), (torch.ones(4, 16)[:, :8],))
    assert (whole, part) == ("4x8 float32", "4x8 float32 strided")


def test_calls_of_the_same_text_are_marked_in_any_order() -> None:
    """An engine that starts later may meet them in another order."""

    def texts(*strides: int) -> dict[int, str]:
        rows = [({"class": "A", "call": "4x8 strided"}, f"({stride}, 1)") for stride in strides]
        tell_apart([*rows, ({"class": "B", "call": "4x8 strided"}, "(16, 1)")], "class")
        return {stride: row["call"] for stride, (row, _) in zip(strides, rows, strict=True)}

    found = texts(16, 32)
    assert found == texts(32, 16) and len(set(found.values())) == 2
    assert all(re.fullmatch("4x8 strided #[0-9a-f]{6}", text) for text in found.values())
    assert texts(16) == {16: "4x8 strided"}
