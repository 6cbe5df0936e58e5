"""Trains a classifier of files, labelled by name or folder. The settings are in config.py.

    python train-cls.py --TRAIN_FOLDERS news/train --EVAL_FOLDERS news/test --WEIGHTS_PATH news.pth
    python train-cls.py --LOAD_FROM_PRE_CHECKPOINT True --PRE_WEIGHTS_PATH weights-text.pth

The label of `Business_1.txt` is `Business.txt`, see LABELS. The best model is saved at WEIGHTS_PATH, the latest state next to
it. The same command resumes from the latest state.
"""

import config
from bgpt import settings, system


def check_settings():
    """Raises UserError for mistakes that can be found without PyTorch."""
    if config.CONVERSION_MODE is not None:
        raise system.UserError(f"CONVERSION_MODE is {config.CONVERSION_MODE!r}, but must be None to train a classifier")
    settings.check_training_paths(settings.as_dict(config))


if __name__ == "__main__":
    system.start(lambda: settings.override(config), check_settings)  # before PyTorch loads, which takes seconds

import collections
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

import utils
from bgpt import checkpoint, distributed, evaluation, examples, training


def find_examples():
    """Returns (training Examples, their label indices int64 (n,), evaluation Examples, theirs, sorted {label: index}).

    Raises UserError if there are too few files or labels, or if an evaluation file has a label that no training file has.
    """
    constants = settings.as_dict(config)
    train, held_out = examples.find_sets(constants, training.own_paths(constants))
    truth, labels = examples.find_labels(train, config.LABELS)
    if held_out:
        names = examples.labels_of(held_out, config.LABELS)
        if unknown := [(path, name) for (path,), name in zip(held_out, names) if name not in labels]:
            raise system.UserError("EVAL_FOLDERS: {!r} has the label {!r}, which no training file has".format(*unknown[0]))
        held_out_truth = np.array([labels[name] for name in names])
    else:
        kept, chosen = examples.hold_out(train, config.EVAL_SPLIT, config.SEED, truth)
        train, held_out, truth, held_out_truth = train.select(kept), train.select(chosen), truth[kept], truth[chosen]
    examples.print_sets(train, held_out, constants, cuts_windows=False)
    counts = (np.bincount(each, minlength=len(labels)).tolist() for each in (truth, held_out_truth))
    print("\n".join(examples.labels_table(list(labels), *counts)))
    return train, torch.from_numpy(truth), held_out, torch.from_numpy(held_out_truth), labels


def load_pre_trained(model, sizes, labels, path, name):
    """Loads a checkpoint's patch-level decoder into a classifier, and its head if the labels are equal.

    Args:
        model, sizes, labels: the bGPTForClassification, its ModelSizes and {label: index}.
        path, name: the checkpoint of a generative model or classifier, and the name of its constant for messages.
    """
    loaded, where = checkpoint.load_checkpoint(path, name), f"{name}: {path!r}"
    loaded_sizes = checkpoint.model_sizes(loaded["model"], where)
    # the byte-level decoder and the labels may differ
    wanted = dataclasses.replace(sizes, BYTE_NUM_LAYERS=loaded_sizes.BYTE_NUM_LAYERS, num_labels=loaded_sizes.num_labels)
    checkpoint.check_sizes(wanted, loaded["model"], where)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("classifier.")}
    state |= {key: each for key, each in loaded["model"].items() if not key.startswith(("byte_level_decoder.", "classifier."))}
    has_labels = loaded_sizes.num_labels is not None and "labels" in loaded  # a file of tensors alone has no labels
    keep_head = has_labels and set(checkpoint.label_list(loaded, where)) == set(labels)
    if keep_head:  # its rows in the order of `labels`
        rows = [loaded["labels"][label] for label in sorted(labels, key=labels.get)]
        state |= {key: loaded["model"][key][rows] for key in ("classifier.weight", "classifier.bias")}
    checkpoint.load_weights(model, state, where)
    print(f"a new run, from the patch-level decoder {'and the head ' if keep_head else ''}of {path}, a {loaded_sizes.kind}")


class LabelTotals(evaluation.Totals):
    """Totals over files: nats, correct predictions, and number."""

    def add(self, nats, logits, truth):
        """Adds a batch: summed cross-entropy (scalar), logits (B, labels) and true label indices, int64 (B,)."""
        self._sums += torch.stack((nats.detach(), (logits.argmax(-1) == truth).sum()))
        self._counts[0] += len(truth)

    @property
    def loss(self):
        """Mean cross-entropy, nats per file. None without files."""
        return self._mean(0, self._counts[0])

    @property
    def accuracy(self):
        """Share of correctly classified files. None without files."""
        return self._mean(1, self._counts[0])

    def shown(self):
        """Returns the figures for a progress bar."""
        return {} if self.loss is None else {"loss": f"{self.loss:.3f}", "acc": f"{self.accuracy:.3f}"}


@torch.inference_mode()
def evaluate(run, truth):
    """Returns (LabelTotals, confusion) of all evaluation examples, over all ranks.

    `confusion` is a Counter of (true label index, predicted label index). Only the head of a longer file is classified.
    """
    totals, confusion = LabelTotals(run.ranks.device), collections.Counter()
    dataset, steps = run.evaluation_steps()
    run.model.eval()
    with run.progress("eval", steps) as bar:
        for number, (indices, batch) in enumerate(utils.batches(dataset, steps, config.NUM_WORKERS)):
            run.begin_step()
            if len(indices):
                labels = utils.to_device(truth[indices], run.ranks.device)
                with run.autocast():
                    logits = run.model(batch.patches_on(run.ranks.device), batch.masks).float()
                totals.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
                confusion.update(zip(truth[indices].tolist(), logits.argmax(-1).tolist()))
            bar.update(steps.count(number))
    return totals.over(run.ranks), sum(run.ranks.gather(confusion), collections.Counter())


def train(ranks):
    """Trains up to NUM_EPOCHS, from the latest state if there is one."""
    train_set, truth, held_out, held_out_truth, labels = find_examples()
    sizes = utils.ModelSizes(
        config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, num_labels=len(labels)
    )
    torch.manual_seed(config.SEED)
    model = sizes.build(config.DROPOUT, config.EMBEDDING_START).to(ranks.device)
    constants, totals = settings.as_dict(config, training_only=True), LabelTotals(ranks.device)

    with training.Run(ranks, model, sizes, constants, train_set, held_out, totals, labels) as run:
        if not run.resume():
            if config.LOAD_FROM_PRE_CHECKPOINT:
                load_pre_trained(model, sizes, labels, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
            else:
                print("a new run, from random weights; pre-training is strongly recommended (LOAD_FROM_PRE_CHECKPOINT)")
        engine = run.begin()  # the model, wrapped in DDP if there are several ranks

        for epoch in range(run.state.epoch, config.NUM_EPOCHS):
            dataset, steps = run.training_steps()
            engine.train()
            with run.progress("train", steps) as bar:
                for number, (indices, batch) in enumerate(utils.batches(dataset, steps, config.NUM_WORKERS)):
                    is_dummy = not len(indices)  # this rank has no examples in this step, see `training.Steps`
                    batch_truth = truth[:1] if is_dummy else truth[indices]
                    run.begin_step()  # saves or stops the run when that is due

                    # The loss is the mean over the files of all ranks. DDP averages gradients, hence `ranks.count`.
                    weight = 0 if is_dummy else ranks.count / steps.count(number)
                    micro_batches = batch.split(config.ACCUMULATION_STEPS)
                    for part, (rows, micro) in enumerate(micro_batches, 1):
                        micro_truth = utils.to_device(batch_truth[rows], ranks.device)
                        with ranks.accumulate(engine, is_last=part == len(micro_batches)):
                            with run.autocast():
                                logits = engine(micro.patches_on(ranks.device), micro.masks).float()
                            nats = F.cross_entropy(logits, micro_truth, reduction="sum")
                            run.scaler.scale(nats * weight).backward()
                        if not is_dummy:
                            totals.add(nats, logits, micro_truth)
                    run.update_weights()
                    run.end_step(bar, steps.count(number))

            train_totals, (eval_totals, confusion) = totals.over(ranks), evaluate(run, held_out_truth)
            figures = {
                "train_loss": train_totals.loss,
                "train_acc": train_totals.accuracy,
                "eval_loss": eval_totals.loss,
                "eval_acc": eval_totals.accuracy,
            }
            report = evaluation.classification_report(confusion, list(labels))
            run.end_epoch(figures, eval_totals.accuracy, eval_totals.loss, *report)  # saves, logs, prints
        run.finish()


def main():
    with distributed.connected_ranks() as ranks, distributed.memory_errors("raise ACCUMULATION_STEPS, or lower BATCH_SIZE"):
        train(ranks)


if __name__ == "__main__":
    system.run(main)
