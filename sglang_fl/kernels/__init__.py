# SPDX-License-Identifier: Apache-2.0
"""Kernels that SGLang calls outside of its layers: KV-cache writes, request tables, speculative sampling, quantisation.

SGLang launches a Triton kernel, ``kernel[grid](*args)``, or calls a function, where a chip may have neither Triton nor that kernel.
Another function can replace it. The replacement is an implementation like those of operators. Its operator is named after the
kernel, ``sglang.module:name``. Orders, lists of vendors, ``sglang-fl ops`` and the dispatch log apply to it. A vendor's package
declares its own in ``VendorPlatform.sglang_kernels``; those in plain PyTorch are in ``reference/``.

To add one in plain PyTorch, write a function with the arguments of SGLang's call, and a line in ``reference.REFERENCES``::

    "sglang.srt.module:kernel": KernelReplacement("sglang_fl.kernels.reference.module:kernel"),

``reference/``  plain PyTorch, in use where the device has no Triton
``source.py``   parsed files of SGLang
``places.py``   finds a name in SGLang's source, and replaces the object in every module that has it
"""

from ..device import KernelReplacement

__all__ = ["KernelReplacement"]
