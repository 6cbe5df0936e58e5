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
    """Running sums over an epoch, two on the device and two on the CPU. Adding never waits for the device."""

    def __init__(self, device="cpu"):
        self._sums, self._counts = torch.zeros(2, dtype=torch.float64, device=device), [0.0, 0.0]

    def tolist(self):
        """Returns the four sums as floats, the device's first. Waits for the device."""
        return [*self._sums.tolist(), *self._counts]

    def load(self, values):
        """Sets the sums to a list from `tolist`."""
        self._sums[:] = torch.tensor(values[:2], dtype=torch.float64)
        self._counts = list(map(float, values[2:]))

    def over(self, ranks):
        """Returns the Totals summed over all ranks."""
        totals = type(self)()
        totals.load(ranks.sum(self.tolist()))
        return totals

    def _mean(self, index, count):
        return float(self._sums[index]) / count if count else None


class SymbolTotals(Totals):
    """Totals of a generative model: nats of all and of counted symbols, symbols, content bytes."""

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
        """Mean cross-entropy over all symbols of all targets, nats per symbol, as published. None without symbols."""
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
    """Predicts the patches of sequences after their contexts, see `utils.Batch`.

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
    # a dictionary larger than the file takes 0.7 GB and does not change the result
    "xz -9e": lambda content: lzma.compress(content, filters=[{**_XZ, "dict_size": min(max(len(content), 2**12), 2**26)}]),
}


@dataclasses.dataclass
class FileScore:
    """Figures of a file, or of a pair's target given its input."""

    name: str  # within the folder, "input -> target" of a pair
    bytes: int
    bits: float  # of the content and of the first 256 after it
    nats: float = 0.0  # cross-entropy of all symbols, padding included
    symbols: int = 0
    index: int = 0  # of the example
    path: str = ""  # of the scored file
    group: str = ""  # extension (".mid") or direction ("abc->mid")
    top1: int = 0  # how many of its bytes and the first 256 were the model's likeliest symbol
    exact: bool = False  # whether greedy decoding reproduces the file
    stretches: list = dataclasses.field(default_factory=list)  # (offset, bytes, bits), see surprising_stretches
    profile: np.ndarray | None = None  # float32 (2, bins), mean and highest bits along the file, in at most 200 equal parts
    compressed: dict = dataclasses.field(default_factory=dict)  # {compressor: bits}

    @property
    def bits_per_byte(self):
        """Bits per byte of the content, None for an empty file."""
        return self.bits / self.bytes if self.bytes else None


def surprising_stretches(bits, count=10, longest=16):
    """Returns the `count` most surprising stretches of a file as [(offset, symbols, total bits)].

    A stretch is the most surprising symbol outside earlier stretches, and its neighbours with at least half as many bits, at
    most `longest` symbols in all. `bits` are (n,), for each byte of the file and the 256 after it.
    """
    left, stretches = np.array(bits, dtype=np.float64), []  # left: -1 at symbols that are in a stretch
    while len(stretches) < count and left.max() >= 0:
        first = int(left.argmax())
        least, last = left[first] / 2 or math.inf, first + 1  # a symbol that costs nothing stays alone
        while last - first < longest:
            before, after = left[first - 1] if first else -1.0, left[last] if last < len(left) else -1.0
            if max(before, after) < least:
                break
            first, last = (first - 1, last) if before > after else (first, last + 1)
        stretches.append((first, last - first, float(left[first:last].sum())))
        left[first:last] = -1.0
    return stretches


def score_files(model, windows, folder, batch_size, dtype, progress, failed):
    """Yields the FileScore of every example of `bgpt.windows.Windows`, the longest examples first.

    `model` is a bGPTLMHeadModel in eval mode, which computes in `dtype`, with `batch_size` windows at once. Names are relative
    to `folder`. After each batch, `progress` is called with the number of bytes scored. (path, reason) of each unreadable file
    is appended to `failed`.
    """
    pieces = {}  # {index: [(symbols, nats, whether each symbol is the likeliest, (n, S) each) of a window]}

    def read():
        """Yields (index, window, sequence), the longest examples first, each one's windows in order."""
        for index in np.argsort(-windows.totals.clip(max=windows.patch_length), kind="stable").tolist():
            try:
                for window in windows.of(index):
                    yield index, window, windows.read(index, window)
            except OSError as error:
                failed.append((error.filename, error.strerror))

    sequences = read()
    while batch := list(itertools.islice(sequences, batch_size)):
        predicted = predict(model, [sequence for *_, sequence in batch], dtype)
        for (index, window, (patches, _, context)), (nats, likeliest) in zip(batch, predicted):
            symbols = patches[context:]
            pieces.setdefault(index, []).append((symbols, nats, likeliest[:, :, 0] == symbols))
            if window[1] == windows.totals[index]:  # the file's last window, after all its others
                columns = (np.concatenate(each).reshape(-1) for each in zip(*pieces.pop(index)))
                yield _score_file(index, windows, *columns, folder)
        slices = [windows.predicted_symbols(index, window) for index, window, _ in batch]
        progress(sum(max(each.stop - each.start, 0) for each in slices))  # negative for an end patch alone


def _score_file(index, windows, symbols, nats, is_top1, folder):
    """Returns the FileScore of an example from its symbols (n,), their nats (n,) and top-1 flags (n,)."""
    paths, size, content = windows.examples[index], int(windows.sizes[index]), utils.to_content(symbols)
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
    """Scores `parts` of an example, (start, stop) in its content and the 256 after it.

    Returns for each part of n symbols: the symbols int16 (n,), their bits float32 (n,), the likeliest symbols int64 (n, k), and
    their probabilities float32 (n, k). Raises OSError if the file is unreadable.
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
        for piece, part in zip(pieces, shared):
            if part:
                piece.append([column[part.start - scored.start : part.stop - scored.start] for column in columns])
    return [[np.concatenate(column) for column in zip(*piece)] for piece in pieces]


# ---- Labels ---------------------------------------------------------------------------------------------------------

def classification_report(confusion, labels, most=30):
    """Returns a classifier's report as text, and details for the log or "".

    Balanced accuracy is the mean of the recalls. A label without files has the recall "-", one never predicted the precision "-".

    `confusion` is {(index of the true label, index of the predicted label): number of files}. It is shown for up to `most`
    labels. For more, the text lists the 20 of lowest recall, and the details list all.
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
    """Returns a table's lines, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
