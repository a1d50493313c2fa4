# SPDX-License-Identifier: Apache-2.0
"""ModelRun: one rank of a loaded model, in its process."""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..device import probe
from ..platform.absent_packages import stand_in_for_absent_packages
from .graphs import DECODE, PREFILL, Graphs
from .switches import Switches

#: The seed of random weights, set again before each batch.
_SEED = "1"
#: The standard deviation of SGLang's random weights, which are uniform in [-0.001, 0.001].
_DUMMY_STD = 1e-3 / 3**0.5


@dataclass(frozen=True)
class Batch:
    """Sequences that run together. All but the last tokens are prefilled. The last are forced, one per decode step.

    Attributes:
        name: for reports.
        sequences: token ids, each more than ``decoded + 1``.
        decoded: the number of decode steps.
    """

    name: str
    sequences: tuple[tuple[int, ...], ...]
    decoded: int


class ModelRun:
    """One rank of a model that SGLang has loaded as in a server, with sglang-fl bound by the settings.

    It runs without graphs until ``capture_graphs``.

    Attributes:
        rank: the rank of this process.
        runner: SGLang's ModelRunner.
        model: its module.
        tokenizer: None with ``--skip-tokenizer-init``.
        server_args: SGLang's, resolved.
        switches: the replacements in the model.
        phase: what is running: the batch's name, and ``prefill`` or ``decode``.
    """

    def __init__(self, rank: int, bench_runner: Any, tokenizer: Any, server_args: Any, graphs: Graphs):
        self.rank, self.tokenizer, self.server_args = rank, tokenizer, server_args
        self._bench, self._graphs = bench_runner, graphs
        self.runner = bench_runner.torch_runner
        self.model: torch.nn.Module = self.runner.model
        self.drop_graphs()  # for a CPU, SGLang has captured them regardless
        self.switches = Switches()
        self.phase: tuple[str, str] = ("", "")

    @classmethod
    def load(cls, model: str, arguments: Sequence[str], rank: int, ranks: int, port: int) -> "ModelRun":
        """Load one rank. All ranks of the model do so at the same time.

        Args:
            arguments: any other argument of an SGLang server.
            port: the ranks' rendezvous.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        stand_in_for_absent_packages(probe())  # before SGLang imports Triton, which may not be there
        from sglang.benchmark import one_batch
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, prepare_server_args

        load_plugins()
        # The user's arguments come last, so they override these.
        args = prepare_server_args(
            ["--model-path", model, "--random-seed", _SEED, "--nccl-port", str(port), "--disable-radix-cache", *arguments]
        )
        if args.model_path != model:
            raise ValueError(f"the model is {model}; leave out --model-path {args.model_path}")
        if args.tp_size != ranks or args.pp_size != 1 or args.nnodes != 1:
            raise ValueError("a model is loaded here with --tp N alone, on one machine, and N stands on the command line, in no --config")
        args.resolve_once()
        one_batch._set_envs_and_config(args)
        gpu = args.base_gpu_id + rank * args.gpu_id_step
        world_rank = one_batch.spawn_world_rank(args, tp_rank=rank, pp_rank=0)
        one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=world_rank, gpu_id=gpu))
        one_batch._init_process_global_configs()
        if args.skip_tokenizer_init:
            one_batch.get_tokenizer = lambda *_, **__: None
        graphs, threads = Graphs(), torch.get_num_threads()
        runner, tokenizer = one_batch.load_model(args, PortArgs.init_new(args), gpu, rank)
        if args.device != "cpu":  # SGLang leaves PyTorch one thread there, and float64 is judged on the CPU
            torch.set_num_threads(max(1, threads // ranks))
        if args.load_format == "dummy":
            _widen(runner.torch_runner.model)
        return cls(rank, runner, tokenizer, args, graphs)

    @property
    def longest(self) -> int:
        """The largest number of tokens in a sequence."""
        return int(min(self.runner.model_config.context_len, self.runner.max_total_num_tokens - 1))

    def reset(self) -> None:
        """Clear the KV cache and the states of linear attention, and reset the random seed."""
        self._bench.clear()
        torch.manual_seed(int(_SEED))

    def forward(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Reset and run a batch. Yields the logits ``[sequences, vocabulary]`` of the prefill and of each decode step.

        Raises:
            ValueError: a sequence is too short for the decode steps, or longer than the model takes, or the batch does not fit into memory.
        """
        too_long = max(len(tokens) for tokens in batch.sequences)
        if too_long > self.longest:
            raise ValueError(f"a sequence of {too_long} tokens is longer than the model takes here, {self.longest}")
        if (needed := sum(map(len, batch.sequences))) > (most := self.runner.max_total_num_tokens):
            raise ValueError(f"{batch.name} has {needed} tokens; the KV cache holds {most}: raise --max-total-tokens")
        if min(len(tokens) for tokens in batch.sequences) < batch.decoded + 2:
            raise ValueError(f"a sequence is too short for {batch.decoded} decode steps")
        self.reset()
        self.phase = (batch.name, PREFILL)
        _, logits, scheduled = self._bench.extend([self._request(number, batch) for number in range(len(batch.sequences))])
        yield logits
        for step in range(batch.decoded):
            self.phase = (batch.name, DECODE)
            tokens = torch.from_numpy(np.array([tokens[step - batch.decoded - 1] for tokens in batch.sequences]))
            _, logits = self._bench.decode(tokens.to(logits.device), scheduled)
            yield logits
        self.phase = ("", "")

    def capture_graphs(self, batches: Sequence[Batch]) -> bool:
        """Capture SGLang's graphs for these batches, with the present replacements. Until they are dropped, ``forward`` replays them.

        Returns:
            whether the server's arguments ask for graphs.
        """
        prefills = {sum(len(tokens) - batch.decoded - 1 for tokens in batch.sequences) for batch in batches}
        return self._graphs.capture(self.runner, {PREFILL: prefills, DECODE: {len(batch.sequences) for batch in batches}})

    @property
    def replayed(self) -> tuple[str, ...]:
        """The phases whose graphs were replayed since the capture: ``prefill``, ``decode``, or both."""
        return tuple(phase for phase in (PREFILL, DECODE) if phase in self._graphs.replayed)

    def drop_graphs(self) -> None:
        """Run without graphs again."""
        self._graphs.drop(self.runner)

    def _request(self, number: int, batch: Batch) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        prompt = array("q", batch.sequences[number][: -batch.decoded - 1])
        sampling = SamplingParams(temperature=0, max_new_tokens=batch.decoded + 2)
        request = Req(rid=str(number), origin_input_text="", origin_input_ids=prompt, sampling_params=sampling)
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len, request.extend_end = -1, len(prompt)
        return request

    def logprobs(self, batch: Batch) -> Any:
        """The log-probabilities of the last ``decoded + 1`` tokens of each sequence, given the tokens before.

        Returns:
            a float64 numpy array ``[decoded + 1, sequences]``. The log-softmax is computed in float64, without replacements.
        """
        wanted = np.array([tokens[-batch.decoded - 1 :] for tokens in batch.sequences])
        rows = []
        for position, logits in enumerate(self.forward(batch)):
            with self.switches.only(()):
                found = logits.detach().float().cpu().numpy().astype(np.float64)
            highest = found.max(-1, keepdims=True)
            total = (highest + np.log(np.exp(found - highest).sum(-1, keepdims=True)))[:, 0]
            rows.append(found[np.arange(len(found)), wanted[:, position]] - total)
        return np.stack(rows)


def _widen(model: torch.nn.Module) -> None:
    """Scale SGLang's random weights to the size of a trained model's. They are so small that all log-probabilities are equal."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() == 1:
            continue  # quantised
        if weight.dim() == 1:
            weight.data.add_(float(name.endswith("weight")))
        else:
            weight.data.mul_(_DUMMY_STD**-1 * weight.shape[-1] ** -0.5)
