# SPDX-License-Identifier: Apache-2.0
"""Judges a call of an ATen operator against PyTorch's own kernel in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..aten.native import is_written, schema_of
from ..check.archive import Recorded
from ..check.exact.judge import Exact, Verdict, exactly, u
from ..check.tensors import same_bits

#: A result's error may be this many times the largest error of PyTorch's own kernel: kernels sum in different orders.
_OF_NATIVE = 10.0
_ROUNDINGS = 8
_HAS_FLOAT64 = "cuda"
#: Larger tensors are not copied. In bytes.
_LARGEST = 1 << 30
#: Operators that return indices into the first argument. Where two values are equal, either index is right.
_INDICES = frozenset({"argmax", "argmin", "argsort", "topk", "sort", "max", "min", "median", "kthvalue", "mode"})
#: Operators that return uninitialized memory.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"})


def alike(value: Any) -> Any:
    """Copy all tensors, with the same layout in memory. Tensors as large as a KV cache are passed on uncopied."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        if x.numel() * x.element_size() > _LARGEST:
            return x
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return x.clone()
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    return pytree.tree_map_only(torch.Tensor, copy, value)


def float64_place(device: torch.device) -> torch.device:
    """Where to compute in float64: on the device if it has float64, else on the CPU (slow for matrix products)."""
    return device if device.type == _HAS_FLOAT64 else torch.device("cpu")


def overload_of(key: str) -> Any:
    name, _, overload = key.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


def is_judged(key: str) -> bool:
    """Whether an operator returns the same for the same arguments."""
    return key.partition(".")[0] not in _UNINITIALISED and torch.Tag.nondeterministic_seeded not in overload_of(key).tags


class AtenJudge:
    """Judges calls of one ATen operator."""

    def __init__(self, key: str):
        self.key, self.overload = key, overload_of(key)
        arguments = schema_of(key).arguments
        self._names = [argument.name for argument in arguments]
        self._written = {index: argument.name for index, argument in enumerate(arguments) if is_written(argument)}

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments before a call, with copies of those that the operator writes."""
        positional = tuple(alike(x) if index in self._written else x for index, x in enumerate(args))
        return positional, {name: alike(x) if name in self._written.values() else x for name, x in kwargs.items()}

    def wide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments in float64."""

        def widened(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                here = value.detach().to(float64_place(value.device))
                return here.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
            if isinstance(value, torch.dtype):
                return torch.float64 if value.is_floating_point else value
            return float64_place(value) if isinstance(value, torch.device) else value

        return pytree.tree_map(widened, (args, kwargs))

    def results(self, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        """A function's results, and the arguments that the operator writes."""
        return self.of_native(function(*args, **kwargs), args, kwargs)

    def of_native(self, returned: Any, args: Any, kwargs: Any) -> list[Any]:
        """What a function returned, and the arguments that it wrote."""
        written = [args[index] if index < len(args) else kwargs.get(name) for index, name in self._written.items()]
        return pytree.tree_leaves((returned, written))

    def exact(self, given: tuple[Any, Any]) -> list[Any] | None:
        """The results in float64, or None if PyTorch has no float64 kernel."""
        try:
            return self.results(self.overload, *self.wide(*given))
        except (RuntimeError, TypeError):
            return None

    def recorded(self, given: tuple[Any, Any], native: list[Any], exact: list[Any] | None) -> Recorded:
        """A call, for an archive."""
        both = zip(native, exact or native, strict=False)
        pairs = [(x, y) for x, y in both if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)]
        judged = [self._exact(f"result {n}", x, y.double()) for n, (x, y) in enumerate(pairs)]
        bounds = [one.bound(x.dtype if x.is_floating_point() else torch.float64) for one, (x, _) in zip(judged, pairs, strict=True)]
        expected = [(one.name, one.value, bound, x.dtype) for one, bound, (x, _) in zip(judged, bounds, pairs, strict=True)]
        written = [given[0][index] if index < len(given[0]) else given[1].get(name) for index, name in self._written.items()]
        return Recorded(*given, expected, written)

    def wrote(self, given: tuple[Any, Any], before: tuple[Any, Any]) -> str | None:
        """The first argument that a call wrote although it must not."""
        positional = zip(self._names, given[0], before[0], strict=False)
        for name, now, then in (*positional, *((name, x, before[1][name]) for name, x in given[1].items())):
            if name in self._written.values():
                continue
            pairs = zip(pytree.tree_leaves(now), pytree.tree_leaves(then), strict=True)
            if any(isinstance(x, torch.Tensor) and not same_bits(x, y) for x, y in pairs):
                return name
        return None

    def judge(self, ours: list[Any], native: list[Any], exact: list[Any] | None, given: Any) -> tuple[Verdict, Verdict]:
        """The verdicts on the worst result: (ours, PyTorch's own)."""
        if len(ours) != len(native):
            return Verdict(problem=f"its result has {len(ours)} parts, not {len(native)}"), Verdict()
        verdicts = [self._one(n, a, b, exact[n] if exact else None, given) for n, (a, b) in enumerate(zip(ours, native, strict=True))]
        return max(verdicts, key=lambda pair: (pair[0].problem is not None, pair[0].used), default=(Verdict(), Verdict()))

    def _one(self, number: int, ours: Any, native: Any, exact: Any, given: Any) -> tuple[Verdict, Verdict]:
        name = f"result {number}"
        if not isinstance(native, torch.Tensor):
            return Verdict(problem=None if ours == native else f"{name} is {ours}, not {native}"), Verdict()
        if not isinstance(ours, torch.Tensor) or (ours.shape, ours.dtype) != (native.shape, native.dtype):
            found = f"{ours.dtype} of shape {tuple(ours.shape)}" if isinstance(ours, torch.Tensor) else type(ours).__name__
            return Verdict(problem=f"{name} is {found}, not {native.dtype} of shape {tuple(native.shape)}"), Verdict()
        if not native.is_floating_point():
            return Verdict(problem=self._wrong_integers(name, ours, native, given)), Verdict()
        if not isinstance(exact, torch.Tensor) or exact.dtype != torch.float64 or exact.shape != native.shape:
            return Verdict(), Verdict()
        right = self._exact(name, native, exact)
        return right.judge(ours, native.dtype), right.judge(native, native.dtype)

    @staticmethod
    def _exact(name: str, native: torch.Tensor, exact: torch.Tensor) -> Exact:
        exact = exact.cpu()
        size, off = exact.abs(), (exactly(native) - exact).abs().nan_to_num(posinf=0.0)
        worst = float(off.max()) if off.numel() else 0.0
        rounding = u(native.dtype) * size.nan_to_num(posinf=0.0) if native.is_floating_point() else 0.0
        return Exact(name, exact, size, _ROUNDINGS, rounding + _OF_NATIVE * worst)

    def _wrong_integers(self, name: str, ours: torch.Tensor, native: torch.Tensor, given: Any) -> str | None:
        wrong = int((ours != native).sum())
        if wrong and self.key.partition(".")[0] in _INDICES:
            x, dim = given[0][0], self._dim(given)
            wrong = int((_picked(x, ours, dim) != _picked(x, native, dim)).sum())
        return f"{name} ({native.dtype}): {wrong} of {native.numel()} are not PyTorch's" if wrong else None

    def _dim(self, given: Any) -> int | None:
        index = self._names.index("dim") if "dim" in self._names else -1
        found = given[0][index] if 0 <= index < len(given[0]) else given[1].get("dim")
        return found if isinstance(found, int) else None if self.key.partition(".")[0].startswith("arg") else -1


def _picked(x: torch.Tensor, index: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is None:
        return x.flatten()[index]
    return x.take_along_dim(index if index.dim() == x.dim() else index.unsqueeze(dim), dim)
