"""Generation: sampling, and many sequences of different lengths continued at once."""

import dataclasses
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from bgpt.layers import Blocks, KVCache, PackedLinear, attend_cached
from utils import END, Ragged

PREFILL_PATCHES = 8192  # most patches of prompts that go through the model at once, to bound its memory


# ---- Sampling -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults do not filter the model's distribution."""

    top_k: int = 0  # draw among so many most likely symbols, 0 = all
    top_p: float = 1.0  # draw among the fewest symbols whose total probability exceeds this, 1 = all
    temperature: float = 1.0  # 0 = the most likely symbol


def filter_probabilities(logits, sampling):
    """Returns the distribution to draw from, float64 (B, V), rows summing to 1.

    Steps: softmax of the logits (B, V), top_k, top_p, power 1/temperature. top_p keeps the fewest symbols, the most likely
    first, whose total probability exceeds it. Of equally likely symbols the lower comes first.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float64)
    if sampling.temperature == 0:
        return F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).double()
    if 0 < sampling.top_k < probabilities.shape[-1] or sampling.top_p < 1:
        if probabilities.device.type == "cpu":  # NumPy is up to ten times faster, since PyTorch sorts the indices too
            ranked = torch.from_numpy(-np.sort(-probabilities.numpy()))
        else:
            ranked = probabilities.sort(descending=True).values
        ranked = ranked[:, : sampling.top_k or None]  # (B, V) or (B, top_k)
        sums = ranked.cumsum(-1)
        count = (sums - ranked <= sampling.top_p * sums[:, -1:]).sum(-1, keepdim=True)  # (B, 1), how many symbols stay
        least = ranked.gather(1, count - 1)  # (B, 1), the probability of the last one that stays
        more, equal = probabilities > least, probabilities == least
        stays = more | (equal & (equal.cumsum(-1) + more.sum(-1, keepdim=True) <= count))
        probabilities = probabilities * stays
    if sampling.temperature != 1:
        # in logarithms, relative to the most likely symbol, so that low temperatures do not underflow
        logs = probabilities.log()
        probabilities = ((logs - logs.amax(-1, keepdim=True)) / sampling.temperature).exp()
    return probabilities / probabilities.sum(-1, keepdim=True)


def sample_symbols(logits, sampling, uniforms):
    """Draws one symbol per row of logits (B, V), int64 (B,). `uniforms` are float64 (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    sums = filter_probabilities(logits, sampling).cumsum(-1)  # (B, V)
    # the first symbol whose running sum exceeds the uniform, scaled by the last sum, which rounding may move off 1
    return (sums <= (uniforms.unsqueeze(-1) * sums[:, -1:])).sum(-1).clamp(max=logits.shape[-1] - 1)


# ---- Sequences ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Prompt:
    """The beginning of a sequence."""

    key: object  # returned with the continuation
    symbols: np.ndarray  # (n,) integers: the extension patch, then symbols that may end within a patch
    stream: list[int]  # seeds of the sequence's random numbers, 0 or more


@dataclasses.dataclass
class Continuation:
    """The model's output after a prompt."""

    key: object
    symbols: np.ndarray  # int64 (n,) without the 256 that ended it
    cut_off: bool  # PATCH_LENGTH patches were full before it ended
    nats: float  # minus the log-probability of the symbols and of the 256 that ended them

    def mean_log_probability(self):
        """Returns the mean log-probability in nats of the drawn symbols, by the unfiltered softmax."""
        return -self.nats / (len(self.symbols) + (not self.cut_off))

    def bits_per_byte(self):
        """Returns the bits per drawn byte, the final 256 included. None without bytes."""
        return self.nats / math.log(2) / len(self.symbols) if len(self.symbols) else None


class _Row:
    """A sequence in progress."""

    def __init__(self, prompt, patch_size):
        self.prompt = prompt
        self.whole, self.num_given = divmod(len(prompt.symbols), patch_size)  # patches, and symbols after those
        self.written = []  # patches, int64 (S,) each, of which the first begins with the given symbols
        self.nats = 0.0

    def add(self, patch, nats, length):
        """Adds the next patch. Returns the Continuation if that ends the sequence, else None."""
        is_end = END in patch[0 if self.written else self.num_given :]
        self.written.append(patch)
        self.whole += 1
        self.nats += float(nats)
        if not is_end and self.whole < length:
            return None
        symbols = np.concatenate(self.written)[self.num_given :]
        if is_end:
            symbols = symbols[: np.flatnonzero(symbols == END)[0]]
        return Continuation(self.prompt.key, symbols.copy(), not is_end, self.nats)


# ---- Generation -----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, prompts, batch_size, sampling, on_patches=lambda num_patches: None):
    """Continues prompts of any lengths in batches. Yields each Continuation as soon as it ends.

    A sequence ends at its first drawn 256, or when PATCH_LENGTH patches are full. The next prompt then takes its row. Every
    sequence has a random stream, so that its content depends neither on `batch_size` nor on the other prompts.

    `prompts`, an iterable of Prompts of fewer than L·S symbols, is read as rows become free. `batch_size` is the most sequences
    at once. `on_patches` is called with the number of patches written, after each step.
    """
    prompts, writer = iter(prompts), PatchWriter(model, batch_size, sampling)
    while True:
        writer.admit(list(itertools.islice(prompts, batch_size - len(writer.rows))))
        if not writer.rows:
            return
        num_patches, ended = len(writer.rows), writer.step()
        on_patches(num_patches)
        yield from ended


class PatchWriter:
    """A batch of sequences, written one patch of each at a time. Every buffer is allocated once.

    `model` is a bGPTLMHeadModel in eval mode, `batch_size` B, the most rows. With `on_device` each patch is computed without
    reading from the device, in few different shapes, rounded up to powers of two. The results are the same in float32.
    None = on CUDA only, where each shape is captured as a graph.

    `rows` are the sequences in progress, a list of `_Row`s. They use the first rows of every buffer. With `captures`, steps run
    as CUDA graphs.
    """

    def __init__(self, model, batch_size, sampling, on_device=None):
        patch_level, gpt2 = model.patch_level_decoder, model.byte_level_decoder.base.transformer
        self.model, self.patch_level, self.sampling, self.device = model, patch_level, sampling, model.device
        self.size, self.length, self.batch_size = model.patch_size, model.patch_length, batch_size
        self.captures = self.device.type == "cuda"
        self.on_device = self.captures if on_device is None else on_device
        self.graphs = {}  # (rows, longest) -> captured graph, its results
        self.patch_blocks, self.byte_blocks = Blocks(patch_level.base), Blocks(gpt2)
        self.symbol_vectors, self.symbol_positions = gpt2.wte.weight, gpt2.wpe.weight
        self.head = PackedLinear(model.byte_level_decoder.base.lm_head.weight)
        self.patch_cache = KVCache(patch_level.base, batch_size, self.length)
        self.byte_cache = KVCache(gpt2, max(batch_size, 2), self.size)
        masks = self.byte_cache.mask(torch.arange(self.size, device=self.device), self.byte_cache.length)  # (S·H, 1, T)
        self.byte_masks = masks.unflatten(0, (self.size, -1))[:, :1]  # (S, 1, 1, T), of a query at each symbol
        # (B, S) each: the newest whole patch of each row, the given symbols of the patch after it
        self.newest, self.given = torch.zeros(2, batch_size, self.size, dtype=torch.int64, device=self.device)
        # (B,) each: the position of the newest patch, the number of given symbols of the next one
        self.positions, self.num_given = torch.zeros(2, batch_size, dtype=torch.int64, device=self.device)
        self.uniforms = torch.zeros(batch_size, self.length, self.size, dtype=torch.float64, device=self.device)
        self.rows = []

    @torch.inference_mode()
    def admit(self, prompts):
        """Starts Prompts in free rows. Runs all their whole patches but the last through the model together."""
        longer = []  # (row, patches before its newest) of prompts with more than one whole patch
        for row, prompt in enumerate(prompts, len(self.rows)):
            self.rows.append(_Row(prompt, self.size))
            symbols = torch.from_numpy(np.asarray(prompt.symbols, dtype=np.int64))
            whole, num_given = self.rows[row].whole, self.rows[row].num_given
            patches = symbols[: whole * self.size].view(whole, self.size)
            self.newest[row], self.positions[row] = patches[-1].to(self.device), whole - 1
            self.given[row, :num_given], self.num_given[row] = symbols[whole * self.size :].to(self.device), num_given
            drawn = np.random.default_rng(prompt.stream).random((self.length, self.size))
            self.uniforms[row] = torch.from_numpy(drawn).to(self.device)
            if whole > 1:
                longer.append((row, patches[:-1]))
        while longer:
            totals = itertools.accumulate(len(patches) for _, patches in longer)
            count = max(sum(total <= PREFILL_PATCHES for total in totals), 1)
            self._prefill(*zip(*longer[:count]))
            longer = longer[count:]

    def _prefill(self, rows, patches):
        """Runs patches, a list of int64 (P, S), through the patch-level decoder into the cache's `rows`."""
        ragged = Ragged([len(each) for each in patches], self.device)
        row, kv = torch.tensor(rows, device=self.device)[ragged.sequence], self.patch_cache.kv  # (N,), the row of each patch

        def attend(layer, qkv):
            qkv = qkv.to(kv.dtype)  # (N, 3, H, 64)
            kv[layer][row, :, :, ragged.position] = qkv[:, 1:].transpose(1, 2)
            return ragged.attend(qkv).flatten(1).to(self.patch_level.dtype)  # (N, D)

        padded = pad_sequence(patches, batch_first=True).to(self.device)  # (B, P, S)
        embedded = self.patch_level.embed(padded[ragged.sequence, ragged.position])  # (N, D)
        self.patch_blocks(embedded + self.patch_level.base.wpe(ragged.position), attend)

    @torch.inference_mode()
    def step(self):
        """Writes the next patch of each row. Frees the rows that end with it and returns their Continuations."""
        patches, nats = self.write(len(self.rows), max(row.whole for row in self.rows))
        ended = [row.add(*written, self.length) for row, *written in zip(self.rows, patches, nats)]
        for free in reversed(range(len(ended))):
            if ended[free] is None:
                continue
            last, source = self.rows.pop(), len(self.rows)
            if free < source:  # the last row moves to the free one
                self.rows[free] = last
                for buffer in (self.newest, self.positions, self.given, self.num_given, self.uniforms):
                    buffer[free] = buffer[source]
                kv, count = self.patch_cache.kv, last.whole - 1  # (layers, B, H, 2, T, 64), without the newest patch
                kv[:, free, :, :, :count] = kv[:, source, :, :, :count]
        return [continuation for continuation in ended if continuation is not None]

    def write(self, num_rows, longest):
        """Writes the next patch of the first `num_rows` rows. Waits for the device once.

        `longest` is the most whole patches of a row. Returns the patches int64 (num_rows, S), meaningless after a drawn 256,
        and the nats float64 (num_rows,), minus the log-probability of the drawn symbols up to the first 256.
        """
        rows, longest = num_rows, -(-longest // 16) * 16
        if self.on_device:
            rows = min(1 << (rows - 1).bit_length(), self.batch_size)
            longest = min(1 << (max(longest, 64) - 1).bit_length(), self.patch_cache.length)
        patches, nats = (self._replay if self.captures else self._write)(rows, longest)
        self.newest[:rows] = patches
        self.positions[:rows] = (self.positions[:rows] + 1).clamp(max=self.length - 2)  # clamps idle rows only
        self.num_given[:rows] = 0
        results = torch.cat((patches.double(), nats.unsqueeze(1)), dim=1)[:num_rows].cpu().numpy()  # one copy: (B, S + 1)
        return results[:, :-1].astype(np.int64), results[:, -1]

    def _replay(self, rows, longest):
        """Returns the results of `_write` from a CUDA graph, captured once for each shape."""
        if (rows, longest) not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries initialize in the first call, which cannot be captured
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
        """Computes the results of `write` repeatably, since it changes only caches at new positions."""
        x = self.step_patch_level(rows, longest)  # (B, D)
        uniforms = self.uniforms[torch.arange(rows, device=self.device), self.positions[:rows] + 1]  # (B, S)
        is_given = torch.arange(self.size, device=self.device) < self.num_given[:rows, None]  # (B, S)
        given, chances = self.given[:rows].unbind(1), uniforms.unbind(1)  # S tensors (B,) each
        width = rows if self.on_device else max(rows, 2)  # else PackedLinear doubles a single row in each product
        views = self.byte_cache.views(width, self.byte_cache.length)
        symbols, logits = [], []
        for j, is_fixed in enumerate(is_given.unbind(1)):

            def attend(layer, qkv):
                return attend_cached(qkv, views[layer], (slice(None), j), self.byte_masks[j])

            hidden = self.byte_blocks(x.expand(width, -1) + self.symbol_positions[j], attend)  # (B, D)
            logits.append(self.head(hidden)[:rows])  # (B, V)
            symbols.append(torch.where(is_fixed, given[j], self.choose(logits[j], chances[j])))
            x = F.embedding(symbols[j], self.symbol_vectors)  # (B, D)
        patches, logits = torch.stack(symbols, dim=1), torch.stack(logits, dim=1)  # (B, S), (B, S, V)
        # (B, S, V) -> (B·S, V) -> (B·S,) -> (B, S)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), patches.flatten(), reduction="none").view(patches.shape).double()
        ends = (~is_given & (patches == END)).long()
        return patches, torch.where(~is_given & (ends.cumsum(1) - ends == 0), nats, 0).sum(1)

    def step_patch_level(self, rows, longest):
        """Runs the newest patches of the first `rows` rows through the patch-level decoder. Returns (B, D)."""
        positions, views = self.positions[:rows], self.patch_cache.views(rows, longest)
        where = torch.arange(rows, device=self.device), positions
        mask = self.patch_cache.mask(positions, longest)  # (B·H, 1, longest): a row sees its own patches

        embedded = self.patch_level.embed(self.newest[:rows]) + self.patch_level.base.wpe(positions)  # (B, D)
        return self.patch_blocks(embedded, lambda layer, qkv: attend_cached(qkv, views[layer], where, mask))

    def choose(self, logits, uniforms):
        """Returns the next symbol of each row, see `sample_symbols`. Subclasses may override it."""
        return sample_symbols(logits, self.sampling, uniforms)
