"""Trains a generative byte model on the files of TRAIN_FOLDERS; the settings are in config.py.

    python train-gen.py
    python train-gen.py --TRAIN_FOLDERS midi/train --EVAL_FOLDERS midi/test --NUM_EPOCHS 8

The best model so far is kept at WEIGHTS_PATH, the latest state beside it; the same command goes on from the latest.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the modules below load ends the script, without a traceback

import dataclasses
import math
import os
import sys
import time

import torch

import config
import utils

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def find_examples():
    """Returns the training and the evaluation Examples.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    if config.TRAIN_FOLDERS == ["cpu_states/train"] and not os.path.isdir("cpu_states/train"):
        raise utils.UserError(
            "TRAIN_FOLDERS: 'cpu_states/train' does not exist; make it with `python cpu-simulation.py --mode generate "
            "--num_train_instance 20000 --num_test_instance 200`, or name folders of your own"
        )
    train = group_files(config.TRAIN_FOLDERS, "TRAIN_FOLDERS")
    if not train:
        raise utils.UserError(f"TRAIN_FOLDERS: no files to train on in {', '.join(config.TRAIN_FOLDERS)}")
    held_out = group_files(config.EVAL_FOLDERS, "EVAL_FOLDERS")
    if held_out:
        utils.count_shared(train, held_out)
    else:
        train, held_out = utils.hold_out(train, config.EVAL_SPLIT, config.SEED)
    return directed(train), directed(held_out)


def group_files(folders, name):
    """Returns the files of folders as Examples; in a CONVERSION_MODE, the pairs that fit in a sequence."""
    files = utils.list_files(folders, name)
    if config.CONVERSION_MODE is None:
        return utils.Examples.of(files)
    pairs = utils.pair_files(files, config.CONVERSION_MODE)
    if files and not pairs:
        raise utils.UserError(
            f"{name}: CONVERSION_MODE is {config.CONVERSION_MODE!r}, but among {len(files)} files no two of those "
            "extensions share a folder and a stem"
        )
    unpaired = len(files) - 2 * len(pairs)
    if unpaired:
        print(f"{name}: {unpaired} of {len(files)} files are in no pair and are left out")
    fitting, longest = utils.fitting_pairs(pairs, config.PATCH_SIZE, config.PATCH_LENGTH)
    if len(fitting) < len(pairs):
        message = (
            f"{name}: {len(pairs) - len(fitting)} of {len(pairs)} pairs do not fit in PATCH_LENGTH {config.PATCH_LENGTH} "
            f"and are left out; PATCH_LENGTH {longest} would keep them all"
        )
        if not fitting:
            raise utils.UserError(message)
        print(message)
    return fitting


def directed(examples):
    """Returns Examples in the directions of CONVERSION_MODE: "&" gives each pair both ways."""
    if config.CONVERSION_MODE is not None and utils.split_conversion_mode(config.CONVERSION_MODE)[2]:
        return examples.both_ways()
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Totals:
    """Sums over an epoch, and the figures that are made of them."""

    nats: float = 0.0
    symbols: float = 0.0
    counted_nats: float = 0.0
    bytes: float = 0.0

    def add(self, output, batch, targets):
        """Adds a BytePrediction for the `targets` (bool (B, P-1)) of a Batch."""
        nats = output.nats.detach()  # (N, S)
        counted = batch.counted[:, 1:][targets]  # (B, P-1, S) -> (N, S)
        counted_bytes = counted & (batch.patches[:, 1:][targets] != utils.END)
        counted_nats = torch.where(counted.to(nats.device), nats, 0).sum()
        both = torch.stack((nats.sum(), counted_nats)).tolist()  # the one wait for the device
        self.nats += both[0]
        self.symbols += nats.numel()
        self.counted_nats += both[1]
        self.bytes += int(counted_bytes.sum())

    @property
    def loss(self):
        """Mean cross-entropy over all symbols of all targets, nats per symbol: the published measure."""
        return self.nats / max(self.symbols, 1)

    @property
    def bits_per_byte(self):
        """Bits of the content, its end-of-file symbol included and the padding after it not, per content byte."""
        return self.counted_nats / math.log(2) / max(self.bytes, 1)


def train_epoch(run, engine):
    """Trains on what is left of the epoch in hand; returns the Totals of all processes over the whole of it."""
    processes, totals, start = run.processes, Totals(**run.totals), time.perf_counter()
    bytes_before = totals.bytes
    engine.train()
    for batch, indices, _ in run.training_steps():
        micros, rng = [micro for _, micro in batch.split(config.ACCUMULATION_STEPS)], run.step_rng()
        targets = [utils.sample_targets(micro.masks, config.PATCH_SAMPLING_BATCH_SIZE, rng) for micro in micros]
        num_targets = sum(int(chosen.sum()) for chosen in targets) if len(indices) else 0
        # the gradient is that of the mean over all symbols of all target patches of all processes; theirs are averaged
        num_symbols = processes.sum([num_targets])[0] * config.PATCH_SIZE
        weight = processes.count / num_symbols if len(indices) else 0
        for i, (micro, chosen) in enumerate(zip(micros, targets), 1):
            with utils.gradients_stay(engine, i < len(micros)):
                output = predict(engine, micro, chosen, run)
                run.scaler.scale(output.nats.sum() * weight).backward()
            if len(indices):
                totals.add(output, micro, chosen)
        run.bar.set_postfix(
            bpb=f"{totals.bits_per_byte:.3f}",
            lr=f"{run.scheduler.get_last_lr()[0]:.1e}",
            KBps=f"{(totals.bytes - bytes_before) / 1000 / (time.perf_counter() - start):.1f}",
            refresh=False,
        )
        run.optimizer_step()
        run.totals = dataclasses.asdict(totals)
    return run.sum_totals(totals)


@torch.inference_mode()
def evaluate(run):
    """Returns the Totals of all processes over every evaluation example, each once; of longer files, over the head."""
    totals = Totals()
    run.model.eval()
    for batch, _, _ in run.evaluation_steps():
        targets = batch.masks[:, 1:] == 1
        totals.add(predict(run.model, batch, targets, run), batch, targets)
    return run.sum_totals(totals)


def predict(model, batch, targets, run):
    """Returns the model's BytePrediction for the `targets` of a Batch."""
    device = run.processes.device
    with utils.autocast(device, run.dtype):
        return model(batch.patches.to(device, non_blocking=True).long(), batch.masks, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main():
    processes = utils.start_processes()
    with processes.together():  # a mistake that one of them finds is the end of all
        dtype = utils.pick_dtype(config.PRECISION, processes.device)
        train, held_out = find_examples()
        sizes = utils.ModelSizes(
            config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, config.BYTE_NUM_LAYERS
        )
        torch.manual_seed(config.SEED)
        model, settings = sizes.build(config.DROPOUT).to(processes.device), config.as_dict(training_only=True)
        run = utils.TrainingRun(
            processes, model, sizes, dtype, settings, train, held_out, "min_eval_loss", dataclasses.asdict(Totals())
        )
        if not run.resume():
            if config.LOAD_FROM_PRE_CHECKPOINT:
                utils.load_sized_weights(model, sizes, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
            print(f"a new run, from {config.PRE_WEIGHTS_PATH if config.LOAD_FROM_PRE_CHECKPOINT else 'random weights'}")

    engine = run.start()
    with run.stoppable():
        while run.epoch < config.NUM_EPOCHS:
            train_totals = train_epoch(run, engine)
            eval_totals = evaluate(run)
            figures = {
                "train_loss": train_totals.loss,
                "eval_loss": eval_totals.loss,
                "train_bits_per_byte": train_totals.bits_per_byte,
                "eval_bits_per_byte": eval_totals.bits_per_byte,
            }
            run.end_epoch(figures, eval_totals.loss)
    run.finish()


if __name__ == "__main__":
    utils.run_main(main, config.override)
