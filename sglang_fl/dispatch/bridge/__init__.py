# SPDX-License-Identifier: Apache-2.0
"""SGLang's layers and functions, and the operators' signatures.

One file an operator; ``bridges.py`` lists them. ``binder.py`` binds a model: ``layer.py``, ``function.py`` and ``kernel.py`` are the
kinds of sockets in which SGLang's call sites take a forward, ``selector.py`` selects the implementation.
"""
