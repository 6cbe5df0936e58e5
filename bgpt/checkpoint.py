"""Checkpoints: dicts in `.pth` files, loaded without running code in them.

key            | type or shape                              | meaning
---------------|--------------------------------------------|--------------------------------------------------------------
model          | {name: tensor}, see below                  | the weights
optimizer      | the optimizer's state_dict()               | its moments, AdamW's in the order of the parameters
lr_sched       | LambdaLR.state_dict()                      | the learning-rate schedule, recreated on resuming
epoch          | int                                        | finished epochs
best_epoch     | int                                        | the epoch with the best evaluation so far, 0 = none
min_eval_loss  | float                                      | its loss, nats per symbol, or inf (generative models)
min_eval_bits_per_byte | float                              | * its bits per byte, which decide, or inf (generative models)
max_eval_acc   | float                                      | its accuracy, from 0 to 1, or -inf (classifiers)
labels         | {str: int}                                 | index of each label, as "Business.txt" (classifiers)
label_mode     | "name", "prefix", "folder" or "path"       | * LABELS (classifiers)
best_loss      | float                                      | * eval loss of the best epoch, for ties
extensions     | [str]                                      | * of the training files, as in extension patches, if few
file_hashes    | int64 (n,)                                 | * hashes of the training files' real paths, if few
scaler         | GradScaler.state_dict()                    | * loss scale of PRECISION fp16, else empty
position       | int                                        | * finished examples of the current epoch, of all ranks
totals         | [[float]], one for each rank               | * running sums of the current epoch
random_states  | [{"cpu": uint8 (n,), "cuda": same or None}]| * PyTorch's generator states of each rank, for dropout
figures        | {str: float}                               | * figures of the last finished epoch
report         | str                                        | * the best epoch's report (classifiers)
run_id         | str                                        | * the same in all files of a run
data           | {"TRAIN_FOLDERS": str, "EVAL_FOLDERS": str}| * SHA-256 of each set's names and sizes, see `examples.digest`
config         | {str: plain value}                         | * the constants of training

Published files have the keys without *. The tensors of `model`, with S = PATCH_SIZE, D = HIDDEN_SIZE:

    patch_level_decoder.patch_embedding.weight (D, S·257), .bias (D,)
    patch_level_decoder.base.…                   a GPT2Model: wpe.weight (PATCH_LENGTH, D), h.0 …, ln_f
    byte_level_decoder.base.…                    a GPT2LMHeadModel: transformer.wte.weight (257, D), transformer.wpe.weight
                                                 (S + 1, D), transformer.h.0 …, lm_head.weight, tied to wte.weight
    classifier.weight (labels, D), .bias         in a classifier, instead of the byte-level decoder

Published files also have buffers of old transformers, ….attn.bias and ….attn.masked_bias, which are dropped. Bare state dicts,
.safetensors files, and names with the prefixes "module." and "_orig_mod." of PyTorch's wrappers load too.
"""

import dataclasses
import os
import pickle
import re
import warnings

import torch

from bgpt import system
from bgpt.system import UserError
from utils import HEAD_SIZE, NUM_SYMBOLS, ModelSizes


def save_checkpoint(path, checkpoint):
    """Saves a dict of plain types and tensors atomically, see `system.write_whole`."""

    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # also raised by torch.save for a full disk or a second Ctrl-C
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise

    system.write_whole(path, write)


def load_checkpoint(path, name, mmap=False):
    """Returns the dict of a checkpoint, its tensors on the CPU. Code in the file is never run.

    `name` is the constant with the path, for messages. With `mmap` tensors are read from the file when they are used.
    Raises UserError if the file is missing, no checkpoint, or could run code, OSError if it is unreadable.
    """
    system.check_checkpoint(path, name)
    try:
        if os.path.splitext(path)[1] == ".safetensors":
            from safetensors.torch import load_file

            checkpoint = {"model": load_file(path)}
        else:
            with warnings.catch_warnings(action="ignore"):  # for files that are no checkpoints
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many types, also of pickle and zipfile
        raise UserError(f"{name}: cannot load {path!r}: {_describe_damage(path, error)}") from None
    if isinstance(checkpoint, dict) and "model" not in checkpoint and checkpoint:
        checkpoint = {"model": checkpoint}  # a bare state dict
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) and _is_plain_tensor(state[key]) for key in state):
        raise UserError(f"{name}: {path!r} is no bGPT checkpoint: its 'model' should be a dict of dense tensors")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    checkpoint["model"] = {key: value for key, value in state.items() if not re.search(r"\.attn\.(masked_)?bias$", key)}
    return checkpoint


def _describe_damage(path, error):
    """Returns why a file did not load, and how to get the right one. Raises OSError if it is unreadable."""
    with open(path, "rb") as file:
        beginning = file.read(256)
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights. Run `git lfs pull` to fetch them"
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":  # some begin with UTF-8's byte order mark
        return "it is a web page, not the weights. Use the page's Download button"
    if isinstance(error, pickle.UnpicklingError) and beginning.startswith((b"PK", b"\x80")):  # as torch.save's files begin
        return "it has more than plain types and tensors, which could run code, so it is refused"
    return "it is damaged, truncated, or no checkpoint"


def _is_plain_tensor(value):
    """Returns whether a value is a dense tensor with storage for its whole shape. A few bytes can claim any shape."""
    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_dense and value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def model_sizes(state, where):
    """Returns the ModelSizes of a `model` dict. Raises UserError if its tensors are missing or contradict each other."""

    def shape(key):
        if key not in state or state[key].dim() != 2:
            raise UserError(f"{where}: {key} is missing or not a matrix, so the model's sizes are unknown")
        return state[key].shape

    def layers(prefix):
        return len({m[1] for m in (re.match(rf"{re.escape(prefix)}\.h\.(\d+)\.", key) for key in state) if m})

    width, inputs = shape("patch_level_decoder.patch_embedding.weight")
    if inputs % NUM_SYMBOLS or width % HEAD_SIZE:
        wanted = f"a multiple of {HEAD_SIZE} x one of {NUM_SYMBOLS}"
        raise UserError(f"{where}: patch_embedding.weight is {width} x {inputs}; it should be {wanted}")
    length = shape("patch_level_decoder.base.wpe.weight")[0]
    sizes = ModelSizes(inputs // NUM_SYMBOLS, length, width, layers("patch_level_decoder.base"))
    if "classifier.weight" in state:
        sizes.num_labels = shape("classifier.weight")[0]
    else:
        sizes.BYTE_NUM_LAYERS = layers("byte_level_decoder.base.transformer")
    return sizes


def load_weights(model, state, where):
    """Copies a `model` dict into a model. Raises UserError with every tensor that does not fit."""
    tied, source = "byte_level_decoder.base.lm_head.weight", "byte_level_decoder.base.transformer.wte.weight"
    if tied in model.state_dict() and source in state:
        state = {tied: state[source], **state}  # some files omit the tied tensor
        if state[tied].shape != state[source].shape or not torch.equal(state[tied], state[source]):
            raise UserError(f"{where}: {tied} differs from {source}, to which it is tied")
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{where} has NaN or infinite values in {', '.join(broken)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # lists all missing, unknown and misshapen tensors
        raise UserError(f"{where} does not fit the model. {error}") from None


def load_optimizer(optimizer, state, where):
    """Loads an optimizer's moments. The optimizer keeps its learning rates and other settings.

    Raises UserError for moments of other shapes. The fused step does not check these, and would use memory beyond smaller ones.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        for name, moment in moments.items():
            if name != "step" and not (_is_plain_tensor(moment) and moment.shape == parameters[index].shape):
                raise UserError(f"{where}: the optimizer's {name} {index} is not {tuple(parameters[index].shape)} numbers")
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def label_list(checkpoint, where):
    """Returns the labels of a classifier's checkpoint by index. Raises UserError if they do not match its head."""
    labels, count = checkpoint.get("labels"), len(checkpoint["model"]["classifier.weight"])
    if not isinstance(labels, dict) or set(labels.values()) != set(range(count)):
        raise UserError(f"{where}: its 'labels' should be a dict of {count} labels and their indices, 0 to {count - 1}")
    return [str(label) for label in sorted(labels, key=labels.get)]


def check_sizes(wanted, state, where):
    """Checks a `model` dict against the ModelSizes `wanted`. Raises UserError with the constants to change."""
    actual = model_sizes(state, where)
    if actual.kind != wanted.kind:
        raise UserError(f"{where} is a {actual.kind}; here a {wanted.kind} is needed: give another path")
    if actual.num_labels != wanted.num_labels:
        hint = "To start from its patch-level decoder, set PRE_WEIGHTS_PATH to it and LOAD_FROM_PRE_CHECKPOINT to True"
        what = f"has {actual.num_labels} labels, but the files of TRAIN_FOLDERS have {wanted.num_labels}: give another path"
        raise UserError(f"{where} {what}. {hint}")
    pairs = zip(dataclasses.asdict(actual).items(), dataclasses.asdict(wanted).values())
    if changes := ", ".join(f"{name} = {old} (now {new})" for (name, old), new in pairs if old != new):
        raise UserError(f"{where} is a model of other sizes: set {changes}, or give another path")


def load_sized_weights(model, sizes, path, name):
    """Loads a checkpoint's weights into a model and returns the checkpoint. Raises UserError if ModelSizes `sizes` differ."""
    checkpoint = load_checkpoint(path, name)
    check_sizes(sizes, checkpoint["model"], f"{name}: {path!r}")
    load_weights(model, checkpoint["model"], f"{name}: {path!r}")
    return checkpoint
