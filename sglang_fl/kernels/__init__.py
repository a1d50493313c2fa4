# SPDX-License-Identifier: Apache-2.0
"""Kernels that SGLang calls outside of its layers: KV-cache writes, request tables, speculative sampling, quantisation.

SGLang launches a Triton kernel, ``kernel[grid](*args)``, or calls a function, where a chip may have neither Triton nor that kernel.
Another function can run there. It is an implementation like those of operators: the operator's name is the kernel's,
``sglang.module:name``, and orders, lists of vendors, ``sglang-fl ops`` and the dispatch log hold for it. A vendor's package declares
its own in ``VendorPlatform.sglang_kernels``; those in plain PyTorch are in ``reference/``.

To add one in plain PyTorch, write a function that takes what SGLang's call gives, and its line in ``reference.REFERENCES``::

    "sglang.srt.module:kernel": KernelReplacement("sglang_fl.kernels.reference.module:kernel"),

``reference/``  plain PyTorch, in use where the device has no Triton
``places.py``   finds a name in SGLang's source, and puts an object in its place in every module that has it
"""

from ..device import KernelReplacement

__all__ = ["KernelReplacement"]
