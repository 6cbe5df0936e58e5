"""Trains a generative byte model on the files of TRAIN_FOLDERS. The settings are in config.py.

    python train-gen.py
    python train-gen.py --TRAIN_FOLDERS midi/train --EVAL_FOLDERS midi/test --NUM_EPOCHS 8

The best model is saved at WEIGHTS_PATH, the latest state next to it. The same command resumes from the latest state.
"""

import os

import config
from bgpt import settings, system


def check_settings():
    """Raises UserError for mistakes that can be found without PyTorch."""
    if config.TRAIN_FOLDERS == ["cpu_states/train"] and not os.path.isdir("cpu_states/train"):
        create = "python cpu-simulation.py --mode generate --num_train_instance 20000 --num_test_instance 200"
        raise system.UserError(f"TRAIN_FOLDERS: 'cpu_states/train' does not exist; give your own folders, or create it: {create}")
    settings.check_training_paths(settings.as_dict(config))


if __name__ == "__main__":
    system.start(lambda: settings.override(config), check_settings)  # before PyTorch loads, which takes seconds

import torch

import utils
from bgpt import checkpoint, distributed, examples, training
from bgpt.evaluation import SymbolTotals


def find_examples():
    """Returns the training and evaluation Examples, and prints their counts. Raises UserError if there are none."""
    constants = settings.as_dict(config)
    train, held_out = examples.find_sets(constants, training.own_paths(constants))
    cuts_windows = training.cuts_windows(constants)
    if held_out is None:
        longest = config.PATCH_LENGTH if cuts_windows else None
        train, held_out = examples.hold_out_parts(train, config.EVAL_SPLIT, config.SEED, config.PATCH_SIZE, longest)
    examples.print_sets(train, held_out, constants, cuts_windows)
    examples.check_content(held_out, constants)
    return train, held_out


def sample_targets(targets, most, rng):
    """Returns at most `most` of the targets (0 = all), bool (B, P-1), drawn with a numpy Generator."""
    where = targets.nonzero()  # (N, 2)
    if most == 0 or len(where) <= most:
        return targets
    kept = where[rng.permutation(len(where))[:most]]
    drawn = torch.zeros_like(targets)
    drawn[kept[:, 0], kept[:, 1]] = True
    return drawn


@torch.inference_mode()
def evaluate(run):
    """Returns the SymbolTotals of all evaluation examples, over all ranks."""
    totals, (dataset, steps) = SymbolTotals(run.ranks.device), run.evaluation_steps()
    run.model.eval()
    with run.progress("eval", steps) as bar:
        for number, (indices, batch) in enumerate(utils.batches(dataset, steps, config.NUM_WORKERS)):
            run.begin_step()  # saves or stops the run when that is due
            if len(indices):
                with run.autocast():
                    output = run.model(batch.patches_on(run.ranks.device), batch.masks, batch.targets)
                totals.add(output, batch, batch.targets)
            bar.update(steps.count(number))
    return totals.over(run.ranks)


def train(ranks):
    """Trains up to NUM_EPOCHS, from the latest state if there is one."""
    train_set, held_out = find_examples()
    sizes = utils.ModelSizes(
        config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, config.BYTE_NUM_LAYERS
    )
    torch.manual_seed(config.SEED)
    model = sizes.build(config.DROPOUT, config.EMBEDDING_START).to(ranks.device)
    constants, totals = settings.as_dict(config, training_only=True), SymbolTotals(ranks.device)

    with training.Run(ranks, model, sizes, constants, train_set, held_out, totals) as run:
        if not run.resume():
            if config.LOAD_FROM_PRE_CHECKPOINT:
                checkpoint.load_sized_weights(model, sizes, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH")
            print(f"a new run, from {config.PRE_WEIGHTS_PATH if config.LOAD_FROM_PRE_CHECKPOINT else 'random weights'}")
        engine = run.begin()  # the model, wrapped in DDP if there are several ranks

        for epoch in range(run.state.epoch, config.NUM_EPOCHS):
            dataset, steps = run.training_steps()
            engine.train()
            with run.progress("train", steps) as bar:
                for number, (indices, batch) in enumerate(utils.batches(dataset, steps, config.NUM_WORKERS)):
                    micro_batches = [micro for _, micro in batch.split(config.ACCUMULATION_STEPS)]
                    rng = run.step_rng()
                    targets = [sample_targets(micro.targets, config.PATCH_SAMPLING_BATCH_SIZE, rng) for micro in micro_batches]
                    is_dummy = not len(indices)  # this rank has no examples in this step, see `training.Steps`
                    own_targets = 0 if is_dummy else sum(int(chosen.sum()) for chosen in targets)
                    num_targets = run.begin_step(own_targets)  # of all ranks; saves or stops the run when that is due

                    # The loss is the mean over all symbols of the drawn targets of all ranks. DDP divides the sum of the ranks'
                    # gradients by `ranks.count`, which the weight undoes.
                    weight = 0 if is_dummy else ranks.count / (num_targets * config.PATCH_SIZE)
                    for part, (micro, chosen) in enumerate(zip(micro_batches, targets), 1):
                        with ranks.accumulate(engine, is_last=part == len(micro_batches)):
                            with run.autocast():
                                output = engine(micro.patches_on(ranks.device), micro.masks, chosen)
                            run.scaler.scale(output.nats.sum() * weight).backward()
                        if not is_dummy:
                            totals.add(output, micro, chosen)
                    run.update_weights()
                    run.end_step(bar, steps.count(number))

            train_totals, eval_totals = totals.over(ranks), evaluate(run)
            figures = {
                "train_loss": train_totals.loss,
                "eval_loss": eval_totals.loss,
                "train_bits_per_byte": train_totals.bits_per_byte,
                "eval_bits_per_byte": eval_totals.bits_per_byte,
            }
            run.end_epoch(figures, value=eval_totals.bits_per_byte, loss=eval_totals.loss)  # saves, logs and prints them
        run.finish()


def main():
    with distributed.connected_ranks() as ranks, distributed.memory_errors("raise ACCUMULATION_STEPS, or lower BATCH_SIZE"):
        train(ranks)


if __name__ == "__main__":
    system.run(main)
