# SPDX-License-Identifier: Apache-2.0
import threading
from dataclasses import dataclass, replace

import pytest

from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import BackendImplKind, BackendPriority, OpImpl, OpManager, OpRegistry, match_token
from sglang_fl.dispatch.types import DTYPE_NAMES, LazyFunction, parse_arch


def impl(impl_id: str = "default.flagos", kind: BackendImplKind = BackendImplKind.DEFAULT, **more: object) -> OpImpl:
    return OpImpl("rms_norm", impl_id, kind, lambda obj, x, residual=None: x, **more)  # type: ignore[arg-type]


def test_names_and_values_that_vendors_rely_on() -> None:
    assert [kind.value for kind in BackendImplKind] == ["flagos", "triton", "reference", "vendor"]
    assert [priority.value for priority in BackendPriority] == [150, 125, 100, 50]
    positional = OpImpl("op", "vendor.x", BackendImplKind.VENDOR, print, "x", 3, frozenset({"bfloat16"}), "9.0")
    assert (positional.vendor, positional.priority, positional.supported_dtypes, positional.min_arch) == ("x", 3, {"bfloat16"}, "9.0")


def test_vendor_implementation_needs_a_vendor() -> None:
    with pytest.raises(ValueError, match=r"rms_norm.*vendor\.x.*vendor"):
        impl("vendor.x", BackendImplKind.VENDOR)


def test_an_implementation_is_a_value() -> None:
    one = impl()
    with pytest.raises(AttributeError):
        one.priority = 3  # type: ignore[misc]
    assert hash(one) == hash(OpImpl(one.op_name, one.impl_id, one.kind, one.fn))


@pytest.mark.parametrize(
    ("token", "matches"),
    [
        ("vendor", True),
        ("vendor:metax", True),
        ("vendor:cuda", False),
        ("impl:vendor.metax", True),
        ("impl:vendor.metax2", False),
        ("flagos", False),
        ("reference", False),
        ("sglang", False),
        ("metax", False),
    ],
)
def test_tokens(token: str, matches: bool) -> None:
    assert match_token(impl("vendor.metax", BackendImplKind.VENDOR, vendor="metax"), token) is matches


def test_vendor_token_means_vendor_kind_only() -> None:
    assert not match_token(impl("default.flagos", vendor="metax"), "vendor:metax")


def test_available_without_a_check() -> None:
    assert impl().is_available()


def test_availability_check_and_its_exception() -> None:
    def fn(obj: object, x: object) -> object:
        return x

    fn._is_available = lambda: False  # type: ignore[attr-defined]
    one = OpImpl("op", "default.flagos", BackendImplKind.DEFAULT, fn)
    assert not one.is_available()
    assert one.why_unavailable() == "its availability check returned False"

    def broken() -> bool:
        raise OSError("libfoo.so: cannot open shared object file")

    fn._is_available = broken  # type: ignore[attr-defined]
    assert not one.is_available()
    assert "OSError: libfoo.so: cannot open" in str(one.why_unavailable())


def test_availability_of_a_bound_method() -> None:
    class Backend:
        def op(self, x: object) -> object:
            return x

        op._is_available = lambda: False  # type: ignore[attr-defined]

    assert not OpImpl("op", "default.flagos", BackendImplKind.DEFAULT, Backend().op).is_available()


@pytest.mark.parametrize("arch", [(9, 0), "9.0", "sm90", "sm_90", "90", 90])
def test_min_arch_spellings(arch: object) -> None:
    assert parse_arch(arch) == (9, 0)


def test_min_arch_two_digits() -> None:
    assert parse_arch("sm100") == parse_arch(100) == parse_arch("10.0") == (10, 0)


def test_min_arch_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="hopper"):
        impl(min_arch="hopper")


def test_min_arch_against_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = impl(min_arch=(9, 0))
    for capability, word in (((8, 9), "this one has 8.9"), (None, "reports none"), ((9, 0), None), ((10, 0), None)):
        monkeypatch.setattr("sglang_fl.dispatch.types.device_capability", lambda found=capability: found)
        assert (one.why_unavailable() is None) == (word is None)
        assert word is None or word in str(one.why_unavailable())


def test_registry_refuses_a_second_impl_of_one_id() -> None:
    registry = OpRegistry()
    registry.register_impl(impl())
    with pytest.raises(ValueError, match=r"Duplicate impl_id 'default\.flagos'"):
        registry.register_impl(impl())
    assert len(registry.get_implementations("rms_norm")) == 1


def test_register_many_is_all_or_nothing() -> None:
    registry = OpRegistry()
    registry.register_impl(impl())
    with pytest.raises(ValueError, match="Duplicate"):
        registry.register_many([impl("reference.torch", BackendImplKind.REFERENCE), impl()])
    assert [i.impl_id for i in registry.get_implementations("rms_norm")] == ["default.flagos"]
    version = registry.version
    with pytest.raises(TypeError, match="expected an OpImpl, found 'no impl'"):
        registry.register_many([impl("reference.torch", BackendImplKind.REFERENCE), "no impl"])  # type: ignore[list-item]
    assert [i.impl_id for i in registry.get_implementations("rms_norm")] == ["default.flagos"] and registry.version == version
    with pytest.raises(TypeError):
        OpRegistry().register_impl("no impl")  # type: ignore[arg-type]


def test_registry_queries() -> None:
    registry = OpRegistry()
    assert registry.list_operators() == []
    registry.register_impl(impl())
    before = registry.snapshot()
    registry.register_impl(impl("reference.torch", BackendImplKind.REFERENCE))
    assert registry.list_operators() == ["rms_norm"]
    assert registry.get_implementation("rms_norm", "reference.torch") is not None
    assert registry.get_implementation("rms_norm", "nope") is None
    assert registry.get_implementation("nope", "reference.torch") is None
    assert len(before.impls_by_op["rms_norm"]) == 1
    registry.clear()
    assert registry.list_operators() == []
    assert registry.get_implementations("rms_norm") == []


def test_registering_from_many_threads_loses_nothing() -> None:
    registry = OpRegistry()
    start = threading.Barrier(8)

    def register(number: int) -> None:
        start.wait()
        for i in range(50):
            registry.register_impl(impl(f"default.{number}.{i}"))

    threads = [threading.Thread(target=register, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.get_implementations("rms_norm")) == 400


def test_dtypes_may_be_named() -> None:
    import torch

    named = OpImpl("rms_norm", "a", BackendImplKind.REFERENCE, print, supported_dtypes=frozenset({"bfloat16", torch.float16}))
    assert named.dtypes() == {torch.bfloat16, torch.float16}
    assert OpImpl("rms_norm", "a", BackendImplKind.REFERENCE, print).dtypes() is None
    assert impl(supported_dtypes="bfloat16").dtypes() == {torch.bfloat16}, "a string is no set of letters"
    assert impl(supported_dtypes=torch.float16).dtypes() == {torch.float16}


@pytest.mark.parametrize(("given", "meant"), [({"bf16"}, "bfloat16"), ("bfloat61", "bfloat16"), (["fp32"], ""), ({"float16", 16}, "")])
def test_a_dtype_that_there_is_not_is_refused_at_once(given: object, meant: str) -> None:
    """Not when a layer is bound, after the weights were loaded."""
    with pytest.raises(ValueError, match=rf"rms_norm: default.flagos names the dtype .*, which PyTorch does not have.*{meant}"):
        impl(supported_dtypes=given)


def test_the_names_of_dtypes_are_pytorchs() -> None:
    import torch

    assert [name for name in DTYPE_NAMES if not isinstance(getattr(torch, name, None), torch.dtype)] == []
    floating = {name for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype) and dtype.is_floating_point}
    assert floating <= DTYPE_NAMES


def test_a_copy_of_a_lazy_implementation_is_lazy_too() -> None:
    """With its availability check, and without its kernels."""
    lazy = LazyFunction("no_such_package.kernels", "rms_norm", lambda settings, device: "no such chip")
    impl = replace(OpImpl("rms_norm", "vendor.x", BackendImplKind.VENDOR, lazy, vendor="x"), priority=7)
    assert impl.priority == 7 and impl.why_unavailable(Settings(), Device("cpu", "cpu", None, "a test")) == "no such chip"


def test_an_implementation_may_be_a_callable_without_a_hash() -> None:
    @dataclass
    class Kernel:
        factor: int

        def __call__(self, x: int) -> int:
            return self.factor * x

    registry = OpRegistry()
    registry.register_impl(OpImpl("op", "default.flagos", BackendImplKind.DEFAULT, Kernel(3)))
    assert OpManager(registry).call("op", 2) == 6
