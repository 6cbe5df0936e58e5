#!/usr/bin/env bash
# Tests and measures a CUDA GPU: tests/test_cuda.py, then training and generation at three sizes, as a Markdown table.
#
#     pip install -r tests/requirements.txt
#     bash benchmarks/gpu.sh [MINUTES]
#
# The table starts with the paper's size and ends after MINUTES (default 10). "share": of the device's own matrix rate in that
# precision (training), or of the rate that its matrix rate and memory bandwidth allow (generation). All of it is measured here.
# --cpu instead of MINUTES tries the script without a GPU, at the smallest size.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
case ${1:-10} in
    --cpu) variants="transformers-fp32 fp32" sizes=quick batches=8 samples=4 end=$((SECONDS + 600)) ;;
    *[!0-9]*) echo "usage: bash benchmarks/gpu.sh [MINUTES]" >&2; exit 2 ;;
    *)
        has_gpu=$(python -c 'import torch; print(torch.cuda.is_available())' 2> /dev/null) ||
            { echo "gpu.sh: PyTorch is missing: pip install -r tests/requirements.txt" >&2; exit 1; }
        [[ $has_gpu == True ]] || { echo "gpu.sh: PyTorch finds no CUDA GPU" >&2; exit 1; }
        variants="transformers-bf16 bf16 bf16-compile" sizes="paper small quick" batches="16 64" samples="1 12 100 512" end=$((SECONDS + 60 * ${1:-10}))
        python -m pytest -q -p no:xdist -o addopts= tests/test_cuda.py ;;
esac

# runs a benchmark and its filter of rows, until the time is over
measure() {
    local left=$((end - SECONDS)) rows=$1
    shift
    if ((left > 0)); then
        timeout "$left" python "$@" | tee -a "$log" | sed -nE "$rows" || echo "| … not finished | | | | |"
    fi
}

log=$(mktemp)
python -c 'import platform, torch, transformers
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
print(f"\n{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}\n")'
echo "| size | | rate | share | against the first row |"
echo "|---|---|---|---|---|"
for size in $sizes; do
    for batch in $batches; do
        # variant, 3 times, step, range, KB/s, share, memory, speed
        measure "s/^([a-z0-9-]+) +([0-9.]+ +){4}[0-9.]+-[0-9.]+ +([0-9.]+) +([0-9]+%) +[0-9.]+ +([0-9.]+x).*/| $size | training, \1, $batch sequences | \3 KB\/s | \4 | \5 |/p" \
            benchmarks/bench_train.py --size "$size" --batch "$batch" --rounds 5 --variants $variants
    done
    # precision, samples, bytes/s, share, ratio to the plain way
    measure "s/^([a-z0-9 ]*[a-z0-9]) +([0-9]+) +([0-9,]+) +(\(([0-9]+%)\))? +([0-9.]+x).*/| $size | generation, \1, \2 samples | \3 B\/s | \5 | \6 |/p" \
        benchmarks/bench_generate.py --size "$size" --parts rate --samples $samples --contexts 16 --rounds 3
done
echo
grep -E "matrix rate" "$log"
rm "$log"
