"""How OpenMP's threads should wait for each other: a training step and a generated patch, alone and beside busy processes.

    env -u OMP_NUM_THREADS python benchmarks/bench_threads.py [--variants default passive spin-1000 …] [--busy 0 1 2] [--seconds 1.5]
        [--rounds 2]

Each variant is a process of its own, since OpenMP reads its variables when PyTorch is loaded. The training step is that of the
README's quick start (0.9 million parameters, 64 sequences of 32 patches of 2 bytes, float32); the patch of 16 bytes is one of
a single sample of a model of 5.1 million. A busy process is `while True: pass`. Times are means over `--seconds`, the median of
the rounds: where threads wait for one that another process keeps from running, the median of the steps would hide it.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def environment(variant):
    """Returns the environment of a variant: default, passive, active, spin-N (times) or threads-N."""
    name, _, number = variant.partition("-")
    own = {"default": {}, "passive": {"OMP_WAIT_POLICY": name}, "active": {"OMP_WAIT_POLICY": name}}
    own |= {"spin": {"GOMP_SPINCOUNT": number}, "threads": {"OMP_NUM_THREADS": number}}
    return {key: value for key, value in os.environ.items() if key not in VARIABLES} | own[name]


def mean_ms(function, seconds):
    """Returns the mean milliseconds of what a function counts, called again and again for some seconds."""
    function()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        count += function()
    return 1000 * (time.perf_counter() - begin) / count


def measure(busy, seconds):
    """Prints ms of a step and of a patch for each number of busy processes; runs in a process with a variant's environment."""
    import numpy as np
    import torch

    from bgpt import distributed as devices
    from bgpt import generation
    import utils

    devices.tune_memory()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = utils.ModelSizes(2, 32, 128, 3, 1).build(dropout=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    contents = [rng.integers(0, 256, size).astype(np.uint8) for size in rng.integers(34, 58, 64)]
    sequences = [utils.to_patches(content, "bin", 2) for content in contents]
    batch = utils.Batch((patches, patches != utils.END) for patches in sequences)
    writer = utils.ModelSizes(16, 128, 256, 3, 2).build().eval()

    def step():
        output = model(batch.patches.long(), batch.masks, batch.masks[:, 1:] == 1)
        (output.nats.sum() / output.nats.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return 1

    def write():
        prompt = generation.Prompt("", utils.extension_patch("abc", 16), [int(rng.integers(2**31))])
        (written,) = generation.generate(writer, [prompt], 1, generation.Sampling())
        return -(-len(written.symbols) // 16)

    for number in busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
        try:
            print(mean_ms(step, seconds), mean_ms(write, seconds))
        finally:
            for other in others:
                other.kill()
                other.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default="default passive spin-100 spin-1000 spin-10000 threads-1".split())
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        return measure(options.busy, options.seconds)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; ms a step / a patch")
    print(f"{'':12}" + "".join(f"{number:>12} busy" for number in options.busy), flush=True)
    inner = ["--inner", "--seconds", str(options.seconds), "--busy", *map(str, options.busy)]
    found = {variant: [] for variant in options.variants}
    for _ in range(options.rounds):
        for variant, rounds in found.items():
            out = subprocess.check_output([sys.executable, __file__, *inner], env=environment(variant), text=True)
            rounds.append([float(word) for word in out.split()])
    for variant, rounds in found.items():
        middle = [statistics.median(column) for column in zip(*rounds)]
        print(f"{variant:12}" + "".join(f"{step:9.1f} / {patch:5.1f}" for step, patch in zip(middle[::2], middle[1::2])))


if __name__ == "__main__":
    main()
