"""Results of a CUDA GPU against the CPU's in float32. Skipped without a GPU.

    python -m pytest tests/test_cuda.py
"""

import signal

import numpy as np
import pytest
import torch
from conftest import TINY, as_batch, fill_by_recipe, options, run_script
from test_generation import GREEDY, continue_all, ragged_prompts
from test_training_runs import SETTINGS, assert_same_end, folder, stop, train  # noqa: F401 - `folder` is a fixture
from torch.nn.attention import SDPBackend

import utils
from bgpt import distributed, generation
from bgpt import model as models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 in float32: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def build(**sizes):
    """Returns two models with the same weights, in eval mode: one on the CPU, one on the GPU."""
    models = [fill_by_recipe(utils.ModelSizes(**(TINY | sizes)).build(dropout=0.0)).eval() for _ in range(2)]
    return models[0], models[1].to("cuda")


def ragged_batch(patch_size):
    random = np.random.default_rng(0)
    contents = [random.integers(0, 256, n, dtype=np.uint8) for n in (0, 3, 30, 41)]
    return as_batch([utils.to_patches(content, "bin", patch_size) for content in contents])


# ---- The model ------------------------------------------------------------------------------------------------------


def test_losses_and_gradients():
    batch, runs = ragged_batch(4), []
    for model in build():
        output = model(batch.patches_on(model.device), batch.masks)
        output.loss.backward()
        runs.append((output, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}))
    (one, gradients), (other, other_gradients) = runs
    torch.testing.assert_close(other.nats.cpu(), one.nats, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_new_shapes_need_no_preparation():
    """cuDNN's attention, which PyTorch prefers on an H100, makes a plan for each new shape of a batch."""
    distributed.pick_device()
    queries = torch.zeros(3, 2, 17, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    choice = torch._fused_sdp_choice(queries, queries, queries, is_causal=True)
    assert choice != SDPBackend.CUDNN_ATTENTION.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_very_many_sequences(dtype):
    """More than the 65,535 that one of CUDA's kernels takes, as patches of one or two bytes make them."""
    qkv = torch.randn(70_000, 2, 3, 1, 64, device="cuda", dtype=dtype).requires_grad_()
    gradients = []
    for last in (len(qkv), 1000):  # each sequence by itself: the first thousand are as if there were no others
        utils.attend(qkv[:last])[:1000].float().square().sum().backward()
        gradients.append(qkv.grad[:1000].clone())
        qkv.grad = None
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_classifier():
    batch = ragged_batch(4)
    sizes = {name: size for name, size in TINY.items() if name != "BYTE_NUM_LAYERS"}
    logits = []
    for device in ("cpu", "cuda"):
        model = fill_by_recipe(utils.ModelSizes(**sizes, num_labels=3).build(dropout=0.0)).eval().to(device)
        with torch.no_grad():
            logits.append(model(batch.patches_on(model.device), batch.masks).cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


# ---- Generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_greedy_bytes(batch_size):
    cpu, cuda = build()
    prompts = ragged_prompts(4)
    for expected, actual in zip(continue_all(cpu, prompts, 3), continue_all(cuda, prompts, batch_size), strict=True):
        assert actual.symbols.tolist() == expected.symbols.tolist() and actual.cut_off == expected.cut_off


@pytest.mark.parametrize("sampling", [GREEDY, generation.Sampling(top_p=0.9), generation.Sampling(top_k=20, temperature=0.7)])
def test_captured_graphs_change_nothing(monkeypatch, sampling):
    """Graphs replayed at ragged lengths, while new prompts replace ended ones, against a run without graphs."""

    class Uncaptured(generation.PatchWriter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.captures = False

    prompts, (_, model) = ragged_prompts(4), build()
    captured = continue_all(model, prompts, 3, sampling)
    monkeypatch.setattr(generation, "PatchWriter", Uncaptured)
    assert [c.symbols.tolist() for c in captured] == [c.symbols.tolist() for c in continue_all(model, prompts, 3, sampling)]


def test_bf16_generation_writes_what_float32_does():
    """The first patch-level outputs of the cached bf16 model, by the size of those in float32."""
    _, model = build()
    prompt, outputs = generation.Prompt(0, ragged_prompts(4)[5], [0]), []
    for dtype in (torch.float32, torch.bfloat16):
        writer = generation.PatchWriter(model.to(dtype), 1, GREEDY)
        with torch.inference_mode():
            writer.admit([prompt])
            outputs.append(writer.step_patch_level(1, 16).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.03


# ---- Training -------------------------------------------------------------------------------------------------------


def last_loss(log):
    """Returns the training loss of the last epoch in a log."""
    words = log.read_text().splitlines()[-1].split()
    return float(words[words.index("train_loss") + 1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_learn(folder, precision):  # noqa: F811
    settings = {"NUM_EPOCHS": 6, "LEARNING_RATE": 3e-3}
    train(folder, "full", PRECISION="fp32", **settings)
    train(folder, precision, PRECISION=precision, **settings)
    expected = last_loss(folder / "full.txt")
    assert expected < 4  # nats per symbol; log 257 is 5.55
    assert last_loss(folder / f"{precision}.txt") == pytest.approx(expected, rel=0.03)


def test_resume_bit_for_bit_and_back_to_the_cpu(folder):  # noqa: F811
    """A run with dropout that is stopped twice, against one that is not; it then resumes on the CPU, and on the GPU again."""
    settings = {"DROPOUT": 0.1, "NUM_EPOCHS": 12}
    train(folder, "whole", **settings)
    for after in (0.05, 0.3):
        stop(folder, "parts", signal.SIGTERM, after, **settings)
    train(folder, "parts", **settings)
    assert_same_end(folder, "parts", "whole")

    model = models.load_model(folder / "whole-last.pth", "cpu").net
    batch, losses = ragged_batch(4), []
    with torch.no_grad():
        for device in ("cpu", "cuda"):
            losses.append(float(model.eval().to(device)(batch.patches_on(model.device), batch.masks).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for number, environment in ((13, {"CUDA_VISIBLE_DEVICES": ""}), (14, {})):
        changed = {**SETTINGS, **settings, "NUM_EPOCHS": number, "WEIGHTS_PATH": "whole.pth", "LOGS_PATH": "whole.txt"}
        done = run_script("train-gen.py", *options(**changed), cwd=folder, env=environment)
        assert done.returncode == 0 and "resumes from" in done.stdout, done.stderr
        assert ("1 x cpu" if environment else "1 x cuda") in done.stdout


def test_memory_stays_flat():
    """Over 200 batches of ragged lengths, once the longest has been seen."""
    device, random = torch.device("cuda"), np.random.default_rng(0)
    model = utils.ModelSizes(**TINY).build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    length = model.patch_length
    for number in range(220):
        lengths = [length] * 4 if number == 0 else random.integers(2, length + 1, 4)
        batch = as_batch([utils.to_patches(bytes(4 * (n - 2)), "bin", 4) for n in lengths])
        with distributed.autocast(device, torch.bfloat16):
            model(batch.patches_on(device), batch.masks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 20:
            torch.cuda.synchronize()
            allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= 1.01 * allocated and torch.cuda.max_memory_allocated() <= 1.01 * peak
