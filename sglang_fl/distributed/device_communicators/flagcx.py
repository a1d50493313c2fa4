# SPDX-License-Identifier: Apache-2.0
"""libflagcx through ctypes, with typed signatures.

It follows FlagCX's header (``flagcx/include/flagcx.h``, 0.13). FlagCX's own Python wrapper is not used: it is part
of the checkout and not of an installed library, it fails if any of a hundred functions is missing, and it converts
a dtype through a chain of comparisons in every call.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ReduceOp

from .flagcx_files import DATA_TYPES, DEVICE_HANDLE, REDUCE_OPS, RESULTS, UNIQUE_ID_BYTES, FlagCXError, header_of

__all__ = ["DTYPES", "OPS", "PIECES", "FlagCXError", "FlagCXLibrary", "Version"]

_UniqueId = c_char * UNIQUE_ID_BYTES

# fmt: off
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "flagcxGetVersion":        (POINTER(c_int),),
    "flagcxGetUniqueId":       (c_void_p,),
    "flagcxCommInitRank":      (POINTER(c_void_p), c_int, POINTER(_UniqueId), c_int),
    "flagcxCommDestroy":       (c_void_p,),
    "flagcxCommAbort":         (c_void_p,),
    "flagcxCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "flagcxGroupStart":        (c_void_p,),
    "flagcxGroupEnd":          (c_void_p,),
    # send buffer, receive buffer, count, data type, …, communicator, stream
    "flagcxAllReduce":         (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "flagcxReduce":            (c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_void_p, c_void_p),
    "flagcxReduceScatter":     (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "flagcxAllGather":         (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p),
    "flagcxBroadcast":         (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "flagcxAlltoAll":          (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p),
    # buffer, count, data type, peer, communicator, stream
    "flagcxSend":              (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "flagcxRecv":              (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
}
# fmt: on

_StreamCopy = CFUNCTYPE(c_int, POINTER(c_void_p), c_void_p)


class _DeviceHandle(ctypes.Structure):
    _fields_ = [(name, _StreamCopy if name == "streamCopy" else c_void_p) for name in DEVICE_HANDLE]


class _HandlerGroup(ctypes.Structure):
    _fields_ = [("uniqueId", c_void_p), ("comm", c_void_p), ("devHandle", POINTER(_DeviceHandle))]


class _DataTypes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        supported = ", ".join(str(known).removeprefix("torch.") for known in self)
        raise TypeError(f"FlagCX cannot reduce {str(dtype).removeprefix('torch.')}; it reduces {supported}")


class _ReduceOps(dict[Any, int]):
    def __missing__(self, op: Any) -> int:
        # torch.distributed's options carry a ReduceOp, whose hash is not that of the value it stands for.
        value = getattr(op, "op", None)
        if value in self:
            return self[value]
        supported = ", ".join(str(known).rpartition(".")[2] for known in self)
        raise ValueError(f"FlagCX cannot reduce with {op}; it knows {supported}")


class _Pieces(dict[torch.dtype, tuple[int, int]]):
    def __missing__(self, dtype: torch.dtype) -> tuple[int, int]:
        self[dtype] = (DATA_TYPES["flagcxUint8"], dtype.itemsize)
        return self[dtype]


#: FlagCX's code of a dtype that can be reduced; TypeError for others.
DTYPES = _DataTypes({getattr(torch, name.removeprefix("flagcx").lower()): code for name, code in DATA_TYPES.items()})
#: dtype -> the code for moving it, its own or that of bytes, and the pieces per element. FlagCX has no bool, float8
#: or complex; data that is only copied does not need them.
PIECES = _Pieces({dtype: (code, 1) for dtype, code in DTYPES.items()})
#: FlagCX's code of a reduction; ValueError for others.
OPS = _ReduceOps(
    {
        ReduceOp.SUM: REDUCE_OPS["flagcxSum"],
        ReduceOp.PRODUCT: REDUCE_OPS["flagcxProd"],
        ReduceOp.MAX: REDUCE_OPS["flagcxMax"],
        ReduceOp.MIN: REDUCE_OPS["flagcxMin"],
        ReduceOp.AVG: REDUCE_OPS["flagcxAvg"],
    }
)


@dataclass(frozen=True)
class Version:
    """A FlagCX version, on which ranks must agree.

    ``library``: the value of flagcxGetVersion (10000 in every release up to 0.13). ``header``: the release in the
    header next to the library, or None. ``interface``: how handles are created.
    """

    library: int
    header: str | None
    interface: str

    def __str__(self) -> str:
        return f"{self.header or 'of unknown release'} (flagcxGetVersion {self.library}, {self.interface})"

    def agrees(self, other: "Version") -> bool:
        """Whether two ranks can communicate. A rank without a header accepts the other's release."""
        same_release = self.header is None or other.header is None or self.header == other.header
        return same_release and self.library == other.library and self.interface == other.interface


class _StreamHandles(dict[int, int]):
    """FlagCX's handle of each raw stream, created on first use and kept for the life of the process."""

    def __init__(self, library: "FlagCXLibrary"):
        self._library = library

    def __missing__(self, raw: int) -> int:
        self[raw] = self._library.make_stream_handle(raw)
        return self[raw]


class FlagCXLibrary:
    """libflagcx, loaded and checked. ``functions``: name -> function, which returns a result code.

    Raises:
        FlagCXError: the file cannot be loaded, lacks a function, or has another version's structs.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise FlagCXError(f"{path} cannot be loaded: {error}") from error
        missing = [name for name in _FUNCTIONS if not hasattr(self._dll, name)]
        self._has_device_handle = hasattr(self._dll, "flagcxDeviceHandleInit")
        if not self._has_device_handle and not hasattr(self._dll, "flagcxHandleInit"):
            missing.append("flagcxDeviceHandleInit")
        if missing:
            raise FlagCXError(f"{path} lacks {', '.join(missing)}: it is not FlagCX 0.5 to 0.13")
        self.functions = {name: self._function(name, arguments) for name, arguments in _FUNCTIONS.items()}
        self.version = self._check_version()
        self._device_handle = self._init_device_handle()
        #: FlagCX's stream handle by raw stream.
        self.streams = _StreamHandles(self)

    def _function(self, name: str, arguments: tuple[Any, ...]) -> Any:
        function = getattr(self._dll, name)
        function.argtypes, function.restype = arguments, c_int
        return function

    def _check_version(self) -> Version:
        reported = c_int()
        self._check("flagcxGetVersion", self.functions["flagcxGetVersion"](byref(reported)))
        header = header_of(self.path)
        interface = "flagcxDeviceHandleInit" if self._has_device_handle else "flagcxHandleInit"
        if header is not None and header.problems:
            release = header.version or "before 0.13"
            problems = "; ".join(header.problems[:3])
            raise FlagCXError(f"{header.path}: FlagCX {release} has an unknown struct layout (known: 0.5 to 0.13): {problems}")
        if header is None and (reported.value != 10000 or not self._has_device_handle):
            # Before 0.13 the library does not identify its layout.
            raise FlagCXError(
                f"{self.path}: unknown FlagCX release (flagcxGetVersion says {reported.value}, {interface}), and so unknown "
                "struct layouts: point FLAGCX_PATH at its checkout, or put its flagcx.h beside it or in ../include"
            )
        return Version(reported.value, header.release if header else None, interface)

    def _init_device_handle(self) -> Any:
        if self._has_device_handle:
            handle = POINTER(_DeviceHandle)()
            init = self._function("flagcxDeviceHandleInit", (POINTER(POINTER(_DeviceHandle)),))
            self._check("flagcxDeviceHandleInit", init(byref(handle)))
            return handle.contents
        group = POINTER(_HandlerGroup)()
        init = self._function("flagcxHandleInit", (POINTER(POINTER(_HandlerGroup)),))
        self._check("flagcxHandleInit", init(byref(group)))
        return group.contents.devHandle.contents

    def make_stream_handle(self, raw: int) -> int:
        """Create FlagCX's handle of a vendor's stream. Use ``streams``, which creates each one once."""
        handle = c_void_p()
        self._check("streamCopy", self._device_handle.streamCopy(byref(handle), raw))
        assert handle.value is not None
        return handle.value

    def unique_id(self) -> bytes:
        """The id of a new communicator, for all its ranks."""
        get = self.functions["flagcxGetUniqueId"]
        if self._has_device_handle:
            identity = _UniqueId()
            self._check("flagcxGetUniqueId", get(byref(identity)))
            return bytes(identity)
        pointer = c_void_p()  # before 0.13 the library allocates it
        self._check("flagcxGetUniqueId", get(byref(pointer)))
        assert pointer.value is not None
        return ctypes.string_at(pointer.value, UNIQUE_ID_BYTES)

    def init_rank(self, world_size: int, identity: bytes, rank: int) -> int:
        """Create a communicator on the current device. Returns when all ranks have called it."""
        comm = c_void_p()
        code = self.functions["flagcxCommInitRank"](byref(comm), world_size, byref(_UniqueId.from_buffer_copy(identity)), rank)
        self._check("flagcxCommInitRank", code)
        assert comm.value is not None
        return comm.value

    def async_error(self, comm: int) -> int | None:
        """The code of a communicator's asynchronous error. 0: none. None: FlagCX cannot tell."""
        error = c_int()
        code = self.functions["flagcxCommGetAsyncError"](comm, byref(error))
        return error.value if code == 0 else None

    def explain(self, code: int, comm: int | None) -> str:
        """A result code in words, with the vendor library's last message about a communicator."""
        name = RESULTS[code] if 0 <= code < len(RESULTS) else "an unknown result"
        message = f"{name} ({code})"
        if comm is not None and hasattr(self._dll, "flagcxGetLastError"):
            last_error = self._dll.flagcxGetLastError
            last_error.argtypes, last_error.restype = (c_void_p,), c_char_p
            said = (last_error(comm) or b"").decode(errors="replace").strip()
            if said and said != "Not implemented.":
                message += f": {said}"
        return message

    def _check(self, name: str, code: int) -> None:
        if code:
            raise FlagCXError(f"{name} of {self.path} failed: {self.explain(code, None)}")
