# SPDX-License-Identifier: Apache-2.0
"""A pass that runs each replacement, SGLang's own function and float64 on the same inputs. The model continues with SGLang's result.

So errors do not accumulate, and no two runs need to be aligned. The pass is eager.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..check.archive import Recorded, recorded, write_files
from ..check.cases import OPERATORS_CHECKED, Call
from ..check.cases.call import Draw
from ..check.exact.judge import Verdict
from ..check.implementation import results, worst
from ..check.tensors import same_bits
from ..dispatch.ops import FLBackendBase
from ..dispatch.types import OpImpl
from ..model_run import Batch, ModelRun, Replacement
from ..model_run.switches import AtenCall, LayerCall
from .exactly import AtenJudge, alike, is_judged
from .findings import Finding
from .not_judged import refuse

Function = Callable[..., Any]


def side_by_side(
    run: ModelRun, batches: list[Batch], on: Collection[Replacement], archives: str | None = None
) -> tuple[dict[str, Any], list[Finding], dict[Replacement, str]]:
    """Run the pass in this rank. Returns (SGLang's own log-probabilities by batch, findings, what was called and not judged -> why).

    Args:
        on: what to judge. All else is off, so that it takes no part in what these are compared with.
        archives: a directory for the inputs of the first wrong call of each replacement.
    """
    observer = Observer(run, Path(archives) if archives else None)
    refuse(on)
    with run.switches.only(on), run.switches.observed(observer.layer, observer.aten):
        logprobs = {batch.name: run.logprobs(batch) for batch in batches}
    return logprobs, list(observer.findings.values()), observer.not_judged


class Observer:
    """Wraps each replacement and judges each call.

    Attributes:
        findings: by replacement, layer, batch and phase.
        not_judged: replacements with calls that PyTorch has no kernel for -> which. FlagGems's result is used there.
    """

    def __init__(self, run: ModelRun, archives: Path | None = None):
        self._run, self._archives = run, archives
        self.findings: dict[Any, Finding] = {}
        self.not_judged: dict[Replacement, str] = {}
        #: While set, PyTorch's own kernels run, and nothing is judged.
        self._native = False

    def layer(self, call: LayerCall) -> Function:
        watched = _Operator(call.socket.op, self._only_native)
        ours, own = call.forward(watched.around), call.socket.own

        def forward(subject: Any, /, *args: Any, **kwargs: Any) -> Any:
            with self._only_native():
                copies, named = alike((args, kwargs))
            watched.begin()
            problem = None
            try:
                result = ours(subject, *copies, **named)
            except Exception as error:
                result, problem = None, f"raised {type(error).__name__}: {error}"
            native = own(subject, *args, **kwargs)
            with self._only_native():
                if watched.called or problem:  # else the operator's signature cannot express the call
                    differs = problem is not None or _differ(result, native)
                    verdict = Verdict(problem=problem) if problem else watched.verdict()
                    finding = self._finding(call.replacement, call.path)
                    same = not differs and verdict.problem is None
                    finding.add(verdict, watched.of_native(native, verdict if same else None), differs)
                    self._archive(finding, verdict, call.impl, watched.recorded)
            return native

        return forward

    def aten(self, call: AtenCall) -> Function:
        refuse([call.replacement])
        if call.kernel is None:
            return self._without_native(call)
        if not is_judged(call.key):
            return call.kernel
        judge, kernel = AtenJudge(call.key), call.kernel

        def function(*args: Any, **kwargs: Any) -> Any:
            if self._native:
                return kernel(*args, **kwargs)
            with self._only_native():
                before, copies = judge.before(args, kwargs), alike((args, kwargs))
                native = kernel(*args, **kwargs)
                self._judge(call, judge, before, copies, judge.of_native(native, args, kwargs))
            return native

        return function

    def _without_native(self, call: AtenCall) -> Function:
        def function(*args: Any, **kwargs: Any) -> Any:
            self.not_judged[call.replacement] = f"PyTorch has no kernel of its own for aten::{call.key} on this device"
            return call.fn(*args, **kwargs)

        return function

    def _judge(self, call: AtenCall, judge: AtenJudge, before: Any, copies: Any, native: list[Any]) -> None:
        finding = self._finding(call.replacement, call.key)
        exact: list[Any] | None = None
        ours, differs, of_native = Verdict(), True, None
        try:
            found = judge.results(call.fn, *copies)
            if written := judge.wrote(copies, before):
                ours = Verdict(problem=f"wrote {written}, which it may not")
            elif differs := _differ(found, native):
                exact = judge.exact(before)
                ours, of_native = judge.judge(found, native, exact, before)
        except Exception as error:
            ours = Verdict(problem=f"raised {type(error).__name__}: {error}")
        finding.add(ours, of_native, differs)
        self._archive(finding, ours, call.fn, lambda: judge.recorded(before, native, exact))

    def _archive(self, finding: Finding, verdict: Verdict, function: OpImpl | Function, call: Callable[[], Recorded | None]) -> None:
        """Write the inputs of the first wrong call of a replacement."""
        wrong = [one for one in self.findings.values() if one.replacement == finding.replacement and one.archive]
        if self._archives is None or verdict.problem is None or wrong:
            return
        title = f"{finding.replacement.name} {finding.where} {finding.replacement.by}"
        device = torch.device(str(self._run.runner.device))
        try:
            if (found := call()) is not None:
                finding.inputs = found.described()
                finding.archive = write_files(self._archives, title, function, device, found)
        except Exception as error:  # a layer and a function may hold any object
            finding.archive = f"not written: {type(error).__name__}: {error}"

    def _finding(self, replacement: Any, path: str) -> Finding:
        key = (replacement, path, self._run.phase)
        if key not in self.findings:
            self.findings[key] = Finding(replacement, path, *self._run.phase, self._run.rank)
        return self.findings[key]

    @contextmanager
    def _only_native(self) -> Iterator[None]:
        before, self._native = self._native, True
        try:
            yield
        finally:
            self._native = before


@cache
def _template(op: str) -> tuple[Call, list[str]]:
    """An example call of an operator, which says what it may write, and the names of its arguments."""
    draw = Draw(torch.Generator().manual_seed(0), torch.float32, torch.device("cpu"))
    return OPERATORS_CHECKED[op].form(draw), [name for name in inspect.signature(getattr(FLBackendBase, op)).parameters if name != "self"]


class _Operator:
    """Calls of an implementation, with the operator's arguments and the exact results."""

    def __init__(self, op: str, only_native: Callable[[], Any]):
        self._op, self._only_native = op, only_native
        self._checked = OPERATORS_CHECKED.get(op)
        if self._checked is not None:
            self._template, self._names = _template(op)
            if self._template.meaning:  # a call alone does not say what its exact results are
                self._checked = None
        self.begin()

    def begin(self) -> None:
        self.called = False
        self._exact: tuple[Any, ...] = ()
        self._got: tuple[torch.Tensor, ...] = ()
        self._problem: str | None = None
        self._dtype = torch.float32
        self._call_kept: Call | None = None

    def around(self, fn: Function) -> Function:
        def function(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            if self._checked is None:
                return fn(*args, **kwargs)
            with self._only_native():
                call = self._call(args, kwargs)
                before = alike({name: x for name, x in call.inputs.items() if isinstance(x, torch.Tensor)})
                self._exact = self._checked.exact(call)
                self._call_kept = replace(call, inputs={**call.inputs, **before})
            raw: list[Any] = []

            def keeping(*a: Any, **k: Any) -> Any:
                try:
                    raw.append(fn(*a, **k))
                except Exception as error:  # the bridge passes the call on to another implementation or to SGLang
                    self._problem = f"raised {type(error).__name__}: {error}"
                    raise
                return raw[0]

            self._got = results(keeping, call)
            with self._only_native():
                allowed = {*call.may_write, *call.updated}
                written = [name for name, x in before.items() if name not in allowed and not same_bits(x, call.inputs[name])]
                self._problem = f"wrote {', '.join(written)}, which it may not" if written else None
                self._got = tuple(alike(self._got))
            return raw[0]

        return function

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        template = self._template
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        layer: Any = given.pop(self._names[0]) if template.takes_layer else template.layer
        floats = [x for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self._dtype = floats[0].dtype if floats else torch.float32
        may_write = template.may_write | ({"x", "residual"} if given.get("residual") is not None else set())
        return Call(layer, given, may_write, updated=template.updated, takes_layer=template.takes_layer)

    def recorded(self) -> Recorded | None:
        """The last call, for an archive. None: it is not one that a call alone explains."""
        if self._call_kept is None:
            return None
        layer: Any = _plain(self._call_kept.layer)
        return recorded(replace(self._call_kept, layer=layer), self._exact, self._dtype)

    def verdict(self) -> Verdict:
        return Verdict(problem=self._problem) if self._problem else self._worst(self._got)

    def _worst(self, got: tuple[Any, ...]) -> Verdict:
        return worst(self._op, got, self._exact, self._dtype) if self._checked is not None else Verdict()

    def of_native(self, native: Any, same: Verdict | None) -> Verdict | None:
        """The verdict on SGLang's own result, if it has the same parts as the operator's.

        Args:
            same: the verdict on the same numbers, if the implementation returned them.
        """
        leaves = [x for x in pytree.tree_leaves(native) if isinstance(x, torch.Tensor)]
        if self._checked is None or self._checked.whole or len(leaves) != len(self._exact):
            return None
        if any(x.numel() != right.value.numel() for x, right in zip(leaves, self._exact, strict=True)):
            return None
        return same or self._worst(tuple(x.reshape(right.value.shape) for x, right in zip(leaves, self._exact, strict=True)))


def _plain(layer: Any) -> SimpleNamespace:
    """The attributes of a layer that an implementation may read: tensors, numbers and strings."""
    held = {**vars(layer), **getattr(layer, "_parameters", {}), **getattr(layer, "_buffers", {})} if hasattr(layer, "__dict__") else {}
    held |= {name: getattr(layer, name) for name in ("weight", "variance_epsilon") if hasattr(layer, name)}
    plain = (bool, int, float, str, torch.Tensor, type(None))
    return SimpleNamespace(**{name: value for name, value in held.items() if isinstance(value, plain) and not name.startswith("_")})


def _differ(ours: Any, native: Any) -> bool:
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(native)
    return len(a) != len(b) or not all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_bits(a, b)
    return bool(a is b or a == b)
