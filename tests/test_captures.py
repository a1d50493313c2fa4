# SPDX-License-Identifier: Apache-2.0
"""That the graphs of the installed SGLang are captured where FlagGems's functions are in force, or are listed as those that are not."""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import planted_gems
import pytest
import sglang_source as source
import torch
from aten_backend import Group, recording

from sglang_fl import compat
from sglang_fl.aten import AtenOperators, capture, scope, trials
from sglang_fl.aten.captured import Captured
from sglang_fl.aten.trials import Trials
from sglang_fl.config import Settings
from sglang_fl.distributed.ranks import Ranks

_UTILS = "model_executor.runner_backend.utils"
_SETUP = "model_executor.model_runner_components.cuda_graph_setup"
_RUNNER = "model_executor.model_runner:ModelRunner"
_DECODE = "model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"
_PREFILL = "model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner"
_EAGLE = "speculative.eagle_worker_v2:EagleDraftWorker"
_MTP = "speculative.multi_layer_eagle_draft_extend_cuda_graph_runner"
_WORKER = "managers.tp_worker:TpModelWorker"
RESOLVERS = {target.rpartition(".")[2] for target in scope.RESOLVERS}
#: What a resolver may return, and how it is asked for: (device, backend of the phase).
BACKENDS = {
    "FullCudaGraphBackend": ("cuda", "full"),
    "BreakableCudaGraphBackend": ("cuda", "breakable"),
    "NPUCudaGraphBackend": ("npu", "full"),
    "FullXPUGraphBackend": ("xpu", "full"),
}


class Machine:
    """Stands in for ``torch.cuda`` and its kin, as far as a backend's capture asks them. A graph is when ``planted_gems.capturing``."""

    class Stream:
        def wait_stream(self, other: Any) -> None:
            """SGLang watches it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Of a graph object, too."""

    def capture_begin(self, **kwargs: Any) -> None:
        planted_gems.capturing = True

    def capture_end(self) -> None:
        planted_gems.capturing = False

    def graph(self, *args: Any, **kwargs: Any) -> Any:
        return recording()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class PlatformsOwn:
    """A chip's graph backend. It derives from nothing of SGLang's."""

    def __init__(self, runner: Any, *, enable_memory_saver: bool):
        self._tp_group = Group()

    def capture_one(self, shape_key: Any, forward_fn: Any, capture_inputs: Any = None, post_warmup_hook: Any = None) -> None:
        forward_fn(), forward_fn()
        with recording():
            forward_fn()


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of SGLang's two resolvers, with our hooks in place. They are taken away again, wherever the registry put them."""
    from sglang.srt.model_executor import runner
    from sglang.srt.model_executor.runner_backend import utils
    from sglang.srt.plugins import hook_registry

    own = {name: getattr(utils, name) for name in RESOLVERS}
    assert runner.DecodeCudaGraphRunner, "its module holds a resolver, too"
    monkeypatch.setattr(scope, "_hooked", [])
    for target, function in scope.RESOLVERS.items():
        scope._hook(target, function)
    yield utils
    for name, function in own.items():
        placed = getattr(utils, name)
        setattr(utils, name, function)
        hook_registry._propagate_patch(placed, function, utils)
    hook_registry.HookRegistry.reset()
    scope.use_in_graphs(None)


@pytest.fixture
def machine(hooked: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a graph backend with SGLang's resolvers, on a machine of one of these devices, and captures with it."""
    from sglang.srt.model_executor.runner.shape_key import ShapeKey
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph

    for name in ("full_cuda_graph_backend", "breakable_cuda_graph_backend"):
        module = importlib.import_module(f"sglang.srt.model_executor.runner_backend.{name}")
        monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(tp_group=Group()))
        monkeypatch.setattr(module, "set_graph_pool_id", lambda pool: None)
        monkeypatch.setattr(module, "get_or_create_global_graph_memory_pool", lambda device_module: (0, 0))
    for kind in ("npu.graph_runner.npu_cudagraph_backend", "xpu.graph_runner.xpu_full_graph_backend"):
        module = importlib.import_module(f"sglang.srt.hardware_backend.{kind}")
        monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(tp_group=Group()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Machine)
    monkeypatch.setattr(torch.xpu, "XPUGraph", Machine)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(NPUGraph=Machine, graph=Machine().graph), raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(breakable_cuda_graph, "get_device_module", lambda: Machine())
    for module in (trials, capture):
        monkeypatch.setattr(module, "is_capturing", lambda: planted_gems.capturing)

    def make(device: str, phase: str, backend: str, own: type | None = None) -> Callable[..., Any]:
        config = SimpleNamespace(backend=backend)
        graph = SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=config, prefill=config), debug_cuda_graph=False)
        execution = SimpleNamespace(graph=graph, features=SimpleNamespace(enable_memory_saver=False))
        monkeypatch.setattr(hooked, "get_exec", lambda: execution)
        platform = SimpleNamespace(is_out_of_tree=lambda: own is not None, get_full_graph_backend_cls=lambda: own)
        monkeypatch.setattr(hooked, "current_platform", platform)
        rows = {"cuda_graph_output_capacity_rows": lambda output: None, "cuda_graph_output_rows": lambda output: None}
        model_runner = SimpleNamespace(device=device, is_draft_worker=False)
        runner = SimpleNamespace(model_runner=model_runner, device_module=Machine(), **rows)
        backend_ = getattr(hooked, f"resolve_{phase}_backend")(runner)
        return backend_, lambda forward, size=4: backend_.capture_one(ShapeKey(size), forward)

    return make


@pytest.fixture
def operators() -> Iterator[AtenOperators]:
    """One function of FlagGems's, in force in graphs."""
    with planted_gems.in_place_of_flaggems(planted_gems.gems()):
        found = AtenOperators(Settings(), Trials())
        found.enable()
        found.disable()
        found.report = replace(found.report, in_graphs=True)
        scope._in_graphs, scope._captured = (found, Ranks()), Captured()
        yield found
        scope._in_graphs = None


def forward_of(seen: list[bool]) -> Callable[[], torch.Tensor]:
    """A model that notes whether its call reaches FlagGems's function."""

    def forward() -> torch.Tensor:
        before = planted_gems.calls.get("silu", 0)
        result = torch.nn.functional.silu(torch.ones(4))
        seen.append(planted_gems.calls.get("silu", 0) > before)
        return result

    return forward


def fails() -> torch.Tensor:
    raise ArithmeticError("SGLang's own")


PREFILLS = ("FullCudaGraphBackend", "BreakableCudaGraphBackend")


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("kind", "phase"), [*((kind, "decode") for kind in (*BACKENDS, "PlatformsOwn")), *((kind, "prefill") for kind in PREFILLS)]
)
def test_functions_are_in_force_in_each_capture_of_sglangs_own_backends(kind: str, phase: str, machine: Callable[..., Any]) -> None:
    """Captured twice, since a recapture makes a runner, which asks for a backend of its own."""
    device, backend_of_phase = BACKENDS.get(kind, ("cuda", "full"))
    seen: list[bool] = []
    forward = forward_of(seen)
    for _ in range(2):
        backend, capture_one = machine(device, phase, backend_of_phase, PlatformsOwn if kind == "PlatformsOwn" else None)
        assert type(backend).__name__ == kind
        capture_one(forward)
        assert seen == [True, True, True], "two warm-ups and the capture"
        seen.clear()
        forward()
        with pytest.raises(ArithmeticError):
            capture_one(fails, size=2)
        forward()
        assert seen == [False, False], "between captures, and after one that failed"
        seen.clear()
    scope.use_in_graphs(None)
    capture_one(forward)
    assert seen == [False, False, False]


def captured_line(caplog: pytest.LogCaptureFixture, draft_worker: object = None) -> tuple[str, str]:
    caplog.clear()
    with caplog.at_level("INFO", "sglang_fl"):
        scope._all_captured(None, SimpleNamespace(draft_worker=draft_worker))
    (record,) = caplog.records
    return record.levelname, record.getMessage()


@pytest.mark.usefixtures("operators")
def test_the_log_says_what_was_captured_and_not_what_was_planned(machine: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """A package's own graph runner may ask no resolver, and SGLang drops the prefill graphs of some models."""
    forward = forward_of([])
    level, line = captured_line(caplog)
    assert level == "WARNING" and "SGLang's graph backends have captured nothing, so no FlagGems function is in force" in line
    for size in (8, 16, 4):
        machine("cuda", "decode", "full")[1](forward, size)
    runs, others = "sglang-fl: FlagGems's functions run in graphs of ", "; all other calls run PyTorch's own ATen operators"
    assert captured_line(caplog) == ("INFO", f"{runs}decode of up to 16 requests and of no prefill{others}")
    machine("cuda", "prefill", "breakable")[1](forward, 64)
    both = "decode of up to 16 requests and of prefill of up to 64 tokens"
    assert captured_line(caplog) == ("INFO", f"{runs}{both}{others}")
    assert captured_line(caplog, draft_worker=object()) == ("INFO", f"{runs}{both} and of no draft model{others}")
    backend = PlatformsOwn(None, enable_memory_saver=False)
    draft = scope._covered("decode", SimpleNamespace(model_runner=SimpleNamespace(is_draft_worker=True)), backend)
    draft.capture_one(32, forward)
    assert captured_line(caplog, draft_worker=object()) == ("INFO", f"{runs}{both} and of a draft model{others}")


def test_what_was_captured_is_told_when_the_scheduler_has_captured_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It captures the draft's graphs there too, so that the line comes once in a process."""
    hooks: list[tuple[str, str]] = []
    monkeypatch.setattr(scope, "_hooked", [])
    monkeypatch.setattr(scope, "start_problems", lambda: ())
    monkeypatch.setattr(scope, "hook", lambda target, function, when="around": hooks.append((target, when)) or True)
    scheduler = "sglang.srt.managers.scheduler"
    monkeypatch.delitem(sys.modules, scheduler, raising=False)
    scope._tell_when_captured()
    assert hooks == [], "where no server runs, its scheduler is not imported"
    monkeypatch.setitem(sys.modules, scheduler, ModuleType(scheduler))
    for _ in range(2):
        scope._tell_when_captured()
    assert hooks == [(f"{scheduler}.Scheduler.init_all_cuda_graphs", "after")]
    found = source.function("managers.scheduler:Scheduler.init_all_cuda_graphs")
    assert [argument.arg for argument in found.args.args] == [*compat.START.values()]
    assert [source.text(call.func) for call in source.calls(found, "init_cuda_graphs")] == [
        "self.tp_worker.init_cuda_graphs",
        "self.draft_worker.init_cuda_graphs",
    ]


def test_the_installed_sglang_has_what_the_hooks_rely_on() -> None:
    assert compat.graph_problems() == ()


def test_every_call_of_capture_one_is_one_of_a_resolvers_backend() -> None:
    """In a module that captures, each ``.backend`` comes from a resolver, and nothing else captures."""
    capturing = source.modules_that_call("capture_one")
    assert len(capturing) >= 6
    for module in capturing:
        tree = source.tree(module)
        for call in source.calls(tree, "capture_one"):
            assert source.text(call.func).endswith(".backend.capture_one"), f"{module} captures by {source.text(call.func)}"
        made = [source.text(value) for value in source.assigned(tree, "backend")]
        assert made, f"{module} captures with a backend that it does not make"
        for value in made:
            assert value.partition("(")[0] in RESOLVERS, f"{module} takes its graph backend from {value}"


def test_every_backend_that_a_resolver_may_return_is_captured_in_a_test_below() -> None:
    returned = {resolver: source.returned_classes(source.function(f"{_UTILS}:{resolver}")) for resolver in RESOLVERS}
    captured = {"resolve_decode_backend": {*BACKENDS, "get_full_graph_backend_cls()"}, "resolve_prefill_backend": {*PREFILLS}}
    for resolver, classes in captured.items():
        assert returned[resolver] == classes, f"{resolver}: {sorted(returned[resolver] ^ classes)}"
    assert returned.keys() == captured.keys()


def test_no_backend_is_made_without_a_resolver() -> None:
    classes = source.subclasses("BaseCudaGraphBackend")
    assert set(BACKENDS) <= classes
    made = {name: source.modules_that_call(name) for name in classes}
    assert {module for modules in made.values() for module in modules} == {_UTILS}, made
    assert made["TcPiecewiseCudaGraphBackend"] == [], "its capture_one is covered if a resolver returns it"


def test_the_hook_reaches_each_module_that_asks_a_resolver(hooked: ModuleType) -> None:
    """They hold the function under a name of their own, which the registry follows."""
    found = [(module, name) for name in RESOLVERS for module in source.modules_that_call(name)]
    loaded = [(sys.modules[f"sglang.srt.{module}"], name) for module, name in found if f"sglang.srt.{module}" in sys.modules]
    assert {module.__name__.rpartition(".")[2] for module, _ in loaded} >= {"decode_cuda_graph_runner", "prefill_cuda_graph_runner"}
    for module, name in loaded:
        assert vars(module)[name] is getattr(hooked, name), f"{module.__name__} asks {name} past the hook"
    for module, name in found:
        assert f"sglang.srt.{_UTILS}" in source.imported_from(module, name), f"{module} has {name} from elsewhere"


#: How graphs of the model itself end in capture_one.
_DECODES = (
    f"{_SETUP}:capture_decode_graph",
    f"{_RUNNER}._decode_cuda_graph_runner_cls",
    *(f"{_DECODE}.{name}" for name in ("__init__", "capture", "_capture", "_capture_one_stream", "capture_one_shape")),
)
_PREFILLS = (
    f"{_SETUP}:capture_prefill_graph",
    *(f"{_PREFILL}.{name}" for name in ("__init__", "capture", "_capture", "_capture_one_stream", "capture_one_shape")),
)
_STARTS = ("managers.scheduler:Scheduler.init_all_cuda_graphs", f"{_WORKER}.init_cuda_graphs", f"{_RUNNER}.init_cuda_graphs")
_STARTS_CAPTURE = (*_STARTS, f"{_SETUP}:capture_cuda_graphs")


def _draft(runner: str) -> tuple[str, ...]:
    """A draft's runner, which inherits the loop over sizes."""
    return (
        f"{runner}.__init__",
        f"{_DECODE}.capture",
        f"{_DECODE}._capture",
        f"{_DECODE}._capture_one_stream",
        f"{runner}.capture_one_shape",
    )


_MTP_STEP = f"{_MTP}:MultiLayerEagleDraftExtendCudaGraphRunner"
_MTP_STEPS = f"{_MTP}:MultiLayerEagleMultiStepDraftExtendCudaGraphRunner"
_MTP_AT_ONCE = f"{_MTP}:OneGraphMultiLayerEagleMultiStepDraftExtendCudaGraphRunner"
_MTP_WORKER = "speculative.multi_layer_eagle_worker_v2:MultiLayerEagleDraftWorker._capture_cuda_graphs"

#: What captures graphs, at the start or later -> the functions of SGLang on the way, each of which names the next. ``a as b``: as b.
PATHS: dict[str, tuple[str, ...]] = {
    "the start, decode": (*_STARTS_CAPTURE, *_DECODES),
    "the start, prefill": (*_STARTS_CAPTURE, *_PREFILLS),
    "a weight update": (
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_disk",
        "model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_disk",
        f"{_RUNNER}.init_weight_updater as recapture_cuda_graph",
        f"{_RUNNER}.recapture_decode_cuda_graph",
        f"{_RUNNER}.init_decode_cuda_graph",
        *_DECODES,
    ),
    "a role switch": (
        "disaggregation.role_switch:handle_pd_role_switch",
        f"{_WORKER}.ensure_decode_cuda_graphs",
        f"{_RUNNER}.ensure_decode_cuda_graphs",
        f"{_RUNNER}.init_decode_cuda_graph",
        *_DECODES,
    ),
    "elastic experts, the ranks that were there": (
        f"{_RUNNER}._finalize_scale_up",
        f"{_RUNNER}._recapture_elastic_cuda_graphs",
        f"{_SETUP}:recapture_elastic_cuda_graph",
        *_DECODES,
    ),
    "elastic experts, a rank that joins": (
        *_STARTS,
        f"{_RUNNER}._recapture_elastic_cuda_graphs",
        f"{_SETUP}:recapture_elastic_cuda_graph",
        *_DECODES,
    ),
    "adaptive speculation, the model": (
        "speculative.eagle_worker_v2:EAGLEWorkerV2.init_cuda_graphs",
        "speculative.adaptive_runtime_state:AdaptiveController.init_states",
        "speculative.eagle_worker_v2:EAGLEWorkerV2.build_adaptive_runtime_state",
        *_DECODES[2:],
    ),
    "adaptive speculation, the draft": (
        "speculative.eagle_worker_v2:EAGLEWorkerV2.build_adaptive_runtime_state",
        f"{_EAGLE}._capture_cuda_graphs",
        *_draft("speculative.eagle_draft_cuda_graph_runner:EAGLEDraftCudaGraphRunner"),
    ),
    "EAGLE, draft decode": (
        f"{_EAGLE}.init_cuda_graphs",
        f"{_EAGLE}._capture_cuda_graphs",
        *_draft("speculative.eagle_draft_cuda_graph_runner:EAGLEDraftCudaGraphRunner"),
    ),
    "EAGLE, draft extend": (
        f"{_EAGLE}.init_cuda_graphs",
        f"{_EAGLE}._capture_cuda_graphs",
        *_draft("speculative.eagle_draft_extend_cuda_graph_runner:EAGLEDraftExtendCudaGraphRunner"),
    ),
    "EAGLE, draft prefill": (f"{_EAGLE}.init_cuda_graphs", f"{_RUNNER}.init_prefill_cuda_graph", *_PREFILLS),
    "MTP of several layers, a graph each": (
        _MTP_WORKER,
        f"{_MTP_STEPS}.__init__",
        f"{_MTP_STEPS}._init_and_capture",
        f"{_MTP_STEP}.init_buffers_and_capture",
        *_draft(_MTP_STEP)[1:],
    ),
    "MTP of several layers, in one graph": (
        _MTP_WORKER,
        f"{_MTP_AT_ONCE}._init_and_capture as OneGraphMultiLayerEagleMultiStepDraftExtendCudaGraphRunner",
        f"{_MTP_AT_ONCE}._capture_one_graph",
    ),
    "MTP with frozen KV": (
        "speculative.frozen_kv_mtp_worker_v2:FrozenKVMTPDraftWorker.init_cuda_graphs",
        "speculative.frozen_kv_mtp_worker_v2:FrozenKVMTPDraftWorker._capture_cuda_graphs",
        *_draft("speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPCudaGraphRunner"),
    ),
    "UNO's tree": (
        "speculative.uno_worker_v2:UnoWorkerV2.init_cuda_graphs",
        "speculative.uno_cuda_graph_runner:UnoDecodeCudaGraphRunner.__init__",
        f"{_DECODE}.__init__ as super",
        *_DECODES[3:],
    ),
    "a draft of DFlash": ("speculative.dflash_worker_v2:DFlashWorkerV2.init_cuda_graphs", *_STARTS_CAPTURE[1:], *_DECODES),
    "a draft of DSpark": (
        "speculative.dspark_components.dspark_worker_v2:DSparkWorkerV2.init_cuda_graphs",
        *_STARTS_CAPTURE[1:],
        *_DECODES,
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_each_path_to_a_graph_ends_in_capture_one(path: str) -> None:
    steps = [step.partition(" as ")[::2] for step in PATHS[path]]
    for (step, _), (following, alias) in itertools.pairwise(steps):
        qualified = following.partition(":")[2].removesuffix(".__init__")
        name = alias or qualified.rpartition(".")[2]
        assert source.mentions(source.function(step), name), f"{step} no longer leads to {following}"
    assert source.captures(source.function(steps[-1][0])), f"{steps[-1][0]} captures in another way"


def test_no_runner_leaves_the_way_to_capture_one() -> None:
    """Runners of chips and drafts override parts of it, and end there or in what they inherit."""
    runners = source.subclasses("BaseCudaGraphRunner")
    assert {"NPUGraphRunner", "XPUGraphRunner", "EAGLEDraftNpuGraphRunner", "UnoDecodeCudaGraphRunner"} <= runners
    for name in runners - {"DecodeCudaGraphRunner", "PrefillCudaGraphRunner"}:
        for method in source.methods(name, "capture", "_capture", "_capture_one_stream", "capture_one_shape"):
            on = source.captures(method) or f"super().{method.name}(" in source.text(method)
            assert on, f"{name}.{method.name} captures in another way"


#: SGLang's modules that make graphs inside of capture_one.
INSIDE = {
    "hardware_backend.npu.graph_runner.npu_cudagraph_backend",
    "hardware_backend.xpu.graph_runner.xpu_full_graph_backend",
    "model_executor.runner_backend.breakable_cuda_graph_backend",
    "model_executor.runner_backend.cuda_graph_dedup_mixin",
    "model_executor.runner_backend.full_cuda_graph_backend",
    "model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph",
    "models.nemotron_h",  # of shared experts, at a break of a prefill graph's capture
}
#: Those that make graphs elsewhere -> the word for it in docs/how-it-works.md; None: nothing of this SGLang reaches it.
ELSEWHERE = {
    "model_executor.runner.row_bucket_graph_runner": "DeepSeek-V4's replay tail",
    "model_executor.runner.metadata_glue_graph": "metadata graphs",
    "multimodal.vit_cuda_graph_runner": "Qwen3-VL",
    "hardware_backend.npu.graph_runner.vit_npu_graph_runner": "Qwen3-VL",
    "multimodal.internvl_vit_cuda_graph_runner": "InternVL",
    "multimodal.kimi_k3_vit_cuda_graph_runner": "Kimi K3",
    "speculative.dspark_components.dspark_sampling_accept_graph": "DSpark's sampling",
    "distributed.device_communicators.pymscclpp": "MSCCL++",
    "hardware_backend.npu.graph_runner.npu_graph_runner": None,  # _create_device_graph is called by nobody
    "compilation.cuda_piecewise_backend": None,  # of TcPiecewiseCudaGraphBackend, which no resolver returns
    "compilation.npu_piecewise_backend": None,
    "compilation.xpu_piecewise_backend": None,
}


def test_every_module_that_makes_graphs_is_covered_or_listed() -> None:
    found = source.modules_that_call("CUDAGraph", "NPUGraph", "XPUGraph", "BreakableCUDAGraph", "capture_begin", "make_graphed_callables")
    new = set(found) ^ (INSIDE | set(ELSEWHERE))
    assert not new, f"new or gone: {sorted(new)}"
    assert not INSIDE & set(ELSEWHERE)
    assert source.modules_that_call("_create_device_graph") == []
    page = (Path(__file__).parents[1] / "docs/how-it-works.md").read_text(encoding="utf-8")
    section = page.partition("## Where FlagGems's functions are in force")[2].partition("## ")[0]
    for word in filter(None, ELSEWHERE.values()):
        assert word in section, f"list {word}"
