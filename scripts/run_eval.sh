#!/usr/bin/env bash
# Evaluate the pre-trained and the fine-tuned model, then analyse the pre-trained one's routing.
# Override from the environment, e.g.:  LIMIT=10 TASKS="gsm8k" bash scripts/run_eval.sh
# Further arguments go to both evaluations, e.g.:  bash scripts/run_eval.sh --batch-size 32
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BASE=${BASE:-checkpoints/portable_final.pt}
SFT=${SFT:-checkpoints_sft/sft_final.pt}
TASKS=${TASKS:-gsm8k minerva_math mmlu_stem}
SFT_TASKS=${SFT_TASKS:-gsm8k minerva_math}
RESULTS=${RESULTS:-results}
FIGURES=${FIGURES:-figures}
arguments=(${LIMIT:+--limit "$LIMIT"} "$@")

# shellcheck disable=SC2086  # task names are separate words
python -m src.evaluation.run_eval --checkpoint "$BASE" --tasks $TASKS --output "$RESULTS/pretrain_eval.json" "${arguments[@]}"
# shellcheck disable=SC2086
python -m src.evaluation.run_eval --checkpoint "$SFT" --tasks $SFT_TASKS --output "$RESULTS/sft_eval.json" "${arguments[@]}"
python -m src.interpretability.run_analysis --checkpoint "$BASE" --output "$FIGURES"
