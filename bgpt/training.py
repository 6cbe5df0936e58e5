"""The parts of a training run: its batches, weight updates, saves and ends. The loop stands in the scripts."""

import contextlib
import dataclasses
import glob
import itertools
import math
import os
import time
import warnings
import zlib

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from bgpt import checkpoint
from bgpt import fingerprints
from bgpt import logger
from bgpt import resuming
from bgpt import system
import utils
from bgpt import windows as windowing

MOST_EXTENSIONS = 1000  # a checkpoint lists no more extensions of training files: beyond, they are hardly kinds of files

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def own_paths(settings):
    """Returns the files and folders that runs write or start from, which are therefore no data; some may not exist.

    Args:
        settings: the constants of config.py, as a dict.
    """
    weights = [settings["WEIGHTS_PATH"], system.latest_path(settings["WEIGHTS_PATH"])]
    backups = [backup for path in weights for backup in glob.glob(f"{glob.escape(path)}.bak*")]
    folders = [settings["OUTPUT_FOLDER"], os.path.join(os.environ.get("WANDB_DIR", "."), "wandb")]
    return [*weights, *backups, settings["LOGS_PATH"], settings["PRE_WEIGHTS_PATH"], *folders]


def process_batches(processes, dataset, order, batch_size, num_workers, while_waiting, waiting, before_end):
    """Yields what each step of all processes reads: every example of `order` once, in one of them.

    Args:
        processes: the Processes.
        dataset: a ByteDataset or Windows; the processes get nearly as many patches in each step.
        order: int64 (n,), indices of examples; a step takes the next `batch_size` for each process.
        batch_size: sequences per process, on average.
        num_workers, while_waiting: see `utils.batches`.
        waiting: returns the context in which this process waits for a batch.
        before_end: see `Processes.agree`; called when a process could not get its batch.

    Yields:
        (batch, indices, count): this process's Batch; the examples in it; and how many examples all processes take in this
        step. Where too few are left for every process, some get a spare batch and no indices: all must compute
        something, but what comes of a spare batch must not count.

    Raises:
        UserError, SystemExit: a process could not read a file, see `Processes.agree`.
    """
    size = batch_size * processes.count
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    # one step at a time, for an epoch may have very many; what is read is some steps ahead of what is yielded
    mine = (step[utils.balanced_parts(dataset.lengths(step), processes.count)[processes.rank]] for step in steps)
    mine, ahead = itertools.tee(mine)
    read = (indices if len(indices) else step[:1] for indices, step in zip(ahead, steps))
    with contextlib.closing(utils.batches(dataset, read, num_workers, while_waiting)) as batches:  # its workers end here, too
        for step, indices in zip(steps, mine):
            with processes.agreeing(before_end), waiting():
                batch = next(batches)
            yield batch, indices, len(step)


# ---------------------------------------------------------------------------------------------------------------------
# Schedule, compilation
# ---------------------------------------------------------------------------------------------------------------------


def parameter_groups(model, embedding_start):
    """Returns AdamW's groups of a model's parameters, in the order of `model.parameters()`.

    Each has an `lr_factor`, the share of the learning rate that it gets: of the patch embedding a tenth if it starts "smooth".
    """
    first, *others = model.parameters()
    assert first is model.patch_level_decoder.patch_embedding.weight
    return [{"params": [first], "lr_factor": 0.1 if embedding_start == "smooth" else 1.0}, {"params": others, "lr_factor": 1.0}]


def make_scheduler(optimizer, name, learning_rate, num_steps, steps_done):
    """Returns the schedule that sets an optimizer's learning rate, from a linear warm-up over the first tenth of all steps on.

    Args:
        name: "cosine" (to 0) or "constant".
        learning_rate: at its peak.
        num_steps: in all.
        steps_done: how many of them are behind.
    """
    for group in optimizer.param_groups:  # also of an optimizer that comes from a checkpoint with another learning rate
        group["initial_lr"] = learning_rate * group.get("lr_factor", 1.0)
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps, last_epoch=steps_done - 1)
    return get_constant_schedule_with_warmup(optimizer, num_steps // 10, last_epoch=steps_done - 1)


def compile_model(model):
    """Has torch.compile fuse the operations of the blocks of a model's decoders; names and weights stay what they are.

    Only what comes before and after the attention of a block is compiled, once for all layers of a decoder and for any
    number of rows.
    """
    for decoder in model.children():
        if isinstance(decoder, utils.ByteModel):
            decoder.parts = tuple(torch.compile(part, dynamic=True) for part in decoder.parts)


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def no_number(epoch):
    """Returns the UserError for a loss or a weight that is no number."""
    return system.UserError(
        f"the loss is no number in epoch {epoch}, or the weights have become none. Nothing of that was saved: the same command "
        "goes on from before. Try a lower LEARNING_RATE, MAX_GRAD_NORM 1.0 or PRECISION fp32"
    )


class Run:
    """A run of training. Within `with run:` its files are locked; from `begin` on, a stop signal ends it after the step in hand.

    A script calls `resume` and `begin`; for each epoch it takes the batches of `training_batches`, and for each of them
    computes gradients and calls `clip_gradients`, `update_weights` and `step_done`; then those of `evaluation_batches`, with
    `evaluation_step_done`; then `epoch_done`. At last it calls `finish`. All processes call these together.

    Args:
        processes: the Processes.
        model: a bGPTLMHeadModel or bGPTForClassification on their device.
        sizes: its ModelSizes, those that config.py gives.
        dtype: torch.dtype to compute in.
        settings: the constants of config.py that bear on training, as a dict.
        train, held_out: Examples to train and to evaluate on.
        best_name: what checkpoints call the figure that decides which epoch is best: min_eval_loss or max_eval_acc.
        higher_is_better: whether a higher figure is the better one.
        no_totals: the running sums of an epoch that has not begun.
        labels: a classifier's {label: index}.
        hold_out: how its evaluation examples are held out, for checkpoints.
        cuts_windows: whether files longer than PATCH_LENGTH are cut into windows; else an epoch takes a crop of each.
    """

    def __init__(
        self, processes, model, sizes, dtype, settings, train, held_out, best_name, higher_is_better, no_totals,
        labels=None, hold_out=None, cuts_windows=False,
    ):  # fmt: skip
        self.processes, self.model, self.sizes, self.dtype, self.settings = processes, model, sizes, dtype, settings
        self.train, self.held_out, self.labels, self._hold_out = train, held_out, labels, hold_out
        self.best_name, self.higher_is_better, self._no_totals = best_name, higher_is_better, no_totals
        self._cuts_windows = cuts_windows
        self.state = resuming.State(no_totals)
        self.files = checkpoint.RunFiles(settings["WEIGHTS_PATH"], settings["LOGS_PATH"])
        groups = parameter_groups(model, settings["EMBEDDING_START"])
        self.optimizer = torch.optim.AdamW(groups, lr=settings["LEARNING_RATE"], fused=True)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
        self.scheduler = self.bar = self._reading = None  # see `begin`, `training_batches`
        # rank 0 alone writes checkpoints
        self._fingerprints = fingerprints.Fingerprints(train, held_out, with_names=processes.rank == 0)
        self._extensions = sorted(train.extensions())
        self._random_state = None  # this process's, to be restored before the next step
        self._saved_at, self._saved_position = time.monotonic(), None  # when, and at which (epoch, position), it was saved
        self._is_saved = True  # whether the last try to save the latest state went well
        self._epoch_began = time.monotonic()
        self._logger, self._stack = logger.NoLogger(), contextlib.ExitStack()
        self._stop_signal = None  # set by `begin`

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            with self.processes.agreeing():
                self.files.check(self.sizes.kind)
                if self.processes.rank == 0:
                    stack.enter_context(self.files.locked())
            self._stack = stack.pop_all()  # all processes go on: the files stay locked until `__exit__`
        self.state.run_id = self.processes.gather(os.urandom(8).hex())[0]
        return self

    def __exit__(self, *error):
        if self._reading is not None:
            self._reading.close()  # ends the reading processes of an epoch that is left halfway, also those that hang
        self._stack.close()

    # ---- beginning -------------------------------------------------------------------------------------------------

    def resume(self):
        """Loads the run's latest state, or its best model where that is missing; returns whether there was one.

        Raises:
            UserError: the file holds another kind of model, or a state that does not fit: of other sizes, files or
                CONVERSION_MODE.
        """
        path = self.files.newest()
        if path is None or not self.settings["LOAD_FROM_CHECKPOINT"]:
            return False
        try:
            found = checkpoint.load_sized_weights(self.model, self.sizes, path, "WEIGHTS_PATH")
        except checkpoint.DamagedCheckpoint as error:
            if path == self.files.latest and os.path.exists(self.files.best):
                hint = f"Without that file, the run goes on from its best model, {self.files.best}"
                raise system.UserError(f"{error}. {hint}") from None
            raise
        try:
            earlier = resuming.EarlierRun(found, path, self.settings, self.labels, self._fingerprints, self._cuts_windows)
            earlier.check_fits()
            earlier.check_files()
            self.state.take_over(found, self.best_name)
            checkpoint.load_optimizer(self.optimizer, found["optimizer"])
            if found.get("scaler"):
                self.scaler.load_state_dict(found["scaler"])
            if not earlier.differences:
                self._restore_position(earlier)
        except system.UserError:
            raise
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError, zlib.error) as error:
            raise system.UserError(
                f"WEIGHTS_PATH: {path!r} holds a model, but not the state of a run to go on from ({error!r}). To start from "
                "its weights, set PRE_WEIGHTS_PATH to it, LOAD_FROM_PRE_CHECKPOINT to True and LOAD_FROM_CHECKPOINT to False"
            ) from None
        state = self.state
        within = f" and {state.position} examples of the next" if state.position else ""
        so_far = f"; {self.best_name} so far {state.best:.4f}" if state.best_epoch else ""
        print(f"goes on from {path} after epoch {state.epoch}{within}{so_far}")
        earlier.print_changes(state.epoch + 1)
        self._forget_best_that_does_not_compare(earlier)
        if self.processes.rank == 0:
            self.files.complete_log(state.log_text, state.log_start)
        return True

    def _restore_position(self, earlier):
        """Takes over where in an epoch a run was, and its running sums; `training_batches` restores its random state.

        Args:
            earlier: the run that goes on, an EarlierRun.
        """
        found, processes, state = earlier.found, self.processes, self.state
        position = found.get("position", 0)
        if type(position) is not int or position < 0:
            raise ValueError(f"its position is {position!r}")
        if position == 0:
            return
        totals = [{name: float(each[name]) for name in self._no_totals} for each in found["totals"]]
        random_states = [{name: each[name] for name in ("cpu", "cuda")} for each in found["random_states"]]
        if not len(totals) == len(random_states) > 0:
            raise ValueError(f"it holds {len(totals)} totals and {len(random_states)} random states")
        why = earlier.why_epoch_restarts()
        if why:
            print(f"{why}: epoch {state.epoch + 1} begins anew")
            return
        if position > len(self._training_set(state.epoch)):
            raise ValueError(f"its position is {position!r}, but there are {len(self._training_set(state.epoch))} examples")
        state.position = position
        if len(totals) == processes.count:
            state.totals, self._random_state = totals[processes.rank], random_states[processes.rank]
            torch.Generator().set_state(self._random_state["cpu"])  # raises an error if it is none
            return
        print(f"{len(totals)} processes have become {processes.count}: dropout is drawn anew from here on")
        if processes.rank == 0:  # the others begin at 0
            state.totals = {name: sum(each[name] for each in totals) for name in self._no_totals}

    def _forget_best_that_does_not_compare(self, earlier):
        """Has the next epoch count as the best so far, where the best model is not there or its figure is of other data.

        Args:
            earlier: the run that goes on, an EarlierRun.
        """
        why, has_best = None, self.files.find_own(self.state.run_id)
        if not has_best:
            why = f"the best model of this run is not at {self.files.best}"
        elif earlier.took_other_parts(self.held_out):
            why = "LONG_FILES has changed, and with it what evaluation covers"
        elif "EVAL_FOLDERS" in earlier.differences:
            why = "figures of other evaluation files do not compare"
        if why and self.state.best_epoch:
            print(f"{why}: the next epoch counts as the best so far")
            if has_best and self.processes.rank == 0:
                self.files.keep_best()
            self.state.best_epoch, self.state.best = 0, None

    def begin(self):
        """Lays the learning rate's schedule over the run; returns what trains the model, see `Processes.distribute`.

        Raises:
            UserError, SystemExit: the processes see different files or states.
        """
        settings, processes, state = self.settings, self.processes, self.state
        views = processes.gather((state.epoch, state.position, state.run_id, self._fingerprints.digests()))
        if any(view != views[0] for view in views):
            processes.agree(
                system.UserError(
                    "the processes see different files: TRAIN_FOLDERS, EVAL_FOLDERS and WEIGHTS_PATH must lie on a disk that all share"
                )
            )
        step_size = settings["BATCH_SIZE"] * processes.count  # examples in a step of all processes
        num_epochs = max(settings["NUM_EPOCHS"], state.epoch + 1)
        counts = [len(self.train)] * num_epochs
        if self._cuts_windows:  # which are not as many in each epoch
            seeds = map(self._seeds, range(num_epochs))
            counts = windowing.count_training_windows(self.train, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH, seeds)
        steps = [-(-count // step_size) for count in counts]
        # by epochs, not by the steps that were counted: another BATCH_SIZE has other steps in an epoch
        done = sum(steps[: state.epoch]) + -(-state.position // step_size)
        num_steps = sum(steps[: settings["NUM_EPOCHS"]])
        self.scheduler = make_scheduler(self.optimizer, settings["LR_SCHEDULE"], settings["LEARNING_RATE"], num_steps, done)
        print(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.dtype} on {processes.count} x "
            f"{processes.device.type}, seed {settings['SEED']}; {len(self.train)} training and {len(self.held_out)} "
            f"evaluation examples, {steps[state.epoch]} steps an epoch"
        )
        self._logger = logger.make_logger(settings["WANDB_LOG"] and processes.rank == 0, settings, state.run_id)
        if settings["COMPILE"]:
            compile_model(self.model)
        self._stop_signal = self._stack.enter_context(system.delayed_signals(impatient=processes.count == 1))
        self._epoch_began = time.monotonic()
        return processes.distribute(self.model)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def training_batches(self):
        """Returns an iterator over (batch, indices, count) of every step that is left of the epoch; see `process_batches`.

        Order and crops depend on SEED, the epoch and the files alone.
        """
        random_state, device = self._random_state, self.processes.device
        if random_state is None or (random_state["cuda"] is None) != (device.type != "cuda"):
            torch.manual_seed(int(self.step_rng().integers(2**63)))
        else:  # dropout goes on where it was
            torch.set_rng_state(random_state["cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(random_state["cuda"], device)
        self._random_state = None
        dataset = self._training_set(self.state.epoch)
        order = np.random.default_rng(self._seeds(self.state.epoch)).permutation(len(dataset))[self.state.position :]
        self._reading = self._batches("train", dataset, order, self.settings["BATCH_SIZE"])
        return self._reading

    def evaluation_batches(self):
        """Returns an iterator like that of `training_batches` over every evaluation example once, the shortest first."""
        if self._cuts_windows:
            dataset = windowing.evaluation_windows(self.held_out, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        else:
            dataset = utils.ByteDataset(self.held_out, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        order = np.argsort(dataset.lengths(np.arange(len(dataset))), kind="stable")
        batch_size = self.settings["BATCH_SIZE"] // self.settings["ACCUMULATION_STEPS"]
        self._reading = self._batches("eval", dataset, order, batch_size)
        return self._reading

    def _training_set(self, epoch):
        """Returns the data set of the epoch after `epoch` finished ones: a ByteDataset, or the Windows of all files."""
        make = windowing.training_windows if self._cuts_windows else utils.ByteDataset
        return make(self.train, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH, self._seeds(epoch))

    def _batches(self, what, dataset, order, batch_size):
        self.bar = tqdm(
            desc=f"epoch {self.state.epoch + 1} {what}", total=len(dataset), initial=len(dataset) - len(order),
            unit="file" if len(dataset) == len(dataset.examples) else "window", disable=self.processes.rank > 0,
            leave=what == "train", **system.progress_options(),
        )  # fmt: skip
        with self.bar:
            yield from process_batches(
                self.processes, dataset, order, batch_size, self.settings["NUM_WORKERS"], self._stop_while_waiting,
                self._waiting, self._save_before_end,
            )  # fmt: skip

    def _seeds(self, epoch):
        return [self.settings["SEED"], epoch + 1]

    def step_rng(self):
        """Returns a numpy Generator for this step and process alone."""
        seeds = self._seeds(self.state.epoch)
        return np.random.default_rng([*seeds, self.state.position, self.processes.rank, zlib.crc32(b"step")])

    def clip_gradients(self):
        """Scales the gradients down to the norm MAX_GRAD_NORM if theirs is larger, unless that is 0."""
        if self.settings["MAX_GRAD_NORM"]:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["MAX_GRAD_NORM"])

    def update_weights(self):
        """Takes an optimizer step, clears the gradients, and sets the next step's learning rate."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings(action="ignore"):  # fp16's first steps may be skipped, which the schedule remarks on
            self.scheduler.step()

    def step_done(self, count, totals, shown):
        """Counts a step of training; saves the latest state when it is time, and stops the run when it was told to.

        Args:
            count: examples that all processes have trained on in it.
            totals: this process's running sums of the epoch, a dict.
            shown: {name: text} for the progress bar.

        Raises:
            UserError, SystemExit: the run has stopped.
        """
        self.state.position += count
        self.state.totals = totals
        self.bar.set_postfix(shown, lr=f"{self.scheduler.get_last_lr()[-1]:.1e}", refresh=False)
        self.bar.update(count)
        self._save_or_stop()

    def evaluation_step_done(self, count):
        """Counts a step of evaluation; see `step_done`."""
        self.bar.update(count)
        self._save_or_stop()

    def _stop_while_waiting(self):
        """Ends a wait for a reading process when the run is told to stop."""
        if self._stop_signal():
            raise KeyboardInterrupt(self._stop_signal())

    @contextlib.contextmanager
    def _waiting(self):
        """The context in which this process waits for a batch: a stop signal or an unreadable file is a UserError there."""
        here = self.settings["NUM_WORKERS"] == 0  # this process itself reads, and a read from a dead disk may never end
        try:
            with self._stop_signal.waiting() if here else contextlib.nullcontext():
                yield
        except KeyboardInterrupt:  # `_save_before_end` then ends the run
            raise system.UserError("stopped while waiting for a file") from None
        except utils.UnreadableFile as error:
            raise system.UserError(
                f"{error}. When it is back, {self._same_command()} goes on; with --ALLOW_CHANGED_FILES True also without it"
            ) from None

    def _save_before_end(self):
        """Saves the state after the last finished step, since a process could not get a batch; returns a word on that.

        Raises:
            SystemExit: that was because of a stop signal.
        """
        if not self._is_saved or self._saved_position != (self.state.epoch, self.state.position):
            self._save()
        number = max(self.processes.gather(self._stop_signal()))
        if number:
            self._leave(number)
        return f". The state of {self._where()} is saved" if self._is_saved else ". The latest state could not be saved"

    def _same_command(self):
        return "the same command" + (" with LOAD_FROM_CHECKPOINT True" if not self.settings["LOAD_FROM_CHECKPOINT"] else "")

    def _where(self):
        return f"epoch {self.state.epoch + 1} after {self.state.position} examples"

    def _leave(self, number):
        """Ends the run, on all processes, with the number of a stop signal; its state is saved."""
        again = f"{self._same_command()} goes on from there" if self._is_saved else "the latest state could not be saved"
        self.processes.leave(f"stopped by {system.signal_name(number)} in {self._where()}: {again}", 128 + number)

    def _save_or_stop(self):
        state, processes = self.state, self.processes
        is_broken = not all(map(math.isfinite, state.totals.values()))
        number = self._stop_signal()
        # the first process's clock decides, so that all save together
        is_due = processes.rank == 0 and time.monotonic() - self._saved_at >= 60 * self.settings["SAVE_MINUTES"]
        num_broken, num_signals, num_due = processes.sum([is_broken, number > 0, is_due])
        if num_broken:
            processes.agree(no_number(state.epoch + 1))
        if num_signals or (num_due and self._saved_position != (state.epoch, state.position)):
            self._save()
        if num_signals:
            self._leave(max(processes.gather(number)))

    # ---- ends ------------------------------------------------------------------------------------------------------

    def sum_totals(self, totals):
        """Returns a dataclass of running sums, added up over all processes."""
        return type(totals)(*self.processes.sum(dataclasses.astuple(totals)))

    def epoch_done(self, figures, value, loss, report=""):
        """Counts the epoch in hand as finished; saves, logs and prints it.

        Args:
            figures: {name: number} to log.
            value: that of figures which decides what is best.
            loss: that of them which decides between epochs of the same value, the lower one.
            report: more lines, logged if the epoch is the best so far.
        """
        state = self.state
        if not all(map(math.isfinite, figures.values())):
            self.processes.agree(no_number(state.epoch + 1))
        state.epoch, state.position, state.totals, state.figures = state.epoch + 1, 0, self._no_totals, figures
        line = f"epoch {state.epoch}  " + "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        state.log_text, state.log_start = f"{line}\n", self.files.end_of_log()
        before = state.best_epoch, state.best, state.best_loss, state.report, state.log_text
        if state.best is None or value == state.best:
            is_best = state.best is None or loss < state.best_loss
        else:
            is_best = (value > state.best) == self.higher_is_better
        if is_best:
            state.best_epoch, state.best, state.best_loss, state.report = state.epoch, value, loss, report
            state.log_text += report
            is_best = self._save(best=True)
            if not is_best:
                state.best_epoch, state.best, state.best_loss, state.report, state.log_text = before  # what the file holds
        self._save()
        if self.processes.rank == 0:
            self.files.complete_log(state.log_text, state.log_start)
        print(f"{line}{'  best' if is_best else ''}  {time.monotonic() - self._epoch_began:.0f} s")
        self._epoch_began = time.monotonic()
        self._logger.log({"epoch": state.epoch, **figures})

    def finish(self):
        """Ends a run that has done all its epochs, with a word on its best model.

        Raises:
            UserError, SystemExit: its latest state is not on the disk.
        """
        state = self.state
        self._logger.finish()
        print(f"finished {state.epoch} of NUM_EPOCHS {self.settings['NUM_EPOCHS']} (raise NUM_EPOCHS to go on)")
        if state.best_epoch:
            print(f"best: epoch {state.best_epoch}, {self.best_name} {state.best:.4f}, in {self.files.best}\n{state.report}", end="")
        error = system.UserError(
            f"the latest state could not be saved at {self.files.latest!r}: once there is room, the same command repeats what is lost"
        )
        self.processes.agree(None if self._is_saved else error)

    def _save(self, best=False):
        """Saves the latest state, or the best model; returns whether it could be saved.

        Raises:
            UserError, SystemExit: the weights hold values that are no numbers; that is never saved.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.processes.agree(no_number(self.state.epoch + 1))
        device, problem = self.processes.device, None
        random_state = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        everyone = self.processes.gather((self.state.totals, random_state))
        if self.processes.rank == 0:
            problem = self.files.save(self.files.best if best else self.files.latest, self._contents(everyone))
        is_saved = self.processes.sum([problem is not None]) == [0]
        if not best:
            self._is_saved, self._saved_at = is_saved, time.monotonic()
            self._saved_position = self.state.epoch, self.state.position
        return is_saved

    def _contents(self, everyone):
        """Returns the checkpoint, as checkpoint.py describes it; `everyone` is [(totals, random state)] of all processes."""
        worst = -math.inf if self.higher_is_better else math.inf
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_sched": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            self.best_name: worst if self.state.best is None else self.state.best,
            **({} if self.labels is None else {"labels": self.labels, "label_mode": self.settings["LABELS"]}),
            **({} if self._hold_out is None else {"hold_out": self._hold_out}),
            **({"extensions": self._extensions} if len(self._extensions) <= MOST_EXTENSIONS else {}),
            **self.state.to_checkpoint(),
            "order": resuming.ORDER,
            "totals": [totals for totals, _ in everyone],
            "random_states": [random_state for _, random_state in everyone],
            **self._fingerprints.to_checkpoint(),
            "config": self.settings,
        }
