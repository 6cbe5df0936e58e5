"""Parts of a training run: its steps, learning rate, checkpoints, resuming, logs. The loops are in the scripts."""

import collections
import contextlib
import dataclasses
import glob
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

import utils
from bgpt import checkpoint, system, windows
from bgpt.distributed import autocast, check_compiler, pick_dtype, total_memory
from bgpt.examples import digest, directed, extensions_of, hash_texts, real_paths
from bgpt.settings import latest_path
from bgpt.system import UserError

MOST_EXTENSIONS = 1000  # most extensions of training files in a checkpoint
MOST_FILES = 10**6  # most hashes of training files in a checkpoint, 8 bytes each

# ---- Steps ----------------------------------------------------------------------------------------------------------


class Steps:
    """The steps of an epoch: for each, the array of this rank's indices.

    `order` has the indices of all ranks, in the order of their use. In each step the ranks get nearly equal numbers of patches,
    and `batch_size` examples on average. If a step has fewer examples than ranks, some ranks get an empty array. They run a
    dummy batch with weight 0, since DDP needs every rank in backward.
    """

    def __init__(self, dataset, order, batch_size, ranks):
        self.dataset, self.order, self.ranks, self.size = dataset, order, ranks, batch_size * ranks.count

    def __len__(self):
        return -(-len(self.order) // self.size)

    def count(self, number):
        """Returns the number of examples of all ranks in step `number`."""
        return min(self.size, len(self.order) - number * self.size)

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError(number)
        step = self.order[number * self.size : (number + 1) * self.size]
        if self.ranks.count == 1:
            return step
        return step[utils.balanced_parts(self.dataset.lengths(step), self.ranks.count)[self.ranks.rank]]


# ---- Optimizer, schedule, logs ----------------------------------------------------------------------------------------


def orthogonalize(matrices, dtype):
    """Returns matrices (N, R, C) with the same singular vectors and all singular values near 1, in `dtype`.

    5 Newton-Schulz iterations, with the coefficients of torch.optim.Muon.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    wide = matrices.to(dtype).mT if is_tall else matrices.to(dtype)
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide.mT if is_tall else wide


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimizer.

    A step of Muon is one of torch.optim.Muon with adjust_lr_fn "match_rms_adamw", so that its updates have the size of AdamW's.
    But it computes in float32 where bf16 is emulated, since PyTorch's takes 30 times as long on such CPUs, and matrices of one
    shape together.

    `groups` are AdamW's parameter groups, `matrices` Muon's 2-D parameters, `lr` the learning rate of both.
    """

    def __init__(self, groups, matrices, lr):
        self.adamw = torch.optim.AdamW(groups, lr=lr, fused=True)
        muon = {"params": matrices, "lr": lr, "weight_decay": 0.01, "momentum": 0.95}
        super().__init__([*self.adamw.param_groups, muon], {})
        self.dtype = pick_dtype("auto", matrices[0].device)

    @torch.no_grad()
    def step(self, closure=None):
        *groups, muon = self.param_groups  # loading a checkpoint replaces the groups and the state
        self.adamw.state, self.adamw.param_groups = self.state, groups
        self.adamw.step()
        by_shape = collections.defaultdict(list)
        for weight in muon["params"]:
            by_shape[weight.shape].append(weight)
        for shape, weights in by_shape.items():
            updates = []
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - muon["momentum"])
                updates.append(weight.grad.lerp(momentum, muon["momentum"]))
            rate = muon["lr"] * 0.2 * math.sqrt(max(shape))
            for weight, update in zip(weights, orthogonalize(torch.stack(updates), self.dtype)):
                weight.mul_(1 - muon["lr"] * muon["weight_decay"]).sub_(update, alpha=rate)


def make_optimizer(model, name, learning_rate, embedding_start):
    """Returns OPTIMIZER `name` of a model. A parameter group's `lr_factor` scales its learning rate.

    Muon gets the matrices of the decoders' blocks. AdamW's groups keep the order of `model.parameters()`, as published.
    """
    matrices, rest = [], []
    for key, weight in model.named_parameters():
        (matrices if name == "muon" and ".h." in key and weight.dim() == 2 else rest).append(weight)
    assert rest[0] is model.patch_level_decoder.patch_embedding.weight
    slow = {"params": rest[:1], "lr_factor": 0.1 if embedding_start == "smooth" else 1.0}
    groups = [slow, {"params": rest[1:], "lr_factor": 1.0}]
    return MuonAdamW(groups, matrices, learning_rate) if matrices else torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def make_scheduler(optimizer, name, learning_rate, num_steps, steps_done):
    """Returns LR_SCHEDULE `name` after `steps_done` of `num_steps`. The first tenth is linear warm-up."""
    for group in optimizer.param_groups:  # a checkpoint may have had another learning rate
        group["initial_lr"] = learning_rate * group.get("lr_factor", 1.0)
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps, last_epoch=steps_done - 1)
    return get_constant_schedule_with_warmup(optimizer, num_steps // 10, last_epoch=steps_done - 1)


def start_wandb(settings, run_id):
    """Starts a Weights & Biases run, offline without login or WANDB_MODE."""
    import wandb  # here, since only WANDB_LOG needs it

    options = {"project": "bGPT", "id": run_id, "resume": "allow", "config": settings}
    try:
        if "WANDB_MODE" in os.environ or wandb.api.api_key:
            return wandb.init(**options)
        why = "not logged in (`wandb login` does that)"
    except (wandb.Error, ValueError) as error:  # no network, a wrong key, an unknown WANDB_MODE
        why = f"cannot start ({' '.join(str(error).split())})"
    print(f"wandb: {why}; this run is logged offline, in the folder wandb")
    return wandb.init(**options, mode="offline")


def own_paths(settings):
    """Returns the paths that a run writes or loads weights from. They are excluded from the data and may not exist yet."""
    weights = [settings["WEIGHTS_PATH"], latest_path(settings["WEIGHTS_PATH"])]
    backups = [backup for path in weights for backup in glob.glob(f"{glob.escape(path)}.bak*")]
    folders = [settings["OUTPUT_FOLDER"], os.path.join(os.environ.get("WANDB_DIR", "."), "wandb")]
    return [*weights, *backups, settings["LOGS_PATH"], settings["PRE_WEIGHTS_PATH"], *folders]


# ---- A run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    """A run's progress, as saved in checkpoints. It is the same on all ranks."""

    run_id: str
    epoch: int = 0  # finished epochs
    position: int = 0  # finished examples of the current epoch, of all ranks
    best_epoch: int = 0  # 0 = none
    best: float | None = None  # bits per byte of the best epoch, or a classifier's accuracy
    best_loss: float = -math.inf  # its eval loss, for ties. -inf = unknown, never beaten
    report: str = ""  # of the best epoch
    figures: dict = dataclasses.field(default_factory=dict)  # of the last finished epoch


class Run:
    """A training run. Within `with run:` its files are locked, and stop signals are delayed until a step has finished.

    Args:
        ranks: `distributed.Ranks`.
        model: a bGPTLMHeadModel or bGPTForClassification on their device.
        sizes: its ModelSizes.
        settings: dict of config.py's constants for training.
        train, held_out: Examples to train and to evaluate on.
        totals: the running sums of an epoch, an `evaluation.Totals`.
        labels: a classifier's {label: index}.
    """

    def __init__(self, ranks, model, sizes, settings, train, held_out, totals, labels=None):
        self.ranks, self.model, self.sizes, self.settings = ranks, model, sizes, settings
        self.totals, self.labels, self.dtype = totals, labels, pick_dtype(settings["PRECISION"], ranks.device)
        self.train, self.held_out = (directed(each, settings["CONVERSION_MODE"]) for each in (train, held_out))
        self.best_name = "min_eval_bits_per_byte" if labels is None else "max_eval_acc"
        self.cuts_windows = labels is None and cuts_windows(settings)
        self.extensions = extensions_of(self.train)
        paths = (self.train.files[file] for file in np.unique(self.train.indices).tolist())  # both directions have the same
        self.file_hashes = torch.from_numpy(hash_texts(real_paths(paths))).unique()
        self.digests = {"TRAIN_FOLDERS": digest(self.train), "EVAL_FOLDERS": digest(self.held_out)}
        self.best_path, self.log_path = settings["WEIGHTS_PATH"], settings["LOGS_PATH"]
        self.latest_path = latest_path(self.best_path)
        self._own = set()  # the checkpoints that this run has written
        self.optimizer = make_optimizer(model, settings["OPTIMIZER"], settings["LEARNING_RATE"], settings["EMBEDDING_START"])
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.state = State(ranks.gather(os.urandom(8).hex())[0])
        self._random_state = None  # this rank's, restored before the next step
        self._saved = None  # (epoch, position) of the latest state's last save, False if that failed
        self._is_broken = False  # whether NaN or infinity was seen in this rank's sums
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        system.check_writable(self.log_path, "LOGS_PATH")
        for path in (self.best_path, self.latest_path):
            system.check_writable(path, "WEIGHTS_PATH")
            if os.path.realpath(path) == os.path.realpath(self.log_path):
                raise UserError(f"LOGS_PATH: {self.log_path!r} is a file of the run's weights; give another path")
        if self.ranks.rank == 0:
            self._stack.enter_context(system.lock(self.best_path, "WEIGHTS_PATH"))
        return self

    def __exit__(self, kind, error, traceback):
        with self._stack, contextlib.suppress(SystemExit):  # the original error ends this rank
            # a batch could not be read: the other ranks save and end too
            if isinstance(error, OSError) and self._saved is not None:
                self.begin_step(fails=True)

    # ---- start -----------------------------------------------------------------------------------------------------

    def resume(self):
        """Loads the latest state, else the best model. Returns whether there was one. Raises UserError if it does not fit."""
        settings, state = self.settings, self.state
        path = next((path for path in (self.latest_path, self.best_path) if os.path.exists(path)), None)
        if path is None or not settings["LOAD_FROM_CHECKPOINT"]:
            return False
        saved = checkpoint.load_sized_weights(self.model, self.sizes, path, "WEIGHTS_PATH")
        if missing := {"optimizer", "epoch", "best_epoch"} - set(saved):
            what = f"WEIGHTS_PATH: {path!r} has a model, but not the state of a run to resume (no {', '.join(sorted(missing))})"
            hint = "set PRE_WEIGHTS_PATH to it, LOAD_FROM_PRE_CHECKPOINT to True and LOAD_FROM_CHECKPOINT to False"
            raise UserError(f"{what}. To start from its weights, {hint}")
        before, data = saved.get("config", {}), saved.get("data", self.digests)
        changed = {name: before[name] for name in settings if name in before and before[name] != settings[name]}
        other_files = [name for name in self.digests if data[name] != self.digests[name]]
        self._check_same_task(path, saved, before, changed, other_files)
        old_optimizer = before.get("OPTIMIZER", "adamw")  # published runs have AdamW
        if old_optimizer == settings["OPTIMIZER"]:
            checkpoint.load_optimizer(self.optimizer, saved["optimizer"], f"WEIGHTS_PATH: {path!r}")
        else:
            what = f"{path!r} has the moments of {old_optimizer!r}"
            print(f"OPTIMIZER: {what}, so those of {settings['OPTIMIZER']!r} start from zero")
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        state.epoch, state.best_epoch = saved["epoch"], saved["best_epoch"]
        # published checkpoints have no bits per byte, best_loss or run_id, so `_check_best` resets their best score
        best, state.best_loss = (saved.get(name, -math.inf) for name in (self.best_name, "best_loss"))
        state.best = best if state.best_epoch else None
        state.run_id = saved.get("run_id", state.run_id)
        state.figures, state.report = saved.get("figures", {}), saved.get("report", "")
        self.file_hashes = torch.cat((self.file_hashes, saved.get("file_hashes", self.file_hashes))).unique()
        restarts = other_files or {"SEED", "LONG_FILES"} & set(changed) or len(saved.get("totals", [0])) != self.ranks.count
        if saved.get("position") and not restarts:
            state.position, self._random_state = saved["position"], saved["random_states"][self.ranks.rank]
            self.totals.load(saved["totals"][self.ranks.rank])
        within = f" and {state.position} examples of the next" if state.position else ""
        so_far = f"; {self.best_name} so far {state.best:.4f}" if state.best_epoch and self.best_name in saved else ""
        print(f"resumes from {path} after epoch {state.epoch}{within}{so_far}")
        for name, value in changed.items():
            print(f"{name} was {value!r} and is now {settings[name]!r}" + "; the schedule changes" * (name == "NUM_EPOCHS"))
        if saved.get("position") and restarts:
            print(f"epoch {state.epoch + 1} restarts: files, SEED, LONG_FILES or the number of processes have changed")
        is_other_set = "EVAL_FOLDERS" in other_files or (self.labels is None and "LONG_FILES" in changed)
        self._check_best(is_other_set or self.best_name not in saved)
        return True

    def _check_same_task(self, path, saved, before, changed, other_files):
        """Raises UserError if a checkpoint's run had another conversion, other labels or other files."""
        from_here = f"from these weights, with PRE_WEIGHTS_PATH {path!r} and LOAD_FROM_PRE_CHECKPOINT True"
        new_run = f"To start a new run, give another WEIGHTS_PATH ({from_here})"
        mode, old_mode = self.settings["CONVERSION_MODE"], before.get("CONVERSION_MODE", self.settings["CONVERSION_MODE"])
        if (old_mode or "").lower() != (mode or "").lower():
            raise UserError(f"CONVERSION_MODE is {mode!r}, but the run at {path!r} trains with {old_mode!r}. {new_run}")
        if self.labels is not None and saved.get("labels") != self.labels:
            why = f" (LABELS was {changed['LABELS']!r})" if "LABELS" in changed else ""
            raise UserError(f"TRAIN_FOLDERS: the labels or their order differ from those of {path!r}{why}. {new_run}")
        if other_files and not self.settings["ALLOW_CHANGED_FILES"]:
            choices = {name: changed[name] for name in ("SEED", "EVAL_SPLIT", "LONG_FILES") if name in changed}
            why = "".join(f"; {name} was {value!r} and is now {self.settings[name]!r}" for name, value in choices.items())
            what = f"{', '.join(other_files)}: other files than in the run at {path!r}, by their names and sizes{why}"
            hint = "To resume on the changed files (the current epoch restarts), add --ALLOW_CHANGED_FILES True"
            raise UserError(f"{what}. {new_run}. {hint}")

    def _check_best(self, is_other_set):
        """Resets the best score if its checkpoint is missing or had another evaluation set."""
        for path in (self.best_path, self.latest_path):
            with contextlib.suppress(UserError, OSError):  # missing, damaged or unreadable
                if checkpoint.load_checkpoint(path, "WEIGHTS_PATH", mmap=True).get("run_id") == self.state.run_id:
                    self._own.add(path)
        has_best = self.best_path in self._own
        if (is_other_set or not has_best) and self.state.best_epoch:
            why = "scored on another evaluation set" if has_best else f"the best model of this run is not at {self.best_path}"
            print(f"best score reset: {why}")
            if has_best and self.ranks.rank == 0:
                system.print_backups([system.keep_backup(self.best_path)], why)
            self.state.best_epoch, self.state.best = 0, None

    def begin(self):
        """Creates the learning-rate schedule. Returns the model, wrapped in DDP if there are several ranks."""
        settings, ranks, state = self.settings, self.ranks, self.state
        views = ranks.gather((state.epoch, state.position, state.run_id, self.digests))
        if any(view != views[0] for view in views):
            ranks.leave("error: TRAIN_FOLDERS, EVAL_FOLDERS or WEIGHTS_PATH differ between processes: use a disk that all share")
        step_size = settings["BATCH_SIZE"] * ranks.count  # examples in a step of all ranks
        num_epochs = max(settings["NUM_EPOCHS"], state.epoch + 1)
        counts = [len(self.train)] * num_epochs
        if self.cuts_windows:  # the number of windows depends on their offsets
            seeds = [self.seeds(epoch) for epoch in range(num_epochs)]
            counts = windows.count_training_windows(self.train, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH, seeds)
        steps = [-(-count // step_size) for count in counts]
        # steps done, as if all epochs had had this BATCH_SIZE and these files
        done = sum(steps[: state.epoch]) + -(-state.position // step_size)
        num_steps = sum(steps[: settings["NUM_EPOCHS"]])
        self.scheduler = make_scheduler(self.optimizer, settings["LR_SCHEDULE"], settings["LEARNING_RATE"], num_steps, done)
        where = f"{self.dtype} on {ranks.count} x {ranks.device.type}"
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"{parameters:,} parameters, {where}, seed {settings['SEED']}, {steps[state.epoch]} steps an epoch")
        self._print_memory(parameters, counts[state.epoch])
        if settings["COMPILE"]:
            check_compiler(ranks.device)
            for decoder in self.model.children():
                if isinstance(decoder, utils.ByteModel):
                    decoder.compile_blocks()
        self.wandb = start_wandb(settings, state.run_id) if settings["WANDB_LOG"] and ranks.rank == 0 else None
        self._stop_signals = self._stack.enter_context(system.delayed_signals(impatient=ranks.count == 1))
        self._saved = state.epoch, state.position
        self._saved_at = self._shown_at = self._epoch_began = time.monotonic()
        self._steps_to_time = steps[state.epoch]  # of the epoch, 0 once the first step has been timed
        return ranks.wrap(self.model)

    def _print_memory(self, parameters, count):
        """Prints an estimate of a step's memory, and a warning if the device has less."""
        settings, sizes, device = self.settings, self.sizes, self.ranks.device
        sequences = min(settings["BATCH_SIZE"] // settings["ACCUMULATION_STEPS"], count)
        rows = sequences * min(int(self.train.lengths(sizes.PATCH_SIZE).max()), sizes.PATCH_LENGTH)  # patches of a micro-batch
        byte_rows = min(rows, settings["PATCH_SAMPLING_BATCH_SIZE"] or rows) * sizes.PATCH_SIZE
        layers = rows * sizes.PATCH_NUM_LAYERS + byte_rows * (sizes.BYTE_NUM_LAYERS or 0)
        # the factors are measured: at paper size the activations of 512 patches take 3.0 GB in float32
        fixed, activations = 16 * parameters, layers * sizes.HIDDEN_SIZE * (127 if self.dtype == torch.float32 else 85)
        needed, total = fixed + activations, total_memory(device)
        how = f"{fixed / 1e9:.2f} GB of it for weights, gradients and optimizer"
        print(f"training takes about {needed / 1e9:.2f} GB of memory for each process, {how}")
        is_shared = device.type == "cpu" and self.ranks.count > 1  # else LOCAL_WORLD_SIZE may be left over from a job system
        if needed * (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_shared else 1) > total:
            print(f"warning: this device has {total / 1e9:.1f} GB: raise ACCUMULATION_STEPS, or lower BATCH_SIZE or PATCH_LENGTH")

    # ---- steps -----------------------------------------------------------------------------------------------------

    def seeds(self, epoch):
        """Returns the seeds of an epoch's order and crops."""
        return [self.settings["SEED"], epoch + 1]

    def step_rng(self):
        """Returns a numpy Generator that depends on the step and rank."""
        return np.random.default_rng([*self.seeds(self.state.epoch), self.state.position, self.ranks.rank, zlib.crc32(b"step")])

    def training_steps(self):
        """Returns (data set, Steps) of the rest of the epoch, and seeds dropout."""
        size, length, seeds = self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH, self.seeds(self.state.epoch)
        make = windows.training_windows if self.cuts_windows else utils.ByteDataset
        dataset = make(self.train, size, length, seeds)
        if self._random_state is None or (self._random_state["cuda"] is None) != (self.ranks.device.type != "cuda"):
            torch.manual_seed(int(self.step_rng().integers(2**63)))
        else:
            torch.set_rng_state(self._random_state["cpu"])
            if self.ranks.device.type == "cuda":
                torch.cuda.set_rng_state(self._random_state["cuda"], self.ranks.device)
        self._random_state = None
        order = np.random.default_rng(seeds).permutation(len(dataset))[self.state.position :]
        return dataset, Steps(dataset, order, self.settings["BATCH_SIZE"], self.ranks)

    def evaluation_steps(self):
        """Returns (data set, Steps) of all evaluation examples, the shortest first."""
        make = windows.evaluation_windows if self.cuts_windows else utils.ByteDataset
        dataset = make(self.held_out, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        order = np.argsort(dataset.lengths(np.arange(len(dataset))), kind="stable")
        return dataset, Steps(dataset, order, self.settings["BATCH_SIZE"] // self.settings["ACCUMULATION_STEPS"], self.ranks)

    def progress(self, what, steps):
        """Returns the progress bar over some Steps."""
        total, desc = len(steps.dataset), f"epoch {self.state.epoch + 1} {what}"
        unit = "file" if total == len(steps.dataset.examples) else "window"
        more = {"disable": self.ranks.rank > 0, "leave": what == "train", **system.progress_options()}
        return tqdm(desc=desc, total=total, initial=total - len(steps.order), unit=unit, **more)

    def autocast(self):
        """Returns the context of the model's forward pass."""
        return autocast(self.ranks.device, self.dtype)

    def begin_step(self, count=0, fails=False):
        """Returns `count` summed over all ranks. Saves the state or ends the run if that is due.

        All ranks call it before each step. A rank that cannot read its batch sets `fails`, so that all ranks save the last
        finished step and end.
        """
        number, state = self._stop_signals.first, self.state
        # rank 0's clock decides, so that all save together
        is_due = self.ranks.rank == 0 and time.monotonic() - self._saved_at >= 60 * self.settings["SAVE_MINUTES"]
        count, stops, saves, broken, failed = self.ranks.sum([count, number > 0, is_due, self._is_broken, fails])
        if broken:
            self._leave_broken()
        if (stops or saves or failed) and self._saved != (state.epoch, state.position):
            self._save()
        if stops or failed:
            where = f"epoch {state.epoch + 1} after {state.position} examples"
            resumes = "the same command" + " with LOAD_FROM_CHECKPOINT True" * (not self.settings["LOAD_FROM_CHECKPOINT"])
            unsaved = "the latest state could not be saved" if self._own else "nothing was saved yet"
            rest = f"{resumes} resumes from there" if self._own and self._saved else unsaved
            if failed:
                hint = "; if a file is gone or has changed, with --ALLOW_CHANGED_FILES True"
                self.ranks.leave(f"ended by an error in {where}: {rest}{hint}")
            number = max(self.ranks.gather(number))
            self.ranks.leave(f"stopped by {system.signal_name(number)} in {where}: {rest}", 128 + number)
        return count

    def update_weights(self):
        """Clips the gradients, steps the optimizer and the schedule, and clears the gradients."""
        if self.settings["MAX_GRAD_NORM"]:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["MAX_GRAD_NORM"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings(action="ignore"):  # PyTorch warns about steps that fp16 skips
            self.scheduler.step()

    def end_step(self, bar, count):
        """Counts a training step of `count` examples."""
        self.state.position += count
        bar.update(count)
        if self._steps_to_time:
            self.totals.tolist()  # waits for the device
            seconds = time.monotonic() - self._epoch_began
            epoch = tqdm.format_interval(seconds * self._steps_to_time)
            tqdm.write(f"the first step took {seconds:.1f} s; at that rate an epoch takes {epoch}")
            self._steps_to_time = 0
        if time.monotonic() - self._shown_at >= 1:  # rarely, since reading the sums waits for the device
            self._shown_at = time.monotonic()
            self._is_broken = not all(map(math.isfinite, self.totals.tolist()))
            bar.set_postfix(self.totals.shown(), lr=f"{self.scheduler.get_last_lr()[-1]:.1e}", refresh=False)

    def _leave_broken(self):
        what = f"loss or weights became NaN or infinite in epoch {self.state.epoch + 1}"
        rest = "The last checkpoint is intact: resume from it" if self._own else "Nothing was saved yet: start again"
        self.ranks.leave(f"error: {what}. {rest} with a lower LEARNING_RATE, MAX_GRAD_NORM 1.0 or PRECISION fp32")

    # ---- end -------------------------------------------------------------------------------------------------------

    def end_epoch(self, figures, value, loss, report="", details=""):
        """Finishes an epoch: saves, logs and prints it.

        Args:
            figures: {name: number} to log, None = not logged.
            value, loss: bits per byte, or a classifier's accuracy, decides the best epoch. The loss decides ties.
            report, details: more lines for the log of the best epoch. `finish` prints the report.
        """
        state, figures = self.state, {name: figure for name, figure in figures.items() if figure is not None}
        if not all(map(math.isfinite, figures.values())):
            self._leave_broken()
        state.epoch, state.position, state.figures = state.epoch + 1, 0, figures
        self.totals.load([0.0] * len(self.totals.tolist()))
        sign = 1 if self.labels is None else -1  # fewer bits, or a higher accuracy
        is_best = state.best is None or (sign * value, loss) < (sign * state.best, state.best_loss)
        if is_best:
            before = dataclasses.replace(state)
            state.best_epoch, state.best, state.best_loss, state.report = state.epoch, value, loss, report
            if not self._save(best=True):
                self.state, is_best = before, False  # the best model on the disk is still the old one
        self._save()
        line = f"epoch {state.epoch}  " + "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        if self.ranks.rank == 0:
            try:
                with open(self.log_path, "a", encoding="utf-8", errors="backslashreplace") as log:
                    log.write(f"{line}\n{(report + details) * is_best}")
            except OSError as error:
                print(f"cannot write {self.log_path}: {error.strerror}; the run continues")
        print(f"{line}{'  best' * is_best}  {time.monotonic() - self._epoch_began:.0f} s")
        self._epoch_began = time.monotonic()
        if self.wandb:
            self.wandb.log({"epoch": state.epoch, **figures})

    def finish(self):
        """Prints the best epoch and closes the logger. Exits with status 1 if the latest state is not on the disk."""
        state = self.state
        if self.wandb:
            self.wandb.finish()
        print(f"finished {state.epoch} of NUM_EPOCHS {self.settings['NUM_EPOCHS']} (raise NUM_EPOCHS to continue)")
        if state.best_epoch:
            best = f"best: epoch {state.best_epoch}, {self.best_name} {state.best:.4f}, in {self.best_path}"
            print(f"{best}\n{state.report}", end="")
        if not self._saved:
            self.ranks.leave(f"error: {self.latest_path!r} could not be saved: free disk space and run the same command")

    def _save(self, best=False):
        """Saves the latest state or the best model. Returns whether that succeeded. Ends the run if a weight is not finite."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self._leave_broken()
        device, state = self.ranks.device, self.state
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        random_state = {"cpu": torch.get_rng_state(), "cuda": cuda}
        totals, random_states = zip(*self.ranks.gather((self.totals.tolist(), random_state)))
        is_saved = self.ranks.rank > 0
        if self.ranks.rank == 0:
            fields = dataclasses.asdict(state)
            best_value = fields.pop("best")
            worst = math.inf if self.labels is None else -math.inf
            is_saved = self._write(self.best_path if best else self.latest_path, {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_sched": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                self.best_name: worst if best_value is None else best_value,
                **fields,
                **({"min_eval_loss": math.inf if best_value is None else state.best_loss} if self.labels is None else {}),
                **({} if self.labels is None else {"labels": self.labels, "label_mode": self.settings["LABELS"]}),
                **({"extensions": self.extensions} if len(self.extensions) <= MOST_EXTENSIONS else {}),
                **({"file_hashes": self.file_hashes} if len(self.file_hashes) <= MOST_FILES else {}),
                "totals": list(totals),
                "random_states": list(random_states),
                "data": self.digests,
                "config": self.settings,
            })  # fmt: skip
        is_saved = self.ranks.sum([is_saved])[0] == self.ranks.count
        if not best:
            self._saved, self._saved_at = is_saved and (state.epoch, state.position), time.monotonic()
        return is_saved

    def _write(self, path, contents):
        """Writes a checkpoint. Backs up another run's file. Returns whether that succeeded."""
        try:
            if path not in self._own:
                system.print_backups([system.keep_backup(path)])
                self._own.add(path)
            checkpoint.save_checkpoint(path, contents)
        except OSError as error:
            print(f"cannot save {path}: {error.strerror}; the old file is unchanged, and the run continues")
            return False
        return True


def cuts_windows(settings):
    """Returns whether files longer than PATCH_LENGTH are cut into windows. Pairs always fit."""
    return settings["LONG_FILES"] == "windows" and settings["CONVERSION_MODE"] is None
