"""train-cls.py as a user runs it: labels, learning, starts, reports, resuming and errors."""

import re
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, Running, fill_by_recipe, interrupt, load_script
from conftest import one_message, options, run_script, torchrun_environments

import config
import utils
from bgpt import evaluation, examples, system
from bgpt import model as models
from bgpt.examples import label_of
from bgpt.files import list_files

SETTINGS = {
    **TINY,
    "TRAIN_FOLDERS": ["train"],
    "EVAL_FOLDERS": ["eval"],
    "BATCH_SIZE": 8,
    "NUM_EPOCHS": 3,
    "LEARNING_RATE": 3e-3,
    "PRECISION": "fp32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder of files whose label is a byte that is more frequent in them; of ragged lengths, some too long."""
    folder, random = tmp_path_factory.mktemp("cls"), np.random.default_rng(0)
    for part, count in {"train": 48, "eval": 21}.items():
        (folder / part).mkdir()
        for i in range(count):
            name, byte = [("low", 10), ("high", 200), ("mid", 100)][i % 3]
            content = random.integers(0, 256, random.integers(8, 90))
            content[random.random(len(content)) < 0.7] = byte
            (folder / part / f"{name}_{i}.bin").write_bytes(content.astype(np.uint8).tobytes())
    return folder


def train(folder, name, status=0, **changes):
    settings = {**SETTINGS, "WEIGHTS_PATH": f"{name}.pth", "LOGS_PATH": f"{name}.txt", **changes}
    done = run_script("train-cls.py", *options(**settings), cwd=folder)
    assert done.returncode == status, done.stderr
    return done


def load(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)


@pytest.fixture(scope="module")
def trained(folder):
    """The name of a run that has learned its labels."""
    done = train(folder, "trained", NUM_EPOCHS=12)
    assert "from random weights; pre-training is strongly recommended" in done.stdout
    return "trained"


@pytest.mark.parametrize(
    "path, label",
    [
        ("a/Business_1.txt", "Business.txt"),
        ("Business_1_2.txt", "Business.txt"),
        ("alone.txt", "alone.txt"),
        ("b_c/x_1", "x"),
        ("x", "x"),
        ("_1.txt", ".txt"),
        ("ä_1.wav", "ä.wav"),
        ("a.b_1.c", "a.b.c"),
    ],
)
def test_label_of(path, label):
    assert label_of(path) == label


@pytest.mark.parametrize(
    "path, prefix, folder",
    [
        ("a/new_york_1.txt", "new_york.txt", "a"),
        ("a/b/new_1", "new", "b"),
        ("a/b.c/alone.txt", "alone.txt", "b.c"),
        ("../x_y/_1.txt", "_1.txt", "x_y"),
    ],
)
def test_label_of_other_modes(path, prefix, folder):
    assert (label_of(path, "prefix"), label_of(path, "folder")) == (prefix, folder)


def test_folders_of_one_name(tmp_path, monkeypatch, capsys):
    """Below different folders of one data folder they are an error, in several data folders a note."""
    for name in ("pets/cats/2023/a_1", "pets/cats/2024/a_1", "pets/dogs/2024/a_2", "shards/a/x/1", "shards/b/x/2", "shards/b/y/1", "shards/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def labels(mode, *folders):
        return list(examples.find_labels(utils.Examples(list_files(folders, "TRAIN_FOLDERS")), mode)[1])

    with pytest.raises(system.UserError, match="LABELS 'folder'.*cats/2024, dogs/2024[^,]*--LABELS path"):
        labels("folder", "pets")
    assert labels("path", "pets") == labels("path", "./pets/") == ["cats/2023", "cats/2024", "dogs/2024"]
    assert labels("path", "shards") == ["a/x", "b/x", "b/y", "shards"] and labels("folder", "pets/cats") == ["2023", "2024"]
    with pytest.raises(system.UserError, match="is Business.txt\\); --LABELS path finds 3 labels$"):
        labels("name", "pets")
    assert not capsys.readouterr().out
    assert labels("folder", "shards/a", "shards/b") == ["x", "y"] and "note: 1 folders" in capsys.readouterr().out


def test_warnings_name_labels_with_few_files():
    labels = ["a.txt", "b.txt", "c.TXT", "c.txt"]
    assert [line for line in examples.labels_table(labels[:2], [9, 9], [100, 100]) if "warning" in line] == []
    lines = examples.labels_table(labels, [9, 1, 9, 9], [20, 0, 0, 20])
    warnings = [line for line in lines if "warning" in line]
    for words, line in zip(("single training file: b.txt", "no evaluation file: c.TXT", "only 40 evaluation", "case only: c.TXT"), warnings, strict=True):
        assert words in line


def test_the_table_of_labels_ends():
    lines = examples.labels_table([f"{i:02}\n.txt" for i in range(30)], [9] * 30, [1234567] * 30)
    assert lines[1] == "00\\n.txt         9     1234567" and len(lines) == 22 and lines[-1] == "and 10 more of 30 labels"


def test_labels_are_what_the_run_was_told(folder):
    """Folders as labels, from training to MODE classify, without another option."""
    for part in ("train", "eval"):
        for path in (folder / part).iterdir():
            name, number = path.stem.split("_")
            (folder / f"folders-{part}" / name).mkdir(parents=True, exist_ok=True)
            (folder / f"folders-{part}" / name / f"{number}.bin").write_bytes(path.read_bytes())
    folders = {"TRAIN_FOLDERS": ["folders-train"], "EVAL_FOLDERS": ["folders-eval"], "NUM_EPOCHS": 1}
    done = train(folder, "folders", LABELS="folder", **folders)
    assert "label  training  evaluation\nhigh         16           7\n" in done.stdout
    state = load(folder, "folders")
    assert state["labels"] == {"high": 0, "low": 1, "mid": 2} and state["label_mode"] == "folder"
    done = classify(folder, "folders", INPUT_FOLDER="folders-eval")
    assert f"the folders of 21 of them have one of the model's labels:\n{state['report']}" in done.stdout
    message = one_message(train(folder, "folders", status=1, **folders, LABELS="prefix"))
    assert "has 3 labels, but the files of TRAIN_FOLDERS have" in message


def test_other_labels_of_the_same_number_stop_a_rerun(folder):
    train(folder, "modes", NUM_EPOCHS=1)
    (folder / "modes-train").mkdir()
    for i, path in enumerate(sorted((folder / "train").iterdir())):
        (folder / "modes-train" / f"x_{'abc'[i % 3]}_{i}.bin").write_bytes(path.read_bytes())
    message = one_message(train(folder, "modes", status=1, TRAIN_FOLDERS=["modes-train"], EVAL_FOLDERS=["modes-train"], LABELS="prefix"))
    assert "TRAIN_FOLDERS: the labels" in message and "LABELS was 'name'" in message


def test_equal_accuracies_go_to_the_lower_loss(folder):
    """With equal accuracy the best epoch has the lowest loss, also in a resumed run."""
    (folder / "certain").mkdir()
    for i in range(24):
        (folder / "certain" / f"{'ab'[i % 2]}_{i}.bin").write_bytes(bytes([i % 2 * 200] * 20))
    settings = {"TRAIN_FOLDERS": ["certain"], "EVAL_FOLDERS": ["certain"], "LR_SCHEDULE": "constant"}
    for epochs in (4, 5, 9):
        train(folder, "certain", NUM_EPOCHS=epochs, **settings)
    logged = re.findall(r"epoch (\d+) .* eval_loss ([\d.]+)  eval_acc ([\d.]+)", (folder / "certain.txt").read_text())
    best = max(logged, key=lambda each: (float(each[2]), -float(each[1])))
    state = load(folder, "certain")
    assert [each[2] for each in logged].count("1.0000") > 2  # else there is nothing to decide
    assert state["best_epoch"] == int(best[0]) > 4 and state["best_loss"] == state["figures"]["eval_loss"]
    assert load(folder, "certain-last")["best_loss"] == state["best_loss"]


def test_it_learns_reports_and_saves(folder, trained):
    best, latest = load(folder, trained), load(folder, f"{trained}-last")
    for state in (best, latest):
        assert state["labels"] == {"high.bin": 0, "low.bin": 1, "mid.bin": 2}  # sorted
        assert state["max_eval_acc"] == 1.0
        for name in ("model", "optimizer", "lr_sched", "epoch", "best_epoch"):
            assert name in state
    assert best["epoch"] == best["best_epoch"] == latest["best_epoch"] and latest["epoch"] == 12
    log = (folder / f"{trained}.txt").read_text()
    lines = [line for line in log.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 12 and "eval_acc 1.0000" in lines[best["epoch"] - 1]
    assert best["report"] in log
    assert "accuracy 1.0000 (21 of 21 files), balanced accuracy 1.0000" in best["report"]


def test_the_report_says_what_the_predictions_are():
    confusion = {(0, 0): 5, (0, 1): 1, (1, 0): 2, (1, 1): 2}
    text, details = evaluation.classification_report(confusion, ["a.txt", "b.txt", "long.name"])
    assert not details and text.splitlines() == [
        "accuracy 0.7000 (7 of 10 files), balanced accuracy 0.6667",
        "95 % interval of the accuracy: 0.3968 to 0.8922",
        "label      precision  recall  files  predicted",
        "a.txt         0.7143  0.8333      6          7",
        "b.txt         0.6667  0.5000      4          3",
        "long.name          -       -      0          0",
        "true label by row, predicted label by column:",
        "             0  1  2",
        "0 a.txt      5  1  0",
        "1 b.txt      2  2  0",
        "2 long.name  0  0  0",
    ]


def test_a_report_of_many_labels_is_short():
    """One of two files of each label is right, but none of label 7."""
    count, began = 20_000, time.monotonic()
    confusion = {(i, i + shift): 1 for i in range(count - 1) for shift in (0, 1)} | {(7, 7): 0, (7, 8): 2}
    text, details = evaluation.classification_report(confusion, [f"label{i}" for i in range(count)])
    lines = text.splitlines()
    assert time.monotonic() - began < 5 and len(lines) == 24 and len(details.splitlines()) == count + 1
    assert "accuracy 0.5000 (19998 of 39998 files), balanced accuracy 0.5000" in lines[0] and "20,000" in lines[2]
    assert lines[4].split() == ["label7", "0.0000", "0.0000", "2", "1"] and "0.5000" in lines[5] and "column:" not in text


def test_accuracy_and_loss_are_those_of_single_files(folder, trained):
    """The logged figures, computed again: every evaluation file alone, without padding."""
    model, loaded = models.load_model(str(folder / f"{trained}.pth"), "cpu").net, load(folder, trained)
    nats = []
    for path in list_files([str(folder / "eval")], "EVAL_FOLDERS"):
        patches, _ = utils.read_patches(path, 4, last=16)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(patches).long()[None])
        nats.append(-logits.log_softmax(-1)[0, loaded["labels"][label_of(path)]].item())
    assert loaded["figures"]["eval_loss"] == pytest.approx(np.mean(nats), rel=1e-4)


def test_micro_batches_change_nothing(folder):
    for parts in (1, 4):
        train(folder, f"parts{parts}", ACCUMULATION_STEPS=parts, DROPOUT=0, NUM_EPOCHS=2)
    whole, parts = (load(folder, f"parts{parts}-last")["figures"] for parts in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("optimizer, rel", [("adamw", 1e-5), ("muon", 2e-4)])  # Muon rounds to bf16
def test_two_processes_learn_the_same(folder, optimizer, rel):
    one, both = f"one-{optimizer}", f"both-{optimizer}"
    same = {"OPTIMIZER": optimizer, "DROPOUT": 0, "NUM_EPOCHS": 2}
    train(folder, one, **same)
    settings = {**SETTINGS, **same, "WEIGHTS_PATH": f"{both}.pth", "LOGS_PATH": f"{both}.txt", "BATCH_SIZE": 4}
    done = [
        process.wait()
        for process in [Running("train-cls.py", *options(**settings), cwd=folder, env=env) for env in torchrun_environments(2)]
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    ends = [load(folder, f"{name}-last") for name in (one, both)]
    assert ends[1]["figures"] == pytest.approx(ends[0]["figures"], rel=rel)
    assert ends[1]["report"] == ends[0]["report"]


def test_a_stopped_run_ends_the_same(folder):
    long = {"SAVE_MINUTES": 0, "NUM_EPOCHS": 6}
    train(folder, "whole", **long)
    settings = {**SETTINGS, "WEIGHTS_PATH": "stopped.pth", "LOGS_PATH": "stopped.txt", **long}
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        running = Running("train-cls.py", *options(**settings), cwd=folder)
        done = interrupt([running], folder / "stopped-last.pth", number)
        assert done[0].returncode == status
    train(folder, "stopped", **long)
    for part in ("", "-last"):
        states = [load(folder, name + part) for name in ("whole", "stopped")]
        for state in states:
            state["moments"] = state["optimizer"]["state"]
        for key in ("model", "moments", "epoch", "best_epoch", "max_eval_acc", "figures", "random_states"):
            torch.testing.assert_close(*(state[key] for state in states), rtol=0, atol=0)
        assert states[0]["report"] == states[1]["report"]
    assert (folder / "whole.txt").read_text() == (folder / "stopped.txt").read_text()


def test_starts_from_a_generative_model(folder):
    generative = fill_by_recipe(utils.ModelSizes(**TINY).build())
    torch.save({"model": generative.state_dict()}, folder / "gen.pth")
    start = {"LOAD_FROM_PRE_CHECKPOINT": True, "PRE_WEIGHTS_PATH": "gen.pth", "LEARNING_RATE": 1e-12, "NUM_EPOCHS": 1}
    done = train(folder, "from-gen", **start, BYTE_NUM_LAYERS=2)  # which a classifier has none of
    assert "from the patch-level decoder of gen.pth, a generative model" in done.stdout
    trained = load(folder, "from-gen")["model"]
    for name, tensor in generative.patch_level_decoder.state_dict().items():
        torch.testing.assert_close(trained[f"patch_level_decoder.{name}"], tensor, rtol=0, atol=1e-6)
    message = one_message(run_script("train-cls.py", *options(**{**SETTINGS, **start, "HIDDEN_SIZE": 128}), cwd=folder))
    assert "PRE_WEIGHTS_PATH: 'gen.pth' is a model of other sizes: set HIDDEN_SIZE = 64 (now 128)" in message


def test_a_classifiers_head_is_kept_only_for_the_same_labels(folder, trained):
    start = {"LOAD_FROM_PRE_CHECKPOINT": True, "PRE_WEIGHTS_PATH": f"{trained}.pth", "LEARNING_RATE": 1e-12, "NUM_EPOCHS": 1}
    head = load(folder, trained)["model"]["classifier.weight"]
    done = train(folder, "same-labels", **start)
    assert "from the patch-level decoder and the head of trained.pth, a classifier" in done.stdout
    torch.testing.assert_close(load(folder, "same-labels")["model"]["classifier.weight"], head, rtol=0, atol=1e-6)
    for part in ("train", "eval"):
        if not (folder / f"other-{part}").exists():
            (folder / f"other-{part}").mkdir()
            for path in (folder / part).iterdir():
                (folder / f"other-{part}" / path.name.replace("low", "deep")).write_bytes(path.read_bytes())
    others = {"TRAIN_FOLDERS": ["other-train"], "EVAL_FOLDERS": ["other-eval"]}
    done = train(folder, "other-labels", **start, **others)
    assert "from the patch-level decoder of trained.pth" in done.stdout
    assert not torch.allclose(load(folder, "other-labels")["model"]["classifier.weight"], head, atol=1e-3)
    message = one_message(train(folder, "same-labels", status=1, **others, NUM_EPOCHS=2))
    assert "TRAIN_FOLDERS: the labels" in message
    state = load(folder, trained)  # a head whose rows stand in another order is the same head
    turned = {**state["model"], **{key: state["model"][key].flip(0) for key in ("classifier.weight", "classifier.bias")}}
    torch.save({"model": turned, "labels": {label: 2 - i for label, i in state["labels"].items()}}, folder / "turned.pth")
    train(folder, "from-turned", **{**start, "PRE_WEIGHTS_PATH": "turned.pth"})
    torch.testing.assert_close(load(folder, "from-turned")["model"]["classifier.weight"], head, rtol=0, atol=1e-6)


def test_every_label_keeps_a_training_file(folder):
    (folder / "rare").mkdir()
    for i, name in enumerate(["low", "high", "mid", "alone", "b\udcff\nd", "low", "high"]):
        (folder / "rare" / f"{name}_{i}.bin").write_bytes(b"x")
    for seed in range(3):
        done = train(folder, f"rare{seed}", TRAIN_FOLDERS=["rare"], EVAL_FOLDERS=[], EVAL_SPLIT=0.5, SEED=seed, NUM_EPOCHS=1)
        assert "evaluates on 2 files of the same folders, held out by EVAL_SPLIT" in done.stdout
    assert "b\\udcff\\nd.bin" in done.stdout  # names that nobody can print are escaped, and end no run
    train(folder, "rare0", TRAIN_FOLDERS=["rare"], EVAL_FOLDERS=[], EVAL_SPLIT=0.5, NUM_EPOCHS=2)


def test_a_generative_checkpoint_is_never_overwritten(folder):
    torch.save({"model": utils.ModelSizes(**TINY).build().state_dict()}, folder / "mine.pth")
    before = (folder / "mine.pth").read_bytes()
    message = one_message(train(folder, "mine", status=1))
    assert "WEIGHTS_PATH: 'mine.pth' is a generative model; here a classifier is needed: give another path" in message
    assert (folder / "mine.pth").read_bytes() == before and not (folder / "mine.pth.bak").exists()
    train(folder, "mine", LOAD_FROM_CHECKPOINT=False, NUM_EPOCHS=1)
    assert (folder / "mine.pth.bak").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"TRAIN_FOLDERS": ["gone"]}, "TRAIN_FOLDERS: 'gone' does not exist"),
        ({"TRAIN_FOLDERS": ["empty"]}, "TRAIN_FOLDERS: no files"),
        ({"TRAIN_FOLDERS": ["one"]}, "TRAIN_FOLDERS: the only label of its 2 files is 'low.bin'"),
        ({"EVAL_FOLDERS": ["new"]}, "EVAL_FOLDERS: 'new/new_1.bin' has the label 'new.bin', which no training file has"),
        ({"CONVERSION_MODE": "abc->mid"}, "CONVERSION_MODE is 'abc->mid'"),
        ({"WEIGHTS_PATH": "train/low_0.bin/x.pth"}, "WEIGHTS_PATH: cannot write"),
    ],
)
def test_mistakes(folder, monkeypatch, changes, words):
    monkeypatch.chdir(folder)
    for name, files in {"empty": [], "one": ["low_1.bin", "low_2.bin"], "new": ["low_1.bin", "new_1.bin"]}.items():
        (folder / name).mkdir(exist_ok=True)
        for file in files:
            (folder / name / file).write_bytes(b"x")
    for name, value in {**SETTINGS, "WEIGHTS_PATH": "mistake.pth", "LOGS_PATH": "mistake.txt", **changes}.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(system.UserError, match=re.escape(words)):
        script = load_script("train-cls")
        script.check_settings()
        script.main()
    assert not list(folder.glob("mistake*.pth"))


def read_predictions(folder):
    """Returns the rows of predictions.tsv, its header first."""
    return [line.split("\t") for line in (folder / "output" / "predictions.tsv").read_text().splitlines()]


def classify(folder, name, status=0, **changes):
    settings = {"MODE": "classify", "INPUT_FOLDER": "eval", "INFERENCE_WEIGHTS_PATH": f"{name}.pth", "PRECISION": "fp32", **changes}
    done = run_script("inference.py", *options(**settings), cwd=folder)
    assert done.returncode == status, done.stderr
    return done


def test_classify_agrees_with_the_evaluation_of_training(folder):
    train(folder, "half", NUM_EPOCHS=2, LEARNING_RATE=5e-4)  # not all right
    report = load(folder, "half")["report"]
    for batch_size in (1, 5):
        done = classify(folder, "half", INFERENCE_BATCH_SIZE=batch_size)
        assert f"the names of 21 of them have one of the model's labels:\n{report}" in done.stdout
    header, *rows = read_predictions(folder)
    assert header == ["file", "label", "probability", "label 2", "probability 2", "label 3", "probability 3"]
    assert [row[0] for row in rows] == sorted(path.name for path in (folder / "eval").iterdir())
    model, loaded = models.load_model(str(folder / "half.pth"), "cpu").net, load(folder, "half")
    for name, *shown in rows:
        patches, _ = utils.read_patches(str(folder / "eval" / name), 4, last=16)
        with torch.no_grad():
            probabilities = model.eval()(torch.from_numpy(patches).long()[None]).softmax(-1)[0]
        for label, probability in zip(shown[::2], shown[1::2]):
            assert float(probability) == pytest.approx(probabilities[loaded["labels"][label]].item(), abs=1e-4)
        assert list(map(float, shown[1::2])) == sorted(map(float, shown[1::2]), reverse=True)


def test_ctrl_c_keeps_finished_predictions(folder, trained, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    inference, stop_signal = load_script("inference"), mock.Mock()
    stop_signal.check.side_effect = [None, None, KeyboardInterrupt(signal.SIGINT)]
    for name, value in {"MODE": "classify", "INPUT_FOLDER": "eval", "OUTPUT_FOLDER": "stopped", "INFERENCE_BATCH_SIZE": 4}.items():
        monkeypatch.setattr(config, name, value)
    (folder / "stopped").mkdir()
    (folder / "stopped" / "predictions.tsv").write_text("of an earlier run")
    files = list_files(["eval"], "")
    with pytest.raises(KeyboardInterrupt):
        inference.classify_files(models.load_model(f"{trained}.pth", "cpu", "fp32"), files, stop_signal, [])
    out = capsys.readouterr().out
    assert f"8 of {len(files)} files classified in stopped/predictions-partial.tsv" in out and "accuracy" not in out
    assert len((folder / "stopped" / "predictions-partial.tsv").read_text().splitlines()) == 9
    assert (folder / "stopped" / "predictions.tsv").read_text() == "of an earlier run"


def test_classify_files_of_unknown_labels_and_such_as_cannot_be_read(folder, trained):
    (folder / "odd").mkdir()
    (folder / "odd" / "a\tb\n.bin").write_bytes(b"\n" * 20)
    (folder / "odd" / "low_1.bin").write_bytes(b"\n" * 20)
    (folder / "odd" / "low_2.txt").write_bytes(b"")
    (folder / "odd" / "gone_1.bin").symlink_to("nowhere")
    done = classify(folder, trained, status=1, INPUT_FOLDER="odd")
    assert "3 of 4 files classified in output/predictions.tsv" in done.stdout
    assert "the names of 1 of them have one of the model's labels" in done.stdout
    assert "1 files failed:" in done.stdout and "odd/gone_1.bin: No such file" in done.stdout
    assert [row[0] for row in read_predictions(folder)[1:]] == ["a\\tb\\n.bin", "low_1.bin", "low_2.txt"]
    done = classify(folder, trained, INPUT_FOLDER="odd", INPUT_EXT="txt")
    assert "1 of 1 files classified" in done.stdout and "carry a label" not in done.stdout and "longer" not in done.stdout
    (folder / "odd" / "long.txt").write_bytes(bytes(1000))
    done = classify(folder, trained, INPUT_FOLDER="odd", INPUT_EXT="txt")
    assert "1 of 2 files exceed the model's 16 patches: their heads are classified" in done.stdout


STRINGS = {"low.bin": "0", "mid.bin": "1", "high.bin": "2"}


def test_modes_need_a_checkpoint_of_their_kind(folder, trained):
    torch.save({"model": utils.ModelSizes(**TINY).build().state_dict()}, folder / "gen.pth")
    message = one_message(classify(folder, "gen", status=1))
    assert "'gen.pth' is a generative model; MODE 'classify' needs a classifier, from train-cls.py" in message
    message = one_message(classify(folder, trained, status=1, MODE="complete"))
    assert "is a classifier; MODE 'complete' needs a generative model, from train-gen.py" in message
    state = load(folder, trained)
    for labels in (None, {"low.bin": 0}, {"low.bin": 0, "mid.bin": 1, "high.bin": 5}, ["low.bin"], STRINGS):
        torch.save({**state, "labels": labels}, folder / "damaged.pth")
        message = one_message(classify(folder, "damaged", status=1))
        assert "its 'labels' should be a dict of 3 labels and their indices, 0 to 2" in message
