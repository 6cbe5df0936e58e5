"""Scores of files: windows, sums, conversions, and MODE evaluate as a user runs it."""

import hashlib
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY, as_batch, fill_by_recipe, one_message, options, run_script
from hypothesis import given
from hypothesis import strategies as st

import utils
from bgpt import generation, system
from bgpt.checkpoint import save_checkpoint
from bgpt.evaluation import COMPRESSORS, score_files, score_symbols, surprising_stretches
from bgpt.examples import directed, hash_texts, pair_files
from bgpt.files import extension_of, list_files
from bgpt.windows import evaluation_windows

LINES = b"X:1\nK:C\nCDEF GABc|\n"


def write_files(folder, contents):
    """Writes {name: bytes} into a folder and returns its Files."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return list_files([str(folder)], "INPUT_FOLDER")


def score(model, examples, folder, batch_size=4, failed=None):
    """Returns {name: FileScore} of Examples, in float32."""
    windows = evaluation_windows(examples, model.patch_size, model.patch_length)
    scores = score_files(model, windows, str(folder), batch_size, torch.float32, lambda count: None, failed)
    return {each.name: each for each in scores}


def forward_nats(model, patches):
    """Returns the nats of all symbols of the patches after the first, float64 (P-1, S), from the model's own forward."""
    batch = as_batch([patches])
    with torch.no_grad():
        return model(batch.patches.long(), batch.masks).nats.double().numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_bits_of_a_file_are_the_sum_of_forward_nats(tmp_path, golden_model, batch_size):
    random = np.random.default_rng(1)
    lengths = [0, 1, 15, 16, 17, 100, 200]
    contents = {f"{length}.bin": random.integers(0, 256, length, dtype=np.uint8).tobytes() for length in lengths}
    scores = score(golden_model, utils.Examples(write_files(tmp_path, contents)), tmp_path, batch_size)
    assert set(scores) == set(contents)
    for name, content in contents.items():
        nats = forward_nats(golden_model, utils.to_patches(content, "bin", golden_model.patch_size))
        assert scores[name].nats == pytest.approx(nats.sum(), rel=1e-5) and scores[name].symbols == nats.size
        counted = nats.reshape(-1)[: len(content) + 1].sum()
        assert scores[name].bits == pytest.approx(counted / math.log(2), rel=1e-5)
        assert scores[name].bytes == len(content)


def test_a_long_file_is_the_sum_over_its_windows(tmp_path, tiny_model):
    content = (LINES * 20)[:250]  # 65 patches of 4; the model has positions for 16
    scores = score(tiny_model, utils.Examples(write_files(tmp_path, {"a.abc": content, "b.abc": LINES})), tmp_path, 3)
    patches, nats, done = utils.to_patches(content, "abc", 4), [], 1
    for start in range(0, len(patches) - 8, 8):
        nats.append(forward_nats(tiny_model, patches[start : start + 16])[done - start - 1 :])
        done = start + 16
    nats = np.concatenate(nats)
    assert nats.shape == (len(patches) - 1, 4)
    assert scores["a.abc"].nats == pytest.approx(nats.sum(), rel=1e-5)
    bits = nats.reshape(-1)[:251] / math.log(2)
    assert scores["a.abc"].bits == pytest.approx(bits.sum(), rel=1e-5)
    assert scores["a.abc"].profile[1].max() == pytest.approx(bits.max(), rel=1e-4)


def test_a_conversion_is_the_sum_over_its_target(tmp_path, tiny_model):
    contents = {"a.abc": b"12345", "a.mid": b"abcdefgh", "b.abc": b"", "b.mid": b"xyz"}
    pairs = directed(pair_files(write_files(tmp_path, contents), "abc&mid"), "abc&mid")
    scores = score(tiny_model, pairs, tmp_path, 3)
    assert {each.group for each in scores.values()} == {"abc->mid", "mid->abc"} and len(scores) == 4
    for name, result in scores.items():
        source, target = (utils.to_patches(contents[each], extension_of(each), 4) for each in name.split(" -> "))
        nats = forward_nats(tiny_model, np.concatenate((source[:-1], target)))[len(source) - 1 :]  # the target's content
        assert len(nats) == len(target) - 1 and result.bytes == len(contents[name.split(" -> ")[1]])
        assert result.nats == pytest.approx(nats.sum(), rel=1e-5)
        assert result.bits == pytest.approx(nats.reshape(-1)[: result.bytes + 1].sum() / math.log(2), rel=1e-5)


def test_symbols_scored_once_more_are_the_same(tmp_path, tiny_model):
    content = (LINES * 10)[:150]
    windows = evaluation_windows(utils.Examples(write_files(tmp_path, {"a.abc": content})), 4, 16)
    [whole] = score_symbols(tiny_model, windows, 0, [(0, 151)], torch.float32)
    parts = score_symbols(tiny_model, windows, 0, [(3, 20), (100, 151)], torch.float32)
    for (start, stop), part in zip([(3, 20), (100, 151)], parts):
        for array, expected in zip(part, whole):
            np.testing.assert_allclose(array, expected[start:stop], rtol=1e-4)
    assert whole[0].tolist() == [*content, utils.END]
    [result] = score(tiny_model, windows.examples, tmp_path).values()
    assert whole[1].sum() == pytest.approx(result.bits, rel=1e-5)
    assert (whole[2][:, 0] == whole[0]).sum() == result.top1 and (np.diff(whole[3]) <= 0).all()


@given(st.lists(st.floats(0, 20), min_size=1, max_size=80))
def test_stretches_begin_with_the_most_surprising_and_never_overlap(bits):
    stretches = surprising_stretches(bits, longest=5)
    taken = [index for offset, count, _ in stretches for index in range(offset, offset + count)]
    assert len(taken) == len(set(taken)) and all(1 <= count <= 5 for _, count, _ in stretches)
    assert len(stretches) == 10 or len(taken) == len(bits)
    peaks = [max(bits[offset : offset + count]) for offset, count, _ in stretches]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == max(bits)
    for offset, count, total in stretches:
        assert total == pytest.approx(sum(bits[offset : offset + count]), abs=1e-9)


def test_compressors_are_those_of_the_command_line():
    content = LINES * 50 + bytes(range(256))
    for name, command in (("gzip -9", "gzip -9nc"), ("bz2 -9", "bzip2 -9c"), ("xz -9e", "xz -9ec")):
        if shutil.which(command.split()[0]):
            done = subprocess.run(command.split(), input=content, capture_output=True, check=True)
            assert len(COMPRESSORS[name](content)) == pytest.approx(len(done.stdout), abs=4)


def memorise(examples, steps=150):
    """Returns a small model that overfits Examples."""
    torch.manual_seed(0)
    model = utils.ModelSizes(**{**TINY, "PATCH_LENGTH": 12}).build(dropout=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = utils.Batch(utils.ByteDataset(examples, 4, 12)[i] for i in range(len(examples)))
    for _ in range(steps):
        loss = model(batch.patches.long(), batch.masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def check_exactness(model, examples, folder, prompts, contents):
    """Checks which examples are exact, {name: bool}, against greedy decoding of {name: prompt} to {name: content}."""
    scores = score(model, examples, folder)
    for name, prompt in prompts.items():
        [continuation] = generation.generate(model, [generation.Prompt(0, prompt, [0])], 1, generation.Sampling(temperature=0))
        assert scores[name].exact == (utils.to_content(continuation.symbols) == contents[name] and not continuation.cut_off), name
    return {name: scores[name].exact for name in prompts}


def test_exact_files_are_those_that_greedy_decoding_writes(tmp_path):
    # greedy decoding writes one file per extension; 40 bytes fill its 12 patches, end patch included
    contents = {f"{i}.{ext}": LINES[: 5 + 4 * i] for i, ext in enumerate(("a", "b", "c", "d", "a"))}
    contents |= {"full.e": LINES[:16] * 2 + b"12345678", "cut.f": LINES[:16] * 2 + b"123456789", "long.g": bytes(60)}
    examples = utils.Examples(write_files(tmp_path, contents))
    prompts = {name: utils.extension_patch(extension_of(name), 4) for name in contents}
    exact = check_exactness(memorise(examples), examples, tmp_path, prompts, contents)
    assert sum(exact.values()) >= 5 and not exact["long.g"] and not (exact["0.a"] and exact["4.a"])
    assert exact["cut.f"]  # 13 patches, but its end is in the 12th


def test_exact_conversions_are_those_that_greedy_decoding_writes(tmp_path):
    random = np.random.default_rng(0)
    contents = {f"{i}.{ext}": random.integers(0, 256, 6 + i, dtype=np.uint8).tobytes() for i in range(6) for ext in ("x", "y")}
    pairs = pair_files(write_files(tmp_path, contents), "x->y")
    sources = [utils.to_patches(contents[f"{i}.x"], "x", 4)[:-1].reshape(-1) for i in range(6)]
    prompts = {f"{i}.x -> {i}.y": np.concatenate((sources[i], utils.extension_patch("y", 4))) for i in range(6)}
    targets = {name: contents[name.split(" -> ")[1]] for name in prompts}
    model = memorise(pairs.select(range(4)))  # it does not know the last two
    assert sum(check_exactness(model, pairs, tmp_path, prompts, targets).values()) == 4


# ---- As a user runs it ----------------------------------------------------------------------------------------------

def evaluate(folder, **constants):
    return run_script("inference.py", *options(MODE="evaluate", PRECISION="fp32", **constants), cwd=folder)


def report_of(folder, name="output"):
    return json.loads((folder / name / "evaluation.json").read_text())


def test_evaluate(tmp_path, tiny_model, tiny_checkpoint):
    hostile = b"</pre><script>alert(1)</script>\"' onclick=alert(1) <img src=x>\n"
    contents = {"a.abc": LINES, "sub/b.abc": LINES * 9, "c.bin": bytes(range(256)), "empty.abc": b"", "none": b"abc"}
    contents["<script>alert(1)<x>&\"'\t\u202e.txt"] = hostile
    write_files(tmp_path / "input", contents)
    (tmp_path / "input" / "dead.abc").symlink_to(tmp_path / "gone")
    done = evaluate(tmp_path, INFERENCE_BATCH_SIZE=3)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "dead.abc: No such file" in done.stdout
    report = report_of(tmp_path)
    assert report["checkpoint"]["sha256"] == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert "PATCH_SIZE" not in report["settings"] and "PRECISION" in report["settings"]  # config.py's sizes are not the model's
    assert report["settings"]["MODE"] == "evaluate" and report["versions"]["torch"] == torch.__version__
    assert list(report["groups"]) == ["all", ".abc", ".bin", ".txt", "no extension"]
    assert report["failed"] == [{"file": "input/dead.abc", "reason": "No such file or directory"}]
    bits = {each["file"]: each["bits"] for each in report["files"]}
    expected = score(tiny_model, utils.Examples(list_files([str(tmp_path / "input")], "")), tmp_path / "input", failed=[])
    assert bits == pytest.approx({system.escape_name(name): expected[name].bits for name in contents}, rel=1e-5)
    whole = report["groups"]["all"]
    assert whole["files"] == 6 and whole["bytes"] == sum(map(len, contents.values()))
    assert whole["bits_per_byte"][0] == pytest.approx(sum(bits.values()) / whole["bytes"])
    assert whole["bits_per_byte"][1] < whole["bits_per_byte"][0] < whole["bits_per_byte"][2]
    assert f"{whole['bits_per_byte'][0]:.4f} (" in done.stdout and report["comparison"] in done.stdout
    lines = (tmp_path / "output" / "evaluation.tsv").read_text().split("\n")
    assert len(lines) == 1 + 6 + 1 and {line.count("\t") for line in lines[:-1]} == {lines[0].count("\t")}

    page = (tmp_path / "output" / "evaluation.html").read_text()
    assert "<script" not in page and "<img" not in page and "http:" not in page and "src=" not in page.replace("&lt;i", "")
    assert "default-src 'none'; style-src 'unsafe-inline'" in page and "\u202e" not in page
    assert set(re.findall(r"<(\w+)", page)) <= set(
        "html head meta title style body h1 h2 h3 p div table tr th td svg text rect path section pre i".split()
    )
    titles = re.findall(r'<i class="c\d" title="([^"]*)">', page)
    assert len(titles) == sum(len(content) + 1 for name, content in contents.items() if content)
    assert all(re.fullmatch(r"\d+: .+, \d+\.\d\d bits; likeliest .+ %, .+ %, .+ %", title) for title in titles)


def test_one_file_lists_its_stretches(tmp_path, tiny_checkpoint):
    write_files(tmp_path / "input", {"a.abc": LINES, "b.txt": LINES})
    hashes = torch.from_numpy(hash_texts([str(tmp_path / "input" / "a.abc")]))
    save_checkpoint(tiny_checkpoint, {**torch.load(tiny_checkpoint), "file_hashes": hashes})
    done = evaluate(tmp_path, INPUT_EXT="abc")
    assert "was trained on 1 of 1 files" in done.stdout
    [file] = report_of(tmp_path)["files"]
    assert done.returncode == 0 and file["file"] == "a.abc" and len(file["stretches"]) > 0
    rows = [line.split()[:2] for line in done.stdout.split("the most surprising stretches:\n")[1].splitlines()]
    assert rows == [["offset", "bytes"], *([str(each["offset"]), str(each["bytes"])] for each in file["stretches"])]


def test_pairs(tmp_path, tiny_checkpoint):
    contents = {"a.abc": b"12345", "a.mid": b"abcdefgh", "b.abc": b"1" * 40, "b.mid": b"2" * 40, "c.txt": b""}
    write_files(tmp_path / "input", contents)
    done = evaluate(tmp_path, CONVERSION_MODE="abc&mid")
    assert done.returncode == 0 and "b.mid -> input/b.abc: 23 patches" in done.stdout
    report = report_of(tmp_path)
    assert list(report["groups"]) == ["all", "abc->mid", "mid->abc"]
    assert [each["file"] for each in report["files"]] == ["a.abc -> a.mid", "a.mid -> a.abc"]
    assert len(report["pairs_that_do_not_fit"]) == 2
    (tmp_path / "input" / "a.mid").rename(tmp_path / "input" / "a.MID")  # pairs ignore case, and so does INPUT_EXT
    assert evaluate(tmp_path, CONVERSION_MODE="abc&mid", INPUT_EXT="mid", OUTPUT_FOLDER="upper").returncode == 0
    upper = report_of(tmp_path, "upper")["groups"]
    assert list(upper) == ["all", "mid->abc"] and upper["all"]["bits_per_byte"] == report["groups"]["mid->abc"]["bits_per_byte"]
    (tmp_path / "input" / "b.abc").unlink()
    (tmp_path / "input" / "b.abc").symlink_to(tmp_path / "gone")
    assert "b.abc: No such file" in evaluate(tmp_path, CONVERSION_MODE="abc->mid").stdout
    for constants in ({"CONVERSION_MODE": "abc->mid", "INPUT_EXT": "mid"}, {"CONVERSION_MODE": "abc->wav"}):
        assert "CONVERSION_MODE" in one_message(evaluate(tmp_path, **constants))


def test_a_classifier_is_refused_and_told_where_to_go(tmp_path):
    model = fill_by_recipe(utils.ModelSizes(4, 16, 64, 2, num_labels=2).build())
    save_checkpoint(tmp_path / "weights.pth", {"model": model.state_dict(), "labels": {"a.x": 0, "b.x": 1}})
    write_files(tmp_path / "input", {"a_1.x": b"1", "b_1.x": b"2"})
    message = one_message(evaluate(tmp_path))
    assert "INFERENCE_WEIGHTS_PATH" in message and "MODE 'classify'" in message


def test_a_file_that_changes_on_the_way_is_named(tmp_path, tiny_model):
    files = write_files(tmp_path, {"a.x": bytes(200), "b.x": b"abc", "c.x": b"abc"})
    (tmp_path / "a.x").write_bytes(bytes(201))
    (tmp_path / "c.x").unlink()
    failed = []
    scores = score(tiny_model, utils.Examples(files), tmp_path, 2, failed)
    pairs = pair_files(write_files(tmp_path / "pairs", {"a.x": b"12345", "a.y": b"12345"}), "x->y")
    (tmp_path / "pairs" / "a.y").write_bytes(b"123456")  # as many patches as before
    assert not score(tiny_model, pairs, tmp_path, 2, failed) and failed.pop()[1].startswith("has 6 bytes now")
    assert set(scores) == {"b.x"}
    assert sorted(failed) == [
        (str(tmp_path / "a.x"), "has 201 bytes now, but had 200 when it was listed"),
        (str(tmp_path / "c.x"), "No such file or directory"),
    ]
