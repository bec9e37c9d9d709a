#!/usr/bin/env bash
# Prepare a rented machine: install requirements.txt, check the accounts, make the folders.
# Tokens are read from .env (HF_TOKEN, WANDB_API_KEY) into the environment of the checks. They are never printed and
# never an argument of a command, where other users could see them.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()

# Only NAME=value lines are read; nothing in .env is executed.
if [[ -f .env ]]; then
    chmod 600 .env
    while read -r line || [[ -n "$line" ]]; do
        line="${line#export }"
        name="${line%%=*}"
        case "$name" in
            HF_TOKEN | WANDB_API_KEY)
                value="${line#*=}"
                value="${value%$'\r'}"
                value="${value#[\"\']}"
                value="${value%[\"\']}"
                export "$name=$value"
                ;;
        esac
    done < .env
else
    missing+=(".env: create it with  echo \"HF_TOKEN=...\" > .env ; echo \"WANDB_API_KEY=...\" >> .env")
fi

command -v c++ > /dev/null || missing+=("a C++ compiler (DeepSpeed needs it): apt-get install g++")
command -v nvidia-smi > /dev/null || echo "note: no NVIDIA GPU found; everything runs on the CPU"

"${PYTHON:-python3}" -m pip install --quiet "$(grep '^torch==' constraints.txt)" -c constraints.txt
"${PYTHON:-python3}" -m pip install --quiet -r requirements.txt

if [[ -n "${HF_TOKEN:-}" ]]; then
    # The libraries read HF_TOKEN from the environment; logging in stores it for later shells.
    "${PYTHON:-python3}" - << 'PY' || missing+=("Hugging Face: the token in .env was not accepted, or there is no network")
import os
import sys

from huggingface_hub import login

try:
    login(token=os.environ["HF_TOKEN"], skip_if_logged_in=False)
except Exception as error:
    sys.exit(f"Hugging Face: {type(error).__name__}")
PY
else
    missing+=("HF_TOKEN in .env: needed for gated datasets; create one at https://huggingface.co/settings/tokens")
fi

if [[ -n "${WANDB_API_KEY:-}" ]]; then
    "${PYTHON:-python3}" - << 'PY' || missing+=("Weights & Biases: the key in .env was not accepted, or there is no network")
import sys

import wandb

try:
    sys.exit(0 if wandb.login(verify=True, timeout=20) else "Weights & Biases: not logged in")
except Exception as error:
    sys.exit(f"Weights & Biases: {type(error).__name__}")
PY
else
    missing+=("WANDB_API_KEY in .env: without it metrics stay on this machine (offline); https://wandb.ai/authorize")
fi

mkdir -p data/tokenized/{math,stem,code} checkpoints checkpoints_sft results figures

if ((${#missing[@]})); then
    echo "Installed. Missing:"
    printf '  - %s\n' "${missing[@]}"
else
    echo "Ready. Next: bash scripts/tokenize_data.sh"
fi
