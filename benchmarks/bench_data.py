"""Times reading files into batches, against Python loops over bytes, in alternating rounds.

Also prints its share of a training step at paper size.

    python benchmarks/bench_data.py [--files 256] [--bytes 8000] [--batch 16] [--rounds 5] [--step-sequences 1]
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
from bgpt.distributed import autocast, pick_device, pick_dtype, tune_memory
from bgpt.files import list_files

PATCH_SIZE, PATCH_LENGTH = 16, 512


def plain_read(path):
    """Returns a file as a list of symbols, byte by byte."""
    with open(path, "rb") as file:
        content = file.read()
    symbols = []
    for byte in bytearray(os.path.splitext(path)[1][1:], "utf-8")[:PATCH_SIZE]:
        symbols.append(byte)
    while len(symbols) < PATCH_SIZE:
        symbols.append(utils.END)
    for byte in content:
        symbols.append(byte)
    while len(symbols) % PATCH_SIZE:
        symbols.append(utils.END)
    for _ in range(PATCH_SIZE):
        symbols.append(utils.END)
    return symbols[: PATCH_SIZE * PATCH_LENGTH]


def plain_batch(paths):
    """Returns (patches, masks), int64 (B, P·S) and (B, P), of files."""
    files = [plain_read(path) for path in paths]
    longest = max(len(symbols) for symbols in files)
    patches, masks = [], []
    for symbols in files:
        mask = [1] * (len(symbols) // PATCH_SIZE)
        while len(symbols) < longest:
            symbols.append(utils.END)
        while len(mask) < longest // PATCH_SIZE:
            mask.append(0)
        patches.append(symbols)
        masks.append(mask)
    return torch.tensor(patches), torch.tensor(masks)


def training_step(sequences):
    """Returns (seconds of a training step at paper size, median of 3, its dtype with PRECISION auto)."""
    device = pick_device()
    dtype = pick_dtype("auto", device)
    tune_memory()
    model = utils.ModelSizes(PATCH_SIZE, PATCH_LENGTH, 768, 12, 3).build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    patches = torch.randint(0, 256, (sequences, PATCH_LENGTH, PATCH_SIZE), device=device)
    masks = torch.ones(sequences, PATCH_LENGTH, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with autocast(device, dtype):
            loss = model(patches, masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]), dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--bytes", type=int, default=8000, help="size of each file")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-sequences", type=int, default=1, help="sequences in the training step; 0 = no training step")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}; "
        f"{options.files} files of {options.bytes} bytes, batches of {options.batch}, median of {options.rounds}"
    )
    seconds = {"per-byte loop": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(options.files):
            rng.integers(0, 256, options.bytes, dtype=np.uint8).tofile(os.path.join(folder, f"{i}.bin"))
        files = list_files([folder], "folder")
        dataset = utils.ByteDataset(utils.Examples(files), PATCH_SIZE, PATCH_LENGTH, [0, 1])
        index_batches = np.array_split(np.arange(len(files)), -(-len(files) // options.batch))

        def ours():
            return [(batch.patches, batch.masks) for _, batch in utils.batches(dataset, index_batches)]

        def plain():
            return [plain_batch([files[index] for index in indices]) for indices in index_batches]

        for (patches, masks), (their_patches, their_masks) in zip(ours(), plain(), strict=True):
            assert torch.equal(patches.flatten(1).long(), their_patches) and torch.equal(masks.long(), their_masks)
        for _ in range(options.rounds):
            for name, run in (("per-byte loop", plain), ("ours", ours)):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        rates = sorted(options.files / value for value in seconds[name])
        print(f"{name:<14} {options.files / median:8.0f} files/s ({rates[0]:.0f}-{rates[-1]:.0f})")
    print(f"ours is {medians['per-byte loop'] / medians['ours']:.1f} times as fast")
    if options.step_sequences:
        step, dtype = training_step(options.step_sequences)
        share = medians["ours"] / options.files * options.step_sequences / step
        print(f"a training step of {options.step_sequences} sequences in {dtype} takes {step:.2f} s; reading them is {share:.3%} of it")


if __name__ == "__main__":
    main()
