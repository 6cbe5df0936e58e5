"""Continues sequences with a model: sampling, and many sequences of different lengths written at once."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from bgpt.attention import Ragged
from bgpt.layers import Blocks, KVCache, PackedLinear, round_up
from utils import END, NUM_SYMBOLS

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
        ranked = sort_descending(probabilities)  # (B, V)
        if sampling.top_k:
            ranked = ranked[:, : sampling.top_k]
        count = torch.full((len(ranked), 1), ranked.shape[1], device=logits.device)  # (B, 1), how many symbols stay
        if sampling.top_p < 1:
            sums = ranked.cumsum(-1)
            count = (sums - ranked <= sampling.top_p * sums[:, -1:]).sum(-1, keepdim=True)
        least = ranked.gather(1, count - 1)  # (B, 1), the probability of the last one that stays
        more, equal = probabilities > least, probabilities == least
        stays = more | (equal & (equal.cumsum(-1) + more.sum(-1, keepdim=True) <= count))
        probabilities = probabilities * stays
    if sampling.temperature != 1:
        # in logarithms, relative to the most likely symbol, so that low temperatures do not underflow
        logs = probabilities.log()
        probabilities = ((logs - logs.amax(-1, keepdim=True)) / sampling.temperature).exp()
    return probabilities / probabilities.sum(-1, keepdim=True)


def sort_descending(values):
    """Returns each row of values (B, V) in descending order."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    # NumPy sorts up to ten times faster, without the places that PyTorch's sort finds too
    return torch.from_numpy(-np.sort(-values.numpy(), axis=-1))


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
# Writing patches
# ---------------------------------------------------------------------------------------------------------------------


# Where guessing pays, as measured: see RESULTS.md.
GUESSED_ROWS = 4  # symbols that go through the byte-level decoder at once, if there are fewer rows; some of them are guessed
GUESSED_SIZE = 16  # the least PATCH_SIZE


class PatchWriter:
    """Writes a batch of sequences, one patch of all of them at a time. Every buffer is allocated once.

    A row of the batch is one sequence. What comes after its newest whole patch is written from that patch, from the
    keys and values of those before it, and from the row's own random numbers.

    Args:
        model: bGPTLMHeadModel in eval mode.
        batch_size: B, the number of rows.
        sampling: a Sampling.
        on_device: write without a look at what was written, symbol by symbol, with few different shapes, rounded up to
            powers of two; the results are the same in float32. None = on CUDA only, where each shape is captured as a graph.
        guesses: guess symbols of a few rows, see `_write_guessing`; the results are the same in float32. None = where it pays.

    Attributes:
        captures: whether steps run as CUDA graphs.
    """

    def __init__(self, model, batch_size, sampling, on_device=None, guesses=None):
        patch_level, gpt2 = model.patch_level_decoder, model.byte_level_decoder.base.transformer
        self.model, self.patch_level, self.sampling, self.device = model, patch_level, sampling, model.device
        self.size, self.length, self.batch_size = model.patch_size, model.patch_length, batch_size
        self.captures = self.device.type == "cuda"
        self.on_device = self.captures if on_device is None else on_device
        self.guesses = not self.on_device and (self.size >= GUESSED_SIZE if guesses is None else guesses)
        self.graphs = {}  # (rows, longest) -> captured graph, its results
        self.patch_blocks, self.byte_blocks = Blocks(patch_level.base), Blocks(gpt2)
        self.symbol_vectors, self.symbol_positions = gpt2.wte.weight, gpt2.wpe.weight
        self.head = PackedLinear(model.byte_level_decoder.base.lm_head.weight)
        self.patch_cache = KVCache(patch_level.base, batch_size, self.length)
        self.byte_cache = KVCache(gpt2, batch_size, self.size)
        masks = self.byte_cache.mask(torch.arange(self.size, device=self.device), self.byte_cache.length)  # (S·H, 1, T)
        self.byte_masks = masks.unflatten(0, (self.size, -1))  # (S, H, 1, T), of a query at each symbol
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
            qkv = qkv.to(self.patch_cache.held.dtype)  # (N, H, 3, 64)
            self.patch_cache.held[layer][place, :, :, ragged.position] = qkv[:, :, 1:]
            return ragged.attend(qkv.transpose(1, 2)).flatten(1).to(self.patch_level.dtype)  # (N, D)

        padded = pad_sequence(patches, batch_first=True).to(self.device)  # (B, P, S)
        embedded = self.patch_level.embed(padded[ragged.sequence, ragged.position])  # (N, D)
        self.patch_blocks(embedded + self.patch_level.base.wpe(ragged.position), attend)

    def move(self, source, target, count):
        """Moves a row, whose cache holds `count` patches, to another row."""
        for state in (self.newest, self.positions, self.given, self.num_given, self.uniforms):
            state[target] = state[source]
        held = self.patch_cache.held  # (layers, B, H, 2, T, 64)
        held[:, target, :, :, :count] = held[:, source, :, :, :count]

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
        if self.on_device:
            rows = min(1 << (rows - 1).bit_length(), self.batch_size)
            longest = min(1 << (max(longest, 64) - 1).bit_length(), self.patch_cache.length)
            patches, nats = (self._replay if self.captures else self._write)(rows, longest)
        elif self.guesses and rows < GUESSED_ROWS:
            patches, nats = self._write_guessing(rows, longest)
        else:
            patches, nats = self._write(rows, longest)
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
        x = self.step_patch_level(rows, longest)  # (B, D)
        given, num_given = self.given[:rows], self.num_given[:rows]
        uniforms = self.uniforms[torch.arange(rows, device=self.device), self.positions[:rows] + 1]  # (B, S)
        patches, logits = torch.empty_like(given), []
        for j in range(self.size):
            attend = functools.partial(self.byte_cache.attend, mask=self.byte_masks[j, :1], where=(slice(rows), j))
            logits.append(self.head(self.byte_blocks(x + self.symbol_positions[j], attend)))  # (B, V)
            patches[:, j] = torch.where(j < num_given, given[:, j], self.choose(logits[-1], uniforms[:, j]))
            x = F.embedding(patches[:, j], self.symbol_vectors)  # (B, D)
        return patches, self._nats(torch.stack(logits, dim=1), patches, num_given)

    def _write_guessing(self, rows, longest):
        """What `_write` returns, with fewer passes of the byte-level decoder, on a CPU.

        A pass takes few rows more in hardly more time. So the next symbols of a patch are guessed, and one pass draws each
        of them from those before it. They are right up to and with the first that was guessed wrong: each symbol's random
        number is fixed beforehand. What the others became is the next guess (Jacobi iteration with coupled random numbers).
        The first guess is the patch before.
        """
        encoded = self.step_patch_level(rows, longest)  # (B, D)
        num_given, starts = self.num_given[:rows], self.positions[:rows] + 1
        uniforms = self.uniforms[torch.arange(rows), starts]  # (B, S)
        is_given = torch.arange(self.size) < num_given.unsqueeze(1)  # (B, S)
        patches = torch.where(is_given, self.given[:rows], self.newest[:rows])
        logits = encoded.new_empty(rows, self.size, NUM_SYMBOLS)
        vectors = torch.cat((self.symbol_vectors, encoded))  # (V + B, D), what the decoder reads at a symbol, and at first
        guesses, givens, known = patches.numpy(), is_given.numpy(), np.zeros(rows, dtype=np.int64)
        while (known < self.size).any():
            active = np.flatnonzero(known < self.size)  # (n,)
            ahead = np.arange(-(-GUESSED_ROWS // len(active)))  # (w,)
            row, column = active.repeat(len(ahead)), np.minimum(known[active, None] + ahead, self.size - 1).reshape(-1)  # (n·w,)
            read = np.where(column == 0, NUM_SYMBOLS + row, guesses[row, column - 1])
            places = row, column = torch.from_numpy(row), torch.from_numpy(column)
            x = F.embedding(torch.from_numpy(read), vectors) + F.embedding(column, self.symbol_positions)
            mask = self.byte_masks[column].flatten(0, 1)  # (n·w, H, 1, T) -> (n·w·H, 1, T)
            attend = functools.partial(self.byte_cache.attend, mask=mask, where=places, rows=row)
            logits[places] = found = self.head(self.byte_blocks(x, attend))  # (n·w, V)
            drawn = torch.where(is_given[places], patches[places], sample_symbols(found, self.sampling, uniforms[places]))
            agrees = (drawn == patches[places]).view(len(active), -1).numpy()  # (n, w)
            patches[places] = drawn
            known[active] += np.minimum(agrees.cumprod(1).sum(1) + 1, len(ahead))
            ends = (guesses == END) & ~givens & (np.arange(self.size) < known[:, None])  # (B, S)
            known[ends.any(1)] = self.size  # what comes after the end is of no use
        return patches, self._nats(logits, patches, num_given)

    def _nats(self, logits, patches, num_given):
        """Returns minus the log-probability of the drawn symbols of patches (B, S), float64 (B,), from logits (B, S, V)."""
        # (B, S, V) -> (B·S, V) -> (B·S,) -> (B, S)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), patches.flatten(), reduction="none").view(patches.shape).double()
        is_drawn = torch.arange(self.size, device=self.device) >= num_given.unsqueeze(1)  # (B, S)
        ends = (is_drawn & (patches == END)).long()
        return torch.where(is_drawn & (ends.cumsum(1) - ends == 0), nats, 0).sum(1)

    def step_patch_level(self, rows, longest):
        """Runs the newest patches of the first `rows` rows through the patch-level decoder: (B, D)."""
        positions = self.positions[:rows]
        attend = functools.partial(
            self.patch_cache.attend,
            mask=self.patch_cache.mask(positions, longest),  # a row sees what it holds, not what other rows hold beyond
            where=(torch.arange(rows, device=self.device), positions),
        )
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
