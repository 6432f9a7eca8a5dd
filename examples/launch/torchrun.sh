#!/usr/bin/env bash
# One machine with several GPUs, or several machines that can reach each other. See docs/distributed.md.
#   examples/launch/torchrun.sh studies/recipes/ltm-small.yaml runs/ltm-small
# On several machines start it on each, with NODES, NODE (0, 1, ...) and HEAD (the first machine's address) set.
set -euo pipefail
RECIPE=$1 RUN=$2 GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)} NODES=${NODES:-1}

exec torchrun --nnodes "$NODES" --node-rank "${NODE:-0}" --nproc-per-node "$GPUS" \
  --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" --max-restarts 0 \
  -m ltm_pyro.cli fit --config "$RECIPE" --run "$RUN" --ckpt_path last \
  --trainer.strategy ddp --trainer.accelerator gpu --trainer.devices "$GPUS" --trainer.num_nodes "$NODES" \
  --trainer.precision bf16-mixed "${@:3}"
