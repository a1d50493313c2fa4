# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, controlled by lines of JSON. ``engine.py`` starts it:

    python -P engine_worker.py FD

It reads the engine's arguments and then commands from its standard input, and answers on the file descriptor
FD, a line for each; standard output and error are left to the engine's log. It ends when its
standard input does. SGLang's processes import it again, so they have what stands in for missing packages, too.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_fl.device import probe
from sglang_fl.platform.absent_packages import stand_in_for_absent_packages

if __name__ in ("__main__", "__mp_main__"):
    stand_in_for_absent_packages(probe())  # before SGLang imports Triton, which may not be there

_PR_SET_PDEATHSIG = 1
_FLUSH_SECONDS = 30


class Worker:
    """The commands, by name. Their return values are the answers."""

    def __init__(self, arguments: dict[str, Any]):
        started = time.perf_counter()
        import sglang

        imported = time.perf_counter()
        if "argv" in arguments:  # as sglang.launch_server takes them
            from sglang.srt.server_args import prepare_server_args

            arguments = {"server_args": prepare_server_args(arguments["argv"])}
        self.engine = sglang.Engine(**arguments)
        self.startup = {"import_sglang": imported - started, "engine": time.perf_counter() - imported}

    def describe(self) -> dict[str, Any]:
        """A description of the engine: phases of its start, memory, and its resolved arguments."""
        info = self.engine.get_server_info()
        kept = (
            "attention_backend",
            "chunked_prefill_size",
            "cuda_graph_config",
            "disable_overlap_schedule",
            "dtype",
            "kv_cache_dtype",
            "load_format",
            "max_prefill_tokens",
            "mem_fraction_static",
            "moe_runner_backend",
            "page_size",
            "sampling_backend",
            "sleep_on_idle",
        )
        return {
            "startup": {**self.startup, **(info.get("startup_time") or {})},
            "memory": (info.get("internal_states") or [{}])[0].get("memory_usage"),
            "max_total_num_tokens": info.get("max_total_num_tokens"),
            "resolved": {name: info[name] for name in kept if name in info},
        }

    def flush(self) -> dict[str, Any]:
        """Clear the prefix cache, so that the next prompt is computed in full."""
        # Engine.flush_cache() refuses while the last batch is still being put away; this waits for it.
        found = self.engine.loop.run_until_complete(self.engine.tokenizer_manager.flush_cache(timeout_s=_FLUSH_SECONDS))
        if not found.success:
            raise RuntimeError(f"the prefix cache was not flushed: {found.message or 'requests are pending'}")
        return {}

    def generate(self, input_ids: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """Seconds of a greedy batch, from the call to the last token, and the number of cached prompt tokens."""
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens}
        started = time.perf_counter()
        outputs = self.engine.generate(input_ids=input_ids, sampling_params=sampling)
        seconds = time.perf_counter() - started
        if len(outputs) != len(input_ids):
            raise RuntimeError(f"{len(outputs)} answers to {len(input_ids)} prompts")
        for output in outputs:
            meta = output["meta_info"]
            if meta["completion_tokens"] != max_new_tokens:
                raise RuntimeError(f"{meta['completion_tokens']} new tokens instead of {max_new_tokens}: {meta.get('finish_reason')}")
        return {"seconds": seconds, "cached_tokens": sum(output["meta_info"].get("cached_tokens") or 0 for output in outputs)}

    def tokens(self, input_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        """The greedy tokens of one prompt, their logprobs, and the two most probable at each position."""
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens}
        (output,) = self.engine.generate(input_ids=[input_ids], sampling_params=sampling, return_logprob=[True], top_logprobs_num=[2])
        meta = output["meta_info"]
        return {
            "tokens": [token for _, token, *_ in meta["output_token_logprobs"]],
            "logprobs": [logprob for logprob, *_ in meta["output_token_logprobs"]],
            "top": [[[token, logprob] for logprob, token, *_ in position] for position in meta["output_top_logprobs"]],
        }

    def profile(self, batches: list[list[list[int]]], max_new_tokens: int, directory: str, python: bool = False) -> dict[str, Any]:
        """A trace of the device for batches, one after another, from before a prefill to after a last token.

        With ``python``: of the Python functions in the scheduler's process instead.

        The engine is idle at both ends, so whole steps are in it. (SGLang's profiler by stage stops and starts inside
        a step, which has a range open; with activity CPU, torch 2.14.1 then writes to what it has freed.)
        """
        self.engine.start_profile(
            output_dir=directory,
            activities=["CPU" if python else _profiler_activity()],
            with_stack=python,
            record_shapes=False,
            profile_id="window",
        )
        try:
            for input_ids in batches:
                self.generate(input_ids, max_new_tokens)
        finally:
            self.engine.stop_profile()
        (trace,) = Path(directory).glob("*.trace.json.gz")
        return {"trace": str(trace)}

    def serve(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Serve a batch of requests with any sampling parameters."""
        self.engine.generate(**arguments)
        return {}

    def tune(self, command: str) -> dict[str, Any]:
        """Run a command of ``live.py`` in the processes of the model. Returns the first rank's answer."""
        with tempfile.TemporaryDirectory(prefix="sglang-fl-tune-") as directory:
            answer = Path(directory) / "answer.json"
            self.engine.collective_rpc("sglang_fl_tune", command=command, answer=str(answer))
            return {"answer": json.loads(answer.read_text(encoding="utf-8"))}

    def stop(self) -> dict[str, Any]:
        self.engine.shutdown()
        return {}


def _profiler_activity() -> str:
    """The name of the device's activity in a profile request of SGLang."""
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree():
        return str(current_platform.get_torch_profiler_activity_str())
    return {"cpu": "CPU", "xpu": "XPU"}.get(str(current_platform.device_type), "GPU")


def main() -> None:
    # End with the parent. SGLang's own processes end with this one in the same way.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_inheritable(int(sys.argv[1]), False)
    replies = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1)

    def answer(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")

    try:
        worker = Worker(json.loads(sys.stdin.readline()))
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(**worker.describe())
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            found = getattr(worker, name)(**command)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer(error=f"{name}: {type(error).__name__}: {error}")
        else:
            answer(**found)
        if name == "stop":
            break


if __name__ == "__main__":
    main()
