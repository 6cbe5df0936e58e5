"""Trains a classifier of files, whose names tell their labels; the settings are in config.py.

    python train-cls.py --TRAIN_FOLDERS news/train --EVAL_FOLDERS news/test --WEIGHTS_PATH news.pth
    python train-cls.py --LOAD_FROM_PRE_CHECKPOINT True --PRE_WEIGHTS_PATH weights-text.pth

The label of `Business_1.txt` is `Business.txt`. The best model so far is kept at WEIGHTS_PATH, the latest state beside it; the
same command goes on from the latest.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the modules below load ends the script, without a traceback

import dataclasses
import sys

import numpy as np
import torch
import torch.nn.functional as F

import config
import utils

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def find_examples():
    """Returns the training and the evaluation Examples, and {label: index} of the labels in sorted order.

    Raises:
        UserError: there are too few, they cannot be listed, or an evaluation file has a label that no training file has.
    """
    if config.CONVERSION_MODE is not None:
        raise utils.UserError(f"CONVERSION_MODE is {config.CONVERSION_MODE!r}, but must be None to train a classifier")
    train = utils.Examples.of(utils.list_files(config.TRAIN_FOLDERS, "TRAIN_FOLDERS"))
    if not train:
        raise utils.UserError(f"TRAIN_FOLDERS: no files to train on in {', '.join(config.TRAIN_FOLDERS)}")
    of_all = [utils.label_of(path) for path, in train]
    labels = {label: index for index, label in enumerate(sorted(set(of_all)))}
    if len(labels) < 2:
        raise utils.UserError(
            f"TRAIN_FOLDERS: the only label of its {len(train)} files is {of_all[0]!r}; there must be two or more. The label of "
            "a file is its name up to the first '_', and its extension: Business_1.txt is Business.txt"
        )
    if len(labels) > len(train) / 2:
        print(f"{len(labels)} labels for {len(train)} files: the label of a file is its name up to the first '_', and its extension")
    held_out = utils.Examples.of(utils.list_files(config.EVAL_FOLDERS, "EVAL_FOLDERS"))
    if held_out:
        utils.count_shared(train, held_out)
    else:  # one file of each label stays
        first = {label: place for place, label in reversed(list(enumerate(of_all)))}
        others = np.setdiff1d(np.arange(len(train)), list(first.values()))
        train, held_out = utils.hold_out(train, config.EVAL_SPLIT, config.SEED, others)
    for path, in held_out:
        if utils.label_of(path) not in labels:
            raise utils.UserError(f"EVAL_FOLDERS: {path!r} has the label {utils.label_of(path)!r}, which no training file has")
    return train, held_out, labels


def label_indices(examples, labels):
    """Returns the indices of the Examples' labels, int64 (n,)."""
    return torch.from_numpy(np.fromiter((labels[utils.label_of(path)] for path, in examples), np.int64, len(examples)))


# ---------------------------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Totals:
    """Sums over an epoch, and the figures that are made of them."""

    nats: float = 0.0
    correct: float = 0.0
    files: float = 0.0

    def add(self, nats, logits, truth):
        """Adds a batch: its cross-entropy (scalar), logits (B, labels) and the indices of its labels, int64 (B,)."""
        correct = (logits.argmax(-1) == truth).sum()
        nats, correct = torch.stack((nats.detach(), correct)).tolist()  # the one wait for the device
        self.nats += nats
        self.correct += correct
        self.files += len(truth)

    @property
    def loss(self):
        """Mean cross-entropy, nats per file."""
        return self.nats / max(self.files, 1)

    @property
    def accuracy(self):
        """Share of the files whose most likely label is theirs."""
        return self.correct / max(self.files, 1)


def train_epoch(run, engine, truth):
    """Trains on what is left of the epoch in hand; returns the Totals of all processes over the whole of it.

    Args:
        truth: int64 (n,), the indices of the labels of the n examples.
    """
    totals = Totals(**run.totals)
    engine.train()
    for batch, indices, count in run.training_steps():
        micros = batch.split(config.ACCUMULATION_STEPS)
        # a spare batch has no indices and counts nothing: any label will do
        labels = truth[indices] if len(indices) else truth[: len(batch.masks)]
        # the gradient is that of the mean over the files of all processes; theirs are averaged
        weight = run.processes.count / count if len(indices) else 0
        for i, (rows, micro) in enumerate(micros, 1):
            part = labels[rows].to(run.processes.device, non_blocking=True)
            with utils.gradients_stay(engine, i < len(micros)):
                logits = predict(engine, micro, run)
                nats = F.cross_entropy(logits, part, reduction="sum")
                run.scaler.scale(nats * weight).backward()
            if len(indices):
                totals.add(nats, logits, part)
        run.bar.set_postfix(
            loss=f"{totals.loss:.3f}",
            acc=f"{totals.accuracy:.3f}",
            lr=f"{run.scheduler.get_last_lr()[0]:.1e}",
            refresh=False,
        )
        run.optimizer_step()
        run.totals = dataclasses.asdict(totals)
    return run.sum_totals(totals)


@torch.inference_mode()
def evaluate(run, truth):
    """Returns (Totals, confusion) of all processes over every evaluation example, each once; of longer files, the head.

    Confusion is float64 (labels, labels), the number of files of each true label (row) by predicted label (column).
    """
    totals, confusion = Totals(), np.zeros((len(run.labels), len(run.labels)))
    run.model.eval()
    for batch, indices, _ in run.evaluation_steps():
        labels = truth[indices].to(run.processes.device)
        logits = predict(run.model, batch, run)
        totals.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
        np.add.at(confusion, (truth[indices].numpy(), logits.argmax(-1).cpu().numpy()), 1)
    return run.sum_totals(totals), run.processes.sum(confusion)


def predict(model, batch, run):
    """Returns the model's logits, float32 (B, labels), for a Batch."""
    device = run.processes.device
    with utils.autocast(device, run.dtype):
        return model(batch.patches.to(device, non_blocking=True).long(), batch.masks).float()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main():
    processes = utils.start_processes()
    with processes.together():  # a mistake that one of them finds is the end of all
        dtype = utils.pick_dtype(config.PRECISION, processes.device)
        train, held_out, labels = find_examples()
        sizes = utils.ModelSizes(
            config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, num_labels=len(labels)
        )
        torch.manual_seed(config.SEED)
        model, settings = sizes.build(config.DROPOUT).to(processes.device), config.as_dict(training_only=True)
        run = utils.TrainingRun(
            processes, model, sizes, dtype, settings, train, held_out, "max_eval_acc", dataclasses.asdict(Totals()), labels
        )
        if not run.resume():
            if config.LOAD_FROM_PRE_CHECKPOINT:
                utils.load_pre_trained(model, sizes, labels, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
            else:
                print("a new run, from random weights; pre-training is strongly recommended (LOAD_FROM_PRE_CHECKPOINT)")

    truth, held_out_truth = label_indices(train, labels), label_indices(held_out, labels)
    engine = run.start()
    with run.stoppable():
        while run.epoch < config.NUM_EPOCHS:
            train_totals = train_epoch(run, engine, truth)
            eval_totals, confusion = evaluate(run, held_out_truth)
            figures = {
                "train_loss": train_totals.loss,
                "train_acc": train_totals.accuracy,
                "eval_loss": eval_totals.loss,
                "eval_acc": eval_totals.accuracy,
            }
            run.end_epoch(figures, eval_totals.accuracy, utils.classification_report(confusion, list(labels)))
    run.finish()


if __name__ == "__main__":
    utils.run_main(main, config.override)
