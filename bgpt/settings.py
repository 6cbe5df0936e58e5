"""The constants of config.py: their types, legal values, and the command line that overrides them. No PyTorch here."""

import argparse
import difflib
import math
import os
import re

from bgpt.system import UserError, check_checkpoint, check_folders, torchrun_rank

_ANY = (lambda v: True), ""
_PATH = (lambda v: v != ""), "a path"
_EXTENSION = (lambda v: v is None or not re.search(r"[./\\\0]", v)), "an extension without dots or slashes, for example mid"


def _at_least(low):
    return (lambda v: v >= low), f"{low} or more"


def _one_of(*words):
    return (lambda v: v in words), "one of " + ", ".join(words)


_LABELS = {list: "a list of texts", str: "text", int: "a whole number", float: "a number", bool: "True or False"}

# {constant: (type, (test of a value, legal values in words))}. "?" after a name: None is legal, too.
TRAINING = {
    "TRAIN_FOLDERS": (list, ((lambda v: v and all(v)), "one folder or more")),
    "EVAL_FOLDERS": (list, (all, "folders, or []")),
    "EVAL_SPLIT": (float, ((lambda v: 0 < v < 1), "between 0 and 1")),
    "PRE_WEIGHTS_PATH": (str, _PATH),
    "WEIGHTS_PATH": (str, _PATH),
    "LOGS_PATH": (str, _PATH),
    "PATCH_SIZE": (int, _at_least(1)),
    "PATCH_LENGTH": (int, _at_least(3)),
    "BYTE_NUM_LAYERS": (int, _at_least(1)),
    "PATCH_NUM_LAYERS": (int, _at_least(1)),
    "HIDDEN_SIZE": (int, ((lambda v: v >= 64 and v % 64 == 0), "a multiple of 64")),
    "NUM_EPOCHS": (int, _at_least(1)),
    "LEARNING_RATE": (float, ((lambda v: v > 0), "above 0")),
    "LR_SCHEDULE": (str, _one_of("cosine", "constant")),
    "BATCH_SIZE": (int, _at_least(1)),
    "ACCUMULATION_STEPS": (int, _at_least(1)),
    "SAVE_MINUTES": (float, _at_least(0)),
    "PATCH_SAMPLING_BATCH_SIZE": (int, _at_least(0)),
    "EMBEDDING_START": (str, _one_of("published", "smooth")),
    "MAX_GRAD_NORM": (float, _at_least(0)),
    "DROPOUT": (float, ((lambda v: 0 <= v < 1), "from 0 to below 1")),
    "PRECISION": (str, _one_of("auto", "fp32", "bf16", "fp16")),
    "COMPILE": (bool, _ANY),
    "LONG_FILES": (str, _one_of("windows", "crop")),
    "NUM_WORKERS": (int, _at_least(0)),
    "SEED": (int, ((lambda v: 0 <= v < 2**63), "from 0 to 2**63 - 1")),
    "LOAD_FROM_CHECKPOINT": (bool, _ANY),
    "ALLOW_CHANGED_FILES": (bool, _ANY),
    "LOAD_FROM_PRE_CHECKPOINT": (bool, _ANY),
    "CONVERSION_MODE?": (
        str,
        (
            (lambda v: v is None or re.fullmatch(r"(?i)([^.&>/\\\s-]+)(->|&)(?!\1$)[^.&>/\\\s-]+", v)),
            'None, or two different extensions: "abc->mid" (one direction) or "abc&mid" (both)',
        ),
    ),
    "LABELS": (str, _one_of("name", "prefix", "folder")),
    "WANDB_LOG": (bool, _ANY),
}
INFERENCE = {
    "INFERENCE_WEIGHTS_PATH": (str, _PATH),
    "INPUT_EXT?": (str, _EXTENSION),
    "TARGET_EXT": (str, _EXTENSION),
    "INPUT_FOLDER": (str, _PATH),
    "OUTPUT_FOLDER": (str, _PATH),
    "MODE": (str, _one_of("generate", "convert", "complete", "classify", "evaluate", "compress", "decompress")),
    "NUM_SAMPLES": (int, _at_least(1)),
    "PROMPT_BYTES": (int, _at_least(0)),
    "NUM_CANDIDATES": (int, _at_least(1)),
    "INFERENCE_BATCH_SIZE": (int, _at_least(1)),
    "VERIFY": (bool, _ANY),
    "TOP_K": (int, ((lambda v: 0 <= v <= 257), "from 0 (all) to 257")),
    "TOP_P": (float, ((lambda v: 0 < v <= 1), "above 0 and at most 1")),
    "TEMPERATURE": (float, _at_least(0)),
}
_OPTIONAL = {name.rstrip("?") for name in {**TRAINING, **INFERENCE} if name.endswith("?")}
CONSTANTS = {name.rstrip("?"): rule for name, rule in {**TRAINING, **INFERENCE}.items()}

# {constant of the published code's later config: what replaces it here}
PUBLISHED_NAMES = {
    "PRETRAINED_PATH": "PRE_WEIGHTS_PATH",
    "LOAD_FROM_PRETRAINED": "LOAD_FROM_PRE_CHECKPOINT",
    "INFERENCE_MODE": "MODE",
    "DETERMINISTIC": "SEED: every run is reproducible",
    "SHOW_WARNS": "nothing: warnings are always shown",
}

_overridden = {}  # {constant: its value in config.py}, in a notebook to be restored for the next script


def as_dict(config, training_only=False):
    """Returns {constant: current value} of the module config, plain types.

    Args:
        training_only: leave out the constants that only inference.py reads.
    """
    names = [name.rstrip("?") for name in TRAINING] if training_only else CONSTANTS
    return {name: getattr(config, name) for name in names}


def check(values):
    """Checks a dict of all constants. Raises UserError with the first one that is illegal, its value and the legal ones."""
    for name, (kind, (is_legal, words)) in CONSTANTS.items():
        value = values[name]
        if value is None and name in _OPTIONAL:
            continue
        if not _has_type(value, kind):
            raise UserError(f"{name} is {value!r}, but must be {_LABELS[kind]}" + " or None" * (name in _OPTIONAL))
        if not is_legal(value):
            raise UserError(f"{name} is {value!r}, but must be {words}")
    if values["BATCH_SIZE"] % values["ACCUMULATION_STEPS"]:
        raise UserError(
            f"BATCH_SIZE is {values['BATCH_SIZE']}, but must be a multiple of ACCUMULATION_STEPS, {values['ACCUMULATION_STEPS']}"
        )


def override(config, argv=None):
    """Checks config.py and sets its constants from a command line, for example ["--BATCH_SIZE", "4", "--EVAL_FOLDERS"].

    None, True and False are understood. An option without values is an empty list. Every constant that changes is printed
    with its value in config.py. `--help` lists all.

    Args:
        config: the module.
        argv: None = this process's command line.

    Raises:
        SystemExit: status 2 and one line on stderr for an unknown option or an illegal value, here or in config.py.
    """
    vars(config).update(_overridden)
    _overridden.clear()
    parser = _Parser(
        usage="%(prog)s [--NAME VALUE ...]",
        description="Settings are the constants of config.py; each can be overridden here for one run.",
        allow_abbrev=False,
    )
    comments = _comments(config.__file__)
    for name, (kind, _) in CONSTANTS.items():
        now = f"Now: {getattr(config, name, 'missing')!r}"
        parser.add_argument(
            f"--{name}",
            nargs="*" if kind is list else None,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{comments.get(name, '')} {now}".replace("%", "%%"),
        )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        hint = _hint(option.lstrip("-").upper(), "--") or "; --help lists them all"
        parser.error(f"{'unknown option' if option.startswith('-') else 'unexpected'} {option}{hint}")
    for name in vars(config):
        if name.isupper() and name not in CONSTANTS and (hint := _hint(name)):
            parser.error(f"config.py: unknown constant {name}{hint}")
    if missing := [name for name in CONSTANTS if not hasattr(config, name)]:
        parser.error(f"config.py: {', '.join(missing)} is missing")
    values = as_dict(config)
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    for name, words in vars(given).items():
        try:
            values[name] = _parse(words, CONSTANTS[name][0], name in _OPTIONAL)
        except (ValueError, KeyError):
            parser.error(f"{name} is {words!r}, but must be {_LABELS[CONSTANTS[name][0]]}")
    try:
        check(values)
    except UserError as error:
        parser.error(str(error))
    for name, value in values.items():
        before = getattr(config, name)
        if value != before:
            if torchrun_rank()[0] == 0 and name in vars(given):
                print(f"{name} = {value!r} (config.py: {before!r})")
            _overridden[name] = before
            setattr(config, name, value)


def latest_path(weights_path):
    """Returns the path of a run's latest state, next to its best: weights.pth -> weights-last.pth."""
    stem, extension = os.path.splitext(weights_path)
    return f"{stem}-last{extension}"


def check_training_paths(values):
    """Raises UserError if a folder or a checkpoint that a run starts with is missing; `values` is `as_dict`'s."""
    for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"):
        check_folders(values[name], name)
    own = values["WEIGHTS_PATH"], latest_path(values["WEIGHTS_PATH"])
    resumes = values["LOAD_FROM_CHECKPOINT"] and any(map(os.path.exists, own))
    if values["LOAD_FROM_PRE_CHECKPOINT"] and not resumes:
        check_checkpoint(values["PRE_WEIGHTS_PATH"], "PRE_WEIGHTS_PATH")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _hint(name, dashes=""):
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
    """Returns the value of an option's words. Raises ValueError or KeyError if they have another type."""
    if kind is list:
        return [] if words == ["None"] else words
    if words == "None":
        if is_optional:
            return None
        raise ValueError("None is for optional constants")
    return {"true": True, "false": False}[words.lower()] if kind is bool else kind(words)


def _comments(path):
    """Returns {constant: the comment above it} in config.py."""
    with open(path, encoding="utf-8") as file:
        found = re.findall(r"^((?:# .*\n)+)([A-Z_]+) *(?::[^=\n]*)?=", file.read(), flags=re.MULTILINE)
    return {name: " ".join(line.removeprefix("# ") for line in comment.splitlines()) for comment, name in found}
