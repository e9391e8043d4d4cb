#!/usr/bin/env bash
# Installs the project into .venv and lets it write a story, with the checkpoint pair in examples/models.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

ensure_environment

heading "a story, speculating 5 tokens ahead"
.venv/bin/slotwise generate examples/models/stories --draft examples/models/stories-draft --prompt "Once upon a time" --speculate 5 --temperature 0.8 --seed 7 --max-new-tokens 200 --threads 1 --stats --ledger
