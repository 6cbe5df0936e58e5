"""Compares the sizes of containers with other compressors, file by file, and times both directions.

    python benchmarks/bench_compress.py --weights weights.pth --folder midi/test [--files 100] [--batch 32]
    python benchmarks/bench_compress.py --sizes 16 512 768 12 3 --folder midi/test --files 32 --bytes 256
    python benchmarks/bench_compress.py --others --folder midi/test

With --others, only the other compressors run. Without weights, the model of `--sizes` has random ones, and only its speed is
meaningful.
"""

import argparse
import os
import platform
import random
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import brotli
import torch
import zstandard

import utils
from bgpt import lossless, system
from bgpt.distributed import tune_memory
from bgpt.evaluation import COMPRESSORS
from bgpt.files import extension_of, list_files
from bgpt.model import load_model

ALL_COMPRESSORS = COMPRESSORS | {
    "zstd -19": zstandard.ZstdCompressor(level=19, write_checksum=False, write_content_size=True).compress,
    "brotli -11": lambda content: brotli.compress(content, quality=11),
}


def time_coder(options, contents):
    """Compresses and decompresses {path: content}, prints the speeds, and returns the containers' total bytes."""
    tune_memory()
    torch.manual_seed(0)
    model = load_model(options.weights, "cpu").net if options.weights else utils.ModelSizes(*options.sizes).build()
    coder, seconds = lossless.Coder(model.eval(), options.batch), []
    with tempfile.TemporaryDirectory() as folder:
        # copies, since --bytes may cut files; numbered, since two may have the same name
        names = [f"{i}.{extension_of(path)}".rstrip(".") for i, path in enumerate(contents)]
        files = {os.path.join(folder, name): content for name, content in zip(names, contents.values())}
        for code in (lambda *arguments: lossless.compress(coder, files, False, *arguments),
                     lambda *arguments: lossless.decompress(coder, files, *arguments)):  # fmt: skip
            for path, content in files.items():
                with open(path, "wb") as file:
                    file.write(content)
            failed, start = [], time.perf_counter()
            done = list(code(lambda count: None, failed))
            seconds.append(time.perf_counter() - start)
            assert not failed
            files = {path + lossless.SUFFIX: container for path, _, container in done}
    assert sorted(content for _, content, _ in done) == sorted(contents.values())
    containers = [container for _, _, container in done]
    total, stored = sum(map(len, contents.values())), sum(container[0] == lossless.STORED for container in containers)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; float32, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, batches of {options.batch}; {len(contents)} files, "
        f"{total:,} bytes, {stored} stored"
    )
    print("bytes/s: compress (without VERIFY) {:,.0f}, decompress {:,.0f}".format(*(total / each for each in seconds)))
    return sum(map(len, containers))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--weights", help="a checkpoint")
    parser.add_argument("--sizes", type=int, nargs=5, default=[16, 512, 768, 12, 3], help="as in utils.ModelSizes")
    parser.add_argument("--others", action="store_true", help="only the other compressors")
    parser.add_argument("--folder", required=True, help="folder of files")
    parser.add_argument("--files", type=int, default=0, help="number of files, drawn with seed 0; 0 = all")
    parser.add_argument("--bytes", type=int, default=None, help="most bytes of each file")
    parser.add_argument("--batch", type=int, default=32, help="INFERENCE_BATCH_SIZE")
    options = parser.parse_args()
    paths = list(list_files([options.folder], "--folder"))
    if options.files:
        paths = random.Random(0).sample(paths, min(options.files, len(paths)))
    contents = {}
    for path in paths:
        with open(path, "rb") as file:
            contents[path] = file.read(options.bytes)
    total = sum(map(len, contents.values()))
    if not total:
        raise system.UserError(f"--folder: {options.folder!r} contains no bytes to compress")
    sizes = {name: sum(len(compress(content)) for content in contents.values()) for name, compress in ALL_COMPRESSORS.items()}
    if options.others:
        print(f"{len(contents)} files, {total:,} bytes")
    else:
        sizes = {"container": time_coder(options, contents)} | sizes
    print("bits per byte: " + ", ".join(f"{name} {8 * size / total:.3f}" for name, size in sizes.items()))


if __name__ == "__main__":
    system.run(main)
