# SPDX-License-Identifier: Apache-2.0
"""ProcessGroupFlagCX: the ``torch.distributed`` backend ``flagcx``."""

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Backend, Work, _create_work_from_future

from .communicator import CommunicatorFL, check_same_size, current_device


class ProcessGroupFlagCX(Backend):
    """A group of ranks of torch.distributed, over a FlagCX communicator.

    In a ``torch.distributed.ProcessGroup`` it takes the place of ProcessGroupNCCL for its device type; torch.distributed
    refuses tensors of other device types. A call with ``async_op=False`` runs on the current stream. Asynchronous calls,
    and every isend and irecv, run on a stream of the group, so that later work on the current stream does not wait for
    the peer. ``Work.wait()`` makes the then current stream wait, not the host.

    Args:
        rank, world_size: in the group.
        create_communicator: creates the communicator on a device, together with the other ranks; called on first use.
        release: called before the group frees the communicator.
        communicator: an existing communicator to use.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        create_communicator: Callable[[torch.device], CommunicatorFL],
        release: Callable[[CommunicatorFL], None],
        communicator: CommunicatorFL | None = None,
    ):
        super().__init__(rank, world_size)
        self._create_communicator = create_communicator
        self._release = release
        self._communicator = communicator
        self._is_persistent = False
        self._side_stream: Any = None
        self._batch: list[tuple[Callable[[CommunicatorFL], None], Sequence[torch.Tensor]]] | None = None

    def getBackendName(self) -> str:
        return "flagcx"

    def communicator(self, device: torch.device) -> CommunicatorFL:
        """The group's communicator. The first call creates it, and all ranks must make it."""
        if self._communicator is None:
            self._communicator = self._create_communicator(device)
        return self._communicator

    def persistent_communicator(self, device: torch.device) -> CommunicatorFL:
        """The same, but never freed: it ends with the process, like SGLang's NCCL communicator.

        CUDA graphs may hold it, and NCCL does not return from destroying or aborting a communicator while one lives.
        """
        self._is_persistent = True
        return self.communicator(device)

    def _run(
        self, operation: Callable[[CommunicatorFL], None], tensors: Sequence[torch.Tensor], results: Any, *, asynchronous: bool
    ) -> Work | None:
        """Start an operation. Returns None if it is on the current stream, like torch.distributed's own backends."""
        if self._batch is not None:
            self._batch.append((operation, tensors))
            return None
        device = tensors[0].device
        communicator = self.communicator(device)
        if not asynchronous:
            operation(communicator)
            return None
        if device.type == "cpu":
            operation(communicator)
            return _done(results, device)
        module = torch.get_device_module(device.type)
        if self._side_stream is None:
            self._side_stream = module.Stream(device)
        side = self._side_stream
        side.wait_stream(module.current_stream(device))
        with module.stream(side):
            operation(communicator)
            for tensor in tensors:
                tensor.record_stream(side)
            return _done(results, device)

    @property
    def supports_coalescing(self) -> bool:
        return True

    def start_coalescing(self) -> None:
        self._batch = []

    def end_coalescing(self) -> Work | None:
        batch, self._batch = self._batch, None
        if not batch:
            return None

        def together(communicator: CommunicatorFL) -> None:
            communicator.check(tensors)
            with communicator.group():
                for operation, _ in batch:
                    operation(communicator)

        tensors = [tensor for _, part in batch for tensor in part]
        return self._run(together, tensors, tensors, asynchronous=True)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Work | None:
        root = opts.rootRank
        return self._run(_each(lambda c, t: c.broadcast(t, root), tensors), tensors, tensors, asynchronous=opts.asyncOp)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Work | None:
        op = opts.reduceOp
        return self._run(_each(lambda c, t: c.all_reduce(t, op), tensors), tensors, tensors, asynchronous=opts.asyncOp)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> Work | None:
        root, op = opts.rootRank, opts.reduceOp
        return self._run(_each(lambda c, t: c.reduce(t, root, op), tensors), tensors, tensors, asynchronous=opts.asyncOp)

    def allgather(self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor], opts: Any) -> Work | None:
        gather = _each(CommunicatorFL.all_gather_list, output_tensors, input_tensors)
        tensors = [*input_tensors, *(t for outputs in output_tensors for t in outputs)]
        return self._run(gather, tensors, output_tensors[0], asynchronous=opts.asyncOp)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Work | None:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any) -> Work | None:
        gather = _each(CommunicatorFL.all_gather, outputs, tensors)
        return self._run(gather, (*tensors, *outputs), outputs, asynchronous=opts.asyncOp)

    def reduce_scatter(self, output_tensors: list[torch.Tensor], input_tensors: list[list[torch.Tensor]], opts: Any) -> Work | None:
        op = opts.reduceOp
        scatter = _each(lambda c, output, tensors: c.reduce_scatter_list(output, tensors, op), output_tensors, input_tensors)
        tensors = [*output_tensors, *(t for inputs in input_tensors for t in inputs)]
        return self._run(scatter, tensors, output_tensors, asynchronous=opts.asyncOp)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Work | None:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any) -> Work | None:
        op = opts.reduceOp
        scatter = _each(lambda c, output, tensor: c.reduce_scatter(output, tensor, op), outputs, tensors)
        return self._run(scatter, (*tensors, *outputs), outputs, asynchronous=opts.asyncOp)

    def gather(self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor], opts: Any) -> Work | None:
        tensor, outputs = input_tensors[0], output_tensors[0] if output_tensors else []
        receives = self._by_rank("outputs", outputs) if outputs else []
        for output, peer in receives:
            check_same_size("the tensor to gather", tensor, f"outputs[{peer}]", output)
        sends = [(tensor, opts.rootRank)]
        return self._run(lambda c: c.exchange(sends, receives), (tensor, *outputs), outputs or [tensor], asynchronous=opts.asyncOp)

    def scatter(self, output_tensors: list[torch.Tensor], input_tensors: list[list[torch.Tensor]], opts: Any) -> Work | None:
        output, inputs = output_tensors[0], input_tensors[0] if input_tensors else []
        sends = self._by_rank("inputs", inputs) if inputs else []
        for tensor, peer in sends:
            check_same_size("output", output, f"inputs[{peer}]", tensor)
        receives = [(output, opts.rootRank)]
        return self._run(lambda c: c.exchange(sends, receives), (output, *inputs), [output], asynchronous=opts.asyncOp)

    def alltoall(self, output_tensors: list[torch.Tensor], input_tensors: list[torch.Tensor], opts: Any) -> Work | None:
        sends, receives = self._by_rank("input_tensors", input_tensors), self._by_rank("output_tensors", output_tensors)
        tensors = (*input_tensors, *output_tensors)
        return self._run(lambda c: c.exchange(sends, receives), tensors, output_tensors, asynchronous=opts.asyncOp)

    def all_to_all_single(
        self, output: torch.Tensor, tensor: torch.Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any
    ) -> Work | None:
        if output_sizes or input_sizes:
            sends = self._by_rank("input", self._split("input", tensor, input_sizes))
            receives = self._by_rank("output", self._split("output", output, output_sizes))
            return self._run(lambda c: c.exchange(sends, receives), (tensor, output), [output], asynchronous=opts.asyncOp)
        return self._run(lambda c: c.all_to_all_single(output, tensor), (tensor, output), [output], asynchronous=opts.asyncOp)

    def _split(self, name: str, tensor: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
        """A tensor's rows by rank: ``sizes`` of them, or equal shares."""
        if sizes:
            return torch.split_with_sizes(tensor, sizes)
        share, rest = divmod(len(tensor), self.size())
        if rest:
            raise ValueError(f"{name} has {len(tensor)} rows, which {self.size()} ranks cannot share evenly")
        return torch.split_with_sizes(tensor, [share] * self.size())

    def _by_rank(self, name: str, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """One (tensor, rank) pair for each rank of the group."""
        if len(tensors) != self.size():
            raise ValueError(f"{name} has {len(tensors)} tensors, and the group has {self.size()} ranks")
        return [(tensor, rank) for rank, tensor in enumerate(tensors)]

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work | None:
        return self._run(_each(lambda c, t: c.send(t, dst), tensors), tensors, tensors, asynchronous=True)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work | None:
        return self._run(_each(lambda c, t: c.recv(t, src), tensors), tensors, tensors, asynchronous=True)

    def barrier(self, opts: Any) -> Work | None:
        """Wait on the host until all ranks have called it."""
        device = self._communicator.device if self._communicator is not None else _device_of(opts)
        token = torch.zeros(1, dtype=torch.int32, device=device)
        self.communicator(device).all_reduce(token)
        token.cpu()
        return _done([token], device) if opts.asyncOp else None

    def set_timeout(self, timeout: timedelta) -> None:
        """Called by torch.distributed. It has no effect, since FlagCX waits without a limit."""

    def shutdown(self) -> None:
        self._close(abort=False)

    def abort(self) -> None:
        self._close(abort=True)

    def _close(self, *, abort: bool) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            self._release(communicator)
            if not self._is_persistent:
                communicator.close(abort=abort)


def _each(operation: Callable[..., None], *lists: Sequence[Any]) -> Callable[[CommunicatorFL], None]:
    """Call an operation with the first elements of the lists, the second ones, and so on, as one group."""
    calls = list(zip(*lists, strict=True))

    def run(communicator: CommunicatorFL) -> None:
        with communicator.group() if len(calls) > 1 else contextlib.nullcontext():
            for arguments in calls:
                operation(communicator, *arguments)

    return run


def _done(results: Any, device: torch.device) -> Work:
    """A Work whose wait() makes the current stream wait for the present work of this one."""
    future: torch.futures.Future[Any] = torch.futures.Future(devices=None if device.type == "cpu" else [device])
    future.set_result(results)
    return _create_work_from_future(future)


def _device_of(opts: Any) -> torch.device:
    """The device of a barrier. torch.distributed gives at most its type."""
    accelerator = torch.accelerator.current_accelerator()
    named = opts.device.type if opts.device is not None else None
    return current_device(named or (accelerator.type if accelerator is not None else "cpu"))
