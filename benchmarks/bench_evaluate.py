"""Times the scoring of files against the model's forward pass, in alternating rounds.

The files have equal or mixed lengths within PATCH_LENGTH. Both read them. Scoring also runs the three compressors.

    python benchmarks/bench_evaluate.py [--files 32] [--batch 8] [--rounds 3] [--sizes 16 64 256 4 2]
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import utils
from bgpt.distributed import pick_device, tune_memory
from bgpt.evaluation import score_files
from bgpt.files import list_files
from bgpt.windows import evaluation_windows


def measure(model, folder, options):
    """Returns (median seconds of the forward pass, of scoring, patches, bytes of the files)."""
    examples = utils.Examples(list_files([folder], "folder"))
    windows = evaluation_windows(examples, model.patch_size, model.patch_length)
    order = np.argsort(-windows.totals, kind="stable")
    dataset = utils.ByteDataset(examples, model.patch_size, model.patch_length)

    @torch.inference_mode()
    def forward():
        for start in range(0, len(order), options.batch):
            batch = utils.Batch(dataset[index] for index in order[start : start + options.batch])
            model(batch.patches_on(model.device), batch.masks)

    def score():
        list(score_files(model, windows, folder, options.batch, torch.float32, lambda count: None, []))

    seconds = {forward: [], score: []}
    for _ in range(options.rounds + 1):
        for run in seconds:
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    medians = [statistics.median(values[1:]) for values in seconds.values()]  # the first round warms up
    return *medians, int(windows.totals.sum()), int(windows.sizes.sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--files", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs=5, default=[16, 64, 256, 4, 2], help="as in utils.ModelSizes")
    options = parser.parse_args()
    tune_memory()
    model, rng = utils.ModelSizes(*options.sizes).build().to(pick_device()).eval(), np.random.default_rng(0)
    print(
        f"{platform.machine()}, {model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}; "
        f"sizes {options.sizes}, float32, {options.files} files, batches of {options.batch}, median of {options.rounds}"
    )
    equal = np.full(options.files, model.patch_length)
    by_patch = []  # seconds of the forward pass per patch
    for name, patches in (("equal", equal), ("mixed", rng.integers(2, equal + 1))):
        with tempfile.TemporaryDirectory() as folder:
            for i, count in enumerate(patches):
                rng.integers(0, 256, (count - 2) * model.patch_size, dtype=np.uint8).tofile(os.path.join(folder, f"{i}.bin"))
            forward, score, total, num_bytes = measure(model, folder, options)
        by_patch.append(forward / total)
        print(
            f"{name} lengths: forward {forward:.2f} s, scoring {score:.2f} s ({num_bytes / 1000 / score:.1f} KB/s); for each real patch "
            f"{score / total / by_patch[0]:.2f} times the forward pass of equal lengths"
        )


if __name__ == "__main__":
    main()
