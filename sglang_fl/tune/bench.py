# SPDX-License-Identifier: Apache-2.0
"""One engine at a time, whose choice of implementations can be changed while it runs."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CONFIG_FILE, config_files
from ..dispatch.ops import OPERATORS
from .engine import CommandFailed, Engine, EngineFailed, uninterrupted
from .judge import FUNCTION
from .served import Lengths, cases
from .traffic import Requests

#: Settings that tune chooses itself.
_CHOSEN = re.compile(r"_SGLANG_FL_.*|SGLANG_FL_(PER_OP|PREFER|FLAGOS_.*LIST)|SGLANG_FLAGGEMS_.*|USE_FLAGGEMS|SGLANG_PLUGINS")
_MODULES, _LIVE = "SGLANG_FL_PLUGIN_MODULES", "sglang_fl.tune.live"
_START_SECONDS = 1800.0


@dataclass(frozen=True)
class Choice:
    """The implementations of operators that are not SGLang's own, and the FlagGems functions that replace PyTorch's."""

    impls: tuple[tuple[str, str], ...] = ()
    functions: tuple[str, ...] = ()

    @classmethod
    def of(cls, impls: Mapping[str, str], functions: Sequence[str]) -> "Choice":
        return cls(tuple(sorted(impls.items())), tuple(sorted(functions)))

    def orders(self) -> dict[str, list[str]]:
        """An order for every operator."""
        chosen = dict(self.impls)
        return {op: [f"impl:{chosen[op]}", "sglang"] if op in chosen else ["sglang"] for op in sorted({*OPERATORS, *chosen})}

    def entries(self) -> list[str]:
        """The names of its entries in a profile."""
        return [*dict(self.impls), *(FUNCTION + name for name in self.functions)]

    def environ(self) -> dict[str, str]:
        """The environment of an engine that starts with this choice."""
        found = {"SGLANG_FL_PER_OP": ";".join(f"{op}={'|'.join(order)}" for op, order in self.orders().items())}
        return found | ({"SGLANG_FL_FLAGOS_WHITELIST": ",".join(self.functions)} if self.functions else {"USE_FLAGGEMS": "0"})

    def __str__(self) -> str:
        return ", ".join([*(f"{op}={impl}" for op, impl in self.impls), *self.functions]) or "SGLang's own"


NATIVE = Choice()


class StartFailed(RuntimeError):
    """An engine with SGLang's own everywhere did not start: no candidate is to blame."""


def with_profile(profile: Path) -> str:
    """The user's settings files and a profile, which overrides them: a value of SGLANG_FL_CONFIG."""
    return ",".join([*(name for name in config_files(os.environ) if name != str(profile)), str(profile)])


def _changeable(choice: Choice) -> dict[str, str]:
    """The environment of an engine that starts with this choice, and can be told another one."""
    return {_MODULES: ",".join(filter(None, (os.environ.get(_MODULES), _LIVE))), **choice.environ()}


class Bench:
    """Starts engines and measures them. Use it in a ``with`` statement, which ends them.

    Args:
        argv: the server's arguments, including the model's.
        directory: for logs.
    """

    def __init__(self, argv: Sequence[str], directory: Path, lengths: Lengths, batches: Sequence[int]):
        self.cases, self._lengths = cases(batches), lengths
        self._argv, self._directory = list(argv), directory
        self._engine: Engine | None = None
        self._choice: Choice | None = None
        self._about: dict[str, Any] = {}
        self.starts = 0

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with uninterrupted():
            if kind is None or self._engine is None:
                self.stop()
            else:  # it may be busy and not answer
                self._engine.kill()

    @property
    def is_up(self) -> bool:
        return self._engine is not None and self._engine.ready

    def start(self, environ: Mapping[str, str] | None = None) -> None:
        """Start an engine, and end the previous one. Without an environment: SGLang's own everywhere, changeable while it runs.

        Raises:
            StartFailed: it does not start with SGLang's own everywhere.
            EngineFailed: it does not start with this environment.
        """
        self.stop()
        self.starts += 1
        kept = {name: value for name, value in os.environ.items() if not _CHOSEN.fullmatch(name)}
        kept |= {"PYTHONHASHSEED": "0", "SGLANG_FL_TRIAL_RECORD": str(self._directory / "trials.json")}
        environ = _changeable(NATIVE) if environ is None else environ
        directory = self._directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{self.starts}"
        self._engine = Engine("engine", {"argv": self._argv}, directory, {**kept, **environ})
        try:
            self._engine.start()
            self._engine.wait_until_ready(time.perf_counter() + _START_SECONDS)
        except EngineFailed as error:
            self.stop()
            if environ == _changeable(NATIVE):
                raise StartFailed(str(error)) from error
            raise
        self._choice = NATIVE

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.request_stop()
            self._engine.wait(time.perf_counter() + 20)
            self._engine.kill()
            self._engine = self._choice = None

    def ask(self, do: str, **values: Any) -> Any:
        """Run a command of ``live.py`` in the processes of the model."""
        if not self.is_up:
            self.start()
        with self._watched() as engine:
            return engine.ask("tune", command=json.dumps({"do": do, **values}))["answer"]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Engine]:
        """The engine. One that fails is ended, and the next use starts a new one."""
        assert self._engine is not None
        try:
            yield self._engine
        except CommandFailed:
            raise
        except EngineFailed:
            self.stop()
            raise

    def about(self) -> dict[str, Any]:
        """See :meth:`sglang_fl.tune.live.Live.describe`."""
        if not self._about:
            self._about = self.ask("describe")
        return self._about

    def know(self, about: dict[str, Any]) -> None:
        """Set the description from an earlier engine of the same kind."""
        self._about = about

    def use(self, choice: Choice) -> dict[str, str]:
        """Switch the engine to a choice. Returns the parts that are not in force: entry -> why."""
        if not self.is_up:
            self.start()
        if choice == self._choice:
            return {}
        if self.about()["draft"]:  # whose graphs cannot be captured again in a running engine
            self.start(_changeable(choice))
            found = self.ask("in_force")
        else:
            self._choice = None
            found = self.ask("use", orders=choice.orders(), functions=choice.functions)
        self._choice = choice
        bound: dict[str, list[str]] = found["bound"]
        missing = {
            op: "; ".join(bound.get(op, ["nothing in the model runs on it"]))
            for op, impl in choice.impls
            if not any(f"({impl})" in to for to in bound.get(op, ()))
        }
        return missing | {FUNCTION + name: "it is left to PyTorch" for name in choice.functions if name not in found["functions"]}

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each case: the prefill of a batch, or one decode step. Rounds with the same number have the same prompts."""
        found, vocabulary = {}, self.about()["vocabulary"]
        for index, case in enumerate(self.cases):
            with self._watched() as engine:
                prompts = case.prompts(vocabulary, self._lengths, (number, index))
                found[str(case)] = case.measure(engine, prompts, self._lengths)["seconds"]
        return found

    def show(self) -> None:
        """Have each case computed once, and the recorder told which it is."""
        for index, case in enumerate(self.cases):
            self.ask("label", phase=case.phase, batch=case.batch)
            with self._watched() as engine:
                case.show(engine, case.prompts(self.about()["vocabulary"], self._lengths, (0, index)))

    def send(self, requests: Requests) -> None:
        """Serve requests, one batch after the other."""
        with self._watched() as engine:
            for batch in requests:
                engine.ask("flush")
                engine.ask("serve", arguments=batch)

    def environ_of(self, profile: Path | None) -> dict[str, str]:
        """The environment of an engine as a user starts it: with a profile, or native."""
        if profile is not None:
            return {CONFIG_FILE: with_profile(profile)}
        # On a plain CPU SGLang needs our platform; its layers stay SGLang's own.
        return NATIVE.environ() if self.about()["plain_cpu"] else {"SGLANG_PLUGINS": "none"}
