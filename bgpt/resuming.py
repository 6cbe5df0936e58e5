"""Going on with a run: its state, and how the run that wrote a checkpoint differs from the one that goes on."""

import dataclasses
import math

import numpy as np

from bgpt import checkpoint
from bgpt import system

ORDER = "permutation"  # how the order of an epoch is drawn, for checkpoints


@dataclasses.dataclass
class State:
    """How far a run is: plain data, the same in all processes but for `totals`. checkpoint.py says where it is kept."""

    totals: dict  # running sums of the epoch in hand, of this process
    run_id: str = ""  # drawn by `Run.__enter__`; that of the checkpoint, where the run goes on from one
    epoch: int = 0  # finished epochs
    position: int = 0  # examples that the epoch in hand has trained on, in all processes together
    best_epoch: int = 0  # 0 = there is none yet
    best: float | None = None  # the figure that decides, in the best epoch
    best_loss: float = -math.inf  # its eval loss, the lower of which decides between equal figures; -inf = unknown, never beaten
    report: str = ""  # what there is to say of the best epoch beside its figures
    figures: dict = dataclasses.field(default_factory=dict)  # of the last finished epoch
    log_text: str = ""  # what the last finished epoch logged
    log_start: int = 0  # where that begins in the log, in bytes

    def to_checkpoint(self):
        """Returns the part of a checkpoint that all processes share; the caller adds `best` under its published name."""
        names = ("epoch", "position", "best_epoch", "best_loss", "report", "figures", "log_text", "log_start", "run_id")
        return {name: getattr(self, name) for name in names}

    def take_over(self, found, best_name):
        """Takes over the state in a checkpoint, but for its place within an epoch; raises one of many errors if it is none.

        Args:
            found: the checkpoint.
            best_name: its key of `best`.
        """
        numbers = {name: found[name] for name in ("epoch", "best_epoch")}
        numbers["log_start"] = found.get("log_start", 0)
        if any(type(value) is not int or not 0 <= value < 2**63 for value in numbers.values()):
            raise TypeError(f"these should be whole numbers: {numbers}")
        if not isinstance(found[best_name], (int, float)) or math.isnan(found[best_name]):
            raise TypeError(f"{best_name} is no number")
        self.epoch, self.best_epoch, self.log_start = numbers.values()
        self.best = float(found[best_name]) if self.best_epoch else None
        self.best_loss = float(found.get("best_loss", -math.inf))  # files from before have none
        self.run_id = str(found.get("run_id") or self.run_id)  # published checkpoints have none
        self.figures, self.report = dict(found.get("figures", {})), str(found.get("report", ""))
        self.log_text = str(found.get("log_text", ""))


def how_to_start_anew(path):
    """Returns how to start a new run from the weights of a run that cannot go on, as a clause for messages."""
    return (
        f"to start a new run from its weights, set WEIGHTS_PATH to another path, PRE_WEIGHTS_PATH to {path!r} and "
        "LOAD_FROM_PRE_CHECKPOINT to True"
    )


class EarlierRun:
    """The run that wrote a checkpoint, compared with the one that goes on from it.

    Whatever is called may raise KeyError, TypeError or another error of that kind where the checkpoint holds no such run.

    Args:
        found: the checkpoint, a dict.
        path: its file.
        settings: the constants of config.py that bear on training, as a dict.
        labels: a classifier's {label: index}; None for a generative model.
        fingerprints: the Fingerprints of the files.
        cuts_windows: whether files longer than PATCH_LENGTH are cut into windows.

    Attributes:
        found: the checkpoint.
        config: its run's constants, a dict; empty in a published one.
        differences: {constant: what differs} for the files that are not those of its run.
    """

    def __init__(self, found, path, settings, labels, fingerprints, cuts_windows):
        self.found, self.path, self.settings, self.labels = found, path, settings, labels
        self.fingerprints, self.cuts_windows = fingerprints, cuts_windows
        self.train, self.held_out = (fingerprints.examples[name] for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"))
        self.config = dict(found.get("config") or {})
        if not all(isinstance(value, (str, int, float, list, type(None))) for value in self.config.values()):
            raise TypeError("its config holds other than plain values")
        self.differences = self._compare_files()

    def check_fits(self):
        """Raises UserError if that run had other labels or another CONVERSION_MODE."""
        mode = self.settings["CONVERSION_MODE"]
        mode_before = self.config.get("CONVERSION_MODE", mode)
        if (mode_before or "").lower() != (mode or "").lower():
            raise system.UserError(
                f"CONVERSION_MODE is {mode!r}, but the run at {self.path!r} trains with {mode_before!r}: set that, or, "
                + how_to_start_anew(self.path)
            )
        if self.labels is not None and self.found.get("labels") != self.labels:
            before, now = checkpoint.label_mode(self.found), self.settings["LABELS"]
            why = "" if before == now else f" (LABELS was {before!r} and is now {now!r})"
            raise system.UserError(
                f"TRAIN_FOLDERS: the labels or their order are not those of {self.path!r}{why}; {how_to_start_anew(self.path)}"
            )

    def check_files(self):
        """Raises UserError if files differ and ALLOW_CHANGED_FILES is False; warns of those that are held out only now."""
        if not self.differences:
            return
        if not self.settings["ALLOW_CHANGED_FILES"]:
            as_before = " ".join(f"--{name} {value}" for name, value in self._changed_choices().items())
            raise system.UserError(
                "\n".join(self.differences.values()) + ".\n" + (f"With {as_before} the run goes on as before. " if as_before else "")
                + "To go on with the files as they are, the epoch in hand anew, add --ALLOW_CHANGED_FILES True; "
                + how_to_start_anew(self.path)
            )  # fmt: skip
        if self.held_out.files is self.train.files:
            self._warn_of_leaks()

    def took_other_parts(self, examples):
        """Returns whether that run took crops of some Examples, long files, of which windows are taken now, or the reverse."""
        took_windows = self.config.get("LONG_FILES") == "windows" and self.labels is None
        lengths = examples.lengths(self.settings["PATCH_SIZE"])
        return took_windows != self.cuts_windows and (lengths > self.settings["PATCH_LENGTH"]).any()

    def why_epoch_restarts(self):
        """Returns why the epoch in hand cannot go on where it was, as a clause for messages; None if it can."""
        if self.found.get("order") != ORDER:
            return "the checkpoint is from a version that drew the order of an epoch in another way"
        if isinstance(self.found.get("data", {}).get("TRAIN_FOLDERS"), str) and (np.diff(self.train.files.places) < 0).any():
            return "the checkpoint is from a version that took the files of several folders in another order"
        if self.config["SEED"] != self.settings["SEED"]:
            return "SEED has changed, and with it the order of an epoch"
        if self.took_other_parts(self.train):
            return "LONG_FILES has changed"
        return None

    def print_changes(self, epoch):
        """Prints which constants are not what they were, and which files; `epoch` is the number of the epoch in hand."""
        for name, value in self.settings.items():
            if name in self.config and self.config[name] != value:
                note = ": the schedule is laid anew" if name == "NUM_EPOCHS" else ""
                print(f"{name} was {self.config[name]!r} and is now {value!r}{note}")
        for difference in self.differences.values():
            print(f"{difference}: epoch {epoch} begins anew with the files as they are")

    def _compare_files(self):
        """Returns `differences`."""
        choices = self._changed_choices().items()
        why = "".join(f"; {name} was {value!r} and is now {self.settings[name]!r}" for name, value in choices)
        return {
            name: f"{name}: the files are not those that the run at {self.path!r} had, by their paths below the folder and their "
            f"sizes{difference}{why}"
            for name, difference in self.fingerprints.differences(self.found).items()
        }

    def _changed_choices(self):
        """Returns {constant: what it was} for those that decide which files are taken, and have changed."""
        before = {"LONG_FILES": "crop", **self.config}  # what older versions and the published code do
        constants = ("SEED", "EVAL_SPLIT", *(["LONG_FILES"] if self.labels is None else []))
        return {name: before[name] for name in constants if before.get(name, self.settings[name]) != self.settings[name]}

    def _warn_of_leaks(self):
        """Prints how many of the examples that EVAL_SPLIT holds out now the run has trained on."""
        what, num_seen = "warning: EVAL_SPLIT holds out other files now; ", self.fingerprints.count_leaks(self.found)
        if num_seen is None:
            print(f"{what}an older checkpoint does not tell which of them the run has trained on")
        elif num_seen:
            print(
                f"{what}the run has trained on {num_seen} of these {len(self.held_out)}, so their figures look better than they are. "
                "A folder in EVAL_FOLDERS stays apart"
            )
