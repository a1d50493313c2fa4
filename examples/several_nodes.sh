#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A server on two nodes. Run it on each, with its rank:
#     bash several_nodes.sh 0 10.0.0.1:20000 MODEL --tp 2          # on the first, whose address is 10.0.0.1
#     bash several_nodes.sh 1 10.0.0.1:20000 MODEL --tp 2          # on the second
# --tp 2 splits each layer over the nodes, --pp-size 2 gives each half of the layers. The first node answers requests.
# With FLAGCX_PATH set on both, collectives go over FlagCX (docs/flagcx.md).
set -euo pipefail
rank=$1 first_node=$2 model=$3
shift 3
exec "${PYTHON:-python}" -m sglang.launch_server --model-path "$model" --nnodes 2 --node-rank "$rank" --dist-init-addr "$first_node" "$@"
