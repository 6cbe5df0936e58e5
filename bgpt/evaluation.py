"""Scores of models: bits per byte of files, surprising bytes, and a classifier's report.

A file longer than PATCH_LENGTH patches is scored in windows that advance by half, see windows.py. Every symbol is scored once.
The symbols that count for a file's bits per byte are its content and the first 256 after it.
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

import utils
from bgpt.distributed import autocast
from bgpt.files import extension_of
from bgpt.intervals import wilson_interval
from bgpt.system import escape_name
from utils import END


# ---- Bits per byte --------------------------------------------------------------------------------------------------

class Totals:
    """Running sums over an epoch: two on the device, so that adding to them waits for nothing, and two on the CPU."""

    def __init__(self, device="cpu"):
        self._sums, self._counts = torch.zeros(2, dtype=torch.float64, device=device), [0.0, 0.0]

    def tolist(self):
        """Returns the four sums as floats, those on the device first; waits for the device."""
        return [*self._sums.tolist(), *self._counts]

    def load(self, values):
        """Sets the sums to those of a `tolist`."""
        self._sums[:] = torch.tensor(values[:2], dtype=torch.float64)
        self._counts = list(map(float, values[2:]))

    def over(self, ranks):
        """Returns the Totals of all ranks together."""
        totals = type(self)()
        totals.load(ranks.sum(self.tolist()))
        return totals

    def _mean(self, index, count):
        return float(self._sums[index]) / count if count else None


class SymbolTotals(Totals):
    """Totals over the targets of a generative model: nats of all symbols and of the counted ones, symbols, content bytes."""

    def add(self, output, batch, targets):
        """Adds a BytePrediction for the `targets` (bool (B, P-1)) of a Batch."""
        nats = output.nats.detach()  # (N, S)
        counted = batch.counted[:, 1:][targets]  # (B, P-1, S) -> (N, S)
        num_bytes = int((counted & (batch.patches[:, 1:][targets] != END)).sum())
        counted_nats = torch.where(utils.to_device(counted, nats.device), nats, 0).sum()
        self._sums += torch.stack((nats.sum(), counted_nats))
        self._counts = [self._counts[0] + nats.numel(), self._counts[1] + num_bytes]

    @property
    def loss(self):
        """Mean cross-entropy over all symbols of all targets, nats per symbol: the published measure. None without any."""
        return self._mean(0, self._counts[0])

    @property
    def bits_per_byte(self):
        """Bits of the content and its end-of-file symbol, without padding, per content byte. None without content."""
        return self._mean(1, self._counts[1] * math.log(2))

    def shown(self):
        """Returns the figures for a progress bar."""
        return {} if self.bits_per_byte is None else {"bpb": f"{self.bits_per_byte:.3f}"}


# ---- Scores of files ------------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(model, sequences, dtype, num_likeliest=1):
    """Predicts the patches of sequences that follow their contexts, see `utils.Batch`.

    Returns for each sequence: nats float32 (n, S), the k = num_likeliest symbols int64 (n, S, k), and if k > 1 their
    probabilities float32 (n, S, k).
    """
    batch = utils.Batch(sequences)
    with autocast(model.device, dtype):
        output = model(batch.patches_on(model.device), batch.masks, batch.targets)
    columns = [output.nats.float(), output.logits.argmax(-1, keepdim=True)]
    if num_likeliest > 1:
        probabilities, likeliest = output.logits.float().softmax(-1).topk(num_likeliest)  # (N, S, k) each
        columns[1:] = likeliest, probabilities
    counts = batch.targets.sum(1).tolist()
    return list(zip(*([part.numpy() for part in column.cpu().split(counts)] for column in columns)))


_XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
COMPRESSORS = {  # {name: function of a file's bytes}
    "gzip -9": lambda content: gzip.compress(content, 9, mtime=0),
    "bz2 -9": lambda content: bz2.compress(content, 9),
    # a dictionary larger than the file changes no byte of the result, but takes 0.7 GB
    "xz -9e": lambda content: lzma.compress(content, filters=[{**_XZ, "dict_size": min(max(len(content), 2**12), 2**26)}]),
}


@dataclasses.dataclass
class FileScore:
    """Figures of a file, or of a pair's target given its input."""

    name: str  # within the folder; "input -> target" of a pair
    bytes: int
    bits: float  # of the content and of the first 256 after it
    nats: float = 0.0  # cross-entropy of all symbols, padding included
    symbols: int = 0
    index: int = 0  # of the example
    path: str = ""  # of the file that is scored
    group: str = ""  # extension (".mid") or direction ("abc->mid")
    top1: int = 0  # symbols among its bytes and the first 256 that were the model's likeliest
    exact: bool = False  # whether greedy decoding reproduces the file
    stretches: list = dataclasses.field(default_factory=list)  # (offset, bytes, bits), see surprising_stretches
    profile: np.ndarray | None = None  # float32 (2, bins), mean and highest bits along the file, in at most 200 equal parts
    compressed: dict = dataclasses.field(default_factory=dict)  # {compressor: bits}

    @property
    def bits_per_byte(self):
        """Bits per byte of the content; None for an empty file."""
        return self.bits / self.bytes if self.bytes else None


def surprising_stretches(bits, count=10, longest=16):
    """Returns the `count` most surprising stretches of a file, as a list of (offset, symbols, bits in all).

    A stretch is the most surprising symbol outside the stretches so far, and its neighbours with at least half as many bits, at
    most `longest` symbols in all. `bits` (n,) are those of each byte of the file and of the 256 after it.
    """
    left, found = np.array(bits, dtype=np.float64), []  # left: -1 at symbols that are in a stretch
    while len(found) < count and left.max() >= 0:
        first = int(left.argmax())
        least, last = left[first] / 2 or math.inf, first + 1  # a symbol that costs nothing stays alone
        while last - first < longest:
            before, after = left[first - 1] if first else -1.0, left[last] if last < len(left) else -1.0
            if max(before, after) < least:
                break
            first, last = (first - 1, last) if before > after else (first, last + 1)
        found.append((first, last - first, float(left[first:last].sum())))
        left[first:last] = -1.0
    return found


def score_files(model, windows, folder, batch_size, dtype, progress, failed):
    """Yields the FileScore of every example of `bgpt.windows.Windows`, the longest examples first.

    `model` is a bGPTLMHeadModel in eval mode, which computes in `dtype`, with `batch_size` windows at once. Names are relative to
    `folder`. `progress` is called with the number of bytes scored, after each batch. (path, reason) of each file that cannot be
    read is appended to `failed`.
    """
    pieces, unreadable = {}, set()  # {index: [(nats (n, S), whether each symbol is the likeliest (n, S)) of a window]}

    def attempt(function, index, *arguments):
        try:
            return function(index, *arguments)
        except OSError as error:
            failed.append((windows.examples[index][-1], error.strerror))
            unreadable.add(index)
            return None

    readable = (  # (index, window, sequence)
        (index, window, sequence)
        for index, window in windows.by_length()
        if index not in unreadable and (sequence := attempt(windows.read, index, window)) is not None
    )
    while batch := list(itertools.islice(readable, batch_size)):
        predicted = predict(model, [sequence for *_, sequence in batch], dtype)
        for (index, window, (patches, _, context)), (nats, likeliest) in zip(batch, predicted):
            pieces.setdefault(index, []).append((nats, likeliest[:, :, 0] == patches[context:]))
            if window[1] == windows.totals[index]:  # the file's last window; the others came before it
                nats, is_top1 = (np.concatenate(each).reshape(-1) for each in zip(*pieces.pop(index)))
                if (score := attempt(_score_file, index, windows, nats, is_top1, folder)) is not None:
                    yield score
        slices = [windows.predicted_symbols(index, window) for index, window, _ in batch]
        progress(sum(max(each.stop - each.start, 0) for each in slices))  # an end patch alone has no bytes that count


def _score_file(index, windows, nats, is_top1, folder):
    """Returns the FileScore of an example from the nats (n,) and top-1 flags (n,) of all its predicted symbols."""
    paths, size = windows.examples[index], int(windows.sizes[index])
    content = utils.read_bytes(paths[-1], size=size)
    extensions = [extension_of(path) for path in paths]
    bits, is_top1 = nats[: size + 1] / math.log(2), is_top1[: size + 1]
    starts = np.unique(np.linspace(0, size + 1, min(size + 1, 200), endpoint=False).astype(int))  # of the profile's parts
    means = np.add.reduceat(bits, starts) / np.diff(np.append(starts, size + 1))
    return FileScore(
        name=" -> ".join(os.path.relpath(path, folder) for path in paths),
        bytes=size,
        bits=float(nats[: size + 1].sum(dtype=np.float64)) / math.log(2),
        nats=float(nats.sum(dtype=np.float64)),
        symbols=nats.size,
        index=index,
        path=paths[-1],
        group="->".join(extensions).lower() if len(paths) == 2 else f".{extensions[0]}" if extensions[0] else "no extension",
        top1=int(is_top1.sum()),
        # generation stops at PATCH_LENGTH, so the patch of the first 256 must be within it
        exact=bool(is_top1.all()) and int(windows.given[index]) + size // windows.patch_size < windows.patch_length,
        stretches=surprising_stretches(bits),
        profile=np.stack((means, np.maximum.reduceat(bits, starts))).astype(np.float32),
        compressed={name: 8 * len(compress(content)) for name, compress in COMPRESSORS.items()},
    )


def score_symbols(model, windows, index, parts, dtype, num_likeliest=3):
    """Scores parts of an example again, (start, stop) of the symbols of its content and the 256 after it; raises OSError.

    Returns for each part of n symbols: the symbols int16 (n,), their bits float32 (n,), the likeliest symbols int64 (n, k), and
    their probabilities float32 (n, k).
    """
    pieces = [[] for _ in parts]
    for window in windows.of(index):
        scored = windows.predicted_symbols(index, window)
        shared = [range(max(start, scored.start), min(stop, scored.stop)) for start, stop in parts]
        if not any(shared):
            continue
        patches, _, context = sequence = windows.read(index, window)
        [(nats, *expected)] = predict(model, [sequence], dtype, num_likeliest)
        # (n patches, S) or (n patches, S, k) -> (n·S,) or (n·S, k)
        columns = [each.reshape(-1, *each.shape[2:]) for each in (patches[context:], nats / math.log(2), *expected)]
        for piece, places in zip(pieces, shared):
            if places:
                piece.append([column[places.start - scored.start : places.stop - scored.start] for column in columns])
    return [[np.concatenate(column) for column in zip(*piece)] for piece in pieces]


# ---- Labels ---------------------------------------------------------------------------------------------------------

def classification_report(confusion, labels, most=30):
    """Returns a classifier's accuracy, precisions and recalls, as aligned lines of text, and details for the log, or "".

    Balanced accuracy is the mean of the recalls. A label without files has the recall "-", one never predicted the precision "-".

    `confusion` is {(index of the true label, index of the predicted label): number of files}. It is shown up to `most` labels.
    Of more labels, the text has the 20 of lowest recall, and the details have all.
    """
    labels = [escape_name(label) for label in labels]
    pairs, counts = np.array(list(confusion)).reshape(-1, 2).T.astype(int), list(confusion.values())
    files, predicted = (np.bincount(indices, counts, len(labels)) for indices in pairs)
    correct = np.array([confusion.get((label, label), 0) for label in range(len(labels))])
    accuracy, low, high = wilson_interval(correct.sum(), files.sum())
    recalls = correct[files > 0] / files[files > 0]
    lines = [
        f"accuracy {accuracy:.4f} ({correct.sum():.0f} of {files.sum():.0f} files), balanced accuracy {recalls.mean():.4f}",
        f"95 % interval of the accuracy: {low:.4f} to {high:.4f}",
    ]
    table = [["label", "precision", "recall", "files", "predicted"]]
    for label, right, of_label, as_label in zip(labels, correct, files, predicted):
        shares = [f"{right / count:.4f}" if count else "-" for count in (as_label, of_label)]
        table.append([label, *shares, f"{of_label:.0f}", f"{as_label:.0f}"])
    table, details = aligned(table), ""
    if len(labels) > most:
        ranked = sorted(np.flatnonzero(files), key=lambda label: (correct[label] / files[label], -files[label]))[:20]
        lines += [f"the {len(ranked)} labels of lowest recall of {len(labels):,}:", table[0], *(table[1 + i] for i in ranked)]
        details = "\n".join(table) + "\n"
    else:
        indices = range(len(labels))
        rows = [[f"{row} {labels[row]}", *(f"{confusion.get((row, column), 0):.0f}" for column in indices)] for row in indices]
        lines += [*table, "true label by row, predicted label by column:", *aligned([["", *map(str, indices)], *rows])]
    return "\n".join(lines) + "\n", details


def aligned(rows):
    """Returns the lines of a table of texts, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
