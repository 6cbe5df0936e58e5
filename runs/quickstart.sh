#!/usr/bin/env bash
# Trains a small model to simulate a toy CPU, and compares its predictions for unseen programs with the true states.
#
#     pip install -r requirements.txt
#     bash runs/quickstart.sh            # a second run resumes
#     bash runs/quickstart.sh --fresh    # deletes the results of earlier runs first
#
# Everything is written to ./quickstart. INSTANCES=20000 in the environment is a shorter, less accurate run.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
instances=${INSTANCES:-480000}
if [[ $# != 0 && $* != --fresh ]]; then
    echo "usage: bash runs/quickstart.sh [--fresh]" >&2
    exit 2
fi
mkdir -p quickstart
cd quickstart
if [[ ${1:-} == --fresh ]]; then
    rm -rf cpu_states output weights.pth weights-last.pth logs.txt true.txt predicted.txt
fi
set -x

# programs of 2 to 4 instructions with the states that they run through; a program drawn twice is one file
python "$root/cpu-simulation.py" --mode generate --num_registers 2 --memory_size 16 --num_min_program 2 --num_max_program 4 \
    --num_train_instance "$instances" --num_test_instance $((instances / 400))

# a test program that is a training program too, with other values in its registers, would be no unseen one
{ set +x; } 2> /dev/null
(cd cpu_states/test && for file in *.bin; do if [[ -e ../train/$file ]]; then rm "$file"; fi; done)
set -x

# a small model, in bf16 if the processor has it
python "$root/train-gen.py" --TRAIN_FOLDERS cpu_states/train --EVAL_FOLDERS cpu_states/test \
    --PATCH_SIZE 4 --PATCH_LENGTH 16 --HIDDEN_SIZE 128 --PATCH_NUM_LAYERS 3 --BYTE_NUM_LAYERS 1 \
    --OPTIMIZER muon --EMBEDDING_START bits --BATCH_SIZE 32 --LEARNING_RATE 2e-3 --DROPOUT 0 --NUM_EPOCHS 1

# the model reads each test program and its first state, and writes the other states
python "$root/inference.py" --MODE complete --INPUT_FOLDER cpu_states/test --PROMPT_BYTES 24 --TEMPERATURE 0

# the share of right bytes, states and files
python "$root/cpu-simulation.py" --mode evaluate --num_registers 2 --memory_size 16 --dir_path output
{ set +x; } 2> /dev/null

# one program, the true states on the left, the predicted ones on the right
name=$(cd cpu_states/test && ls -S | sed -n 1p)
python "$root/cpu-simulation.py" --mode translate --states_path "cpu_states/test/$name" --output_path true.txt > /dev/null
python "$root/cpu-simulation.py" --mode translate --num_registers 2 --memory_size 16 --states_path "output/$name" \
    --output_path predicted.txt > /dev/null || true # malformed predictions are an error after the text is written
echo
echo "$name: true states on the left, predicted ones on the right"
diff --side-by-side --expand-tabs --width=110 true.txt predicted.txt || true
echo
echo "All $(ls cpu_states/test | wc -l) predictions on one page: quickstart/output/index.html"
