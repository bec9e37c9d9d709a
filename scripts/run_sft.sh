#!/usr/bin/env bash
# Fine-tune with DeepSpeed. Environment: CONFIG (a fine-tuning config), NUM_GPUS. Further arguments go to the trainer.
set -euo pipefail
cd "$(dirname "$0")/.."
exec deepspeed --num_gpus="${NUM_GPUS:-1}" -m src.sft.sft --config "${CONFIG:-configs/sft_config.yaml}" "$@"
