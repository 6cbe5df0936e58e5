"""Times a training step against a naive baseline, in alternating rounds.

The baseline has float32, eager attention with a mask, one-hot patch embedding, GPT-2's unfused GELU and AdamW per parameter.
Each variant runs its steps like train-gen.py, in a separate process. Prints medians, peak memory, the share of the device's
matrix rate, measured between the steps, and the median speed against the first variant.

    python benchmarks/bench_train.py [--size paper] [--batch 1] [--rounds 5] [--variants naive fp32 bf16] [--dropout 0.1]
    python benchmarks/bench_train.py --files abc_midi/train --batch 16 --variants padded-fp32 fp32 ideal-fp32
    python benchmarks/bench_train.py --size quick --batch 64 --against FOLDER --variants before-fp32 fp32

Variants: naive, fp32, bf16, fp16 (CUDA only), with -compile for COMPILE (bf16-compile); transformers-fp32 and -bf16, the same
model by transformers' own forward with PyTorch's attention, fused AdamW and no one-hots; megabyte-fp32 and megabyte-bf16 are
MEGABYTE-pytorch of about the same size, if it is installed (`pip install MEGABYTE-pytorch==0.3.6`), with the same dropout of
attention weights and within its feed-forward layers. megabyte-fp32-default has its default dropout, 0.

With --against, before-fp32, before-bf16 and before-fp16 run another commit in the worktree FOLDER, made with
`git worktree add FOLDER COMMIT`.

With --files, the sequences have the lengths of randomly drawn files, the same in all variants. padded-fp32 also computes the
padding in the patch-level decoder. ideal-fp32 has as many real patches in as many sequences of equal length.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.environ.get("BENCH_TRAIN_CODE", ROOT)  # of the code to measure: --against for a variant "before-…"
sys.path.insert(0, FOLDER)

import utils

from bgpt.distributed import autocast, pick_device, pick_dtype, tune_memory
from bgpt.files import list_files

SIZES = {  # 0.9, 5.1 and 110 million parameters
    "quick": utils.ModelSizes(PATCH_SIZE=2, PATCH_LENGTH=32, HIDDEN_SIZE=128, PATCH_NUM_LAYERS=3, BYTE_NUM_LAYERS=1),
    "small": utils.ModelSizes(PATCH_SIZE=16, PATCH_LENGTH=128, HIDDEN_SIZE=256, PATCH_NUM_LAYERS=3, BYTE_NUM_LAYERS=2),
    "paper": utils.ModelSizes(PATCH_SIZE=16, PATCH_LENGTH=512, HIDDEN_SIZE=768, PATCH_NUM_LAYERS=12, BYTE_NUM_LAYERS=3),
}


class Naive(nn.Module):
    """The same model, implemented plainly with transformers."""

    def __init__(self, sizes, dropout):
        super().__init__()
        shape = sizes.PATCH_SIZE, sizes.PATCH_LENGTH, sizes.HIDDEN_SIZE, sizes.PATCH_NUM_LAYERS, sizes.BYTE_NUM_LAYERS
        self.configs = utils.make_configs(*shape, dropout)
        for config in self.configs:
            config._attn_implementation = "eager"
        self.embedding = nn.Linear(sizes.PATCH_SIZE * utils.NUM_SYMBOLS, sizes.HIDDEN_SIZE)
        self.patch_level = GPT2Model(self.configs[0])
        self.byte_level = GPT2LMHeadModel(self.configs[1])

    def forward(self, patches, masks, targets=None):
        one_hot = F.one_hot(patches, utils.NUM_SYMBOLS).float().flatten(2)  # (B, P, S·V)
        encoded = self.patch_level(inputs_embeds=self.embedding(one_hot), attention_mask=masks.long()).last_hidden_state
        chosen = masks[:, 1:] == 1
        encoded, targets = encoded[:, :-1][chosen], patches[:, 1:][chosen]  # (N, D), (N, S)
        symbols = self.byte_level.transformer.wte(targets[:, :-1])  # (N, S-1, D)
        inputs = torch.cat((encoded.unsqueeze(1), symbols), dim=1)  # (N, S, D)
        logits = self.byte_level(inputs_embeds=inputs, attention_mask=torch.ones_like(targets)).logits  # (N, S, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Transformers(utils.bGPTLMHeadModel):
    """Our model by transformers' own forward with PyTorch's attention: what a competent user would write. Padding is computed."""

    def forward(self, patches, masks, targets=None):
        patch_level, byte_level = self.patch_level_decoder, self.byte_level_decoder.base
        embedded = patch_level.embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])  # (B, P, S) -> (B, P, D)
        padding = None if masks.all() else masks.long()
        encoded = patch_level.base(inputs_embeds=embedded, attention_mask=padding).last_hidden_state
        chosen = masks[:, 1:] == 1
        encoded, targets = encoded[:, :-1][chosen], patches[:, 1:][chosen]  # (N, D), (N, S)
        symbols = byte_level.transformer.wte(targets[:, :-1])  # (N, S-1, D)
        logits = byte_level(inputs_embeds=torch.cat((encoded.unsqueeze(1), symbols), dim=1)).logits  # (N, S, V)
        return utils.BytePrediction(loss=F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))


def step_flops(sizes, lengths):
    """Returns the floating-point operations of a step's matrix products, without attention.

    They are 6 for each weight and position. `lengths` are the real patches of each sequence.
    """
    block = 12 * sizes.HIDDEN_SIZE**2
    patch_level = sum(lengths) * sizes.PATCH_NUM_LAYERS * block
    symbols = (sum(lengths) - len(lengths)) * sizes.PATCH_SIZE
    byte_level = symbols * (sizes.BYTE_NUM_LAYERS * block + sizes.HIDDEN_SIZE * utils.NUM_SYMBOLS)
    return 6 * (patch_level + byte_level)


def make_batches(sizes, batch, files, kind, count):
    """Yields (patches int64 (B, P, S), masks, targets or None) of `count` steps.

    Args:
        files: folder to draw files from. None = full sequences of random bytes.
        kind: "", "padded" or "ideal", see above.
    """
    random = np.random.default_rng(0)
    lengths = np.full(batch, sizes.PATCH_LENGTH)
    listed = files and list_files([files], "--files")
    for _ in range(count):
        if files:
            chosen = listed.sizes[random.permutation(len(listed))[:batch]]
            lengths = utils.count_patches(chosen, sizes.PATCH_SIZE).clip(max=sizes.PATCH_LENGTH)
            if kind == "ideal":
                lengths = np.array([len(part) for part in np.array_split(np.arange(lengths.sum()), batch)])
        patches = torch.from_numpy(random.integers(0, 256, (batch, lengths.max(), sizes.PATCH_SIZE)))
        masks = (torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]).to(torch.uint8)
        yield (patches, torch.ones_like(masks), masks[:, 1:] == 1) if kind == "padded" else (patches, masks, None)


def matrix_rate(device, dtype):
    """Returns the operations per second of a matrix product with the byte-level decoder's sizes."""
    a, b = torch.randn(8192, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)
    repeats = 10 if device.type == "cpu" else 200
    for warm in (True, False):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
    return repeats * 2 * 8192 * 768 * 3072 / (time.perf_counter() - start)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_loss(variant, sizes, dropout, device):
    """Returns (module, loss function of patches, masks and targets) of a variant."""
    name, _, option = variant.removeprefix("before-").removeprefix("padded-").removeprefix("ideal-").partition("-")
    if name == "megabyte":
        from MEGABYTE_pytorch import MEGABYTE

        precision, _, default = option.partition("-")
        model = MEGABYTE(
            num_tokens=utils.NUM_SYMBOLS, dim=768, depth=(12, 3), max_seq_len=(512, 16), pad_id=utils.END,
            attn_dropout=0.0 if default else dropout, ff_dropout=0.0 if default else dropout,
        ).to(device).train()  # fmt: skip
        dtype = pick_dtype(precision, device)

        def loss(patches, masks, targets):
            with autocast(device, dtype):
                return model(patches.flatten(1), return_loss=True)

        return model, loss
    if name == "naive":
        model = Naive(sizes, dropout).to(device).train()
        return model, model
    tune_memory()
    model = sizes.build(dropout).to(device).train()
    if name == "transformers":
        model.__class__, name = Transformers, option
    if option == "compile":
        for decoder in model.children():
            decoder.compile_blocks()
    dtype = pick_dtype(name, device)

    def loss(patches, masks, targets):
        with autocast(device, dtype):
            return model(patches, masks, targets).loss

    return model, loss


def run_variant(variant, sizes, options, pipe):
    """Process of a variant. Answers each message with (times of a step, peak memory, loss)."""
    device = pick_device()
    torch.manual_seed(0)
    model, loss_of = make_loss(variant, sizes, options.dropout, device)
    fused = None if variant == "naive" else True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, foreach=False if variant == "naive" else None)
    kind = variant.partition("-")[0] if variant.startswith(("padded-", "ideal-")) else ""
    for patches, masks, targets in make_batches(sizes, options.batch, options.files, kind, options.warm_up + options.rounds):
        pipe.recv()
        patches = patches.to(device)
        times = [time.perf_counter()]

        def lap():
            synchronize(device)
            times.append(time.perf_counter())

        loss = loss_of(patches, masks, targets)
        lap()
        loss.backward()
        lap()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lap()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(([after - before for before, after in zip(times, times[1:])], peak, loss.item()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step")
    parser.add_argument("--files", help="folder of files to draw the lengths from; default: full sequences")
    parser.add_argument("--against", help="worktree of another commit, for the variants before-…")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--variants", nargs="+", default=["naive", "fp32", "bf16"])
    options = parser.parse_args()
    if any(variant.startswith("before-") for variant in options.variants) and not options.against:
        parser.error("the variants before-… need --against")
    sizes, device = SIZES[options.size], pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, {platform.machine()}; torch {torch.__version__}, transformers {transformers.__version__}; {options.size} size, "
        f"{options.batch} sequences of {options.files or f'{sizes.PATCH_LENGTH} x {sizes.PATCH_SIZE} bytes'}, dropout {options.dropout}, "
        f"median of {options.rounds}"
    )
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for variant in options.variants:
        pipes[variant], theirs = context.Pipe()
        arguments = (variant, sizes, options, theirs)
        os.environ["BENCH_TRAIN_CODE"] = os.path.abspath(options.against) if variant.startswith("before-") else ROOT
        context.Process(target=run_variant, args=arguments, daemon=True).start()
    results = {variant: [] for variant in options.variants}
    dtypes = {variant: torch.bfloat16 if "16" in variant else torch.float32 for variant in options.variants}
    rates = {dtype: [] for dtype in set(dtypes.values())}
    for number in range(options.warm_up + options.rounds):
        for variant, pipe in pipes.items():
            pipe.send(True)
            result = pipe.recv()
            if number == 0:
                print(f"{variant}: first step {sum(result[0]):.1f} s", flush=True)
            if number >= options.warm_up:
                results[variant].append(result)
        for dtype in rates:
            rates[dtype].append(matrix_rate(device, dtype))
    rates = {dtype: statistics.median(values) for dtype, values in rates.items()}
    print("matrix rate: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items()))
    print(f"{'variant':<22} {'forward':>8} {'backward':>8} {'optimizer':>9} {'step s':>8} {'(min-max)':>15} {'KB/s':>8} "
          f"{'of the rate':>11} {'peak GB':>8} {'speed':>6} {'memory':>6}")
    first_steps, first_peak = None, None
    lengths = [m.sum(1).tolist() for _, m, _ in make_batches(sizes, options.batch, options.files, "", options.warm_up + options.rounds)]
    flops = [step_flops(sizes, each) for each in lengths[options.warm_up :]]
    kilobytes = [sum(each) * sizes.PATCH_SIZE / 1000 for each in lengths[options.warm_up :]]
    for variant, measured in results.items():
        parts = [statistics.median(times) for times in zip(*(times for times, _, _ in measured))]
        steps = [sum(times) for times, _, _ in measured]
        step, peak = statistics.median(steps), max(peak for _, peak, _ in measured)
        first_steps, first_peak = first_steps or steps, first_peak or peak
        speed = statistics.median(before / after for before, after in zip(first_steps, steps))  # within each round
        rate = rates[dtypes[variant]]
        share = f"{statistics.median(f / s for f, s in zip(flops, steps)) / rate:.0%}" if "megabyte" not in variant else ""
        print(f"{variant:<22} {parts[0]:8.3f} {parts[1]:8.3f} {parts[2]:9.3f} {step:8.3f} {f'{min(steps):.3f}-{max(steps):.3f}':>15} "
              f"{statistics.median(k / s for k, s in zip(kilobytes, steps)):8.2f} {share:>11} {peak / 1e9:8.2f} {speed:5.2f}x {peak / first_peak:5.0%}")


if __name__ == "__main__":
    main()
