"""How good a model is: bits per byte of files, and a classifier's report."""

import dataclasses
import math

import torch

import system
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
        f"balanced accuracy {sum(present) / len(present):.4f}"
    ]
    table = [["label", "precision", "recall", "files", "predicted"]]
    for i, label in enumerate(labels):
        shares = ["-" if share is None else f"{share:.4f}" for share in (precisions[i], recalls[i])]
        table.append([label, *shares, f"{files[i]:.0f}", f"{predicted[i]:.0f}"])
    lines += _aligned(table)
    if len(labels) <= most:
        lines.append("true label by row, predicted label by column:")
        table = [["", *(str(i) for i in range(len(labels)))]]
        table += [[f"{i} {label}", *(f"{count:.0f}" for count in confusion[i])] for i, label in enumerate(labels)]
        lines += _aligned(table)
    return "\n".join(lines) + "\n"


def _aligned(rows):
    """Returns the lines of a table, rows of texts: its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
