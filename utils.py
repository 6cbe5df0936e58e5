"""bGPT, a language model of bytes: files as patches, data sets, models, generation, checkpoints, run set-up.

A file is a sequence of patches of S symbols. Symbols 0-255 are bytes; 256 is padding and end of file. `tune.abc` with
20 bytes, S = 16, is 4 patches; the first is the extension patch, the last the end patch (`.` is the symbol 256):

    patch 0  | a b c . . . . . . . . . . . . . |  extension
    patch 1  | X : 1 \n T : T h e   B u t t e r |  content
    patch 2  | f l y \n . . . . . . . . . . . . |  content, filled up
    patch 3  | . . . . . . . . . . . . . . . . |  end

The patch-level decoder reads whole patches and sums up patches 0..i in one vector; from that vector the byte-level
decoder writes patch i+1, symbol by symbol. The first is deep and runs once per patch, the second is shallow and runs once
per byte.

Dimensions in shape comments: B sequences in a batch, P patches in a sequence, S symbols in a patch (PATCH_SIZE),
D width (HIDDEN_SIZE), N target patches in a batch, V = 257 symbols, H = D/64 attention heads, L PATCH_LENGTH.

Nothing here reads config.py: sizes and settings are arguments.
"""

import array
import base64
import contextlib
import copy
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import html
import itertools
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

END = 256  # the symbol of padding and end of file
NUM_SYMBOLS = 257  # V: 256 bytes and END
HEAD_SIZE = 64  # width of an attention head
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # how writing fails when nothing more fits
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # options of glibc's mallopt
ORDER = "permutation"  # how the order of an epoch is drawn, for checkpoints
PREFILL_PATCHES = 8192  # most patches of prompts that go through the model at once


class UserError(ValueError):
    """Something that the user can put right; its message says what is wrong and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Files <-> patches
# ---------------------------------------------------------------------------------------------------------------------


def extension_of(path):
    """Returns the extension of a file's name, without the dot; "" if it has none."""
    return os.path.splitext(path)[1][1:]


def label_of(path):
    """Returns the label of a file for classification: "Business.txt" of news/Business_1.txt (paper, 3.3).

    That is its name up to the first "_", without one its stem, and its extension.
    """
    stem, extension = os.path.splitext(os.path.basename(path))
    return stem.split("_")[0] + extension


def extension_patch(extension, patch_size):
    """Returns the extension patch, int16 (S,): the UTF-8 bytes of `extension`, cut at S, filled up with 256."""
    patch = np.full(patch_size, END, dtype=np.int16)
    # surrogateescape: a file name may hold bytes that are not UTF-8, which Python keeps as surrogates
    symbols = extension.encode("utf-8", "surrogateescape")[:patch_size]
    patch[: len(symbols)] = np.frombuffer(symbols, dtype=np.uint8)
    return patch


def to_patches(content, extension, patch_size):
    """Returns a whole file as patches, int16 (P, S), from its content (bytes or uint8 array) and extension."""
    content = np.frombuffer(content, dtype=np.uint8)
    num_content = -(-len(content) // patch_size)
    patches = np.full((num_content + 2, patch_size), END, dtype=np.int16)
    patches[0] = extension_patch(extension, patch_size)
    patches[1:-1].reshape(-1)[: len(content)] = content
    return patches


def to_content(symbols):
    """Returns the bytes of a file from its symbols after the extension patch, any integer shape, up to the first 256."""
    symbols = np.asarray(symbols).reshape(-1)
    ends = np.flatnonzero(symbols == END)
    return symbols[: ends[0] if len(ends) else None].astype(np.uint8).tobytes()


def read_patches(path, patch_size, patch_length=None, rng=None):
    """Reads a file as patches, at most `patch_length` of them; from a longer file, only the bytes that are kept.

    Args:
        path: the file.
        patch_size: S.
        patch_length: most patches to return; None = all.
        rng: numpy Generator, or the seed of one, that draws what is kept of a longer file: its head, a window of its body
            or its tail. None = its head.

    Returns:
        patches: int16 (P, S).
        counted: bool (P, S), true at the symbols that bits per byte are counted over: the content and the first 256
            after it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total = -(-size // patch_size) + 2
        first, last = 0, total  # the patches that are kept
        if patch_length is not None and total > patch_length:
            first, last = _crop(total, patch_length, rng)
        start, stop = (max(first, 1) - 1) * patch_size, min((last - 1) * patch_size, size)  # bytes of the content
        content = np.fromfile(file, dtype=np.uint8, offset=start, count=max(stop - start, 0))
    patches = to_patches(content, extension_of(path), patch_size)
    counted = np.zeros(patches.shape, dtype=bool)
    # (P, S) -> (P·S,): the content follows the extension patch, and one more symbol ends it
    counted.reshape(-1)[patch_size : patch_size + len(content) + 1] = True
    kept = slice(0 if first == 0 else 1, len(patches) if last == total else -1)
    return patches[kept], counted[kept]


def _crop(total, length, rng):
    """Returns the first patch kept, and the one after the last, of a file of `total` > `length` patches."""
    if rng is None:
        return 0, length
    rng = np.random.default_rng(rng)
    part = ("head", "body", "tail")[rng.integers(3)]
    if part == "head":
        return 0, length
    if part == "tail":
        return total - length, total
    # neither the extension patch nor the end patch; one patch too many leaves no such window, and then it is the tail
    first = int(rng.integers(1, max(total - length, 2)))
    return first, first + length


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class Files:
    """The paths of files, sorted, and their sizes: a sequence of str that keeps no Python object per file.

    A file takes 16 bytes beside those of its path. Measured with 2.1 million files, paths of 61 bytes: 162 MB, 700 MB while
    they are listed, which took 10 s.

    Attributes:
        sizes: int64 (n,), bytes in each file when it was listed; -1 for a link that leads nowhere.
    """

    def __init__(self, paths, sizes):
        """Takes a list of paths as bytes, in any order, and their sizes."""
        order = sorted(range(len(paths)), key=paths.__getitem__)
        self.sizes = np.array(sizes, dtype=np.int64)[order]
        self._ends = np.cumsum([0] + [len(paths[i]) for i in order])  # int64 (n+1,), where each path ends in the text
        self._text = b"".join([paths[i] for i in order])

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return os.fsdecode(self.encoded(index))

    def encoded(self, index):
        """Returns the path at `index`, 0 to n-1, as the bytes that the file system knows it by."""
        if not 0 <= index < len(self):
            raise IndexError(f"file {index} of {len(self)}")
        return self._text[self._ends[index] : self._ends[index + 1]]


def list_files(folders, name, extension=None):
    """Returns all files below the folders, each once, as Files; hidden files and folders are left out.

    Args:
        folders: list of paths.
        name: the constant that holds them, for messages.
        extension: only files of this one; None = all.

    Raises:
        UserError: a folder is missing, is a file, or cannot be read.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            what = "is a file" if os.path.exists(folder) else "does not exist"
            raise UserError(f"{name}: {folder!r} {what}; it must be a folder")
    wanted = None if extension is None else os.fsencode(extension)
    paths, sizes, seen = [], array.array("q"), set()
    waiting, links = [os.path.normpath(os.fsencode(folder)) for folder in folders], []
    while waiting or links:
        folder = (waiting or links).pop()  # links to folders come last: what they lead to keeps its own name
        real = os.path.realpath(folder)
        if real in seen:  # also ends a link that leads round and round
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(entry.path)
                    elif entry.is_file() or entry.is_symlink():  # a dead link is kept: reading it says so; a pipe is no file
                        if wanted is None or extension_of(entry.name) == wanted:
                            paths.append(entry.path)
                            sizes.append(_size(entry))
        except OSError as error:
            raise UserError(f"{name}: cannot read the folder {os.fsdecode(folder)!r}: {error.strerror}") from None
    return Files(paths, sizes)


def _size(entry):
    """Returns the bytes in the file of an os.DirEntry; -1 where the file is gone, which reading it will say."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return -1


class Examples:
    """What to learn from: a sequence of tuples of paths, (file,) for itself or (input, target) for a conversion.

    Args:
        files: the Files.
        indices: int64 (n, 1) or (n, 2), the places of the examples' paths in `files`.
    """

    def __init__(self, files, indices):
        self.files = files
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return tuple(self.files[place] for place in self.indices[index])

    @classmethod
    def of(cls, files):
        """Returns the Examples of Files, each for itself."""
        return cls(files, np.arange(len(files))[:, None])

    def select(self, indices):
        """Returns the Examples at `indices`, an integer array, in its order."""
        return Examples(self.files, self.indices[indices])

    def both_ways(self):
        """Returns pairs in both directions: each pair, then the same with input and target exchanged."""
        # (n, 2) -> (n, 2 directions, 2) -> (2·n, 2)
        return Examples(self.files, np.stack((self.indices, self.indices[:, ::-1]), axis=1).reshape(-1, 2))

    def lengths(self, patch_size, patch_length):
        """Returns the patches of each example's sequence, int64 (n,); a longer file counts as the `patch_length` kept."""
        content = -(-self.files.sizes[self.indices].clip(min=0) // patch_size)  # (n, 1) or (n, 2)
        lengths = content.sum(1) + self.indices.shape[1] + 1  # an extension patch for each file, one end patch
        return lengths if self.indices.shape[1] == 2 else lengths.clip(max=patch_length)

    def fingerprint(self):
        """Returns a hex digest of the examples' paths and sizes, in order: other data, or another order, have another."""
        digest = hashlib.sha256(self.files.sizes[self.indices].tobytes())
        for part in np.array_split(self.indices.reshape(-1), len(self) // 65536 + 1):
            digest.update(b"".join([self.files.encoded(place) + b"\0" for place in part.tolist()]))
        return digest.hexdigest()


def hold_out(examples, share, seed, candidates=None):
    """Splits Examples in two at random: the rest, and `share` of them (at least one); each keeps their order.

    Args:
        examples: the Examples.
        share: EVAL_SPLIT.
        seed: SEED.
        candidates: int64 (m,), those that may be held out; None = all.

    Raises:
        UserError: there are too few.
    """
    if candidates is None:
        candidates = np.arange(len(examples))
    if len(examples) > 1 and not len(candidates):
        raise UserError("EVAL_FOLDERS holds nothing, and every label has but one file, which stays in training: add files, or EVAL_FOLDERS")
    if len(examples) < 2:
        raise UserError(f"EVAL_FOLDERS holds nothing, and EVAL_SPLIT cannot hold out a part of {len(examples)}: add files")
    count = min(max(1, round(share * len(examples))), len(candidates), len(examples) - 1)
    drawn = np.random.default_rng([seed, zlib.crc32(b"hold out")]).permutation(len(candidates))[:count]
    held = np.zeros(len(examples), dtype=bool)
    held[candidates[drawn]] = True
    print(f"EVAL_FOLDERS holds none: {count} of the training examples are held out for evaluation")
    return examples.select(~held), examples.select(held)


def count_shared(train, held_out):
    """Prints how many evaluation Examples are training Examples too."""
    known = set(held_out)
    shared = sum(example in known for example in train)
    if shared:
        print(f"{shared} evaluation examples are training examples too: their figures say nothing about unseen files")


def split_conversion_mode(mode):
    """Returns (input extension, target extension, whether both directions are meant) of "abc->mid" or "abc&mid"."""
    source, sign, target = re.fullmatch(r"([^&>]+?)(->|&)([^&>]+)", mode).groups()
    return source, target, sign == "&"


def pair_files(files, mode):
    """Returns Examples of (input, target) for the Files of the same folder and stem, in the order of the inputs."""
    source, target = (b"." + os.fsencode(extension) for extension in split_conversion_mode(mode)[:2])
    places = {source: {}, target: {}}  # {extension: {path without it: place}}
    for place in range(len(files)):
        stem, extension = os.path.splitext(files.encoded(place))
        if extension in places:
            places[extension][stem] = place
    pairs = [(place, places[target][stem]) for stem, place in places[source].items() if stem in places[target]]
    return Examples(files, np.array(pairs, dtype=np.int64).reshape(-1, 2))


def fitting_pairs(pairs, patch_size, patch_length):
    """Returns the pairs that fit in a sequence, and the patches of the longest pair of all (0 if there are none)."""
    lengths = pairs.lengths(patch_size, patch_length)
    return pairs.select(lengths <= patch_length), int(lengths.max(initial=0))


def share_out(lengths, count):
    """Shares sequences out into parts that hold nearly the same number of patches: the longest first, to the part with least.

    Args:
        lengths: int (n,), patches of each sequence, 1 or more.
        count: number of parts.

    Returns:
        list of `count` int64 arrays, the indices of each part's sequences in ascending order. With n < count, the last
        parts are empty. It depends on the arguments alone.
    """
    parts, sums = [[] for _ in range(count)], [0] * count
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        least = sums.index(min(sums))
        parts[least].append(index)
        sums[least] += int(lengths[index])
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


class ByteDataset(torch.utils.data.Dataset):
    """Files, or pairs of files, as sequences of patches.

    Args:
        examples: Examples, or a list of such tuples of paths.
        patch_size: S.
        patch_length: L, the most patches in a sequence.
        crop_seed: what the crops of files longer than that are drawn from, beside the file's path: a list of whole
            numbers such as [seed, epoch]; None = always the head of the file.
    """

    def __init__(self, examples, patch_size, patch_length, crop_seed=None):
        self.examples = examples
        self.patch_size = patch_size
        self.patch_length = patch_length
        self.crop_seed = crop_seed

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        """Returns (patches int16 (P, S), counted bool (P, S)), see `read_patches`; or the UserError that it met.

        An error is returned, not raised, since a worker process would wrap it in its own traceback.
        """
        paths = self.examples[index]
        try:
            if len(paths) == 1:
                seed = None if self.crop_seed is None else [*self.crop_seed, zlib.crc32(os.fsencode(paths[0]))]
                patches, counted = read_patches(paths[0], self.patch_size, self.patch_length, seed)
            else:
                source, target = (read_patches(path, self.patch_size) for path in paths)
                # the input file without its end patch, then the whole target file
                patches, counted = (np.concatenate((s[:-1], t)) for s, t in zip(source, target))
                if len(patches) > self.patch_length:
                    return UserError(f"{' and '.join(paths)} have grown since the start: they no longer fit in PATCH_LENGTH")
        except OSError as error:
            return UserError(f"cannot read {error.filename or paths!r}: {error.strerror}")
        counted[0] = False  # the first patch is given, not predicted
        return patches, counted


@dataclasses.dataclass
class Batch:
    """Sequences of different lengths, padded with 256 on the right: see `collate`."""

    patches: torch.Tensor  # int16 (B, P, S)
    masks: torch.Tensor  # uint8 (B, P), 1 at real patches
    counted: torch.Tensor  # bool (B, P, S), true at the symbols that bits per byte are counted over

    def split(self, parts):
        """Returns at most `parts` pairs of sequences' indices (int64 array) and their Batch, cut to the longest of them.

        The batches have nearly the same number of patches, see `share_out`.
        """
        lengths = self.masks.sum(1)  # (B,)
        split = []
        for rows in filter(len, share_out(lengths.numpy(), parts)):
            longest = int(lengths[rows].max())
            batch = Batch(self.patches[rows, :longest], self.masks[rows, :longest], self.counted[rows, :longest])
            split.append((rows, batch))
        return split

    def pin_memory(self):
        """Moves the tensors to page-locked memory, from which a copy to a GPU does not block; called by DataLoader."""
        return Batch(self.patches.pin_memory(), self.masks.pin_memory(), self.counted.pin_memory())


def collate(samples):
    """Returns the Batch of the samples of a ByteDataset; or the first UserError among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    shape = (len(samples), max(len(patches) for patches, _ in samples))  # (B, P)
    patch_size = samples[0][0].shape[1]
    patches = np.full((*shape, patch_size), END, dtype=np.int16)
    masks = np.zeros(shape, dtype=np.uint8)
    counted = np.zeros((*shape, patch_size), dtype=bool)
    for row, (sample_patches, sample_counted) in enumerate(samples):
        patches[row, : len(sample_patches)] = sample_patches
        masks[row, : len(sample_patches)] = 1
        counted[row, : len(sample_patches)] = sample_counted
    return Batch(torch.from_numpy(patches), torch.from_numpy(masks), torch.from_numpy(counted))


def batches(dataset, index_batches, num_workers=0, pin_memory=False):
    """Yields the Batch of every array of indices.

    No random state is touched: PyTorch's loader draws from a generator of its own.

    Args:
        dataset: a ByteDataset.
        index_batches: a sequence of integer arrays.
        num_workers: processes that read and collate; they end with the iteration, or seconds after the main process.
        pin_memory: whether to move the tensors to page-locked memory.

    Raises:
        UserError: a file cannot be read.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=index_batches,
        collate_fn=collate,
        num_workers=num_workers,
        # Python 3.14 no longer forks by default, and every new worker would then import PyTorch again, each epoch
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _leave_signals_to_the_main_process(worker):
    """Lets a worker read on when Ctrl-C or SIGTERM reach the whole process group: the main one finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # PyTorch's own watch misses a main process that was killed before it began
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def make_configs(patch_size, patch_length, hidden_size, patch_num_layers, byte_num_layers, dropout=0.1):
    """Returns the GPT2Configs of the patch-level and the byte-level decoder."""
    dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    shared = {"n_embd": hidden_size, "n_head": hidden_size // HEAD_SIZE, "bos_token_id": None, "eos_token_id": None, **dropouts}
    patch_config = GPT2Config(n_layer=patch_num_layers, n_positions=patch_length, vocab_size=1, **shared)
    patch_config.patch_size = patch_size
    byte_config = GPT2Config(n_layer=byte_num_layers, n_positions=patch_size + 1, vocab_size=NUM_SYMBOLS, **shared)
    return patch_config, byte_config


def _fused(config):
    """Returns a copy of a GPT2Config that computes GPT-2's tanh-GELU in one fused operation; the numbers are the same."""
    config = copy.deepcopy(config)
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


@dataclasses.dataclass
class BytePrediction(ModelOutput):
    """What the byte-level decoder returns."""

    loss: torch.Tensor | None = None  # scalar, mean cross-entropy of all symbols of the targets, nats per symbol
    logits: torch.Tensor | None = None  # (N, S, V)
    nats: torch.Tensor | None = None  # float32 (N, S), cross-entropy of each symbol


def dropout(x, rate):
    """Returns x with each element zero with probability `rate` (to within 2**-17), and the others scaled up accordingly.

    On a CPU, PyTorch draws one number for each element; here 16 bits of its generator decide each, several times faster.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    threshold = min(round(rate * 2**16), 2**16 - 1)  # of the 2**16 values that an element's bits can have, so many drop it
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, threshold - 2**15, out=torch.empty_like(x, requires_grad=False))  # 1 or 0, in x's dtype at once
    return x * kept.mul_(2**16 / (2**16 - threshold))


def attend(qkv, rate=0.0):
    """Returns causal attention with dropout of its weights, as PyTorch's scaled_dot_product_attention does.

    Args:
        qkv: (B, T, 3, H, 64), the queries, keys and values of B sequences.
        rate: of dropout.

    Returns:
        (B, T, H, 64).
    """
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, 64) each
    if rate == 0 or qkv.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate, is_causal=True).transpose(1, 2)
    # PyTorch's own attention on CPUs has no fast path with dropout
    shape, length = queries.shape, queries.shape[2]
    queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))  # (B·H, T, 64)
    later = torch.full((length, length), -torch.inf, dtype=qkv.dtype).triu(1)
    scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=shape[-1] ** -0.5)  # (B·H, T, T)
    weights = dropout(scores.softmax(-1), rate)
    return (weights @ values).view(shape).transpose(1, 2)  # (B·H, T, 64) -> (B, H, T, 64) -> (B, T, H, 64)


class Ragged:
    """Sequences of different lengths as rows (N, ·), one sequence after another: no work is done for padding.

    Only attention sees them as sequences, padded to lengths that follow from their own, so that the numbers of one do not
    depend on the others. The shortest come first: those that are padded alike are neighbours.

    Args:
        lengths: int (B,), patches of each sequence; 0 = none.
        device: where the rows are.

    Attributes:
        sequence, position: int64 (N,), which sequence each row is of, and its place in that.
        starts: int64 (B,), the first row of each sequence.
    """

    def __init__(self, lengths, device):
        lengths = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        ends = lengths[order].cumsum()  # (B,), rows up to and with each sequence, in their order
        starts = np.empty_like(ends)
        starts[order] = ends - lengths[order]
        sequence = order.repeat(lengths[order])
        position = np.arange(len(sequence)) - starts[sequence]
        self.sequence, self.position, self.starts = (torch.from_numpy(a).to(device) for a in (sequence, position, starts))
        self._groups = []  # of sequences padded alike: their rows; how many they are, padded to what; the rows' cells there
        padded = np.array([padded_length(length) for length in lengths[order].tolist()], dtype=np.int64)
        for length in np.unique(padded[padded > 0]).tolist():
            members = np.flatnonzero(padded == length)
            rows = slice(int(starts[order[members[0]]]), int(ends[members[-1]]))
            place = np.arange(len(members)).repeat(lengths[order[members]])  # of each row's sequence in the group
            cells = torch.from_numpy(place * length + position[rows]).to(device)
            self._groups.append((rows, (len(members), length), cells))

    def attend(self, qkv, rate=0.0):
        """Returns each row's attention (N, H, 64) to the rows of its sequence up to itself; see `attend`.

        Args:
            qkv: (N, 3, H, 64), queries, keys and values.
            rate: of dropout of the attention's weights.
        """
        attended = []
        for rows, shape, cells in self._groups:
            group = qkv[rows]  # (n, 3, H, 64)
            is_full = len(group) == shape[0] * shape[1]
            if not is_full:
                padding = group.new_zeros(shape[0] * shape[1], *group.shape[1:])
                group = padding.index_copy(0, cells, group)
            outputs = attend(group.view(*shape, *qkv.shape[1:]), rate).flatten(0, 1)  # (B·T, H, 64)
            attended.append(outputs if is_full else outputs.index_select(0, cells))
        return torch.cat(attended)


def padded_length(length):
    """Returns what a sequence is padded to for its attention: at most 15 more, or a quarter of its length."""
    return round_up(length, max(16, 1 << max(length - 1, 4).bit_length() - 3))


def project_qkv(block, x):
    """Returns the queries, keys and values (…, 3·D) of a GPT2Block for x (…, D)."""
    return block.attn.c_attn(block.ln_1(x))


def finish_block(block, x, attended, rate):
    """Returns what a GPT2Block makes of x (…, D) and its attention (…, D), with dropout of both its branches."""
    x = x + dropout(block.attn.c_proj(attended), rate)
    return x + dropout(block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(x)))), rate)


def run_gpt2(gpt2, inputs, attend, parts=(project_qkv, finish_block)):
    """Returns the outputs of a GPT2Model, (…, D), for inputs (…, D), positions added.

    The same as its own forward, but for faster dropout and attention, and that the inputs may be rows of any sequences.

    Args:
        attend: function of queries, keys and values (…, 3, H, 64) and a rate of dropout; returns (…, H, 64).
        parts: `project_qkv` and `finish_block`, or what torch.compile made of them.
    """
    config, (project, finish) = gpt2.config, parts
    embd_pdrop, attn_pdrop, resid_pdrop = (
        rate if gpt2.training else 0.0 for rate in (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop)
    )
    x = dropout(inputs, embd_pdrop)
    for block in gpt2.h:
        qkv = project(block, x).unflatten(-1, (3, config.n_head, HEAD_SIZE))  # (…, 3·D) -> (…, 3, H, 64)
        x = finish(block, x, attend(qkv, attn_pdrop).flatten(-2), resid_pdrop)  # (…, H, 64) -> (…, D)
    return gpt2.ln_f(x)


class ByteModel(PreTrainedModel):
    """What the four models share: a GPT2Config, and PyTorch's scaled_dot_product_attention."""

    config_class = GPT2Config
    _supports_sdpa = True  # without it, transformers would fall back to its slow attention
    parts = project_qkv, finish_block  # of a block; or what torch.compile made of them, see compile_model


class PatchLevelDecoder(ByteModel):
    """GPT-2 over patches: each patch becomes one embedding, each output sums up the patches up to its own (paper, 3.1).

    Args:
        config: GPT2Config; its n_positions is L. PATCH_SIZE is its attribute `patch_size`, 16 if it has none.
    """

    def __init__(self, config):
        config = _fused(config)
        super().__init__(config)
        self.patch_size = getattr(config, "patch_size", 16)
        self.patch_embedding = nn.Linear(self.patch_size * NUM_SYMBOLS, config.n_embd)
        # the weight is (D, S·V), as published, but laid out by columns: each symbol's vector is then contiguous
        by_columns = torch.empty(self.patch_size * NUM_SYMBOLS, config.n_embd).normal_(std=0.02)
        self.patch_embedding.weight = nn.Parameter(by_columns.t())
        self.base = GPT2Model(config)

    def embed(self, patches):
        """Returns the embeddings (N, D) of patches, int64 (N, S), before positions are added.

        The product of the one-hot patches and the weight is the sum of the S columns that the ones select.
        """
        columns = patches + torch.arange(self.patch_size, device=patches.device) * NUM_SYMBOLS  # (N, S)
        weight = self.patch_embedding.weight.t().contiguous()  # (S·V, D), no copy: see __init__
        return F.embedding_bag(columns, weight, mode="sum") + self.patch_embedding.bias

    def encode(self, patches, masks):
        """Returns (outputs (N, D) of the N real patches, their Ragged).

        Args:
            patches: int64 (B, P, S) or (B, P·S).
            masks: integers (B, P), 1 at real patches, 0 at the padding on the right; None = all are real. On the CPU,
                no GPU is waited for.

        Raises:
            ValueError: there are more patches than positions, or real patches after padding.
        """
        patches = patches.reshape(len(patches), -1, self.patch_size)  # (B, P·S) -> (B, P, S)
        if patches.shape[1] > self.config.n_positions:
            raise ValueError(f"{patches.shape[1]} patches, but the model has positions for {self.config.n_positions}")
        real = np.ones(patches.shape[:2], dtype=bool) if masks is None else masks.cpu().numpy() == 1  # (B, P)
        if (real[:, 1:] > real[:, :-1]).any():
            raise ValueError("masks must be 1 at the real patches of each sequence and 0 behind them: padding stands on the right")
        ragged = Ragged(real.sum(1), patches.device)
        embedded = self.embed(patches[ragged.sequence, ragged.position])  # (B, P, S) -> (N, S) -> (N, D)
        outputs = run_gpt2(self.base, embedded + self.base.wpe(ragged.position), ragged.attend, self.parts)
        return outputs, ragged

    def forward(self, patches, masks=None):
        """Returns transformers' output, whose `last_hidden_state` is (B, P, D), 0 at padding; see `encode`."""
        outputs, ragged = self.encode(patches, masks)
        hidden = outputs.new_zeros(len(patches), patches[0].numel() // self.patch_size, outputs.shape[-1])
        return BaseModelOutput(last_hidden_state=hidden.index_put((ragged.sequence, ragged.position), outputs))


class ByteLevelDecoder(ByteModel):
    """GPT-2 over the symbols of one patch, begun by the patch-level output of the patch before it (paper, 3.1).

    Args:
        config: GPT2Config; its n_positions is S + 1 and its vocab_size 257.
    """

    def __init__(self, config):
        config = _fused(config)
        super().__init__(config)
        self.base = GPT2LMHeadModel(config)

    def forward(self, encoded_patches, target_patches):
        """Returns the BytePrediction of target patches.

        Args:
            encoded_patches: (N, D), the patch-level output just before each target.
            target_patches: int64 (N, S).
        """
        symbols = self.base.transformer.wte(target_patches[:, :-1])  # (N, S-1, D)
        inputs = torch.cat((encoded_patches.unsqueeze(1).to(symbols.dtype), symbols), dim=1)  # (N, S, D)
        inputs = inputs + self.base.transformer.wpe.weight[: inputs.shape[1]]
        hidden = run_gpt2(self.base.transformer, inputs, attend, self.parts)  # (N, S, D)
        logits = self.base.lm_head(hidden)  # (N, S, V)
        # (N, S, V) -> (N·S, V) -> (N, S)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), target_patches.flatten(), reduction="none")
        nats = nats.view(target_patches.shape)
        return BytePrediction(loss=nats.mean(), logits=logits, nats=nats)


class bGPTLMHeadModel(ByteModel):
    """The generative byte model: a patch-level and a byte-level decoder (paper, 3.1 and 3.2).

    Args:
        patch_config: GPT2Config of the patch-level decoder.
        byte_config: GPT2Config of the byte-level decoder.

    Raises:
        ValueError: the two do not fit each other.
    """

    def __init__(self, patch_config, byte_config):
        super().__init__(byte_config)
        patch_size = byte_config.n_positions - 1
        if getattr(patch_config, "patch_size", patch_size) != patch_size or patch_config.n_embd != byte_config.n_embd:
            raise ValueError("patch_config and byte_config differ in PATCH_SIZE (byte positions less one) or in width")
        patch_config = copy.deepcopy(patch_config)
        patch_config.patch_size = patch_size
        self.patch_level_decoder = PatchLevelDecoder(patch_config)
        self.byte_level_decoder = ByteLevelDecoder(byte_config)

    def forward(self, patches, masks, targets=None):
        """Returns the BytePrediction of all real patches but the first of each sequence, in order of sequence, patch.

        Args:
            patches: int64 (B, P, S) or (B, P·S).
            masks: integers (B, P), 1 at real patches, 0 at the padding on the right.
            targets: bool (B, P-1), which of patches 1.. to predict; None = all real ones.
        """
        patches = patches.reshape(len(patches), -1, self.patch_level_decoder.patch_size)  # (B, P·S) -> (B, P, S)
        encoded, ragged = self.patch_level_decoder.encode(patches, masks)  # (N real patches, D)
        if targets is None:
            targets = masks[:, 1:] == 1  # (B, P-1)
        sequence, before = targets.nonzero(as_tuple=True)  # (N,) each: the targets' sequences, and the patches before them
        sequence, before = sequence.to(patches.device), before.to(patches.device)
        # index_select: its gradient is added up faster than that of indexing
        encoded = encoded.index_select(0, ragged.starts[sequence] + before)  # (N, D)
        return self.byte_level_decoder(encoded, patches[sequence, before + 1])


class bGPTForClassification(ByteModel):
    """The classifier: the mean of the patch-level outputs over a file's real patches, then one linear layer (paper, 3.3).

    Args:
        patch_config: GPT2Config of the patch-level decoder; see `PatchLevelDecoder`.
        num_labels: number of labels.
    """

    def __init__(self, patch_config, num_labels):
        super().__init__(patch_config)
        self.patch_level_decoder = PatchLevelDecoder(patch_config)
        self.classifier = nn.Linear(patch_config.n_embd, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)

    def forward(self, patches, masks=None):
        """Returns logits (B, labels), the same for a file whatever it is batched with.

        Args:
            patches: int64 (B, P, S) or (B, P·S).
            masks: integers (B, P), 1 at real patches; None = all are real.
        """
        encoded = self.patch_level_decoder(patches, masks).last_hidden_state  # (B, P, D), 0 at padding
        counts = encoded.shape[1] if masks is None else masks.sum(1, keepdim=True).to(encoded.device)  # (B, 1)
        return self.classifier(encoded.sum(1) / counts)


def compile_model(model):
    """Has torch.compile fuse the operations of the blocks of a model's decoders; names and weights stay what they are.

    Only what comes before and after the attention of a block is compiled, once for all layers of a decoder and for any
    number of rows.
    """
    for decoder in model.children():
        if isinstance(decoder, ByteModel):
            decoder.parts = tuple(torch.compile(part, dynamic=True) for part in (project_qkv, finish_block))


def sample_targets(masks, most, rng):
    """Draws which target patches of a micro-batch go through the byte-level decoder in training.

    Args:
        masks: integers (B, P), 1 at real patches.
        most: how many at most; 0 = all.
        rng: numpy Generator.

    Returns:
        bool (B, P-1).
    """
    targets = masks[:, 1:] == 1
    where = targets.nonzero()  # (N, 2)
    if most == 0 or len(where) <= most:
        return targets
    kept = where[rng.permutation(len(where))[:most]]
    targets = torch.zeros_like(targets)
    targets[kept[:, 0], kept[:, 1]] = True
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and cached generation
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a symbol is drawn from the model's distribution; the defaults draw from it as it is."""

    top_k: int = 0  # the most likely symbols to draw among; 0 = all
    top_p: float = 1.0  # draw among the fewest symbols whose total probability exceeds this; 1 = all
    temperature: float = 1.0  # 0 = the most likely symbol


def filter_probabilities(logits, sampling):
    """Returns the distribution to draw from, float64 (B, V), rows summing to 1.

    In this order: softmax; the top_k most likely symbols; the smallest set of them, most likely first, whose total
    probability exceeds top_p; the power 1/temperature. Among equals the lower symbol comes first.

    Args:
        logits: (B, V), any float type.
        sampling: a Sampling.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float64)
    if sampling.temperature == 0:
        return F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).double()
    if 0 < sampling.top_k < probabilities.shape[-1] or sampling.top_p < 1:
        ranked, symbols = probabilities.sort(dim=-1, descending=True, stable=True)  # (B, V) both
        if sampling.top_k:
            ranked[:, sampling.top_k :] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        if sampling.top_p < 1:
            before = ranked.cumsum(-1) - ranked  # probability of all symbols ahead
            ranked[before > sampling.top_p] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(ranked).scatter_(-1, symbols, ranked)
    if sampling.temperature != 1:
        # in logarithms, relative to the most likely symbol, so that low temperatures do not underflow
        logs = probabilities.log()
        probabilities = ((logs - logs.amax(-1, keepdim=True)) / sampling.temperature).exp()
    return probabilities / probabilities.sum(-1, keepdim=True)


def sample_symbols(logits, sampling, uniforms):
    """Draws one symbol per row: int64 (B,).

    Args:
        logits: (B, V).
        sampling: a Sampling.
        uniforms: float64 (B,) in [0, 1); each decides its row's symbol.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    sums = filter_probabilities(logits, sampling).cumsum(-1)  # (B, V)
    # the first symbol whose running sum exceeds the uniform; scaled by the last sum, which rounding keeps off 1
    return (sums <= (uniforms.unsqueeze(-1) * sums[:, -1:])).sum(-1).clamp(max=logits.shape[-1] - 1)


class PackedLinear:
    """A linear layer for few rows at a time; on a CPU, its weight is laid out once in the way that oneDNN reads it.

    PyTorch's own product lays the weight out anew in every call; for a few dozen rows that takes as long as the product.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        gelu: whether the tanh-GELU follows.
    """

    def __init__(self, weight, bias=None, gelu=False):
        self.weight, self.bias, self.gelu = weight, bias, gelu
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if weight.dtype != torch.float32:
            self.packed = self.packed and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)  # best for 32 rows, good for all

    def __call__(self, x):
        """Returns (N, out) for x (N, in). A row's numbers do not depend on the other rows, nor on how many there are."""
        if not self.packed:
            x = F.linear(x, self.weight, self.bias)
            return F.gelu(x, approximate="tanh") if self.gelu else x
        if len(x) == 1 and x.dtype == torch.float32:  # for a single row, oneDNN adds up in another order
            return self(torch.cat((x, x)))[:1]
        then = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *then)


class Blocks:
    """The blocks and the last layer norm of a GPT2Model, for inference on rows (N, D) of any sequences.

    Args:
        gpt2: a GPT2Model of `make_configs`, in eval mode.
    """

    def __init__(self, gpt2):
        assert gpt2.config.activation_function == "gelu_pytorch_tanh"  # see _fused
        self.num_heads, self.last_norm = gpt2.config.n_head, gpt2.ln_f
        self.layers = [
            (
                block.ln_1,
                PackedLinear(block.attn.c_attn.weight.t(), block.attn.c_attn.bias),
                PackedLinear(block.attn.c_proj.weight.t(), block.attn.c_proj.bias),
                block.ln_2,
                PackedLinear(block.mlp.c_fc.weight.t(), block.mlp.c_fc.bias, gelu=True),
                PackedLinear(block.mlp.c_proj.weight.t(), block.mlp.c_proj.bias),
            )
            for block in gpt2.h
        ]

    def __call__(self, x, attend):
        """Returns (N, D) for x (N, D), positions added.

        Args:
            attend: function (layer, qkv) with qkv (N, 3, H, 64), the queries, keys and values; returns (N, D).
        """
        for layer, (norm_1, qkv, attended, norm_2, inner, outer) in enumerate(self.layers):
            # (N, D) -> (N, 3·D) -> (N, 3, H, 64)
            x = x + attended(attend(layer, qkv(norm_1(x)).view(len(x), 3, self.num_heads, HEAD_SIZE)))
            x = x + outer(inner(norm_2(x)))
        return self.last_norm(x)


def round_up(number, multiple):
    """Returns the smallest multiple of `multiple` that is `number` or more."""
    return -(-number // multiple) * multiple


def attend_once(queries, keys, values, mask=None):
    """Returns the attention (B, D) of one query for each row. A row's numbers do not depend on the other rows.

    PyTorch's scaled_dot_product_attention is no faster for one query on a CPU, and the last digits of what it returns
    there depend on the row's place in the batch.

    Args:
        queries: (B, H, 64).
        keys, values: (B, H, T, 64); T must be a multiple of 16, if it depends on other rows.
        mask: (B, 1, 1, T), added to the scores.
    """
    scores = torch.matmul((queries * HEAD_SIZE**-0.5).unsqueeze(2), keys.transpose(2, 3))  # (B, H, 1, T)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), values).flatten(1)  # (B, H, 1, 64) -> (B, D)


class KVCache:
    """Keys and values of every layer of a GPT-2 for a batch of sequences, allocated once.

    On a CPU they are float32 also for a bf16 model: PyTorch's attention of one query is then up to three times faster.

    Attributes:
        keys, values: (layers, B, H, T, 64), T the number of positions, rounded up to a multiple of 16.
    """

    def __init__(self, gpt2, batch_size):
        config = gpt2.config
        shape = (config.n_layer, batch_size, config.n_head, round_up(config.n_positions, 16), HEAD_SIZE)
        dtype = torch.float32 if gpt2.device.type == "cpu" else gpt2.dtype
        self.keys, self.values = torch.zeros(2, *shape, dtype=dtype, device=gpt2.device)


class PatchWriter:
    """Writes a batch of sequences, one patch of all of them at a time. Every buffer is allocated once.

    A row of the batch is one sequence. What comes after its newest whole patch is written from that patch, from the
    keys and values of those before it, and from the row's own random numbers.

    Args:
        model: bGPTLMHeadModel in eval mode.
        batch_size: B, the number of rows.
        sampling: a Sampling.
        fixed_shapes: compute with few different shapes, rounded up to powers of two; the results are the same. None = on
            CUDA only, where each shape is captured once as a graph.

    Attributes:
        captures: whether steps run as CUDA graphs.
    """

    def __init__(self, model, batch_size, sampling, fixed_shapes=None):
        patch_level, gpt2 = model.patch_level_decoder, model.byte_level_decoder.base.transformer
        self.model, self.patch_level, self.sampling, self.device = model, patch_level, sampling, model.device
        self.size, self.length, self.batch_size = patch_level.patch_size, patch_level.config.n_positions, batch_size
        self.captures = self.device.type == "cuda"
        self.fixed_shapes = self.captures if fixed_shapes is None else fixed_shapes
        self.graphs = {}  # (rows, longest) -> captured graph, its results
        self.patch_blocks, self.byte_blocks = Blocks(patch_level.base), Blocks(gpt2)
        self.symbol_vectors, self.symbol_positions = gpt2.wte, gpt2.wpe.weight
        self.head = PackedLinear(model.byte_level_decoder.base.lm_head.weight)
        self.patch_cache, self.byte_cache = KVCache(patch_level.base, batch_size), KVCache(gpt2, batch_size)
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=self.device)
        self.newest = whole(batch_size, self.size)  # (B, S), the newest whole patch of each row
        self.positions = whole(batch_size)  # (B,), where it stands
        self.given = whole(batch_size, self.size)  # (B, S), the beginning of the patch after it, if a prompt ends within
        self.num_given = whole(batch_size)  # (B,), how many symbols of that are given
        self.uniforms = torch.zeros(batch_size, self.length, self.size, dtype=torch.float64, device=self.device)

    def admit(self, places, prompts):
        """Puts prompts into rows of the batch.

        All but their last whole patches go through the patch-level decoder together; those go with the first `step`.

        Args:
            places: list of rows, one for each prompt.
            prompts: list of Prompts.
        """
        patches = []  # the whole patches of each prompt, int64 (P, S)
        for place, prompt in zip(places, prompts, strict=True):
            symbols = torch.from_numpy(np.asarray(prompt.symbols, dtype=np.int64))
            count = len(symbols) // self.size
            patches.append(symbols[: count * self.size].view(count, self.size))
            rest = symbols[count * self.size :]
            self.newest[place] = patches[-1][-1].to(self.device)
            self.positions[place] = count - 1
            self.given[place, : len(rest)] = rest.to(self.device)
            self.num_given[place] = len(rest)
            drawn = np.random.default_rng(prompt.stream).random(self.length * self.size).reshape(self.length, self.size)
            self.uniforms[place] = torch.from_numpy(drawn).to(self.device)
        longer = [(place, held[:-1]) for place, held in zip(places, patches) if len(held) > 1]
        while longer:
            # as many as fit in one pass, so that the memory this takes is bounded
            count, taken = 0, 0
            while count < len(longer) and (count == 0 or taken + len(longer[count][1]) <= PREFILL_PATCHES):
                taken += len(longer[count][1])
                count += 1
            self._prefill(*zip(*longer[:count]))
            longer = longer[count:]

    def _prefill(self, places, patches):
        """Runs patches, a list of int64 (P, S), through the patch-level decoder into the cache's rows `places`.

        The N patches in all pass the layers without padding, see `Ragged`.
        """
        ragged = Ragged([len(held) for held in patches], self.device)
        place = torch.tensor(places, device=self.device)[ragged.sequence]  # (N,), the row of the cache that each patch goes to

        def attend(layer, qkv):
            qkv = qkv.to(self.patch_cache.keys.dtype)
            self.patch_cache.keys[layer, place, :, ragged.position] = qkv[:, 1]
            self.patch_cache.values[layer, place, :, ragged.position] = qkv[:, 2]
            return ragged.attend(qkv).flatten(1).to(self.patch_level.dtype)  # (N, D)

        padded = nn.utils.rnn.pad_sequence(patches, batch_first=True).to(self.device)  # (B, P, S)
        embedded = self.patch_level.embed(padded[ragged.sequence, ragged.position])  # (N, D)
        self.patch_blocks(embedded + self.patch_level.base.wpe(ragged.position), attend)

    def move(self, source, target, count):
        """Moves a row, whose cache holds `count` patches, to another row."""
        for state in (self.newest, self.positions, self.given, self.num_given, self.uniforms):
            state[target] = state[source]
        for state in (self.patch_cache.keys, self.patch_cache.values):
            state[:, target, :, :count] = state[:, source, :, :count]

    def step(self, num_rows, longest):
        """Writes the next patch of each of the first `num_rows` rows, and waits for the device once.

        Args:
            num_rows: 1 or more.
            longest: the most whole patches that one of them has.

        Returns:
            patches: int64 (num_rows, S), the given symbols, then drawn ones; those behind a drawn 256 are of no use.
            nats: float64 (num_rows,), minus the log-probability of the drawn symbols, the 256 that ends them included.
        """
        rows, longest = num_rows, round_up(longest, 16)
        if self.fixed_shapes:
            rows = min(1 << (num_rows - 1).bit_length(), self.batch_size)
            longest = min(1 << (max(longest, 64) - 1).bit_length(), self.patch_cache.keys.shape[3])
        patches, nats = (self._replay if self.captures else self._write)(rows, longest)
        self.newest[:rows] = patches
        self.positions[:rows] = (self.positions[:rows] + 1).clamp(max=self.length - 2)  # rows in use stay below
        self.num_given[:rows] = 0
        results = torch.cat((patches.double(), nats.unsqueeze(1)), dim=1)[:num_rows].cpu().numpy()  # one copy: (B, S + 1)
        return results[:, :-1].astype(np.int64), results[:, -1]

    def _replay(self, rows, longest):
        """What `_write` returns, from a CUDA graph of it, which is captured when its shapes come up first."""
        if (rows, longest) not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in a first call, which cannot be captured
                self._write(rows, longest)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            shared = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=shared):
                results = self._write(rows, longest)
            self.graphs[rows, longest] = graph, results
        graph, results = self.graphs[rows, longest]
        graph.replay()
        return results

    def _write(self, rows, longest):
        """Computes the next patch of the first `rows` rows and its nats, see `step`, on the device alone.

        It changes nothing but the caches, at the positions of its own patches, so that it may run twice.
        """
        encoded = self.step_patch_level(rows, longest)  # (B, D)
        given, num_given = self.given[:rows], self.num_given[:rows]
        uniforms = self.uniforms[torch.arange(rows, device=self.device), self.positions[:rows] + 1]  # (B, S)
        patches, logits, x = torch.empty_like(given), [], encoded

        def attend(layer, qkv):
            queries, keys, values = qkv.to(self.byte_cache.keys.dtype).unbind(1)  # (B, H, 64) each
            self.byte_cache.keys[layer, :rows, :, j] = keys
            self.byte_cache.values[layer, :rows, :, j] = values
            held = (self.byte_cache.keys[layer, :rows, :, : j + 1], self.byte_cache.values[layer, :rows, :, : j + 1])
            return attend_once(queries, *held).to(encoded.dtype)

        for j in range(self.size):
            logits.append(self.head(self.byte_blocks(x + self.symbol_positions[j], attend)))  # (B, V)
            drawn = sample_symbols(logits[-1], self.sampling, uniforms[:, j])
            patches[:, j] = torch.where(j < num_given, given[:, j], drawn)
            x = self.symbol_vectors(patches[:, j])  # (B, D)
        # S of (B, V) -> (B, V, S), as cross_entropy wants it -> (B, S)
        nats = F.cross_entropy(torch.stack(logits, dim=2).float(), patches, reduction="none").double()
        is_drawn = torch.arange(self.size, device=self.device) >= num_given.unsqueeze(1)  # (B, S)
        ends = (is_drawn & (patches == END)).long()
        return patches, (nats * (is_drawn & (ends.cumsum(1) - ends == 0))).sum(1)

    def step_patch_level(self, rows, longest):
        """Runs the newest patches of the first `rows` rows through the patch-level decoder: (B, D)."""
        positions = self.positions[:rows]
        row = torch.arange(rows, device=self.device)
        # (B, 1, 1, longest), added to the attention's scores: a row sees what it holds, not what other rows hold beyond
        unseen = torch.arange(longest, device=self.device) > positions.unsqueeze(1)
        mask = self.patch_cache.keys.new_zeros(rows, longest).masked_fill(unseen, -torch.inf).view(rows, 1, 1, longest)

        def attend(layer, qkv):
            queries, keys, values = qkv.to(mask.dtype).unbind(1)  # (B, H, 64) each
            self.patch_cache.keys[layer, row, :, positions] = keys
            self.patch_cache.values[layer, row, :, positions] = values
            held = (self.patch_cache.keys[layer, :rows, :, :longest], self.patch_cache.values[layer, :rows, :, :longest])
            return attend_once(queries, *held, mask).to(self.patch_level.dtype)

        embedded = self.patch_level.embed(self.newest[:rows])  # (B, D)
        return self.patch_blocks(embedded + self.patch_level.base.wpe(positions), attend)


@dataclasses.dataclass
class Prompt:
    """What a sequence begins with."""

    key: object  # handed back with the continuation
    symbols: np.ndarray  # (n,) integers: the extension patch, n >= S, then any number of symbols, also within a patch
    stream: list[int]  # seeds the sequence's own random numbers: whole numbers, 0 or more


@dataclasses.dataclass
class Continuation:
    """What the model writes after a prompt."""

    key: object
    symbols: np.ndarray  # int64 (n,) without the 256 that ended it
    cut_off: bool  # PATCH_LENGTH patches were full before it ended
    nats: float  # minus the log-probability of the symbols, and of the 256 that ended them, see `mean_log_probability`

    def mean_log_probability(self):
        """Returns the mean log-probability in nats of the drawn symbols, the 256 that ended them included.

        It is the model's own: of its softmax, before TOP_K, TOP_P and TEMPERATURE.
        """
        return -self.nats / (len(self.symbols) + (not self.cut_off))

    def bits_per_byte(self):
        """Returns the bits of the drawn symbols and of the 256 that ended them, by drawn bytes; None if there are none."""
        return self.nats / math.log(2) / len(self.symbols) if len(self.symbols) else None


class _Row:
    """One sequence under way."""

    def __init__(self, prompt, patch_size):
        self.prompt = prompt
        self.whole, self.num_given = divmod(len(prompt.symbols), patch_size)  # patches, and symbols after those
        self.written = []  # patches, int64 (S,) each; the first begins with the given symbols
        self.nats = 0.0

    def add(self, patch, nats):
        """Takes the next patch; returns whether it ends the sequence."""
        given = self.num_given if not self.written else 0
        self.written.append(patch)
        self.whole += 1
        self.nats += float(nats)
        return END in patch[given:]

    def finish(self, cut_off):
        """Returns the Continuation."""
        symbols = np.concatenate(self.written)[self.num_given :]
        if not cut_off:
            symbols = symbols[: np.flatnonzero(symbols == END)[0]]
        return Continuation(self.prompt.key, symbols.copy(), cut_off, self.nats)


@torch.inference_mode()
def generate(model, prompts, batch_size, sampling, on_patches=None):
    """Continues prompts of any lengths, many at once; yields each Continuation as soon as it ends.

    A sequence ends at its first drawn 256, or when PATCH_LENGTH patches are full. Its place is then taken by the next
    prompt. Keys and values are cached on both levels: nothing is computed twice. A sequence's random numbers are its
    own, so that what it becomes does not depend on `batch_size` nor on the other prompts.

    Args:
        model: bGPTLMHeadModel in eval mode.
        prompts: iterable of Prompts, read as places become free. Each holds fewer than L·S symbols.
        batch_size: most sequences at once.
        sampling: a Sampling.
        on_patches: called with the number of patches written, after each step.

    Yields:
        Continuation, in the order in which they end.
    """
    writer = PatchWriter(model, batch_size, sampling)
    prompts, rows = iter(prompts), [None] * batch_size
    while True:
        # waiting prompts take the free places, all together; places that stay free are closed by the last rows
        free = [place for place, row in enumerate(rows) if row is None]
        admitted = list(itertools.islice(prompts, len(free)))
        writer.admit(free[: len(admitted)], admitted)
        for place, prompt in zip(free, admitted):
            rows[place] = _Row(prompt, writer.size)
        for place in reversed(free[len(admitted) :]):
            last = rows.pop()
            if place < len(rows):
                writer.move(len(rows), place, last.whole - 1)  # the patch just written is not in the cache yet
                rows[place] = last
        if not rows:
            return

        patches, nats = writer.step(len(rows), max(row.whole for row in rows))
        if on_patches is not None:
            on_patches(len(rows))
        for place, row in enumerate(rows):
            ended = row.add(patches[place], nats[place])
            if ended or row.whole == writer.length:
                rows[place] = None
                yield row.finish(cut_off=not ended)


# ---------------------------------------------------------------------------------------------------------------------
# The index of a folder of outputs
# ---------------------------------------------------------------------------------------------------------------------

INDEX_NAMES = ("index.tsv", "index.html")
INDEX_COLUMNS = ("file", "source", "bytes", "bits per byte", "cut off or ended", "seed")
SHOWN_TEXT, SHOWN_HEX = 2000, 256  # most bytes of a file that its text or hex dump on the page stands for
SHOWN_BYTES = 2**24  # most bytes of files that a page holds in all; the files after that are listed with their figures only

_IMAGES = {"bmp": "bmp", "gif": "gif", "jpeg": "jpeg", "jpg": "jpeg", "png": "png", "svg": "svg+xml", "webp": "webp"}
_SOUNDS = {"flac": "flac", "mp3": "mpeg", "ogg": "ogg", "wav": "wav"}

# the policy: whatever an output holds, the page runs no script and loads nothing
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bGPT: {count:,} outputs</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(32em, 1fr)); gap: 1em; }}
article {{ border: 1px solid #bbb; border-radius: 4px; padding: .7em; min-width: 0; content-visibility: auto; }}
h2 {{ font-size: 1em; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .2em 0 .6em; color: #555; overflow-wrap: anywhere; }}
pre {{ margin: 0; max-height: 20em; overflow: auto; background: #f4f4f4; padding: .4em; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 11px; }}
img {{ max-width: 100%; min-width: 8em; image-rendering: pixelated; }}
</style></head><body><h1>bGPT: {count:,} outputs</h1><p>{note}</p><main>
{articles}
</main></body></html>
"""


def escape_name(name):
    """Returns a name with backslashes and all that is not printable (tabs, newlines, broken UTF-8) as escapes: \\t, \\xff."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def unescape_name(text):
    """Returns the name that `escape_name` made a text of."""
    escapes = r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[tnr\\])"
    return re.sub(escapes, lambda match: match[0].encode().decode("unicode_escape"), text)


def read_index(path):
    """Returns {file: the fields of its line, as they stand there} of an index.tsv; None if the file is missing or no index."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = [line.split("\t") for line in file.read().split("\n") if line]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if not lines or lines[0] != list(INDEX_COLUMNS):
        return None
    return {fields[0]: fields for fields in lines[1:] if len(fields) == len(INDEX_COLUMNS)}


def write_index(folder, rows):
    """Writes index.tsv and index.html into a folder of outputs.

    What an earlier run listed stays listed, as long as its file is there. A file of one of these names that is not an
    index is kept under another name.

    Args:
        folder: where the outputs are.
        rows: list of tuples of INDEX_COLUMNS: path within the folder, path of the input or "", bytes, bits per byte or
            None, "cut off" or "ended", seed.
    """
    table, page = (os.path.join(folder, name) for name in INDEX_NAMES)
    listed = read_index(table)
    if listed is None:
        listed = {}
        keep_backup(table)
        keep_backup(page)
    for file, source, num_bytes, bits, how, seed in rows:
        bits = "" if bits is None else f"{bits:.4f}"
        listed[escape_name(file)] = [escape_name(file), escape_name(source), str(num_bytes), bits, how, str(seed)]
    # files counted through in their names stand in that order: 2 before 10
    names = sorted(listed, key=lambda name: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    names = [name for name in names if os.path.isfile(os.path.join(folder, unescape_name(name)))]
    with replacing(table) as file:
        file.write("".join("\t".join(fields) + "\n" for fields in [INDEX_COLUMNS, *map(listed.get, names)]).encode())
    articles, shown = [], 0
    for name in names:
        path = os.path.join(folder, unescape_name(name))
        size, content = os.path.getsize(path), None
        if shown + size <= SHOWN_BYTES:
            shown += size
            with open(path, "rb") as file:
                content = file.read()
        articles.append(_article(listed[name], content, extension_of(path).lower()))
    note = f"All figures: {INDEX_NAMES[0]}. Contents are shown up to {SHOWN_BYTES / 2**20:.0f} MiB in all."
    with replacing(page) as file:
        file.write(_PAGE.format(count=len(names), note=note, articles="\n".join(articles)).encode())


def _article(fields, content, extension):
    """Returns a file's part of the page: its figures, and its content (bytes) unless that is None."""
    file, source, num_bytes, bits, how, seed = map(html.escape, fields)
    figures = [f"from {source}"] * bool(source) + [f"{num_bytes} bytes"] + [f"{bits} bits per byte"] * bool(bits)
    figures = ", ".join([*figures, how, f"seed {seed}"])
    shown = "" if content is None else _show(content, extension)
    return f"<article><h2>{file}</h2><p>{figures}</p>{shown}</article>"


def _show(content, extension):
    """Returns a file's content as HTML: an image, a sound, text, or its first bytes in hexadecimal."""
    if extension in _IMAGES:
        return f'<img alt="not a readable image" src="{_data_uri(content, "image/" + _IMAGES[extension])}">'
    if extension in _SOUNDS:
        return f'<audio controls preload="metadata" src="{_data_uri(content, "audio/" + _SOUNDS[extension])}"></audio>'
    text = content[:SHOWN_TEXT].decode("utf-8", "replace").replace("\r\n", "\n")
    odd = {c for c in text if not c.isprintable() and c not in "\n\t"}
    most = SHOWN_TEXT
    if extension not in ("abc", "txt") and (odd or "\ufffd" in text[:-1]):  # the last character may be cut through
        lines = []
        for start in range(0, min(len(content), SHOWN_HEX), 16):
            part = content[start : min(start + 16, SHOWN_HEX)]
            printable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            lines.append(f"{start:04x}  {part.hex(' '):<47}  {printable}")
        text, odd, most = "\n".join(lines), (), SHOWN_HEX
    for character in odd:
        text = text.replace(character, "\ufffd")
    if len(content) > most:
        text += f"\n… and {len(content) - most:,} more bytes"
    return f"<pre>{html.escape(text)}</pre>"


def _data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Opens a new binary file that takes the place of `path`, whole and synced, if the block ends without an error.

    At any moment the path holds the whole old file or the whole new one. After an error nothing is left beside it; after
    a kill, what `remove_leftovers` removes.
    """
    path = os.path.realpath(path)  # a link stays one, and what it leads to is replaced
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(prefix=_temporary_prefix(path), suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes files that only their owner reads: give what open() would have given
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None  # a failed write does not know its file's name
        raise
    if os.name == "posix":  # the new name itself is on the disk only after its folder is synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary_prefix(path):
    """Returns how the names begin under which `replacing` writes a file; of fixed length, since names have a limit."""
    return f".bgpt-{zlib.crc32(os.fsencode(os.path.basename(path))):08x}-"


def remove_leftovers(path):
    """Removes the unfinished files that runs killed in the middle of saving `path` left beside it."""
    path = os.path.realpath(path)
    for name in os.listdir(os.path.dirname(path)):
        if name.startswith(_temporary_prefix(path)) and name.endswith(".tmp"):
            os.unlink(os.path.join(os.path.dirname(path), name))


def lock_beside(path, name):
    """Returns an open file whose lock keeps other runs from the one at `path` until it is closed, or the process ends.

    Raises:
        UserError: another run holds the lock; names the constant that holds the path.
    """
    path = os.path.realpath(path)
    lock_path = os.path.join(os.path.dirname(path), f"{_temporary_prefix(path)}lock")
    while True:
        lock = open(lock_path, "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which worker processes would hold on to
        except (BlockingIOError, PermissionError):
            raise UserError(f"{name}: another run is at work at {path!r}; wait for its end, or give another path") from None
        except OSError:
            return lock  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock_path)):
                return lock
        lock.close()  # the run that held it ended in between, and took the file away: nobody else would find this lock


@contextlib.contextmanager
def locked_folder(folder, name):
    """Keeps other runs out of a folder of outputs, see `lock_beside`; removes what killed ones left unfinished there.

    That is, unfinished files that nobody has written to for an hour: a training run may be saving somewhere in the folder.
    """
    lock = lock_beside(os.path.join(folder, INDEX_NAMES[0]), name)
    try:
        for inner, _, names in os.walk(folder):
            for leftover in (os.path.join(inner, name) for name in names if re.fullmatch(r"\.bgpt-[0-9a-f]{8}-.*\.tmp", name)):
                with contextlib.suppress(FileNotFoundError):  # finished at this moment
                    if time.time() - os.lstat(leftover).st_mtime > 3600:
                        os.unlink(leftover)
        yield
    finally:
        os.unlink(lock.name)
        lock.close()


def save_checkpoint(path, checkpoint):
    """Saves a dict of plain types and tensors at `path`, see `replacing`."""
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch.save ends when a write fails, on a full disk for instance
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path, name, mmap=False):
    """Returns the dict in a checkpoint, its tensors on the CPU. No code that a file may hold is ever run.

    Args:
        path: the file.
        name: the constant that holds the path, for messages.
        mmap: leave the tensors in the file until they are used; only for files that torch.save wrote since 1.6.

    Raises:
        UserError: the file is missing, cannot be read, is no checkpoint, or needs more than plain types and tensors.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{name}: {path!r} {what}; it must be a checkpoint (.pth)")
    try:
        with warnings.catch_warnings(action="ignore"):  # what the reader thinks of a file that is none
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever its readers do: pickle, zip, end of file, key, type…
        if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:  # that is a seek in a file cut short
            raise UserError(f"{name}: cannot read {path!r}: {error.strerror}") from None
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            why = "it holds more than plain types and tensors, which could run code, so it is refused"
        else:
            why = "it is damaged, cut short, or no checkpoint at all"
        raise UserError(f"{name}: cannot load {path!r}: {why}") from None
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) and _is_whole(state[key]) for key in state):
        raise UserError(f"{name}: {path!r} holds no bGPT checkpoint: its 'model' should be a dict of dense tensors")
    checkpoint["model"] = {key: value for key, value in state.items() if not re.search(r"\.attn\.(masked_)?bias$", key)}
    return checkpoint


def _is_whole(value):
    """Returns whether a value is a plain tensor whose numbers are all there; a few bytes can claim any shape."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size() and not value.is_complex()


@dataclasses.dataclass
class ModelSizes:
    """The sizes of a model, as its tensors' shapes tell them; named as in config.py."""

    PATCH_SIZE: int
    PATCH_LENGTH: int
    HIDDEN_SIZE: int
    PATCH_NUM_LAYERS: int
    BYTE_NUM_LAYERS: int | None = None  # None: no byte-level decoder, so a classifier
    num_labels: int | None = None  # None: no classifier head, so a generative model

    @property
    def kind(self):
        """What such a model is called."""
        return "generative model" if self.num_labels is None else "classifier"

    def build(self, dropout=0.1):
        """Returns a new model of these sizes, with random weights."""
        configs = make_configs(
            self.PATCH_SIZE, self.PATCH_LENGTH, self.HIDDEN_SIZE, self.PATCH_NUM_LAYERS, self.BYTE_NUM_LAYERS or 1, dropout
        )
        if self.num_labels is not None:
            return bGPTForClassification(configs[0], self.num_labels)
        return bGPTLMHeadModel(*configs)


def model_sizes(state, where):
    """Returns the ModelSizes of a checkpoint's `model` dict.

    Raises:
        UserError: the tensors that tell the sizes are missing or do not fit each other.
    """

    def shape(key):
        if key not in state or state[key].dim() != 2:
            raise UserError(f"{where}: {key} is missing or not a matrix, so the model's sizes are unknown")
        return state[key].shape

    def layers(prefix):
        found = {m[1] for m in (re.match(rf"{re.escape(prefix)}\.h\.(\d+)\.", key) for key in state) if m}
        if not found or found != {str(layer) for layer in range(len(found))}:
            raise UserError(f"{where}: its layers should be {prefix}.h.0, .h.1 and so on, without gaps")
        return len(found)

    width, inputs = shape("patch_level_decoder.patch_embedding.weight")
    if inputs % NUM_SYMBOLS or inputs == 0 or width % HEAD_SIZE or width == 0:
        raise UserError(
            f"{where}: patch_embedding.weight is {width} x {inputs}; it should be a multiple of {HEAD_SIZE} x one of {NUM_SYMBOLS}"
        )
    sizes = ModelSizes(
        PATCH_SIZE=inputs // NUM_SYMBOLS,
        PATCH_LENGTH=shape("patch_level_decoder.base.wpe.weight")[0],
        HIDDEN_SIZE=width,
        PATCH_NUM_LAYERS=layers("patch_level_decoder.base"),
    )
    if "classifier.weight" in state:
        sizes.num_labels = shape("classifier.weight")[0]
    else:
        sizes.BYTE_NUM_LAYERS = layers("byte_level_decoder.base.transformer")
    if sizes.PATCH_LENGTH < 2 or sizes.num_labels == 0:
        raise UserError(f"{where}: {sizes.PATCH_LENGTH} patch positions and {sizes.num_labels} labels make no model")
    return sizes


def load_weights(model, state, where):
    """Copies a checkpoint's `model` dict into a model.

    Raises:
        UserError: lists every tensor that is missing, unknown or of another shape; the model is then unchanged.
    """
    own = model.state_dict()
    tied, source = "byte_level_decoder.base.lm_head.weight", "byte_level_decoder.base.transformer.wte.weight"
    if tied in own and source in state:
        state = {tied: state[source], **state}  # files may leave out what is tied anyway
        if state[tied].shape != state[source].shape or not torch.equal(state[tied], state[source]):
            raise UserError(f"{where}: {tied} differs from {source}, to which it is tied")
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong += [f"{key} holds values that are no numbers" for key in own if key in state and not state[key].isfinite().all()]
    if wrong:
        raise UserError(f"{where} does not fit the model:\n  " + "\n  ".join(wrong))
    model.load_state_dict(state)


def load_optimizer(optimizer, state):
    """Loads an AdamW's moments; raises one of many errors if they are none for its parameters, before they are used.

    The fused step trusts the shapes that it is given. Rates and other settings stay those of the optimizer.
    """
    groups, parameters = optimizer.state_dict()["param_groups"], optimizer.param_groups[0]["params"]
    for place, values in state["state"].items():
        if set(values) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"optimizer: it holds {sorted(map(str, values))}")
        for name in ("exp_avg", "exp_avg_sq"):
            if not _is_whole(values[name]) or values[name].shape != parameters[place].shape or not values[name].isfinite().all():
                raise ValueError(f"optimizer: an {name} is not {tuple(parameters[place].shape)} numbers")
        if torch.as_tensor(values["step"]).numel() != 1 or not math.isfinite(values["step"]):
            raise ValueError("optimizer: a step is not one number")
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def load_model(path, name, dropout=0.1):
    """Returns (model, checkpoint) with the sizes and weights of a checkpoint, whatever config.py says.

    Raises:
        UserError: see `load_checkpoint`, `model_sizes` and `load_weights`.
    """
    checkpoint = load_checkpoint(path, name)
    where = f"{name}: {path!r}"
    model = model_sizes(checkpoint["model"], where).build(dropout)
    load_weights(model, checkpoint["model"], where)
    return model, checkpoint


def label_list(checkpoint, where):
    """Returns the labels of a classifier's checkpoint, by their indices; raises UserError where they do not fit its head."""
    labels, count = checkpoint.get("labels"), len(checkpoint["model"]["classifier.weight"])
    indices = list(labels.values()) if isinstance(labels, dict) else []
    if not all(type(index) is int for index in indices) or sorted(indices) != list(range(count)):
        raise UserError(f"{where}: its 'labels' should be a dict of {count} labels and their indices, 0 to {count - 1}")
    return [str(label) for label in sorted(labels, key=labels.get)]


def check_sizes(wanted, state, where):
    """Checks that a checkpoint's model has the sizes that config.py gives.

    Raises:
        UserError: names the kind of model that was expected, or the constants to change.
    """
    found = model_sizes(state, where)
    if found.kind != wanted.kind:
        raise UserError(f"{where} is a {found.kind}; here a {wanted.kind} is needed")
    if found.num_labels != wanted.num_labels:
        raise UserError(
            f"{where} has {found.num_labels} labels, but the files of TRAIN_FOLDERS have {wanted.num_labels}: give another path; "
            "to start from its patch-level decoder, set PRE_WEIGHTS_PATH to it and LOAD_FROM_PRE_CHECKPOINT to True"
        )
    differing = [
        field.name for field in dataclasses.fields(wanted) if getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differing:
        changes = ", ".join(f"{name} = {getattr(found, name)} (now {getattr(wanted, name)})" for name in differing)
        raise UserError(f"{where} is a model of other sizes: set {changes}, or give another path")


def load_sized_weights(model, sizes, path, name):
    """Loads a checkpoint's weights into a model of the ModelSizes that config.py gives; returns the checkpoint.

    Raises:
        UserError: see `load_checkpoint`, `check_sizes` and `load_weights`.
    """
    checkpoint = load_checkpoint(path, name)
    check_sizes(sizes, checkpoint["model"], f"{name}: {path!r}")
    load_weights(model, checkpoint["model"], f"{name}: {path!r}")
    return checkpoint


def load_pre_trained(model, sizes, labels, path, name):
    """Loads a checkpoint's patch-level decoder into a classifier, and its head if it has the same labels; says which.

    Args:
        model: the bGPTForClassification.
        sizes: its ModelSizes.
        labels: its {label: index}.
        path: a generative model's checkpoint or a classifier's.
        name: the constant that holds the path, for messages.

    Raises:
        UserError: see `load_checkpoint`, `check_sizes` and `load_weights`.
    """
    checkpoint, where = load_checkpoint(path, name), f"{name}: {path!r}"
    found = model_sizes(checkpoint["model"], where)
    # what the two need not have in common
    wanted = dataclasses.replace(sizes, BYTE_NUM_LAYERS=found.BYTE_NUM_LAYERS, num_labels=found.num_labels)
    check_sizes(wanted, checkpoint["model"], where)
    state = {key: value for key, value in checkpoint["model"].items() if not key.startswith(("byte_level_decoder.", "classifier."))}
    keep_head = found.num_labels is not None and set(label_list(checkpoint, where)) == set(labels)
    if keep_head:  # its rows in the order of `labels`
        rows = [checkpoint["labels"][label] for label in sorted(labels, key=labels.get)]
        state |= {key: checkpoint["model"][key][rows] for key in ("classifier.weight", "classifier.bias")}
    else:
        state |= {key: value for key, value in model.state_dict().items() if key.startswith("classifier.")}
    load_weights(model, state, where)
    print(f"a new run, from the patch-level decoder {'and the head ' if keep_head else ''}of {path}, a {found.kind}")


def latest_path(weights_path):
    """Returns where the latest state of a run lies, beside its best: weights.pth -> weights-last.pth."""
    stem, extension = os.path.splitext(weights_path)
    return f"{stem}-last{extension}"


def keep_backup(path):
    """Keeps the file at `path`, if there is one, as the first free of path.bak, path.bak2, …, and says so."""
    if not os.path.exists(path):
        return
    backup, number = f"{path}.bak", 1
    while os.path.lexists(backup):
        number += 1
        backup = f"{path}.bak{number}"
    print(f"{path} was not made by this run: kept as {backup}")
    try:
        os.link(path, backup)  # the path itself is never without its file
    except OSError:  # a file system without hard links
        with replacing(backup) as copied, open(path, "rb") as file:
            shutil.copyfileobj(file, copied)


# ---------------------------------------------------------------------------------------------------------------------
# Run set-up: device, precision, processes, signals, logging, errors
# ---------------------------------------------------------------------------------------------------------------------


def pick_device():
    """Returns the torch.device to run on: a CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, each with a device of its own, as torchrun started them; without torchrun, this one alone."""

    device: torch.device
    rank: int = 0  # the number of this process
    count: int = 1

    def sum(self, values):
        """Returns the sums over all processes of each of some numbers: a list of floats, or of an array a float64 array."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(sums)
        return sums.numpy() if isinstance(values, np.ndarray) else sums.tolist()

    def gather(self, value):
        """Returns the list of every process's `value`, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def distribute(self, model):
        """Returns what trains the model: itself, or PyTorch's wrapper that averages the gradients of all processes."""
        if self.count == 1:
            return model
        # With find_unused_parameters GPT-2's own embeddings of patches, which nothing uses, are no error, and gradients are
        # summed up in one and the same order from the first step on, so that a resumed run computes the same bits.
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)

    def agree(self, error=None):
        """Ends the run on all processes if one of them met an error (UserError or OSError); called by all together.

        Raises:
            UserError, OSError: this process is alone, and met it.
            SystemExit: status 1; the message was printed, once.
        """
        if error is not None and self.count == 1:
            raise error
        if self.sum([error is not None]) == [0]:
            return
        messages = self.gather(None if error is None else str(error))
        rank = next(rank for rank, message in enumerate(messages) if message is not None)
        where = "" if None not in messages else f"process {rank}: "
        self.leave(f"error: {where}{messages[rank]}", 1)

    @contextlib.contextmanager
    def together(self):
        """Runs a block in which a mistake that any process meets is the end of all; see `agree`."""
        error = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        self.agree(error)

    def leave(self, message, status):
        """Prints a message, once, and raises SystemExit on all processes; called by all together."""
        if self.rank == 0:
            tqdm.write(message, file=sys.stderr)
        if self.count > 1:
            dist.barrier()  # torchrun ends the others as soon as one has left: not before all is said
        raise SystemExit(status)


def gradients_stay(engine, stay):
    """Returns the context of a backward pass after which the gradients stay in each process, to be added to, if `stay`."""
    return engine.no_sync() if stay and hasattr(engine, "no_sync") else contextlib.nullcontext()


def start_processes():
    """Returns the Processes of a training run; those that torchrun started are connected, and only the first prints.

    Raises:
        UserError: there are more processes than GPUs.
    """
    tune_memory()
    device, count = pick_device(), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:  # some job systems set only the former
        return Processes(device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun: --nproc_per_node is {os.environ['LOCAL_WORLD_SIZE']}, but there are {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Processes(device, dist.get_rank(), count)


def pick_dtype(precision, device):
    """Returns the torch.dtype of PRECISION on a device.

    Raises:
        UserError: fp16 without CUDA.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UserError("PRECISION is 'fp16', which needs a CUDA GPU; on a CPU it may be auto, fp32 or bf16")
    if precision == "auto":
        if device.type == "cuda":
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if in_hardware else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device, dtype):
    """Returns the context in which a model with float32 weights computes in `dtype`."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def tune_memory():
    """Sets how this process uses memory on a CPU; called before the first product, by whatever trains or classifies.

    glibc keeps the memory of freed tensors for the next ones, instead of handing it back to the system each time: a step of
    training allocates the same large tensors over and over, and getting their pages anew took a fifth of it.

    oneDNN keeps 128 of the kernels that it makes for each shape of a product, instead of 1024. Nearly every batch of files of
    different lengths brings new shapes, whose kernels are of no use again: a run of 1.7 million parameters peaked at 1.9
    instead of 3.2 GB after 550 steps, at the same speed. A step has about 40; ONEDNN_PRIMITIVE_CACHE_CAPACITY in the
    environment asks for another number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # large blocks too come from the heap…
        mallopt(_M_TRIM_THRESHOLD, -1)  # …whose free end is never handed back


def make_folder(folder, name):
    """Makes a folder if it is missing, and checks that files can be written there.

    Raises:
        UserError: names the constant that holds the path, and why it cannot be used.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{name}: cannot write to the folder {folder!r}: {error.strerror}") from None


def check_writable(path, name):
    """Checks that a file can be written at `path`, and makes the folder that it is to lie in; see `make_folder`."""
    make_folder(os.path.dirname(path) or ".", name)
    if os.path.isdir(path):
        raise UserError(f"{name}: {path!r} is a folder; it must be a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{name}: {path!r} is read-only")


@contextlib.contextmanager
def delayed_signals(impatient):
    """Lets the step in hand finish before Ctrl-C or SIGTERM takes effect.

    Args:
        impatient: whether a second Ctrl-C acts at once.

    Yields a function that returns the number of the first such signal, 0 as long as there was none.
    """
    received = []

    def remember(number, frame):
        received.append(number)
        if received.count(signal.SIGINT) > 1 and impatient:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class NoLogger:
    """A logger that does nothing, in place of Weights & Biases when WANDB_LOG is False."""

    def log(self, values):
        pass

    def finish(self):
        pass


def make_logger(enabled, settings, run_id):
    """Returns an object with log(dict) and finish(): a Weights & Biases run, or a NoLogger.

    Without a login, and unless WANDB_MODE says otherwise, the run is kept on this machine, and a line says so.

    Args:
        enabled: whether to log there.
        settings: dict of the run's constants.
        run_id: names the run, so that one that goes on is one there too.
    """
    if not enabled:
        return NoLogger()
    import wandb  # here, so that nobody needs it who does not use it

    start = functools.partial(wandb.init, project="bGPT", id=run_id, resume="allow", config=settings)
    try:
        if "WANDB_MODE" in os.environ or wandb.api.api_key:
            return start()
        why = "not logged in (`wandb login` does that)"
    except (wandb.Error, ValueError) as error:  # no network, a wrong key, a WANDB_MODE that is none
        why = f"cannot start ({' '.join(str(error).split())})"
    print(f"wandb: {why}; this run is logged offline, in the folder wandb")
    return start(mode="offline")


class Unstoppable:
    """A text stream whose writing to a full disk or a closed pipe does not end the run: what it would have said is lost."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with _nobody_listens():
            return self._stream.write(text)

    def flush(self):
        with _nobody_listens():
            self._stream.flush()


@contextlib.contextmanager
def _nobody_listens():
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL_DISK, errno.EPIPE):
            raise


def run_main(main, override):
    """Runs a script's main function: a user's mistake becomes one message and exit status 1, Ctrl-C status 130.

    Args:
        main: function of no arguments; what it returns is the exit status.
        override: config.override, called first, with the arguments of the command line.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the scripts' state while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal can show
    sys.stdout, sys.stderr = Unstoppable(sys.stdout), Unstoppable(sys.stderr)
    try:
        override(sys.argv[1:])
        status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)
    except (UserError, OSError) as error:
        message, status = f"error: {error}", 1
    except torch.OutOfMemoryError:
        message = "error: the GPU's memory is full: lower BATCH_SIZE or INFERENCE_BATCH_SIZE, or raise ACCUMULATION_STEPS"
        status = 1
    except RuntimeError as error:
        status = 1
        if re.search(r"DataLoader worker .* (killed|exited)", str(error)):
            message = f"error: a reading process has ended ({error}); short of memory? Lower NUM_WORKERS"
        elif "DefaultCPUAllocator" in str(error):
            message = "error: the memory is full: lower BATCH_SIZE or INFERENCE_BATCH_SIZE, or raise ACCUMULATION_STEPS"
        elif dist.is_initialized() and re.search(r"(?i)connection (closed|reset)|broken pipe|socket", str(error)):
            message = f"process {dist.get_rank()}: stopped, since another process has ended"
        else:
            raise
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # the usual way out would wait for the other processes, which may be waiting for this one
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Training runs: what train-gen.py and train-cls.py do alike
# ---------------------------------------------------------------------------------------------------------------------


def shared_batches(processes, dataset, lengths, order, batch_size, num_workers):
    """Yields what each step of all processes reads: every example of `order` once, in one of them.

    Args:
        processes: the Processes.
        dataset: a ByteDataset.
        lengths: int (len(dataset),), patches of each example; the processes share a step's patches out evenly, see `share_out`.
        order: int64 (n,), indices of examples; a step takes the next `batch_size` for each process.
        batch_size: sequences per process, on average.
        num_workers: see `batches`.

    Yields:
        (batch, indices, count): this process's Batch; the examples in it; and how many examples all processes take in this
        step. Where too few are left for every process, some get a spare batch and no indices: all must compute
        something, but what comes of a spare batch must not count.

    Raises:
        UserError, SystemExit: a process could not read a file, see `Processes.agree`.
    """
    size = batch_size * processes.count
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    mine = [step[share_out(lengths[step], processes.count)[processes.rank]] for step in steps]
    read = [indices if len(indices) else step[:1] for indices, step in zip(mine, steps)]
    loaded = batches(dataset, read, num_workers, processes.device.type == "cuda")
    for step, indices in zip(steps, mine):
        with processes.together():
            batch = next(loaded)
        yield batch, indices, len(step)


def classification_report(confusion, labels, most=30):
    """Returns what there is to say of a classifier's predictions, as aligned lines of text.

    Accuracy; balanced accuracy, the mean of the recalls; precision, recall and number of files of each label; and for up to
    `most` labels the confusion matrix. Of a label without files, or never predicted, recall or precision is "-".

    Args:
        confusion: (labels, labels), files of each true label (row) by predicted label (column).
        labels: list of str.
    """
    labels = [escape_name(label) for label in labels]
    files, predicted, correct = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    recalls = [c / n if n else None for c, n in zip(correct, files)]
    precisions = [c / n if n else None for c, n in zip(correct, predicted)]
    present = [recall for recall in recalls if recall is not None]
    lines = [
        f"accuracy {correct.sum() / files.sum():.4f} ({correct.sum():.0f} of {files.sum():.0f} files), "
        f"balanced accuracy {sum(present) / len(present):.4f}"
    ]
    table = [["label", "precision", "recall", "files", "predicted"]]
    for i, label in enumerate(labels):
        shares = ["-" if share is None else f"{share:.4f}" for share in (precisions[i], recalls[i])]
        table.append([label, *shares, f"{files[i]:.0f}", f"{predicted[i]:.0f}"])
    lines += _aligned(table)
    if len(labels) <= most:
        lines.append("true label by row, predicted label by column:")
        table = [["", *(str(i) for i in range(len(labels)))]]
        table += [[f"{i} {label}", *(f"{count:.0f}" for count in confusion[i])] for i, label in enumerate(labels)]
        lines += _aligned(table)
    return "\n".join(lines) + "\n"


def _aligned(rows):
    """Returns the lines of a table, rows of texts: its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def make_scheduler(optimizer, name, learning_rate, num_steps, steps_done):
    """Returns the schedule that drives an optimizer.

    Args:
        name: "cosine" (to 0) or "constant", after a linear warm-up over the first tenth of all steps.
        learning_rate: at its peak.
        num_steps: in all.
        steps_done: how many of them are behind.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate  # also where the optimizer comes from a checkpoint with another
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps, last_epoch=steps_done - 1)
    return get_constant_schedule_with_warmup(optimizer, num_steps // 10, last_epoch=steps_done - 1)


def _no_number(epoch):
    """Returns the UserError for a loss or a weight that is no number."""
    return UserError(
        f"the loss is no number in epoch {epoch}, or the weights have become none. Nothing of that was saved: the same command "
        "goes on from before. Try a lower LEARNING_RATE, MAX_GRAD_NORM 1.0 or PRECISION fp32"
    )


@dataclasses.dataclass
class TrainingRun:
    """A run of training: how far it is, and the two files that keep it.

    The best model lies at WEIGHTS_PATH, the latest state beside it (`latest_path`): the model, and all that is needed to go on
    from the very step as if nothing had happened. A trainer calls, in this order: `resume`, `start`, and within
    `stoppable`, for each epoch, `training_steps`, `evaluation_steps` and `end_epoch`; then `finish`. All processes call
    these together.
    """

    processes: Processes
    model: nn.Module
    sizes: ModelSizes  # those that config.py gives
    dtype: torch.dtype  # to compute in
    settings: dict  # the constants of config.py that bear on training
    train: Examples
    held_out: Examples  # to evaluate on
    best_name: str  # what `best` is called in checkpoints: min_eval_loss or max_eval_acc
    totals: dict  # running sums of the epoch in hand in this process, set by the caller; at first those of none
    labels: dict | None = None  # a classifier's: {label: index}

    epoch: int = 0  # finished epochs
    position: int = 0  # examples that the epoch in hand has trained on, in all processes together
    best_epoch: int = 0
    best: float | None = None  # the best value so far; None before there is any
    report: str = ""  # what there is to say of the best model beside its figures, as text
    figures: dict = dataclasses.field(default_factory=dict)  # of the last finished epoch
    bar: tqdm | None = None  # progress of the epoch in hand
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # see `start`

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings["LEARNING_RATE"], fused=True)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.dtype == torch.float16)
        self.data = {"TRAIN_FOLDERS": self.train.fingerprint(), "EVAL_FOLDERS": self.held_out.fingerprint()}
        self.paths = self.settings["WEIGHTS_PATH"], latest_path(self.settings["WEIGHTS_PATH"])  # best, latest
        self.run_id = self.processes.gather(os.urandom(8).hex())[0]
        self._no_totals = self.totals
        self._random_state = None  # this process's, to be restored before the next step
        self._own_paths = []  # files that this run has written
        self._log_text, self._log_start = "", 0  # what the last finished epoch logged, and where that stands, in bytes
        self._saved_at, self._saved_place = time.monotonic(), None  # when, and at which (epoch, position), it was saved
        self._is_saved = True  # whether the last try to save the latest state went well
        self._epoch_began = time.monotonic()  # of the epoch in hand: when this process began with it
        self._lock = self._logger = self._stop_signal = None

    # ---- beginning -------------------------------------------------------------------------------------------------

    def resume(self):
        """Loads the run's latest state, or its best model where that is missing; returns whether there was one.

        Raises:
            UserError: the run's files cannot be written, are in use or of another kind of model, or hold a state that does
                not fit: of other sizes, files or CONVERSION_MODE.
        """
        self._check_paths()
        best, latest = self.paths
        path = next((path for path in (latest, best) if os.path.exists(path)), None)
        if path is None or not self.settings["LOAD_FROM_CHECKPOINT"]:
            return False
        try:
            checkpoint = load_sized_weights(self.model, self.sizes, path, "WEIGHTS_PATH")
        except UserError as error:
            if path == latest and os.path.exists(best) and "cannot load" in str(error):
                raise UserError(f"{error}. Without that file, the run goes on from its best model, {best}") from None
            raise
        try:
            self._check_fits(checkpoint, path)
            self._restore(checkpoint)
            self._say_where(path)
            self._say_changes(checkpoint.get("config") or {})
        except UserError:
            raise
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise UserError(
                f"WEIGHTS_PATH: {path!r} holds a model, but not the state of a run to go on from ({error!r}). To start from "
                "its weights, set PRE_WEIGHTS_PATH to it, LOAD_FROM_PRE_CHECKPOINT to True and LOAD_FROM_CHECKPOINT to False"
            ) from None
        self._own_paths = [own for own in self.paths if self._is_own(own)]
        if self.best_epoch and best not in self._own_paths:
            print(f"the best model of this run is not at {best}: the next epoch counts as the best so far")
            self.best_epoch, self.best = 0, None
        self._complete_log()
        return True

    def _check_paths(self):
        """Checks that the run's files can be written, and that no model of the other kind would be lost."""
        logs_path = self.settings["LOGS_PATH"]
        check_writable(logs_path, "LOGS_PATH")
        for path in self.paths:
            check_writable(path, "WEIGHTS_PATH")
            if os.path.realpath(path) == os.path.realpath(logs_path):
                raise UserError(f"LOGS_PATH: {logs_path!r} is where the run keeps its weights; it must be another file")
        if self.processes.rank == 0:
            self._lock = lock_beside(self.paths[0], "WEIGHTS_PATH")
        for path in self.paths:
            if self.processes.rank == 0:
                remove_leftovers(path)
            found = None
            with contextlib.suppress(UserError):  # what is no checkpoint at all is kept as a backup
                found = model_sizes(load_checkpoint(path, "WEIGHTS_PATH", mmap=True)["model"], path)
            if found is not None and found.kind != self.sizes.kind:
                raise UserError(f"WEIGHTS_PATH: {path!r} is a {found.kind}; here a {self.sizes.kind} is trained: give another path")

    def _check_fits(self, checkpoint, path):
        """Raises UserError if a checkpoint is of a run on other files, labels or pairs."""
        before, data = checkpoint.get("config") or {}, checkpoint.get("data") or {}
        anew = (
            f"to start a new run from its weights, set WEIGHTS_PATH to another path, PRE_WEIGHTS_PATH to {path!r} and "
            "LOAD_FROM_PRE_CHECKPOINT to True"
        )
        mode = self.settings["CONVERSION_MODE"]
        if before.get("CONVERSION_MODE", mode) != mode:
            raise UserError(
                f"CONVERSION_MODE is {mode!r}, but the run at {path!r} trains with {before['CONVERSION_MODE']!r}: set that, or, {anew}"
            )
        if self.labels is not None and checkpoint.get("labels") != self.labels:
            raise UserError(f"TRAIN_FOLDERS: the labels or their order are not those of {path!r}; {anew}")
        changed = [name for name in ("SEED", "EVAL_SPLIT") if before.get(name, self.settings[name]) != self.settings[name]]
        why = "".join(f"; {name} was {before[name]!r} and is now {self.settings[name]!r}" for name in changed)
        for name, fingerprint in self.data.items():
            if data.get(name, fingerprint) != fingerprint:
                raise UserError(
                    f"{name}: the files are not those that the run at {path!r} began with, by their paths and sizes{why}. It can "
                    f"only go on with the same files; {anew}"
                )

    def _restore(self, checkpoint):
        """Takes over a checkpoint's state; raises one of many errors where it is none."""
        numbers = {name: checkpoint[name] for name in ("epoch", "best_epoch")}
        numbers |= {name: checkpoint.get(name, 0) for name in ("position", "log_start")}
        if any(type(value) is not int or not 0 <= value < 2**63 for value in numbers.values()):
            raise TypeError(f"these should be whole numbers: {numbers}")
        if not isinstance(checkpoint[self.best_name], (int, float)) or math.isnan(checkpoint[self.best_name]):
            raise TypeError(f"{self.best_name} is no number")
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.best_epoch = numbers["epoch"], numbers["best_epoch"]
        self.best = float(checkpoint[self.best_name]) if self.best_epoch else None
        self.run_id = str(checkpoint.get("run_id") or self.run_id)  # published checkpoints have none
        self.figures, self.report = dict(checkpoint.get("figures", {})), str(checkpoint.get("report", ""))
        self._log_text, self._log_start = str(checkpoint.get("log_text", "")), numbers["log_start"]
        if numbers["position"]:
            self._restore_position(numbers["position"], checkpoint)

    def _restore_position(self, position, checkpoint):
        """Takes over where in an epoch a checkpoint is, its running sums and its random state."""
        everyone = [{name: float(each[name]) for name in self._no_totals} for each in checkpoint["totals"]]
        states = checkpoint["random_states"]
        if position > len(self.train) or not len(everyone) == len(states) > 0:
            raise ValueError("its place in the epoch is none")
        if checkpoint.get("order") != ORDER:
            print(f"this checkpoint is of a version that drew the order of an epoch in another way: epoch {self.epoch + 1} begins anew")
            return
        if checkpoint["config"]["SEED"] != self.settings["SEED"]:
            print(f"SEED has changed, so epoch {self.epoch + 1} begins anew, in another order")
            return
        self.position = position
        if len(everyone) == self.processes.count:
            self.totals, self._random_state = everyone[self.processes.rank], states[self.processes.rank]
            torch.Generator().set_state(self._random_state["cpu"])  # raises an error if it is none
            return
        print(f"{len(everyone)} processes have become {self.processes.count}: dropout is drawn anew from here on")
        if self.processes.rank == 0:  # the others begin at 0
            self.totals = {name: sum(each[name] for each in everyone) for name in self._no_totals}

    def _say_where(self, path):
        within = f" and {self.position} examples of the next" if self.position else ""
        so_far = f"; {self.best_name} so far {self.best:.4f}" if self.best_epoch else ""
        print(f"goes on from {path} after epoch {self.epoch}{within}{so_far}")

    def _say_changes(self, before):
        """Prints which constants are not what they were."""
        for name, value in self.settings.items():
            if name in before and before[name] != value:
                note = ": the schedule is laid anew" if name == "NUM_EPOCHS" else ""
                print(f"{name} was {before[name]!r} and is now {value!r}{note}")

    def _is_own(self, path):
        """Returns whether a file is a checkpoint of this very run; one that cannot be read is none."""
        with contextlib.suppress(UserError):
            return load_checkpoint(path, "WEIGHTS_PATH", mmap=True).get("run_id") == self.run_id
        return False

    def start(self):
        """Makes the run ready for its next step; returns what trains the model, see `Processes.distribute`.

        Raises:
            UserError, SystemExit: the processes see different files or states.
        """
        places = self.processes.gather((self.epoch, self.position, self.run_id, self.data))
        if any(place != places[0] for place in places):
            self.processes.agree(
                UserError("the processes see different files: TRAIN_FOLDERS, EVAL_FOLDERS and WEIGHTS_PATH must lie on a disk that all share")
            )
        size = self.settings["BATCH_SIZE"] * self.processes.count
        steps_per_epoch = -(-len(self.train) // size)
        # by epochs, not by the steps that were counted: another BATCH_SIZE has other steps in an epoch
        done = self.epoch * steps_per_epoch + -(-self.position // size)
        steps = self.settings["NUM_EPOCHS"] * steps_per_epoch
        self.scheduler = make_scheduler(self.optimizer, self.settings["LR_SCHEDULE"], self.settings["LEARNING_RATE"], steps, done)
        print(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.dtype} on {self.processes.count} x "
            f"{self.processes.device.type}, seed {self.settings['SEED']}; {len(self.train)} training and {len(self.held_out)} "
            f"evaluation examples, {steps_per_epoch} steps an epoch"
        )
        self._logger = make_logger(self.settings["WANDB_LOG"] and self.processes.rank == 0, self.settings, self.run_id)
        if self.settings["COMPILE"]:
            compile_model(self.model)
        self._epoch_began = time.monotonic()
        return self.processes.distribute(self.model)

    @contextlib.contextmanager
    def stoppable(self):
        """Within it, Ctrl-C and SIGTERM stop the run after the step in hand, its state saved."""
        with delayed_signals(impatient=self.processes.count == 1) as self._stop_signal:
            yield

    # ---- steps -----------------------------------------------------------------------------------------------------

    def training_steps(self):
        """Yields (batch, indices, count) for every step that is left of the epoch in hand, see `shared_batches`.

        The caller computes the gradients, calls `optimizer_step` and sets `totals`. Between steps the state is saved when it
        is time, and the run stops when it is told to. Order and crops depend on SEED, the epoch and the files alone.
        """
        state, device = self._random_state, self.processes.device
        if state is None or (state["cuda"] is None) != (device.type != "cuda"):
            torch.manual_seed(int(self.step_rng().integers(2**63)))
        else:  # dropout goes on where it was
            torch.set_rng_state(state["cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], device)
        self._random_state = None
        seeds = [self.settings["SEED"], self.epoch + 1]
        dataset = ByteDataset(self.train, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH, crop_seed=seeds)
        lengths = self.train.lengths(self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        order = np.random.default_rng(seeds).permutation(len(self.train))[self.position :]
        for batch, indices, count in self._steps("train", dataset, lengths, order, self.settings["BATCH_SIZE"], initial=self.position):
            yield batch, indices, count
            self.position += count

    def evaluation_steps(self):
        """Yields (batch, indices, count) until every evaluation example was there, like `training_steps`, in no spare batch."""
        dataset = ByteDataset(self.held_out, self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        # sorted by length, since that needs the least padding
        lengths = self.held_out.lengths(self.sizes.PATCH_SIZE, self.sizes.PATCH_LENGTH)
        size = self.settings["BATCH_SIZE"] // self.settings["ACCUMULATION_STEPS"]
        for batch, indices, count in self._steps("eval", dataset, lengths, np.argsort(lengths, kind="stable"), size, leave=False):
            if len(indices):
                yield batch, indices, count

    def _steps(self, what, dataset, lengths, order, batch_size, **bar_options):
        """Yields what `shared_batches` does, with a progress bar, and does what is due between two steps."""
        bar_options |= {"total": len(dataset), "unit": "file", "dynamic_ncols": True, "disable": self.processes.rank > 0}
        with tqdm(desc=f"epoch {self.epoch + 1} {what}", **bar_options) as self.bar:
            for batch, indices, count in shared_batches(
                self.processes, dataset, lengths, order, batch_size, self.settings["NUM_WORKERS"]
            ):
                yield batch, indices, count
                self.bar.update(count)
                self._between_steps()

    def step_rng(self):
        """Returns a numpy Generator for this step and process alone."""
        return np.random.default_rng([self.settings["SEED"], self.epoch + 1, self.position, self.processes.rank])

    def optimizer_step(self):
        """Makes the step that the gradients say, which are first scaled down to the norm MAX_GRAD_NORM unless that is 0."""
        if self.settings["MAX_GRAD_NORM"]:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["MAX_GRAD_NORM"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings(action="ignore"):  # fp16's first steps may be skipped, which the schedule remarks on
            self.scheduler.step()

    def _between_steps(self):
        """Does what is due between two steps: stops the run, or saves its latest state.

        Raises:
            UserError, SystemExit: the run has stopped.
        """
        broken = not all(map(math.isfinite, self.totals.values()))
        signal_number = self._stop_signal()
        # the first process's clock decides, so that all save together
        due = self.processes.rank == 0 and time.monotonic() - self._saved_at >= 60 * self.settings["SAVE_MINUTES"]
        num_broken, num_signals, num_due = self.processes.sum([broken, signal_number > 0, due])
        if num_broken:
            self.processes.agree(_no_number(self.epoch + 1))
        if num_signals or (num_due and self._saved_place != (self.epoch, self.position)):
            self._save()
        if num_signals:
            number = max(self.processes.gather(signal_number))
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            where = f"epoch {self.epoch + 1} after {self.position} examples"
            how = "the same command" + (" with LOAD_FROM_CHECKPOINT True" if not self.settings["LOAD_FROM_CHECKPOINT"] else "")
            how = f"{how} goes on from there" if self._is_saved else "the latest state could not be saved"
            self.processes.leave(f"stopped by {name} in {where}: {how}", 128 + number)

    # ---- ends ------------------------------------------------------------------------------------------------------

    def sum_totals(self, totals):
        """Returns a dataclass of running sums, added up over all processes."""
        return type(totals)(*self.processes.sum(dataclasses.astuple(totals)))

    def end_epoch(self, figures, value, report=""):
        """Counts the epoch in hand as finished; saves, logs and prints it.

        Args:
            figures: {name: number} to log.
            value: that of figures which decides what is best.
            report: more lines, logged if the epoch is the best so far.
        """
        if not all(map(math.isfinite, figures.values())):
            self.processes.agree(_no_number(self.epoch + 1))
        before = self.best_epoch, self.best, self.report
        self.epoch, self.position, self.totals, self.figures = self.epoch + 1, 0, self._no_totals, figures
        line = f"epoch {self.epoch}  " + "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        self._log_text, logs_path = f"{line}\n", self.settings["LOGS_PATH"]
        self._log_start = os.path.getsize(logs_path) if os.path.exists(logs_path) else 0
        is_best = self.best is None or (value < self.best if self.best_name.startswith("min") else value > self.best)
        if is_best:
            self.best_epoch, self.best, self.report = self.epoch, value, report
            self._log_text += report
            is_best = self._save(best=True)
            if not is_best:
                self.best_epoch, self.best, self.report = before  # what the file holds
        self._save()
        self._complete_log()
        print(f"{line}{'  best' if is_best else ''}  {time.monotonic() - self._epoch_began:.0f} s")
        self._epoch_began = time.monotonic()
        self._logger.log({"epoch": self.epoch, **figures})

    def finish(self):
        """Ends a run that has done all its epochs, with a word on its best model.

        Raises:
            UserError, SystemExit: its latest state is not on the disk.
        """
        self._logger.finish()
        print(f"finished {self.epoch} of NUM_EPOCHS {self.settings['NUM_EPOCHS']} (raise NUM_EPOCHS to go on)")
        if self.best_epoch:
            print(f"best: epoch {self.best_epoch}, {self.best_name} {self.best:.4f}, in {self.paths[0]}\n{self.report}", end="")
        error = UserError(
            f"the latest state could not be saved at {self.paths[1]!r}: once there is room, the same command repeats what is lost"
        )
        self.processes.agree(None if self._is_saved else error)
        if self._lock is not None:
            os.unlink(self._lock.name)

    def _save(self, best=False):
        """Saves the latest state, or the best model; returns whether it could be saved.

        A full disk does not end the run: what was saved before is still there.

        Raises:
            UserError, SystemExit: the weights hold values that are no numbers; that is never saved.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.processes.agree(_no_number(self.epoch + 1))
        device = self.processes.device
        random_state = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        everyone = self.processes.gather((self.totals, random_state))
        problem = None
        if self.processes.rank == 0:
            path = self.paths[0 if best else 1]
            try:
                if path not in self._own_paths:
                    keep_backup(path)
                    self._own_paths.append(path)
                save_checkpoint(path, self._state(everyone))
            except OSError as error:
                problem = error.strerror
                print(f"cannot save {path}: {problem}; it stays as it was, and the run goes on")
        saved = self.processes.sum([problem is not None]) == [0]
        if not best:
            self._is_saved, self._saved_at, self._saved_place = saved, time.monotonic(), (self.epoch, self.position)
        return saved

    def _state(self, everyone):
        """Returns the checkpoint; `everyone` is [(totals, random state)] of all processes."""
        worst = math.inf if self.best_name.startswith("min") else -math.inf
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_sched": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            self.best_name: worst if self.best is None else self.best,
            **({} if self.labels is None else {"labels": self.labels}),
            "position": self.position,
            "order": ORDER,
            "totals": [totals for totals, _ in everyone],
            "random_states": [state for _, state in everyone],
            "figures": self.figures,
            "report": self.report,
            "log_text": self._log_text,
            "log_start": self._log_start,
            "run_id": self.run_id,
            "data": self.data,
            "config": self.settings,
        }

    def _complete_log(self):
        """Adds to the log what the last finished epoch has to say, unless it stands there already.

        That is once per epoch, also when the run was killed between its checkpoint and its log, or in the middle of it.
        """
        if self.processes.rank > 0:
            return
        text = self._log_text.encode("utf-8", "backslashreplace")
        try:
            with open(self.settings["LOGS_PATH"], "a+b") as log:
                start = min(self._log_start, log.tell())
                log.seek(start)
                there = log.read(len(text))
                if there != text and text.startswith(there):  # nothing of it, or a beginning that is all there is
                    log.truncate(start)
                    log.write(text)
        except OSError as error:
            print(f"cannot write {self.settings['LOGS_PATH']}: {error.strerror}; the run goes on")
