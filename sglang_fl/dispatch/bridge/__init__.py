# SPDX-License-Identifier: Apache-2.0
"""SGLang's layers and the standard signatures. One file an operator; ``binder.py`` does the binding."""
