# SPDX-License-Identifier: Apache-2.0
"""Calls of FlagGems, a file a family of operators. Importing one imports FlagGems."""
