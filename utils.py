"""bGPT, a language model of bytes: patches, data sets, batches, attention and the two decoders.

A file is a sequence of patches of S symbols. Symbols 0-255 are bytes, 256 is padding and end of file. `tune.abc` with
20 bytes and S = 16 has 4 patches. The first is the extension patch, the last the end patch (`.` is the symbol 256):

    patch 0  | a b c . . . . . . . . . . . . . |  extension
    patch 1  | X : 1 \n T : T h e   B u t t e r |  content
    patch 2  | f l y \n . . . . . . . . . . . . |  content, padded
    patch 3  | . . . . . . . . . . . . . . . . |  end

The patch-level decoder reads whole patches and encodes patches 0..i as one vector. From that vector the byte-level decoder
predicts patch i+1, symbol by symbol. The first is deep and runs once per patch, the second is shallow and runs once per byte.
A byte enters the model twice: within its patch (`PatchLevelDecoder.embed`) and by itself (`ByteLevelDecoder.forward`).

Dimensions in shape comments: B sequences in a batch, P patches in a sequence, L the most patches in a sequence (PATCH_LENGTH),
S symbols in a patch (PATCH_SIZE), D width (HIDDEN_SIZE), V = 257 symbols, H = D/64 attention heads, T positions of a sequence
in attention, N real patches, or target patches, of a batch, M their number after `pad_rows`.

This file needs only PyTorch, transformers and NumPy. Sizes are arguments.
"""

import copy
import dataclasses
import errno
import multiprocessing
import os
import signal
import sys
import threading
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

END = 256  # the symbol of padding and end of file
NUM_SYMBOLS = 257  # V: 256 bytes and END
HEAD_SIZE = 64  # width of an attention head

# ---- Files <-> patches ----------------------------------------------------------------------------------------------


def extension_patch(extension, patch_size):
    """Returns the extension patch, int16 (S,): UTF-8 bytes, cut at S, padded with 256."""
    if "." in extension:
        raise ValueError(f"the extension {extension!r} has a dot: give it without, as in 'mid'")
    # surrogateescape: a file name may contain bytes that are not UTF-8, which Python keeps as surrogates
    symbols = extension.encode("utf-8", "surrogateescape")[:patch_size]
    return np.array([*symbols, *[END] * (patch_size - len(symbols))], dtype=np.int16)


def to_patches(content, extension, patch_size):
    """Returns a file as patches, int16 (P, S). `content` is bytes or a uint8 array."""
    content = np.frombuffer(content, dtype=np.uint8)
    patches = np.full((count_patches(len(content), patch_size), patch_size), END, dtype=np.int16)
    patches[0] = extension_patch(extension, patch_size)
    patches[1:-1].reshape(-1)[: len(content)] = content
    return patches


def to_content(symbols):
    """Returns a file's content, bytes, from its symbols (integers, any shape) without the extension patch, up to a 256."""
    symbols = np.asarray(symbols).reshape(-1)
    ends = np.flatnonzero(symbols == END)
    return symbols[: ends[0] if len(ends) else None].astype(np.uint8).tobytes()


def count_patches(size, patch_size):
    """Returns the number of patches of a file, extension patch and end patch included. `size` is in bytes, int or array."""
    return -(-size // patch_size) + 2


def read_bytes(path, start=0, stop=None, size=None):
    """Returns the bytes `start` to `stop` - 1 of a file (None = to its end).

    Raises OSError with the path if the file is unreadable, not of `size` bytes (None = any), or not as long as reported.
    """
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if size is not None and actual != size:
                raise OSError(errno.ESTALE, f"has {actual:,} bytes now, but had {size:,} when it was listed")
            end = actual if stop is None else min(stop, actual)
            file.seek(min(start, end))
            content = file.read(max(end - start, 0))
            if len(content) < end - start:
                raise OSError(errno.EIO, f"ends {end - start - len(content):,} bytes too early")
            if end == actual and file.read(1):  # some file systems report 0 or a multiple of 4096 for any file
                raise OSError(errno.ESTALE, f"is longer than its reported size, {actual:,} bytes")
    except OSError as error:  # a read error has no file name
        raise OSError(error.errno, error.strerror, path) from None
    return content


def read_patches(path, patch_size, first=0, last=None, size=None, lower_case=False):
    """Reads only the patches `first` to `last` - 1 of a file (None = to its end).

    Returns (patches int16 (P, S), counted bool (P, S)). `counted` is true at the symbols that count for bits per byte: the
    content and the first 256 after it. `lower_case` applies to the extension patch. `size` and errors are as in `read_bytes`.
    """
    size = os.stat(path).st_size if size is None else size
    total = count_patches(size, patch_size)
    last = total if last is None else min(last, total)
    start, stop = (max(first, 1) - 1) * patch_size, min((last - 1) * patch_size, size)  # bytes of the content
    content = read_bytes(path, start, stop, size)
    extension = os.path.splitext(path)[1][1:]
    patches = to_patches(content, extension.lower() if lower_case else extension, patch_size)
    counted = np.zeros(patches.shape, dtype=bool)
    # (P, S) -> (P·S,): the content follows the extension patch, and one more symbol ends it
    counted.reshape(-1)[patch_size : patch_size + len(content) + 1] = True
    kept = slice(0 if first == 0 else 1, len(patches) if last == total else -1)
    return patches[kept], counted[kept]


def crop(total, length, rng=None):
    """Returns the patches (first, last + 1) to keep of a file with `total` > `length` patches.

    `rng`, a numpy Generator, draws the head, a window of the body, or the tail, with equal chance. None = the head.
    """
    part = "head" if rng is None else ("head", "body", "tail")[rng.integers(3)]
    if part != "body":
        return (0, length) if part == "head" else (total - length, total)
    # a window without extension patch and end patch; with total = length + 1 there are no such windows, and this is the tail
    first = int(rng.integers(1, max(total - length, 2)))
    return first, first + length


# ---- Data sets ------------------------------------------------------------------------------------------------------


class Examples:
    """A sequence of tuples of paths: (file,), or (input, target) of a conversion.

    Args:
        files: sequence of paths with `sizes`, int64 (n,), and a method `name(index)`, see `bgpt.files.Files`.
        indices: int64 (n, 1) or (n, 2), the examples' files as indices into `files`. None = each file alone.
        parts: {index of an example: (first patch, last patch + 1)} of files that are used in part.
    """

    def __init__(self, files, indices=None, parts=None):
        self.files = files
        self.indices = np.arange(len(files))[:, None] if indices is None else np.asarray(indices, dtype=np.int64)
        self.parts = parts or {}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return tuple(self.files[file] for file in self.indices[index].tolist())

    @property
    def are_pairs(self):
        """Whether each example is an input and its target."""
        return self.indices.shape[1] == 2

    def sizes(self, index=slice(None)):
        """Returns the sizes in bytes of the files of some examples, int64 (…, 1) or (…, 2)."""
        return self.files.sizes[self.indices[index]].clip(min=0)

    def select(self, indices):
        """Returns the Examples at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        olds = indices.tolist() if self.parts else []
        parts = {new: self.parts[old] for new, old in enumerate(olds) if old in self.parts}
        return Examples(self.files, self.indices[indices], parts)

    def lengths(self, patch_size, indices=slice(None)):
        """Returns the number of patches of each example's whole sequence, int64 (n,)."""
        # of each file all but the end patch, and one end patch
        return (count_patches(self.sizes(indices), patch_size) - 1).sum(-1) + 1

    def spans(self, patch_size):
        """Returns the patches used of each example, int64 (n, 2): the first, and the last + 1."""
        lengths = self.lengths(patch_size)
        spans = np.stack((np.zeros_like(lengths), lengths), axis=1)
        for index, part in self.parts.items():
            spans[index] = part
        return spans


class ByteDataset:
    """Examples as sequences of patches.

    A file of more than `patch_length` patches, L, is cropped. `crop_seed`, a list of integers, for example [seed, epoch],
    seeds its crop together with the file's name. None = the head.
    """

    def __init__(self, examples, patch_size, patch_length, crop_seed=None):
        self.examples, self.patch_size, self.patch_length, self.crop_seed = examples, patch_size, patch_length, crop_seed

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        """Returns (patches int16 (P, S), counted bool (P, S), context), see `read_patches`.

        The first `context` patches, here 1, are given, not predicted. Raises OSError if a file has changed.
        """
        paths, sizes = self.examples[index], self.examples.sizes(index).tolist()
        if len(paths) == 1:
            total = count_patches(sizes[0], self.patch_size)
            span = crop(total, self.patch_length, self._rng(index)) if total > self.patch_length else (0, total)
            return *read_patches(paths[0], self.patch_size, *span, sizes[0]), 1
        # the input file without its end patch, then the whole target file
        source, target = (read_patches(path, self.patch_size, size=size, lower_case=True) for path, size in zip(paths, sizes))
        return np.concatenate((source[0][:-1], target[0])), np.concatenate((source[1][:-1], target[1])), 1

    def _rng(self, index):
        if self.crop_seed is None:
            return None
        name = self.examples.files.name(int(self.examples.indices[index, 0]))
        return np.random.default_rng([*self.crop_seed, zlib.crc32(os.fsencode(name))])

    def lengths(self, indices):
        """Returns the number of patches of each sequence at `indices`, int64 (n,)."""
        return self.examples.lengths(self.patch_size, indices).clip(max=self.patch_length)


# ---- Batches --------------------------------------------------------------------------------------------------------


def balanced_parts(lengths, count):
    """Splits sequences into `count` parts with nearly equal numbers of patches.

    The longest sequences are assigned first, each to the smallest part. `lengths`, int (n,), are their numbers of patches.
    Returns a list of int64 arrays with the ascending indices of each part's sequences. With n < count, the last are empty.
    """
    parts, sums = [[] for _ in range(count)], [0] * count
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        least = sums.index(min(sums))
        parts[least].append(index)
        sums[least] += int(lengths[index])
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


class Batch:
    """Sequences as in `ByteDataset`, padded with 256 on the right.

    Attributes:
        lengths: int64 array (B,), patches of each sequence.
        patches: int16 (B, P, S).
        masks: uint8 (B, P), 1 at real patches.
        counted: bool (B, P, S), true at the symbols that count for bits per byte.
        targets: bool (B, P-1), true at the patches to predict, of patches 1 to P-1.
    """

    def __init__(self, sequences):
        self._sequences = list(sequences)
        *columns, contexts = zip(*self._sequences)
        patches, counted = ([torch.from_numpy(array) for array in column] for column in columns)
        self.lengths = np.array(list(map(len, patches)))
        self.patches = pad_sequence(patches, batch_first=True, padding_value=END)
        self.counted = pad_sequence(counted, batch_first=True)
        position, lengths = torch.arange(self.patches.shape[1]), torch.from_numpy(self.lengths)[:, None]
        self.masks = (position < lengths).to(torch.uint8)
        self.targets = ((position >= torch.tensor(contexts)[:, None]) & (position < lengths))[:, 1:]

    def split(self, parts):
        """Returns at most `parts` pairs (indices int64 (n,), their Batch), see `balanced_parts`."""
        return [(rows, Batch(self._sequences[i] for i in rows)) for rows in balanced_parts(self.lengths, parts) if len(rows)]

    def patches_on(self, device):
        """Returns the patches as input of the models, int64 (B, P, S), on a device."""
        return to_device(self.patches, device).long()


def to_device(tensor, device):
    """Copies a CPU tensor to a device, asynchronously to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _BatchReader:
    """A data set for DataLoader with an array of indices as index. The item of a failed read is its OSError."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, indices):
        try:
            return indices, [self.dataset[index] for index in indices]
        except OSError as error:  # returned, since DataLoader would raise it with a traceback as its text
            return error


def _return_as_is(item):
    return item


def _begin_worker(index):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # DataLoader's watchdog misses a parent that is killed while a worker starts
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(dataset, index_batches, num_workers=0):
    """Yields each array of indices with its Batch, a dummy batch for an empty one.

    `num_workers` processes read the items of `dataset`, a ByteDataset or `bgpt.windows.Windows`. They send NumPy arrays through
    pipes, since containers have little shared memory. They ignore stop signals. The main process ends them after its current
    step. Raises ChildProcessError if a worker was killed, OSError if a file is unreadable or has changed.
    """
    patches = np.full((2, dataset.patch_size), END, dtype=np.int16)
    dummy = [(patches, patches != END, 1)]  # an empty file
    loader = DataLoader(
        _BatchReader(dataset), sampler=index_batches, batch_size=None, collate_fn=_return_as_is, num_workers=num_workers,
        worker_init_fn=_begin_worker, generator=torch.Generator(),  # the default one would change dropout's random numbers
        # a forked worker needs no copy of the data set, and no second import of PyTorch
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )  # fmt: skip
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        for item in loader:
            if num_workers:
                signal.signal(signal.SIGCHLD, handler)  # DataLoader's handler would raise its error within a step
            if isinstance(item, OSError):
                raise item
            indices, sequences = item
            yield indices, Batch(sequences or dummy)
    except RuntimeError as error:
        if num_workers == 0:
            raise
        problem = "NUM_WORKERS: a worker process exited unexpectedly, perhaps for lack of memory"
        raise ChildProcessError(f"{problem}; lower NUM_WORKERS ({error})") from error


# ---- Attention and dropout ------------------------------------------------------------------------------------------

MOST_SEQUENCES = 2**15  # of one attention call on a GPU; CUDA has no kernel for 2**16 and more
BLOCK = 128  # queries in a block on a CPU; smaller blocks multiply slower, larger ones compute more masked weights
# Up to this many attention weights (B·H·T²), the backward pass on a CPU keeps them, 0.4 GB a layer in float32 with
# dropout. Above, it recomputes them.
MOST_KEPT = 2**26
MOST_IN_BLOCKS = 512  # positions; up to here PyTorch's backward pass in bf16 on a CPU is slower, 4 times at 16


def dropout(x, rate):
    """Returns x after dropout, the kept elements scaled up. On a CPU, `rate` is accurate to 2**-17.

    PyTorch draws a whole random number for each element. On a CPU, 16 bits for each are several times faster.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    threshold = min(round(rate * 2**16), 2**16 - 1)  # of the 2**16 values of the bits, this many drop the element
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, threshold - 2**15, out=torch.empty_like(x, requires_grad=False))  # 1 or 0, directly in x's dtype
    return x * kept.mul_(2**16 / (2**16 - threshold))


def attend(qkv, rate=0.0):
    """Returns causal attention (B, T, H, 64) of queries, keys and values (B, T, 3, H, 64), with dropout."""
    if qkv.device.type == "cuda" and len(qkv) > MOST_SEQUENCES:
        return torch.cat([attend(part, rate) for part in qkv.split(MOST_SEQUENCES)])
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, 64) each
    shape, length = queries.shape, queries.shape[2]
    # PyTorch's attention on a CPU is slow with dropout, and in the backward pass of short sequences in bf16
    is_slow = rate > 0 or (qkv.requires_grad and qkv.dtype == torch.bfloat16 and length <= MOST_IN_BLOCKS)
    if qkv.device.type != "cpu" or not is_slow:
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate, is_causal=True).transpose(1, 2)
    queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))  # (B·H, T, 64)
    is_kept = length <= BLOCK or len(queries) * length**2 <= MOST_KEPT
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # sliced block by block, so that the backward pass adds up and frees gradients block by block
        block = queries[:, start:end], keys[:, :end], values[:, :end], rate
        # recomputation draws the same dropout, since it restores the state of the generator
        blocks.append(_attend_block(*block) if is_kept else recompute(_attend_block, *block, use_reentrant=False))
    attended = torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]  # one block needs no copy
    return attended.view(shape).transpose(1, 2)  # (B·H, T, 64) -> (B, H, T, 64) -> (B, T, H, 64)


def _attend_block(queries, keys, values, rate):
    """Returns the attention of t queries (B·H, t, 64) to U keys and values (B·H, U, 64), up to the last query."""
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    later = queries.new_full((num_queries, num_keys), -torch.inf).triu(num_keys - num_queries + 1)  # (t, U)
    scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=queries.shape[-1] ** -0.5)  # (B·H, t, U)
    return dropout(scores.softmax(-1), rate) @ values


class Ragged:
    """Sequences of different lengths, concatenated without padding into rows (N, ·).

    The rows are ordered by the length of their sequence, the shortest first. Only attention pads sequences, each to the
    `padded_length` of its own length, so that its result does not depend on the rest of the batch.
    `lengths`, int (B,), are the patches of each sequence, 0 or more. `device` is the device of the rows.

    Attributes:
        sequence, position: int64 (N,), each row's sequence as an index into `lengths`, and its position there.
        starts: int64 (B,), the first row of each sequence, in the order of `lengths`.
    """

    def __init__(self, lengths, device):
        lengths = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        ends = lengths[order].cumsum()  # (B,), the last row + 1 of each sequence, in the order of the rows
        starts = np.empty_like(ends)
        starts[order] = ends - lengths[order]
        sequence = order.repeat(lengths[order])
        position = np.arange(len(sequence)) - starts[sequence]
        padded = np.array([padded_length(length) for length in lengths[order].tolist()], dtype=np.int64)
        groups, cells = [], []  # cells: int64 index of each row among the padded rows of its group
        for length in np.unique(padded[padded > 0]).tolist():
            members = np.flatnonzero(padded == length)
            rows = slice(int(starts[order[members[0]]]), int(ends[members[-1]]))
            member = np.arange(len(members)).repeat(lengths[order[members]])  # each row's sequence, as an index into the group
            groups.append((rows, (len(members), length)))
            cells.append(member * length + position[rows])
        arrays = [sequence, position, starts, *cells]  # one copy to the device
        tensors = to_device(torch.from_numpy(np.concatenate(arrays)), torch.device(device)).split([len(a) for a in arrays])
        self.sequence, self.position, self.starts, *cells = tensors
        self._groups = [(*group, each) for group, each in zip(groups, cells)]  # (rows, (sequences, padded length), cells)

    def attend(self, qkv, rate=0.0):
        """Returns causal attention (M, H, 64) within each sequence, of `qkv` (M, 3, H, 64), 0 in rows after the N rows."""
        attended = []
        for rows, shape, cells in self._groups:
            group = qkv[rows]  # (n, 3, H, 64)
            is_full = len(group) == shape[0] * shape[1]
            if not is_full:
                padding = group.new_zeros(shape[0] * shape[1], *group.shape[1:])
                group = padding.index_copy(0, cells, group)
            outputs = attend(group.view(*shape, *qkv.shape[1:]), rate).flatten(0, 1)  # (B·T, H, 64)
            attended.append(outputs if is_full else outputs.index_select(0, cells))
        attended.append(torch.zeros_like(qkv[len(self.sequence) :, 0]))  # for the rows that `pad_rows` appended
        return torch.cat(attended)


def pad_rows(x):
    """Returns x (N, …), in bf16 on a CPU with zero rows appended, so (M, …).

    There, oneDNN compiles a product for each number of rows, in 2 ms. M is N rounded up to a multiple of 32, or from N = 1024
    on to a multiple of the power of 2 between N/32 and N/16, so that few M occur.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x
    step = max(32, 2 ** len(x).bit_length() // 32)
    return F.pad(x, (0,) * (2 * x.dim() - 1) + (-len(x) % step,))


def padded_length(length):
    """Returns the length to which attention pads a sequence.

    That adds up to 15 positions, or up to a quarter to a long one. Few different lengths make few groups.
    """
    step = max(16, 1 << (max(length - 1, 4).bit_length() - 3))  # from an eighth to a quarter of the length
    return -(-length // step) * step


# ---- Decoders -------------------------------------------------------------------------------------------------------


def make_configs(patch_size, patch_length, hidden_size, patch_num_layers, byte_num_layers, dropout=0.1):
    """Returns the GPT2Configs of the patch-level and the byte-level decoder."""
    dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    shared = {"n_embd": hidden_size, "n_head": hidden_size // HEAD_SIZE, "bos_token_id": None, "eos_token_id": None, **dropouts}
    patch_config = GPT2Config(n_layer=patch_num_layers, n_positions=patch_length, vocab_size=1, patch_size=patch_size, **shared)
    byte_config = GPT2Config(n_layer=byte_num_layers, n_positions=patch_size + 1, vocab_size=NUM_SYMBOLS, **shared)
    return patch_config, byte_config


def _fused(config):
    """Returns a copy of a GPT2Config with GPT-2's tanh-GELU as one fused operation."""
    config = copy.deepcopy(config)
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


@dataclasses.dataclass
class BytePrediction(ModelOutput):
    """The byte-level decoder's output."""

    loss: torch.Tensor | None = None  # scalar, mean cross-entropy of all symbols of the targets, nats per symbol
    logits: torch.Tensor | None = None  # (N, S, V)
    nats: torch.Tensor | None = None  # float32 (N, S), cross-entropy of each symbol


def project_qkv(block, x):
    """Returns the queries, keys and values (…, 3·D) of a GPT2Block for x (…, D)."""
    return block.attn.c_attn(block.ln_1(x))


def finish_block(block, x, attended, rate):
    """Returns a GPT2Block's output (…, D) for x (…, D) and its attention (…, D), with dropout."""
    x = x + dropout(block.attn.c_proj(attended), rate)
    return x + dropout(block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(x)))), rate)


def run_gpt2(gpt2, inputs, attend, parts=(project_qkv, finish_block)):
    """Returns the outputs (…, D) of a GPT2Model for inputs (…, D) that include positions.

    It equals the model's own forward, with faster dropout and attention, and for rows of several sequences. `attend` takes
    queries, keys and values (…, 3, H, 64) and a dropout rate, and returns (…, H, 64). `parts` may be compiled.
    """
    config, (project, finish) = gpt2.config, parts
    rates = config.embd_pdrop, config.attn_pdrop, config.resid_pdrop
    embd_pdrop, attn_pdrop, resid_pdrop = rates if gpt2.training else (0.0, 0.0, 0.0)
    x = dropout(inputs, embd_pdrop)
    for block in gpt2.h:
        qkv = project(block, x).unflatten(-1, (3, config.n_head, HEAD_SIZE))  # (…, 3·D) -> (…, 3, H, 64)
        x = finish(block, x, attend(qkv, attn_pdrop).flatten(-2), resid_pdrop)  # (…, H, 64) -> (…, D)
    return gpt2.ln_f(x)


class ByteModel(PreTrainedModel):
    """Base of both decoders, the generative model and the classifier, configured by GPT2Configs."""

    config_class = GPT2Config
    _supports_sdpa = True  # for callers of `base` itself, as in benchmarks; without it, transformers uses its slow attention
    parts = project_qkv, finish_block  # of a block, compiled by `compile_blocks`

    def compile_blocks(self):
        """Compiles the blocks without their attention, once for all layers and numbers of rows. Weights keep their names."""
        self.parts = tuple(torch.compile(part, dynamic=True) for part in self.parts)


class PatchLevelDecoder(ByteModel):
    """GPT-2 over patches, each one embedding (paper, 3.1). Each output encodes the patches up to it.

    `config` is a GPT2Config with n_positions L. PATCH_SIZE is its attribute `patch_size`, 16 if it has none.
    """

    def __init__(self, config):
        config = _fused(config)
        super().__init__(config)
        self.patch_size = getattr(config, "patch_size", 16)
        self.patch_embedding = nn.Linear(self.patch_size * NUM_SYMBOLS, config.n_embd)
        # The weight is (D, S·V) as published, but a view of its transpose, in which the vector of each symbol is contiguous.
        vectors = torch.empty(self.patch_size * NUM_SYMBOLS, config.n_embd).normal_(std=0.02)
        self.patch_embedding.weight = nn.Parameter(vectors.t())
        self.base = GPT2Model(config)

    def embed(self, patches):
        """Returns the embeddings (N, D) of patches, int64 (N, S), before positions are added.

        A linear layer's output for a one-hot patch is the sum of the S vectors that the ones select.
        """
        indices = patches + torch.arange(self.patch_size, device=patches.device) * NUM_SYMBOLS  # (N, S)
        weight = self.patch_embedding.weight.t().contiguous()  # (S·V, D), no copy: see __init__
        return F.embedding_bag(indices, weight, mode="sum") + self.patch_embedding.bias

    def encode(self, patches, masks):
        """Returns (outputs (N, D) of the real patches, their Ragged) for patches int64 (B, P, S) or (B, P·S).

        `masks`, integers (B, P), are 1 at real patches, 0 at the padding on the right. None = all are real. Keep them on the
        CPU, since reading them from a GPU waits for it. Raises ValueError for too many patches, or real ones after padding.
        """
        patches = patches.reshape(len(patches), -1, self.patch_size)  # (B, P·S) -> (B, P, S)
        if patches.shape[1] > self.config.n_positions:
            raise ValueError(f"{patches.shape[1]} patches, but the model has positions for {self.config.n_positions}")
        real = np.ones(patches.shape[:2], dtype=bool) if masks is None else masks.cpu().numpy() == 1  # (B, P)
        if (real[:, 1:] > real[:, :-1]).any():
            raise ValueError("masks must be 1 at the real patches of each sequence and 0 after them: padding is on the right")
        ragged = Ragged(real.sum(1), patches.device)
        embedded = self.embed(patches[ragged.sequence, ragged.position])  # (B, P, S) -> (N, S) -> (N, D)
        inputs = pad_rows(embedded + self.base.wpe(ragged.position))  # (M, D)
        outputs = run_gpt2(self.base, inputs, ragged.attend, self.parts)  # (M, D)
        return outputs[: len(embedded)], ragged

    def forward(self, patches, masks=None):
        """Returns an output with `last_hidden_state` (B, P, D), 0 at padding. Arguments as in `encode`."""
        outputs, ragged = self.encode(patches, masks)
        hidden = outputs.new_zeros(len(patches), patches[0].numel() // self.patch_size, outputs.shape[-1])
        return BaseModelOutput(last_hidden_state=hidden.index_put((ragged.sequence, ragged.position), outputs))


class ByteLevelDecoder(ByteModel):
    """GPT-2 over the symbols of a patch, given the patch-level output before it (paper, 3.1).

    `config` is a GPT2Config with n_positions S + 1 and vocab_size 257.
    """

    def __init__(self, config):
        config = _fused(config)
        super().__init__(config)
        self.base = GPT2LMHeadModel(config)

    def forward(self, encoded_patches, target_patches):
        """Returns the BytePrediction of targets int64 (N, S), given the patch-level output before each, (N, D)."""
        symbols = self.base.transformer.wte(target_patches[:, :-1])  # (N, S-1, D)
        inputs = torch.cat((encoded_patches.unsqueeze(1).to(symbols.dtype), symbols), dim=1)  # (N, S, D)
        inputs = pad_rows(inputs + self.base.transformer.wpe.weight[: inputs.shape[1]])  # (M, S, D)
        hidden = run_gpt2(self.base.transformer, inputs, attend, self.parts)  # (M, S, D)
        logits = self.base.lm_head(hidden)[: len(symbols)]  # (N, S, V)
        # (N, S, V) -> (N·S, V) -> (N, S)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), target_patches.flatten(), reduction="none").view_as(target_patches)
        return BytePrediction(loss=nats.mean(), logits=logits, nats=nats)


class bGPTLMHeadModel(ByteModel):
    """The generative byte model: a patch-level and a byte-level decoder (paper, 3.1 and 3.2).

    Its attributes `patch_size` and `patch_length` are S and L.
    """

    def __init__(self, patch_config, byte_config):
        super().__init__(byte_config)
        self.patch_size, self.patch_length = byte_config.n_positions - 1, patch_config.n_positions
        patch_config = copy.deepcopy(patch_config)
        patch_config.patch_size = self.patch_size
        self.patch_level_decoder = PatchLevelDecoder(patch_config)
        self.byte_level_decoder = ByteLevelDecoder(byte_config)

    def forward(self, patches, masks, targets=None):
        """Returns the BytePrediction of the N target patches, ordered by sequence, then patch.

        `patches`, int64 (B, P, S) or (B, P·S), and `masks`, integers (B, P), are as in `PatchLevelDecoder.encode`.
        `targets`, bool (B, P-1), is true at the patches to predict, of patches 1 to P-1. None = all real ones.
        """
        patches = patches.reshape(len(patches), -1, self.patch_size)  # (B, P·S) -> (B, P, S)
        encoded, ragged = self.patch_level_decoder.encode(patches, masks)  # (N real patches, D)
        targets = masks[:, 1:] == 1 if targets is None else targets  # (B, P-1)
        # (2, N): each target's sequence, and the patch before it
        sequence, before = to_device(targets.cpu().nonzero().t().contiguous(), patches.device)
        # index_select has a faster gradient than indexing
        encoded = encoded.index_select(0, ragged.starts[sequence] + before)  # (N, D)
        return self.byte_level_decoder(encoded, patches[sequence, before + 1])


class bGPTForClassification(ByteModel):
    """The classifier: one linear layer on the mean output over the real patches (paper, 3.3).

    `patch_config` is the GPT2Config of a `PatchLevelDecoder`. The attributes `patch_size` and `patch_length` are S and L.
    """

    def __init__(self, patch_config, num_labels):
        super().__init__(patch_config)
        self.patch_level_decoder = PatchLevelDecoder(patch_config)
        self.patch_size, self.patch_length = self.patch_level_decoder.patch_size, patch_config.n_positions
        self.classifier = nn.Linear(patch_config.n_embd, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)

    def forward(self, patches, masks=None):
        """Returns logits (B, labels), each row independent of the rest. Arguments as in `PatchLevelDecoder.encode`."""
        encoded = self.patch_level_decoder(patches, masks).last_hidden_state  # (B, P, D), 0 at padding
        counts = encoded.shape[1] if masks is None else to_device(masks.cpu().sum(1, keepdim=True), encoded.device)  # (B, 1)
        return self.classifier(encoded.sum(1) / counts)


@dataclasses.dataclass
class ModelSizes:
    """The sizes of a model, named as in config.py."""

    PATCH_SIZE: int
    PATCH_LENGTH: int
    HIDDEN_SIZE: int
    PATCH_NUM_LAYERS: int
    BYTE_NUM_LAYERS: int | None = None  # None: no byte-level decoder, so a classifier
    num_labels: int | None = None  # None: no classifier head, so a generative model

    @property
    def kind(self):
        """The model's kind in messages."""
        return "generative model" if self.num_labels is None else "classifier"

    def build(self, dropout=0.1, embedding_start="published"):
        """Returns a new model of these sizes with random weights. `embedding_start` is EMBEDDING_START."""
        layers = self.PATCH_NUM_LAYERS, self.BYTE_NUM_LAYERS or 1
        configs = make_configs(self.PATCH_SIZE, self.PATCH_LENGTH, self.HIDDEN_SIZE, *layers, dropout)
        model = bGPTLMHeadModel(*configs) if self.num_labels is None else bGPTForClassification(configs[0], self.num_labels)
        if embedding_start != "published":
            patch_embedding = model.patch_level_decoder.patch_embedding.weight  # (D, S·V)
            vectors = structured_vectors(embedding_start, self.PATCH_SIZE, self.HIDDEN_SIZE)  # (S, V, D)
            with torch.no_grad():
                patch_embedding.copy_(vectors.flatten(0, 1).t())
                if embedding_start == "bits" and self.num_labels is None:  # the head is tied to the byte-level embedding
                    model.byte_level_decoder.base.lm_head.weight.copy_(structured_vectors("bits", 1, self.HIDDEN_SIZE)[0])
        return model


def structured_vectors(start, count, width):
    """Returns random embeddings (count, V, width) in which related bytes have similar vectors.

    A byte's vector is a linear map of its features, plus a little noise. The map is random for each of the `count` positions.
    Symbol 256 gets a random vector. The features are by `start`: "smooth" has waves of half a period to four periods over the
    bytes, so that close values have close vectors. "bits" has the eight bits, and waves of 1, 2, 4 … 64 periods.
    """
    periods, noise, std = ((0.5, 1, 2, 4), 0.02, 0.12) if start == "smooth" else ([2.0**n for n in range(7)], 0.05, 0.2)
    values = torch.arange(256)[:, None]
    angles = values * torch.tensor(periods) * (2 * torch.pi / 256)  # (256, waves)
    features = torch.cat((angles.sin(), angles.cos()), dim=1)  # (256, F)
    if start == "bits":
        bits = ((values >> torch.arange(8)) & 1) * 2.0 - 1  # (256, 8)
        features = torch.cat((features / len(periods) ** 0.5, bits / 8**0.5), dim=1)  # half of the variance each
    features = features / features[0].norm()  # rows of norm 1
    vectors = torch.randn(count, NUM_SYMBOLS, width)
    vectors[:, :256] *= noise**0.5
    vectors[:, :256] += (1 - noise) ** 0.5 * features @ torch.randn(count, features.shape[1], width)
    return vectors * std
