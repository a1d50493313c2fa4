# SPDX-License-Identifier: Apache-2.0
"""What is done with an SGLang that differs from the one sglang-fl was made for."""

import importlib
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sglang_fl import compat, load_plugin, startup
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch.manager import get_default_manager
from sglang_fl.platform.hooks import PlatformHooks

CHECKOUT = Path(__file__).parents[1]
SERVING = [*compat.PLATFORM, *compat.ARGUMENTS, *compat.LAYERS]


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    cached: list[Any] = [compat.platform_problems, compat.argument_problems, compat.layer_problems, compat.gated_delta_rule_problems]
    for function in cached:
        function.cache_clear()


@pytest.fixture
def relied_on() -> None:
    """For tests that change one thing in an SGLang that has all."""
    if compat.binding_problems() or compat.gated_delta_rule_problems():
        pytest.skip("this SGLang differs from the one relied on; the first test says in what")
    forget()


def owner_of(path: str) -> tuple[Any, str]:
    """Where SGLang keeps what a path names, and under which name."""
    module, _, names = path.partition(":")
    owner = importlib.import_module(module)
    *parents, name = names.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def remove(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = owner_of(path)
    for cls in getattr(owner, "__mro__", (owner,)):
        if name in vars(cls) and cls is not object:
            monkeypatch.delattr(cls, name)


def reshape(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*owner_of(path), lambda tomorrow: None)


class Native:
    """SGLang's own platform, as far as the hooks go on to it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def apply_server_args_defaults(self, server_args: Any) -> None:
        self.calls.append("arguments")

    def post_load_model(self, model: Any) -> None:
        self.calls.append("model")

    def is_out_of_tree(self) -> bool:
        return False


class Platform(PlatformHooks, Native):
    device = Device("cpu", "cpu", None, "a test")


def serve(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> bool:
    """Start as a server does, and a worker of it; whether the model was bound, and with it SGLang's kernels."""
    get_default_manager().ensure_initialized()
    monkeypatch.setattr(startup, "resolve", lambda device: Settings(**settings))
    monkeypatch.setenv(compat.LEFT_TO_SGLANG, "")  # for its end
    monkeypatch.delenv(compat.LEFT_TO_SGLANG)
    bound: list[Any] = []
    kernels: list[Device] = []
    bind = SimpleNamespace(bind_model=lambda model, device: bound.append(model), bind_kernels=lambda device: kernels.append(device) or {})
    monkeypatch.setitem(sys.modules, "sglang_fl.bind", bind)  # type: ignore[arg-type]
    platform = Platform()
    platform.apply_server_args_defaults(None)
    platform.post_load_model(None)  # type: ignore[arg-type]
    assert platform.calls == ["arguments", "model"], "SGLang's own come in any case"
    monkeypatch.setattr("sglang.srt.platforms.current_platform", platform)
    monkeypatch.setattr("sglang_fl.config.process.settings_of_parent", lambda: Settings(**settings))
    load_plugin()
    assert len(kernels) == 2 * len(bound), "in the main process and in the worker"
    return bool(bound)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_installed_sglang_has_all_that_is_relied_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    differences = (*compat.binding_problems(), *compat.gated_delta_rule_problems(), *compat.group_problems(), *compat.tune_problems())
    assert not differences, "\n" + "\n".join(differences)
    monkeypatch.setattr(compat, "installed_version", lambda: "0.5.23")
    assert serve(monkeypatch) and warnings(caplog) == []


@pytest.mark.usefixtures("relied_on")
@pytest.mark.parametrize("change", [remove, reshape])
@pytest.mark.parametrize("path", SERVING)
def test_if_any_shape_differs_everything_is_left_to_sglang(
    path: str, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(path, monkeypatch)
    assert not serve(monkeypatch)
    (warning,) = warnings(caplog)
    assert "leaves everything to SGLang" in warning and f"SGLang {compat.installed_version()}" in warning and compat.TESTED in warning
    expected = "is missing" if change is remove else r"takes \(tomorrow\), not \("
    assert re.search(rf"^  - {re.escape(path)} {expected}", warning, re.M), warning
    assert re.search(r"its own collectives and kernels \(.*alloc_decode_kernel.*\)\.", warning)


@pytest.mark.usefixtures("relied_on")
@pytest.mark.parametrize("name", compat.LAYER_ATTRIBUTES)
def test_if_a_layer_has_another_attribute_everything_is_left_to_sglang(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.activation import SiluAndMul

    make = SiluAndMul.__init__

    def without(layer: Any) -> None:
        make(layer)
        delattr(layer, name)

    monkeypatch.setattr(SiluAndMul, "__init__", without)
    assert not serve(monkeypatch)
    (warning,) = warnings(caplog)
    assert f"BaseFusedOp has no attribute {name}" in warning


def test_under_strict_the_server_stops_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    remove(SERVING[-1], monkeypatch)
    with pytest.raises(compat.IncompatibleSGLang, match=rf"sglang-fl cannot be used[\s\S]*{re.escape(SERVING[-1])} is missing"):
        serve(monkeypatch, strict=True)


def test_an_import_that_fails_is_a_difference_too() -> None:
    problems = compat.differences_from({"sglang.srt.nowhere:f": ""})
    assert problems() == ("sglang.srt.nowhere:f is missing (ModuleNotFoundError: No module named 'sglang.srt.nowhere')",)


@pytest.mark.usefixtures("relied_on")
@pytest.mark.parametrize("path", compat.GATED_DELTA_RULE)
def test_each_shape_of_the_gated_delta_rule(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reshape(path, monkeypatch)
    assert any(problem.startswith(f"{path} takes (tomorrow)") for problem in compat.gated_delta_rule_problems())
    assert not compat.binding_problems(), "models without it are served as ever"


@pytest.mark.parametrize("path", compat.GROUPS)
def test_groups_that_are_made_in_another_way_stop_flagcx(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reshape(path, monkeypatch)
    with pytest.raises(compat.IncompatibleSGLang, match="takes no torch_distributed_backend and no use_pynccl"):
        compat.refuse(compat.group_problems())


@pytest.mark.usefixtures("relied_on")
@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.5.24.dev0", "0.6.0rc1", "of unknown version"])
def test_an_untested_release_with_all_shapes_serves_with_a_warning(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    assert serve(monkeypatch)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"SGLang {version} is outside the range that sglang-fl was tested with ({compat.TESTED})")


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.23+cu130"])
def test_tested_releases(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    assert compat.version_warning() is None


def test_the_tested_range_is_the_same_everywhere() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["sglang"])
    (least,) = [part.version for part in SpecifierSet(compat.TESTED) if part.operator == ">="]
    assert (extra.name, str(extra.specifier)) == ("sglang", f">={least}"), "a newer SGLang is not refused"
    assert f"SGLANG := sglang{compat.TESTED}\n" in (CHECKOUT / "Makefile").read_text()
    for readme in ("README.md", "README_zh.md"):
        assert re.search(rf"uv pip install '\.\[sglang\]' .*SGLang {re.escape(least)}", (CHECKOUT / readme).read_text()), readme


def test_what_sglang_fl_requires_leaves_a_vendors_pytorch_alone() -> None:
    """Of all that pip installs with sglang-fl, without extras, nothing is PyTorch or SGLang, which pins it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted, seen = [Requirement(line) for line in project["dependencies"]], set()
    while wanted:
        requirement = wanted.pop()
        if requirement.name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        try:
            wanted += map(Requirement, requires(requirement.name) or ())
        except PackageNotFoundError:
            pytest.fail(f"{requirement.name} is required and not installed")
    assert "pyyaml" in seen and not seen & {"torch", "sglang", "triton", "numpy"}, sorted(seen)
