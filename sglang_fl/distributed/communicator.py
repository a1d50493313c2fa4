# SPDX-License-Identifier: Apache-2.0
"""CommunicatorFL: what SGLang's GroupCoordinator calls on its device communicator, over FlagCX."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_void_p
from typing import Any

import torch
from torch.distributed import ReduceOp

from .device_communicators.flagcx import DTYPES, OPS, PIECES, FlagCXError, FlagCXLibrary


class CommunicatorFL:
    """The collectives of one group of ranks, each put on the stream that is current when it is called.

    It has the interface of SGLang's ``PyNcclCommunicator``, and is always enabled. Tensors are on ``device`` and
    contiguous (or dense, as those of NCCL). A call returns once the work is on the stream, and can be captured in a
    graph. Ranks are ranks in the group. A tensor without elements is left alone, on all ranks alike.

    Reductions take the dtypes of :data:`DTYPES`; what only moves data takes any.

    Raises (each call):
        TypeError, ValueError: a tensor, dtype or reduction that cannot be used; nothing was started.
        FlagCXError: FlagCX failed. The ranks are then no longer in step: the process must end.
    """

    available = True

    def __init__(self, library: FlagCXLibrary, comm: int, rank: int, world_size: int, device: torch.device, name: str):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.name = name
        self.comm = c_void_p(comm)
        self._library = library
        self._comm = comm
        self._streams = library.streams
        self._raw_stream = raw_stream_of(device)
        functions = library.functions
        self._all_reduce = functions["flagcxAllReduce"]
        self._reduce = functions["flagcxReduce"]
        self._reduce_scatter = functions["flagcxReduceScatter"]
        self._all_gather = functions["flagcxAllGather"]
        self._broadcast = functions["flagcxBroadcast"]
        self._all_to_all = functions["flagcxAlltoAll"]
        self._send = functions["flagcxSend"]
        self._recv = functions["flagcxRecv"]
        self._group_start = functions["flagcxGroupStart"]
        self._group_end = functions["flagcxGroupEnd"]

    @property
    def disabled(self) -> bool:
        """Always False. SGLang keeps NCCL's communicator off outside graphs, and torch.distributed serves there; here
        both end in the same communicator, and this is the shorter way. What is assigned has no effect."""
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass

    @contextmanager
    def change_state(self, enable: bool | None = None) -> Iterator[None]:
        """SGLang switches its communicator on for a while with this; here it is on already."""
        yield

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM) -> None:
        """Reduce ``tensor`` over all ranks, in place."""
        self._check(tensor)
        count = tensor.numel()
        if count:
            data = tensor.data_ptr()
            code = self._all_reduce(data, data, count, DTYPES[tensor.dtype], OPS[op], self._comm, self._streams[self._raw_stream()])
            if code:
                self._fail("flagcxAllReduce", code)

    def outplace_all_reduce(self, in_tensor: torch.Tensor, out_tensor: torch.Tensor | None = None, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """Reduce ``in_tensor`` over all ranks into ``out_tensor``, a new one if None; returns it."""
        self._check(in_tensor)
        if out_tensor is None:
            out_tensor = torch.empty_like(in_tensor)
        else:
            self._check(out_tensor)
            _same_elements(in_tensor, out_tensor)
        count = in_tensor.numel()
        if count:
            code = self._all_reduce(
                in_tensor.data_ptr(),
                out_tensor.data_ptr(),
                count,
                DTYPES[in_tensor.dtype],
                OPS[op],
                self._comm,
                self._streams[self._raw_stream()],
            )
            if code:
                self._fail("flagcxAllReduce", code)
        return out_tensor

    def all_gather(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, sizes: Sequence[int] | None = None) -> None:
        """Put every rank's ``input_tensor`` one after the other into ``output_tensor``.

        Args:
            output_tensor: [world_size * n, ...], or [sum(sizes), ...].
            input_tensor: [n, ...], or [sizes[rank], ...].
            sizes: rows of each rank where they differ.
        """
        self._check(input_tensor)
        self._check(output_tensor)
        _same_dtype(input_tensor, output_tensor)
        code_of_type, pieces = PIECES[input_tensor.dtype]
        if sizes is not None:
            parts = self._parts(output_tensor, sizes)
            stream = self._streams[self._raw_stream()]
            self.group_start()
            for root, (address, count) in enumerate(parts):
                if count:
                    source = input_tensor.data_ptr() if root == self.rank else address
                    code = self._broadcast(source, address, count * pieces, code_of_type, root, self._comm, stream)
                    if code:
                        self._fail("flagcxBroadcast", code)
            self.group_end()
            return
        count = input_tensor.numel()
        if output_tensor.numel() != count * self.world_size:
            raise ValueError(f"all_gather of {count} elements by {self.world_size} ranks into {output_tensor.numel()}")
        if count:
            code = self._all_gather(
                input_tensor.data_ptr(),
                output_tensor.data_ptr(),
                count * pieces,
                code_of_type,
                self._comm,
                self._streams[self._raw_stream()],
            )
            if code:
                self._fail("flagcxAllGather", code)

    def reduce_scatter(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, op: Any = ReduceOp.SUM, sizes: Sequence[int] | None = None
    ) -> None:
        """Reduce ``input_tensor`` over all ranks, and keep this rank's part in ``output_tensor``.

        Args:
            output_tensor: [n, ...], or [sizes[rank], ...].
            input_tensor: [world_size * n, ...], or [sum(sizes), ...].
            sizes: rows of each rank where they differ.
        """
        self._check(input_tensor)
        self._check(output_tensor)
        _same_dtype(input_tensor, output_tensor)
        code_of_type, code_of_op = DTYPES[input_tensor.dtype], OPS[op]
        if sizes is not None:
            parts = self._parts(input_tensor, sizes)
            stream = self._streams[self._raw_stream()]
            self.group_start()
            for root, (address, count) in enumerate(parts):
                if count:
                    target = output_tensor.data_ptr() if root == self.rank else address
                    code = self._reduce(address, target, count, code_of_type, code_of_op, root, self._comm, stream)
                    if code:
                        self._fail("flagcxReduce", code)
            self.group_end()
            return
        count = output_tensor.numel()
        if input_tensor.numel() != count * self.world_size:
            raise ValueError(f"reduce_scatter of {input_tensor.numel()} elements to {self.world_size} ranks of {count}")
        if count:
            code = self._reduce_scatter(
                input_tensor.data_ptr(),
                output_tensor.data_ptr(),
                count,
                code_of_type,
                code_of_op,
                self._comm,
                self._streams[self._raw_stream()],
            )
            if code:
                self._fail("flagcxReduceScatter", code)

    def all_to_all_single(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor) -> None:
        """Give the i-th of ``world_size`` equal parts of ``input_tensor`` to rank i, and take its part for this rank."""
        self._check(input_tensor)
        self._check(output_tensor)
        _same_elements(input_tensor, output_tensor)
        count, rest = divmod(input_tensor.numel(), self.world_size)
        if rest:
            raise ValueError(f"all_to_all_single: {input_tensor.numel()} elements cannot be split evenly between {self.world_size} ranks")
        if count:
            code_of_type, pieces = PIECES[input_tensor.dtype]
            code = self._all_to_all(
                input_tensor.data_ptr(),
                output_tensor.data_ptr(),
                count * pieces,
                code_of_type,
                self._comm,
                self._streams[self._raw_stream()],
            )
            if code:
                self._fail("flagcxAlltoAll", code)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Copy rank ``src``'s ``tensor`` into everyone's."""
        self._check(tensor)
        self._broadcast_into(tensor, tensor, src)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send ``tensor`` to rank ``dst``, which must call :meth:`recv`."""
        self._check(tensor)
        count = tensor.numel()
        if count:
            code_of_type, pieces = PIECES[tensor.dtype]
            code = self._send(tensor.data_ptr(), count * pieces, code_of_type, dst, self._comm, self._streams[self._raw_stream()])
            if code:
                self._fail("flagcxSend", code)

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Fill ``tensor`` with what rank ``src`` sends."""
        self._check(tensor)
        count = tensor.numel()
        if count:
            code_of_type, pieces = PIECES[tensor.dtype]
            code = self._recv(tensor.data_ptr(), count * pieces, code_of_type, src, self._comm, self._streams[self._raw_stream()])
            if code:
                self._fail("flagcxRecv", code)

    def group_start(self) -> None:
        """Begin a group: what is called until :meth:`group_end` is started there, as one. Groups can be nested."""
        code = self._group_start(self._comm)
        if code:
            self._fail("flagcxGroupStart", code)

    def group_end(self) -> None:
        code = self._group_end(self._comm)
        if code:
            self._fail("flagcxGroupEnd", code)

    @contextmanager
    def group(self) -> Iterator[None]:
        """A group that ends with its block, also where a call in it is refused: left open, it would swallow all later calls."""
        self.group_start()
        try:
            yield
        finally:
            self.group_end()

    def register_comm_window_raw(self, ptr: int, size: int) -> int:
        """Register ``size`` bytes at ``ptr`` for symmetric operations; all ranks must."""
        return self._library.register_window(self._comm, ptr, size)

    def deregister_comm_window(self, window: int) -> None:
        self._library.deregister_window(self._comm, window)

    # What torch.distributed has and SGLang's communicator has not.

    def reduce(self, tensor: torch.Tensor, dst: int, op: Any = ReduceOp.SUM) -> None:
        """Reduce ``tensor`` over all ranks into that of rank ``dst``, in place; what the others hold then is undefined."""
        self._check(tensor)
        count = tensor.numel()
        if count:
            data = tensor.data_ptr()
            code = self._reduce(data, data, count, DTYPES[tensor.dtype], OPS[op], dst, self._comm, self._streams[self._raw_stream()])
            if code:
                self._fail("flagcxReduce", code)

    def all_gather_list(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Put rank i's ``tensor`` into ``outputs[i]``; ranks may differ in size."""
        for part in (tensor, *outputs):
            self._check(part)
        _same_elements(tensor, outputs[self.rank])
        self.group_start()
        for root, output in enumerate(outputs):
            self._broadcast_into(tensor if root == self.rank else output, output, root)
        self.group_end()

    def reduce_scatter_list(self, output: torch.Tensor, tensors: Sequence[torch.Tensor], op: Any = ReduceOp.SUM) -> None:
        """Reduce everyone's ``tensors[rank]`` into ``output``; ranks may differ in size."""
        for part in (output, *tensors):
            self._check(part)
        _same_elements(tensors[self.rank], output)
        code_of_type, code_of_op = DTYPES[output.dtype], OPS[op]
        stream = self._streams[self._raw_stream()]
        self.group_start()
        for root, tensor in enumerate(tensors):
            if tensor.numel():
                target = output if root == self.rank else tensor
                code = self._reduce(
                    tensor.data_ptr(), target.data_ptr(), tensor.numel(), code_of_type, code_of_op, root, self._comm, stream
                )
                if code:
                    self._fail("flagcxReduce", code)
        self.group_end()

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send and receive (tensor, rank) pairs as one; what a rank has for itself is copied."""
        for tensor, _ in (*sends, *receives):  # before a group is open, which an error would leave so
            self._check(tensor)
        mine = [tensor for tensor, peer in sends if peer == self.rank]
        for target, source in zip((tensor for tensor, peer in receives if peer == self.rank), mine, strict=True):
            target.copy_(source)
        self.group_start()
        for tensor, peer in sends:
            if peer != self.rank:
                self.send(tensor, peer)
        for tensor, peer in receives:
            if peer != self.rank:
                self.recv(tensor, peer)
        self.group_end()

    def async_error(self) -> str | None:
        """An error that struck outside of any call, in words; None: there is none, or FlagCX cannot tell."""
        code = self._library.async_error(self._comm)
        return self._told("the communicator", code) if code and code != _IN_PROGRESS else None

    def close(self, *, abort: bool) -> None:
        """Free the communicator; nothing may be called on it afterwards.

        Args:
            abort: give up what is under way; else wait for it.
        """
        self._library.functions["flagcxCommAbort" if abort else "flagcxCommDestroy"](self._comm)

    def _broadcast_into(self, source: torch.Tensor, target: torch.Tensor, root: int) -> None:
        count = target.numel()
        if count:
            code_of_type, pieces = PIECES[target.dtype]
            code = self._broadcast(
                source.data_ptr(),
                target.data_ptr(),
                count * pieces,
                code_of_type,
                root,
                self._comm,
                self._streams[self._raw_stream()],
            )
            if code:
                self._fail("flagcxBroadcast", code)

    def _parts(self, tensor: torch.Tensor, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(address, elements) of each rank's rows of a tensor."""
        rows = tensor.shape[0]
        if len(sizes) != self.world_size or sum(sizes) != rows:
            raise ValueError(f"sizes {list(sizes)} do not divide {rows} rows between {self.world_size} ranks")
        per_row = tensor.numel() // rows if rows else 0
        address, parts = tensor.data_ptr(), []
        for size in sizes:
            parts.append((address, size * per_row))
            address += size * per_row * tensor.element_size()
        return parts

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ValueError for a tensor that no call takes, before a group is begun."""
        for tensor in tensors:
            self._check(tensor)

    def _check(self, tensor: torch.Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"this communicator is for {self.device}, and the tensor is on {tensor.device}")
        if not tensor.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            raise ValueError(f"FlagCX takes contiguous tensors, not one of shape {list(tensor.shape)} with strides {list(tensor.stride())}")

    def _fail(self, function: str, code: int) -> None:
        raise FlagCXError(self._told(function, code))

    def _told(self, what: str, code: int) -> str:
        why = self._library.explain(code, self._comm)
        return (
            f"FlagCX: {what} failed on rank {self.rank} of the {self.world_size} of group {self.name!r} ({self.device}): {why}. "
            "The ranks are out of step, so this server cannot go on."
        )


_IN_PROGRESS = 7


def _same_dtype(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.dtype != other.dtype:
        raise ValueError(f"a tensor of {one.dtype} cannot go into one of {other.dtype}")


def _same_elements(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.numel() != other.numel() or one.dtype != other.dtype:
        raise ValueError(f"{one.numel()} elements of {one.dtype} cannot go into {other.numel()} of {other.dtype}")


def raw_stream_of(device: torch.device) -> Callable[[], int]:
    """What gives the vendor's handle of the stream that is current on a device; 0 where there are no streams."""
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
