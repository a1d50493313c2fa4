# SPDX-License-Identifier: Apache-2.0
"""CommunicatorFL: what SGLang's GroupCoordinator calls on its device communicator, over FlagCX."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import ReduceOp

from .device_communicators.flagcx import DTYPES, OPS, PIECES, FlagCXError, FlagCXLibrary

_IN_PROGRESS = 7


class CommunicatorFL:
    """The collectives of one group of ranks. Each runs on the current stream of its call.

    It has the interface of SGLang's ``PyNcclCommunicator``, and is always enabled. Tensors are on ``device`` and
    contiguous. Tensors that are sent, received or changed in place may also be dense (for example transposed), with the
    same strides on all ranks, as with NCCL. A call returns when the work is on the stream, and can be captured in a graph.
    Ranks are ranks in the group. Tensors without elements are skipped, on all ranks.

    Reductions accept the dtypes of :data:`DTYPES`; copies accept any dtype.

    Raises (each call):
        TypeError, ValueError: an unusable tensor, rank, dtype or reduction. Nothing was started.
        FlagCXError: FlagCX failed. The ranks are out of step, so the process must end.
    """

    available = True

    def __init__(self, library: FlagCXLibrary, comm: int, rank: int, world_size: int, device: torch.device, name: str):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.name = name
        self._library = library
        self._comm = comm
        self._functions = library.functions
        self._streams = library.streams
        self._raw_stream = raw_stream_of(device)

    @property
    def disabled(self) -> bool:
        """Always False. SGLang disables NCCL's communicator outside of graphs and uses torch.distributed there. With
        FlagCX both use the same communicator, and this path is shorter. Assignments have no effect."""
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass

    @contextmanager
    def change_state(self, enable: bool | None = None) -> Iterator[None]:
        """SGLang enables its communicator within a block with this. Here it is always enabled."""
        yield

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM) -> None:
        """Reduce ``tensor`` over all ranks, in place."""
        self._check_dense("tensor", tensor)
        if count := tensor.numel():
            data = tensor.data_ptr()
            self._call("flagcxAllReduce", data, data, count, DTYPES[tensor.dtype], OPS[op])

    def outplace_all_reduce(self, in_tensor: torch.Tensor, out_tensor: torch.Tensor | None = None, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """Reduce ``in_tensor`` over all ranks into ``out_tensor`` (a new tensor if None), and return that.

        SGLang calls it in compiled models and piecewise graphs.
        """
        self._check_dense("in_tensor", in_tensor)
        if out_tensor is None:
            out_tensor = torch.empty_like(in_tensor)
        self._check_dense("out_tensor", out_tensor)
        _check_same_layout("in_tensor", in_tensor, "out_tensor", out_tensor)
        if count := in_tensor.numel():
            self._call("flagcxAllReduce", in_tensor.data_ptr(), out_tensor.data_ptr(), count, DTYPES[in_tensor.dtype], OPS[op])
        return out_tensor

    def all_gather(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, sizes: Sequence[int] | None = None) -> None:
        """Concatenate all ranks' ``input_tensor`` into ``output_tensor``.

        Args:
            output_tensor: [world_size * n, ...], or [sum(sizes), ...].
            input_tensor: [n, ...], or [sizes[rank], ...].
            sizes: the rows of each rank, if they differ.
        """
        self._check_contiguous(output_tensor, input_tensor)
        if sizes is not None:
            parts = self._parts("output_tensor", output_tensor, "input_tensor", input_tensor, sizes)
            self._broadcast_parts(parts, input_tensor)
            return
        self._check_shares("output_tensor", output_tensor, "input_tensor", input_tensor)
        if count := input_tensor.numel():
            code, pieces = PIECES[input_tensor.dtype]
            self._call("flagcxAllGather", input_tensor.data_ptr(), output_tensor.data_ptr(), count * pieces, code)

    def reduce_scatter(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, op: Any = ReduceOp.SUM, sizes: Sequence[int] | None = None
    ) -> None:
        """Reduce ``input_tensor`` over all ranks, and write this rank's part to ``output_tensor``.

        Args:
            output_tensor: [n, ...], or [sizes[rank], ...].
            input_tensor: [world_size * n, ...], or [sum(sizes), ...].
            sizes: the rows of each rank, if they differ.
        """
        self._check_contiguous(output_tensor, input_tensor)
        if sizes is not None:
            parts = self._parts("input_tensor", input_tensor, "output_tensor", output_tensor, sizes)
            self._reduce_parts(parts, output_tensor, op)
            return
        self._check_shares("input_tensor", input_tensor, "output_tensor", output_tensor)
        if count := output_tensor.numel():
            code = DTYPES[input_tensor.dtype]
            self._call("flagcxReduceScatter", input_tensor.data_ptr(), output_tensor.data_ptr(), count, code, OPS[op])

    def all_to_all_single(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor) -> None:
        """Send the i-th of ``world_size`` equal parts of ``input_tensor`` to rank i, and receive one part from each rank."""
        self._check_contiguous(output_tensor, input_tensor)
        _check_same_layout("input_tensor", input_tensor, "output_tensor", output_tensor)
        count, rest = divmod(input_tensor.numel(), self.world_size)
        if rest:
            raise ValueError(f"input_tensor has {input_tensor.numel()} elements, which {self.world_size} ranks cannot share evenly")
        if count:
            code, pieces = PIECES[input_tensor.dtype]
            self._call("flagcxAlltoAll", input_tensor.data_ptr(), output_tensor.data_ptr(), count * pieces, code)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Copy rank ``src``'s ``tensor`` to all ranks."""
        self._check_dense("tensor", tensor)
        self._check_rank("src", src)
        if count := tensor.numel():
            data, (code, pieces) = tensor.data_ptr(), PIECES[tensor.dtype]
            self._call("flagcxBroadcast", data, data, count * pieces, code, src)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send ``tensor`` to rank ``dst``, which must call :meth:`recv`."""
        self._check_dense("tensor", tensor)
        self._check_rank("dst", dst)
        if count := tensor.numel():
            code, pieces = PIECES[tensor.dtype]
            self._call("flagcxSend", tensor.data_ptr(), count * pieces, code, dst)

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Receive ``tensor`` from rank ``src``."""
        self._check_dense("tensor", tensor)
        self._check_rank("src", src)
        if count := tensor.numel():
            code, pieces = PIECES[tensor.dtype]
            self._call("flagcxRecv", tensor.data_ptr(), count * pieces, code, src)

    def group_start(self) -> None:
        """Begin a group. Calls until :meth:`group_end` start together there. Groups can be nested."""
        self._group("flagcxGroupStart")

    def group_end(self) -> None:
        self._group("flagcxGroupEnd")

    @contextmanager
    def group(self) -> Iterator[None]:
        """A group for a ``with`` block. It ends even if a call fails: an open group would collect all later calls."""
        self.group_start()
        try:
            yield
        except BaseException:
            self._functions["flagcxGroupEnd"](self._comm)  # ignore its result: the first error is reported
            raise
        self.group_end()

    # Operations of torch.distributed that SGLang's communicator lacks.

    def reduce(self, tensor: torch.Tensor, dst: int, op: Any = ReduceOp.SUM) -> None:
        """Reduce ``tensor`` over all ranks into that of rank ``dst``, in place. On other ranks it is undefined afterwards."""
        self._check_dense("tensor", tensor)
        self._check_rank("dst", dst)
        if count := tensor.numel():
            data = tensor.data_ptr()
            self._call("flagcxReduce", data, data, count, DTYPES[tensor.dtype], OPS[op], dst)

    def all_gather_list(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Gather rank i's ``tensor`` into ``outputs[i]``. Sizes may differ by rank."""
        self._check_list("outputs", outputs, "the tensor to gather", tensor)
        self._broadcast_parts([(output.data_ptr(), output.numel()) for output in outputs], tensor)

    def reduce_scatter_list(self, output: torch.Tensor, tensors: Sequence[torch.Tensor], op: Any = ReduceOp.SUM) -> None:
        """Reduce all ranks' ``tensors[rank]`` into ``output``. Sizes may differ by rank."""
        self._check_list("tensors", tensors, "output", output)
        self._reduce_parts([(tensor.data_ptr(), tensor.numel()) for tensor in tensors], output, op)

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send and receive (tensor, rank) pairs together. Pairs with this rank itself are copied."""
        for name, pairs in (("sent", sends), ("received", receives)):
            for tensor, peer in pairs:
                self._check_rank("peer", peer)
                self._check_dense(f"the tensor {name} {'to' if name == 'sent' else 'from'} rank {peer}", tensor)
        own = [tensor for tensor, peer in sends if peer == self.rank]
        targets = [tensor for tensor, peer in receives if peer == self.rank]
        if len(own) != len(targets):
            raise ValueError(f"rank {self.rank} sends {len(own)} tensors to itself and receives {len(targets)}")
        for source, target in zip(own, targets, strict=True):
            check_same_size("the tensor sent to this rank", source, "the one that receives it", target)
        for source, target in zip(own, targets, strict=True):
            target.copy_(source)
        with self.group():
            for tensor, peer in sends:
                if peer != self.rank:
                    self.send(tensor, peer)
            for tensor, peer in receives:
                if peer != self.rank:
                    self.recv(tensor, peer)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ValueError for a tensor that no call accepts, before a group begins."""
        for place, tensor in enumerate(tensors):
            self._check_dense(f"tensor {place} of the batch", tensor)

    def async_error(self) -> str | None:
        """An asynchronous error as text. None: there is none, or FlagCX cannot tell."""
        code = self._library.async_error(self._comm)
        return self._explain("the communicator", code) if code and code != _IN_PROGRESS else None

    def close(self, *, abort: bool) -> None:
        """Free the communicator. It must not be used afterwards.

        Args:
            abort: abort running work instead of waiting for it.
        """
        self._functions["flagcxCommAbort" if abort else "flagcxCommDestroy"](self._comm)

    def _call(self, function: str, *arguments: int) -> None:
        """Call a function of FlagCX with this communicator and the current stream."""
        code = self._functions[function](*arguments, self._comm, self._streams[self._raw_stream()])
        if code:
            raise FlagCXError(self._explain(function, code))

    def _group(self, function: str) -> None:
        code = self._functions[function](self._comm)
        if code:
            raise FlagCXError(self._explain(function, code))

    def _explain(self, what: str, code: int) -> str:
        reason = self._library.explain(code, self._comm)
        return (
            f"FlagCX: {what} failed on rank {self.rank} of the {self.world_size} of group {self.name!r} ({self.device}): {reason}. "
            "The ranks are out of step, so this server must end."
        )

    def _broadcast_parts(self, parts: Sequence[tuple[int, int]], own: torch.Tensor) -> None:
        """Broadcast each rank's part into its (address, elements) on all ranks. This rank's part comes from ``own``."""
        code, pieces = PIECES[own.dtype]
        with self.group():
            for root, (address, count) in enumerate(parts):
                if count:
                    source = own.data_ptr() if root == self.rank else address
                    self._call("flagcxBroadcast", source, address, count * pieces, code, root)

    def _reduce_parts(self, parts: Sequence[tuple[int, int]], own: torch.Tensor, op: Any) -> None:
        """Reduce each (address, elements) to its rank. This rank's result goes to ``own``."""
        code, reduction = DTYPES[own.dtype], OPS[op]
        with self.group():
            for root, (address, count) in enumerate(parts):
                if count:
                    target = own.data_ptr() if root == self.rank else address
                    self._call("flagcxReduce", address, target, count, code, reduction, root)

    def _parts(self, name: str, whole: torch.Tensor, own_name: str, own: torch.Tensor, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(address, elements) of each rank's rows of ``whole``. This rank's must have as many elements as ``own``.

        Views would be slower: SGLang also calls this outside of graphs.
        """
        _check_dtype(own_name, own, name, whole)
        rows = len(whole)
        if len(sizes) != self.world_size or sum(sizes) != rows or min(sizes) < 0:
            raise ValueError(f"sizes {list(sizes)} do not divide the {rows} rows of {name} between {self.world_size} ranks")
        per_row = whole.numel() // rows if rows else 0
        if own.numel() != sizes[self.rank] * per_row:
            raise ValueError(
                f"{own_name} has {own.numel()} elements, and sizes[{self.rank}] gives it {sizes[self.rank] * per_row} of {name}"
            )
        address, parts = whole.data_ptr(), []
        for size in sizes:
            parts.append((address, size * per_row))
            address += size * per_row * whole.element_size()
        return parts

    # FlagCX gets only addresses and counts. So tensors of another size, dtype or device are refused here.

    def _check_dense(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, and this communicator is for {self.device}")
        if not tensor.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            raise _not_contiguous(name, tensor)

    def _check_contiguous(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor) -> None:
        """Check a tensor that is divided between ranks by its position in memory."""
        for name, tensor in (("output_tensor", output_tensor), ("input_tensor", input_tensor)):
            self._check_dense(name, tensor)
            if not tensor.is_contiguous():
                raise _not_contiguous(name, tensor)

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{name} is rank {rank}, and the group has {self.world_size} ranks")

    def _check_list(self, name: str, tensors: Sequence[torch.Tensor], own_name: str, own: torch.Tensor) -> None:
        """Check a list with one tensor for each rank. This rank's must match its own tensor."""
        if len(tensors) != self.world_size:
            raise ValueError(f"{name} has {len(tensors)} tensors, and the group has {self.world_size} ranks")
        self._check_dense(own_name, own)
        for rank, tensor in enumerate(tensors):
            self._check_dense(f"{name}[{rank}]", tensor)
            _check_dtype(own_name, own, f"{name}[{rank}]", tensor)
            if not tensor.is_contiguous():
                raise _not_contiguous(f"{name}[{rank}]", tensor)
        _check_same_layout(own_name, own, f"{name}[{self.rank}]", tensors[self.rank])

    def _check_shares(self, name: str, whole: torch.Tensor, share_name: str, share: torch.Tensor) -> None:
        """Check that ``whole`` has a share for each rank."""
        _check_dtype(share_name, share, name, whole)
        if whole.numel() != share.numel() * self.world_size:
            raise ValueError(
                f"{name} has {whole.numel()} elements, and {self.world_size} times the {share.numel()} of {share_name} are "
                f"{share.numel() * self.world_size}"
            )


def _not_contiguous(name: str, tensor: torch.Tensor) -> ValueError:
    return ValueError(f"{name} is not contiguous: its shape is {list(tensor.shape)}, its strides are {list(tensor.stride())}")


def _check_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, and {other_name} is {other.dtype}")


def check_same_size(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    _check_dtype(name, tensor, other_name, other)
    if tensor.numel() != other.numel():
        raise ValueError(f"{name} has {tensor.numel()} elements, and {other_name} has {other.numel()}")


def _check_same_layout(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that one tensor's memory can be copied to the other's."""
    check_same_size(name, tensor, other_name, other)
    if not (tensor.is_contiguous() and other.is_contiguous()) and (tensor.shape, tensor.stride()) != (other.shape, other.stride()):
        raise ValueError(f"{name} has strides {list(tensor.stride())}, and {other_name} has {list(other.stride())}")


def raw_stream_of(device: torch.device) -> Callable[[], int]:
    """Returns a function that gives the vendor's handle of the current stream, or 0 on devices without streams."""
    if device.type == "cpu":
        return lambda: 0
    if device.type == "cuda":
        return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
    module = torch.get_device_module(device.type)
    name = f"{device.type}_stream"
    if not hasattr(module.current_stream(device), name):
        name = "native_handle"
    return lambda: getattr(module.current_stream(device), name)


def current_device(device_type: str) -> torch.device:
    """This process's device of a type, with its index."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())
