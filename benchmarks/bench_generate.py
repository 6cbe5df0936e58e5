"""Times generation against the machine's floor and against generation without caches.

    python benchmarks/bench_generate.py [--size quick|small|paper] [--parts rate ragged memory] [--samples 1 8 32 100]
        [--contexts 16 128 500] [--precisions fp32 bf16] [--rounds 5]
    python benchmarks/bench_generate.py --size small --against FOLDER [--weights weights.pth] [--extension abc] [--samples 1 12 64]

With --against, whole generations alternate with another commit in the worktree FOLDER, made with
`git worktree add FOLDER COMMIT`. Both draw the same random numbers, with TOP_P 0.9, and their outputs are compared.

A step writes one patch of S = 16 bytes for each sample, with one step of the patch-level decoder and 16 of the byte-level one.
At paper size (12 + 3 layers, D = 768), with C patches before it, a step of one sample needs

    multiply-adds  84,934,656 patch-level and 16 x 21,431,040 byte-level for the weights, together 427.8 million,
                   18,432 x C and 626,688 for the attention
    bytes read     84,934,656 and 16 x 21,431,040 weights of 2 bytes (bf16) or 4, once for all samples, together 0.86 or
                   1.71 GB, as the byte-level ones (43 or 86 MB) exceed a usual cache,
                   18,432 x C keys and values of each sample, of 4 bytes on a CPU, of 2 in bf16 on a GPU

The floor of a step is, for each decoder, the larger of its multiply-adds at the machine's matrix rate and its bytes at the
machine's read bandwidth, both measured first. The plain way generates one sample in float32 without caches. Each patch reruns
the whole prefix through the patch-level decoder, each byte the patch's prefix through the byte-level one.
"""

import argparse
import hashlib
import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == "__main__":  # the processes of `compare` import the modules of their folder in `serve`
    sys.path.insert(0, ROOT)

    import utils
    from bgpt.distributed import pick_device
    from bgpt.generation import PatchWriter, Prompt, Sampling, generate
    from bgpt.model import load_model

SIZES = {  # 0.9, 5.1 and 110 million parameters
    "quick": {"PATCH_SIZE": 2, "PATCH_LENGTH": 32, "HIDDEN_SIZE": 128, "PATCH_NUM_LAYERS": 3, "BYTE_NUM_LAYERS": 1},
    "small": {"PATCH_SIZE": 16, "PATCH_LENGTH": 128, "HIDDEN_SIZE": 256, "PATCH_NUM_LAYERS": 3, "BYTE_NUM_LAYERS": 2},
    "paper": {"PATCH_SIZE": 16, "PATCH_LENGTH": 512, "HIDDEN_SIZE": 768, "PATCH_NUM_LAYERS": 12, "BYTE_NUM_LAYERS": 3},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(args, dtype, device, **sizes):
    """Returns a model of args.size, except for `sizes`, with fixed random weights."""
    torch.manual_seed(0)
    return utils.ModelSizes(**(SIZES[args.size] | sizes)).build().to(device, dtype).eval()


def timed(function):
    """Returns the seconds of a call, including the device's work."""
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matrix_rate(dtype, device):
    """Returns the multiply-adds per second of a large product, the best of 20."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return size**3 / min(timed(lambda: a @ b) for _ in range(20))


def bandwidth(device):
    """Returns the bytes read per second by a sum over 1 GiB, the best of 20."""
    numbers = torch.ones(2**28, device=device)
    return 4 * len(numbers) / min(timed(numbers.sum) for _ in range(20))


def floor(model, samples, context, rate, read):
    """Returns the floor of a step in seconds. `rate` is in multiply-adds per second, `read` in bytes per second."""
    patch_level, byte_level = model.patch_level_decoder, model.byte_level_decoder.base
    size, width, itemsize = patch_level.patch_size, patch_level.config.n_embd, model.dtype.itemsize
    cached = 2 * patch_level.config.n_layer * width * context  # numbers per sample
    weights = sum(p.numel() for p in patch_level.base.h.parameters() if p.dim() == 2)
    cache_itemsize = 4 if model.device.type == "cpu" else itemsize
    least = max(samples * (weights + cached) / rate, (weights * itemsize + samples * cached * cache_itemsize) / read)
    weights = sum(p.numel() for p in byte_level.transformer.h.parameters() if p.dim() == 2) + byte_level.lm_head.weight.numel()
    attention = byte_level.config.n_layer * width * (size + 1)  # 2 per position, mean of the steps
    return least + size * max(samples * (weights + attention) / rate, weights * itemsize / read)


@torch.inference_mode()
def write_plainly(model, prefix):
    """Writes one patch after a prefix, int64 (1, C, S), the plain way."""
    encoded = model.patch_level_decoder(prefix).last_hidden_state[:, -1:]  # (1, 1, D)
    decoder, symbols = model.byte_level_decoder.base, []
    for _ in range(prefix.shape[2]):
        known = decoder.transformer.wte(torch.tensor([symbols], dtype=torch.int64, device=prefix.device))  # (1, j, D)
        logits = decoder(inputs_embeds=torch.cat((encoded, known), dim=1), use_cache=False).logits[0, -1]
        symbols.append(int(torch.multinomial(torch.softmax(logits, -1), 1)))


def filled_writer(model, batch_size):
    """Returns a PatchWriter with full contexts of random symbols, keys and values."""
    writer = PatchWriter(model, batch_size, Sampling())
    writer.patch_cache.kv.normal_()
    writer.newest.random_(256)
    writer.uniforms.uniform_()
    return writer


@torch.inference_mode()
def step(writer, samples, context):
    writer.positions[:samples] = context - 1
    writer.write(samples, context)


def measure_rate(args, device):
    """Prints bytes/s and the ratio to the plain way, in alternating rounds."""
    read = bandwidth(device)
    plain, size = build(args, torch.float32, device), SIZES[args.size]["PATCH_SIZE"]
    prefixes = {context: torch.randint(256, (1, context, size), device=device) for context in args.contexts}
    writers, rates = {}, {}
    for name in args.precisions:
        rates[name] = matrix_rate(DTYPES[name], device)
        writers[name] = filled_writer(build(args, DTYPES[name], device), max(args.samples))
    ways = list(itertools.product(args.precisions, args.samples))
    if device.type == "cuda":
        ways += [(f"{name} without graphs", samples) for name, samples in ways]
    seconds = {(way, context): [] for way in ["plain", *ways] for context in args.contexts}
    for turn in range(args.rounds + 1):  # the first one warms up
        for context in args.contexts:
            times = {"plain": timed(lambda: write_plainly(plain, prefixes[context]))}
            for name, samples in ways:
                writer = writers[name.split()[0]]
                writer.captures = device.type == "cuda" and "without" not in name
                times[name, samples] = timed(lambda: step(writer, samples, context))
            for way in times:
                if turn:
                    seconds[way, context].append(times[way])

    print(f"read bandwidth {read / 1e9:.1f} GB/s; matrix rate "
          + ", ".join(f"{rate / 1e9:,.0f} billion multiply-adds/s in {name}" for name, rate in rates.items()))
    print(f"medians of {args.rounds} alternating rounds; bytes/s (share of the floor reached) after so many patches; "
          "ratio: mean time of the plain way over all contexts, by that of a patch here (its range over the rounds)")
    print(f"{'':<22}{'samples':>8}" + "".join(f"{context:>19}" for context in args.contexts) + f"{'ratio':>9}")
    for way in ["plain", *ways]:
        name, samples = (way, 1) if way == "plain" else way
        line = f"{name:<22}{samples:>8}"
        for context in args.contexts:
            middle = statistics.median(seconds[way, context])
            share = ""
            if way != "plain":
                precision = name.split()[0]
                share = f"({floor(writers[precision].model, samples, context, rates[precision], read) / middle:.0%})"
            line += f"{samples * size / middle:>12,.0f} {share:>6}"
        ratios = [
            samples * sum(seconds["plain", context][turn] for context in args.contexts)
            / sum(seconds[way, context][turn] for context in args.contexts)
            for turn in range(args.rounds)
        ]
        print(f"{line}{statistics.median(ratios):>8.1f}x ({min(ratios):.1f} to {max(ratios):.1f})")


def silence_end(model):
    """Makes a model never write symbol 256, by an output direction that only lowers its logit."""
    gpt2 = model.byte_level_decoder.base.transformer
    direction = torch.nn.functional.normalize(torch.randn(gpt2.config.n_embd), dim=0)
    with torch.no_grad():
        gpt2.ln_f.bias += 10 * direction.to(gpt2.dtype)
        gpt2.wte.weight[utils.END] = -10 * direction.to(gpt2.dtype)
    return model


def generation_rate(model, prompts, batch_size):
    """Returns (bytes/s, bytes of each sample) of a whole run."""
    lengths = []
    prompts = [Prompt(i, symbols, [0, i]) for i, symbols in enumerate(prompts)]
    seconds = timed(lambda: lengths.extend(len(c.symbols) for c in generate(model, prompts, batch_size, Sampling())))
    return sum(lengths) / seconds, lengths


def measure_ragged(args, device):
    """Prints the rate of 200 prompts and outputs of different lengths, and of 32 of equal length."""
    rng = np.random.default_rng(0)
    size, longest = SIZES[args.size]["PATCH_SIZE"], min(60, SIZES[args.size]["PATCH_LENGTH"] // 2)
    prompts = [rng.integers(256, size=n * size) for n in rng.integers(4, longest + 1, 200)]
    for name in args.precisions:
        # with random weights, each symbol ends its sequence with probability 1/257
        various = build(args, DTYPES[name], device)
        _, lengths = generation_rate(various, prompts, 32)  # warms up, too
        mean = round(np.mean(lengths) / size)  # patches
        equal = silence_end(build(args, DTYPES[name], device, PATCH_LENGTH=32 + mean))
        rates = []
        for turn in range(3):  # in turn
            rate, lengths = generation_rate(various, prompts, 32)
            equal_rate, equal_lengths = generation_rate(equal, list(rng.integers(256, size=(32, 32 * size))), 32)
            assert set(equal_lengths) == {mean * size}
            rates.append((rate, equal_rate, rate / equal_rate))
        rate, equal_rate, share = (statistics.median(values) for values in zip(*rates))
        low, middle, high = np.percentile(lengths, [0, 50, 100])
        print(f"{name}: 200 prompts of 4 to {longest} patches, outputs of {low:.0f} to {high:.0f} bytes (median {middle:.0f}): "
              f"{rate:,.0f} bytes/s; 32 prompts of 32 patches, outputs of {mean}: {equal_rate:,.0f}; "
              f"share {share:.0%} (medians of 3 rounds)", flush=True)


def measure_memory(args, device):
    """Prints the peak memory of 32 samples that fill the context, without the model."""
    model = silence_end(build(args, torch.bfloat16, device))
    prompt = np.zeros((model.patch_length - 12) * model.patch_size, dtype=np.int64)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        generation_rate(model, [prompt] * 32, 32)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = _memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak on Linux
        generation_rate(model, [prompt] * 32, 32)
        peak = _memory("VmHWM") - before
    print(f"bf16, 32 samples of all {model.patch_length} patches: {peak / 2**30:.2f} GiB above the model")


def _memory(field):
    """Returns a field of this process's /proc status in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def serve(folder, sizes, weights, extension, pipe):
    """Process that generates with the code in `folder`. Answers (samples, seed) with (seconds, bytes, their digest)."""
    sys.path.insert(0, folder)
    import utils
    from bgpt.generation import Prompt, Sampling, generate

    torch.manual_seed(0)
    model = utils.ModelSizes(**sizes).build().eval()
    if weights is not None:
        model.load_state_dict(weights)
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        samples, seed = asked
        start = utils.extension_patch(extension, sizes["PATCH_SIZE"])
        prompts = [Prompt(i, start, [seed, i]) for i in range(samples)]
        begin = time.perf_counter()
        done = list(generate(model, prompts, samples, Sampling(top_p=0.9)))
        seconds = time.perf_counter() - begin
        written = b"".join(c.symbols.tobytes() for c in sorted(done, key=lambda c: c.key))
        pipe.send((seconds, sum(len(c.symbols) for c in done), hashlib.md5(written).hexdigest()))


def compare(args):
    """Prints the rates of whole generations by this code and another folder's, in float32 on the CPU."""
    sizes, weights = SIZES[args.size], None
    if args.weights:
        model = load_model(args.weights, "cpu").net
        weights = model.state_dict()
        sizes = {
            "PATCH_SIZE": model.patch_size,
            "PATCH_LENGTH": model.patch_length,
            "HIDDEN_SIZE": model.config.n_embd,
            "PATCH_NUM_LAYERS": model.patch_level_decoder.config.n_layer,
            "BYTE_NUM_LAYERS": model.byte_level_decoder.config.n_layer,
        }
    context, pipes = multiprocessing.get_context("spawn"), []
    for folder in (os.path.abspath(args.against), ROOT):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(folder, sizes, weights, args.extension, theirs), daemon=True).start()
        ours.recv()
        pipes.append(ours)
    what = args.weights or f"{args.size} size with random weights"
    print(f"whole generations of {what}, medians of {args.rounds} alternating rounds; before: the code in {args.against}")
    print(f"{'samples':>8} {'bytes':>8} {'before, bytes/s':>16} {'now, bytes/s':>14} {'ratio':>7} (range over the rounds)")
    for samples in args.samples:
        rates, written = [], 0
        for seed in range(args.rounds + 1):  # the first one warms up
            answers = []
            for pipe in pipes:
                pipe.send((samples, seed))
                answers.append(pipe.recv())
            assert answers[0][1:] == answers[1][1:], "the two wrote different bytes"
            if seed:
                rates.append([count / seconds for seconds, count, _ in answers])
                written += answers[0][1]
        ratios = [after / before for before, after in rates]
        before, after = (statistics.median(values) for values in zip(*rates))
        print(f"{samples:>8} {written:>8,} {before:>16,.0f} {after:>14,.0f} {statistics.median(ratios):>6.2f}x "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    for pipe in pipes:
        pipe.send(None)


def main():
    parts = {"rate": measure_rate, "ragged": measure_ragged, "memory": measure_memory}
    parser = argparse.ArgumentParser(description="Time generation against its floor and against the plain way.")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 32, 100])
    parser.add_argument("--contexts", nargs="+", type=int, help="patches before the written one; at paper size 16 128 500")
    parser.add_argument("--against", help="a worktree of another commit, to compare whole generations with")
    parser.add_argument("--weights", help="a checkpoint, for --against")
    parser.add_argument("--extension", default="abc", help="extension of the files to write, for --against")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    length = SIZES[args.size]["PATCH_LENGTH"]
    args.contexts = args.contexts or [length // 32, length // 4, length - length // 40]
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads, {_processor()}"
    print(f"{name}; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}; {args.size} size, "
          f"{', '.join(f'{constant} {value}' for constant, value in SIZES[args.size].items())}")
    if args.against:
        compare(args)
        return
    if len(args.parts) == 1:
        parts[args.parts[0]](args, device)
        return
    for part in args.parts:  # one process per part, so that each starts with empty memory
        options = ["--samples", *map(str, args.samples), "--contexts", *map(str, args.contexts), "--precisions", *args.precisions]
        command = [sys.executable, __file__, "--size", args.size, "--parts", part, *options, "--rounds", str(args.rounds)]
        sys.stdout.flush()
        subprocess.run(command, check=True)


def _processor():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            return next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
