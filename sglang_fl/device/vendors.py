# SPDX-License-Identifier: Apache-2.0
"""The table of chip vendors: one row a vendor, under the name that FlagGems uses.

The rows are in the order in which chips are looked for; see :mod:`sglang_fl.device.evidence`. Rows that have been run on
hardware are in the README's support table. The others follow the vendors' PyTorch builds and FlagGems, and no machine has
confirmed them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vendor:
    """A vendor's chip.

    Attributes:
        name: the vendor's name, as in ``vendor:<name>`` and GEMS_VENDOR.
        chip: the chip's name, for people.
        device_type: the ``torch.device`` type that its PyTorch build answers to.
        in_tree: SGLang's own platform for it; None: it gets an out-of-tree platform.
        collective: the ``torch.distributed`` backend that its PyTorch build registers.
        attention: the attention backend to serve with when the user names none; None: SGLang chooses.
        commands: tools of its driver, looked for on PATH.
        device_files: what its kernel driver puts under ``/dev`` (glob patterns).
        card_names: how its cards' names begin in a CUDA-compatible PyTorch.
        flaggems: whether FlagGems serves it.
        torch_build: the field of ``torch.version`` (cuda, hip, xpu) that PyTorch must be built with; empty: it is an extension
            of PyTorch, or unknown.
        torch_extension: the Python module that gives PyTorch the device type; empty: none, or unknown.
        pci_vendor: the PCI vendor id of its display devices, where the driver has no device file of its own.
        machine: the operating system and architecture that the chip is part of.
        in_tree_needs: a Python module without which SGLang's own platform does not take the chip.
        capabilities: what it can do without a platform of SGLang's own, of SGLang's ``PlatformCapabilities``.
        compile_backend: what ``torch.compile`` uses on it. ``eager`` where Inductor has no driver for it, and on a CPU, where its first
            compilation takes longer than anything it then saves.
    """

    name: str
    chip: str
    device_type: str
    in_tree: str | None
    collective: str
    attention: str | None
    commands: tuple[str, ...] = ()
    device_files: tuple[str, ...] = ()
    card_names: tuple[str, ...] = ()
    flaggems: bool = True
    torch_build: str = ""
    torch_extension: str = ""
    pci_vendor: str = ""
    machine: tuple[str, str] | None = None
    in_tree_needs: str = ""
    capabilities: tuple[str, ...] = ("supports_triton",)
    compile_backend: str = "inductor"


#: What SGLang can do where a chip imitates CUDA, without NVIDIA's own kernels: its graphs are captured as on CUDA.
CUDA_CAPABILITIES = ("supports_triton", "graph_capture", "piecewise_graph")

# The order is SGLang's own (sglang/srt/platforms/__init__.py): SAIL, CUDA, NPU, ROCm, XPU, MUSA, MPS. Chips that imitate CUDA
# or ROCm come before the chip that they imitate; devices that SGLang does not know come last.
# fmt: off
_ROWS = (
    #       name          chip              device  in_tree  collective  attention      driver's commands     device files             names of cards
    Vendor("thead",      "T-Head SAIL",     "cuda", "sail",  "nccl",     None,          ("ppu-smi",),         ("/dev/alixpu*",),       ("zw",),         torch_build="cuda", flaggems=False),
    Vendor("metax",      "MetaX",           "cuda", None,    "nccl",     "triton",      ("mx-smi",),          ("/dev/mxcd",),          ("metax",),      torch_build="cuda", capabilities=CUDA_CAPABILITIES),
    Vendor("iluvatar",   "Iluvatar CoreX",  "cuda", None,    "nccl",     "triton",      ("ixsmi",),           ("/dev/iluvatar*",),     ("iluvatar",),   torch_build="cuda", capabilities=CUDA_CAPABILITIES),
    Vendor("kunlunxin",  "Kunlunxin",       "cuda", None,    "nccl",     "triton",      ("xpu-smi", "xpu_smi"), ("/dev/xpuctrl",),     ("kunlun", "p800"), torch_build="cuda", capabilities=CUDA_CAPABILITIES),
    Vendor("nvidia",     "NVIDIA GPU",      "cuda", "cuda",  "nccl",     None,          ("nvidia-smi",),      ("/dev/nvidia[0-9]*",),  ("nvidia", "tesla", "geforce", "quadro"), torch_build="cuda"),
    Vendor("ascend",     "Huawei Ascend",   "npu",  "npu",   "hccl",     "ascend",      ("npu-smi",),         ("/dev/davinci[0-9]*",), torch_extension="torch_npu"),
    Vendor("hygon",      "Hygon DCU",       "cuda", None,    "nccl",     "triton",      ("hy-smi",),          (),                      ("hygon", "dcu", "k100", "z100", "bw"), torch_build="hip", capabilities=CUDA_CAPABILITIES),
    Vendor("amd",        "AMD GPU",         "cuda", "rocm",  "nccl",     None,          ("rocm-smi",),        ("/dev/kfd",),           ("amd", "instinct", "radeon"), torch_build="hip"),
    Vendor("intel",      "Intel GPU",       "xpu",  "xpu",   "xccl",     None,          pci_vendor="0x8086", torch_build="xpu", flaggems=False),
    Vendor("mthreads",   "Moore Threads",   "musa", "musa",  "mccl",     None,          ("mthreads-gmi",),    ("/dev/mtgpu*",),        in_tree_needs="torchada", torch_extension="torch_musa"),
    Vendor("apple",      "Apple silicon",   "mps",  "mps",   "gloo",     "torch_native", machine=("Darwin", "arm64"), flaggems=False),
    Vendor("cambricon",  "Cambricon MLU",   "mlu",  None,    "cncl",     "triton",      ("cnmon",),           ("/dev/cambricon_dev*",), torch_extension="torch_mlu"),
    Vendor("enflame",    "Enflame GCU",     "gcu",  None,    "eccl",     "triton",      ("efsmi",),           ("/dev/gcu[0-9]*",), torch_extension="torch_gcu"),
    Vendor("tsingmicro", "TsingMicro",      "txda", None,    "tccl",     "torch_native", ("tsm_smi",), torch_extension="torch_txda", compile_backend="eager"),
    Vendor("sunrise",    "Sunrise",         "ptpu", None,    "tccl",     "torch_native", ("pt_smi",), torch_extension="torch_ptpu"),
    Vendor("aipu",       "ARM China Zhouyi", "aipu", None,   "gloo",     "torch_native", (),                  ("/dev/aipu",)),
    Vendor("cpu",        "CPU",             "cpu",  None,    "gloo",     "torch_native", flaggems=False, capabilities=(), compile_backend="eager"),
)
# fmt: on

VENDORS: dict[str, Vendor] = {row.name: row for row in _ROWS}

#: Names that users write for a vendor.
ALIASES = {"cuda": "nvidia", "npu": "ascend", "musa": "mthreads", "rocm": "amd", "xpu": "intel", "mps": "apple", "sail": "thead"}


def canonical(name: str) -> str:
    """The vendor's own name for a name or an alias of it; an unknown name comes back as it is."""
    name = name.strip().lower()
    return ALIASES.get(name, name)
