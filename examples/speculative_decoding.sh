#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# EAGLE: a small model drafts several tokens, which the large one checks in a single pass.
#     bash speculative_decoding.sh meta-llama/Llama-3.1-8B-Instruct DRAFT
# SGLang asks the platform whether it can: a plain CPU refuses it, and a chip's package declares it (docs/vendors.md).
set -euo pipefail
model=$1 draft=$2
shift 2
exec "${PYTHON:-python}" -m sglang.launch_server --model-path "$model" --speculative-algorithm EAGLE3 --speculative-draft-model-path "$draft" \
    --speculative-num-steps 3 --speculative-eagle-topk 4 --speculative-num-draft-tokens 16 "$@"
