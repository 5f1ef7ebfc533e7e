#!/usr/bin/env bash
# The whole story of the published small model: tokens, training, perplexity, text.
#
#   scripts/pretrain_owt.sh                                   # every GPU of this machine
#   NUM_PROCESSES=4 scripts/pretrain_owt.sh --train.steps 100000
#
# Arguments are flags of the config (--section.key VALUE). Start it again after an interruption: tokens that are
# cached are not made again, training resumes at its last checkpoint, finished replicates of the perplexity are kept.
#
# Variables, with their defaults:
#   CONFIG=configs/mdlm-owt-small.yaml        what is trained
#   RUN=runs/mdlm-owt-small                   where the run lives
#   ACCELERATE_CONFIG=configs/accelerate/ddp.yaml
#   NUM_PROCESSES=                            one per GPU, at least one
#   PRECISION=0.5%                            when the perplexity is precise enough
#   SAMPLES=4                                 texts to generate
#   PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-configs/mdlm-owt-small.yaml}
RUN=${RUN:-runs/mdlm-owt-small}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/ddp.yaml}
PRECISION=${PRECISION:-0.5%}
SAMPLES=${SAMPLES:-4}
PYTHON=${PYTHON:-python}
NUM_PROCESSES=${NUM_PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

textdiff() { "$PYTHON" -m textdiff "$@"; }
launch() {
    "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" \
        --num_processes "$NUM_PROCESSES" -m textdiff "$@"
}
say() { printf '\n== %s\n' "$*"; }

say "1/4 tokens"
textdiff data prepare "$CONFIG" --run.dir "$RUN" "$@"

say "2/4 training on $NUM_PROCESSES process(es); again from here if it stops"
launch train "$CONFIG" --run.dir "$RUN" "$@"

say "3/4 perplexity of the held-out documents -> $RUN/perplexity.json"
launch perplexity "$RUN/export" "$RUN/validation.jsonl" \
    --precision "$PRECISION" --state "$RUN/perplexity.state" --json | tee "$RUN/perplexity.json"

say "4/4 text -> $RUN/samples.txt"
textdiff generate "$RUN/export" --num-samples "$SAMPLES" | tee "$RUN/samples.txt"
