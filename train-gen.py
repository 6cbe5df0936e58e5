"""Trains a generative byte model on the files of TRAIN_FOLDERS; the settings are in config.py.

    python train-gen.py
    python train-gen.py --TRAIN_FOLDERS midi/train --EVAL_FOLDERS midi/test --NUM_EPOCHS 8

The best model so far is kept at WEIGHTS_PATH, the latest state beside it; the same command goes on from the latest.
"""

import contextlib
import math
import os
import sys
import time

import numpy as np
import torch
import transformers
from tqdm import tqdm

import config
import utils

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def find_examples():
    """Returns the training and the evaluation examples, lists of (file,) or (input, target) paths.

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
    if not held_out:
        train, held_out = utils.hold_out(train, config.EVAL_SPLIT, config.SEED)
        print(f"EVAL_FOLDERS holds none: {len(held_out)} of the training examples are held out for evaluation")
    shared = len(set(train) & set(held_out))
    if shared:
        print(f"{shared} evaluation examples are training examples too: their eval_loss says nothing about unseen files")
    return directed(train), directed(held_out)


def group_files(folders, name):
    """Returns the files of folders as examples; in a CONVERSION_MODE, the pairs that fit in a sequence."""
    files = utils.list_files(folders, name)
    if config.CONVERSION_MODE is None:
        return [(path,) for path in files]
    pairs = utils.pair_files(files, config.CONVERSION_MODE)
    if files and not pairs:
        raise utils.UserError(
            f"{name}: CONVERSION_MODE is {config.CONVERSION_MODE!r}, but among {len(files)} files no two of those "
            "extensions share a folder and a stem"
        )
    paired = {path for pair in pairs for path in pair}
    if len(paired) < len(files):
        print(f"{name}: {len(files) - len(paired)} of {len(files)} files are in no pair and are left out")
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
    """Returns every example in the directions of CONVERSION_MODE: "&" gives each pair both ways."""
    if config.CONVERSION_MODE is not None and utils.split_conversion_mode(config.CONVERSION_MODE)[2]:
        return [pair for source, target in examples for pair in ((source, target), (target, source))]
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------------------------


class Totals:
    """Sums over an epoch, and the figures that are made of them."""

    def __init__(self):
        self.nats = self.symbols = self.counted_nats = self.bytes = 0.0

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

    def check(self, epoch):
        """Raises UserError if a loss was no number, before such a model is saved."""
        if not math.isfinite(self.nats):
            raise utils.UserError(
                f"the loss is {self.nats} in epoch {epoch}; the checkpoints are those of the epoch before. "
                "Try a lower LEARNING_RATE, MAX_GRAD_NORM 1.0 or PRECISION fp32"
            )

    @property
    def loss(self):
        """Mean cross-entropy over all symbols of all targets, nats per symbol: the published measure."""
        return self.nats / max(self.symbols, 1)

    @property
    def bits_per_byte(self):
        """Bits of the content, its end-of-file symbol included and the padding after it not, per content byte."""
        return self.counted_nats / math.log(2) / max(self.bytes, 1)


def train_epoch(model, optimizer, scheduler, scaler, examples, epoch, device, dtype, check_interrupt):
    """Trains on every example once, in an order and with crops of its own; returns the epoch's Totals."""
    dataset = utils.ByteDataset(examples, config.PATCH_SIZE, config.PATCH_LENGTH, crop_seed=[config.SEED, epoch])
    rng = np.random.default_rng([config.SEED, epoch])
    order = rng.permutation(len(dataset))
    torch.manual_seed(int(rng.integers(2**63)))  # dropout: a resumed run draws as an uninterrupted one
    totals, start = Totals(), time.perf_counter()
    num_steps = math.ceil(len(order) / config.BATCH_SIZE)
    model.train()
    with tqdm(total=num_steps, desc=f"epoch {epoch} train", unit="step", dynamic_ncols=True) as bar:
        for batch in utils.batches(dataset, order, config.BATCH_SIZE, config.NUM_WORKERS, device.type == "cuda"):
            micros = batch.split(config.ACCUMULATION_STEPS)
            targets = [utils.sample_targets(micro.masks, config.PATCH_SAMPLING_BATCH_SIZE, rng) for micro in micros]
            num_targets = sum(int(chosen.sum()) for chosen in targets)
            for micro, chosen in zip(micros, targets):
                with utils.autocast(device, dtype):
                    output = predict(model, micro, chosen, device)
                # each micro-batch counts by its share of the step's target patches
                scaler.scale(output.loss * (int(chosen.sum()) / num_targets)).backward()
                totals.add(output, micro, chosen)
            totals.check(epoch)
            if config.MAX_GRAD_NORM:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bar.set_postfix(
                bpb=f"{totals.bits_per_byte:.3f}",
                lr=f"{scheduler.get_last_lr()[0]:.1e}",
                KBps=f"{totals.bytes / 1000 / (time.perf_counter() - start):.1f}",
                refresh=False,
            )
            scheduler.step()
            bar.update()
            check_interrupt()
    return totals


@torch.inference_mode()
def evaluate(model, examples, epoch, device, dtype, check_interrupt):
    """Returns the Totals over every evaluation example, each once; of longer files, over the head."""
    dataset = utils.ByteDataset(examples, config.PATCH_SIZE, config.PATCH_LENGTH)
    totals = Totals()
    model.eval()
    batch_size = config.BATCH_SIZE // config.ACCUMULATION_STEPS
    with tqdm(total=len(dataset), desc=f"epoch {epoch} eval", unit="file", dynamic_ncols=True, leave=False) as bar:
        for batch in utils.batches(dataset, range(len(dataset)), batch_size, config.NUM_WORKERS, device.type == "cuda"):
            targets = batch.masks[:, 1:] == 1
            with utils.autocast(device, dtype):
                output = predict(model, batch, targets, device)
            totals.add(output, batch, targets)
            bar.update(len(batch.masks))
            check_interrupt()
    totals.check(epoch)
    return totals


def predict(model, batch, targets, device):
    """Returns the model's BytePrediction for the `targets` of a Batch."""
    patches, masks, targets = (
        tensor.to(device, non_blocking=True) for tensor in (batch.patches, batch.masks, targets)
    )
    return model(patches.long(), masks, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def load_own(model, optimizer, wanted):
    """Loads the run's own latest state, or its best where that is missing; returns (checkpoint, paths of this run).

    Returns (None, []) where there is none. Raises UserError for a file that holds no such state.
    """
    latest = utils.latest_path(config.WEIGHTS_PATH)
    path = next((path for path in (latest, config.WEIGHTS_PATH) if os.path.exists(path)), None)
    if path is None:
        return None, []
    checkpoint = load_weights(model, path, "WEIGHTS_PATH", wanted)
    try:
        epoch, best = checkpoint["epoch"], checkpoint["min_eval_loss"]
        if type(epoch) is not int or epoch < 0 or not isinstance(best, (int, float)) or math.isnan(best):
            raise TypeError("epoch or min_eval_loss is no number")
        utils.load_optimizer(optimizer, checkpoint["optimizer"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise utils.UserError(
            f"WEIGHTS_PATH: {path!r} holds a model, but not the state of a run to go on from ({error!r}). To start from its "
            "weights, set PRE_WEIGHTS_PATH to it, LOAD_FROM_PRE_CHECKPOINT to True and LOAD_FROM_CHECKPOINT to False"
        ) from None
    print(f"goes on from {path} after epoch {epoch}; best eval_loss so far {best:.4f}")
    paths, run_id = [path], checkpoint.get("run_id")
    if path == latest:
        with contextlib.suppress(utils.UserError):  # a best model that cannot be read is not this run's
            if run_id is not None and utils.load_checkpoint(config.WEIGHTS_PATH, "WEIGHTS_PATH").get("run_id") == run_id:
                paths.append(config.WEIGHTS_PATH)
        if config.WEIGHTS_PATH not in paths:
            print(f"the best model of this run is not at {config.WEIGHTS_PATH}: the next epoch counts as the best so far")
            checkpoint |= {"best_epoch": 0, "min_eval_loss": math.inf}
    return checkpoint, paths


def load_weights(model, path, name, wanted):
    """Loads a checkpoint's weights into the model, whose sizes are `wanted`; returns the checkpoint."""
    checkpoint = utils.load_checkpoint(path, name)
    utils.check_sizes(wanted, checkpoint["model"], f"{name}: {path!r}")
    utils.load_weights(model, checkpoint["model"], f"{name}: {path!r}")
    return checkpoint


def make_scheduler(optimizer, num_steps, steps_done):
    """Returns the schedule that drives `optimizer`, as LR_SCHEDULE says, over `num_steps` steps, the first ones done."""
    for group in optimizer.param_groups:
        group["initial_lr"] = config.LEARNING_RATE  # that of config.py, also where the run goes on from a checkpoint
    if config.LR_SCHEDULE == "cosine":
        return transformers.get_cosine_schedule_with_warmup(
            optimizer, num_steps // 10, num_steps, last_epoch=steps_done - 1
        )
    return transformers.get_constant_schedule_with_warmup(optimizer, num_steps // 10, last_epoch=steps_done - 1)


def main():
    device = utils.pick_device()
    dtype = utils.pick_dtype(config.PRECISION, device)
    train, held_out = find_examples()
    utils.check_writable(config.LOGS_PATH, "LOGS_PATH")
    utils.check_writable(config.WEIGHTS_PATH, "WEIGHTS_PATH")
    utils.check_writable(utils.latest_path(config.WEIGHTS_PATH), "WEIGHTS_PATH")

    wanted = utils.ModelSizes(
        config.PATCH_SIZE, config.PATCH_LENGTH, config.HIDDEN_SIZE, config.PATCH_NUM_LAYERS, config.BYTE_NUM_LAYERS
    )
    torch.manual_seed(config.SEED)
    model = wanted.build(config.DROPOUT).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.LEARNING_RATE, fused=True)
    checkpoint, own_paths = load_own(model, optimizer, wanted) if config.LOAD_FROM_CHECKPOINT else (None, [])
    if checkpoint is None:
        checkpoint = {"epoch": 0, "best_epoch": 0, "min_eval_loss": math.inf}
        if config.LOAD_FROM_PRE_CHECKPOINT:
            load_weights(model, config.PRE_WEIGHTS_PATH, "PRE_WEIGHTS_PATH", wanted)
        print(f"a new run, from {config.PRE_WEIGHTS_PATH if config.LOAD_FROM_PRE_CHECKPOINT else 'random weights'}")
    steps_per_epoch = math.ceil(len(train) / config.BATCH_SIZE)
    # by epochs, not by the steps that were counted: other data or another BATCH_SIZE have other steps in an epoch
    scheduler = make_scheduler(optimizer, config.NUM_EPOCHS * steps_per_epoch, checkpoint["epoch"] * steps_per_epoch)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if isinstance(checkpoint.get("scaler"), dict) and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype} on {device}, seed {config.SEED}; "
        f"{len(train)} training and {len(held_out)} evaluation examples, {steps_per_epoch} steps an epoch"
    )

    progress = {name: checkpoint.get(name, 0) for name in ("epoch", "best_epoch", "min_eval_loss")}
    progress["run_id"] = checkpoint.get("run_id") or os.urandom(8).hex()
    logger = utils.make_logger(config.WANDB_LOG, config.as_dict())
    for epoch in range(progress["epoch"] + 1, config.NUM_EPOCHS + 1):
        start = time.perf_counter()
        with utils.delayed_interrupt() as check:
            train_totals = train_epoch(model, optimizer, scheduler, scaler, train, epoch, device, dtype, check)
            eval_totals = evaluate(model, held_out, epoch, device, dtype, check)

        progress["epoch"] = epoch
        is_best = eval_totals.loss < progress["min_eval_loss"]
        if is_best:
            progress |= {"best_epoch": epoch, "min_eval_loss": eval_totals.loss}
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_sched": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "config": config.as_dict(),
            **progress,
        }
        for path in [config.WEIGHTS_PATH] * is_best + [utils.latest_path(config.WEIGHTS_PATH)]:
            if path not in own_paths:
                utils.keep_backup(path)
                own_paths.append(path)
            utils.save_checkpoint(path, state)

        figures = {
            "train_loss": train_totals.loss,
            "eval_loss": eval_totals.loss,
            "train_bits_per_byte": train_totals.bits_per_byte,
            "eval_bits_per_byte": eval_totals.bits_per_byte,
        }
        line = f"epoch {epoch}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        with open(config.LOGS_PATH, "a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(f"{line}  {time.perf_counter() - start:.0f} s{'  best' if is_best else ''}")
        logger.log({"epoch": epoch, **figures})
    logger.finish()
    print(f"finished {progress['epoch']} of NUM_EPOCHS {config.NUM_EPOCHS}: best eval_loss "
          f"{progress['min_eval_loss']:.4f} in epoch {progress['best_epoch']}, in {config.WEIGHTS_PATH}")


if __name__ == "__main__":
    config.override(sys.argv[1:])
    utils.run_main(main)
