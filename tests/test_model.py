"""The models against the published code's numbers, and what must hold for any weights."""

import copy
import ctypes
import functools
import platform
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FORKSERVER, TINY, as_batch, fill_by_recipe, load_script
from transformers import GPT2Config

import utils
from bgpt import checkpoint, training
from bgpt.distributed import autocast

train_gen = load_script("train-gen")


def test_paper_size():
    with torch.device("meta"):
        model = utils.ModelSizes(16, 512, 768, 12, 3).build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 110_084_352


@torch.no_grad()
def test_golden_losses_and_logits(golden, golden_model, golden_sequences):
    assert sum(parameter.numel() for parameter in golden_model.parameters()) == golden["parameters"]
    batch = as_batch(golden_sequences)
    output = golden_model(batch.patches.long(), batch.masks)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-4)
    first, last = (golden[f"logits_{name}_first_8"] for name in ("first_target_position_0", "last_target_last_byte"))
    assert torch.allclose(output.logits[0, 0, :8], torch.tensor(first), atol=1e-4)
    assert torch.allclose(output.logits[-1, 15, :8], torch.tensor(last), atol=1e-4)
    for sequence, loss in zip(golden_sequences, golden["loss_each_sequence_alone"], strict=True):
        alone = as_batch([sequence])
        flat = alone.patches.long().flatten(1)  # the published code's (B, P·S)
        assert golden_model(flat, alone.masks).loss.item() == pytest.approx(loss, abs=1e-4)


@torch.no_grad()
def test_golden_class_logits(golden, golden_sequences):
    sizes = golden["recipe"]["sizes"]
    model = fill_by_recipe(
        utils.bGPTForClassification(utils.make_configs(*(sizes[n] for n in TINY))[0], num_labels=5)
    )
    expected = torch.tensor(golden["classifier, 5 labels, weights by the same recipe, each sequence alone"])
    for sequence, logits in zip(golden_sequences, expected, strict=True):
        alone = as_batch([sequence])
        assert torch.allclose(model(alone.patches.long())[0], logits, atol=1e-4)
    batch = as_batch(golden_sequences)
    assert torch.allclose(model(batch.patches.long(), batch.masks), expected, atol=1e-4)


def test_published_constructors():
    """Configurations as the published code writes them, without a patch_size of ours."""
    patch_config = GPT2Config(num_hidden_layers=1, max_position_embeddings=8, hidden_size=64, n_head=1, vocab_size=1)
    byte_config = GPT2Config(num_hidden_layers=1, max_position_embeddings=17, hidden_size=64, n_head=1, vocab_size=257)
    before = patch_config.to_dict(), byte_config.to_dict()
    model = utils.bGPTLMHeadModel(patch_config, byte_config)
    assert model.patch_level_decoder.patch_embedding.weight.shape == (64, 16 * 257)
    assert utils.bGPTForClassification(patch_config, 3).classifier.weight.shape == (3, 64)
    assert (patch_config.to_dict(), byte_config.to_dict()) == before


def test_attention_and_gelu_are_the_fused_ones(tiny_model):
    for gpt2 in (tiny_model.patch_level_decoder.base, tiny_model.byte_level_decoder.base):
        assert gpt2.config._attn_implementation == "sdpa"
        assert gpt2.config.activation_function == "gelu_pytorch_tanh"


@torch.no_grad()
def test_embedding_is_the_product_with_the_one_hot(tiny_model):
    patches = torch.randint(0, 257, (2, 5, 4))
    one_hot = torch.nn.functional.one_hot(patches, 257).float().flatten(2)  # (B, P, S·V)
    decoder = tiny_model.patch_level_decoder
    assert torch.allclose(decoder.embed(patches.flatten(0, 1)), decoder.patch_embedding(one_hot).flatten(0, 1), atol=1e-5)


def test_embedding_gradient_is_that_of_the_product(tiny_model):
    patches = torch.randint(0, 257, (2, 5, 4))
    one_hot = torch.nn.functional.one_hot(patches, 257).float().flatten(2)
    decoder = tiny_model.patch_level_decoder
    gradients = []
    for output in (decoder.embed(patches.flatten(0, 1)), decoder.patch_embedding(one_hot)):
        gradients.append(torch.autograd.grad(output.square().sum(), decoder.patch_embedding.weight)[0])
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
    weight = decoder.patch_embedding.weight
    assert weight.t().contiguous().data_ptr() == weight.data_ptr()  # the gather copies nothing


@torch.no_grad()
def test_causal_and_padding_change_nothing(tiny_model):
    sequences = [utils.to_patches(bytes(range(n)), "x", 4) for n in (3, 40, 17)]
    batch = as_batch(sequences)
    before = batch.patches.clone(), batch.masks.clone()
    together = tiny_model(batch.patches.long(), batch.masks)
    assert torch.equal(batch.patches, before[0]) and torch.equal(batch.masks, before[1])
    alone = [tiny_model(as_batch([s]).patches.long(), as_batch([s]).masks) for s in sequences]
    assert torch.allclose(together.logits, torch.cat([output.logits for output in alone]), atol=1e-5)
    assert together.nats.shape == (int(batch.masks[:, 1:].sum()), 4)
    assert together.loss.item() == pytest.approx(torch.cat([o.nats for o in alone]).mean().item(), abs=1e-5)
    # a change in patch 6 does not change the predictions before it
    changed = batch.patches.long()
    changed[1, 6] = 7
    outputs = [tiny_model.patch_level_decoder(p).last_hidden_state[1] for p in (batch.patches.long(), changed)]
    assert torch.allclose(outputs[0][:6], outputs[1][:6], atol=1e-6) and not torch.allclose(outputs[0][6], outputs[1][6])


def ragged_sequences(lengths, patch_size=4):
    """Sequences of the given numbers of patches, int16 (P, S), with random content."""
    random = np.random.default_rng(0)
    return [utils.to_patches(random.integers(0, 256, patch_size * (n - 2)).astype(np.uint8), "x", patch_size) for n in lengths]


@pytest.mark.parametrize("kind", ["generative", "classifier"])
def test_loss_and_gradient_of_a_file_are_the_same_in_any_batch(kind):
    """The gradient of a batch's sum is the sum of the gradients of its files, each alone (dropout 0, float32)."""
    model = fill_by_recipe(utils.ModelSizes(**{**TINY, "PATCH_LENGTH": 200}).build(dropout=0.0)).train()
    if kind == "classifier":
        model = fill_by_recipe(utils.bGPTForClassification(utils.make_configs(4, 200, 64, 2, 1, 0.0)[0], 3)).train()
    sequences = ragged_sequences([2, 40, 17, 16, 33, 128, 2, 200])

    def losses_and_gradients(sequences):
        batch = as_batch(sequences)
        output = model(batch.patches.long(), batch.masks)
        if kind == "classifier":
            losses = torch.nn.functional.cross_entropy(output, torch.tensor([len(s) % 3 for s in sequences]), reduction="none")
        else:
            losses = torch.stack([nats.sum() for nats in output.nats.split([len(s) - 1 for s in sequences])])
        model.zero_grad()
        losses.sum().backward()
        return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, gradients = losses_and_gradients(sequences)
    alone = [losses_and_gradients([sequence]) for sequence in sequences]
    torch.testing.assert_close(together, torch.cat([losses for losses, _ in alone]), rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        total = sum(each[name] for _, each in alone)
        assert (gradient - total).norm() <= 1e-5 * total.norm(), name
    shuffled, _ = losses_and_gradients(sequences[::-1])
    torch.testing.assert_close(shuffled, together.flip(0), rtol=1e-5, atol=0)


@torch.no_grad()
def test_padding_takes_no_part(tiny_model, monkeypatch):
    """In float32, no layer but the attention sees more rows than there are real patches."""
    seen = []
    for module in tiny_model.patch_level_decoder.base.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    batch = as_batch(ragged_sequences([2, 16, 5]))
    tiny_model(batch.patches.long(), batch.masks)
    assert set(seen) == {23}


@torch.no_grad()
def test_ragged_rows():
    random = np.random.default_rng(1)
    for lengths in ([1], [0, 3], [5, 5, 5], [64, 65, 1, 0, 16, 17], random.integers(1, 600, 9).tolist()):
        ragged = utils.Ragged(lengths, "cpu")
        assert len(ragged.position) == sum(lengths)
        for i, length in enumerate(lengths):
            rows = slice(int(ragged.starts[i]), int(ragged.starts[i]) + length)
            assert (ragged.sequence[rows] == i).all() and ragged.position[rows].tolist() == list(range(length))
        qkv = torch.randn(sum(lengths), 3, 2, 64)
        attended = ragged.attend(qkv)
        for start, length in zip(ragged.starts.tolist(), lengths):
            expected = utils.attend(qkv[None, start : start + length])[0]
            torch.testing.assert_close(attended[start : start + length], expected, rtol=1e-4, atol=1e-5)
    for length in range(1, 5000):
        assert length <= utils.padded_length(length) <= max(length + 15, length * 5 / 4)
        assert utils.padded_length(length) <= utils.padded_length(length + 1)


def test_masks_that_are_not_padding_on_the_right(tiny_model):
    patches = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding is on the right"):
        tiny_model(patches, torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]))


@torch.no_grad()
def test_classifier_does_not_see_padding_or_neighbours():
    model = fill_by_recipe(utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3))
    sequences = [utils.to_patches(bytes(range(n)), "x", 4) for n in (3, 40, 17)]
    batch = as_batch(sequences)
    together = model(batch.patches.long(), batch.masks)
    alone = torch.cat([model(as_batch([sequence]).patches.long()) for sequence in sequences])
    assert torch.allclose(together, alone, atol=1e-5)


def test_too_many_patches(tiny_model):
    with pytest.raises(ValueError, match="17 patches.* 16"):
        tiny_model(torch.zeros(1, 17, 4, dtype=torch.int64), torch.ones(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_that_of_the_definition(dtype, rate):
    torch.manual_seed(0)
    ones = torch.ones(300, 1001, dtype=dtype, requires_grad=True)
    dropped = utils.dropout(ones, rate)
    assert dropped.dtype == dtype and dropped.shape == ones.shape
    values = dropped.detach().unique().tolist()
    assert values == [0, pytest.approx(1 / (1 - rate), rel=1e-4 if dtype == torch.float32 else 0.004)]
    kept = (dropped > 0).double()
    error = (rate * (1 - rate) / kept.numel()) ** 0.5  # of a mean of independent draws
    assert abs(kept.mean() - (1 - rate)) < 5 * error
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[:, 4:], kept[:, :-4]), (kept[1:], kept[:-1])):
        assert abs((one * other).mean() - (1 - rate) ** 2) < 10 * error  # neighbours, in bits and in rows, do not matter
    for means in (kept.mean(0), kept.mean(1)):  # every column and every row
        assert abs(means - (1 - rate)).max() < 6 * error * len(means) ** 0.5
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped)  # what was dropped gets no gradient, the rest its scale


def test_dropout_follows_the_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return utils.dropout(torch.ones(7, 9), 0.3)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    x = torch.ones(3)
    assert utils.dropout(x, 0.0) is x
    assert utils.dropout(torch.ones(0, 4), 0.5).shape == (0, 4)


def test_attention_with_dropout_drops_weights():
    torch.manual_seed(0)
    qkv = torch.randn(2, 8, 3, 3, 64, requires_grad=True)  # (B, T, 3, H, 64)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, 64) each
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2)
    assert torch.equal(utils.attend(qkv), expected)
    assert torch.allclose(utils.attend(qkv, 1e-9), expected, atol=1e-5)  # so rare that none drops
    with torch.no_grad():
        draws = torch.stack([utils.attend(qkv, 0.2) for _ in range(3000)])
    spread = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * spread + 1e-4).all() and (spread > 0).all()
    # the first position has one weight, 1, that is kept or dropped
    first = draws[:, 0, 0, 0, 0] / values[0, 0, 0, 0]
    assert set(first.round(decimals=3).tolist()) == {0.0, 1.25}
    later = torch.autograd.grad(utils.attend(qkv, 0.2)[:, 4].sum(), qkv)[0][:, 5:]
    assert (later == 0).all()


@pytest.mark.parametrize("length", [1, 4, utils.BLOCK + 1, utils.MOST_IN_BLOCKS + 1])
def test_attention_in_bf16_agrees_with_float32(length):
    torch.manual_seed(0)
    qkv = (1.7 * torch.randn(2, length, 3, 2, 64)).to(torch.bfloat16)  # (B, T, 3, H, 64), scores have a deviation of 3
    factor = torch.randn(2, length, 2, 64)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = qkv.to(dtype).requires_grad_()
        attended = utils.attend(inputs)
        assert attended.dtype == dtype
        results.append((attended.float(), torch.autograd.grad((attended.float() * factor).sum(), inputs)[0].float()))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("most_kept", [0, utils.MOST_KEPT])
def test_attention_in_blocks(monkeypatch, most_kept):
    """Longer sequences than one block, with the weights in memory or computed again: against PyTorch's attention."""
    monkeypatch.setattr(utils, "MOST_KEPT", most_kept)
    torch.manual_seed(0)
    qkv = torch.randn(2, 2 * utils.BLOCK + 3, 3, 2, 64, requires_grad=True)  # (B, T, 3, H, 64)
    results = []
    for rate in (0.0, 1e-9):  # so rare that none drops
        attended = utils.attend(qkv, rate)
        results.append((attended, torch.autograd.grad(attended.square().sum(), qkv)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    # attention is linear in the values for given weights, so its gradient must use the same dropped weights
    attended = utils.attend(qkv, 0.3)
    gradient = torch.autograd.grad((attended * attended.detach()).sum(), qkv)[0]
    assert (gradient[:, :, 2] * qkv[:, :, 2]).sum().item() == pytest.approx(attended.square().sum().item(), rel=1e-4)
    assert not torch.allclose(attended, results[0][0], atol=0.1)


def test_attention_that_is_computed_again_is_the_same(monkeypatch):
    qkv = torch.randn(1, 300, 3, 2, 64, requires_grad=True)
    results = []
    for most_kept in (0, utils.MOST_KEPT):
        monkeypatch.setattr(utils, "MOST_KEPT", most_kept)
        torch.manual_seed(0)
        attended = utils.attend(qkv, 0.3)
        results.append((attended, torch.autograd.grad(attended.square().sum(), qkv)[0], torch.get_rng_state()))
    assert all(map(torch.equal, *results))


def measure_attention(pipe):
    """Sends the growth of the peak memory in MB by attention with dropout, forward and backward."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    torch.set_num_threads(1)
    utils.MOST_KEPT = 0
    qkv, peaks = torch.randn(1, 4096, 3, 1, 64, requires_grad=True), []
    for length in (2 * utils.BLOCK, 4096):
        utils.attend(qkv[:, :length], 0.1).sum().backward()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    pipe.send(peaks[1] - peaks[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_long_attention_grows_with_the_length():
    """4,096 positions: the weights alone would take 67 MB, and the gradients of all blocks' keys and values 34 MB."""
    here, there = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=measure_attention, args=(there,))
    process.start()
    process.join()
    assert here.poll() and 4 < here.recv() < 28


@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(train):
    model = fill_by_recipe(utils.ModelSizes(**TINY).build(dropout=0.0)).train(train)
    gpt2 = model.patch_level_decoder.base
    inputs = torch.randn(2, 7, 64)
    results = []
    ours = utils.run_gpt2(gpt2, inputs + gpt2.wpe.weight[:7], utils.attend)
    for outputs in (ours, gpt2(inputs_embeds=inputs).last_hidden_state):
        gradients = torch.autograd.grad(outputs.square().sum(), [p for p in gpt2.parameters() if p is not gpt2.wte.weight])
        results.append([outputs, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_blocks_compute_the_same(monkeypatch):
    """Traced once for all layers and lengths. Only tracing is tested, since generating code takes long."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    model = fill_by_recipe(utils.ModelSizes(**TINY).build(dropout=0.0)).train()
    batches = [as_batch([utils.to_patches(bytes(n), "x", 4) for n in sizes]) for sizes in ((3, 40, 17), (9, 9), (5, 30, 2, 2))]
    plain = [model(batch.patches.long(), batch.masks).nats for batch in batches]
    names = list(model.state_dict())
    for decoder in (model.patch_level_decoder, model.byte_level_decoder):
        decoder.compile_blocks()
    compiled = [model(batch.patches.long(), batch.masks).nats for batch in batches]
    for one, other in zip(plain, compiled, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert 2 <= len(traced) <= 4 and list(model.state_dict()) == names  # two parts of a block, of rows and of patches


def test_dropout_of_the_model_is_for_training_and_follows_the_seed():
    model = fill_by_recipe(utils.ModelSizes(**TINY).build(dropout=0.3))
    batch = as_batch([utils.to_patches(bytes(range(n)), "x", 4) for n in (3, 40, 17)])

    def loss(seed):
        torch.manual_seed(seed)
        return model(batch.patches.long(), batch.masks).loss.item()

    assert loss(1) == loss(2)
    model.train()
    assert loss(1) == loss(1) != loss(2)


def test_sampled_targets(tiny_model):
    batch = as_batch([utils.to_patches(bytes(n), "x", 4) for n in (3, 40, 17)])
    every = batch.targets
    assert torch.equal(every, batch.masks[:, 1:] == 1)
    assert torch.equal(train_gen.sample_targets(every, 0, np.random.default_rng(0)), every)
    assert torch.equal(train_gen.sample_targets(every, 1000, np.random.default_rng(0)), every)
    drawn = [train_gen.sample_targets(every, 5, np.random.default_rng(i)) for i in range(50)]
    assert all(int(targets.sum()) == 5 and not (targets & ~every).any() for targets in drawn)
    assert torch.equal(torch.stack(drawn).any(0), every)  # each has its chance
    with torch.no_grad():
        whole = tiny_model(batch.patches.long(), batch.masks).nats
        part = tiny_model(batch.patches.long(), batch.masks, drawn[0]).nats
    assert torch.allclose(part, whole[drawn[0][every]], atol=1e-5)


def test_rows_are_padded_in_bf16_on_a_cpu(monkeypatch, tiny_model):
    """Padded rows change neither losses nor gradients."""
    assert len(utils.pad_rows(torch.ones(33, 2))) == 33  # float32
    with autocast(torch.device("cpu"), torch.bfloat16):
        padded = [len(utils.pad_rows(torch.ones(count, 1))) for count in range(5000)]
    assert all(0 <= rows - count <= max(31, count / 16) for count, rows in enumerate(padded)) and len(set(padded)) < 80
    batch = as_batch([utils.to_patches(bytes(range(count)), "txt", 4) for count in (0, 5, 40)])  # 18 patches, 15 targets
    results = []
    for pad_rows in (utils.pad_rows, lambda x: x):
        monkeypatch.setattr(utils, "pad_rows", pad_rows)
        model = copy.deepcopy(tiny_model).eval()
        with autocast(torch.device("cpu"), torch.bfloat16):
            nats = model(batch.patches.long(), batch.masks).nats
        nats.mean().backward()
        results.append([nats, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for ours, plain in zip(*results, strict=True):
        assert ours.shape == plain.shape and (ours - plain).norm() <= 0.01 * plain.norm()


@torch.no_grad()
def test_bf16_agrees_with_float32(golden, golden_model, golden_sequences):
    batch = as_batch(golden_sequences)
    with autocast(torch.device("cpu"), torch.bfloat16):
        output = golden_model(batch.patches.long(), batch.masks)
    assert output.loss.item() == pytest.approx(golden["loss"], rel=0.01)
    assert output.loss.dtype == torch.float32


def test_a_smooth_start_of_the_patch_embedding():
    torch.manual_seed(0)
    model = utils.ModelSizes(**{**TINY, "HIDDEN_SIZE": 256}).build(embedding_start="smooth")
    weight = model.patch_level_decoder.patch_embedding.weight
    assert weight.shape == (256, 4 * 257) and weight.t().is_contiguous() and weight.requires_grad
    vectors = weight.detach().t().view(4, 257, 256)  # (S, V, D)
    assert vectors.std().item() == pytest.approx(0.12, rel=0.05)
    steps = (vectors[:, 1:256] - vectors[:, :255]).norm(dim=-1)
    far = (vectors[:, 128:256] - vectors[:, :128]).norm(dim=-1)
    assert steps.max() < 0.5 * far.min()  # close values have close vectors, distant ones do not
    assert (vectors[:, :256] - vectors[:, 256:]).norm(dim=-1).min() > 2 * steps.max()  # 256 is close to none
    optimizer = training.make_optimizer(model, "adamw", 1.0, "smooth")
    groups = optimizer.param_groups
    assert [group["lr_factor"] for group in groups] == [0.1, 1.0] and groups[0]["params"] == [weight]
    assert [p for group in groups for p in group["params"]] == list(model.parameters())  # as checkpoints count them
    scheduler = training.make_scheduler(optimizer, "constant", 2e-3, 10, steps_done=5)
    assert scheduler.get_last_lr() == [pytest.approx(2e-4), 2e-3]


def test_a_start_from_bits():
    """Bytes that differ in one bit, or by 1, have closer vectors than others, in both embeddings; 256 is close to none."""
    torch.manual_seed(0)
    model = utils.ModelSizes(**{**TINY, "HIDDEN_SIZE": 256}).build(embedding_start="bits")
    patch_embedding, head = model.patch_level_decoder.patch_embedding.weight, model.byte_level_decoder.base.lm_head.weight
    assert head is model.byte_level_decoder.base.transformer.wte.weight
    for vectors in (*patch_embedding.detach().t().view(4, 257, 256), head.detach()):
        assert vectors.std().item() == pytest.approx(0.2, rel=0.05)
        likeness = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)  # (V, V)
        values = torch.arange(256)
        typical = likeness[:256, :256].mean()
        assert (likeness[values, values ^ 0x40] > typical + 0.1).all()
        assert (likeness[values[1:], values[:-1]] > typical + 0.1).float().mean() > 0.9
        assert likeness[256, :256].abs().max() < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_pytorchs_for_the_matrices_of_the_blocks(dtype):
    """Its steps are those of torch.optim.Muon and AdamW, also after its state went through a checkpoint."""
    models = [utils.ModelSizes(**TINY).build() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    named = dict(models[1].named_parameters())
    matrices = {name: p for name, p in named.items() if ".h." in name and p.dim() == 2}
    assert len(matrices) == 4 * (TINY["PATCH_NUM_LAYERS"] + TINY["BYTE_NUM_LAYERS"])
    expected = [
        torch.optim.Muon(matrices.values(), lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for name, p in named.items() if name not in matrices], lr=1e-2),
    ]
    optimizer = training.make_optimizer(models[0], "muon", 1e-2, "published")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.dtype = dtype
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scaler.get_scale() if step < 3 else torch.full_like(p, torch.inf)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)  # in step 3 not at all
        scaler.update()
        for each in expected if step < 3 else ():
            each.step()
        state, optimizer = optimizer.state_dict(), training.make_optimizer(models[0], "muon", 1e-2, "published")
        checkpoint.load_optimizer(optimizer, state, "here")
    for name, p in models[0].named_parameters():
        change, difference = named[name] - start[name], p - named[name]
        assert difference.norm() <= (0.03 if name in matrices else 1e-5) * change.norm(), name  # PyTorch's Muon computes in bf16
