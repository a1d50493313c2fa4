# SPDX-License-Identifier: Apache-2.0
"""Finds FlagCX on this machine, and reads its ABI from the header next to it. Loads no library."""

import ctypes.util
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libflagcx.so"
#: Folders of the library below FLAGCX_PATH: a checkout, an install prefix, the directory itself.
_PLACES = ("build/lib", "lib", ".")

#: The used part of ``struct flagcxDeviceHandle`` in FlagCX 0.5 to 0.13. Older releases lack
#: hostGetDevicePointer.
DEVICE_HANDLE = (
    *("deviceSynchronize", "deviceMemcpy", "deviceMemset", "deviceMalloc", "deviceFree"),
    *("setDevice", "getDevice", "getDeviceCount", "getVendor", "hostGetDevicePointer"),
    *("streamCreate", "streamDestroy", "streamCopy", "streamFree"),
)
UNIQUE_ID_BYTES = 256
#: FlagCX's names of its result codes, data types and reductions, from code 0.
RESULTS = (
    *("flagcxSuccess", "flagcxUnhandledDeviceError", "flagcxSystemError", "flagcxInternalError", "flagcxInvalidArgument"),
    *("flagcxInvalidUsage", "flagcxRemoteError", "flagcxInProgress", "flagcxUnhandledCCLError", "flagcxNotSupported"),
)
_TYPES = ("Int8", "Uint8", "Int32", "Uint32", "Int64", "Uint64", "Float16", "Float32", "Float64", "Bfloat16")
DATA_TYPES = {f"flagcx{name}": code for code, name in enumerate(_TYPES)}
REDUCE_OPS = {f"flagcx{name}": code for code, name in enumerate(("Sum", "Prod", "Max", "Min", "Avg"))}


class FlagCXError(RuntimeError):
    """FlagCX cannot be used, or a call of it failed."""


def find_library(path: str | None, environ: Mapping[str, str]) -> Path:
    """Find the library's file.

    Args:
        path: the value of FLAGCX_PATH (a checkout, a directory, the file itself). None: search like the loader.

    Raises:
        FlagCXError: it was not found. The message names what was looked for.
    """
    if path is None:
        return _on_the_loader_path(environ)
    root = Path(path).expanduser()
    if root.is_file():
        return root
    looked = [root / place / LIBRARY for place in _PLACES]
    for candidate in looked:
        if candidate.is_file():
            return candidate
    if not root.exists():
        raise FlagCXError(f"there is no {str(root)!r} (looked for FlagCX's checkout, or for {LIBRARY} itself)")
    raise FlagCXError(f"no {LIBRARY} in {str(root)!r} (looked for {', '.join(map(str, looked))}); build FlagCX there first")


def _on_the_loader_path(environ: Mapping[str, str]) -> Path:
    directories = [directory for directory in environ.get("LD_LIBRARY_PATH", "").split(":") if directory]
    for directory in directories:
        if (Path(directory) / LIBRARY).is_file():
            return Path(directory) / LIBRARY
    found = ctypes.util.find_library("flagcx")
    if found is not None:
        return Path(found)
    looked = f"LD_LIBRARY_PATH ({', '.join(directories)})" if directories else "LD_LIBRARY_PATH (not set)"
    raise FlagCXError(f"no {LIBRARY} in {looked} or the loader's cache; set FLAGCX_PATH to FlagCX's checkout")


@dataclass(frozen=True)
class Header:
    """The content of a flagcx.h. ``version``: None before 0.13, whose header was the first with it. ``digest``: of its text."""

    path: Path
    version: str | None
    problems: tuple[str, ...]
    digest: str

    @property
    def release(self) -> str:
        """Identifies the release: nodes with the same release have the same header."""
        return self.version or f"before 0.13 (header {self.digest})"


def header_of(library: Path) -> Header | None:
    """The header that belongs to a library, or None."""
    return next((read_header(path) for path in _header_places(library) if path.is_file()), None)


def _header_places(library: Path) -> Iterator[Path]:
    if library.parent == Path("."):  # the loader found it by its name
        yield from (Path(prefix) / "include" / "flagcx.h" for prefix in ("/usr/local", "/usr"))
        return
    root = library.absolute().parent
    yield from (root.parent / "include" / "flagcx.h", root / "flagcx.h")
    yield root.parent.parent / "flagcx" / "include" / "flagcx.h"


def read_header(path: Path) -> Header:
    """Read a header's version, and compare its structs and values with those that sglang-fl expects."""
    text = path.read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"#define\s+FLAGCX_VERSION_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(number[1] for number in numbers if number) if all(numbers) else None
    return Header(path, version, tuple(_differences(text)), hashlib.sha256(text.encode()).hexdigest()[:8])


def _differences(text: str) -> Iterator[str]:
    body = re.search(r"struct\s+flagcxDeviceHandle\s*\{(.*?)\n\};", text, re.DOTALL)
    fields = re.findall(r"\(\*\s*(\w+)\)\s*\(", body[1]) if body else []
    for place, expected in enumerate(DEVICE_HANDLE):
        found = fields[place] if place < len(fields) else "nothing"
        if found != expected:
            yield f"struct flagcxDeviceHandle has {found} where {expected} is expected"
            break
    values = {"FLAGCX_UNIQUE_ID_BYTES": UNIQUE_ID_BYTES, **DATA_TYPES, **REDUCE_OPS}
    for name, expected_value in values.items():
        value = re.search(rf"\b{name}\b\s*=?\s*(\d+)", text)
        if value is None or int(value[1]) != expected_value:
            yield f"{name} is {value[1] if value else 'missing'}, not {expected_value}"
