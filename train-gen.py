"""Trains a generative byte model on the files of TRAIN_FOLDERS; the settings are in config.py.

    python train-gen.py
    python train-gen.py --TRAIN_FOLDERS midi/train --EVAL_FOLDERS midi/test --NUM_EPOCHS 8

The best model so far is kept at WEIGHTS_PATH, the latest state beside it; the same command goes on from the latest.
"""

import os

import config
from bgpt import system


def check_settings():
    """Raises UserError for what can be told without PyTorch."""
    if config.TRAIN_FOLDERS == ["cpu_states/train"] and not os.path.isdir("cpu_states/train"):
        raise system.UserError(
            "TRAIN_FOLDERS: 'cpu_states/train' does not exist; make it with `python cpu-simulation.py --mode generate "
            "--num_train_instance 20000 --num_test_instance 200`, or name folders of your own"
        )
    system.check_training_paths(config.as_dict())


if __name__ == "__main__":
    # here, so that mistakes are answered before the seconds that PyTorch takes to load
    system.start(config.override, check_settings, system.choose_waiting)

import dataclasses
import time

import torch

from bgpt import checkpoint
from bgpt import distributed as devices
from bgpt import evaluation
from bgpt import files as listing
from bgpt import examples as selection
from bgpt import training
import utils

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def find_examples():
    """Returns the training and the evaluation Examples.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    train = group_files(config.TRAIN_FOLDERS, "TRAIN_FOLDERS")
    if not train:
        raise system.UserError(f"TRAIN_FOLDERS: no files to train on in {', '.join(config.TRAIN_FOLDERS)}")
    held_out = group_files(config.EVAL_FOLDERS, "EVAL_FOLDERS")
    if held_out:
        selection.print_overlap(train, held_out)
    else:
        longest = config.PATCH_LENGTH if cuts_windows() else None
        train, held_out = selection.hold_out_parts(train, config.EVAL_SPLIT, config.SEED, config.PATCH_SIZE, longest)
    selection.print_long_files(train, held_out, config.PATCH_SIZE, config.PATCH_LENGTH, cuts_windows())
    return tuple(selection.directed(examples, config.CONVERSION_MODE) for examples in (train, held_out))


def cuts_windows():
    """Returns whether an epoch sees all of the files longer than PATCH_LENGTH; pairs must fit in it anyway."""
    return config.LONG_FILES == "windows" and config.CONVERSION_MODE is None


def group_files(folders, name):
    """Returns the files of folders as Examples; in a CONVERSION_MODE, the pairs that fit in a sequence."""
    files = listing.list_readable_files(folders, name, training.own_paths(config.as_dict()))
    if config.CONVERSION_MODE is None:
        return utils.Examples.of(files)
    pairs = selection.find_pairs(files, config.CONVERSION_MODE, name)
    fitting, longest = selection.fitting_pairs(pairs, config.PATCH_SIZE, config.PATCH_LENGTH)
    if len(fitting) < len(pairs):
        message = (
            f"{name}: {len(pairs) - len(fitting)} of {len(pairs)} pairs do not fit in PATCH_LENGTH {config.PATCH_LENGTH} "
            f"and are left out; PATCH_LENGTH {longest} would keep them all"
        )
        if not fitting:
            raise system.UserError(message)
        print(message)
    return fitting


def sample_targets(targets, most, rng):
    """Draws which target patches of a micro-batch go through the byte-level decoder in training.

    Args:
        targets: bool (B, P-1), see `utils.Batch`.
        most: how many at most; 0 = all.
        rng: numpy Generator.

    Returns:
        bool (B, P-1).
    """
    where = targets.nonzero()  # (N, 2)
    if most == 0 or len(where) <= most:
        return targets
    kept = where[rng.permutation(len(where))[:most]]
    drawn = torch.zeros_like(targets)
    drawn[kept[:, 0], kept[:, 1]] = True
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------------------------


def train_epoch(run, engine):
    """Trains on what is left of the epoch in hand; returns the SymbolTotals of all processes over the whole of it."""
    processes, totals = run.processes, evaluation.SymbolTotals(**run.state.totals)
    began, bytes_before = time.perf_counter(), totals.bytes
    engine.train()
    for batch, indices, count in run.training_batches():
        # The gradient is that of the mean over all symbols of all target patches of all processes. PyTorch averages the
        # processes' gradients, hence the factor `processes.count`.
        micros, rng = [micro for _, micro in batch.split(config.ACCUMULATION_STEPS)], run.step_rng()
        targets = [sample_targets(micro.targets, config.PATCH_SAMPLING_BATCH_SIZE, rng) for micro in micros]
        is_spare = not len(indices)  # a batch that only keeps this process in step with the others: it must not count
        num_targets = 0 if is_spare else sum(int(chosen.sum()) for chosen in targets)
        num_symbols = processes.sum([num_targets])[0] * config.PATCH_SIZE
        weight = 0 if is_spare else processes.count / num_symbols

        for number, (micro, chosen) in enumerate(zip(micros, targets), 1):
            with devices.local_gradients(engine, local=number < len(micros)):
                output = predict(engine, micro, chosen, run)
                run.scaler.scale(output.nats.sum() * weight).backward()
            if not is_spare:
                totals.add(output, micro, chosen)
        run.clip_gradients()
        run.update_weights()

        rate = (totals.bytes - bytes_before) / 1000 / (time.perf_counter() - began)
        # counts the step, and saves the run or stops it when it is time
        run.step_done(count, dataclasses.asdict(totals), {"bpb": f"{totals.bits_per_byte:.3f}", "KBps": f"{rate:.1f}"})
    return run.sum_totals(totals)


@torch.inference_mode()
def evaluate(run):
    """Returns the SymbolTotals of all processes over every evaluation example; LONG_FILES says what that is of longer files."""
    totals = evaluation.SymbolTotals()
    run.model.eval()
    for batch, indices, count in run.evaluation_batches():
        if len(indices):
            totals.add(predict(run.model, batch, batch.targets, run), batch, batch.targets)
        run.evaluation_step_done(count)
    return run.sum_totals(totals)


def predict(model, batch, targets, run):
    """Returns the model's BytePrediction for the `targets` of a Batch."""
    with devices.autocast(run.processes.device, run.dtype):
        return model(batch.patches_on(run.processes.device), batch.masks, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def make_run(processes):
    """Returns the Run of config.py's settings, with new weights."""
    dtype = devices.pick_dtype(config.PRECISION, processes.device)
    train, held_out = find_examples()
    sizes = utils.ModelSizes(
        config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, config.BYTE_NUM_LAYERS
    )
    torch.manual_seed(config.SEED)
    model, settings = sizes.build(config.DROPOUT, config.EMBEDDING_START).to(processes.device), config.as_dict(training_only=True)
    no_totals = dataclasses.asdict(evaluation.SymbolTotals())
    return training.Run(
        processes, model, sizes, dtype, settings, train, held_out, "min_eval_loss", higher_is_better=False,
        no_totals=no_totals, cuts_windows=cuts_windows(),
    )  # fmt: skip


def train(processes):
    """Trains until NUM_EPOCHS, from the latest state if there is one."""
    with processes.agreeing():
        run = make_run(processes)
    with run:
        with processes.agreeing():
            if not run.resume():
                if config.LOAD_FROM_PRE_CHECKPOINT:
                    checkpoint.load_sized_weights(run.model, run.sizes, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
                print(f"a new run, from {config.PRE_WEIGHTS_PATH if config.LOAD_FROM_PRE_CHECKPOINT else 'random weights'}")
        engine = run.begin()
        while run.state.epoch < config.NUM_EPOCHS:
            train_totals = train_epoch(run, engine)
            eval_totals = evaluate(run)
            figures = {
                "train_loss": train_totals.loss,
                "eval_loss": eval_totals.loss,
                "train_bits_per_byte": train_totals.bits_per_byte,
                "eval_bits_per_byte": eval_totals.bits_per_byte,
            }
            run.epoch_done(figures, value=eval_totals.loss, loss=eval_totals.loss)
        run.finish()


def main():
    with devices.connected_processes() as processes:
        train(processes)  # a function of its own: the wrapper that trains the model is freed before the connection ends


if __name__ == "__main__":
    system.run(main)
