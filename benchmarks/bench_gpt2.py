"""A plain byte-level GPT-2 of transformers, trained for some minutes on a folder of files: bits per byte of held-out files.

It is the baseline of a byte model with patches: the same bytes, parameters and minutes, no patches. Files are joined by symbol
256. A batch has random windows of the joined files. AdamW with a cosine schedule over the minutes, bf16 where the device has it.
On a CPU the minutes are CPU time, which other programs do not change.

    python benchmarks/bench_gpt2.py --train text/train --test text/test --minutes 2 --hidden 192 --layers 4
"""

import argparse
import math
import os
import platform
import sys
import time

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bgpt.distributed import autocast, pick_device, pick_dtype
from bgpt.files import list_files
from utils import END, NUM_SYMBOLS


def read_files(folder):
    """Returns the contents of a folder's files, uint8 arrays."""
    return [np.fromfile(path, np.uint8) for path in list_files([folder], "folder").paths]


def batches(stream, size, context, random):
    """Yields batches (size, context + 1) of random windows of a stream of symbols, int64."""
    while True:
        starts = random.integers(0, len(stream) - context, (size, 1))
        yield torch.from_numpy(stream[starts + np.arange(context + 1)].astype(np.int64))


def train(model, stream, options, device, dtype):
    """Trains for options.minutes; returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, fused=True)
    clock = time.monotonic if device.type == "cuda" else time.process_time
    began, step = clock(), 0
    for step, batch in enumerate(batches(stream, options.batch, options.context, np.random.default_rng(options.seed))):
        done = (clock() - began) / (60 * options.minutes)
        if done >= 1:
            break
        rate = options.rate * min(done / 0.1, (1 + math.cos(math.pi * max(done - 0.1, 0) / 0.9)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(device)
        with autocast(device, dtype):
            logits = model(batch[:, :-1]).logits  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


@torch.no_grad()
def evaluate(model, contents, context, device):
    """Returns the bits of files and their ends, by their bytes, in windows that advance by half."""
    nats = 0.0
    for content in contents:
        symbols = torch.tensor([END, *content.tolist(), END], device=device)
        scored = 0  # targets so far
        for start in range(0, len(symbols) - 1, context // 2):
            window = symbols[start : start + context + 1]
            losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
            nats += losses[max(scored - start, 0) :].sum().item()
            scored = start + len(window) - 1
            if scored == len(symbols) - 1:
                break
    return nats / math.log(2) / sum(map(len, contents))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="bytes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    torch.manual_seed(options.seed)
    sizes = {"n_embd": options.hidden, "n_layer": options.layers, "n_head": options.hidden // 64, "n_positions": options.context}
    config = GPT2Config(vocab_size=NUM_SYMBOLS, bos_token_id=END, eos_token_id=END, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    model = GPT2LMHeadModel(config).to(device)
    contents = read_files(options.train)
    stream = np.concatenate([part for content in contents for part in (np.array([END]), content)] + [np.array([END])]).astype(np.int16)
    steps = train(model.train(), stream, options, device, dtype)
    bits = evaluate(model.eval(), read_files(options.test), options.context, device)
    seen = steps * options.batch * options.context
    print(
        f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads, {dtype}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {model.num_parameters():,} parameters, {vars(options)}\n"
        f"{steps:,} steps, {seen:,} bytes ({seen / len(stream):.2f} epochs): {bits:.4f} bits per byte of {options.test}"
    )


if __name__ == "__main__":
    main()
