#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""FlagGems's in-place rotary kernel against its out-of-place one, bit for bit, many times over.

Both do the same arithmetic on the same numbers, so a difference is a race: in the in-place kernel one thread writes a
number that another, in another warp, may not have read yet.

    python benchmarks/rope_in_place.py            # needs a GPU that FlagGems serves
"""

import argparse

import torch

from sglang_fl.device import detect
from sglang_fl.dispatch.backends.flaggems.library import load, why_not_here

_POSITIONS = 4096
#: tokens, query heads, kv heads, head_dim
_SHAPES = ((8192, 64, 8, 128), (8192, 32, 8, 64), (64, 32, 8, 128), (8192, 128, 8, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    reason = why_not_here(detect())
    if reason is not None:
        raise SystemExit(reason)
    rope = load().modules.rotary_embedding.gems_rope_forward
    torch.manual_seed(0)
    for tokens, heads, kv_heads, head_dim in _SHAPES:
        query, key = (torch.randn(tokens, n, head_dim, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads))
        cos, sin = torch.rand(_POSITIONS, head_dim, device="cuda").chunk(2, dim=-1)
        positions = torch.randint(0, _POSITIONS, (tokens,), device="cuda")
        expected = rope(query, key, cos, sin, positions, False, False)
        wrong = []
        for _ in range(args.runs):
            found = rope(query.clone(), key.clone(), cos, sin, positions, False, True)
            wrong.append(sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True)))
        where = f"{tokens} tokens, {heads} + {kv_heads} heads of {head_dim}"
        print(f"{where}: {sum(wrong)} numbers differ, in {sum(map(bool, wrong))} of {args.runs} runs")


if __name__ == "__main__":
    main()
