#!/usr/bin/env bash
# Evaluate the pre-trained and the fine-tuned model, compare them, then analyse the pre-trained one's routing.
# Override from the environment, e.g.:  LIMIT=10 TASKS="gsm8k" bash scripts/run_eval.sh
#   STAGES           any of: pretrain sft compare analyze   (each reads what earlier ones left)
#   BASE, SFT        checkpoints
#   TASKS, SFT_TASKS tasks of each;  SUITE=paper adds the published suite to the pre-trained model's
#   DATA_DIR         folder with the tasks' data, in place of the hub
#   PERPLEXITY       held-out text for both, e.g. "math=held/math.jsonl code=data/tokenized/code"
#   SFT_ARGS         options of the fine-tuned model's evaluation alone, e.g. --apply-chat-template
# Further arguments go to both evaluations, e.g.:  bash scripts/run_eval.sh --batch-size 32
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGES=${STAGES:-pretrain sft compare analyze}
BASE=${BASE:-checkpoints/portable_final.pt}
SFT=${SFT:-checkpoints_sft/sft_final.pt}
TASKS=${TASKS-gsm8k minerva_math mmlu_stem}
SFT_TASKS=${SFT_TASKS-gsm8k minerva_math}
RESULTS=${RESULTS:-results}
FIGURES=${FIGURES:-figures}

# shellcheck disable=SC2086  # names, sources and options are separate words
both() {
    python -m src.evaluation.run_eval "$@" ${LIMIT:+--limit "$LIMIT"} ${DATA_DIR:+--data-dir "$DATA_DIR"} \
        ${PERPLEXITY:+--perplexity $PERPLEXITY}
}
# shellcheck disable=SC2086
pretrain() {
    both --checkpoint "$BASE" --output "$RESULTS/pretrain_eval.json" ${SUITE:+--suite "$SUITE"} ${TASKS:+--tasks $TASKS} "$@"
}
# shellcheck disable=SC2086
sft() {
    both --checkpoint "$SFT" --output "$RESULTS/sft_eval.json" ${SFT_TASKS:+--tasks $SFT_TASKS} ${SFT_ARGS:-} "$@"
}
compare() {
    python -m src.eval_comparison "$RESULTS/pretrain_eval.json" "$RESULTS/sft_eval.json" --output "$RESULTS"
}
analyze() {
    python -m src.interpretability.run_analysis --checkpoint "$BASE" --output "$FIGURES"
}

for stage in $STAGES; do
    case $stage in
        pretrain | sft) "$stage" "$@" ;;
        compare | analyze) "$stage" ;;
        *) echo "error: unknown stage '$stage' in STAGES; there are pretrain, sft, compare and analyze." >&2; exit 2 ;;
    esac
done
