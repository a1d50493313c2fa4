# SPDX-License-Identifier: Apache-2.0
"""The reference's arithmetic, a file a family of operators. Importing one imports PyTorch."""
