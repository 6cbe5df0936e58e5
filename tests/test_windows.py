"""Files longer than the context: windows in training and evaluation, held-out ends, and runs on one large file."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, make_files, one_message, options, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from bgpt import system
from bgpt import windows as windowing
from bgpt.examples import hold_out, hold_out_parts, print_sets
from bgpt.files import list_files


def examples_of(sizes):
    """Returns Examples of files that need not exist, from {path: bytes}."""
    return utils.Examples(make_files(sizes))


def write_examples(folder, contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return utils.Examples(list_files([str(folder)], "TRAIN_FOLDERS"))


# ---- Windows --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=4),
    length=st.integers(3, 40),
    cut=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_patch_but_the_first_is_predicted_once(sizes, length, cut, seed):
    examples = examples_of({f"{i}.x": size for i, size in enumerate(sizes)})
    spans = [(0, total) for total in examples.lengths(3).tolist()]
    if cut and spans[0][1] > 5:
        examples.parts[0] = spans[0] = (2, spans[0][1] - 1)
    for windows in (
        windowing.evaluation_windows(examples, 3, length),
        windowing.training_windows(examples, 3, length, [seed, 1]),
    ):
        assert len(windows) == sum(len(windows.of(index)) for index in range(len(examples)))
        numbers = np.arange(len(windows))
        bounds = list(zip(*map(np.ndarray.tolist, windows.bounds(numbers))))
        assert bounds == [(index, *window) for index in range(len(examples)) for window in windows.of(index)]
        assert windows.lengths(numbers).tolist() == [last - first for _, first, last, _ in bounds]
        for index, (begin, end) in enumerate(spans):
            predicted = []
            for nth, (first, last, start) in enumerate(windows.of(index)):
                assert begin <= first < start < last <= end and last - first <= length
                assert start - first == (1 if nth == 0 else length - windows.advance)
                predicted += range(start, last)
            assert predicted == list(range(begin + 1, end))


@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=6), length=st.integers(3, 40), cut=st.booleans())
def test_windows_are_counted_as_they_are_made(sizes, length, cut):
    examples = examples_of({f"{i}.x": size for i, size in enumerate(sizes)})
    if cut and sizes[0] > 12:
        examples.parts[0] = (1, 5)
    seeds = [[0, epoch] for epoch in range(4)]
    made = [len(windowing.training_windows(examples, 3, length, each)) for each in seeds]
    assert windowing.count_training_windows(examples, 3, length, seeds) == made


def test_training_windows_begin_elsewhere_in_each_epoch():
    examples = examples_of({"a.x": 10_000, "b.x": 10_000, "short.x": 20})

    def ends(seed, epoch):
        windows = windowing.training_windows(examples, 4, 64, [seed, epoch])
        assert windows.of(2) == [(0, 7, 1)]  # a file that fits is one window
        return [last for index in (0, 1) for _, last, _ in windows.of(index)]

    assert ends(0, 1) == ends(0, 1)
    firsts = [ends(0, epoch)[0] for epoch in range(300)]
    assert set(firsts) == set(range(2, 65))  # every position where a window can begin
    assert ends(0, 1) != ends(0, 2) and ends(0, 1) != ends(1, 1)
    both = [ends(0, epoch) for epoch in range(5)]
    assert any(each[: len(each) // 2] != each[len(each) // 2 :] for each in both)  # each file for itself


@settings(deadline=None, max_examples=40)
@given(size=st.integers(0, 90), patch_size=st.integers(1, 5), patch_length=st.integers(3, 9), seed=st.integers(0, 5))
def test_a_window_holds_the_bytes_of_its_patches(tmp_path_factory, size, patch_size, patch_length, seed):
    content = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    examples = write_examples(tmp_path_factory.mktemp("data"), {"a.xy": content})
    whole = utils.to_patches(content, "xy", patch_size)
    evaluation = windowing.evaluation_windows(examples, patch_size, patch_length)
    for windows in (evaluation, windowing.training_windows(examples, patch_size, patch_length, [seed])):
        symbols, times = np.full(size + 1, -1), np.zeros(size + 1, dtype=int)
        for window in windows.of(0):
            patches, counted, context = windows.read(0, window)
            assert np.array_equal(patches, whole[window[0] : window[1]]) and len(counted) == len(patches)
            predicted = windows.predicted_symbols(0, window)
            symbols[predicted] = patches[context:].reshape(-1)[: max(predicted.stop - predicted.start, 0)]
            times[predicted] += 1
        assert (times == 1).all() and symbols.tolist() == [*content, utils.END]
        batch = utils.Batch(windows[i] for i in range(len(windows)))
        assert batch.lengths.tolist() == windows.lengths(np.arange(len(windows))).tolist()
        targets = batch.patches[:, 1:][batch.targets]  # (N, S)
        assert len(targets) == len(whole) - 1 and int((batch.counted[:, 1:][batch.targets]).sum()) == size + 1


def test_a_file_that_changes_is_named(tmp_path):
    windows = windowing.training_windows(write_examples(tmp_path, {"a.x": bytes(100)}), 4, 8, [0])
    (tmp_path / "a.x").write_bytes(bytes(101))
    with pytest.raises(OSError, match="has 101 bytes now.*a.x"):
        windows[0]
    (tmp_path / "a.x").unlink()
    with pytest.raises(FileNotFoundError, match="a.x"):
        windows[0]


def test_windows_of_a_huge_file_take_no_memory():
    windows = windowing.training_windows(examples_of({"a.x": 2**50}), 16, 512, [0, 1])
    assert len(windows) == pytest.approx(2**50 / 16 / 511, rel=1e-6)
    index, first, last, predicted = windows.bounds(np.array([0, len(windows) - 1]))
    assert first[0] == 0 and last[1] == windows.totals[0] == 2**46 + 2 and index.tolist() == [0, 0]


# ---- The held-out set -----------------------------------------------------------------------------------------------


def test_a_lone_file_gives_its_end(capsys):
    train, held_out = hold_out_parts(examples_of({"a.x": 100_000}), 0.05, 0, 10, 64)
    [cut] = {last for _, last in train.spans(10)}
    assert train.spans(10).tolist() == [[0, cut]] and held_out.spans(10).tolist() == [[cut, 10_002]]
    assert 10_002 - cut == round(0.05 * 10_002)
    assert "of a.x, the end is held out, 5,000 bytes" in capsys.readouterr().out
    for size, patches in ((5000, 50), (200_000, 409), (10**6, 1000)):  # 1 % is little: a tenth, or 4,096 bytes
        assert np.diff(hold_out_parts(examples_of({"a.x": size}), 0.01, 0, 10, 64)[1].spans(10)).item() == patches
    with pytest.raises(system.UserError, match="add files"):  # published: only whole files
        hold_out_parts(examples_of({"a.x": 100_000}), 0.05, 0, 10, None)
    with pytest.raises(system.UserError, match="add files"):  # too short to be cut
        hold_out_parts(examples_of({"a.x": 100}), 0.05, 0, 10, 64)


def test_files_small_beside_the_rest_are_held_out_whole():
    sizes = {f"{i:03}.x": 2000 for i in range(300)}
    train, held_out = hold_out_parts(examples_of(sizes), 0.01, 0, 10, 64)
    whole = list(held_out)
    assert 0 < len(whole) < 10 and len(train) + len(whole) == 300 and not train.parts and not held_out.parts
    assert held_out.indices[:, 0].tolist() == hold_out(examples_of(sizes), 0.01, 0)[1].tolist()  # as without windows
    train, held_out = hold_out_parts(examples_of({"big.x": 10**6, **sizes}), 0.01, 0, 10, 64)
    assert list(held_out) == [*whole, ("big.x",)] and len(train) + len(whole) == 301
    assert list(held_out.parts) == [len(whole)] and train[next(iter(train.parts))] == ("big.x",)
    train, held_out = hold_out_parts(examples_of({"big.x": 10**6, "small.x": 10}), 0.01, 0, 10, 64)
    assert len(train) == 2 and len(held_out) == 1 and held_out.parts
    few = {f"{i}.x": 700 for i in range(20)}  # 72 patches each, hardly longer than the context: their ends would be 2 patches
    train, held_out = hold_out_parts(examples_of(few), 0.01, 0, 10, 64)
    assert len(train) == 19 and len(held_out) == 1 and not held_out.parts
    few = {f"{i}.x": 10_000 for i in range(5)}  # a fifth of all each
    train, held_out = hold_out_parts(examples_of(few), 0.01, 0, 10, 64)
    assert len(train) == 5 and held_out.spans(10).tolist() == [[1002 - 81, 1002]] * 5  # 4,096 bytes in all


def test_the_share_of_long_files_that_is_seen_is_printed(capsys):
    examples = examples_of({"a.x": 6390, "b.x": 100})  # 641 and 12 patches
    constants = {"TRAIN_FOLDERS": ["d"], "EVAL_FOLDERS": [], "PATCH_SIZE": 10}
    for length, cuts_windows in ((64, True), (64, False), (641, False)):
        print_sets(examples, examples, {**constants, "PATCH_LENGTH": length}, cuts_windows)
    long = "2 files are longer than PATCH_LENGTH (64 patches of 10 bytes): "
    assert [line.partition(" of ")[2].removeprefix(long) for line in capsys.readouterr().out.splitlines() if "PATCH_LENGTH" in line] == [
        "an epoch sees all bytes, in windows",
        "evaluation sees all bytes, in windows",
        "an epoch sees 11.64% of all bytes, a crop of each",
        "evaluation sees 11.64% of all bytes, the head of each",
    ]


# ---- Runs -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    **TINY, "TRAIN_FOLDERS": ["train"], "EVAL_FOLDERS": [], "NUM_EPOCHS": 2, "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3,
    "PRECISION": "fp32", "EVAL_SPLIT": 0.1,
}  # fmt: skip


@pytest.fixture()
def text_folder(tmp_path):
    """A working folder with one text of 3,000 bytes to train on, and one of 500 to evaluate on."""
    random = np.random.default_rng(0)
    for part, size in {"train": 3000, "eval": 500}.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "text.txt").write_bytes(random.choice(list(b"abc \n"), size).astype(np.uint8).tobytes())
    return tmp_path


def train(folder, **changes):
    done = run_script("train-gen.py", *options(**{**SETTINGS, **changes}), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_on_one_file(text_folder):
    out = train(text_folder)
    assert "EVAL_SPLIT: of text.txt, the end is held out, 300 bytes" in out
    assert "an epoch sees all bytes, in windows" in out
    # 677 patches predicted, 15 in each window, the first of them shorter
    assert torch.load(text_folder / "weights-last.pth", weights_only=True)["lr_sched"]["last_epoch"] in (12, 13, 14)
    first, last = (float(line.split("eval_bits_per_byte")[1]) for line in (text_folder / "logs.txt").read_text().splitlines())
    assert last < first < 8.1
    message = one_message(run_script("train-gen.py", *options(**{**SETTINGS, "EVAL_SPLIT": 0.2}), cwd=text_folder))
    assert "EVAL_SPLIT was 0.1 and is now 0.2" in message
    out = train(text_folder, EVAL_SPLIT=0.2, NUM_EPOCHS=3, ALLOW_CHANGED_FILES=True)
    assert "best score reset" in out
    message = one_message(run_script("train-gen.py", *options(**SETTINGS, LONG_FILES="crop", WEIGHTS_PATH="c.pth"), cwd=text_folder))
    assert "cannot hold out a part of 1" in message


def test_evaluation_covers_long_files_like_mode_evaluate(text_folder):
    train(text_folder, EVAL_FOLDERS=["eval"])
    arguments = options(MODE="evaluate", INPUT_FOLDER="eval", PRECISION="fp32", INFERENCE_WEIGHTS_PATH="weights-last.pth")
    done = run_script("inference.py", *arguments, cwd=text_folder)
    assert done.returncode == 0, done.stderr
    scores = json.loads((text_folder / "output" / "evaluation.json").read_text())["groups"]["all"]
    figures = torch.load(text_folder / "weights-last.pth", weights_only=True)["figures"]
    assert figures["eval_bits_per_byte"] == pytest.approx(scores["bits_per_byte"][0], rel=1e-5)
    assert figures["eval_loss"] == pytest.approx(scores["nats_per_symbol"][0], rel=1e-5)


def test_another_way_with_long_files_resumes(text_folder):
    train(text_folder, EVAL_FOLDERS=["eval"], LONG_FILES="crop", NUM_EPOCHS=1)
    out = train(text_folder, EVAL_FOLDERS=["eval"], NUM_EPOCHS=2)
    assert "LONG_FILES was 'crop' and is now 'windows'" in out
    assert "best score reset" in out and "best: epoch 2" in out
