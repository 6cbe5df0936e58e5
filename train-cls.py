"""Trains a classifier of files, whose names tell their labels; the settings are in config.py.

    python train-cls.py --TRAIN_FOLDERS news/train --EVAL_FOLDERS news/test --WEIGHTS_PATH news.pth
    python train-cls.py --LOAD_FROM_PRE_CHECKPOINT True --PRE_WEIGHTS_PATH weights-text.pth

The label of `Business_1.txt` is `Business.txt`, or what LABELS says. The best model so far is kept at WEIGHTS_PATH, the latest
state beside it; the same command goes on from the latest.
"""


import config
from bgpt import system


def check_settings():
    """Raises UserError for what can be told without PyTorch."""
    if config.CONVERSION_MODE is not None:
        raise system.UserError(f"CONVERSION_MODE is {config.CONVERSION_MODE!r}, but must be None to train a classifier")
    system.check_training_paths(config.as_dict())


if __name__ == "__main__":
    # here, so that mistakes are answered before the seconds that PyTorch takes to load
    system.start(config.override, check_settings, system.choose_waiting)

import contextlib
import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F

from bgpt import checkpoint
from bgpt import distributed as devices
from bgpt import evaluation
from bgpt import labels as labeling
from bgpt import files as listing
from bgpt import examples as selection
from bgpt import training
import utils

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def holds_out_by_label():
    """Returns whether EVAL_SPLIT holds out the same share of each label; it did not in runs that an older version began."""
    path = checkpoint.RunFiles(config.WEIGHTS_PATH, config.LOGS_PATH).newest()
    if path is not None and config.LOAD_FROM_CHECKPOINT:
        with contextlib.suppress(system.UserError):  # which going on from it will say
            found = checkpoint.load_checkpoint(path, "WEIGHTS_PATH", mmap=True)
            return "data" not in found or found.get("hold_out") == "by label"
    return True


def find_examples(by_label):
    """Returns the training Examples, their label indices int64 (n,), the same of evaluation, and {label: index}, sorted.

    Prints a table of the labels, and what looks wrong with them.

    Args:
        by_label: see `holds_out_by_label`.

    Raises:
        UserError: there are too few, they cannot be listed, or an evaluation file has a label that no training file has.
    """
    own = training.own_paths(config.as_dict())
    train = utils.Examples.of(listing.list_readable_files(config.TRAIN_FOLDERS, "TRAIN_FOLDERS", own))
    if not train:
        raise system.UserError(f"TRAIN_FOLDERS: no files to train on in {', '.join(config.TRAIN_FOLDERS)}")
    label_of = functools.partial(labeling.label_of, mode=config.LABELS)
    found = {}  # {label: index in the order of the files}
    truth = np.fromiter((found.setdefault(label_of(path), len(found)) for path, in train), np.int64, len(train))
    labels = {label: index for index, label in enumerate(sorted(found))}
    truth = np.array([labels[label] for label in found])[truth]
    if len(labels) < 2:
        raise system.UserError(
            f"TRAIN_FOLDERS: the only label of its {len(train)} files is {next(iter(labels))!r}; there must be two or more. By LABELS "
            f"{config.LABELS!r}, {labeling.described(config.LABELS)}{labeling.other_modes(train.files, config.LABELS)}"
        )
    held_out = utils.Examples.of(listing.list_readable_files(config.EVAL_FOLDERS, "EVAL_FOLDERS", own))
    if held_out:
        selection.print_overlap(train, held_out)
        held_out_truth = np.empty(len(held_out), np.int64)
        for index, (path,) in enumerate(held_out):
            label = label_of(path)
            if label not in labels:
                raise system.UserError(f"EVAL_FOLDERS: {path!r} has the label {label!r}, which no training file has")
            held_out_truth[index] = labels[label]
    else:  # the first file of each label stays in training
        others = np.setdiff1d(np.arange(len(train)), np.unique(truth, return_index=True)[1])
        kept, chosen = selection.hold_out(len(train), config.EVAL_SPLIT, config.SEED, others, truth[others] if by_label else None)
        train, held_out, truth, held_out_truth = train.select(kept), train.select(chosen), truth[kept], truth[chosen]
    train_counts, held_out_counts = (np.bincount(each, minlength=len(labels)) for each in (truth, held_out_truth))
    selection.print_long_files(train, held_out, config.PATCH_SIZE, config.PATCH_LENGTH, cuts_windows=False)
    print("\n".join(labeling.table(list(labels), train_counts, held_out_counts)))
    for line in labeling.warnings((path for path, in train), truth, list(labels), held_out_counts, config.LABELS):
        print(f"warning: {line}")
    return train, torch.from_numpy(truth), held_out, torch.from_numpy(held_out_truth), labels


def load_pre_trained(model, sizes, labels, path, name):
    """Loads a checkpoint's patch-level decoder into a classifier, and its head if it has the same labels; says which.

    Args:
        model: the bGPTForClassification.
        sizes: its ModelSizes.
        labels: its {label: index}.
        path: a generative model's checkpoint or a classifier's.
        name: the constant that holds the path, for messages.

    Raises:
        UserError: see `checkpoint.load_checkpoint`, `check_sizes` and `load_weights`.
    """
    loaded, where = checkpoint.load_checkpoint(path, name), f"{name}: {path!r}"
    found = checkpoint.model_sizes(loaded["model"], where)
    # what the two need not have in common
    wanted = dataclasses.replace(sizes, BYTE_NUM_LAYERS=found.BYTE_NUM_LAYERS, num_labels=found.num_labels)
    checkpoint.check_sizes(wanted, loaded["model"], where)
    state = {key: value for key, value in loaded["model"].items() if not key.startswith(("byte_level_decoder.", "classifier."))}
    has_labels = found.num_labels is not None and "labels" in loaded  # the bare tensors of a classifier tell no labels
    keep_head = has_labels and set(checkpoint.label_list(loaded, where)) == set(labels)
    if keep_head:  # its rows in the order of `labels`
        rows = [loaded["labels"][label] for label in sorted(labels, key=labels.get)]
        state |= {key: loaded["model"][key][rows] for key in ("classifier.weight", "classifier.bias")}
    else:
        state |= {key: value for key, value in model.state_dict().items() if key.startswith("classifier.")}
    checkpoint.load_weights(model, state, where)
    print(f"a new run, from the patch-level decoder {'and the head ' if keep_head else ''}of {path}, a {found.kind}")


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
    totals = Totals(**run.state.totals)
    engine.train()
    for batch, indices, count in run.training_batches():
        # The gradient is that of the mean over the files of all processes. PyTorch averages the processes' gradients, hence
        # the factor `processes.count`.
        micros = batch.split(config.ACCUMULATION_STEPS)
        is_spare = not len(indices)  # a batch that only keeps this process in step with the others: it must not count
        labels = truth[:1] if is_spare else truth[indices]  # any will do for a spare one
        weight = 0 if is_spare else run.processes.count / count

        for number, (rows, micro) in enumerate(micros, 1):
            micro_labels = labels[rows].to(run.processes.device, non_blocking=True)
            with devices.local_gradients(engine, local=number < len(micros)):
                logits = predict(engine, micro, run)
                nats = F.cross_entropy(logits, micro_labels, reduction="sum")
                run.scaler.scale(nats * weight).backward()
            if not is_spare:
                totals.add(nats, logits, micro_labels)
        run.clip_gradients()
        run.update_weights()
        # counts the step, and saves the run or stops it when it is time
        run.step_done(count, dataclasses.asdict(totals), {"loss": f"{totals.loss:.3f}", "acc": f"{totals.accuracy:.3f}"})
    return run.sum_totals(totals)


@torch.inference_mode()
def evaluate(run, truth):
    """Returns (Totals, confusion) of all processes over every evaluation example, each once; of longer files, the head.

    Confusion is float64 (labels, labels), the number of files of each true label (row) by predicted label (column).
    """
    totals, confusion = Totals(), np.zeros((len(run.labels), len(run.labels)))
    run.model.eval()
    for batch, indices, count in run.evaluation_batches():
        if len(indices):
            labels = truth[indices].to(run.processes.device)
            logits = predict(run.model, batch, run)
            totals.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            np.add.at(confusion, (truth[indices].numpy(), logits.argmax(-1).cpu().numpy()), 1)
        run.evaluation_step_done(count)
    return run.sum_totals(totals), run.processes.sum(confusion)


def predict(model, batch, run):
    """Returns the model's logits, float32 (B, labels), for a Batch."""
    with devices.autocast(run.processes.device, run.dtype):
        return model(batch.patches_on(run.processes.device), batch.masks).float()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def make_run(processes):
    """Returns (the Run of config.py's settings with new weights, label indices of its training and evaluation examples)."""
    dtype = devices.pick_dtype(config.PRECISION, processes.device)
    by_label = holds_out_by_label()
    train, truth, held_out, held_out_truth, labels = find_examples(by_label)
    sizes = utils.ModelSizes(
        config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, num_labels=len(labels)
    )
    torch.manual_seed(config.SEED)
    model, settings = sizes.build(config.DROPOUT, config.EMBEDDING_START).to(processes.device), config.as_dict(training_only=True)
    run = training.Run(
        processes, model, sizes, dtype, settings, train, held_out, "max_eval_acc", higher_is_better=True,
        no_totals=dataclasses.asdict(Totals()), labels=labels, hold_out="by label" if by_label else None,
    )  # fmt: skip
    return run, truth, held_out_truth


def train(processes):
    """Trains until NUM_EPOCHS, from the latest state if there is one."""
    with processes.agreeing():
        run, truth, held_out_truth = make_run(processes)
    with run:
        with processes.agreeing():
            if not run.resume():
                if config.LOAD_FROM_PRE_CHECKPOINT:
                    load_pre_trained(run.model, run.sizes, run.labels, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
                else:
                    print("a new run, from random weights; pre-training is strongly recommended (LOAD_FROM_PRE_CHECKPOINT)")
        engine = run.begin()
        while run.state.epoch < config.NUM_EPOCHS:
            train_totals = train_epoch(run, engine, truth)
            eval_totals, confusion = evaluate(run, held_out_truth)
            figures = {
                "train_loss": train_totals.loss,
                "train_acc": train_totals.accuracy,
                "eval_loss": eval_totals.loss,
                "eval_acc": eval_totals.accuracy,
            }
            report = evaluation.classification_report(confusion, list(run.labels))
            run.epoch_done(figures, value=eval_totals.accuracy, loss=eval_totals.loss, report=report)
        run.finish()


def main():
    with devices.connected_processes() as processes:
        train(processes)  # a function of its own: the wrapper that trains the model is freed before the connection ends


if __name__ == "__main__":
    system.run(main)
