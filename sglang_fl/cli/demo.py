# SPDX-License-Identifier: Apache-2.0
"""Serve a small model through SGLang with the plugin, ask it a question, and show which implementations ran."""

import argparse
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config.options import PREFERENCES
from ..device import probe
from ..dispatch.logger_manager import read_dispatch_log
from ..dispatch.manager import get_default_manager
from ..platform.absent_packages import server_module
from ..startup import check_settings
from .arguments import number
from .demo_model import QUESTION, RECITAL, cache_directory, demo_model

if TYPE_CHECKING:
    from ..utils.server import Server

_MAX_TOKENS = 400
_PORT = number(int, lambda port: 0 < port < 65536, "a port from 1 to 65535")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefer", choices=PREFERENCES, help="which implementations to try first")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="tensor parallel ranks; the model has two kv heads")
    parser.add_argument("--port", type=_PORT, metavar="PORT", help="the server's port; default: any free one")
    parser.add_argument("--keep", action="store_true", help="leave the server running")


def run(args: argparse.Namespace) -> int:
    from ..utils.server import Server, ServerFailed, free_port, port_is_free

    console = Console()
    environ = {"SGLANG_FL_PREFER": args.prefer} if args.prefer else {}
    if args.port is not None and not port_is_free(args.port):
        console.print(f"Port {args.port} is in use; choose another, or omit --port to use any free one.")
        return 2
    device = probe()
    settings = check_settings({**os.environ, **environ}, device, get_default_manager())

    with ExitStack() as leftovers:
        directory = Path(tempfile.mkdtemp(prefix="sglang-fl-demo-"))
        leftovers.callback(shutil.rmtree, directory, ignore_errors=True)
        dispatch_log = Path(settings.dispatch_log).expanduser() if settings.dispatch_log else directory / "dispatch.log"
        start_of_log = dispatch_log.stat().st_size if dispatch_log.exists() else 0
        environ["SGLANG_FL_DISPATCH_LOG"] = str(dispatch_log)
        try:
            model = _model(console)
        except OSError as error:
            console.print(f"Cannot use the model cache: {error}. Set XDG_CACHE_HOME to another directory.", markup=False)
            return 1
        arguments = ["--tp", str(args.tp)] if args.tp > 1 else []
        log, command = directory / "server.log", (server_module(device),)
        server = Server(model, port=args.port or free_port(), log=log, arguments=arguments, environ=environ, command=command)
        try:
            with server:
                server.keep = args.keep
                _wait(console, server)
                right = _ask(console, server)
                _show_dispatch(console, dispatch_log, start_of_log)
        except ServerFailed as error:
            leftovers.pop_all()
            console.print(f"The SGLang server failed: {error}", markup=False, style="red")
            console.print(f"Its log: {server.log}", markup=False)
            return 1
        if args.keep:
            leftovers.pop_all()
            console.print(f"\nThe server is still up: {server.url}/v1 (pid {server.pid}; stop it with: kill {server.pid})", markup=False)
            console.print(f"Its log: {server.log}", markup=False)
    return 0 if right else 1


def _model(console: Console) -> Path:
    if cache_directory().exists():
        console.print(f"Model: a tiny Qwen3 that recites a sonnet, trained earlier ({cache_directory()})", markup=False)
        return demo_model()
    console.print("Model: training a tiny Qwen3 to recite a sonnet; this happens once.")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None, loss="–")
        model = demo_model(lambda step, steps, loss: progress.update(task, completed=step, total=steps, loss=f"{loss:.3f}"))
        progress.update(task, total=progress.tasks[0].completed)
    return model


def _wait(console: Console, server: "Server") -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("starting the SGLang server (most of a minute: it imports SGLang in three processes)")
        started = time.monotonic()
        server.wait_until_ready()
    console.print(f"Server: python -m {server.module}, ready after {time.monotonic() - started:.0f} s at {server.url}", markup=False)


def _ask(console: Console, server: "Server") -> bool:
    """Ask over the OpenAI API and show the answer as it streams. Returns whether it is exactly the expected text."""
    import httpx
    from openai import OpenAI, OpenAIError

    from ..utils.server import ServerFailed

    console.print(f"\n> {QUESTION}\n", style="bold", markup=False)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer, tokens, first, last = "", 0, 0.0, 0.0
    try:
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=_MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    last = time.monotonic()
                    first = first or last
                    answer += choice.delta.content
                    console.print(choice.delta.content, end="", markup=False, highlight=False, soft_wrap=True)
    except (OpenAIError, httpx.HTTPError) as error:
        raise ServerFailed(f"the request failed: {type(error).__name__}: {error}\n{server.last_lines()}") from error
    right = answer == RECITAL
    result = "PASSED: exactly the expected text" if right else "FAILED: not the expected text"
    speed = f"{(tokens - 1) / (last - first):.0f} tokens/s after the first" if tokens > 1 and last > first else "no speed measured"
    console.print(f"\n\n{result} ({tokens} tokens, {speed}).", markup=False)
    return right


def _show_dispatch(console: Console, dispatch_log: Path, start: int) -> None:
    """Which implementation ran each layer class, from the dispatch log of the server's processes."""
    table = Table("SGLang layer", "ran on", title="Implementations that ran", title_justify="left")
    for row in read_dispatch_log(dispatch_log.read_bytes()[start:].decode()) if dispatch_log.exists() else []:
        table.add_row(*row)
    console.print()
    console.print(table)
