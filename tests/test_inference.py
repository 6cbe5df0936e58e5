"""Sampling, cached generation, and inference.py as a user runs it."""

import html.parser
import os
import re
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, Running, fill_by_recipe, load_script, one_message, options, run_script
from hypothesis import given
from hypothesis import strategies as st

from bgpt import generation
from bgpt import gallery as index_page
from bgpt import layers
from bgpt import files as listing
from bgpt import system
import utils

inference = load_script("inference")
GREEDY = generation.Sampling(temperature=0)


def continue_all(model, prompts, batch_size, sampling=GREEDY, seed=0):
    """Returns the Continuations of prompts (arrays of symbols), in the order of the prompts."""
    stream = (generation.Prompt(i, symbols, [seed, i]) for i, symbols in enumerate(prompts))
    done = {continuation.key: continuation for continuation in generation.generate(model, stream, batch_size, sampling)}
    return [done[i] for i in range(len(prompts))]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def stated_distribution(logits, top_k, top_p, temperature):
    """The specification's rule for one row, in plain NumPy."""
    p = np.exp(logits - logits.max())
    p = p / p.sum()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        for i in ranked[top_k:]:
            p[i] = 0
        p = p / p.sum()
    if top_p < 1:
        kept, total = [], 0.0
        for i in ranked:
            kept.append(i)
            total += p[i]
            if total > top_p:
                break
        p = np.array([p[i] if i in kept else 0 for i in range(len(p))])
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
    for row, expected in zip(drawn, (stated_distribution(row, top_k, top_p, temperature) for row in logits)):
        np.testing.assert_allclose(row, expected, atol=1e-9)


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


def test_extreme_uniforms_never_draw_an_impossible_symbol():
    logits = torch.full((2, 257), -torch.inf)
    logits[:, 5], logits[:, 200] = 0.0, 0.0
    drawn = generation.sample_symbols(logits, generation.Sampling(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [5, 200]


# ---------------------------------------------------------------------------------------------------------------------
# Cached generation
# ---------------------------------------------------------------------------------------------------------------------


def test_gelu_is_that_of_the_model_for_any_rows_and_threads():
    """To the bit the same for a row, however many there are, and however many threads share them."""
    rows = torch.randn(97, 1024, generator=torch.Generator().manual_seed(0)) * 3
    alone = rows.clone()
    for row in alone.split(1):
        layers.apply_gelu(row)
    torch.testing.assert_close(alone, torch.nn.functional.gelu(rows, approximate="tanh"), rtol=1e-5, atol=1e-6)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for count in (2, 33, 65, 95, 97):  # 65 and 95: PyTorch's own shares would end within a vector
                together = rows[:count].clone()
                layers.apply_gelu(together)
                assert torch.equal(together, alone[:count]), (threads, count)
    finally:
        torch.set_num_threads(1)


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
        expected = sum(rows, [])
        assert continuation.symbols[: len(expected)].tolist() == expected


def ragged_prompts(size):
    """Prompts that end in every place of a patch, short and long, also with 256 inside as in a conversion."""
    random = np.random.default_rng(3)
    lengths = [0, 1, size - 1, size, size + 1, 5 * size, 5 * size + 2, 9 * size + 1, 2, 14 * size + 3, 15 * size - 1]
    prompts = [np.concatenate((utils.extension_patch("x", size), random.integers(0, 257, n))) for n in lengths]
    return prompts


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_cached_batched_ragged_equals_recomputing_one_at_a_time(tiny_model, batch_size):
    # raise the end symbol, so that some sequences end early and others take their places
    with torch.no_grad():
        tiny_model.byte_level_decoder.base.transformer.wte.weight[256] *= 1.6
    prompts = ragged_prompts(4)
    expected = [recompute_greedy(tiny_model, prompt, 1000) for prompt in prompts]
    assert {cut_off for _, cut_off in expected} == {True, False}  # the test sees both ways to end
    for continuation, (symbols, cut_off) in zip(continue_all(tiny_model, prompts, batch_size), expected, strict=True):
        assert continuation.symbols.tolist() == symbols and continuation.cut_off == cut_off


def test_golden_model_cached_equals_recomputed(golden_model):
    prompts = [p for p in ragged_prompts(16)]
    for continuation, prompt in zip(continue_all(golden_model, prompts, 4), prompts, strict=True):
        symbols, _ = recompute_greedy(golden_model, prompt, 40)
        assert continuation.symbols[:40].tolist() == symbols


def test_samples_do_not_depend_on_the_batch():
    """In float32 on a CPU even the last digits of the log-probabilities are the same, so no draw can come out otherwise."""
    model = fill_by_recipe(utils.ModelSizes(4, 40, 128, 2, 1).build())
    prompts = [*ragged_prompts(4), np.concatenate(ragged_prompts(4)[5:8])]
    sampling = generation.Sampling(top_k=50, top_p=0.95, temperature=1.2)
    runs = [continue_all(model, prompts, size, sampling) for size in (1, 3, 32)]
    for run in runs[1:]:
        assert [(c.symbols.tolist(), c.nats) for c in run] == [(c.symbols.tolist(), c.nats) for c in runs[0]]
    other = continue_all(model, prompts, 3, sampling, seed=1)
    assert [c.symbols.tolist() for c in other] != [c.symbols.tolist() for c in runs[0]]


def test_first_symbol_is_drawn_from_the_models_own_distribution(tiny_model):
    """4,000 samples from nothing against the uncached model, binned to 8 groups: chi-square, 7 degrees of freedom."""
    prompt = utils.extension_patch("x", 4)
    with torch.no_grad():
        encoded = tiny_model.patch_level_decoder(torch.from_numpy(prompt).long()[None]).last_hidden_state[:, -1]
        logits = tiny_model.byte_level_decoder(encoded, torch.zeros(1, 4, dtype=torch.int64)).logits[0, 0]
    probabilities = torch.softmax(logits.double(), -1).numpy()
    groups = np.minimum((np.cumsum(probabilities) * 8).astype(int), 7)
    counts = np.zeros(8)
    model = fill_by_recipe(utils.ModelSizes(4, 3, 64, 2, 1).build())  # room for two patches only, to be quick
    with torch.no_grad():
        model.load_state_dict({**tiny_model.state_dict(), "patch_level_decoder.base.wpe.weight": tiny_model.patch_level_decoder.base.wpe.weight[:3]})
    for continuation in continue_all(model, [prompt] * 4000, 500, generation.Sampling()):
        first = continuation.symbols[0] if len(continuation.symbols) else utils.END
        counts[groups[first]] += 1
    expected = np.bincount(groups, probabilities, 8) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("sampling", [GREEDY, generation.Sampling(top_p=0.9)])
def test_guessing_and_shapes_change_nothing(tiny_model, rows, sampling):
    """What CUDA graphs are captured of, with more rows and positions than are in use, against guessed symbols."""
    with torch.no_grad():
        tiny_model.byte_level_decoder.base.transformer.wte.weight[256] *= 1.6
    prompts = [generation.Prompt(i, symbols, [0, i]) for i, symbols in enumerate(ragged_prompts(4)[:rows])]
    writers = [generation.PatchWriter(tiny_model, 7, sampling, **way) for way in ({"guesses": True}, {"on_device": True})]
    longest = max(len(prompt.symbols) // 4 for prompt in prompts)
    with torch.inference_mode():
        for writer in writers:
            writer.admit(list(range(rows)), prompts)
        for later in range(5):
            results = [writer.step(rows, longest + later) for writer in writers]
            ended = []
            for row, (patch, other) in enumerate(zip(results[0][0].tolist(), results[1][0].tolist())):
                given = len(prompts[row].symbols) % 4 if later == 0 else 0
                end = patch.index(utils.END, given) + 1 if utils.END in patch[given:] else None
                assert patch[:end] == other[:end]
                ended.append(end is not None)
            np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
            if any(ended):  # what comes after the end of a sequence is of no use, and differs
                return


def test_nats_are_the_models_own(tiny_model):
    """Whatever the draw is filtered by: the plain softmax of the uncached model, the 256 that ends it included."""
    with torch.no_grad():
        tiny_model.byte_level_decoder.base.transformer.wte.weight[256] *= 4
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
        writer.admit([0], [prompt])
        outputs.append(writer.step_patch_level(1, 16).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# inference.py
# ---------------------------------------------------------------------------------------------------------------------


def outputs_in(folder):
    """Returns the paths of all files in a folder, within it, but for the index; sorted."""
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in paths if path not in index_page.INDEX_NAMES)


def infer(folder, **constants):
    return run_script("inference.py", *options(**constants), cwd=folder)


def test_generate(tmp_path, tiny_checkpoint):
    done = infer(tmp_path, MODE="generate", TARGET_EXT="mid", NUM_SAMPLES=5, INFERENCE_BATCH_SIZE=2)
    assert done.returncode == 0, done.stderr
    names = outputs_in(tmp_path / "output")
    assert len(names) == 5 and all(re.fullmatch(r"\d{8}-\d{6}-[1-5]\.mid", name) for name in names)
    assert "5 files written to output" in done.stdout and "seed 0" in done.stdout
    again = infer(tmp_path, MODE="generate", TARGET_EXT="mid", NUM_SAMPLES=5, OUTPUT_FOLDER="again")
    assert again.returncode == 0
    contents = [[(tmp_path / f / name).read_bytes() for name in outputs_in(tmp_path / f)] for f in ("output", "again")]
    assert contents[0] == contents[1] and len(set(contents[0])) > 1  # the same seed, the same files


def test_convert_and_complete(tmp_path, tiny_model, tiny_checkpoint):
    (tmp_path / "input" / "sub").mkdir(parents=True)
    files = {"a.abc": b"12345", "b.abc": b"", "sub/c.abc": b"x" * 8, "long.abc": b"y" * 57, "d.txt": b"not one of them"}
    for name, content in files.items():
        (tmp_path / "input" / name).write_bytes(content)
    exact = {"TEMPERATURE": 0, "PRECISION": "fp32"}
    done = infer(tmp_path, MODE="convert", INPUT_EXT="abc", TARGET_EXT="mid", OUTPUT_FOLDER="converted", **exact)
    assert done.returncode == 1 and "Traceback" not in done.stderr  # one could not be done, the others are
    assert "1 could not be done" in done.stdout and "long.abc: too long" in done.stdout
    assert set(outputs_in(tmp_path / "converted")) == {"a.abc.mid", "b.abc.mid", "sub/c.abc.mid"}
    for name in ("a.abc", "sub/c.abc"):
        # [abc] content [mid], then what the model writes
        prompt = np.concatenate((utils.to_patches(files[name], "abc", 4)[:-1].reshape(-1), utils.extension_patch("mid", 4)))
        symbols, cut_off = recompute_greedy(tiny_model, prompt, 1000)
        assert (tmp_path / "converted" / f"{name}.mid").read_bytes() == bytes(symbols)
        assert (f"converted/{name}.mid" in done.stdout) == cut_off  # named in the summary if it was cut off

    assert "note: weights.pth does not tell what it was trained on" in done.stdout

    done = infer(tmp_path, MODE="complete", OUTPUT_FOLDER="too-long")
    assert done.returncode == 0 and "too long" not in done.stdout, done.stderr
    (tmp_path / "input" / "long.abc").write_bytes(b"y" * 60)
    done = infer(tmp_path, MODE="complete", OUTPUT_FOLDER="too-long")
    assert done.returncode == 1 and "long.abc: too long" in done.stdout and "PROMPT_BYTES 59 or fewer leave some" in done.stdout
    done = infer(tmp_path, MODE="complete", PROMPT_BYTES=6, OUTPUT_FOLDER="completed", **exact)
    assert done.returncode == 0, done.stderr
    for name, content in files.items():
        given = content[:6]
        prompt = np.concatenate((utils.extension_patch(listing.extension_of(name), 4), np.frombuffer(given, np.uint8)))
        symbols, _ = recompute_greedy(tiny_model, prompt, 1000)
        assert (tmp_path / "completed" / name).read_bytes() == given + bytes(symbols), name


def test_what_was_wrong_with_each_input_is_told(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "fine.x").write_bytes(b"abc")
    (tmp_path / "input" / "dead.x").symlink_to(tmp_path / "gone")
    (tmp_path / "input" / "taken.x").write_bytes(b"abd")
    (tmp_path / "output" / "taken.x").mkdir(parents=True)  # the output cannot be written; the others are
    (tmp_path / "input" / ("字" * 80 + ".x")).write_bytes(b"abc")
    (tmp_path / "input" / "full.x").write_bytes(bytes(60))  # with its extension patch it fills all 16 patches of 4
    done = infer(tmp_path, MODE="complete")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 could not be done" in done.stdout
    assert re.search(r"dead\.x: No such file", done.stdout) and "full.x: too long" in done.stdout
    assert set(outputs_in(tmp_path / "output")) == {"fine.x", "字" * 80 + ".x"}


@pytest.mark.parametrize(
    "constants, words",
    [
        ({"INFERENCE_WEIGHTS_PATH": "gone.pth"}, "INFERENCE_WEIGHTS_PATH: 'gone.pth' does not exist"),
        ({"MODE": "convert"}, "INPUT_EXT is None"),
        ({"MODE": "complete"}, "INPUT_FOLDER: 'input' does not exist"),
        ({"MODE": "complete", "INPUT_FOLDER": "empty"}, "INPUT_FOLDER: no files in 'empty'"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "INPUT_EXT": "mid"}, "INPUT_FOLDER: no files of INPUT_EXT 'mid'"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "OUTPUT_FOLDER": "data"}, "OUTPUT_FOLDER: 'data' lies in INPUT_FOLDER"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "OUTPUT_FOLDER": "."}, "INPUT_FOLDER: 'data' lies in OUTPUT_FOLDER"),
        ({"OUTPUT_FOLDER": "data/a.x"}, "OUTPUT_FOLDER: cannot write"),
        ({"INFERENCE_WEIGHTS_PATH": "cls.pth"}, "is a classifier"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, tiny_checkpoint, constants, words):
    import config

    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.x").write_bytes(b"abc")
    model = utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3)
    torch.save({"model": model.state_dict()}, tmp_path / "cls.pth")
    monkeypatch.chdir(tmp_path)
    for name, value in constants.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(system.UserError, match=re.escape(words)):
        script = load_script("inference")
        script.check_settings()
        script.main()
    assert (tmp_path / "data" / "a.x").read_bytes() == b"abc" and not (tmp_path / "output").exists()


def test_what_others_put_in_the_output_folder_stays(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    (tmp_path / "output" / "sub").mkdir(parents=True)
    for name in ("a.x", "link.x"):
        (tmp_path / "input" / name).write_bytes(b"abc")
    (tmp_path / "output" / "a.x").write_bytes(b"the user's")
    (tmp_path / "output" / "link.x").symlink_to(tmp_path / "input" / "link.x")
    leftover = tmp_path / "output" / "sub" / ".bgpt-01234567-of-a-killed-run.tmp"
    leftover.write_bytes(b"ab")
    os.utime(leftover, (0, 0))
    fresh = tmp_path / "output" / "sub" / ".bgpt-01234567-of-a-run-that-saves.tmp"
    fresh.write_bytes(b"ab")
    done = infer(tmp_path, MODE="complete")
    assert done.returncode == 1 and "link.x: a link stands in its place" in done.stdout
    assert (tmp_path / "output" / "a.x.bak").read_bytes() == b"the user's"
    assert (tmp_path / "output" / "a.x").read_bytes() != b"the user's" and not leftover.exists() and fresh.exists()
    fresh.unlink()
    assert (tmp_path / "input" / "link.x").read_bytes() == b"abc"
    infer(tmp_path, MODE="complete")  # what the index lists is its own
    assert outputs_in(tmp_path / "output") == ["a.x", "a.x.bak", "link.x"]


def test_two_runs_never_share_a_folder(tmp_path, tiny_checkpoint):
    (tmp_path / "output").mkdir()
    with index_page.locked_folder(tmp_path / "output", "OUTPUT_FOLDER"):
        message = one_message(infer(tmp_path))
    assert "OUTPUT_FOLDER: another run is at work" in message
    assert infer(tmp_path, NUM_SAMPLES=1).returncode == 0
    assert not [path for path in (tmp_path / "output").iterdir() if path.name.startswith(".")]


def test_a_lock_taken_away_by_the_run_before_is_taken_anew(tmp_path, tiny_checkpoint, monkeypatch):
    """A run can open the lock file of another that is just removing it: then its lock is on a file nobody else finds."""
    lockf = system.fcntl.lockf
    removed = []

    def lockf_after_the_other_run_ended(lock, how):
        if not removed:
            removed.append(os.unlink(lock.name))
        lockf(lock, how)

    monkeypatch.setattr(system.fcntl, "lockf", lockf_after_the_other_run_ended)
    (tmp_path / "output").mkdir()
    with index_page.locked_folder(tmp_path / "output", "OUTPUT_FOLDER"):
        assert removed and "OUTPUT_FOLDER: another run is at work" in one_message(infer(tmp_path))


def test_a_closed_pipe_ends_nothing(tmp_path, tiny_checkpoint):
    """As with `python inference.py | head -1`."""
    command = f"{sys.executable} {ROOT / 'inference.py'} --NUM_SAMPLES 3 | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and "rror" not in done.stderr
    assert len(index_page.read_index(tmp_path / "output" / "index.tsv")) == 3


def test_a_mistake_is_one_line(tmp_path):
    message = one_message(infer(tmp_path))
    assert message == "error: INFERENCE_WEIGHTS_PATH: 'weights.pth' does not exist; it must be a checkpoint (.pth)\n"


def test_ctrl_c_leaves_whole_files_only(tmp_path):
    model = fill_by_recipe(utils.ModelSizes(16, 512, 256, 4, 2).build())
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    running = Running("inference.py", *options(NUM_SAMPLES=10000, INFERENCE_BATCH_SIZE=2), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("output/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send(signal.SIGINT)
    done = running.wait(60)
    assert "stopped by Ctrl-C" in one_message(done, 130)
    written = outputs_in(tmp_path / "output")
    assert f"{len(written)} files written" in done.stdout and all(name.endswith(".bin") for name in written)
    assert set(index_page.read_index(tmp_path / "output" / "index.tsv")) == set(written)


@pytest.mark.parametrize("known, spelling", [(None, "abc"), (["abc"], "abc"), (["ABC", "abc"], "ABC")])
def test_extensions_are_spelled_as_the_model_saw_them(tmp_path, tiny_model, known, spelling):
    torch.save({"model": tiny_model.state_dict(), **({"extensions": known} if known else {})}, tmp_path / "weights.pth")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.ABC").write_bytes(b"123")
    assert infer(tmp_path, MODE="complete", TEMPERATURE=0, PRECISION="fp32").returncode == 0
    prompt = np.concatenate((utils.extension_patch(spelling, 4), np.frombuffer(b"123", np.uint8)))
    symbols, _ = recompute_greedy(tiny_model, prompt, 1000)
    assert (tmp_path / "output" / "a.ABC").read_bytes() == b"123" + bytes(symbols)


def test_candidates(tmp_path, tiny_model, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    for name in ("a.x", "b.x", "c.x"):
        (tmp_path / "input" / name).write_bytes(name.encode() * 3)
    for count, folder in ((1, "one"), (4, "four")):
        done = infer(tmp_path, MODE="complete", NUM_CANDIDATES=count, OUTPUT_FOLDER=folder, PRECISION="fp32", SEED=5)
        assert done.returncode == 0, done.stderr
        listed = index_page.read_index(tmp_path / folder / "index.tsv")
        assert sorted(listed) == outputs_in(tmp_path / folder) == ["a.x", "b.x", "c.x"]
        for name, (_, source, size, bits, how, seed) in listed.items():
            prompt = np.concatenate((utils.extension_patch("x", 4), np.frombuffer(name.encode() * 3, np.uint8)))
            streams = [[5, zlib.crc32(name.encode())], *([5, zlib.crc32(name.encode()), i] for i in range(1, count))]
            prompts = [generation.Prompt(i, prompt, stream) for i, stream in enumerate(streams)]
            best = max(generation.generate(tiny_model, prompts, 1, generation.Sampling()), key=lambda c: c.mean_log_probability())
            content = name.encode() * 3 + bytes(best.symbols.tolist())
            assert (tmp_path / folder / name).read_bytes() == content
            assert [source, size, how, seed] == [f"input/{name}", str(len(content)), "cut off" if best.cut_off else "ended", "5"]
            assert float(bits) == pytest.approx(best.bits_per_byte(), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1))
def test_names_survive_the_index(name):
    escaped = system.escape_name(name)
    assert system.unescape_name(escaped) == name and escaped.isprintable()


class Reader(html.parser.HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_page_holds_whatever_the_outputs_hold(tmp_path):
    hostile = b"</pre><script>alert(1)</script><img src=x onerror=alert(1)>\0\x1b\xff &amp;"
    files = {
        "plain.abc": b"X:1\nK:C\n<CDEF>", "a\tb\nc<script>.txt": hostile, "hostile": hostile, "picture.bmp": b"BM<>",
        "sound.wav": b"RIFF", "x.bin": bytes(range(256)) * 2, "sub/empty.txt": b"", "cut.md": "naïve ☕".encode()[:-1],
    }  # fmt: skip
    rows = []
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        rows.append((name, "in<put>", len(content), None if not content else 1.5, "ended", 0))
    index_page.write_index(tmp_path, rows)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    read = Reader(page)
    shown = "html head meta title style body h1 p main article h2 pre img audio".split()
    assert read.tags == set(shown) and "onerror" not in read.attributes and "\0" not in page
    for words in ("X:1\nK:C\n<CDEF>", "</script><img src=x onerror=alert(1)>", "a\\tb\\nc<script>.txt", "naïve", "0010  10 11 12"):
        assert words in read.text
    assert "… and 256 more bytes" in read.text and "data:image/bmp;base64,Qk08Pg==" in page and "data:audio/wav" in page
    lines = (tmp_path / "index.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == list(index_page.INDEX_COLUMNS) and all(line.count("\t") == 5 for line in lines)
    assert len(lines) == 1 + len(files) and "sub/empty.txt\tin<put>\t0\t\tended\t0" in lines


def test_index_goes_on_and_keeps_what_is_not_its_own(tmp_path):
    for name in ("f-2.x", "f-10.x"):
        (tmp_path / name).write_bytes(b"abc")
    (tmp_path / "index.tsv").write_text("my own table")
    (tmp_path / "index.html").write_text("my own page")
    index_page.write_index(tmp_path, [("f-10.x", "", 3, 2.0, "ended", 0), ("gone.x", "", 3, 2.0, "ended", 0)])
    assert (tmp_path / "index.tsv.bak").read_text() == "my own table"
    assert (tmp_path / "index.html.bak").read_text() == "my own page"
    index_page.write_index(tmp_path, [("f-2.x", "", 3, 2.0, "cut off", 1)])
    assert list(index_page.read_index(tmp_path / "index.tsv")) == ["f-2.x", "f-10.x"]
    assert not (tmp_path / "index.tsv.bak2").exists()


def test_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(index_page, "SHOWN_BYTES", 5)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"word")
    index_page.write_index(tmp_path, [(name, "", 4, 1.0, "ended", 0) for name in ("a.txt", "b.txt")])
    text = Reader((tmp_path / "index.html").read_text(encoding="utf-8")).text
    assert text.count("word") == 1 and "b.txt" in text


def test_an_output_never_takes_the_place_of_the_index(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "index.html").write_bytes(b"abc")
    done = infer(tmp_path, MODE="complete")
    assert done.returncode == 1 and "index.html: its output would have the name" in done.stdout
