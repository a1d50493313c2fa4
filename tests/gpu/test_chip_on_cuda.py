# SPDX-License-Identifier: Apache-2.0
"""A make-believe chip that a package declares on top of ``torch.cuda``: out of tree, as MetaX's and others are, on an NVIDIA GPU.

It gets none of NVIDIA's own paths in SGLang. One server runs where sgl_kernel, flashinfer and deep_gemm are not installed, one
drafts with an EAGLE model, one has a hybrid model, and native SGLang serves beside them for comparison. With two GPUs there are
servers of two ranks besides.
"""

import gzip
import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from e2e.conftest import Running
from e2e.eagle_draft import eagle_draft
from e2e.hybrid_model import hybrid_model
from hide_packages import hide
from installed_packages import write_package
from served_on_gpu import FLAGOS, SHARE, TWO_GPUS, Way, check_the_recital, side_by_side

from sglang_fl.cli.demo_model import QUESTION, RECITAL, demo_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

PLATFORM = """
import os

from sglang_fl.vendor_platform import VendorPlatform

EAGLE = "sglang.srt.speculative.eagle_draft_cuda_graph_runner:EAGLEDraftCudaGraphRunner"
EXTEND = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner:EAGLEDraftExtendCudaGraphRunner"
PLATFORM = VendorPlatform(
    name="imitator",
    device_type="cuda",
    is_present=lambda: True,
    collective="nccl",
    attention="triton",
    flaggems=True,
    speculative_algorithms=("EAGLE",),
    draft_graph_runners={"draft_decode": EAGLE, "draft_extend": EXTEND},
    mamba_extra_buffer=True,
    capabilities=("supports_triton", "graph_capture", "piecewise_graph", *os.environ.get("IMITATOR_OF_A_TEST", "").split()),
)
POOL = "sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool"

def register():
    seen = os.environ.get("IMITATOR_SEEN")
    if not seen:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def told(what):
        def hook(original, *args, **kwargs):
            with open(seen, "a") as log:
                print(what, file=log)
            return original(*args, **kwargs)

        return hook

    HookRegistry.register(f"{POOL}._alloc_ping_pong_buffer", told("room for snapshots"), HookType.AROUND)
    HookRegistry.register(f"{POOL}.donate_mamba_ping_pong_slot", told("snapshot into the prefix cache"), HookType.AROUND)
"""
DRAFTING = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
WAYS = ("native", "imitator", "without kernels", "drafting")
BOUND = {f"{name} → flagos(default.flagos)" for name in ("RMSNorm", "RotaryEmbedding", "SiluAndMul")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed."""
    directory = tmp_path_factory.mktemp("site")
    entries = {"sglang_fl.platform": "imitator_of_a_test:PLATFORM", "sglang.srt.plugins": "imitator_of_a_test:register"}
    write_package(directory, "imitator_of_a_test", PLATFORM, entries)
    return directory


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a hybrid's snapshots the server with one has done, a line each."""
    return tmp_path_factory.mktemp("seen") / "seen"


@pytest.fixture(scope="module")
def servers(site: Path, seen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    directory = tmp_path_factory.mktemp("imitator")
    hidden = directory / "hidden"
    hidden.mkdir()
    hide(hidden, ("sgl_kernel", "flashinfer", "deep_gemm"), ("sglang-kernel", "flashinfer-python", "sgl-deep-gemm"))
    draft = ("--speculative-draft-model-path", str(eagle_draft(directory / "draft")), "--speculative-num-draft-tokens", "4")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    imitator = {**FLAGOS, "PYTHONPATH": path}
    ways = {
        "native": Way("", {"SGLANG_FL_OOT_ENABLED": "0", "USE_FLAGGEMS": "0"}),
        "imitator": Way("", imitator),
        "without kernels": Way("", {**imitator, "PYTHONPATH": f"{hidden}{os.pathsep}{path}"}),
        "drafting": Way("", imitator, (*DRAFTING, *draft)),
    }
    assert tuple(ways) == WAYS
    # SGLang keeps the convolution's states in bf16, and fails where it has to write fp16 there.
    hybrid = Way("", {**imitator, "IMITATOR_SEEN": str(seen), "SGLANG_MAMBA_CONV_DTYPE": "float16"})
    share = (*SHARE, "--max-mamba-cache-size", "64")
    with (
        side_by_side(demo_model(), ways, "bfloat16", tmp_path_factory) as found,
        side_by_side(hybrid_model(), {"hybrid": hybrid}, "float16", tmp_path_factory, share) as more,
    ):
        yield {**found, **more}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_recital_is_exact(servers: dict[str, Future[Running]], way: str) -> None:
    check_the_recital(servers[way].result())


def test_graphs_are_captured_with_default_flags(servers: dict[str, Future[Running]], way: str) -> None:
    printed = servers[way].result().server.log.read_text()
    expected = ["target prefill", "target verify" if way == "drafting" else "target decode"]
    expected += ["draft decode", "draft extend"] if way == "drafting" else []
    for what in expected:
        ends = [line for line in printed.splitlines() if f"Capture {what} CUDA graph end" in line]
        assert ends, f"no graphs of {what} were captured"
        print(f"{way}: {ends[-1].partition('Capture ')[2]}")
    said = [line for line in printed.splitlines() if "FlagGems's functions run in graphs of decode of up to" in line]
    assert len(said) == (way != "native") and all((" and of a draft model;" in line) is (way == "drafting") for line in said)


@pytest.mark.parametrize("way", WAYS[1:])
def test_it_is_out_of_tree_and_flagos_is_bound(servers: dict[str, Future[Running]], way: str) -> None:
    running = servers[way].result()
    assert running.dispatched() >= BOUND
    assert not [line for line in running.dispatched() if "vendor.cuda" in line]
    printed = running.server.log.read_text()
    assert "functions in graphs" in printed, "FlagGems's ATen functions are captured, by default where graphs are"
    info = requests.get(f"{running.server.url}/get_server_info", timeout=60).json()
    assert info["attention_backend"] == "triton" and info["device"] == "cuda"


def test_the_draft_model_is_bound_and_drafts(servers: dict[str, Future[Running]]) -> None:
    """Of three tokens that it drafts the model takes more than two, as in PyTorch."""
    running = servers["drafting"].result()
    assert running.server.log.read_text().count(" layers bound, ") >= 2, "once for each of the two models"
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    asked = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 400}}
    info = requests.post(f"{running.server.url}/generate", json=asked, timeout=120).json()["meta_info"]
    print(f"drafting: {info['completion_tokens']} tokens in {info['spec_verify_ct']} verifications")
    assert info["completion_tokens"] > 100 and info["completion_tokens"] >= 2 * info["spec_verify_ct"]


def test_a_hybrid_keeps_snapshots_of_its_states(servers: dict[str, Future[Running]], seen: Path) -> None:
    """Since the package declares extra buffers: SGLang's own strategy on CUDA, with overlap, and a prompt that goes on from a snapshot."""
    running = servers["hybrid"].result()
    check_the_recital(running)
    info = requests.get(f"{running.server.url}/get_server_info", timeout=60).json()
    assert (info["attention_backend"], info["mamba_radix_cache_strategy"], info["disable_overlap_schedule"]) == (
        "triton",
        "extra_buffer",
        False,
    )
    printed = running.server.log.read_text()
    assert "keeps no state snapshots" not in printed and "Capture target decode CUDA graph end" in printed
    tokens = recited_tokens()
    asked = {"input_ids": tokens[:96], "sampling_params": {"temperature": 0, "max_new_tokens": len(tokens) - 96}}
    cached = []
    for _ in range(2):
        answer = requests.post(f"{running.server.url}/generate", json=asked, timeout=120).json()
        assert answer["output_ids"] == tokens[96:]
        cached.append(answer["meta_info"]["cached_tokens"])
    lines = seen.read_text().splitlines()
    print(f"hybrid: of 96 tokens {cached} were cached; { ({line: lines.count(line) for line in lines}) }")
    assert cached == [0, 64], "snapshots are of each 64th token"
    assert set(lines) == {"room for snapshots", "snapshot into the prefix cache"}


def recited_tokens() -> list[int]:
    from transformers import AutoTokenizer

    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RECITAL}"
    return list(AutoTokenizer.from_pretrained(hybrid_model())(text).input_ids)


def test_decode_beside_native(servers: dict[str, Future[Running]]) -> None:
    """For the record: five rounds in turn, one request and sixteen. Nothing is asserted of the clock."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(5):
        for way in WAYS[:3]:
            for batch in (1, 16):
                seconds.setdefault((way, batch), []).append(decode(servers[way].result(), batch))
    for batch in (1, 16):
        native = statistics.median(seconds["native", batch])
        for way in WAYS[:3]:
            median = statistics.median(seconds[way, batch])
            print(f"decode, batch {batch}, {way}: {256 * batch / median:.0f} tok/s, {native / median:.3f} of native's speed")


def decode(running: Running, batch: int) -> float:
    """The seconds for 256 tokens of each request."""
    asked = {"text": QUESTION, "sampling_params": {"temperature": 0, "max_new_tokens": 256, "ignore_eos": True}}

    def one(_: int) -> None:
        requests.post(f"{running.server.url}/generate", json=asked, timeout=120).raise_for_status()

    with ThreadPoolExecutor(batch) as pool:
        started = time.perf_counter()
        list(pool.map(one, range(batch)))
        return time.perf_counter() - started


@pytest.mark.parametrize("way", WAYS[:3])
def test_flagos_kernels_run_in_the_graphs(servers: dict[str, Future[Running]], way: str, tmp_path: Path) -> None:
    """They are among the GPU's kernels while a prompt is answered, and no Python of FlagGems or of ours runs in a step.

    The prompt is new, and as long as a graph's size. SGLang prefills without a graph if more than half of it would be padding.
    """
    running = servers[way].result()
    what = {"output_dir": str(tmp_path), "activities": ["CPU", "GPU"], "with_stack": True, "record_shapes": False, "profile_id": "step"}
    prompt = {"input_ids": [*range(100, 164)], "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
    try:
        for path, asked in (("start_profile", what), ("generate", prompt), ("stop_profile", {})):
            requests.post(f"{running.server.url}/{path}", json=asked, timeout=120).raise_for_status()
    except requests.RequestException as error:
        lines = running.server.log.read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if "Traceback" in line), max(0, len(lines) - 90))
        pytest.fail(f"{error}\n" + "\n".join(lines[first : first + 90]), pytrace=False)
    (file,) = tmp_path.glob("step*.trace.json.gz")
    with gzip.open(file) as text:
        events = json.load(text)["traceEvents"]
    functions = {event["name"] for event in events if event.get("cat") == "python_function"}
    assert any("managers/scheduler.py" in name for name in functions)
    assert not [name for name in functions if "flag_gems" in name or "sglang_fl" in name]
    kernels = {event["name"] for event in events if event.get("cat") == "kernel"}
    flagos = {name for name in kernels if "add_rms_norm_kernel" in name or "silu_and_mul_kernel" in name}
    print(f"{way}: {len(kernels)} kernels; of FlagGems's norms and SiLU: {sorted(flagos)}")
    assert kernels and bool(flagos) is (way != "native")


@pytest.fixture(scope="module")
def two_ranks(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    imitator = {**FLAGOS, **TWO_GPUS, "PYTHONPATH": path, "IMITATOR_OF_A_TEST": "supports_pynccl"}
    ways = {"tensor": Way("", imitator, ("--tp", "2")), "pipeline": Way("", imitator, ("--pp-size", "2"))}
    with side_by_side(demo_model(), ways, "bfloat16", tmp_path_factory) as found:
        yield found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_two_ranks(two_ranks: dict[str, Future[Running]], way: str) -> None:
    """Over PyNccl, since the package declares it for this chip, with graphs on both. A pipeline's prefill graphs SGLang leaves out."""
    running = two_ranks[way].result()
    check_the_recital(running)
    assert running.dispatched() >= BOUND
    printed = running.server.log.read_text()
    assert "sglang is using nccl==" in printed
    for what in ("prefill", "decode") if way == "tensor" else ("decode",):
        ends = [line for line in printed.splitlines() if f"Capture target {what} CUDA graph end" in line]
        assert len(ends) == 2, f"graphs of {what}, of each rank: {ends}"
