# SPDX-License-Identifier: Apache-2.0
"""Declares MyChip to SGLang.

This is imported during ``import sglang``: do not import PyTorch, SGLang or your driver's library here.

The commented lines are optional. ``sglang_fl.vendor_platform.VendorPlatform`` documents each. Write classes as
"module:Class"; they are loaded when they are needed.
"""

from pathlib import Path

from sglang_fl.vendor_platform import VendorPlatform

PLATFORM = VendorPlatform(
    name="mychip",
    chip="MyChip",
    #
    # The torch.device type that MyChip's PyTorch extension registers.
    device_type="mychip",
    #
    # How the chip is detected: its device files, its driver's tools, or your own function.
    device_files=("/dev/mychip[0-9]*",),
    # commands=("mychip-smi",),
    # is_present=lambda: Path("/sys/class/mychip").exists(),
    #
    # The torch.distributed backend that its PyTorch extension registers.
    # collective="gloo",
    #
    # The device type of SGLang's groups of ranks, if it is not the chip's own. On a PyTorch for CUDA or ROCm SGLang does not ask.
    # group_device="cpu",
    #
    # Attention: your own backends, registered with SGLang's register_attention_backend and created with SGLang's model runner,
    # and the backend to use when the user names none; without either it is torch_native.
    # attention_backends={"mychip_attention": "sglang_fl_mychip.attention:MyChipAttention"},
    # attention="mychip_attention",
    #
    # What the chip supports, of SGLang's PlatformCapabilities: Triton kernels, graphs of decode steps, piecewise graphs of
    # prefill, SGLang's own kernels for the hierarchical cache, a PyNccl communicator.
    # capabilities=("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels", "supports_pynccl"),
    #
    # Graphs: the runner of decode steps, and the backend of piecewise graphs.
    # graph_runner="sglang_fl_mychip.graphs:MyChipGraphRunner",
    # piecewise_backend="sglang_fl_mychip.graphs:MyChipPiecewiseBackend",
    #
    # What captures and replays a whole graph.
    # graph_backend="sglang_fl_mychip.graphs:MyChipGraphBackend",
    #
    # What torch.compile uses: eager where Inductor has no driver for the chip.
    # compile_backend="eager",
    #
    # KV cache: subclasses of SGLang's pools (mha, mla, dsa), and of its paged allocator.
    # kv_pools={"mha": "sglang_fl_mychip.kv_cache:MyChipMHAPool", "mla": "sglang_fl_mychip.kv_cache:MyChipMLAPool"},
    # paged_allocator="sglang_fl_mychip.kv_cache:MyChipPagedAllocator",
    #
    # Hybrid models may keep snapshots of their state.
    # mamba_extra_buffer=True,
    #
    # Speculative decoding: the algorithms, the attention backends of draft models for DFLASH, and their graph runners.
    # speculative_algorithms=("EAGLE", "EAGLE3"),
    # draft_attention=("triton",),
    # draft_graph_runners={"draft_decode": "sglang_fl_mychip.graphs:MyChipDraftRunner"},
    #
    # Your own quantisation methods, or replacements of SGLang's: subclasses of its QuantizationConfig.
    # quantization={"mychip_int8": "sglang_fl_mychip.quantization:MyChipInt8Config"},
    #
    # Kernels that SGLang launches or calls outside of its layers (sglang-fl kernels lists them): your functions replace them,
    # called with SGLang's arguments. KernelReplacement("module:function", takes_grid=True) gets a launch's grid first.
    # sglang_kernels={"sglang.kernels.ops.memory.common:get_last_loc_triton": "sglang_fl_mychip.kv_cache:last_locations"},
    #
    # Packages that SGLang imports and that have no build for MyChip: for each a module with what you provide, or None. All other
    # names can be imported, and raise an error with their name when called. With triton, start servers with sglang-fl serve.
    # Builds for other chips that can be imported, but do not run on MyChip, are hidden.
    # stand_ins={"sgl_kernel": "sglang_fl_mychip.sgl_kernel", "flashinfer": None, "deep_gemm": None, "triton": None},
    # hide_installed=("flashinfer",),
    #
    # Defaults of SGLang's server arguments. The user's arguments override them.
    # server_args={"page_size": 128},
    #
    # Environment variables that your code reads. Similar names are reported as misspellings.
    # variables=("MYCHIP_FUSE_ATTENTION",),
    #
    # Whether FlagGems supports the chip: its Triton kernels are then used for operators and for PyTorch's own.
    # flaggems=True,
    #
    # Anything else that SGLang asks its platform: a class with some of the methods of sglang.srt.platforms.interface.SRTPlatform.
    # Its module is imported with SGLang, so it must not import sglang.srt.utils or anything heavy.
    # platform_class="sglang_fl_mychip.sglang_platform:MyChipPlatform",
    #
    # The settings to use on the chip when the user gives none.
    profile=Path(__file__).with_name("profile.yaml"),
)
