#!/usr/bin/env bash
# The quick start: generates small CPU programs, trains a small model on them, and counts the states that it predicts right.
#
#     pip install -r requirements.txt
#     bash runs/quickstart.sh
#
# Data, weights, log and output go to the current folder. About 5 minutes on 2 CPU cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
set -x

# 240,000 training and 300 test programs, with the states that they run through
python "$root/cpu-simulation.py" --mode generate --num_registers 2 --memory_size 16 --num_min_program 2 --num_max_program 4 \
    --num_train_instance 240000 --num_test_instance 300

# a small model, in float32, since that is faster than bf16 at this size
python "$root/train-gen.py" --TRAIN_FOLDERS cpu_states/train --EVAL_FOLDERS cpu_states/test \
    --PATCH_SIZE 4 --PATCH_LENGTH 16 --HIDDEN_SIZE 128 --PATCH_NUM_LAYERS 3 --BYTE_NUM_LAYERS 1 --PRECISION fp32 \
    --OPTIMIZER muon --EMBEDDING_START bits --BATCH_SIZE 32 --LEARNING_RATE 2e-3 --DROPOUT 0 --NUM_EPOCHS 1

# continuations of the test programs from their first state
python "$root/inference.py" --MODE complete --INPUT_FOLDER cpu_states/test --PROMPT_BYTES 24 --TEMPERATURE 0

# the shares of bytes, states and files that are right
python "$root/cpu-simulation.py" --mode evaluate --num_registers 2 --memory_size 16 --dir_path output
