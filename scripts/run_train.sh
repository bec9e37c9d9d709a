#!/usr/bin/env bash
# Pre-train with DeepSpeed. Environment: CONFIG (a training config), NUM_GPUS. Further arguments go to the trainer,
# for instance --set training.resume_from=auto
set -euo pipefail
cd "$(dirname "$0")/.."
deepspeed --num_gpus="${NUM_GPUS:-1}" -m src.training.train --config "${CONFIG:-configs/train_config.yaml}" "$@"
