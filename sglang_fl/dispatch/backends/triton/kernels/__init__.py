# SPDX-License-Identifier: Apache-2.0
"""What runs on the device, a file a family of operators.

A kernel is compiled for sizes that a layer fixes. What changes from call to call (the number of rows) is no reason to compile it again,
and no part of a row's arithmetic; but experts' products have one of four heights of blocks, by how many rows an expert has in the mean.
"""
