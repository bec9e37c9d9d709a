#!/usr/bin/env bash
# Tokenise the pre-training sources of configs/sources.yaml; interrupted, run it again and it continues.
# More options are passed on, e.g. another tokenizer's sources file:  bash scripts/tokenize_data.sh --sources my.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m src.data.tokenize_dataset --sources configs/sources.yaml --all "$@"
