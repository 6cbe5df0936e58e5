"""Continues sequences with a model: sampling, key-value caches on both levels, many sequences of different lengths at once."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from utils import END, HEAD_SIZE, Ragged

PREFILL_PATCHES = 8192  # most patches of prompts that go through the model at once


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
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


# ---------------------------------------------------------------------------------------------------------------------
# Layers for few rows
# ---------------------------------------------------------------------------------------------------------------------


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
        keys, values: (B, H, T, 64); where T is the longest row's, it must be a multiple of 16: a row's rounding would depend
            on it otherwise.
        mask: (B, 1, 1, T), added to the scores.
    """
    scores = torch.matmul((queries * HEAD_SIZE**-0.5).unsqueeze(2), keys.transpose(2, 3))  # (B, H, 1, T)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), values).flatten(1)  # (B, H, 1, 64) -> (B, D)


# ---------------------------------------------------------------------------------------------------------------------
# Writing patches
# ---------------------------------------------------------------------------------------------------------------------


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
        self.size, self.length, self.batch_size = model.patch_size, model.patch_length, batch_size
        self.captures = self.device.type == "cuda"
        self.fixed_shapes = self.captures if fixed_shapes is None else fixed_shapes
        self.graphs = {}  # (rows, longest) -> captured graph, its results
        self.patch_blocks, self.byte_blocks = Blocks(patch_level.base), Blocks(gpt2)
        self.symbol_vectors, self.symbol_positions = gpt2.wte, gpt2.wpe.weight
        self.head = PackedLinear(model.byte_level_decoder.base.lm_head.weight)
        self.patch_cache, self.byte_cache = KVCache(patch_level.base, batch_size), KVCache(gpt2, batch_size)
        zeros = functools.partial(torch.zeros, dtype=torch.int64, device=self.device)
        self.newest = zeros(batch_size, self.size)  # (B, S), the newest whole patch of each row
        self.positions = zeros(batch_size)  # (B,), where it stands
        self.given = zeros(batch_size, self.size)  # (B, S), the beginning of the patch after it, if a prompt ends within
        self.num_given = zeros(batch_size)  # (B,), how many symbols of that are given
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

        padded = pad_sequence(patches, batch_first=True).to(self.device)  # (B, P, S)
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
        self.positions[:rows] = (self.positions[:rows] + 1).clamp(max=self.length - 2)  # clamps idle rows only
        self.num_given[:rows] = 0
        results = torch.cat((patches.double(), nats.unsqueeze(1)), dim=1)[:num_rows].cpu().numpy()  # one copy: (B, S + 1)
        return results[:, :-1].astype(np.int64), results[:, -1]

    def choose(self, logits, uniforms):
        """Returns the next symbol of each row, int64 (B,): drawn here; a class derived from this one may choose otherwise.

        Args:
            logits: (B, V).
            uniforms: float64 (B,) in [0, 1), each row's own.
        """
        return sample_symbols(logits, self.sampling, uniforms)

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
            patches[:, j] = torch.where(j < num_given, given[:, j], self.choose(logits[-1], uniforms[:, j]))
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


# ---------------------------------------------------------------------------------------------------------------------
# Continuing prompts
# ---------------------------------------------------------------------------------------------------------------------


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
    waiting = iter(prompts)
    writer = PatchWriter(model, batch_size, sampling)
    yield from continue_prompts(writer, lambda count: list(itertools.islice(waiting, count)), on_patches)


@torch.inference_mode()
def continue_prompts(writer, take, on_patches=None):
    """Does what `generate` does, with a given PatchWriter, and prompts that may depend on earlier continuations.

    Args:
        writer: a PatchWriter.
        take: function that returns at most as many Prompts as its argument says, for that many free places; called before each
            step. When it returns none while no sequence is under way, the iteration ends.
        on_patches: see `generate`.
    """
    rows = []
    while True:
        # waiting prompts take the free places, all together; places that stay free are closed by the last rows
        rows += [None] * (writer.batch_size - len(rows))
        free = [place for place, row in enumerate(rows) if row is None]
        admitted = take(len(free))
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
