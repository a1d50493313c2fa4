# SPDX-License-Identifier: Apache-2.0
"""Checks and times single ATen calls: FlagGems's function against PyTorch's own.

FlagGems's function is registered for the operator, as in serving, and both are called through PyTorch's dispatcher.

A floating-point result is right if its error against float64 is at most 4 times that of PyTorch's own
result, plus 2 units in the last place; others must be equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch

from ..utils.graphs import graphs_of
from .timing import Candidate, CaptureStateLost, capture, compare, first_error, input_sets, warm_up

#: Operators that need positive inputs.
_POSITIVE = frozenset({"bernoulli", "log", "log10", "log1p", "log2", "logit", "multinomial", "pow", "rsqrt", "sqrt"})
#: Operators whose second or only result is an index into the input.
_POSITIONS = frozenset({"argmax", "argmin", "cummax", "cummin", "max", "min", "sort", "topk"})
#: Up to this many numbers the float64 reference is computed on the CPU, above it on the device.
_MOST_ON_CPU = 1 << 24
_REPEATS = 5


class NotMeasurable(ValueError):
    """An argument of the recorded call cannot be reproduced."""


@dataclass
class Call:
    """Arguments of one call.

    Attributes:
        bases: the base tensors of its views, for filling in other data.
        written: the tensors that the operator writes.
    """

    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    bases: list[torch.Tensor] = field(default_factory=list)
    written: list[torch.Tensor] = field(default_factory=list)


class Case:
    """One ATen operator with recorded arguments, and FlagGems's function for it."""

    def __init__(
        self,
        key: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        functions: Sequence[tuple[str, Callable[..., Any]]],
        dispatch_key: str,
    ):
        """``functions``: the (key, function) pairs that are registered together."""
        name, _, overload = key.partition(".")
        self.key, self.overload = key, getattr(getattr(torch.ops.aten, name), overload or "default")
        self.stem = name.strip("_")
        self.args, self.kwargs = list(args), dict(kwargs)
        self.functions, self.dispatch_key = functions, dispatch_key
        self.seeded = torch.Tag.nondeterministic_seeded in self.overload.tags
        schema = self.overload._schema.arguments
        self.named = {a.name: spec for a, spec in zip(schema, self.args, strict=False)} | self.kwargs

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Within the block FlagGems's function is registered for the operator, as by ``flag_gems.only_enable``."""
        library = torch.library.Library("aten", "IMPL")
        try:
            for key, function in self.functions:
                # FlagGems skips keys that this PyTorch does not have.
                with nullcontext() if key == self.key else suppress(RuntimeError):
                    library.impl(key, function, self.dispatch_key)
            yield
        finally:
            library._destroy()

    def build(self, seed: int) -> Call:
        """New arguments with random data.

        Raises:
            NotMeasurable: an argument was not recorded fully.
        """
        call = Call()
        generator_on = cache(lambda device: torch.Generator(device).manual_seed(seed))
        schema = self.overload._schema.arguments
        call.args = [self._made(call, generator_on, a.name, spec) for a, spec in zip(schema, self.args, strict=False)]
        call.kwargs = {name: self._made(call, generator_on, name, spec) for name, spec in self.kwargs.items()}
        for argument, value in [
            *zip(schema, call.args, strict=False),
            *((a, call.kwargs[a.name]) for a in schema if a.name in call.kwargs),
        ]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                call.written += [x for x in _leaves(value) if isinstance(x, torch.Tensor)]
        return call

    # A method: a closure that calls itself would keep the tensors until Python next looks for cycles.
    def _made(self, call: Call, generator_on: Callable[[str], torch.Generator], name: str, spec: Any, position: int | None = None) -> Any:
        if isinstance(spec, list):
            return [self._made(call, generator_on, name, item, i) for i, item in enumerate(spec)]
        if not isinstance(spec, dict):
            return spec
        if "shape" in spec:
            return self._tensor(call, name, spec, position, generator_on(spec["device"]))
        (kind, value), *_ = spec.items()
        if kind == "float":
            return float(value)
        if kind in ("dtype", "layout", "memory_format"):
            return getattr(torch, value)
        if kind == "device":
            return torch.device(value)
        if value == "Generator":
            return None
        raise NotMeasurable(f"{name} was a {value}")

    def _tensor(self, call: Call, name: str, spec: Mapping[str, Any], position: int | None, generator: torch.Generator) -> torch.Tensor:
        shape, stride = spec["shape"], spec["stride"]
        dtype: torch.dtype = getattr(torch, spec["dtype"])
        size = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        base = self._values(size, dtype, generator)
        call.bases.append(base)
        tensor = base.as_strided(shape, stride)
        limit = self._limit(name, position)
        if limit is not None and not dtype.is_floating_point and dtype is not torch.bool and size:
            if 0 in stride and tensor.numel() > 1:
                base.clamp_(max=limit - 1)
            else:
                tensor.copy_(self._places(shape, limit, generator))
        return tensor

    def _values(self, size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        device = generator.device
        if dtype.is_complex:
            raise NotMeasurable(f"complex numbers ({dtype})")
        if self.stem == "assert_async":
            return torch.ones(size, dtype=dtype, device=device)
        if not dtype.is_floating_point:
            return torch.randint(0, 2, (size,), generator=generator, device=device).to(dtype)
        working = dtype if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) else torch.float32
        if self.stem in _POSITIVE:
            return (torch.rand(size, dtype=working, generator=generator, device=device) * 0.9 + 0.05).to(dtype)
        return torch.randn(size, dtype=working, generator=generator, device=device).to(dtype)

    def _limit(self, name: str, position: int | None) -> int | None:
        """For an index argument: the size of the indexed dimension. None for other arguments."""
        target = next(
            (
                self.named[n]["shape"]
                for n in ("self", "weight", "input")
                if isinstance(self.named.get(n), dict) and "shape" in self.named[n]
            ),
            None,
        )
        if not target:
            return None
        if name == "indices":
            return int(target[0 if position is None else position])
        if name == "index" and isinstance(self.named.get("dim"), int):
            return int(target[self.named["dim"]])
        return None

    def _places(self, shape: Sequence[int], limit: int, generator: torch.Generator) -> torch.Tensor:
        """Indices below ``limit``, unique along a dimension if possible, so that writes do not race."""
        dim = self.named["dim"] if isinstance(self.named.get("dim"), int) and len(shape) > 1 else -1
        if not shape or shape[dim] > limit:
            return torch.randint(0, limit, tuple(shape), generator=generator, device=generator.device)
        return torch.rand(tuple(shape), generator=generator, device=generator.device).argsort(dim)

    def run(self, call: Call, active: AbstractContextManager[None] | None = None) -> list[Any]:
        """The tensors that the call returns and writes, as a flat list."""
        with active or nullcontext():
            result = self.overload(*call.args, **call.kwargs)
        return [*_leaves(result), *call.written]

    def exact(self, call: Call) -> list[Any] | None:
        """The same in float64, or None if the operator does not support it."""
        numbers = sum(base.numel() for base in call.bases)

        def convert(value: Any) -> Any:
            if isinstance(value, list):
                return [convert(item) for item in value]
            if isinstance(value, torch.Tensor):
                value = value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
                return value.cpu() if numbers <= _MOST_ON_CPU else value
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return torch.float64
            if isinstance(value, torch.device) and numbers <= _MOST_ON_CPU:
                return torch.device("cpu")
            return value

        schema = self.overload._schema.arguments
        args, kwargs = convert(call.args), {name: convert(value) for name, value in call.kwargs.items()}
        named = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        written = [
            x for a in schema if a.name in named and a.alias_info is not None and a.alias_info.is_write for x in _leaves(named[a.name])
        ]
        try:
            return [*_leaves(self.overload(*args, **kwargs)), *written]
        except Exception:  # the operator does not support float64; PyTorch's own result is used instead
            return None

    def disagreement(self, call: Call, got: Sequence[Any], own: Sequence[Any], exact: Sequence[Any] | None) -> str | None:
        """How results differ from PyTorch's own beyond the bound, or None."""
        if len(got) != len(own):
            return f"{len(got)} results instead of {len(own)}"
        for i, (x, y) in enumerate(zip(got, own, strict=True)):
            what = f"result {i}" if len(got) > 1 else "its result"
            if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
                if x != y:
                    return f"{what} is {x!r}, PyTorch's is {y!r}"
            elif x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
                return f"{what} is {tuple(x.shape)} {x.dtype} on {x.device}, PyTorch's is {tuple(y.shape)} {y.dtype} on {y.device}"
            elif not x.dtype.is_floating_point:
                if not torch.equal(x, y) and not self._same_places(call, x, y):
                    return f"{what}: {int((x != y).sum())} of {x.numel()} differ"
            else:
                why = _too_far(x, y, exact[i] if exact is not None and len(exact) == len(got) else None)
                if why is not None:
                    return f"{what} {why}"
        return None

    def _same_places(self, call: Call, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether different indices point to equal values of the input. Then either index is right."""
        if self.stem not in _POSITIONS or self.named.get("stable") is True or x.dtype is not torch.int64:
            return False
        data, dim = call.args[0], self.named.get("dim")
        dim = dim if isinstance(dim, int) else None if self.stem.startswith("arg") else -1
        if dim is None:
            return torch.equal(data.flatten()[x], data.flatten()[y])
        if x.dim() < data.dim():
            x, y = x.unsqueeze(dim), y.unsqueeze(dim)
        return torch.equal(data.gather(dim, x), data.gather(dim, y))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _too_far(got: torch.Tensor, own: torch.Tensor, exact: Any) -> str | None:
    eps = torch.finfo(got.dtype).eps
    if isinstance(exact, torch.Tensor) and exact.shape == got.shape and exact.is_floating_point():
        wanted = exact.double()
        got, own = got.to(wanted.device).double(), own.to(wanted.device).double()
        known = wanted.isfinite() & own.isfinite()
        own_error = (own - wanted)[known].abs()
        worst = own_error.max().item() if own_error.numel() else 0.0
        allowed = 4 * worst + 2 * eps * wanted.abs()
        reference = f"float64; PyTorch's own result is off by {worst:.3g}"
    else:
        wanted, got, own = own.double(), got.double(), own.double()
        known = wanted.isfinite()
        size = wanted[known].abs().max().item() if known.any() else 0.0
        allowed = torch.full_like(wanted, 4 * eps * size)
        reference = "PyTorch's own result"
    if not torch.equal(got.masked_fill(known, 0.0).nan_to_num(nan=12345.0), own.masked_fill(known, 0.0).nan_to_num(nan=12345.0)):
        return "has other infinities or NaNs than PyTorch's own"
    error = (got - wanted).abs()
    bad = known & ~(error <= allowed)
    if not bad.any():
        return None
    worst_bad = error[bad].nan_to_num(nan=float("inf")).max().item()
    return f"is off by {worst_bad:.3g} from {reference}, in {int(bad.sum())} of {bad.numel()} places"


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Check FlagGems's result, and whether its call replays in a graph with new data.

    ``right`` is None if results are random. ``graph_safe`` is None if PyTorch's own call cannot be captured either.
    ``lost``: this process cannot continue.
    """
    call = case.build(0)
    try:
        own = case.run(call)
    except Exception as error:
        return {"error": f"PyTorch's own operator: {first_error(error)}"}
    call = case.build(0)
    try:
        got = case.run(call, case.registered())
        _synchronize(device)
    except Exception as error:
        return {"right": False, "why": first_error(error)}
    found: dict[str, Any] = {"right": None, "why": "its results are random"}
    if not case.seeded:
        fresh = case.build(0)
        why = case.disagreement(fresh, got, own, case.exact(fresh))
        if why is None and not _repeats(case, case.registered) and _repeats(case, nullcontext):
            why = "its result differs from run to run, and PyTorch's own does not"
        found = {"right": why is None, "why": why}
    if found["right"] is False or graphs_of(device) is None:
        return found
    try:
        why = _replay_error(case, nullcontext, compare_results=not case.seeded)
    except CaptureStateLost as error:
        return found | {"graph_why": f"PyTorch's own cannot be captured either: {error}", "lost": True}
    if why is not None:
        return found | {"graph_why": f"PyTorch's own cannot be captured either: {why}"}
    try:
        why = _replay_error(case, case.registered, compare_results=not case.seeded)
    except CaptureStateLost as error:
        return found | {"graph_safe": False, "graph_why": str(error), "lost": True}
    return found | {"graph_safe": why is None, "graph_why": why}


def _repeats(case: Case, active: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether the same call returns the same bits each time."""
    first, *others = ([x for x in case.run(case.build(0), active()) if isinstance(x, torch.Tensor)] for _ in range(_REPEATS))
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for other in others for x, y in zip(first, other, strict=True))


def _replay_error(case: Case, active: Callable[[], AbstractContextManager[None]], *, compare_results: bool) -> str | None:
    """The error of a capture and a replay with new data, or None."""
    call = case.build(1)
    candidate = Candidate([partial(case.overload, *call.args, **call.kwargs)], active)
    try:
        warm_up(candidate)
        graph, result = capture(candidate, 1)
        fresh = case.build(2)
        for base, data in zip(call.bases, fresh.bases, strict=True):
            base.copy_(data)
        graph.replay()
        torch.cuda.synchronize()
    except CaptureStateLost:
        raise
    except Exception as error:
        return first_error(error)
    if not compare_results:
        return None
    replayed = [*_leaves(result), *call.written]
    eager = case.run(case.build(2), active())
    why = case.disagreement(case.build(2), replayed, eager, None)
    return None if why is None else f"replayed with new data, {why.replace('PyTorch', 'the eager call')}"


def time(case: Case, device: torch.device, *, graphs: bool, rounds: int) -> dict[str, Any]:
    """:class:`~sglang_fl.tune.timing.Timing` of PyTorch's own call, and of FlagGems's (``theirs``)."""
    first = case.build(0)
    outputs = [x for x in case.run(case.build(0)) if isinstance(x, torch.Tensor)]
    count = input_sets(sum(x.numel() * x.element_size() for x in (*first.bases, *outputs)), device)
    calls = [partial(case.overload, *call.args, **call.kwargs) for call in (first, *(case.build(i) for i in range(1, count)))]
    timings = compare({"own": Candidate(calls), "theirs": Candidate(calls, case.registered)}, device, rounds, graphs=graphs)
    return {name: asdict(timing) for name, timing in timings.items()}


def _synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()
