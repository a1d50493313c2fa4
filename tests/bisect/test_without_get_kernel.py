# SPDX-License-Identifier: Apache-2.0
"""A PyTorch without torch.library.get_kernel: operators of layers are judged, FlagGems functions are off and named.

A model of two activations stands in for an engine's: a layer, and ``silu``. FlagGems's ``silu`` is twice what it must be, and SGLang's
own layer calls it, too.
"""

import io
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted_gems
import pytest
import torch
from rich.console import Console

from sglang_fl.aten import Trials
from sglang_fl.aten.operators import AtenOperators
from sglang_fl.bisect.findings import Finding
from sglang_fl.bisect.model import EXIT_CODES, FOUND, NO_DIFFERENCE, UNDECIDED, Job, Report, bisect, bisect_loaded
from sglang_fl.bisect.not_judged import functions_off
from sglang_fl.bisect.page import as_html
from sglang_fl.bisect.passes import rounded_otherwise
from sglang_fl.bisect.report import as_data, print_report
from sglang_fl.bisect.side_by_side import Observer, side_by_side
from sglang_fl.bisect.switches import prior_weights
from sglang_fl.cli import main
from sglang_fl.config import Settings, SettingsError
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.types import BackendImplKind, OpImpl
from sglang_fl.model_run import Batch, Replacement
from sglang_fl.model_run.switches import ATEN, AtenCall, Switches
from sglang_fl.startup import check_settings

WHY = f"PyTorch {torch.__version__} has no torch.library.get_kernel"
INSTEAD = "use sglang-fl bisect --run 'CMD', or a PyTorch that has torch.library.get_kernel"
NVIDIA = Device("nvidia", "cuda", VENDORS["nvidia"].in_tree, "a test")


def activation(obj: Any, x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


def right(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, factor = x.double().chunk(2, -1)
    return torch.asarray(gate / (1 + torch.exp(-gate)) * factor, dtype=x.dtype)


def wrong(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return right(obj, x) + 0.5


class Socket:
    """A model's only layer."""

    op, name, own = "silu_and_mul", "SiluAndMul", staticmethod(activation)
    forward: Callable[..., Any] = staticmethod(activation)

    def install(self, forward: Callable[..., Any] | None) -> None:
        self.forward = forward or activation


class Run:
    """In place of a ModelRun, and of the LoadedModel that calls functions in its process."""

    rank, tokenizer, longest, replayed, model = 0, None, 2000, ("decode",), torch.nn.Identity()
    server_args = SimpleNamespace(tp_size=1)

    def __init__(self, socket: Socket):
        config = SimpleNamespace(dtype=torch.float32, vocab_size=512)
        self.runner = SimpleNamespace(device="cpu", model_config=config, attn_backend=None, max_running_requests=4)
        self.socket, self.switches, self.phase = socket, Switches(), ("", "")

    def call(self, function: Callable[..., Any], *args: Any, limit: float = 0.0) -> list[Any]:
        return [function(self, *args)]

    def logprobs(self, batch: Batch) -> Any:
        self.phase = (batch.name, "prefill")
        x = torch.randn(len(batch.sequences), 8, generator=torch.Generator().manual_seed(len(batch.name)))
        found = torch.nn.functional.silu(self.socket.forward(self.socket, x)).double().numpy()
        self.phase = ("", "")
        return found

    def capture_graphs(self, batches: Collection[Batch]) -> bool:
        """What it runs next counts as a replay."""
        return True

    def drop_graphs(self) -> None:
        """There are none."""


@contextmanager
def model(layer: Callable[..., Any] | None, function: Callable[..., Any]) -> Iterator[Any]:
    """A model in this process, with FlagGems's silu in force, and an implementation of the layer if one is given."""
    socket = Socket()
    impl = OpImpl("silu_and_mul", "vendor.planted", BackendImplKind.VENDOR, layer or right, vendor="planted")

    def forward(socket: Socket, impl: OpImpl, around: Callable[[Any], Any] | None) -> Callable[..., Any]:
        return around(impl.function) if around is not None else impl.function

    binder = SimpleNamespace(bound=lambda: {socket: impl} if layer else {}, refused=dict, forward=forward)
    settings = Settings(flagos_whitelist=("silu",), prefer="flagos")
    with pytest.MonkeyPatch.context() as patch, planted_gems.in_place_of_flaggems(planted_gems.gems(function)):
        operators = AtenOperators(settings, Trials())
        with operators:
            patch.setattr("sglang_fl.model_run.switches.in_force", lambda: operators)
            patch.setattr("sglang_fl.model_run.switches.process_binder", lambda: binder)
            yield Run(socket)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * planted_gems.silu(x)


def bisected(layer: Callable[..., Any] | None, function: Callable[..., Any] = doubled) -> Report:
    with model(layer, function) as run:
        return bisect_loaded(run, Job("a model", Settings()), lambda line: None)


@pytest.fixture
def without_get_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "get_kernel")


def printed(report: Report) -> str:
    text = io.StringIO()
    print_report(report, Console(file=text, width=200, markup=False))
    return text.getvalue()


def test_with_it_a_wrong_function_is_found_and_nothing_is_left_out() -> None:
    report = bisected(right)
    assert (report.verdict, [one.name for one in report.culprits]) == (FOUND, ["silu"]), report.message
    assert report.not_judged == {} and "Not judged" not in printed(report)


@pytest.mark.usefixtures("without_get_kernel")
def test_without_it_no_verdict_on_a_function_is_made_up() -> None:
    report = bisected(right)
    assert (report.verdict, EXIT_CODES[report.verdict], report.culprits) == (UNDECIDED, 4, ()), report.message
    assert report.message.endswith(f"1 FlagGems function cannot be compared with PyTorch's own: {WHY}; it is off. To judge it, {INSTEAD}.")
    assert {finding.replacement.name for finding in report.findings} == {"SiluAndMul"}


@pytest.mark.usefixtures("without_get_kernel")
def test_without_it_sglangs_own_results_are_computed_with_all_functions_off() -> None:
    """FlagGems's function would double what the layer's operator is compared with, and the noise of rounding."""
    report = bisected(right)
    assert planted_gems.calls.get("silu", 0) == 0
    assert not [finding for finding in report.findings if finding.problem or finding.native_is_wrong]
    for effect in (report.noise, report.whole, report.in_graphs):
        assert effect is not None and effect.worst < 1e-5


@pytest.mark.usefixtures("without_get_kernel")
def test_without_it_a_layers_operator_is_found() -> None:
    report = bisected(wrong)
    assert (report.verdict, [one.name for one in report.culprits]) == (FOUND, ["SiluAndMul"]), report.message
    assert "the output changes with only this on, and is right with only this off" in report.message and WHY in report.message


@pytest.mark.usefixtures("without_get_kernel")
def test_without_it_a_model_with_functions_alone_is_not_called_right() -> None:
    report = bisected(None)
    assert report.verdict == UNDECIDED and not report.findings
    assert report.message.startswith("With these settings sglang-fl replaces no operator of a layer in this model. 1 FlagGems function")


@pytest.mark.usefixtures("without_get_kernel")
def test_the_report_the_page_and_json_name_what_was_not_judged() -> None:
    report = bisected(right)
    assert f"Not judged:\n  {WHY}: silu\n" in printed(report)
    assert "all that the settings select, without FlagGems functions" in printed(report)
    assert f"<h2>Not judged</h2><ul><li>{WHY}: silu</li></ul>" in as_html(report)
    assert as_data(report)["not_judged"] == {"silu (FlagGems, silu)": WHY}


@pytest.mark.usefixtures("without_get_kernel")
def test_a_function_that_was_not_judged_is_searched_by_a_command_before_one_that_is_not_called() -> None:
    suspicion = as_data(bisected(right))["suspicion"]
    weights = prior_weights(["aten:silu", "aten:softmax"], suspicion)
    assert weights["aten:silu"] > 5 * weights["aten:softmax"]


@pytest.mark.usefixtures("without_get_kernel")
def test_a_pass_that_needs_both_kernels_refuses() -> None:
    said = f"1 FlagGems function cannot be compared with PyTorch's own: {WHY}: silu"
    with model(right, doubled) as run:
        (function,) = [one for one in run.switches.replacements if one.kind == ATEN]
        for needs_both in (
            lambda: side_by_side(run, [], [function]),
            lambda: rounded_otherwise(run, [], {function: 1.0}, 0),
            lambda: Observer(run).aten(AtenCall(function, "silu", doubled, doubled, None)),
        ):
            with pytest.raises(RuntimeError, match=re.escape(said)):
                needs_both()


def test_an_operator_that_pytorch_has_no_kernel_for_is_named_once_it_is_called() -> None:
    run: Any = SimpleNamespace(rank=0, phase=("one", "decode"))
    observer, function = Observer(run), Replacement(ATEN, "silu", "silu")
    called = observer.aten(AtenCall(function, "silu", doubled, doubled, None))
    assert observer.not_judged == {}
    assert called(torch.zeros(2)).tolist() == [0, 0] and observer.findings == {}
    assert observer.not_judged == {function: "PyTorch has no kernel of its own for aten::silu on this device"}


def test_what_is_on_and_was_not_judged_changes_no_verdict() -> None:
    one = Replacement(ATEN, "silu", "silu")
    report = Report(
        "m", NO_DIFFERENCE, replacements=(one,), findings=[Finding(one, "silu", "one", "decode")], not_judged={one: "no kernel"}
    )
    assert report.off == [] and "Not judged:\n  no kernel: silu\n" in printed(report)


@pytest.mark.usefixtures("without_get_kernel")
@pytest.mark.parametrize("off", [(), (Replacement(ATEN, "mul", "mul.Tensor"),)])
def test_a_model_is_loaded_without_functions_that_cannot_be_judged(
    off: tuple[Replacement, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A function that fails while a layer is tried would look like a failure of the layer's implementation."""
    with model(right, doubled) as run:

        def load(name: str, arguments: Any, environ: dict[str, str]) -> Any:
            assert environ.get("USE_FLAGGEMS") == ("0" if off else None)
            return nullcontext(run)

        monkeypatch.setattr("sglang_fl.bisect.model.LoadedModel", load)
        settings = Settings(trial_record=str(tmp_path / "trials.json"))
        report = bisect(Job("a model", settings, off=off), lambda line: None)
    assert list(report.not_judged) == [*off, Replacement(ATEN, "silu", "silu")] and report.verdict == UNDECIDED


def settings_of(environ: dict[str, str]) -> tuple[Settings, Device, OpManager]:
    manager = OpManager()
    return check_settings(environ, NVIDIA, manager), NVIDIA, manager


LAYERS_TOO = {"SGLANG_FL_PREFER": "flagos"}
FUNCTIONS_ALONE = {"SGLANG_FL_PREFER": "flagos", "SGLANG_FL_OOT_ENABLED": "0", "SGLANG_FL_FLAGOS_WHITELIST": "add,mm"}
LAYERS_ALONE = {"SGLANG_FL_PREFER": "flagos", "USE_FLAGGEMS": "0"}


@pytest.mark.usefixtures("without_get_kernel")
def test_what_settings_leave_to_judge_is_known_before_a_model_is_loaded() -> None:
    off = functions_off(*settings_of(LAYERS_TOO))
    assert len(off) > 100 and "silu (FlagGems, silu)" in map(str, off)
    assert functions_off(*settings_of(LAYERS_ALONE)) == ()
    with pytest.raises(SettingsError) as error:
        functions_off(*settings_of(FUNCTIONS_ALONE))
    assert f"bisect: 2 FlagGems functions cannot be compared with PyTorch's own: {WHY}, and no operator" in str(error.value)
    assert str(error.value).endswith(f"Instead {INSTEAD}")


def test_with_it_nothing_is_refused() -> None:
    assert [functions_off(*settings_of(environ)) for environ in (LAYERS_TOO, FUNCTIONS_ALONE)] == [(), ()]


@pytest.mark.usefixtures("without_get_kernel")
@pytest.mark.parametrize("environ, code, loads", [(FUNCTIONS_ALONE, 2, 0), (LAYERS_TOO, 0, 1)])
def test_the_command_says_so_before_it_loads_a_model(
    environ: dict[str, str], code: int, loads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[str] = []

    def load(job: Job, show: Any) -> Report:
        assert WHY in capsys.readouterr().err, "it was said before"
        assert "silu (FlagGems, silu)" in map(str, job.off)
        loaded.append(job.model)
        return Report(job.model, NO_DIFFERENCE)

    monkeypatch.setattr("sglang_fl.cli.bisect_model.probe", lambda: NVIDIA)
    monkeypatch.setattr("sglang_fl.cli.bisect_model.bisect", load)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["bisect", "m"]) == code and len(loaded) == loads
    if not loads:
        assert f"{WHY}, and no operator of a layer is in force. Instead {INSTEAD}" in capsys.readouterr().err
