"""train-gen.py as a user runs it: learning, logs, checkpoints, resuming and errors."""

import math
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Running, as_batch, fill_by_recipe, interrupt
from conftest import load_script, make_files, one_message, options, run_script
from logs import read_log

import config
import utils
from bgpt import distributed, evaluation, system, training
from bgpt import model as models
from bgpt.files import list_files


@pytest.fixture()
def folder(tmp_path):
    """A working folder with ten training files of ragged lengths, some too long, and three evaluation files."""
    random = np.random.default_rng(0)
    for part, lengths in {"train": [0, 1, 3, 4, 5, 20, 33, 50, 200, 300], "eval": [7, 40, 100]}.items():
        (tmp_path / part).mkdir()
        for i, length in enumerate(lengths):
            (tmp_path / part / f"{i}.bin").write_bytes(random.integers(0, 8, length).astype(np.uint8).tobytes())
    return tmp_path


SETTINGS = {
    **TINY,
    "TRAIN_FOLDERS": ["train"],
    "EVAL_FOLDERS": ["eval"],
    "BATCH_SIZE": 4,
    "NUM_EPOCHS": 2,
    "LEARNING_RATE": 1e-3,
    "PRECISION": "fp32",
}


def train(folder, **changes):
    return run_script("train-gen.py", *options(**{**SETTINGS, **changes}), cwd=folder)


def load(path):
    return torch.load(path, weights_only=True)


def test_a_run_logs_and_saves_what_it_says(folder):
    done = train(folder, LONG_FILES="crop")
    assert done.returncode == 0, done.stderr
    entries = read_log(folder / "logs.txt")
    assert [entry["epoch"] for entry in entries] == [1, 2]
    best, latest = load(folder / "weights.pth"), load(folder / "weights-last.pth")
    for name in ("model", "optimizer", "lr_sched", "epoch", "best_epoch", "min_eval_loss"):
        assert name in best and name in latest
    assert latest["epoch"] == 2
    decisive = min(entries, key=lambda entry: entry["eval_bits_per_byte"])
    for state in (best, latest):
        assert state["min_eval_bits_per_byte"] == pytest.approx(decisive["eval_bits_per_byte"], abs=1e-4)
        assert state["min_eval_loss"] == pytest.approx(decisive["eval_loss"], abs=1e-4)  # the published key
    assert best["epoch"] == best["best_epoch"] == latest["best_epoch"]
    for entry in entries:
        assert f"epoch {entry['epoch']:.0f}  train_loss {entry['train_loss']:.4f}" in done.stdout

    # the best model's figures, computed again: nats over all symbols of the targets, bits over the content
    model = models.load_model(str(folder / "weights.pth"), "cpu").net
    nats, bits, num_bytes = [], 0.0, 0
    for path in list_files([str(folder / "eval")], "EVAL_FOLDERS"):
        with open(path, "rb") as file:
            content = file.read()
        patches = utils.to_patches(content, "bin", 4)[:16]
        batch = as_batch([patches])
        with torch.no_grad():
            each = model.eval()(batch.patches.long(), batch.masks).nats.flatten().tolist()
        nats += each
        kept = min(len(content), 15 * 4)
        bits += sum(each[: kept + 1]) / math.log(2)  # of a file that is cut there is no end symbol: one less below
        num_bytes += kept
    assert entries[int(best["epoch"]) - 1]["eval_loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-4)
    assert entries[int(best["epoch"]) - 1]["eval_bits_per_byte"] == pytest.approx(bits / num_bytes, abs=1e-3)


def test_bits_per_byte_decide_the_best_epoch(folder, monkeypatch, capsys):
    """If loss and bits per byte disagree, because of the padding. Totals over nothing are None."""
    script, totals = load_script("train-gen"), []
    for nats, counted_nats in ((10.0, 9.0), (20.0, 5.0), (15.0, 6.0)):
        totals.append(evaluation.SymbolTotals())
        assert totals[-1].loss is totals[-1].bits_per_byte is None and totals[-1].shown() == {}
        totals[-1].load([nats, counted_nats, 10, 2])
    monkeypatch.setattr(script, "evaluate", lambda run: totals[run.state.epoch])
    monkeypatch.chdir(folder)
    for name, value in {**SETTINGS, "NUM_EPOCHS": 3}.items():
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr(training, "total_memory", lambda device: 10**6)
    script.main()
    state, out = load(folder / "weights.pth"), capsys.readouterr().out
    assert (state["best_epoch"], state["min_eval_loss"]) == (2, 2.0)
    assert "about 0.01 GB" in out and "warning: this device has 0.0 GB" in out and "the first step took" in out
    assert "only 147 bytes to evaluate on" in out and f"best: epoch 2, min_eval_bits_per_byte {2.5 / math.log(2):.4f}" in out
    # a published checkpoint has no bits per byte: its model is kept, and the next epoch is the best so far
    keys = ("model", "optimizer", "lr_sched", "epoch", "best_epoch", "min_eval_loss")
    for state["epoch"], name in ((2, "weights.pth"), (3, "weights-last.pth")):
        torch.save({key: state[key] for key in keys}, folder / name)
    monkeypatch.setattr(script, "evaluate", lambda run: totals[0])
    monkeypatch.setattr(config, "NUM_EPOCHS", 4)
    script.main()
    assert "best score reset" in capsys.readouterr().out and load(folder / "weights.pth")["best_epoch"] == 4
    assert load(folder / "weights.pth.bak")["best_epoch"] == 2


def test_memory_at_paper_size_is_what_the_readme_has(monkeypatch, capsys):
    monkeypatch.setattr(training, "total_memory", lambda device: 40 * 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # left over from a job system: this process is alone
    run = SimpleNamespace(
        settings={"BATCH_SIZE": 16, "ACCUMULATION_STEPS": 1, "PATCH_SAMPLING_BATCH_SIZE": 0}, ranks=distributed.Ranks(torch.device("cpu")),
        sizes=utils.ModelSizes(16, 512, 768, 12, 3), train=utils.Examples(make_files({"one.txt": 10**6})),
    )  # fmt: skip
    for run.dtype, needed in ((torch.float32, 1.76 + 16 * 3), (torch.bfloat16, 1.76 + 16 * 2)):
        training.Run._print_memory(run, 110_084_352, 123)  # windows of a single file
        out = capsys.readouterr().out
        assert float(re.search(r"about ([\d.]+) GB", out)[1]) == pytest.approx(needed, rel=0.01) and "1.76 GB of it for weights" in out
        assert ("warning: this device has 40.0 GB" in out) == (needed > 40)


def test_learning_rate_moves_as_the_schedule_says(folder):
    """The rate of the optimizer in the checkpoints, after each epoch's three steps."""
    for epochs, schedule, expected in [(10, "cosine", 0.0), (10, "constant", 1e-3)]:
        weights = f"{schedule}.pth"
        assert train(folder, NUM_EPOCHS=epochs, LR_SCHEDULE=schedule, WEIGHTS_PATH=weights).returncode == 0
        assert load(folder / f"{schedule}-last.pth")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.LEARNING_RATE)
    scheduler = training.make_scheduler(optimizer, "cosine", config.LEARNING_RATE, 100, steps_done=0)
    rates, sizes = [], []
    for _ in range(100):
        parameter.grad = torch.ones(1)
        before = parameter.item()
        rates.append(optimizer.param_groups[0]["lr"] / config.LEARNING_RATE)
        optimizer.step()
        sizes.append(before - parameter.item())
        scheduler.step()
    warm_up = [i / 10 for i in range(10)]
    cosine = [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert rates == pytest.approx(warm_up + cosine)
    assert sizes[10] > 5 * sizes[1] > 0 and sizes[99] < sizes[10] / 100  # and the steps that are made follow it


def test_a_rerun_goes_on_after_the_last_epoch(folder):
    """Two epochs and two more give the same bits as four at once, dropout and crops included."""
    settings = {"LR_SCHEDULE": "constant", "BATCH_SIZE": 16}  # fewer than ten steps in all: no warm-up in either
    assert train(folder, NUM_EPOCHS=4, WEIGHTS_PATH="a.pth", LOGS_PATH="a.txt", **settings).returncode == 0
    for epochs in (2, 4):
        done = train(folder, NUM_EPOCHS=epochs, WEIGHTS_PATH="b.pth", LOGS_PATH="b.txt", **settings)
        assert done.returncode == 0, done.stderr
    assert "resumes from b-last.pth after epoch 2;" in done.stdout
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text()
    whole, resumed = load(folder / "a-last.pth"), load(folder / "b-last.pth")
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    assert not list(folder.glob("*.bak"))  # the run's own files need no backup
    again = train(folder, NUM_EPOCHS=4, WEIGHTS_PATH="b.pth", LOGS_PATH="b.txt", **settings)
    assert again.returncode == 0 and "finished 4 of NUM_EPOCHS 4" in again.stdout
    assert len(read_log(folder / "b.txt")) == 4


def test_overfits_eight_files_and_writes_them_again(tmp_path):
    """Eight formats, of fixed bytes: 0.02 bits per byte in float32 and bf16, a fifth of the limit."""
    files = {path.name: path.read_bytes()[:150] for path in sorted((ROOT / "tests/data/overfit").iterdir())}
    folders = [f"copy{i}" for i in range(8)]  # so that an epoch, whose end saves, has eight steps
    for folder in folders:
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
    sizes = {"PATCH_SIZE": 8, "PATCH_LENGTH": 32, "HIDDEN_SIZE": 128, "PATCH_NUM_LAYERS": 2, "BYTE_NUM_LAYERS": 1}
    settings = {"LEARNING_RATE": 3e-3, "BATCH_SIZE": 8, "NUM_EPOCHS": 20, "DROPOUT": 0}
    done = train(tmp_path, **sizes, **settings, TRAIN_FOLDERS=folders, EVAL_FOLDERS=folders[:1])
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "logs.txt")[-1]["eval_bits_per_byte"] < 0.1
    done = run_script(
        "inference.py",
        *options(MODE="complete", INPUT_FOLDER="copy0", PROMPT_BYTES=11, TEMPERATURE=0, INFERENCE_BATCH_SIZE=3),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name, content in files.items():
        assert (tmp_path / "output" / name).read_bytes() == content, name


def test_conversion_trains_both_ways(tmp_path):
    (tmp_path / "pairs").mkdir()
    for i in range(6):
        (tmp_path / "pairs" / f"{i}.abc").write_bytes(bytes([i] * 5))
        (tmp_path / "pairs" / f"{i}.mid").write_bytes(bytes([i + 100] * (9 if i < 5 else 90)))
    settings = {"TRAIN_FOLDERS": ["pairs"], "EVAL_FOLDERS": [], "NUM_EPOCHS": 1, "BATCH_SIZE": 4}
    for mode, count in (("abc->mid", 4), ("abc&mid", 8)):
        done = train(tmp_path, **settings, CONVERSION_MODE=mode, WEIGHTS_PATH=f"{count}.pth")
        assert done.returncode == 0, done.stderr
        assert "TRAIN_FOLDERS: 1 of 6 pairs do not fit in PATCH_LENGTH 16 and are left out; PATCH_LENGTH 28 would keep" in done.stdout
        assert "trains on 4 pairs of pairs\nevaluates on 1 pairs of the same folders, held out by EVAL_SPLIT" in done.stdout
        assert f"{count // 4} steps an epoch" in done.stdout


def make_empty(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_pairs_and_inputs_in_upper_case(tmp_path):
    """From training to MODE convert, with the directions recorded in the checkpoint."""
    for i in range(4):
        make_empty(tmp_path / "pairs", f"{i}.abc")
        (tmp_path / "pairs" / f"{i}.MID").write_bytes(b"x")
    make_empty(tmp_path / "input", "A.ABC", "b.abc")
    make_empty(tmp_path / "plain", "1.x")
    (tmp_path / "plain" / "2.X").write_bytes(b"x")
    settings = {"TRAIN_FOLDERS": ["pairs"], "EVAL_FOLDERS": [], "NUM_EPOCHS": 1}
    done = train(tmp_path, **settings, CONVERSION_MODE="abc->mid")
    assert done.returncode == 0 and "in no pair" not in done.stdout, done.stderr
    assert load(tmp_path / "weights.pth")["extensions"] == ["abc", "mid"]

    def convert(source, target, **changes):
        return run_script("inference.py", *options(MODE="convert", INPUT_EXT=source, TARGET_EXT=target, **changes), cwd=tmp_path)

    done = convert("abc", "mid", TEMPERATURE=0)
    assert done.returncode == 0 and "note:" not in done.stdout, done.stderr
    made = [(tmp_path / "output" / name).read_bytes() for name in ("A.ABC.mid", "b.abc.mid")]
    assert made[0] == made[1]  # the model is given the same
    (tmp_path / "input" / "c.mid").write_bytes(b"")
    done = convert("mid", "abc")
    assert done.returncode == 0
    assert "was trained with CONVERSION_MODE 'abc->mid', never on mid -> abc" in done.stdout
    message = one_message(convert("abc", "wav"))
    assert "TARGET_EXT is 'wav'" in message and "extensions: abc, mid" in message
    assert "no files of INPUT_EXT 'midi' in 'input', but 2 .abc, 1 .mid" in one_message(convert("midi", "abc"))

    done = train(tmp_path, **{**settings, "TRAIN_FOLDERS": ["plain"], "EVAL_FOLDERS": ["plain"]}, WEIGHTS_PATH="plain.pth")
    assert load(tmp_path / "plain.pth")["extensions"] == ["X", "x"]
    (tmp_path / "input" / "d.x").write_bytes(b"")
    done = convert("x", "X", INFERENCE_WEIGHTS_PATH="plain.pth")
    assert done.returncode == 0 and "trained on plain files, without CONVERSION_MODE" in done.stdout


def test_the_default_folder_never_judges_a_model_of_other_files(folder):
    """The quick start's evaluation files exist, but EVAL_FOLDERS is not set."""
    (folder / "cpu_states" / "test").mkdir(parents=True)
    (folder / "cpu_states" / "test" / "1.bin").write_bytes(b"abc")
    done = run_script("train-gen.py", *options(**{name: SETTINGS[name] for name in SETTINGS if name != "EVAL_FOLDERS"}), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "trains on 9 files of train\nevaluates on 1 files of the same folders, held out by EVAL_SPLIT" in done.stdout


def test_weights_of_another_run_are_kept(folder):
    for name in ("weights.pth", "weights-last.pth"):
        torch.save({"model": {}, "note": name}, folder / name)
    done = train(folder, NUM_EPOCHS=1, LOAD_FROM_CHECKPOINT=False)
    assert done.returncode == 0, done.stderr
    for name in ("weights.pth", "weights-last.pth"):
        assert load(folder / f"{name}.bak")["note"] == name
        assert f"kept as {name}.bak" in done.stdout
        assert load(folder / name)["epoch"] == 1


def test_pre_trained_weights(folder):
    model = fill_by_recipe(utils.ModelSizes(**TINY).build())
    torch.save({"model": model.state_dict()}, folder / "pre.pth")
    start = {"LOAD_FROM_PRE_CHECKPOINT": True, "PRE_WEIGHTS_PATH": "pre.pth", "LEARNING_RATE": 1e-12, "NUM_EPOCHS": 1}
    done = train(folder, **start)
    assert done.returncode == 0, done.stderr
    trained = load(folder / "weights.pth")["model"]
    assert all(torch.allclose(tensor, trained[name], atol=1e-6) for name, tensor in model.state_dict().items())
    # and without the file it is an error, never a start from random weights
    message = one_message(train(folder, **{**start, "PRE_WEIGHTS_PATH": "gone.pth"}, WEIGHTS_PATH="new.pth"))
    assert "PRE_WEIGHTS_PATH: 'gone.pth' does not exist" in message
    assert not (folder / "new.pth").exists()


def test_patch_sampling_trains(folder):
    done = train(folder, PATCH_SAMPLING_BATCH_SIZE=3, ACCUMULATION_STEPS=2, NUM_EPOCHS=3, NUM_WORKERS=2)
    assert done.returncode == 0, done.stderr
    losses = [entry["eval_loss"] for entry in read_log(folder / "logs.txt")]
    assert losses[-1] < losses[0]


def test_bf16_learns_like_fp32(folder):
    for precision in ("fp32", "bf16"):
        settings = {"PRECISION": precision, "WEIGHTS_PATH": f"{precision}.pth", "LOGS_PATH": f"{precision}.txt"}
        assert train(folder, NUM_EPOCHS=6, LEARNING_RATE=3e-3, DROPOUT=0, **settings).returncode == 0
    fp32, bf16 = ([entry["eval_loss"] for entry in read_log(folder / f"{p}.txt")] for p in ("fp32", "bf16"))
    assert fp32[-1] < fp32[0] and bf16 == pytest.approx(fp32, rel=0.01)


def test_wandb(folder, tmp_path, monkeypatch):
    """Off: never imported. On: offline if set, and one line if nobody is logged in."""
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # to import it is an error
        for name, value in SETTINGS.items():
            patch.setattr(config, name, value)
        load_script("train-gen").main()
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "XDG_CONFIG_HOME": str(tmp_path)}
    on = options(**{**SETTINGS, "WANDB_LOG": True, "WEIGHTS_PATH": "on.pth", "NUM_EPOCHS": 1})
    done = run_script("train-gen.py", *on, cwd=folder, env=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb: not logged in") == 1
    assert list((folder / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"TRAIN_FOLDERS": ["cpu_states/train"]}, "cpu-simulation.py --mode generate"),
        ({"TRAIN_FOLDERS": ["gone"]}, "TRAIN_FOLDERS: 'gone' does not exist"),
        ({"TRAIN_FOLDERS": ["train/0.bin"]}, "TRAIN_FOLDERS: 'train/0.bin' is a file"),
        ({"EVAL_FOLDERS": ["empty"]}, "EVAL_FOLDERS: no files"),
        ({"TRAIN_FOLDERS": ["empty"]}, "TRAIN_FOLDERS: no files"),
        ({"EVAL_FOLDERS": ["blank"]}, "EVAL_FOLDERS: the 1 evaluation files have no bytes"),
        ({"TRAIN_FOLDERS": ["blank", "blank2"], "EVAL_FOLDERS": []}, "EVAL_SPLIT: the 1 evaluation files have no bytes"),
        ({"EVAL_FOLDERS": ["gone"]}, "EVAL_FOLDERS: 'gone' does not exist"),
        ({"CONVERSION_MODE": "abd->mid"}, "CONVERSION_MODE is 'abd->mid'"),
        ({"TRAIN_FOLDERS": ["empty", "alike"], "EVAL_FOLDERS": []}, "PATCH_SIZE is 4"),
        ({"TRAIN_FOLDERS": ["alike"], "EVAL_FOLDERS": [], "CONVERSION_MODE": "midi1->midi2"}, "PATCH_SIZE is 4"),
        ({"PRECISION": "fp16"}, "PRECISION is 'fp16'"),
        ({"COMPILE": True}, "COMPILE: torch.compile needs a compiler"),
        ({"LOGS_PATH": "train"}, "LOGS_PATH: 'train' is a folder"),
        ({"LOGS_PATH": "train/0.bin/x/logs.txt"}, "LOGS_PATH: cannot write"),
        ({"WEIGHTS_PATH": "train/0.bin/x.pth"}, "WEIGHTS_PATH: cannot write"),
    ],
)
def test_mistakes(folder, monkeypatch, changes, words):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    make_empty(folder / "alike", "a.midi1", "a.midi2")
    make_empty(folder, "blank/1.bin", "blank2/1.bin")
    for name, value in {**SETTINGS, **changes}.items():
        monkeypatch.setattr(config, name, value)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-compiler")
    if changes.get("PRECISION") == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is allowed here")
    with pytest.raises(system.UserError, match=re.escape(words)):
        script = load_script("train-gen")
        script.check_settings()
        script.main()
    assert not list(folder.glob("*.pth"))


def test_checkpoint_of_other_sizes_or_kind_is_left_alone(folder):
    model = utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3)
    torch.save({"model": model.state_dict(), "labels": {}}, folder / "cls.pth")
    assert "is a classifier" in one_message(train(folder, WEIGHTS_PATH="cls.pth"))
    torch.save({"model": utils.ModelSizes(**TINY).build().state_dict()}, folder / "gen.pth")
    before = (folder / "gen.pth").read_bytes()
    assert "set PATCH_NUM_LAYERS = 2 (now 3)" in one_message(train(folder, WEIGHTS_PATH="gen.pth", PATCH_NUM_LAYERS=3))
    assert "not the state of a run to resume" in one_message(train(folder, WEIGHTS_PATH="gen.pth"))
    assert (folder / "gen.pth").read_bytes() == before


def test_a_best_model_that_is_gone_or_not_this_runs(folder):
    assert train(folder, NUM_EPOCHS=1).returncode == 0
    state = load(folder / "weights-last.pth")
    torch.save({**state, "min_eval_bits_per_byte": 0.0}, folder / "weights-last.pth")  # a best that will never be beaten
    torch.save({**state, "run_id": "another"}, folder / "weights.pth")
    done = train(folder, NUM_EPOCHS=2)
    assert done.returncode == 0 and "the best model of this run is not at weights.pth" in done.stdout
    assert load(folder / "weights.pth")["epoch"] == 2 and load(folder / "weights.pth.bak")["run_id"] == "another"


@pytest.mark.parametrize(
    "changes",
    [
        {"LEARNING_RATE": 1e30, "NUM_EPOCHS": 9, "MAX_GRAD_NORM": 0},  # a NaN loss
        {"LEARNING_RATE": 1e38, "NUM_EPOCHS": 1, "BATCH_SIZE": 16},  # NaN in the last step
    ],
)
def test_a_model_that_broke_is_not_saved(folder, changes):
    message = one_message(train(folder, **changes))
    assert "NaN" in message and "Nothing was saved yet: start again with a lower LEARNING_RATE" in message
    assert not list(folder.glob("*.pth"))


def test_files_without_partner_and_shared_files_are_counted(folder, capsys):
    (folder / "train" / "0.mid").write_bytes(b"abc")
    (folder / "same").symlink_to("train")
    done = train(folder, CONVERSION_MODE="bin->mid", EVAL_FOLDERS=["same"], NUM_EPOCHS=1)
    assert done.returncode == 0, done.stderr
    assert "TRAIN_FOLDERS: 9 of 11 files are in no pair" in done.stdout
    assert "1 evaluation examples are training examples too" in done.stdout
    trained = models.Trained(None, load(folder / "weights.pth"))  # the checkpoint has the files, for MODE evaluate
    trained.check_files([f"{folder}/same/{name}" for name in ("0.mid", "0.bin", "1.bin")], are_scored=True)
    assert "trained on 2 of 3 files" in capsys.readouterr().out
    trained.check_files([f"{folder}/same/0.bin"], are_scored=False)
    trained.check_files([f"{folder}/eval/0.bin"], are_scored=True)
    assert not capsys.readouterr().out


def test_ctrl_c_is_one_line_and_status_130(folder):
    running = Running("train-gen.py", *options(**{**SETTINGS, "NUM_EPOCHS": 10000, "NUM_WORKERS": 1}), cwd=folder)
    done = interrupt([running], folder / "weights-last.pth", signal.SIGINT)[0]
    assert "stopped by Ctrl-C" in one_message(done, 130)
    assert load(folder / "weights-last.pth")["epoch"] >= 1 and load(folder / "weights.pth")["epoch"] >= 1
    assert not list(folder.glob(".*"))
