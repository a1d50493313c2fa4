# SPDX-License-Identifier: Apache-2.0
"""First calls and captures with functions that fail in each way, registered with PyTorch's dispatcher for the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import planted_gems
import pytest
import torch
from aten_backend import Backend, Group, recording

from sglang_fl.aten import AtenOperators, capture, scope, trials
from sglang_fl.aten.agreement import agree
from sglang_fl.aten.capture import Capture
from sglang_fl.aten.native import native_kernel
from sglang_fl.aten.trials import Trials
from sglang_fl.check.graphs import compiler_of
from sglang_fl.config import Settings
from sglang_fl.distributed.ranks import Ranks
from sglang_fl.trial import Guard, TrialRecord

X = torch.linspace(-3, 3, 12).reshape(3, 4)
EXPECTED = torch.nn.functional.silu(X.double()).flatten().tolist()


@pytest.fixture(autouse=True)
def device_that_captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whose state is a variable."""
    for module in (trials, capture):
        monkeypatch.setattr(module, "is_capturing", lambda: planted_gems.capturing)

    def capture_and_discard(function: Callable[[], Any], device: torch.device) -> None:
        with recording():
            function()

    monkeypatch.setattr(trials, "capture_and_discard", capture_and_discard)
    yield
    scope._capture = None
    if AtenOperators._on is not None:
        AtenOperators._on.disable()


def operators(kind: str = "right", *, graphs: bool = True, **settings: Any) -> AtenOperators:
    return AtenOperators(Settings(**settings), Trials(captures_graphs=graphs))


@contextmanager
def planted(kind: str = "right", **more: Any) -> Iterator[None]:
    with planted_gems.in_place_of_flaggems(planted_gems.gems(planted_gems.KINDS[kind], **more)):
        yield


def silu() -> torch.Tensor:
    result = torch.nn.functional.silu(X)
    close(result)
    return result


def close(result: torch.Tensor) -> None:
    """By Python's numbers, since what is planted is in force."""
    assert [value for row in result.tolist() for value in row] == pytest.approx(EXPECTED, rel=1e-6)


def is_watched(found: AtenOperators) -> bool:
    """Whether a call goes by what came of trials: one that failed is PyTorch's."""
    assert found.trials is not None
    before = planted_gems.calls["silu"]
    found.trials.failures["silu"] = "for a moment"
    silu()
    del found.trials.failures["silu"]
    return planted_gems.calls["silu"] == before


def test_what_passes_serves_and_is_registered_itself_afterwards() -> None:
    with planted(), operators() as _:
        on = AtenOperators._on
        assert on is not None and on.trials is not None
        silu()
        assert planted_gems.calls["silu"] == 3, "a trial, the same in a graph, and the call"
        silu()
        assert planted_gems.calls["silu"] == 4 and on.trials.passed == {"silu"}
        assert agree(on, Ranks()) == len(on.trials.passed) and not on.trials.failures
        assert is_watched(on)
        on.register_passed()
        assert not is_watched(on)


FAILURES = {
    "raises at compile": "failed its trial on aten::silu: TypeError: CompilationError at 12:8: no such type",
    "exits": "failed its trial on aten::silu: RuntimeError: it called sys.exit('no licence')",
    "missing": "failed its trial on aten::silu: AttributeError: module 'triton.language' has no attribute 'silu'",
    "another dtype": "failed its trial on aten::silu: TypeError: its result is torch.float64 of shape (3, 4) on cpu, "
    "not torch.float32 of shape (3, 4) on cpu",
    "synchronises in capture": "failed its trial on aten::silu: StreamCaptureUnsupported: "
    "operation not permitted when stream is capturing: cudaStreamSynchronize",
    "allocates on the host": "failed its trial on aten::silu: StreamCaptureUnsupported: "
    "operation not permitted when stream is capturing: cudaHostAlloc",
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_in_its_trial_gives_way_to_pytorch(
    kind: str, strict: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard(TrialRecord(tmp_path / "trials.json", "")))
    found = operators(strict=strict)
    with planted(kind), found:
        silu()
        silu()
        if strict:
            with pytest.raises(RuntimeError, match=r"sglang-fl: ATen operators: silu .*\(strict is set, so there is no fallback\)"):
                agree(found, Ranks())
            return
        agree(found, Ranks())
        assert ("silu", "silu", FAILURES[kind]) in found.report.left and "silu" not in dict(found.report.replaced)
        assert f"ATen operators: silu {FAILURES[kind]}; using PyTorch's own kernel" in caplog.text
        called = planted_gems.calls["silu"]
        silu()
        assert planted_gems.calls["silu"] == called
    with found:  # also the next time
        silu()
        assert planted_gems.calls["silu"] == called


def test_what_a_function_writes_is_written_once() -> None:
    """A trial runs on copies."""

    def add_(self: torch.Tensor, other: torch.Tensor, *, alpha: Any = 1) -> torch.Tensor:
        return self.copy_(torch.add(self, other, alpha=alpha))

    found = operators()
    with planted(add_=("add_.Tensor", add_)), found:
        x = torch.ones(3)
        x.add_(torch.ones(3), alpha=2)
        assert x.tolist() == [3, 3, 3] and planted_gems.calls["add_"] == 3 and not found.trials.failures  # type: ignore[union-attr]


def test_a_call_that_pytorch_refuses_too_accuses_nobody() -> None:
    found = operators()
    with planted(), found:
        with pytest.raises(RuntimeError, match="size of tensor"):
            torch.ones(3) * torch.ones(4)
        assert found.trials is not None and not found.trials.failures
        assert (torch.ones(3) * torch.ones(3)).tolist() == [1, 1, 1] and planted_gems.calls["mul"] > 0


def test_pytorchs_kernel_that_is_made_of_others_calls_pytorchs_own() -> None:
    """Its native reference is computed with all functions off."""

    def pad(self: torch.Tensor, pad: Any, mode: str = "constant", value: Any = None) -> torch.Tensor:
        raise NotImplementedError

    def constant_pad_nd(self: torch.Tensor, pad: Any, value: Any = 0) -> torch.Tensor:
        raise AssertionError("PyTorch's pad must not reach it")

    found = operators()
    with planted(pad=("pad", pad), constant_pad_nd=("constant_pad_nd", constant_pad_nd)), found:
        assert torch.nn.functional.pad(torch.ones(2), (1, 0)).tolist() == [0, 1, 1]
        assert found.trials is not None and set(found.trials.failures) == {"pad"}


@pytest.mark.parametrize("number", [True, 2, 0.1, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3,), ()])
def test_pytorchs_kernel_with_a_number_for_a_tensor(number: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=dtype)
    kernel = native_kernel("mul.Tensor", "CPU")
    assert kernel is not None
    found, expected = kernel(x, number), x * number
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_the_innermost_is_accused() -> None:
    def softplus(self: torch.Tensor, beta: Any = 1, threshold: Any = 20) -> torch.Tensor:
        return torch.nn.functional.silu(self) * 0 + torch.log(1 + torch.exp(self))

    found = operators()
    with planted("raises at compile", softplus=("softplus", softplus)), found:
        torch.nn.functional.softplus(X)
        assert found.trials is not None and set(found.trials.failures) == {"silu"}


def model(backend: Backend) -> torch.Tensor:
    """Silu in a graph, and between segments."""
    result = torch.nn.functional.silu(X)
    backend.between(lambda: torch.nn.functional.silu(X))
    return result


def captured(found: AtenOperators, backend: Backend, group: Group, shape: int = 1) -> None:
    scope._capture = one = Capture(found, Ranks(group), shape, lambda: model(backend), lambda forward: backend.capture_one(shape, forward))
    one.run()


def test_between_segments_it_is_pytorchs() -> None:
    """What runs there runs at every replay, outside of the scope."""
    found, backend = operators(), Backend(Group())
    with planted():
        found.enable()
        found.disable()
        captured(found, backend, Group())
        before = dict(planted_gems.calls)
        captured(found, backend, Group())
        assert planted_gems.calls["silu"] - before["silu"] == 2 + 2 + 1, "two warm-ups of both, and the graph's alone"
    assert "silu" in dict(found.report.replaced) and AtenOperators._on is None


def fails_at_other_shapes(self: torch.Tensor) -> torch.Tensor:
    """In its trial all is well."""
    if planted_gems.capturing and planted_gems.calls["silu"] > 5:
        raise planted_gems.StreamCaptureUnsupported("operation not permitted when stream is capturing")
    return planted_gems.silu(self)


@pytest.mark.parametrize("strict", [False, True])
def test_what_fails_in_sglangs_capture_is_left_out_and_the_shape_captured_again(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    found, group = operators(strict=strict), Group()
    backend = Backend(group)
    said: list[Any] = []
    found.changed = lambda: said.append(found.report.left)
    with planted_gems.in_place_of_flaggems(planted_gems.gems(fails_at_other_shapes)):
        found.enable()
        found.disable()
        if strict:
            with pytest.raises(RuntimeError, match=r"silu could not be captured on aten::silu.*strict is set"):
                captured(found, backend, group)
            return
        captured(found, backend, group)
    assert backend.attempts == 2 and 1 in backend.graphs
    close(backend.graphs[1])
    assert "silu could not be captured on aten::silu" in caplog.text and "; capturing it again" in caplog.text
    assert AtenOperators._on is None and "silu" not in dict(found.report.replaced)
    assert [[function for _, function, _ in left] for left in said] == [["silu"]], "whoever announced what runs is told, once"


def test_a_capture_that_fails_with_no_culprit_is_pytorchs(caplog: pytest.LogCaptureFixture) -> None:
    found, group = operators(), Group()
    backend = Backend(group)
    calls: list[int] = []

    def forward() -> torch.Tensor:
        before = planted_gems.calls.get("silu", 0)
        result = model(backend)
        calls.append(planted_gems.calls.get("silu", 0) - before)
        if planted_gems.capturing and calls[-1]:
            raise MemoryError("no room")
        return result

    with planted():
        found.enable()
        found.disable()
        Capture(found, Ranks(group), 8, forward, lambda fn: backend.capture_one(8, fn)).run()
    assert calls[-1] == 0 and backend.attempts == 2
    assert "the graph of 8 could not be captured (rank 0: MemoryError: no room), and no FlagGems function failed" in caplog.text
    assert "silu" in dict(found.report.replaced), "nobody was accused"


def test_an_error_of_a_warm_up_is_sglangs() -> None:
    found, backend = operators(), Backend(Group())
    with planted():
        found.enable()
        found.disable()
        with pytest.raises(ZeroDivisionError):
            Capture(found, Ranks(), 1, lambda: 1 / 0, lambda fn: backend.capture_one(1, fn)).run()


def test_a_pytorch_without_get_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Switching works; what fails cannot be called in PyTorch's place in the same call: the error goes up, and the next start knows."""
    monkeypatch.delattr(torch.library, "get_kernel")
    record = TrialRecord(tmp_path / "trials.json", "here")
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard(record))
    found = operators()
    with planted("raises at compile"):
        with found:
            for on in (False, True):
                found.switch("mul", on)
                assert (torch.ones(2) * torch.ones(2)).tolist() == [1, 1]
            with pytest.raises(TypeError, match="CompilationError"):
                torch.nn.functional.silu(X)
            agree(found, Ranks())
            silu()
        assert "silu" not in dict(found.report.replaced)
    why = f"PyTorch {torch.__version__} has no torch.library.get_kernel, so its own kernel cannot take the call"
    assert why in record.excluded()["silu"] and f"{why}. The next start excludes it" in caplog.text
    record.close()


def test_first_passes_end_when_nothing_new_comes() -> None:
    found = operators(graphs=False)
    with planted(), found:
        passes = scope.FirstPasses(found, Ranks())
        silu()
        assert not passes.passed() and not is_watched(found)
        assert [passes.passed() for _ in range(8)] == [False] * 7 + [True]
        with found.watched():
            assert is_watched(found)
        assert not is_watched(found)


@pytest.mark.parametrize("strict", [False, True])
def test_a_native_reference_calls_no_function_that_has_passed(strict: bool) -> None:
    """PyTorch's pad is made of constant_pad_nd."""
    called: list[str] = []

    def constant_pad_nd(self: torch.Tensor, pad: Any, value: Any = 0) -> torch.Tensor:
        called.append("constant_pad_nd")
        return torch.cat([torch.full((pad[0],), float(value)), self])

    def pad(self: torch.Tensor, pad: Any, mode: str = "constant", value: Any = None) -> torch.Tensor:
        called.append("pad")
        return torch.cat([torch.zeros(pad[0]), self])

    found = operators(graphs=False, strict=strict)
    with planted(pad=("pad", pad), constant_pad_nd=("constant_pad_nd", constant_pad_nd)), found:
        x = torch.ones(2)
        torch.constant_pad_nd(x, (1, 0))
        scope.FirstPasses(found, Ranks()).passed()
        assert found._passed == {"constant_pad_nd"}
        called.clear()
        assert torch.nn.functional.pad(x, (1, 0)).tolist() == [0, 1, 1] and set(called) == {"pad"}
        torch.constant_pad_nd(x, (1, 0))
        assert called[-1] == "constant_pad_nd"


def served(function: Callable[..., Any], **settings: Any) -> AtenOperators:
    """On, with a first pass behind them in which ``silu`` was called with three rows."""
    found = operators(graphs=False, **settings)
    with planted_gems.in_place_of_flaggems(planted_gems.gems(function)):
        found.enable()
    silu()
    scope.FirstPasses(found, Ranks()).passed()
    assert not is_watched(found)
    return found


def test_a_later_call_that_fails_goes_to_pytorch_and_so_do_all_after_it(caplog: pytest.LogCaptureFixture) -> None:
    shapes: list[int] = []

    def one_row_fails(x: torch.Tensor) -> torch.Tensor:
        shapes.append(len(x))
        if len(x) == 1:
            raise ValueError("no configuration\nfor one row")
        return planted_gems.silu(x)

    on, announced = served(one_row_fails), list[tuple[str, ...]]()
    on.changed = lambda: announced.append(tuple(key for key, _ in on.report.replaced))
    with on:
        for rows in (3, 1, 3, 1):
            result = torch.nn.functional.silu(X[:rows])
            assert result.flatten().tolist() == pytest.approx(EXPECTED[: rows * 4], abs=1e-6)
        assert shapes[-2:] == [3, 1], "the third and the fourth are PyTorch's"
        assert announced == [("mul.Tensor",)], "the server says that it runs silu no more, once"
        with pytest.raises(NotImplementedError):
            torch.nn.functional.silu(torch.ones(2, dtype=torch.long))
    told = "silu failed in a later call of aten::silu: ValueError: no configuration; using PyTorch's own kernel"
    assert ("silu", "silu", told.removeprefix("silu ").partition(";")[0]) in on.report.left
    assert [record.getMessage() for record in caplog.records].count(f"ATen operators: {told}") == 1
    on.exclude("silu", "the other rank cannot")
    assert [function for _, function, _ in on.report.left].count("silu") == 1, "what had given way is left out once"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), NotImplementedError("no integers")])
def test_an_error_that_pytorch_has_too_goes_up(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def no_integers(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise error
        return planted_gems.silu(x)

    with served(no_integers):
        with pytest.raises(type(error)):
            torch.nn.functional.silu(torch.ones(2, dtype=torch.long))
        silu()
    assert "failed in a later call" not in caplog.text


def test_under_strict_a_later_error_goes_up() -> None:
    def one_row_fails(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("no configuration")
        return planted_gems.silu(x)

    with served(one_row_fails, strict=True), pytest.raises(ValueError, match="no configuration"):
        torch.nn.functional.silu(X[:1])


def test_a_later_call_that_cannot_be_repeated_is_on_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An operator that writes its argument may have written a part of it."""
    record = TrialRecord(tmp_path / "trials.json", "here")
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard(record))

    def one_row_fails(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("no configuration")
        return x.copy_(x.clamp(min=0))

    found = operators(graphs=False)
    with planted(relu_=("relu_", one_row_fails)), found:
        torch.ones(3).relu_()
        scope.FirstPasses(found, Ranks()).passed()
        with pytest.raises(ValueError, match="no configuration"):
            torch.ones(1).relu_()
    assert record.excluded()["relu_"].startswith("failed in a later call of aten::relu_: ValueError: no configuration")
    record.close()


@pytest.mark.parametrize("settings", [{}, {"flagos_blacklist": ("silu",)}])
def test_a_strict_start_stops_if_it_would_use_what_ended_an_earlier_one(settings: dict[str, Any]) -> None:
    found = AtenOperators(Settings(strict=True, **settings), Trials(), excluded={"silu": "its process ended with 'Aborted'"})
    with planted():
        if settings:
            with found:
                assert list(found.functions) == ["mul"]
            return
        with pytest.raises(RuntimeError, match=r"silu ended an earlier start: its process .*strict is set.* 'sglang-fl doctor --forget'"):
            found.enable()


@pytest.mark.parametrize(("raised", "goes_up"), [(KeyboardInterrupt(), KeyboardInterrupt), (ValueError("no room for it"), RuntimeError)])
def test_a_switch_that_fails_leaves_it_off_and_can_be_made_again(raised: BaseException, goes_up: type[BaseException]) -> None:
    def fails(*args: Any) -> None:
        raise raised

    found = operators(graphs=False)
    with planted(), found:
        found.switch("mul", False)
        register, found._registrar.register = found._registrar.register, fails
        with pytest.raises(goes_up):
            found.switch("mul", True)
        found._registrar.register = register
        planted_gems.calls.clear()
        torch.ones(2) * 3
        assert not planted_gems.calls.get("mul")
        found.switch("mul", True)
        torch.ones(2) * 3
        assert planted_gems.calls["mul"]


def test_what_torch_compile_leaves_to_aten_is_flaggems() -> None:
    """The rest is the compiler's own."""

    def mm_out(self: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.bmm(self[None], mat2[None])[0])

    compiled = torch.compile(lambda x, weight: torch.nn.functional.silu(x @ weight), backend=compiler_of(torch.device("cpu")))
    if compiler_of(torch.device("cpu")) != "inductor":
        pytest.skip("needs a C++ compiler")
    x, weight = torch.eye(8), torch.ones(8, 8)
    found = operators(flagos_blacklist=("mul",))
    with planted(mm_out=("mm.out", mm_out)), found, torch.no_grad():
        result = compiled(x, weight)
    assert planted_gems.calls.keys() == {"mm_out"} and found.trials is not None and not found.trials.failures
    torch.testing.assert_close(result, torch.nn.functional.silu(x @ weight))
