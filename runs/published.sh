#!/usr/bin/env bash
# Trains a generative model with the settings of the published config.py and train-gen.py.
#
#     bash runs/published.sh FOLDER [FOLDER ...] [--CONSTANT VALUE ...]
#     bash runs/published.sh midi/train --EVAL_FOLDERS midi/test --WEIGHTS_PATH midi.pth --LOGS_PATH midi.txt
#
# Constants given last override those below. The published config.py has BATCH_SIZE 1 (per process) with PATCH_LENGTH 512, and
# 8 with 1024 in its last version. Its learning rate is constant in effect, since its cosine schedule belongs to an optimizer
# that is replaced. The last column of README's table of differences has those that remain. On a CUDA GPU, --PRECISION fp16 is
# the published format. SEED gives other random numbers, so order, crops and dropout differ.
set -euo pipefail
if [[ $# == 0 || $1 == -* ]]; then
    echo "usage: bash runs/published.sh FOLDER [FOLDER ...] [--CONSTANT VALUE ...]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
set -x
python "$root/train-gen.py" --PATCH_SIZE 16 --PATCH_LENGTH 512 --HIDDEN_SIZE 768 --PATCH_NUM_LAYERS 12 --BYTE_NUM_LAYERS 3 \
    --OPTIMIZER adamw --EMBEDDING_START published --LONG_FILES crop --NUM_EPOCHS 32 --BATCH_SIZE 1 --ACCUMULATION_STEPS 1 \
    --LEARNING_RATE 1e-5 --LR_SCHEDULE constant --MAX_GRAD_NORM 0 --DROPOUT 0.1 --PATCH_SAMPLING_BATCH_SIZE 0 \
    --TRAIN_FOLDERS "$@"
