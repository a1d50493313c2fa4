# SPDX-License-Identifier: Apache-2.0
"""What each chip vendor's name means: one row a vendor, in the names FlagGems uses.

``device_type``  the ``torch.device`` type its PyTorch build answers to.
``in_tree``      the platform SGLang itself has for it, or None: an out-of-tree platform then.
``collective``   the ``torch.distributed`` backend its PyTorch build registers.
``attention``    the attention backend to serve with when the user names none; None leaves the
                 choice to SGLang, which knows its own platforms better.
``commands``     tools of its driver; one of them on PATH means the driver is installed.
``device_files`` what its kernel driver puts under ``/dev`` (glob patterns).
``card_names``   how its cards call themselves through a CUDA-compatible PyTorch.

Rows that have been run on hardware are listed in the README's support table; the others are
read off the vendors' PyTorch builds and FlagGems, and no machine has confirmed them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vendor:
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


# fmt: off
_ROWS = (
    #       name          chip              device  in_tree  collective  attention      driver's commands     device files             names of cards
    Vendor("nvidia",     "NVIDIA GPU",      "cuda", "cuda",  "nccl",     None,          ("nvidia-smi",),      ("/dev/nvidia[0-9]*",),  ("nvidia", "tesla", "geforce", "quadro")),
    Vendor("amd",        "AMD GPU",         "cuda", "rocm",  "nccl",     None,          ("rocm-smi",),        ("/dev/kfd",),           ("amd", "instinct", "radeon")),
    Vendor("ascend",     "Huawei Ascend",   "npu",  "npu",   "hccl",     "ascend",      ("npu-smi",),         ("/dev/davinci[0-9]*",)),
    Vendor("mthreads",   "Moore Threads",   "musa", "musa",  "mccl",     None,          ("mthreads-gmi",),    ("/dev/mtgpu*",)),
    Vendor("thead",      "T-Head SAIL",     "cuda", "sail",  "nccl",     None,          ("ppu-smi",),         ("/dev/alixpu*",),       ("zw",),  flaggems=False),
    Vendor("intel",      "Intel GPU",       "xpu",  "xpu",   "xccl",     None,          (),                   (),                      flaggems=False),
    Vendor("apple",      "Apple silicon",   "mps",  "mps",   "gloo",     "torch_native", (),                  (),                      flaggems=False),
    Vendor("metax",      "MetaX",           "cuda", None,    "nccl",     "triton",      ("mx-smi",),          ("/dev/mxcd",),          ("metax",)),
    Vendor("iluvatar",   "Iluvatar CoreX",  "cuda", None,    "nccl",     "triton",      ("ixsmi",),           ("/dev/iluvatar*",),     ("iluvatar",)),
    Vendor("kunlunxin",  "Kunlunxin",       "cuda", None,    "nccl",     "triton",      ("xpu-smi", "xpu_smi"), ("/dev/xpuctrl",),     ("kunlun", "p800")),
    Vendor("hygon",      "Hygon DCU",       "cuda", None,    "nccl",     "triton",      ("hy-smi",),          (),                      ("hygon", "dcu", "k100", "z100", "bw")),
    Vendor("cambricon",  "Cambricon MLU",   "mlu",  None,    "cncl",     "triton",      ("cnmon",),           ("/dev/cambricon_dev*",)),
    Vendor("enflame",    "Enflame GCU",     "gcu",  None,    "eccl",     "triton",      ("efsmi",),           ("/dev/gcu[0-9]*",)),
    Vendor("tsingmicro", "TsingMicro",      "txda", None,    "tccl",     "torch_native", ("tsm_smi",),        (),                      ),
    Vendor("sunrise",    "Sunrise",         "ptpu", None,    "tccl",     "torch_native", ("pt_smi",),         (),                      ),
    Vendor("aipu",       "ARM China Zhouyi", "aipu", None,   "gloo",     "torch_native", (),                  ("/dev/aipu",),          ),
    Vendor("cpu",        "CPU",             "cpu",  None,    "gloo",     "torch_native", flaggems=False),
)
# fmt: on

VENDORS: dict[str, Vendor] = {row.name: row for row in _ROWS}

#: Names that users write for a vendor.
ALIASES = {"cuda": "nvidia", "npu": "ascend", "musa": "mthreads", "rocm": "amd", "xpu": "intel", "mps": "apple", "sail": "thead"}


def canonical(name: str) -> str:
    """The vendor's own name for a name or an alias of it; an unknown name comes back as it is."""
    name = name.strip().lower()
    return ALIASES.get(name, name)
