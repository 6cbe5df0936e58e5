"""How good a model is: bits per byte of files, which of their bytes surprise it, and a classifier's report.

A file longer than PATCH_LENGTH patches is scored in windows that advance by half, see windowing.py; every symbol is scored once.
The symbols of a file that count for its bits per byte are its content and the first 256 after it; see `SymbolTotals`.
"""

import bz2
import dataclasses
import gzip
import itertools
import lzma
import math
import os

import numpy as np
import torch

from bgpt import distributed as devices
from bgpt import intervals
from bgpt import files as listing
from bgpt import system
import utils
from utils import END

# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SymbolTotals:
    """Sums over the targets of a generative model, and the figures that are made of them."""

    nats: float = 0.0  # cross-entropy of all symbols
    symbols: float = 0.0
    counted_nats: float = 0.0  # that of the contents and their end-of-file symbols, without padding
    bytes: float = 0.0  # of the contents

    def add(self, output, batch, targets):
        """Adds a BytePrediction for the `targets` (bool (B, P-1)) of a Batch."""
        nats = output.nats.detach()  # (N, S)
        counted = batch.counted[:, 1:][targets]  # (B, P-1, S) -> (N, S)
        counted_bytes = counted & (batch.patches[:, 1:][targets] != END)
        counted_nats = torch.where(counted.to(nats.device), nats, 0).sum()
        sums = torch.stack((nats.sum(), counted_nats)).tolist()  # the one wait for the device
        self.nats += sums[0]
        self.symbols += nats.numel()
        self.counted_nats += sums[1]
        self.bytes += int(counted_bytes.sum())

    @property
    def loss(self):
        """Mean cross-entropy over all symbols of all targets, nats per symbol: the published measure."""
        return self.nats / max(self.symbols, 1)

    @property
    def bits_per_byte(self):
        """Bits of the content, its end-of-file symbol included and the padding after it not, per content byte."""
        return self.counted_nats / math.log(2) / max(self.bytes, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of files
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, sequences, dtype, num_likeliest=1):
    """Returns how well a generative model predicts the patches of sequences that follow their contexts.

    Args:
        model: bGPTLMHeadModel in eval mode.
        sequences: list of (patches int16 (P, S), counted bool (P, S), context), see `utils.Batch`.
        dtype: torch.dtype to compute in.
        num_likeliest: k, of how many symbols the probabilities are wanted; 1 = only which is likeliest.

    Returns:
        for each sequence: nats float32 (n, S); the likeliest symbols int64 (n, S, k); with k > 1 their probabilities float32
        (n, S, k), else None.
    """
    batch = utils.Batch(sequences)
    with devices.autocast(model.device, dtype):
        output = model(batch.patches_on(model.device), batch.masks, batch.targets)
    if num_likeliest > 1:
        probabilities, likeliest = output.logits.float().softmax(-1).topk(num_likeliest)  # (N, S, k) each
    else:
        probabilities, likeliest = None, output.logits.argmax(-1, keepdim=True)
    counts = batch.targets.sum(1).tolist()

    def by_sequence(rows):
        return [None] * len(counts) if rows is None else [part.numpy() for part in rows.cpu().split(counts)]

    return list(zip(*map(by_sequence, (output.nats.float(), likeliest, probabilities))))


NUM_STRETCHES, LONGEST_STRETCH = 10, 16  # how many of a file are told; bytes
PROFILE_BINS = 200  # points of the line of bits along a file

_XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
COMPRESSORS = {  # {name: function of a file's bytes}
    "gzip -9": lambda content: gzip.compress(content, 9, mtime=0),
    "bz2 -9": lambda content: bz2.compress(content, 9),
    # a dictionary larger than the file changes no byte of the result, but takes 0.7 GB
    "xz -9e": lambda content: lzma.compress(content, filters=[{**_XZ, "dict_size": min(max(len(content), 2**12), 2**26)}]),
}


@dataclasses.dataclass
class FileScore(SymbolTotals):
    """The figures of a file; of a pair, those of its target given its input."""

    index: int = 0  # of the example
    path: str = ""  # of the file that is scored
    name: str = ""  # within the folder; "input -> target" of a pair
    group: str = ""  # what it is summed up with: ".mid", or "abc->mid" of a pair
    top1: int = 0  # symbols, among its bytes and the 256 that ends it, that the model held likeliest
    exact: bool = False  # all of them, within PATCH_LENGTH: greedy decoding would write this very file
    stretches: list = dataclasses.field(default_factory=list)  # (offset, bytes, bits), see surprising_stretches
    profile: np.ndarray | None = None  # float32 (2, bins), mean and highest bits along the file
    compressed: dict = dataclasses.field(default_factory=dict)  # {compressor: bits}

    @property
    def bits(self):
        """Bits of the content and of the first 256 after it."""
        return self.counted_nats / math.log(2)


def surprising_stretches(bits, count=NUM_STRETCHES, longest=LONGEST_STRETCH):
    """Returns the stretches of a file that a model expected least, those with the most surprising symbol first.

    A stretch is the most surprising symbol that is in none yet, and those beside it with at least half as many bits.

    Args:
        bits: (n,), of each byte of a file and of the 256 that ends it.
        count: how many stretches.
        longest: symbols in a stretch, at most.

    Returns:
        list of (offset, symbols, bits in all).
    """
    left, found = np.array(bits, dtype=np.float64), []  # left: -1 at symbols that are in a stretch
    while len(found) < count and left.max() >= 0:
        first = int(left.argmax())
        least, last = left[first] / 2 or math.inf, first + 1  # beside a symbol that costs nothing, none is surprising
        while last - first < longest:
            before, after = left[first - 1] if first else -1.0, left[last] if last < len(left) else -1.0
            if max(before, after) < least:
                break
            first, last = (first - 1, last) if before > after else (first, last + 1)
        found.append((first, last - first, float(left[first:last].sum())))
        left[first:last] = -1.0
    return found


def _profile(bits):
    """Returns the mean and the highest of bits (n,) in at most PROFILE_BINS equal parts, float32 (2, bins)."""
    starts = np.unique(np.linspace(0, len(bits), min(len(bits), PROFILE_BINS), endpoint=False).astype(int))
    lengths = np.diff(np.append(starts, len(bits)))
    return np.stack((np.add.reduceat(bits, starts) / lengths, np.maximum.reduceat(bits, starts))).astype(np.float32)


class _Partial:
    """A file some of whose windows are scored."""

    def __init__(self, size, num_windows):
        self.nats = np.zeros(size + 1, dtype=np.float32)
        self.is_top1 = np.zeros(size + 1, dtype=bool)
        self.all_nats, self.symbols, self.missing = 0.0, 0, num_windows


def score_files(model, windows, folder, batch_size, dtype, progress, failed):
    """Yields the FileScore of every example, in the order in which they are finished.

    Args:
        model: bGPTLMHeadModel in eval mode.
        windows: `windowing.Windows` of the examples.
        folder: what names are relative to.
        batch_size: most windows at once.
        dtype: torch.dtype to compute in.
        progress: called with the number of bytes scored, after each batch.
        failed: gets (path, reason) for those that cannot be read.
    """
    waiting, partial, bad = windows.by_length(), {}, set()

    def give_up(index, error):
        failed.append((windows.examples[index][-1], getattr(error, "strerror", None) or str(error)))
        bad.add(index)
        partial.pop(index, None)

    while chosen := list(itertools.islice(waiting, batch_size)):
        read = []  # (index, window, sequence)
        for index, window in chosen:
            try:
                if index not in bad:
                    read.append((index, window, windows.read_window(index, window)))
            except (OSError, system.UserError) as error:
                give_up(index, error)
        read = [each for each in read if each[0] not in bad]
        if read:
            predicted = predict(model, [sequence for *_, sequence in read], dtype)
            for (index, window, (patches, _, context)), (nats, likeliest, _) in zip(read, predicted):
                if index not in partial:
                    partial[index] = _Partial(int(windows.sizes[index]), len(windows.of(index)))
                file, scored = partial[index], windows.predicted_symbols(index, window)
                count = max(scored.stop - scored.start, 0)  # none in an end patch behind a content that ends before it
                file.nats[scored] = nats.reshape(-1)[:count]
                file.is_top1[scored] = (likeliest[:, :, 0] == patches[context:]).reshape(-1)[:count]
                file.all_nats += float(nats.sum(dtype=np.float64))
                file.symbols += nats.size
                file.missing -= 1
        for index in [index for index, file in partial.items() if file.missing == 0]:
            try:
                yield _finish(windows, index, partial.pop(index), folder)
            except OSError as error:
                give_up(index, error)
        slices = (windows.predicted_symbols(index, window) for index, window in chosen)
        progress(sum(max(scored.stop - scored.start, 0) for scored in slices))


def _finish(windows, index, file, folder):
    """Returns the FileScore of an example whose windows are all scored; raises OSError if it can no longer be read."""
    paths, size = windows.examples[index], int(windows.sizes[index])
    with open(paths[-1], "rb") as opened:
        content = opened.read()
    extensions = [listing.extension_of(path) for path in paths]
    bits = file.nats / math.log(2)
    return FileScore(
        nats=file.all_nats,
        symbols=file.symbols,
        counted_nats=float(file.nats.sum(dtype=np.float64)),
        bytes=size,
        index=index,
        path=paths[-1],
        name=" -> ".join(os.path.relpath(path, folder) for path in paths),
        group="->".join(extensions).lower() if len(paths) == 2 else f".{extensions[0]}" if extensions[0] else "no extension",
        top1=int(file.is_top1.sum()),
        exact=bool(file.is_top1.all()) and int(windows.given[index]) + size // windows.patch_size < windows.patch_length,
        stretches=surprising_stretches(bits),
        profile=_profile(bits),
        compressed={name: 8 * len(compress(content)) for name, compress in COMPRESSORS.items()},
    )


def score_symbols(model, windows, index, parts, dtype, num_likeliest=3):
    """Scores parts of an example once more, to tell what the model expected in place of each symbol.

    Args:
        parts: list of (start, stop) among the symbols of the file's content and the 256 after it.

    Returns:
        list with, for each part of n symbols: the symbols int16 (n,), their bits float32 (n,), the likeliest symbols int64
        (n, k), and the probabilities of those, float32 (n, k).

    Raises:
        OSError, UserError: see `Windows.read_window`.
    """
    pieces = [[] for _ in parts]
    for window in windows.of(index):
        scored = windows.predicted_symbols(index, window)
        shared = [(max(start, scored.start), min(stop, scored.stop)) for start, stop in parts]
        if not any(low < high for low, high in shared):
            continue
        patches, counted, context = windows.read_window(index, window)
        [predicted] = predict(model, [(patches, counted, context)], dtype, num_likeliest)
        # (n patches, S) or (n patches, S, k) -> (n·S,) or (n·S, k)
        columns = [each.reshape(-1, *each.shape[2:]) for each in (patches[context:], *predicted)]
        columns[1] = columns[1] / math.log(2)
        for piece, (low, high) in zip(pieces, shared):
            if low < high:
                piece.append([column[low - scored.start : high - scored.start] for column in columns])
    return [[np.concatenate(column) for column in zip(*piece)] for piece in pieces]


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def classification_report(confusion, labels, most=30):
    """Returns what there is to say of a classifier's predictions, as aligned lines of text.

    Accuracy; balanced accuracy, the mean of the recalls; precision, recall and number of files of each label; and for up to
    `most` labels the confusion matrix. Of a label without files, or never predicted, recall or precision is "-".

    Args:
        confusion: (labels, labels), files of each true label (row) by predicted label (column).
        labels: list of str.
    """
    labels = [system.escape_name(label) for label in labels]
    files, predicted, correct = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    recalls = [c / n if n else None for c, n in zip(correct, files)]
    precisions = [c / n if n else None for c, n in zip(correct, predicted)]
    present = [recall for recall in recalls if recall is not None]
    lines = [
        f"accuracy {correct.sum() / files.sum():.4f} ({correct.sum():.0f} of {files.sum():.0f} files), "
        f"balanced accuracy {sum(present) / len(present):.4f}",
        "95 % interval of the accuracy: {1:.4f} to {2:.4f}".format(*intervals.wilson_interval(correct.sum() / files.sum(), files.sum())),
    ]
    table = [["label", "precision", "recall", "files", "predicted"]]
    for i, label in enumerate(labels):
        shares = ["-" if share is None else f"{share:.4f}" for share in (precisions[i], recalls[i])]
        table.append([label, *shares, f"{files[i]:.0f}", f"{predicted[i]:.0f}"])
    lines += aligned(table)
    if len(labels) <= most:
        lines.append("true label by row, predicted label by column:")
        table = [["", *(str(i) for i in range(len(labels)))]]
        table += [[f"{i} {label}", *(f"{count:.0f}" for count in confusion[i])] for i, label in enumerate(labels)]
        lines += aligned(table)
    return "\n".join(lines) + "\n"


def aligned(rows):
    """Returns the lines of a table, rows of texts: its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
