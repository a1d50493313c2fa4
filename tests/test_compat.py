# SPDX-License-Identifier: Apache-2.0
import pytest

from sglang_fl import compat


def test_the_installed_sglang_is_supported() -> None:
    compat.check_platform()
    compat.check_groups()
    compat.check_layers()


@pytest.mark.parametrize(
    ("path", "parameters", "told"),
    [
        ("sglang.srt.platforms.interface:SRTPlatform.gone", ("self",), "SRTPlatform.gone is missing"),
        ("sglang.srt.nowhere:f", (), r"sglang.srt.nowhere:f is missing \(No module named"),
        ("sglang.kernels.fused_op:BaseFusedOp.enter_torch_compile", ("self",), r"takes \(self, num_tokens\), not \(self\)"),
    ],
)
def test_what_is_missing_or_of_another_shape_is_named(
    path: str, parameters: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_PLATFORM", {path: parameters})
    with pytest.raises(compat.IncompatibleSGLang, match=told) as caught:
        compat.check_platform()
    assert f"SGLang {compat.installed_version()} (supported: " in str(caught.value)
    assert "Install a supported SGLang" in str(caught.value)


def test_a_missing_attribute_of_the_layers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_FUSED_OP_ATTRIBUTES", ("_forward_method", "_tomorrow"))
    with pytest.raises(compat.IncompatibleSGLang, match="BaseFusedOp has no attribute _tomorrow"):
        compat.check_layers()


def test_groups_that_are_made_in_another_way_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_GROUP_ARGUMENTS", ("use_pynccl", "use_tomorrow"))
    with pytest.raises(compat.IncompatibleSGLang, match=r"GroupCoordinator.__init__ takes no use_tomorrow"):
        compat.check_groups()
