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

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel
from transformers.utils import ModelOutput

END = 256  # the symbol of padding and end of file
NUM_SYMBOLS = 257  # V: 256 bytes and END
HEAD_SIZE = 64  # width of an attention head


class UserError(ValueError):
    """Something that the user can put right; its message says what is wrong and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Files <-> patches
# ---------------------------------------------------------------------------------------------------------------------


def extension_of(path):
    """Returns the extension of a file's name, without the dot; "" if it has none."""
    return os.path.splitext(path)[1][1:]


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
        rng: numpy Generator that draws what is kept of a longer file: its head, a window of its body or its tail.
            None = its head.

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
    part = "head" if rng is None else ("head", "body", "tail")[rng.integers(3)]
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


def list_files(folders, name, extension=None):
    """Returns the paths of all files below the folders, sorted, each once; hidden files and folders are left out.

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
    found, seen = set(), set()
    waiting, links = [os.path.normpath(folder) for folder in folders], []
    while waiting or links:
        folder = (waiting or links).pop()  # links to folders come last: what they lead to keeps its own name
        real = os.path.realpath(folder)
        if real in seen:  # also ends a link that leads round and round
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(entry.path)
                    elif entry.is_file() or entry.is_symlink():  # a dead link is kept: reading it says so; a pipe is no file
                        if extension is None or extension_of(entry.name) == extension:
                            found.add(entry.path)
        except OSError as error:
            raise UserError(f"{name}: cannot read the folder {folder!r}: {error.strerror}") from None
    return sorted(found)


def hold_out(groups, share, seed):
    """Splits a list in two at random: the rest, and `share` of it (at least one); each keeps the list's order."""
    if len(groups) < 2:
        raise UserError(f"EVAL_FOLDERS holds nothing, and EVAL_SPLIT cannot hold out a part of {len(groups)}: add files")
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    held = set(np.random.default_rng([seed, zlib.crc32(b"hold out")]).permutation(len(groups))[:count].tolist())
    return [g for i, g in enumerate(groups) if i not in held], [g for i, g in enumerate(groups) if i in held]


def split_conversion_mode(mode):
    """Returns (input extension, target extension, whether both directions are meant) of "abc->mid" or "abc&mid"."""
    source, sign, target = re.fullmatch(r"([^&>]+?)(->|&)([^&>]+)", mode).groups()
    return source, target, sign == "&"


def pair_files(paths, mode):
    """Returns [(input path, target path), ...] for the files of the same folder and stem, in the order of `paths`."""
    source, target, _ = split_conversion_mode(mode)
    known = set(paths)
    pairs = []
    for path in paths:
        if extension_of(path) == source:
            partner = os.path.splitext(path)[0] + "." + target
            if partner in known:
                pairs.append((path, partner))
    return pairs


def fitting_pairs(pairs, patch_size, patch_length):
    """Returns the pairs that fit in a sequence, and the patches of the longest pair of all (0 if there are none)."""
    lengths = []
    for pair in pairs:
        try:
            sizes = [os.stat(path).st_size for path in pair]
        except OSError as error:
            raise UserError(f"cannot read {error.filename!r}: {error.strerror}") from None
        lengths.append(sum(-(-size // patch_size) for size in sizes) + 3)  # two extension patches, one end patch
    return [pair for pair, length in zip(pairs, lengths) if length <= patch_length], max(lengths, default=0)


class ByteDataset(torch.utils.data.Dataset):
    """Files, or pairs of files, as sequences of patches.

    Args:
        examples: list of tuples of paths: (file,) for itself, (input, target) for a conversion.
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
                rng = None
                if self.crop_seed is not None:
                    rng = np.random.default_rng([*self.crop_seed, zlib.crc32(os.fsencode(paths[0]))])
                patches, counted = read_patches(paths[0], self.patch_size, self.patch_length, rng)
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
    masks: torch.Tensor  # int64 (B, P), 1 at real patches
    counted: torch.Tensor  # bool (B, P, S), true at the symbols that bits per byte are counted over

    def split(self, parts):
        """Returns at most `parts` batches of as many sequences each, every one cut to its own longest sequence."""
        size = -(-len(self.masks) // parts)
        split = []
        for rows in torch.arange(len(self.masks)).split(size):
            longest = int(self.masks[rows].sum(1).max())
            split.append(Batch(self.patches[rows, :longest], self.masks[rows, :longest], self.counted[rows, :longest]))
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
    masks = np.zeros(shape, dtype=np.int64)
    counted = np.zeros((*shape, patch_size), dtype=bool)
    for row, (sample_patches, sample_counted) in enumerate(samples):
        patches[row, : len(sample_patches)] = sample_patches
        masks[row, : len(sample_patches)] = 1
        counted[row, : len(sample_patches)] = sample_counted
    return Batch(torch.from_numpy(patches), torch.from_numpy(masks), torch.from_numpy(counted))


def batches(dataset, order, batch_size, num_workers=0, pin_memory=False):
    """Yields a Batch for every `batch_size` indices of `order` (a sequence of indices; the last batch may be short).

    Raises:
        UserError: a file cannot be read.
    """
    order = [int(index) for index in order]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[order[start : start + batch_size] for start in range(0, len(order), batch_size)],
        collate_fn=collate,
        num_workers=num_workers,
        # Python 3.14 no longer forks by default, and every new worker would then import PyTorch again, each epoch
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


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


class ByteModel(PreTrainedModel):
    """What the four models share: a GPT2Config, and PyTorch's scaled_dot_product_attention."""

    config_class = GPT2Config
    _supports_sdpa = True  # without it, transformers would fall back to its slow attention


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
        """Returns the embeddings (B, P, D) of patches, int64 (B, P, S), before positions are added.

        The product of the one-hot patches and the weight is the sum of the S columns that the ones select.
        """
        batch, length, patch_size = patches.shape
        columns = patches + torch.arange(patch_size, device=patches.device) * NUM_SYMBOLS  # (B, P, S)
        weight = self.patch_embedding.weight.t().contiguous()  # (S·V, D), no copy: see __init__
        # (B, P, S) -> (B·P, S) -> (B·P, D)
        sums = F.embedding_bag(columns.reshape(-1, patch_size), weight, mode="sum")
        return (sums + self.patch_embedding.bias).view(batch, length, -1)

    def forward(self, patches, masks=None):
        """Returns transformers' output, whose `last_hidden_state` is (B, P, D).

        Args:
            patches: int64 (B, P, S) or (B, P·S).
            masks: accepted as in the published code, and not needed: padding stands on the right, where no real patch
                sees it.

        Raises:
            ValueError: there are more patches than positions.
        """
        patches = patches.reshape(len(patches), -1, self.patch_size)  # (B, P·S) -> (B, P, S)
        if patches.shape[1] > self.config.n_positions:
            raise ValueError(f"{patches.shape[1]} patches, but the model has positions for {self.config.n_positions}")
        return self.base(inputs_embeds=self.embed(patches), use_cache=False)


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
        hidden = self.base.transformer(inputs_embeds=inputs, use_cache=False).last_hidden_state  # (N, S, D)
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
            masks: int64 (B, P), 1 at real patches, 0 at the padding on the right.
            targets: bool (B, P-1), which of patches 1.. to predict; None = all real ones.
        """
        patch_size = self.patch_level_decoder.patch_size
        patches = patches.reshape(len(patches), -1, patch_size)  # (B, P·S) -> (B, P, S)
        encoded = self.patch_level_decoder(patches).last_hidden_state  # (B, P, D)
        if targets is None:
            targets = masks[:, 1:] == 1  # (B, P-1)
        # boolean indexing: (B, P-1, D) -> (N, D) and (B, P-1, S) -> (N, S)
        return self.byte_level_decoder(encoded[:, :-1][targets], patches[:, 1:][targets])


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
            masks: int64 (B, P), 1 at real patches; None = all are real.
        """
        encoded = self.patch_level_decoder(patches).last_hidden_state  # (B, P, D)
        if masks is None:
            masks = torch.ones(encoded.shape[:2], dtype=torch.int64, device=encoded.device)
        weights = masks.unsqueeze(-1).to(encoded.dtype)  # (B, P, 1)
        mean = (encoded * weights).sum(1) / weights.sum(1)  # (B, D)
        return self.classifier(mean)


def sample_targets(masks, most, rng):
    """Draws which target patches of a micro-batch go through the byte-level decoder in training.

    Args:
        masks: int64 (B, P), 1 at real patches.
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
    probabilities = torch.softmax(logits.double(), dim=-1)
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


class KVCache:
    """Keys and values of every layer of a GPT-2 for a batch of sequences, allocated once.

    Attributes:
        keys, values: (layers, B, H, T, 64), T the number of positions.
    """

    def __init__(self, gpt2, batch_size):
        config = gpt2.config
        shape = (config.n_layer, batch_size, config.n_head, config.n_positions, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(2, *shape, dtype=gpt2.dtype, device=gpt2.device)


def run_blocks(gpt2, x, attend):
    """Runs the blocks and the last layer norm of a GPT2Model; the attention itself is given.

    Args:
        gpt2: the GPT2Model, in eval mode.
        x: (B, T, D), positions added.
        attend: function (layer, queries, keys, values), each (B, H, T, 64), that returns (B, H, T, 64).
    """
    batch, length, width = x.shape
    for layer, block in enumerate(gpt2.h):
        qkv = block.attn.c_attn(block.ln_1(x))  # (B, T, 3·D)
        # (B, T, 3·D) -> (B, T, 3, H, 64) -> (3, B, H, T, 64)
        queries, keys, values = qkv.view(batch, length, 3, gpt2.config.n_head, -1).permute(2, 0, 3, 1, 4)
        # (B, H, T, 64) -> (B, T, H, 64) -> (B, T, D)
        attended = attend(layer, queries, keys, values).transpose(1, 2).reshape(batch, length, width)
        x = x + block.attn.c_proj(attended)
        x = x + block.mlp(block.ln_2(x))
    return gpt2.ln_f(x)


def prefill_patches(decoder, cache, rows, patches):
    """Runs whole prompts through the patch-level decoder into rows of the cache.

    Args:
        decoder: the PatchLevelDecoder.
        cache: its KVCache.
        rows: slice of B rows of the cache.
        patches: int64 (B, P, S), padded on the right.

    Returns:
        (B, P, D); what stands behind a sequence's own end is of no use.
    """

    def attend(layer, queries, keys, values):
        cache.keys[layer, rows, :, : patches.shape[1]] = keys
        cache.values[layer, rows, :, : patches.shape[1]] = values
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    positions = decoder.base.wpe.weight[: patches.shape[1]]  # (P, D)
    return run_blocks(decoder.base, decoder.embed(patches) + positions, attend)


def step_patches(decoder, cache, patches, positions, longest):
    """Runs one more patch of each of the first B rows of the cache.

    Args:
        decoder: the PatchLevelDecoder.
        cache: its KVCache.
        patches: int64 (B, S).
        positions: int64 (B,), the position of each row's patch.
        longest: the largest of `positions`, plus 1.

    Returns:
        (B, D)
    """
    batch = len(patches)
    rows = torch.arange(batch, device=patches.device)
    # (B, 1, 1, longest): a row sees what it holds, its own new patch included, not what other rows hold beyond
    visible = (torch.arange(longest, device=patches.device) <= positions.unsqueeze(-1)).view(batch, 1, 1, longest)

    def attend(layer, queries, keys, values):
        cache.keys[layer, rows, :, positions] = keys.squeeze(2)
        cache.values[layer, rows, :, positions] = values.squeeze(2)
        held = (cache.keys[layer, :batch, :, :longest], cache.values[layer, :batch, :, :longest])
        return F.scaled_dot_product_attention(queries, *held, attn_mask=visible)

    x = decoder.embed(patches.unsqueeze(1)) + decoder.base.wpe(positions).unsqueeze(1)  # (B, 1, D)
    return run_blocks(decoder.base, x, attend).squeeze(1)


def write_patches(decoder, cache, encoded, given, num_given, uniforms, sampling):
    """Writes one patch for each of B rows, symbol by symbol, with the byte-level decoder.

    Args:
        decoder: the ByteLevelDecoder.
        cache: its KVCache, of B rows or more; what it holds is overwritten.
        encoded: (B, D), the patch-level output before the patch.
        given: int64 (B, S), the patch so far, where a prompt ends inside it.
        num_given: int64 (B,), how many symbols of `given` are given.
        uniforms: float64 (B, S), see `sample_symbols`.
        sampling: a Sampling.

    Returns:
        int64 (B, S): given symbols, then drawn ones; those behind a drawn 256 are of no use.
    """
    gpt2, batch = decoder.base.transformer, len(encoded)
    patches = given.clone()
    x = encoded

    def attend(layer, queries, keys, values):
        cache.keys[layer, :batch, :, j] = keys.squeeze(2)
        cache.values[layer, :batch, :, j] = values.squeeze(2)
        held = (cache.keys[layer, :batch, :, : j + 1], cache.values[layer, :batch, :, : j + 1])
        return F.scaled_dot_product_attention(queries, *held)

    for j in range(given.shape[1]):
        if j > 0:
            x = gpt2.wte(patches[:, j - 1])  # (B, D)
        hidden = run_blocks(gpt2, (x + gpt2.wpe.weight[j]).unsqueeze(1), attend).squeeze(1)  # (B, D)
        drawn = sample_symbols(decoder.base.lm_head(hidden), sampling, uniforms[:, j])
        patches[:, j] = torch.where(j < num_given, given[:, j], drawn)
    return patches


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


class _Row:
    """One sequence under way: which prompt, and how many patches are whole."""

    def __init__(self, prompt, patch_size):
        self.prompt = prompt
        self.whole = len(prompt.symbols) // patch_size
        self.num_given = len(prompt.symbols) % patch_size  # in the patch after those


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
    patch_level, byte_level = model.patch_level_decoder, model.byte_level_decoder
    size, length, device = patch_level.patch_size, patch_level.config.n_positions, model.device
    patch_cache = KVCache(patch_level.base, batch_size)
    byte_cache = KVCache(byte_level.base.transformer, batch_size)
    symbols = torch.full((batch_size, length, size), END, device=device)  # (B, L, S), all that is known of each row
    uniforms = torch.zeros((batch_size, length, size), dtype=torch.float64, device=device)  # one for each symbol
    encoded = torch.zeros((batch_size, patch_level.config.n_embd), dtype=model.dtype, device=device)  # after the last whole
    prompts, rows = iter(prompts), []
    while True:
        # waiting prompts take free places, all in one pass
        admitted = [_Row(prompt, size) for prompt in itertools.islice(prompts, batch_size - len(rows))]
        if admitted:
            places = slice(len(rows), len(rows) + len(admitted))
            for place, row in enumerate(admitted, len(rows)):
                known = torch.from_numpy(np.asarray(row.prompt.symbols, dtype=np.int64))
                symbols[place].fill_(END).view(-1)[: len(known)] = known.to(device)
                drawn = np.random.default_rng(row.prompt.stream).random(length * size).reshape(length, size)
                uniforms[place] = torch.from_numpy(drawn).to(device)
            longest = max(row.whole for row in admitted)
            outputs = prefill_patches(patch_level, patch_cache, places, symbols[places, :longest])  # (B, P, D)
            last = torch.tensor([row.whole - 1 for row in admitted], device=device)
            encoded[places] = outputs[torch.arange(len(admitted), device=device), last]
            rows += admitted
        if not rows:
            return

        # one patch for every row
        everyone = torch.arange(len(rows), device=device)
        whole = torch.tensor([row.whole for row in rows], device=device)
        num_given = torch.tensor([row.num_given for row in rows], device=device)
        patches = write_patches(
            byte_level,
            byte_cache,
            encoded[: len(rows)],
            symbols[everyone, whole],
            num_given,
            uniforms[everyone, whole],
            sampling,
        )
        symbols[everyone, whole] = patches
        is_end = (patches == END) & (torch.arange(size, device=device) >= num_given.unsqueeze(-1))  # (B, S)
        ended = is_end.any(-1).tolist()
        for row in rows:
            row.whole += 1
            row.num_given = 0
        if on_patches is not None:
            on_patches(len(rows))

        # finished rows leave, and the last rows move up into their places
        for place in reversed(range(len(rows))):
            row = rows[place]
            if not ended[place] and row.whole < length:
                continue
            written = symbols[place].view(-1)[len(row.prompt.symbols) : row.whole * size].cpu().numpy()
            stop = np.flatnonzero(written == END)[0] if ended[place] else len(written)
            yield Continuation(row.prompt.key, written[:stop].copy(), cut_off=not ended[place])
            moved = rows.pop()
            if moved is not row:
                rows[place] = moved
                for state in (symbols, uniforms):
                    state[place] = state[len(rows)]
                held = slice(0, moved.whole - 1)  # the patch just written is not in the cache yet
                for state in (patch_cache.keys, patch_cache.values):
                    state[:, place, :, held] = state[:, len(rows), :, held]
        if rows:
            whole = torch.tensor([row.whole for row in rows], device=device)
            newest = symbols[torch.arange(len(rows), device=device), whole - 1]  # (B, S)
            longest = max(row.whole for row in rows)
            encoded[: len(rows)] = step_patches(patch_level, patch_cache, newest, whole - 1, longest)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Opens a new binary file that takes the place of `path`, whole and synced, if the block ends without an error.

    At any moment the path holds the whole old file or the whole new one. After an error nothing is left beside it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=".bgpt-", suffix=".tmp", dir=folder)
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


def save_checkpoint(path, checkpoint):
    """Saves a dict of plain types and tensors at `path`, see `replacing`."""
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch.save ends when a write fails, on a full disk for instance
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path, name):
    """Returns the dict in a checkpoint, its tensors on the CPU. No code that a file may hold is ever run.

    Args:
        path: the file.
        name: the constant that holds the path, for messages.

    Raises:
        UserError: the file is missing, cannot be read, is no checkpoint, or needs more than plain types and tensors.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{name}: {path!r} {what}; it must be a checkpoint (.pth)")
    try:
        with warnings.catch_warnings(action="ignore"):  # what the reader thinks of a file that is none
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its readers do: pickle, zip, end of file, key, type…
        if isinstance(error, OSError) and error.strerror:
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
    """Loads an AdamW's state; raises ValueError or TypeError if it is none for its parameters, before it is used.

    The fused step trusts the shapes that it is given.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if not _is_whole(values[name].cpu()) or values[name].shape != parameter.shape:
                raise ValueError(f"optimizer: an {name} is not {tuple(parameter.shape)}")
        if torch.as_tensor(values["step"]).numel() != 1:
            raise ValueError("optimizer: a step is not one number")


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


def check_sizes(wanted, state, where):
    """Checks that a checkpoint's model has the sizes that config.py gives.

    Raises:
        UserError: names the kind of model that was expected, or the constants to change.
    """
    found = model_sizes(state, where)
    kinds = ["classifier" if sizes.num_labels is not None else "generative model" for sizes in (found, wanted)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{where} is a {kinds[0]}; here a {kinds[1]} is needed")
    differing = [
        field.name for field in dataclasses.fields(wanted) if getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differing:
        changes = ", ".join(f"{name} = {getattr(found, name)} (now {getattr(wanted, name)})" for name in differing)
        raise UserError(f"{where} is a model of other sizes: set {changes}, or give another path")


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
# Run set-up: device, precision, logging, errors
# ---------------------------------------------------------------------------------------------------------------------


def pick_device():
    """Returns the torch.device to run on: a CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
def delayed_interrupt():
    """Lets the step in hand finish before Ctrl-C takes effect.

    Yields a function to call between steps: it raises KeyboardInterrupt if there was a Ctrl-C. A second one acts at once.
    """
    received = []

    def remember(number, frame):
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    def check():
        if received:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class NoLogger:
    """A logger that does nothing, in place of Weights & Biases when WANDB_LOG is False."""

    def log(self, values):
        pass

    def finish(self):
        pass


def make_logger(enabled, settings):
    """Returns an object with log(dict) and finish(): a Weights & Biases run, or a NoLogger.

    Without a login, and unless WANDB_MODE says otherwise, the run is kept on this machine, and a line says so.

    Args:
        enabled: WANDB_LOG.
        settings: dict of the run's constants.
    """
    if not enabled:
        return NoLogger()
    import wandb  # here, so that nobody needs it who does not use it

    start = functools.partial(wandb.init, project="bGPT", config=settings)
    try:
        if "WANDB_MODE" in os.environ or wandb.api.api_key:
            return start()
        why = "not logged in (`wandb login` does that)"
    except (wandb.Error, ValueError) as error:  # no network, a wrong key, a WANDB_MODE that is none
        why = f"cannot start ({' '.join(str(error).split())})"
    print(f"wandb: {why}; this run is logged offline, in the folder wandb")
    return start(mode="offline")


def run_main(main):
    """Runs a script's main function: a user's mistake becomes one message and exit status 1, Ctrl-C status 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal can show
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        message, status = f"error: {error}", 1
    except torch.OutOfMemoryError:
        message = "error: the GPU's memory is full: lower BATCH_SIZE or INFERENCE_BATCH_SIZE, or raise ACCUMULATION_STEPS"
        status = 1
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    print(message, file=sys.stderr)
    sys.exit(status)
