"""Draws pictures of README.md and docs/results.md from logs and outputs of runs. Needs matplotlib.

    python benchmarks/plots.py curves docs/learning.svg "random batches=new0.txt,new1.txt,new2.txt" "one length=old0.txt,old1.txt"
    python benchmarks/plots.py rolls docs/conversion.svg --true abc_midi/test --made output --files a.abc.mid b.abc.mid

curves: bits per byte of the evaluation after each epoch, mean and range of each label's logs (LOGS_PATH).
rolls: the notes of true MIDI files and of their conversions.
"""

import argparse
import os
import statistics
import sys

import matplotlib
from bench_convert import read_notes, read_pair, share_right
from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))

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


def draw_rolls(options):
    """Returns a figure of piano rolls, true notes as grey bars, converted ones as coloured lines."""
    figure = Figure(figsize=(9, 1.9 * len(options.files)), layout="constrained")
    rows = figure.subplots(len(options.files), squeeze=False)
    for name, axes in zip(options.files, rows[:, 0]):
        contents = read_pair(options.true, options.made, name)
        styles = ({"color": "0.8", "linewidth": 5, "label": "true"}, {"color": "tab:blue", "linewidth": 1.8, "label": "converted"})
        for content, style in zip(contents, styles):
            notes = [note for note in read_notes(content) if note[0] < options.ticks]
            starts, pitches, lengths = zip(*notes) if notes else ((), (), ())
            axes.hlines(pitches, starts, [start + length for start, length in zip(starts, lengths)], **style)
        axes.set(title=f"{name}: {share_right(*contents):.0%} of all its notes right", ylabel="MIDI pitch", xlim=(0, options.ticks))
    rows[-1, 0].set(xlabel="ticks")
    rows[0, 0].legend(frameon=False, loc="upper right", ncols=2)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(required=True)
    curves = kinds.add_parser("curves")
    curves.set_defaults(draw=draw_curves)
    curves.add_argument("picture")
    curves.add_argument("lines", nargs="+", help="LABEL=LOG,LOG,…")
    rolls = kinds.add_parser("rolls")
    rolls.set_defaults(draw=draw_rolls)
    rolls.add_argument("picture")
    rolls.add_argument("--true", required=True, help="folder of the true files")
    rolls.add_argument("--made", required=True, help="OUTPUT_FOLDER of MODE convert")
    rolls.add_argument("--files", nargs="+", required=True)
    rolls.add_argument("--ticks", type=int, default=24000, help="ticks to draw")
    options = parser.parse_args()
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bgpt", "axes.spines.top": False, "axes.spines.right": False}
    options.draw(options).savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
