"""bGPT, a language model of bytes: files as patches, data sets and batches, the two decoders.

A file is a sequence of patches of S symbols. Symbols 0-255 are bytes; 256 is padding and end of file. `tune.abc` with
20 bytes, S = 16, is 4 patches; the first is the extension patch, the last the end patch (`.` is the symbol 256):

    patch 0  | a b c . . . . . . . . . . . . . |  extension
    patch 1  | X : 1 \n T : T h e   B u t t e r |  content
    patch 2  | f l y \n . . . . . . . . . . . . |  content, filled up
    patch 3  | . . . . . . . . . . . . . . . . |  end

The patch-level decoder reads whole patches and sums up patches 0..i in one vector; from that vector the byte-level
decoder writes patch i+1, symbol by symbol. The first is deep and runs once per patch, the second is shallow and runs once
per byte.

A byte enters the model twice: in `PatchLevelDecoder.embed`, in a patch, and in `ByteLevelDecoder.forward`, by itself.

Dimensions in shape comments: B sequences in a batch, P patches in a sequence, S symbols in a patch (PATCH_SIZE),
D width (HIDDEN_SIZE), N patches of a batch that are real or targets, V = 257 symbols, H = D/64 attention heads, T places
in an attended sequence, L the most patches in a sequence (PATCH_LENGTH).

Nothing here reads config.py: sizes and settings are arguments.
"""

import copy
import dataclasses
import errno
import hashlib
import os
import sys
import zlib
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from bgpt import files as listing
from bgpt import system
from bgpt.attention import Ragged, attend, dropout

END = 256  # the symbol of padding and end of file
NUM_SYMBOLS = 257  # V: 256 bytes and END
HEAD_SIZE = 64  # width of an attention head

# ---------------------------------------------------------------------------------------------------------------------
# Files <-> patches
# ---------------------------------------------------------------------------------------------------------------------


class UnreadableFile(system.UserError):
    """A file that was there when the files were listed cannot be read any more, has another size, or no longer fits."""


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


def read_patches(path, patch_size, patch_length=None, rng=None, lower_case=False):
    """Reads a file as patches, at most `patch_length` of them; from a longer file, only the bytes that are kept.

    Args:
        path: the file.
        patch_size: S.
        patch_length: most patches to return; None = all.
        rng: numpy Generator, or the seed of one, that draws what is kept of a longer file: its head, a window of its body
            or its tail. None = its head.
        lower_case: whether the extension patch has the extension in lower case, however the file spells it.

    Returns:
        patches: int16 (P, S).
        counted: bool (P, S), true at the symbols that bits per byte are counted over: the content and the first 256
            after it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total = count_patches(size, patch_size)
        first, last = 0, total  # the patches that are kept
        if patch_length is not None and total > patch_length:
            first, last = _crop(total, patch_length, rng)
        return _read_between(file, size, patch_size, first, last, lower_case)


def read_window(path, patch_size, first, last, size):
    """Reads the patches `first` to `last` - 1 of a file of `size` bytes, and no other bytes of it; see `read_patches`.

    Raises:
        OSError: the file cannot be read.
        UserError: it has another size by now.
    """
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size:
            raise UnreadableFile("has another size than when it was listed")
        return _read_between(file, size, patch_size, first, last)


def count_patches(size, patch_size):
    """Returns the patches of a file of `size` bytes (an integer or an array), extension patch and end patch included."""
    return -(-size // patch_size) + 2


def _read_between(file, size, patch_size, first, last, lower_case=False):
    """Returns the patches `first` to `last` - 1 of an open file of `size` bytes, and their `counted`; see `read_patches`."""
    start, stop = (max(first, 1) - 1) * patch_size, min((last - 1) * patch_size, size)  # bytes of the content
    content = np.fromfile(file, dtype=np.uint8, offset=start, count=max(stop - start, 0))
    extension = listing.extension_of(file.name)
    patches = to_patches(content, extension.lower() if lower_case else extension, patch_size)
    counted = np.zeros(patches.shape, dtype=bool)
    # (P, S) -> (P·S,): the content follows the extension patch, and one more symbol ends it
    counted.reshape(-1)[patch_size : patch_size + len(content) + 1] = True
    kept = slice(0 if first == 0 else 1, len(patches) if last == count_patches(size, patch_size) else -1)
    return patches[kept], counted[kept]


def _crop(total, length, rng):
    """Returns the first patch kept, and the one after the last, of a file of `total` > `length` patches."""
    if rng is None:
        return 0, length
    rng = np.random.default_rng(rng)
    part = ("head", "body", "tail")[rng.integers(3)]
    if part != "body":
        return (0, length) if part == "head" else (total - length, total)
    # neither the extension patch nor the end patch; one patch too many leaves no such window, and then it is the tail
    first = int(rng.integers(1, max(total - length, 2)))
    return first, first + length


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class Examples:
    """What to learn from: a sequence of tuples of paths, (file,) for itself or (input, target) for a conversion.

    Args:
        files: the Files.
        indices: int64 (n, 1) or (n, 2), the examples' paths by their index in `files`.
        parts: {example: (first patch, the one after the last)} of single files that are not taken whole.
    """

    def __init__(self, files, indices, parts=None):
        self.files = files
        self.indices = np.asarray(indices, dtype=np.int64)
        self.parts = parts or {}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return tuple(self.files[file] for file in self.indices[index])

    @classmethod
    def of(cls, files):
        """Returns the Examples of Files, each for itself, in the order of their folders' places and then of their paths."""
        return cls(files, np.argsort(files.places, kind="stable")[:, None])

    def select(self, indices):
        """Returns the Examples at `indices`, integers, in their order."""
        indices = np.asarray(indices, dtype=np.int64)
        olds = indices.tolist() if self.parts else []
        parts = {new: self.parts[old] for new, old in enumerate(olds) if old in self.parts}
        return Examples(self.files, self.indices[indices], parts)

    def both_ways(self):
        """Returns pairs in both directions: each pair, then the same with input and target exchanged."""
        # (n, 2) -> (n, 2 directions, 2) -> (2·n, 2)
        return Examples(self.files, np.stack((self.indices, self.indices[:, ::-1]), axis=1).reshape(-1, 2))

    def lengths(self, patch_size, patch_length=None):
        """Returns the patches of each example's sequence, int64 (n,); of a file at most `patch_length`, unless that is None."""
        content = -(-self.files.sizes[self.indices].clip(min=0) // patch_size)  # (n, 1) or (n, 2)
        lengths = content.sum(1) + self.indices.shape[1] + 1  # an extension patch for each file, one end patch
        return lengths if self.indices.shape[1] == 2 or patch_length is None else lengths.clip(max=patch_length)

    def spans(self, patch_size):
        """Returns int64 (n, 2): of each example's whole sequence, the first patch that is taken and the one after the last."""
        lengths = self.lengths(patch_size)
        spans = np.stack((np.zeros_like(lengths), lengths), axis=1)
        for index, part in self.parts.items():
            spans[index] = part
        return spans

    def extensions(self):
        """Returns the set of the files' extensions, as their extension patches hold them: those of pairs in lower case."""
        found = set()
        for file in self.indices.reshape(-1).tolist():
            stem, _, extension = self.files.encoded(file).rpartition(b"/")[2].rpartition(b".")
            found.add(extension if stem else b"")
        found = {os.fsdecode(extension) for extension in found}
        return {extension.lower() for extension in found} if self.indices.shape[1] == 2 else found

    def hashes(self):
        """Returns int64 (files, 2): a hash of each file's identity, and its size; in order, by example.

        Other data, or another order, have others; the same data in a moved or differently named folder have the same.
        """
        files, digests = self.indices.reshape(-1), bytearray()  # (n, 1) or (n, 2) -> (files,)
        for part in np.array_split(files, len(self) // 65536 + 1):  # few Python objects at a time
            digests += b"".join([hashlib.blake2b(self.files.identity(file), digest_size=8).digest() for file in part.tolist()])
        return np.stack((np.frombuffer(digests, dtype="<i8"), self.files.sizes[files]), axis=1)


def balanced_parts(lengths, count):
    """Splits sequences into parts of nearly the same number of patches: the longest go first, each to the part with least.

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


class ByteDataset:
    """Files, or pairs of files, as sequences of patches.

    Args:
        examples: the Examples.
        patch_size: S.
        patch_length: L, the most patches in a sequence.
        crop_seed: what the crops of files longer than that are drawn from, beside the file's identity: a list of
            whole numbers such as [seed, epoch]; None = always the head of the file.
    """

    def __init__(self, examples, patch_size, patch_length, crop_seed=None):
        self.examples = examples
        self.patch_size = patch_size
        self.patch_length = patch_length
        self.crop_seed = crop_seed

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        """Returns (patches int16 (P, S), counted bool (P, S), context).

        The first two are those of `read_patches`; context is how many patches at the beginning are given, not predicted: 1.

        Raises:
            UnreadableFile: a file cannot be read, or a pair no longer fits.
        """
        paths = self.examples[index]
        try:
            if len(paths) == 1:
                patches, counted = read_patches(paths[0], self.patch_size, self.patch_length, self._seed(index))
            else:
                source, target = (read_patches(path, self.patch_size, lower_case=True) for path in paths)
                # the input file without its end patch, then the whole target file
                patches, counted = (np.concatenate((s[:-1], t)) for s, t in zip(source, target))
        except OSError as error:
            raise UnreadableFile(f"cannot read {error.filename or paths!r}: {error.strerror}") from None
        if len(patches) > self.patch_length:
            raise UnreadableFile(f"{' and '.join(paths)} have grown since the start: they no longer fit in PATCH_LENGTH")
        return patches, counted, 1

    def _seed(self, index):
        """Returns the seed of what is kept of a longer file; None = its head."""
        if self.crop_seed is None:
            return None
        return [*self.crop_seed, zlib.crc32(self.examples.files.identity(self.examples.indices[index, 0]))]

    def lengths(self, indices):
        """Returns the patches of the sequences of the examples at `indices`, an integer array."""
        return self.examples.select(indices).lengths(self.patch_size, self.patch_length)

    def read(self, indices):
        """Returns the sequences of the examples at `indices`, a list of what a `Batch` is made of."""
        return [self[index] for index in indices]


class Batch:
    """Sequences of different lengths, padded with 256 on the right.

    Args:
        sequences: iterable of (patches int16 (P, S), counted bool (P, S), context), see `ByteDataset`.

    Attributes:
        lengths: int64 array (B,), patches of each sequence.
        patches: int16 (B, P, S).
        masks: uint8 (B, P), 1 at real patches.
        counted: bool (B, P, S), true at the symbols that bits per byte are counted over.
        targets: bool (B, P-1), of all patches but the first, true at those that are to be predicted.
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
        """Returns at most `parts` pairs of sequences' indices (int64 array) and their Batch.

        The batches have nearly the same number of patches, see `balanced_parts`.
        """
        return [(rows, Batch(self._sequences[i] for i in rows)) for rows in balanced_parts(self.lengths, parts) if len(rows)]

    def patches_on(self, device):
        """Returns the patches as the models want them, int64 (B, P, S), on a device; they are copied to a GPU asynchronously."""
        patches = self.patches.pin_memory() if device.type == "cuda" else self.patches
        return patches.to(device, non_blocking=True).long()


_dataset = None  # in a worker process: the data set that it reads


def _set_dataset(dataset):
    global _dataset
    _dataset = dataset


def _read(indices):
    return _dataset.read(indices)


def batches(dataset, index_batches, num_workers=0, while_waiting=None):
    """Yields the Batch of every array of indices.

    Args:
        dataset: a ByteDataset, or `windowing.Windows`.
        index_batches: iterable of integer arrays.
        num_workers: processes that read; their batches come through pipes, not through shared memory, of which containers
            have little. They end with the iteration, or with the main process.
        while_waiting: called now and then while a worker has not read the next batch yet; it may raise an error.

    Raises:
        UnreadableFile: a file cannot be read, or a pair no longer fits.
        UserError: a worker was killed.
    """
    if num_workers == 0:
        results = map(dataset.read, index_batches)
    else:
        # a worker that is forked has the data set at once, without a copy, and does not import PyTorch again
        method = "fork" if sys.platform == "linux" else "spawn"
        results = system.run_jobs(
            ((number, _read, indices) for number, indices in enumerate(index_batches)), num_workers, method=method,
            initializer=_set_dataset, initargs=(dataset,), expendable=True, while_waiting=while_waiting,
        )  # fmt: skip
    try:
        yield from map(Batch, results)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise system.UserError("too many open files: lower NUM_WORKERS, or allow more with `ulimit -n`") from None
    except BrokenProcessPool:
        raise system.UserError("a reading process was killed; is memory short? Lower NUM_WORKERS") from None


# ---------------------------------------------------------------------------------------------------------------------
# Decoders
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


class FileModel(ByteModel):
    """What the two models that read files share."""

    @property
    def patch_size(self):
        """S, the symbols in a patch."""
        return self.patch_level_decoder.patch_size

    @property
    def patch_length(self):
        """L, the most patches in a sequence."""
        return self.patch_level_decoder.config.n_positions


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
            masks: integers (B, P), 1 at real patches, 0 at the padding on the right; None = all are real. Best given on the
                CPU: their values are needed there, and reading them from a GPU waits for it.

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


class bGPTLMHeadModel(FileModel):
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
        patches = patches.reshape(len(patches), -1, self.patch_size)  # (B, P·S) -> (B, P, S)
        encoded, ragged = self.patch_level_decoder.encode(patches, masks)  # (N real patches, D)
        if targets is None:
            targets = masks[:, 1:] == 1  # (B, P-1)
        sequence, before = targets.nonzero(as_tuple=True)  # (N,) each: the targets' sequences, and the patches before them
        sequence, before = sequence.to(patches.device), before.to(patches.device)
        # index_select: its gradient is added up faster than that of indexing
        encoded = encoded.index_select(0, ragged.starts[sequence] + before)  # (N, D)
        return self.byte_level_decoder(encoded, patches[sequence, before + 1])


class bGPTForClassification(FileModel):
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


@dataclasses.dataclass
class ModelSizes:
    """The sizes of a model, from config.py or from the shapes of a checkpoint's tensors; named as in config.py."""

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

    def build(self, dropout=0.1, embedding_start="published"):
        """Returns a new model of these sizes, with random weights; `embedding_start` is EMBEDDING_START."""
        configs = make_configs(
            self.PATCH_SIZE, self.PATCH_LENGTH, self.HIDDEN_SIZE, self.PATCH_NUM_LAYERS, self.BYTE_NUM_LAYERS or 1, dropout
        )
        model = bGPTLMHeadModel(*configs) if self.num_labels is None else bGPTForClassification(configs[0], self.num_labels)
        if embedding_start == "smooth":
            smoothen(model.patch_level_decoder.patch_embedding.weight)
        return model


@torch.no_grad()
def smoothen(weight):
    """Fills the weight of a patch embedding, (D, S·V), so that close byte values have close vectors; 256 stands apart.

    At each of the S positions in a patch, 98 % of the variance are sines and cosines of half a period to four periods over
    the bytes, in random directions. The standard deviation is 0.12.
    """
    angles = torch.arange(256)[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0]) * (2 * torch.pi / 256)  # (256, 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1) / 2  # (256, 8), rows of norm 1
    vectors = torch.randn(weight.shape[1] // NUM_SYMBOLS, NUM_SYMBOLS, len(weight))  # (S, V, D)
    vectors[:, :256] *= 0.02**0.5
    vectors[:, :256] += 0.98**0.5 * waves @ torch.randn(len(vectors), 8, len(weight))
    weight.copy_(vectors.flatten(0, 1).t() * 0.12)  # (S, V, D) -> (S·V, D) -> (D, S·V)
