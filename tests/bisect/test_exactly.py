# SPDX-License-Identifier: Apache-2.0
"""Single calls of ATen operators, beside PyTorch's own and float64."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_fl.bisect.exactly import AtenJudge, alike, is_judged
from sglang_fl.bisect.findings import Finding
from sglang_fl.bisect.side_by_side import Observer, _Operator
from sglang_fl.check.exact.judge import Verdict
from sglang_fl.model_run import Replacement

X = torch.linspace(-3, 3, 60).reshape(12, 5)
ROWS = torch.tensor([3, 0, 11, 11])


def judged(key: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Verdict:
    judge = AtenJudge(key)
    native = judge.results(judge.overload, *alike((args, kwargs)))
    ours = judge.results(function, *alike((args, kwargs)))
    return judge.judge(ours, native, judge.exact((args, kwargs)), (args, kwargs))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_roundings_are_right_and_a_wrong_number_is_not(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for key, function, args in (
        ("silu", lambda x: (x.double() * torch.sigmoid(x.double())).to(dtype), (x,)),
        ("mul.Tensor", lambda x, y: (y.float() * x.float()).to(dtype), (x, x + 1)),
        ("mm", lambda x, y: sum(x[:, k : k + 1].float() * y[k].float() for k in (4, 2, 0, 1, 3)).to(dtype), (x, x[:5])),  # type: ignore[attr-defined]
        ("_to_copy", lambda x, dtype: x.clone().to(dtype), (x,)),
    ):
        kwargs: dict[str, Any] = {"dtype": torch.bfloat16} if key == "_to_copy" else {}
        right = judged(key, function, *args, **kwargs)
        assert right.problem is None, (key, right)

        def wrong(*a: Any, _function: Any = function, **k: Any) -> torch.Tensor:
            result = _function(*a, **k)
            result[1, 1] += 2
            return result

        assert "1 of " in str(judged(key, wrong, *args, **kwargs).problem), key


def test_one_wrong_row_of_a_gather_is_found_where_native_has_no_error() -> None:
    assert judged("index.Tensor", lambda x, rows: x.index_select(0, rows[0]), X, [ROWS]).problem is None
    found = judged("index.Tensor", lambda x, rows: x.index_select(0, torch.cat((rows[0][:3], rows[0][:1]))), X, [ROWS])
    assert "5 of 20 are out of bounds" in str(found.problem)


def test_an_index_of_an_equal_number_is_as_good() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0], [5.0, 4.0, 5.0]])
    assert judged("argmax", lambda x, dim: torch.tensor([2, 2]), x, 1).problem is None
    assert "1 of 2 are not PyTorch's" in str(judged("argmax", lambda x, dim: torch.tensor([0, 2]), x, 1).problem)
    assert judged("topk", lambda x, k: (x.topk(k).values, torch.tensor([[2], [2]])), x, 1).problem is None


def test_shapes_dtypes_and_integers_are_compared() -> None:
    assert "is torch.float64 of shape (12, 5), not torch.float32" in str(
        judged("silu", lambda x: torch.ops.aten.silu(x).double(), X).problem
    )
    assert judged("eq.Scalar", lambda x, y: ~(x != y), X, 3.0).problem is None
    assert "(torch.bool): 60 of 60" in str(judged("eq.Scalar", lambda x, y: x != y, X, 3.0).problem)


def test_what_is_written_in_place_is_a_result_and_else_none_may_be_written() -> None:
    assert judged("add_.Tensor", lambda x, y: x.copy_(x + y), X, X).problem is None
    assert judged("add_.Tensor", lambda x, y: x + y, X, X).problem, "it left its argument as it was"
    judge, given = AtenJudge("silu"), ((X,), {})
    copies = alike(given)
    copies[0][0][0, 0] = 7.0
    assert judge.wrote(copies, given) == "self" and judge.wrote(alike(given), given) is None


def test_copies_lie_in_memory_as_they_did() -> None:
    strided, expanded = X[:, 1:4], X[:1].expand(12, 5)
    copies = alike([strided, {"x": expanded, "n": 3}])
    assert copies[0].stride() == strided.stride() and torch.equal(copies[0], strided)
    assert torch.equal(copies[1]["x"], expanded) and copies[1]["n"] == 3


def test_random_and_uninitialised_results_are_not_judged() -> None:
    assert not any(is_judged(key) for key in ("empty_like", "new_empty", "rand_like", "exponential_", "multinomial"))
    assert is_judged("mul.Tensor") and is_judged("sort")


@pytest.mark.parametrize("op", ["topk", "fused_moe"])
def test_an_operator_that_a_call_alone_does_not_explain_is_not_judged(op: str) -> None:
    """What a layer's configuration means is the bridge's to say."""
    operator = _Operator(op, nullcontext)
    assert operator.around(lambda *args: args)(None, X) == (None, X) and operator.called
    assert operator.verdict() == Verdict()


def test_what_cannot_be_archived_ends_nothing(tmp_path: Path) -> None:
    """A FlagGems function that no module has by its name."""
    run: Any = SimpleNamespace(runner=SimpleNamespace(device="cpu"))
    judge, finding = AtenJudge("silu"), Finding(Replacement("silu", "aten", "FlagGems, silu"), "silu", "one", "decode")
    call = judge.recorded(((X,), {}), [X], None)
    Observer(run, tmp_path)._archive(finding, Verdict(problem="wrong"), lambda x: x, lambda: call)
    assert str(finding.archive).startswith("not written: LookupError: ") and not list(tmp_path.iterdir())
