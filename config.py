"""Every setting of bGPT. Edit the values here, or override them for one run: `python train-gen.py --BATCH_SIZE 4`.

Each constant has a type, a default, and one comment: meaning, unit, legal values. The scripts `import config`, read
`config.NAME`, and call `config.override()` when they are run as programs.
"""

import argparse
import difflib
import math
import re
import sys
import typing

from bgpt import system

# ---------------------------------------------------------------------------------------------------------------------
# Paths and data
# ---------------------------------------------------------------------------------------------------------------------

# Folders of training files, searched recursively; hidden files are left out. One path or more.
TRAIN_FOLDERS: list[str] = ["cpu_states/train"]
# Folders of evaluation files. With none, or none in them, EVAL_SPLIT of the training files are held out instead.
EVAL_FOLDERS: list[str] = ["cpu_states/test"]
# Share of the training files held out when EVAL_FOLDERS holds none: whole files, at least one; of one large file beside
# others, or alone, its end (see LONG_FILES). Between 0 and 1, exclusive.
EVAL_SPLIT: float = 0.01
# Pre-trained checkpoint to start from when LOAD_FROM_PRE_CHECKPOINT is True. A .pth file.
PRE_WEIGHTS_PATH: str = "weights-pre.pth"
# Where training keeps its best checkpoint; the latest one lies beside it (weights.pth -> weights-last.pth).
WEIGHTS_PATH: str = "weights.pth"
# Text file that gets one line per epoch.
LOGS_PATH: str = "logs.txt"

# ---------------------------------------------------------------------------------------------------------------------
# Model and training
# ---------------------------------------------------------------------------------------------------------------------

# Symbols in a patch. 1 or more; 16 in the paper.
PATCH_SIZE: int = 16
# Most patches in a sequence, extension patch and end patch included. 3 or more; 512 in the paper, so 8 KB.
PATCH_LENGTH: int = 512
# Layers of the byte-level decoder. 1 or more; 3 in the paper.
BYTE_NUM_LAYERS: int = 3
# Layers of the patch-level decoder. 1 or more; 12 in the paper.
PATCH_NUM_LAYERS: int = 12
# Width of both decoders. A multiple of 64, one attention head for each 64; 768 in the paper.
HIDDEN_SIZE: int = 768

# Passes over the training files. 1 or more.
NUM_EPOCHS: int = 32
# Learning rate of AdamW at its peak. Above 0.
LEARNING_RATE: float = 1e-4
# Learning rate after a linear warm-up over the first tenth of all steps. "cosine" (to 0) or "constant".
LR_SCHEDULE: str = "cosine"
# Sequences per process and optimizer step. 1 or more, a multiple of ACCUMULATION_STEPS.
BATCH_SIZE: int = 16
# Micro-batches that a batch is split into, to save memory; the gradient stays the same. 1 or more.
ACCUMULATION_STEPS: int = 1
# Minutes between saves of the latest state within an epoch; each epoch's end saves too. 0 or more, 0 = after every step.
SAVE_MINUTES: float = 10
# Most target patches per micro-batch that go through the byte-level decoder in training, drawn at random. 0 = all.
PATCH_SAMPLING_BATCH_SIZE: int = 0
# How the patch embedding starts and learns. "published" (normally distributed, like all else), or "smooth" (close byte values
# have close vectors, which learn at a tenth of LEARNING_RATE: where bytes are amounts, as in images and sounds). With
# pre-trained weights only the rate applies.
EMBEDDING_START: str = "published"
# Gradients are scaled down to this norm when theirs is larger. 0 = off.
MAX_GRAD_NORM: float = 1.0
# Dropout in training: embeddings, attention, residual branches. From 0 to below 1.
DROPOUT: float = 0.1
# Number format. "auto" (bf16 where the device has it in hardware, else fp32), "fp32", "bf16" or "fp16" (CUDA only).
PRECISION: str = "auto"
# Compile the model for this device before training (torch.compile; needs a C++ compiler on CPUs). True or False.
COMPILE: bool = False
# What train-gen.py sees of a file longer than PATCH_LENGTH: "windows" (in an epoch all of it, in windows that begin elsewhere
# in each; evaluation covers it whole, and EVAL_SPLIT may hold out its end) or "crop" (published: in an epoch one crop, drawn
# from its head, body or tail; evaluation covers its head). train-cls.py always takes crops.
LONG_FILES: str = "windows"
# Processes that read training files beside the main one. 0 = the main process reads.
NUM_WORKERS: int = 0
# Decides every random number of a run. From 0 to 2**63 - 1.
SEED: int = 0
# Go on from this run's own checkpoint, if there is one. True or False.
LOAD_FROM_CHECKPOINT: bool = True
# Go on from it also when files were added, are gone or have another size; the epoch in hand then begins anew. True or False.
ALLOW_CHANGED_FILES: bool = False
# Start a new run from PRE_WEIGHTS_PATH. True or False.
LOAD_FROM_PRE_CHECKPOINT: bool = False
# Train on pairs of files, or score them in MODE "evaluate": "abc->mid" one direction, "abc&mid" both; upper or lower case
# is all one. None = plain files.
CONVERSION_MODE: str | None = None
# The label of a file, to classify: "name" (its name up to the first "_", and its extension: Business_1.txt is Business.txt),
# "prefix" (up to the last "_", and its extension) or "folder" (the folder that it lies in: Business/1.txt is Business).
LABELS: str = "name"
# Log to Weights & Biases. True or False; WANDB_MODE=offline in the environment keeps it on this machine.
WANDB_LOG: bool = False

# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------

# Checkpoint that inference.py runs. The model's sizes are read from it.
INFERENCE_WEIGHTS_PATH: str = "weights.pth"
# Extension, without the dot, of the input files, in any case: needed to convert; in the other modes, None = every one.
INPUT_EXT: str | None = None
# Extension, without the dot, of the files to generate or to convert to. "" = files without one.
TARGET_EXT: str = "bin"
# Folder of the files to convert, complete, classify or evaluate, searched recursively.
INPUT_FOLDER: str = "input"
# Folder that gets the results; made if it is missing.
OUTPUT_FOLDER: str = "output"
# "generate" (files from nothing), "convert" (INPUT_EXT to TARGET_EXT), "complete" (the rest of each file), "classify",
# "evaluate" (how well the model predicts each file; in a CONVERSION_MODE, the second file of each pair from the first),
# "compress" (each file to a .bgpt file) or "decompress" (those back).
MODE: str = "generate"
# Files to generate. 1 or more.
NUM_SAMPLES: int = 100
# Bytes of each input file that are given in MODE "complete"; the model writes the rest. 0 = all of them.
PROMPT_BYTES: int = 0
# Continuations drawn of each input file in MODE "convert" or "complete"; the likeliest per symbol is kept. 1 or more.
NUM_CANDIDATES: int = 1
# Sequences generated, scored or coded at once. 1 or more; memory grows with it.
INFERENCE_BATCH_SIZE: int = 32
# In MODE "compress", decode each file before it is written, and write none that does not come back. True or False.
VERIFY: bool = True
# Sample among the TOP_K most likely symbols. 0 = all, at most 257.
TOP_K: int = 0
# Sample among the fewest symbols whose total probability exceeds this. Above 0, at most 1 = all.
TOP_P: float = 1.0
# Below 1 sharpens the distribution, above 1 flattens it, 0 = always the most likely symbol. 0 or more.
TEMPERATURE: float = 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Checks and the command line
# ---------------------------------------------------------------------------------------------------------------------

_overridden = {}  # {constant: its value before the command line changed it}

_MODES = ("generate", "convert", "complete", "classify", "evaluate", "compress", "decompress")
_SCHEDULES = ("cosine", "constant")
_STARTS = ("published", "smooth")
_LONG_FILES = ("windows", "crop")
_LABELS = ("name", "prefix", "folder")
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_AT_LEAST = {
    1: "PATCH_SIZE BYTE_NUM_LAYERS PATCH_NUM_LAYERS NUM_EPOCHS BATCH_SIZE ACCUMULATION_STEPS NUM_SAMPLES "
       "NUM_CANDIDATES INFERENCE_BATCH_SIZE",
    0: "PATCH_SAMPLING_BATCH_SIZE SAVE_MINUTES MAX_GRAD_NORM NUM_WORKERS PROMPT_BYTES TEMPERATURE",
}  # fmt: skip


def _one_of(words):
    return (lambda v: v in words), "one of " + ", ".join(words)


def _legal_values():
    """Returns {constant: (test of a value, what a legal value is)} for constants whose type alone allows too much."""
    legal = {
        name: ((lambda v, low=low: v >= low), f"{low} or more") for low, names in _AT_LEAST.items() for name in names.split()
    }
    for name in ("PRE_WEIGHTS_PATH", "WEIGHTS_PATH", "LOGS_PATH", "INFERENCE_WEIGHTS_PATH", "INPUT_FOLDER", "OUTPUT_FOLDER"):
        legal[name] = (lambda v: v != "", "a path")
    for name in ("INPUT_EXT", "TARGET_EXT"):
        legal[name] = (lambda v: v is None or not re.search(r"[./\\\0]", v), "an extension without dots or slashes, such as mid")
    legal |= {
        "TRAIN_FOLDERS": (lambda v: v and all(v), "one folder or more"),
        "EVAL_FOLDERS": (all, "folders, or none at all"),
        "EVAL_SPLIT": (lambda v: 0 < v < 1, "between 0 and 1"),
        "PATCH_LENGTH": (lambda v: v >= 3, "3 or more"),
        "HIDDEN_SIZE": (lambda v: v >= 64 and v % 64 == 0, "a multiple of 64"),
        "LEARNING_RATE": (lambda v: v > 0, "above 0"),
        "LR_SCHEDULE": _one_of(_SCHEDULES),
        "DROPOUT": (lambda v: 0 <= v < 1, "from 0 to below 1"),
        "EMBEDDING_START": _one_of(_STARTS),
        "PRECISION": _one_of(_PRECISIONS),
        "CONVERSION_MODE": (
            lambda v: v is None or re.fullmatch(r"(?i)([^.&>/\\\s-]+)(->|&)(?!\1$)[^.&>/\\\s-]+", v) is not None,
            'None, or two different extensions such as "abc->mid" (one direction) or "abc&mid" (both)',
        ),
        "LABELS": _one_of(_LABELS),
        "LONG_FILES": _one_of(_LONG_FILES),
        "MODE": _one_of(_MODES),
        "SEED": (lambda v: 0 <= v < 2**63, "from 0 to 2**63 - 1"),
        "TOP_K": (lambda v: 0 <= v <= 257, "from 0 (all) to 257"),
        "TOP_P": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    }
    return legal


def _types():
    """Returns {constant: its declared type}, in the order of this file."""
    return {name: kind for name, kind in typing.get_type_hints(sys.modules[__name__]).items() if name.isupper()}


def _type_words(kind):
    """Returns what a value of `kind` is called in a message."""
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", list[str]: "a list of texts"}
    return words.get(kind) or f"{words[typing.get_args(kind)[0]]} or None"


def _has_type(value, kind):
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) in (typing.get_args(kind) or (kind,))


def _parse(word, kind):
    """Reads one word of the command line as a value of type `kind`. Raises ValueError or KeyError if it is none."""
    if type(None) in typing.get_args(kind):
        return None if word == "None" else _parse(word, typing.get_args(kind)[0])
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    if word == "None":
        raise ValueError("None is for optional constants")
    return kind(word)


def check(values):
    """Checks a dict of all constants.

    Raises:
        ValueError: names the first constant whose type or value is not legal, what it is, and what it may be.
    """
    legal = _legal_values()
    for name, kind in _types().items():
        value = values[name]
        if not _has_type(value, kind):
            raise ValueError(f"{name} is {value!r}, but must be {_type_words(kind)}")
        if name in legal and not legal[name][0](value):
            raise ValueError(f"{name} is {value!r}, but must be {legal[name][1]}")
    if values["BATCH_SIZE"] % values["ACCUMULATION_STEPS"]:
        raise ValueError(
            f"BATCH_SIZE is {values['BATCH_SIZE']}, but must be a multiple of ACCUMULATION_STEPS, {values['ACCUMULATION_STEPS']}"
        )


def as_dict(training_only=False):
    """Returns {constant: current value}, in the order of this file; all values are plain types.

    Args:
        training_only: leave out the last group, those that only inference.py reads.
    """
    names = list(_types())
    return {name: globals()[name] for name in names[: names.index("INFERENCE_WEIGHTS_PATH") if training_only else None]}


def _comments():
    """Returns {constant: its comment} as they stand in this file, for --help."""
    with open(__file__, encoding="utf-8") as file:
        found = re.findall(r"^((?:# .*\n)+)([A-Z_]+): ", file.read(), flags=re.MULTILINE)
    return {name: " ".join(line.removeprefix("# ") for line in comment.splitlines()) for comment, name in found}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if system.is_first_process() else None)


def _make_parser():
    comments = _comments()
    parser = _Parser(
        usage="%(prog)s [--NAME VALUE ...]",
        description="Settings are the constants of config.py; each can be overridden here for one run.",
        allow_abbrev=False,
    )
    for name, kind in _types().items():
        parser.add_argument(  # the words are read by _parse, so that a wrong one is reported with the constant's name
            f"--{name}",
            nargs="*" if kind == list[str] else None,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{comments.get(name, '')} Now: {globals()[name]!r}".replace("%", "%%"),
        )
    return parser


def override(argv=None):
    """Sets constants from a command line such as `["--BATCH_SIZE", "4", "--TRAIN_FOLDERS", "a", "b"]`, and checks all.

    None is that of this process.

    Words: None, True and False are understood, and a whole number where a number may stand. `--EVAL_FOLDERS` with no
    value is an empty list. Every constant that changed is printed with its value in this file. `--help` lists them all.

    Raises:
        SystemExit: status 2 and one line on stderr, for an unknown option, a wrong type or an illegal value, here or
            in this file; status 0 after --help.
    """
    globals().update(_overridden)  # what an earlier script of the same notebook was given is not meant for this one
    _overridden.clear()
    types = _types()
    parser = _make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        near = difflib.get_close_matches(option.lstrip("-").upper(), types, n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; --help lists them all"
        parser.error(f"unknown option {option}{hint}" if option.startswith("-") else f"unexpected {option!r}{hint}")
    values = as_dict()
    for name, words in vars(given).items():
        kind = types[name]
        try:
            values[name] = ([] if words == ["None"] else words) if kind == list[str] else _parse(words, kind)
        except (ValueError, KeyError):
            parser.error(f"{name} is {words!r}, but must be {_type_words(kind)}")
    try:
        check(values)
    except ValueError as error:
        parser.error(str(error))
    for name, value in values.items():
        if value != globals()[name]:
            if system.is_first_process():
                print(f"{name} = {value!r} (config.py: {globals()[name]!r})")
            _overridden[name] = globals()[name]
            globals()[name] = value
