"""Draws pictures of README.md and docs/results.md from logs and outputs of runs. Needs matplotlib.

    python benchmarks/plots.py curves docs/learning.svg "Muon=muon0.txt,muon1.txt" "AdamW=adamw0.txt,adamw1.txt"
    python benchmarks/plots.py strip docs/strip.png --images output/*.bmp --weights weights.pth --damaged damaged.bin \\
        --true abc_midi/test --made converted --tune a.abc.mid

curves: bits per byte of the evaluation after each epoch, mean and range of each label's logs (LOGS_PATH).
strip: generated images, the bytes of a file coloured by their bits, and the notes of a MIDI file and its conversion.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from bench_convert import read_notes, read_pair, share_right
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bgpt  # noqa: E402
import utils  # noqa: E402
from bgpt import evaluation  # noqa: E402
from logs import read_log  # noqa: E402


def read_figure(path, name):
    """Returns {epoch: value} of a figure in a training log. Raises ValueError if it has none."""
    values = {int(entry["epoch"]): entry[name] for entry in read_log(path) if name in entry}
    if not values:
        raise ValueError(f"{path} has no {name}")
    return values


def draw_curves(options):
    """Returns a figure of learning curves."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, _, paths in (line.partition("=") for line in options.lines):
        logs = [read_figure(path, "eval_bits_per_byte") for path in paths.split(",")]
        epochs = sorted(set.intersection(*map(set, logs)))
        values = [[log[epoch] for log in logs] for epoch in epochs]
        drawn = axes.plot(epochs, [statistics.fmean(each) for each in values], marker="o", markersize=3, label=label)
        axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), alpha=0.2, color=drawn[0].get_color())
    axes.set(xlabel="epoch", ylabel="bits per byte, evaluation files")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def draw_images(axes, paths):
    """Draws generated bitmaps in two rows."""
    columns, size = -(-len(paths) // 2), 36  # pixels of 32 and a margin
    for number, path in enumerate(paths):
        left, top = number % columns * size, number // columns * size
        axes.imshow(Image.open(path).convert("L"), cmap="gray", extent=(left, left + 32, top + 32, top), vmin=0, vmax=255)
    axes.set(xlim=(0, columns * size - 4), ylim=(2 * size - 4, 0), title="images written byte by byte")
    axes.axis("off")


def draw_map(axes, weights, path):
    """Draws the bytes of a file in rows of 8, coloured by their bits."""
    net, content = bgpt.load(weights).net, Path(path).read_bytes()
    patches = utils.to_patches(np.frombuffer(content, np.uint8), Path(path).suffix[1:], net.patch_size)
    with torch.no_grad():
        [(nats, _)] = evaluation.predict(net, [(patches, patches != utils.END, 1)], torch.float32)
    bits = nats.reshape(-1)[: len(content)] / math.log(2)
    cells = np.pad(bits, (0, -len(bits) % 8), constant_values=math.nan).reshape(-1, 8)
    axes.imshow(cells, cmap="YlGnBu", vmin=0, vmax=10)
    for i, (byte, bit) in enumerate(zip(content, bits.tolist())):
        color = "white" if bit > 5 else "black"
        axes.text(i % 8, i // 8, f"{byte:02x}", ha="center", va="center", family="monospace", size=8, color=color)
    axes.set(title="a damaged byte, found by its bits")
    axes.axis("off")


def draw_roll(axes, true, made, name, ticks):
    """Draws the notes of a true MIDI file as grey bars, and those of its conversion as coloured lines."""
    contents = read_pair(true, made, name)
    for content, style in zip(contents, ({"color": "0.8", "linewidth": 5}, {"color": "tab:blue", "linewidth": 1.8})):
        notes = [note for note in read_notes(content) if note[0] < ticks]
        starts, pitches, lengths = zip(*notes) if notes else ((), (), ())
        axes.hlines(pitches, starts, [start + length for start, length in zip(starts, lengths)], **style)
    title = f"ABC converted to MIDI (grey: true), {share_right(*contents):.0%} right"
    axes.set(title=title, xlabel="ticks", ylabel="pitch", xlim=(0, ticks))


def draw_strip(options):
    """Returns a figure of generated images, a surprisal map and a piano roll."""
    figure = Figure(figsize=(11, 2.6), dpi=110, layout="constrained")
    images, surprisal, roll = figure.subplots(1, 3, width_ratios=(4, 3, 5))
    draw_images(images, options.images)
    draw_map(surprisal, options.weights, options.damaged)
    draw_roll(roll, options.true, options.made, options.tune, options.ticks)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(required=True)
    curves = kinds.add_parser("curves")
    curves.set_defaults(draw=draw_curves)
    curves.add_argument("picture")
    curves.add_argument("lines", nargs="+", help="LABEL=LOG,LOG,…")
    strip = kinds.add_parser("strip")
    strip.set_defaults(draw=draw_strip)
    strip.add_argument("picture")
    strip.add_argument("--images", nargs="+", required=True, help="generated .bmp files")
    strip.add_argument("--weights", required=True, help="model for the damaged file")
    strip.add_argument("--damaged", required=True, help="file of at most PATCH_LENGTH patches")
    strip.add_argument("--true", required=True, help="folder of the true MIDI files")
    strip.add_argument("--made", required=True, help="OUTPUT_FOLDER of MODE convert")
    strip.add_argument("--tune", required=True, help="file in both")
    strip.add_argument("--ticks", type=int, default=24000, help="ticks to draw")
    options = parser.parse_args()
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bgpt", "axes.spines.top": False, "axes.spines.right": False}
    options.draw(options).savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
