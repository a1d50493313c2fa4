# SPDX-License-Identifier: Apache-2.0
"""Runs tiny models through SGLang's own ModelRunner, each in a process of its own that has SGLang imported.

    python -P model_runner.py [--spawn]

Without a GPU it is forked from this one, unless ``--spawn`` is given.

Each line of standard input is a task (:func:`run`) as JSON; the answer is a line on standard output: what a run gave, or its error.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

VOCABULARY, PROMPTS, DECODED = 512, (7, 23), 8
SPAWN, SPARE = "--spawn", "--spare"
#: Processes that import SGLang ahead of their task.
SPARES = min(4, os.cpu_count() or 1)


def weights(model: torch.nn.Module) -> None:
    """Random ones, the same for a name in each run, of a size that makes logits vary by about one."""
    for name, tensor in model.state_dict().items():
        if not torch.is_floating_point(tensor) or "cos_sin" in name or "inv_freq" in name:
            continue
        drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if tensor.dim() > 1 and "embed" not in name and "wte" not in name:
            drawn *= 1.5 / tensor.shape[-1] ** 0.5
        elif tensor.dim() <= 1:
            drawn = 0.1 * drawn if "bias" in name else 1 + 0.3 * drawn
        tensor.copy_(drawn)  # on a device and in another dtype, too


class Model:
    """A model that SGLang has loaded, and what it answers."""

    def __init__(self, directory: Path, arguments: dict[str, Any]):
        from sglang.benchmark import one_batch
        from sglang.srt.model_loader import loader
        from sglang.srt.server_args import PortArgs, ServerArgs

        loader.initialize_dummy_weights = lambda model, *_, **__: weights(model)
        one_batch.get_tokenizer = lambda *_, **__: None
        given = {"load_format": "dummy", "skip_tokenizer_init": True, "max_total_tokens": 4096, "random_seed": 1}
        args = ServerArgs(model_path=str(directory), disable_radix_cache=True, max_running_requests=8, **given, **arguments)
        ports = PortArgs.init_new(args)
        rank = one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0)
        one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
        one_batch._init_process_global_configs()
        self.runner, _ = one_batch.load_model(args, ports, 0, 0)
        self.model: torch.nn.Module = self.runner.torch_runner.model

    def logprobs(self) -> torch.Tensor:
        """[1 + DECODED, prompts, vocabulary], of a prefill and of the steps after it.

        The tokens that are decoded are drawn, so that two runs do not part where two tokens are as probable.
        """
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        requests = []
        for number, length in enumerate(PROMPTS):
            drawn = torch.randint(5, VOCABULARY - 12, (length,), generator=torch.Generator().manual_seed(number)).tolist()
            sampling = SamplingParams(temperature=0, max_new_tokens=2 * DECODED)
            request = Req(rid=str(number), origin_input_text="", origin_input_ids=array("q", drawn), sampling_params=sampling)
            request.full_untruncated_fill_ids = request.origin_input_ids
            request.logprob_start_len, request.extend_end = -1, length
            requests.append(request)
        self.runner.clear()
        tokens, logits, batch = self.runner.extend(requests)
        found = [logits.double().cpu()]
        for step in range(DECODED):
            drawn = torch.randint_like(tokens.cpu(), 5, VOCABULARY - 12, generator=torch.Generator().manual_seed(1000 + step))
            _, logits = self.runner.decode(drawn.to(tokens.device), batch)
            found.append(logits.double().cpu())
        return torch.stack(found).log_softmax(-1)

    def bound(self) -> dict[str, dict[str, int]]:
        """Layer class -> the name of its pinned forward -> how many layers."""
        found: dict[str, Counter[str]] = {}
        for layer in self._layers():
            name = getattr(layer._forward_method, "__name__", "?")
            found.setdefault(type(layer).__name__, Counter())[name] += 1
        return {name: dict(counts) for name, counts in sorted(found.items())}

    def rounded_otherwise(self, seed: int, ulps: int) -> torch.Tensor:
        """The logprobs where each of those layers' results is off by up to ``ulps`` units in the last place."""
        generator = torch.Generator().manual_seed(seed)

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                unit = ulps * torch.finfo(value.dtype).eps / 2
                factor = 1 + unit * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1)
                return (value.double() * factor.to(value.device)).to(value.dtype)
            if isinstance(value, tuple):
                parts = map(moved, value)
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value

        def move(layer: Any) -> Any:
            own = layer._forward_method
            return lambda *args, **kwargs: moved(own(*args, **kwargs))

        owns = [(layer, layer._forward_method) for layer in self._layers()]
        for layer, _ in owns:
            layer._forward_method = move(layer)
        try:
            return self.logprobs()
        finally:
            for layer, own in owns:
                layer._forward_method = own

    def _layers(self) -> Iterator[Any]:
        seen: set[int] = set()
        for module in self.model.modules():
            for layer in (module, getattr(module, "quant_method", None)):
                if getattr(layer, "_forward_method", None) is not None and id(layer) not in seen:
                    seen.add(id(layer))
                    yield layer


def run(task: dict[str, Any]) -> dict[str, Any]:
    """What a task asks for.

    Args:
        task: ``config`` of the model; ``environ``; ``arguments`` of SGLang; ``rounded_otherwise``: how often, and ``ulps``: by how
            much; ``out``: a file for the logprobs.
    """
    os.environ.update(task["environ"])
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        (Path(directory) / "config.json").write_text(json.dumps(task["config"]))
        model = Model(Path(directory), task["arguments"])
        bound, logprobs = model.bound(), model.logprobs()
        others = [model.rounded_otherwise(seed, task["ulps"]) for seed in range(task["rounded_otherwise"])]
        torch.save((logprobs, others), task["out"])
    return {"bound": bound}


def answer_to(line: str) -> str:
    try:
        answer = run(json.loads(line))
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(answer) + "\n"


def ended_with(status: int) -> str:
    return json.dumps({"error": f"the process ended with status {status}"}) + "\n"


def import_sglang() -> None:
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401  (which imports every model, once for all)


def in_forks(answers: TextIO) -> None:
    import_sglang()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            answers.write(answer_to(line))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            answers.write(ended_with(status))


def in_spares(answers: TextIO) -> None:
    """A process that has used CUDA cannot be forked: each task has one of its own, which imported SGLang while others ran."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-P", __file__, SPARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    spares = deque(start() for _ in range(SPARES))
    try:
        for line in sys.stdin:
            spares.append(start())
            spare = spares.popleft()
            answer, _ = spare.communicate(line)
            answers.write(answer or ended_with(spare.returncode))
    finally:
        for spare in spares:
            spare.kill()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    if sys.argv[1:] != [SPARE] and (torch.cuda.is_available() or sys.argv[1:] == [SPAWN]):
        in_spares(answers)
        return
    os.dup2(2, 1)  # what SGLang prints is no answer
    if sys.argv[1:] == [SPARE]:
        import_sglang()
        if line := sys.stdin.readline():
            answers.write(answer_to(line))
    else:
        in_forks(answers)


if __name__ == "__main__":
    main()
