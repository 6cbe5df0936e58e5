"""Sampling, and cached generation against a model without caches."""

import itertools

import numpy as np
import pytest
import torch
from conftest import fill_by_recipe

import utils
from bgpt import generation, layers

GREEDY = generation.Sampling(temperature=0)


def continue_all(model, prompts, batch_size, sampling=GREEDY, seed=0):
    """Returns the Continuations of prompts (arrays of symbols), in the order of the prompts."""
    stream = (generation.Prompt(i, symbols, [seed, i]) for i, symbols in enumerate(prompts))
    done = {continuation.key: continuation for continuation in generation.generate(model, stream, batch_size, sampling)}
    return [done[i] for i in range(len(prompts))]


# ---- Sampling -------------------------------------------------------------------------------------------------------

def stated_distribution(logits, top_k, top_p, temperature):
    """The specification's rule for one row, in NumPy."""
    p = np.exp(logits - logits.max())
    p = p / p.sum()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        p[ranked[top_k:]] = 0
        p = p / p.sum()
    if top_p < 1:
        total = 0.0
        for kept, i in enumerate(ranked, 1):
            total += p[i]
            if total > top_p:
                p[ranked[kept:]] = 0
                break
        p = p / p.sum()
    with np.errstate(divide="ignore"):
        logs = np.log(p)
    p = np.exp((logs - logs.max()) / temperature)
    return p / p.sum()


@pytest.mark.parametrize("top_k", [0, 1, 2, 17, 257])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_distribution_is_the_stated_one(top_k, top_p, temperature):
    random = np.random.default_rng(0)
    logits = random.normal(size=(12, 257)) * np.array([0.1, 1, 5, 30] * 3)[:, None]
    logits[4:8] = np.round(logits[4:8])  # ties
    logits[8:, 100:] = -np.inf  # zeros
    logits[11] = 0.0
    drawn = generation.filter_probabilities(torch.from_numpy(logits), generation.Sampling(top_k, top_p, temperature)).numpy()
    np.testing.assert_allclose(drawn, [stated_distribution(row, top_k, top_p, temperature) for row in logits], atol=1e-9)


def test_temperature_zero_is_the_most_likely():
    logits = torch.randn(50, 257)
    assert torch.equal(generation.sample_symbols(logits, GREEDY, torch.rand(50).double()), logits.argmax(-1))
    filtered = generation.filter_probabilities(logits, GREEDY)
    assert torch.equal(filtered.argmax(-1), logits.argmax(-1)) and (filtered.sum(-1) == 1).all()


def test_drawn_symbols_follow_the_distribution():
    """Chi-square with 10 symbols left: 9 degrees of freedom, 27.9 at one in a thousand."""
    logits = torch.randn(1, 257, generator=torch.Generator().manual_seed(1)) * 2
    sampling = generation.Sampling(top_k=10, temperature=1.5)
    expected = generation.filter_probabilities(logits, sampling)[0] * 20000
    uniforms = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(generation.sample_symbols(logits.expand(20000, -1), sampling, uniforms), minlength=257)
    kept = expected > 0
    assert int(kept.sum()) == 10 and counts[~kept].sum() == 0
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 27.9
    logits = torch.full((2, 257), -torch.inf)  # the lowest and the highest uniform never draw an impossible symbol
    logits[:, [5, 200]] = 0.0
    drawn = generation.sample_symbols(logits, generation.Sampling(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [5, 200]


# ---- Cached generation ----------------------------------------------------------------------------------------------

def test_gelu_is_that_of_the_model_for_any_rows_and_threads():
    """Bit-identical rows for any number of rows and threads."""
    rows = torch.randn(97, 1024, generator=torch.Generator().manual_seed(0)) * 3
    alone = rows.clone()
    for row in alone.split(1):
        layers.apply_gelu(row)
    torch.testing.assert_close(alone, torch.nn.functional.gelu(rows, approximate="tanh"), rtol=1e-5, atol=1e-6)
    try:
        # with 65 and 95 rows PyTorch's own chunks would end within a vector
        for threads, count in itertools.product((1, 2, 3, 7), (2, 33, 65, 95, 97)):
            torch.set_num_threads(threads)
            together = rows[:count].clone()
            layers.apply_gelu(together)
            assert torch.equal(together, alone[:count]), (threads, count)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_linear_is_a_linear_layer(dtype, monkeypatch):
    """Packed if oneDNN supports it. Float32 rows are bit-identical for any number of rows."""
    weight, bias, x, residual = (torch.randn(shape, dtype=dtype) for shape in ((192, 64), (192,), (5, 64), (5, 192)))
    linear, activated = layers.PackedLinear(weight, bias), layers.PackedLinear(weight, bias, gelu=True)
    expected = torch.nn.functional.linear(x, weight, bias)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(linear(x), expected, **tolerance)
    torch.testing.assert_close(linear(x, residual), expected + residual, **tolerance)
    torch.testing.assert_close(activated(x), torch.nn.functional.gelu(expected, approximate="tanh"), **tolerance)
    if dtype == torch.float32 and linear.packed:
        assert all(torch.equal(linear(x[:n], residual[:n]), linear(x, residual)[:n]) for n in (1, 2, 4))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = layers.PackedLinear(weight, bias)
    assert not plain.packed and torch.equal(plain(x), expected)


@torch.no_grad()
def recompute_greedy(model, symbols, most):
    """Greedy continuation with no cache, one prompt, everything recomputed for every symbol; at most `most` symbols."""
    size, length = model.patch_level_decoder.patch_size, model.patch_level_decoder.config.n_positions
    symbols, written = [int(symbol) for symbol in symbols], []
    while len(symbols) < size * length and len(written) < most:
        whole = len(symbols) // size
        encoded = model.patch_level_decoder(torch.tensor([symbols[: whole * size]])).last_hidden_state[:, -1]
        patch = symbols[whole * size :]
        target = torch.tensor([patch + [0] * (size - len(patch))])
        symbol = int(model.byte_level_decoder(encoded, target).logits[0, len(patch)].argmax())
        if symbol == utils.END:
            return written, False
        written.append(symbol)
        symbols.append(symbol)
    return written, len(symbols) == size * length


def test_golden_greedy_bytes(golden, golden_model, golden_sequences):
    first = golden_sequences[0].reshape(-1)
    prompts = [utils.extension_patch("mid", 16), first[:48], first[:37]]
    for continuation, rows in zip(continue_all(golden_model, prompts, 3), golden["greedy"].values(), strict=True):
        assert continuation.symbols.tolist()[: sum(map(len, rows))] == sum(rows, [])


def ragged_prompts(size):
    """Short and long prompts that end at every position in a patch, also with 256 inside as in a conversion."""
    random = np.random.default_rng(3)
    lengths = [0, 1, size - 1, size, size + 1, 5 * size, 5 * size + 2, 9 * size + 1, 2, 14 * size + 3, 15 * size - 1]
    return [np.concatenate((utils.extension_patch("x", size), random.integers(0, 257, n))) for n in lengths]


def raise_end(model, factor):
    """Makes the end symbol likelier."""
    with torch.no_grad():
        model.byte_level_decoder.base.transformer.wte.weight[256] *= factor


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_cached_batched_ragged_equals_recomputing_one_at_a_time(tiny_model, batch_size):
    raise_end(tiny_model, 1.6)  # so that some sequences end early and others take their places
    prompts = ragged_prompts(4)
    expected = [recompute_greedy(tiny_model, prompt, 1000) for prompt in prompts]
    assert {cut_off for _, cut_off in expected} == {True, False}  # the test sees both ways to end
    for continuation, (symbols, cut_off) in zip(continue_all(tiny_model, prompts, batch_size), expected, strict=True):
        assert continuation.symbols.tolist() == symbols and continuation.cut_off == cut_off


def test_golden_model_cached_equals_recomputed(golden_model):
    for continuation, prompt in zip(continue_all(golden_model, ragged_prompts(16), 4), ragged_prompts(16), strict=True):
        assert continuation.symbols[:40].tolist() == recompute_greedy(golden_model, prompt, 40)[0]


def test_samples_do_not_depend_on_the_batch():
    """In float32 on a CPU the log-probabilities are bit-identical, so all draws are equal."""
    model = fill_by_recipe(utils.ModelSizes(4, 40, 128, 2, 1).build())
    prompts = [*ragged_prompts(4), np.concatenate(ragged_prompts(4)[5:8])]
    sampling = generation.Sampling(top_k=50, top_p=0.95, temperature=1.2)
    runs = [continue_all(model, prompts, size, sampling, seed) for size, seed in ((1, 0), (3, 0), (32, 0), (3, 1))]
    one, three, many, other = ([(c.symbols.tolist(), c.nats) for c in run] for run in runs)
    assert one == three == many != other


def test_first_symbol_is_drawn_from_the_models_own_distribution(tiny_model):
    """4,000 samples from nothing against the uncached model, binned to 8 groups: chi-square, 7 degrees of freedom."""
    prompt = utils.extension_patch("x", 4)
    with torch.no_grad():
        encoded = tiny_model.patch_level_decoder(torch.from_numpy(prompt).long()[None]).last_hidden_state[:, -1]
        logits = tiny_model.byte_level_decoder(encoded, torch.zeros(1, 4, dtype=torch.int64)).logits[0, 0]
    probabilities = torch.softmax(logits.double(), -1).numpy()
    groups = np.minimum((np.cumsum(probabilities) * 8).astype(int), 7)
    positions = "patch_level_decoder.base.wpe.weight"
    model = utils.ModelSizes(4, 3, 64, 2, 1).build().eval()  # room for two patches only, to be quick
    model.load_state_dict(tiny_model.state_dict() | {positions: tiny_model.state_dict()[positions][:3]})
    done = continue_all(model, [prompt] * 4000, 500, generation.Sampling())
    counts = np.bincount([groups[c.symbols[0] if len(c.symbols) else utils.END] for c in done], minlength=8)
    expected = np.bincount(groups, probabilities, 8) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("sampling", [GREEDY, generation.Sampling(top_p=0.9)])
def test_shapes_change_nothing(tiny_model, rows, sampling):
    """CUDA graphs are captured with more rows and positions than are used. Here without a GPU."""
    raise_end(tiny_model, 1.6)
    prompts = [generation.Prompt(i, symbols, [0, i]) for i, symbols in enumerate(ragged_prompts(4)[:rows])]
    runs = []
    for on_device in (False, True):
        writer, done = generation.PatchWriter(tiny_model, 7, sampling, on_device), []
        writer.admit(prompts)
        while writer.rows:
            done += writer.step()
        runs.append({continuation.key: continuation for continuation in done})
    for key, continuation in runs[0].items():
        assert runs[1][key].symbols.tolist() == continuation.symbols.tolist()
        assert runs[1][key].nats == pytest.approx(continuation.nats, rel=1e-5)


def test_nats_are_the_models_own(tiny_model):
    """The softmax of the uncached model without filters, including the 256 at the end."""
    raise_end(tiny_model, 4)
    prompts = ragged_prompts(4)
    done = continue_all(tiny_model, prompts, 4, generation.Sampling(top_k=200, top_p=0.99, temperature=1.3))
    assert {c.cut_off for c in done} == {True, False}
    for prompt, continuation in zip(prompts, done):
        drawn = [*continuation.symbols, *[utils.END] * (not continuation.cut_off)]
        symbols = np.concatenate((prompt, drawn)).astype(np.int64)
        patches = torch.from_numpy(np.pad(symbols, (0, -len(symbols) % 4), constant_values=utils.END)).view(1, -1, 4)
        with torch.no_grad():
            nats = tiny_model(patches, torch.ones(patches.shape[:2], dtype=torch.int64)).nats.reshape(-1)
        expected = float(nats[len(prompt) - 4 : len(symbols) - 4].sum())  # the first patch is no target
        assert continuation.nats == pytest.approx(expected, rel=1e-4)
        assert continuation.mean_log_probability() == pytest.approx(-expected / len(drawn), rel=1e-4)


@torch.no_grad()
def test_bf16_generation_agrees_with_float32(golden_model, golden_sequences):
    """Steps of the cached bf16 model against the float32 reference, by the logits' size."""
    half = fill_by_recipe(utils.ModelSizes(16, 64, 128, 2, 2).build()).to(torch.bfloat16)
    prompt = generation.Prompt(0, golden_sequences[1].reshape(-1)[: 6 * 16], [0])
    outputs = []
    for model in (golden_model, half):
        writer = generation.PatchWriter(model, 1, GREEDY)
        writer.admit([prompt])
        outputs.append(writer.step_patch_level(1, 16).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.03
