#!/usr/bin/env bash
# Pre-train with DeepSpeed. Environment: CONFIG (a training config), NUM_GPUS. Further arguments go to the trainer,
# for instance --set training.resume_from=auto
# On several machines: HOSTFILE (see configs/hostfile.example); without ssh between them, run this on each with
# NODE_RANK (0, 1, ...) and MASTER_ADDR (the address of machine 0) as well.
set -euo pipefail
cd "$(dirname "$0")/.."
machines=(--num_gpus="${NUM_GPUS:-1}")
if [[ -n "${HOSTFILE:-}" ]]; then
    machines=(--hostfile="$HOSTFILE")
    if [[ -n "${NODE_RANK:-}" ]]; then
        machines+=(--no_ssh --node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:?the address of machine 0}")
    fi
fi
# exec: a signal to this script is one to the command.
exec deepspeed "${machines[@]}" -m src.training.train --config "${CONFIG:-configs/train_config.yaml}" "$@"
