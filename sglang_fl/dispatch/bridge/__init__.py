# SPDX-License-Identifier: Apache-2.0
"""SGLang's layers and functions, and the operators' signatures.

One file an operator; ``bridges.py`` lists them, ``catalog.py`` has SGLang's names. ``binder.py`` binds a model: ``layer.py`` and
``function.py`` are the two kinds of sockets in which SGLang's call sites take a forward, ``selector.py`` selects the implementation.
"""
