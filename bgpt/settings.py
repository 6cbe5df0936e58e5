"""The constants of config.py: their types, legal values, and the command line that overrides them. No PyTorch here."""

import argparse
import difflib
import math
import os
import re

from bgpt.system import UserError, check_checkpoint, check_folders, torchrun_rank

# fmt: off
_TYPES = {
    list: "TRAIN_FOLDERS EVAL_FOLDERS",
    str: "PRE_WEIGHTS_PATH WEIGHTS_PATH LOGS_PATH OPTIMIZER LR_SCHEDULE EMBEDDING_START PRECISION LONG_FILES CONVERSION_MODE "
         "LABELS INFERENCE_WEIGHTS_PATH INPUT_EXT TARGET_EXT INPUT_FOLDER OUTPUT_FOLDER MODE",
    int: "PATCH_SIZE PATCH_LENGTH BYTE_NUM_LAYERS PATCH_NUM_LAYERS HIDDEN_SIZE NUM_EPOCHS BATCH_SIZE ACCUMULATION_STEPS "
         "PATCH_SAMPLING_BATCH_SIZE NUM_WORKERS SEED NUM_SAMPLES PROMPT_BYTES NUM_CANDIDATES INFERENCE_BATCH_SIZE TOP_K",
    float: "EVAL_SPLIT LEARNING_RATE SAVE_MINUTES MAX_GRAD_NORM DROPOUT TOP_P TEMPERATURE",
    bool: "COMPILE LOAD_FROM_CHECKPOINT ALLOW_CHANGED_FILES LOAD_FROM_PRE_CHECKPOINT WANDB_LOG VERIFY",
}
CONSTANTS = {name: kind for kind, names in _TYPES.items() for name in names.split()}
_INFERENCE = set("INFERENCE_WEIGHTS_PATH INPUT_EXT TARGET_EXT INPUT_FOLDER OUTPUT_FOLDER MODE NUM_SAMPLES PROMPT_BYTES "
                 "NUM_CANDIDATES INFERENCE_BATCH_SIZE VERIFY TOP_K TOP_P TEMPERATURE".split())  # only inference.py reads these
_OPTIONAL = {"CONVERSION_MODE", "INPUT_EXT", "TARGET_EXT"}  # may be None
_KINDS = {list: "a list of texts", str: "text", int: "a whole number", float: "a number", bool: "True or False"}

_AT_LEAST = {
    3: "PATCH_LENGTH",
    1: "PATCH_SIZE BYTE_NUM_LAYERS PATCH_NUM_LAYERS NUM_EPOCHS BATCH_SIZE ACCUMULATION_STEPS NUM_SAMPLES NUM_CANDIDATES "
       "INFERENCE_BATCH_SIZE",
    0: "PATCH_SAMPLING_BATCH_SIZE SAVE_MINUTES MAX_GRAD_NORM NUM_WORKERS PROMPT_BYTES TEMPERATURE",
}
_ONE_OF = {
    "OPTIMIZER": "muon adamw",
    "LR_SCHEDULE": "cosine constant",
    "EMBEDDING_START": "published smooth bits",
    "PRECISION": "auto fp32 bf16 fp16",
    "LONG_FILES": "windows crop",
    "LABELS": "name prefix folder path",
    "MODE": "generate convert complete classify evaluate compress decompress",
}
# fmt: on
_MODE = r"(?i)([^.&>/\\\s-]+)(->|&)(?!\1$)[^.&>/\\\s-]+"
_RULES = {  # {constant: (test of a value, legal values in words)}
    **{name: ((lambda v, low=low: v >= low), f"{low} or more") for low, names in _AT_LEAST.items() for name in names.split()},
    **{name: ((lambda v, w=words: v in w.split()), "one of " + words.replace(" ", ", ")) for name, words in _ONE_OF.items()},
    **{name: (bool, "a path") for name in CONSTANTS if name.endswith(("_PATH", "_FOLDER"))},
    **dict.fromkeys(("INPUT_EXT", "TARGET_EXT"), ((lambda v: not re.search(r"[./\\\0]", v)), "without dots or slashes")),
    "WEIGHTS_PATH": ((lambda v: v and not v.endswith(".safetensors")), "a path for a .pth file (.safetensors are only read)"),
    "TRAIN_FOLDERS": ((lambda v: v and all(v)), "one folder or more"),
    "EVAL_FOLDERS": (all, "folders, or []"),
    "EVAL_SPLIT": ((lambda v: 0 < v < 1), "between 0 and 1"),
    "HIDDEN_SIZE": ((lambda v: v >= 64 and v % 64 == 0), "a multiple of 64"),
    "LEARNING_RATE": ((lambda v: v > 0), "above 0"),
    "DROPOUT": ((lambda v: 0 <= v < 1), "from 0 to below 1"),
    "SEED": ((lambda v: 0 <= v < 2**63), "from 0 to 2**63 - 1"),
    "CONVERSION_MODE": ((lambda v: re.fullmatch(_MODE, v)), 'None, or two extensions in quotes: "abc->mid", or both ways "abc&mid"'),
    "TOP_K": ((lambda v: 0 <= v <= 257), "from 0 (all) to 257"),
    "TOP_P": ((lambda v: 0 < v <= 1), "above 0 and at most 1"),
}

# {constant of the published code's later config: its name here}
PUBLISHED_NAMES = {
    "PRETRAINED_PATH": "PRE_WEIGHTS_PATH",
    "LOAD_FROM_PRETRAINED": "LOAD_FROM_PRE_CHECKPOINT",
    "INFERENCE_MODE": "MODE",
    "DETERMINISTIC": "SEED, which makes every run reproducible",
    "SHOW_WARNS": "gone, since warnings are always shown",
}

_overridden = {}  # {constant: its value in config.py}, for the next script of a notebook


def as_dict(config, training_only=False):
    """Returns {constant: current value} of the module config. With `training_only`, omits inference.py's."""
    return {name: getattr(config, name) for name in CONSTANTS if not (training_only and name in _INFERENCE)}


def check_value(name, value):
    """Raises UserError if `value` is illegal for the constant `name`."""
    kind, is_optional = CONSTANTS[name], name in _OPTIONAL
    if value is None and is_optional:
        return
    if not _has_type(value, kind):
        raise UserError(f"{name} is {value!r}, but must be {_KINDS[kind]}" + " or None" * is_optional)
    if name in _RULES and not _RULES[name][0](value):
        raise UserError(f"{name} is {value!r}, but must be {_RULES[name][1]}")


def override(config, argv=None):
    """Checks config.py and overrides its constants from a command line. Prints every change.

    `config` is the module, `argv` for example ["--BATCH_SIZE", "4"]. None = this process's command line. None, True and False
    are parsed. An option without values is an empty list. An unknown option or an illegal value, also one in config.py, raises
    SystemExit with status 2 after one line on stderr.
    """
    vars(config).update(_overridden)
    _overridden.clear()
    text = "Settings are the constants of config.py; each can be overridden here for one run."
    parser = argparse.ArgumentParser(usage="%(prog)s [--NAME VALUE ...]", description=text, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    comments = _comments(config.__file__)
    for name, kind in CONSTANTS.items():
        text = f"{comments.get(name, '')} Now: {getattr(config, name, 'missing')!r}".replace("%", "%%")
        count = "*" if kind is list else None
        parser.add_argument(f"--{name}", nargs=count, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        hint = _hint(option.lstrip("-").upper(), "--") or "; --help lists them all"
        parser.error(f"{'unknown option' if option.startswith('-') else 'unexpected'} {option}{hint}")
    for name in [*vars(config), *CONSTANTS]:
        if name.isupper() and name not in CONSTANTS and (hint := _hint(name)):
            parser.error(f"config.py: unknown constant {name}{hint}")
        if name in CONSTANTS and not hasattr(config, name):
            parser.error(f"config.py: {name} is missing")
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in as_dict(config).items()}
    for name, words in vars(given).items():
        try:
            values[name] = _parse(words, CONSTANTS[name], name in _OPTIONAL)
        except (ValueError, KeyError):
            parser.error(f"{name} is {words!r}, but must be {_KINDS[CONSTANTS[name]]}")
    try:
        for name, value in values.items():
            check_value(name, value)
    except UserError as error:
        parser.error(str(error))
    if values["BATCH_SIZE"] % (parts := values["ACCUMULATION_STEPS"]):
        parser.error(f"BATCH_SIZE is {values['BATCH_SIZE']}, but must be a multiple of ACCUMULATION_STEPS, {parts}")
    for name, value in values.items():
        before = getattr(config, name)
        if value != before:
            if torchrun_rank()[0] == 0 and name in vars(given):
                print(f"{name} = {value!r} (config.py: {before!r})")
            _overridden[name] = before
            setattr(config, name, value)


def latest_path(weights_path):
    """Returns the path of a run's latest state, weights-last.pth for weights.pth."""
    return "-last".join(os.path.splitext(weights_path))


def check_training_paths(values):
    """Raises UserError if a folder or initial checkpoint of a run is missing. `values` are from `as_dict`."""
    for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"):
        check_folders(values[name], name)
    own = values["WEIGHTS_PATH"], latest_path(values["WEIGHTS_PATH"])
    resumes = values["LOAD_FROM_CHECKPOINT"] and any(map(os.path.exists, own))
    if values["LOAD_FROM_PRE_CHECKPOINT"] and not resumes:
        check_checkpoint(values["PRE_WEIGHTS_PATH"], "PRE_WEIGHTS_PATH")


def _hint(name, dashes=""):
    """Returns the constant that an unknown name may mean, as the end of a message."""
    if name in PUBLISHED_NAMES:
        return f"; here it is {dashes * (PUBLISHED_NAMES[name] in CONSTANTS)}{PUBLISHED_NAMES[name]}"
    near = difflib.get_close_matches(name, CONSTANTS, n=1, cutoff=0.8)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _has_type(value, kind):
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _parse(words, kind, is_optional):
    """Returns the value of an option's words, or raises ValueError or KeyError."""
    if kind is list:
        return [] if words == ["None"] else words
    if words == "None" and is_optional:
        return None
    if words == "None":
        raise ValueError
    return {"true": True, "false": False}[words.lower()] if kind is bool else kind(words)


def _comments(path):
    """Returns {constant: the comment above it} in config.py."""
    with open(path, encoding="utf-8") as file:
        matches = re.findall(r"^((?:# .*\n)+)([A-Z_]+) *(?::[^=\n]*)?=", file.read(), flags=re.MULTILINE)
    return {name: " ".join(line.removeprefix("# ") for line in comment.splitlines()) for comment, name in matches}
