"""Training runs that are stopped, killed, moved to more processes or changed, and what they end with."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Running, interrupt, load_script, one_message, options, torchrun_environments

import config
from bgpt import system

SETTINGS = {
    **TINY,
    "TRAIN_FOLDERS": ["train"],
    "EVAL_FOLDERS": ["eval"],
    "NUM_EPOCHS": 3,
    "BATCH_SIZE": 2,
    "LEARNING_RATE": 1e-3,
    "SAVE_MINUTES": 0,
    "PRECISION": "fp32",
    "PATCH_SAMPLING_BATCH_SIZE": 9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with eleven training files of ragged lengths, some too long, and three evaluation files."""
    folder, random = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    (folder / "many").mkdir()  # with these an epoch lasts long enough to be stopped within, also on a busy machine
    for i in range(60):
        (folder / "many" / f"many{i}.bin").write_bytes(random.integers(0, 8, 1 + i // 4).astype(np.uint8).tobytes())
    for part, lengths in {"train": [0, 1, 3, 4, 5, 20, 33, 50, 70, 200, 300], "eval": [7, 40, 100]}.items():
        (folder / part).mkdir()
        for i, length in enumerate(lengths):
            (folder / part / f"{i}.bin").write_bytes(random.integers(0, 8, length).astype(np.uint8).tobytes())
    return folder


@pytest.fixture()
def own_folder(folder, tmp_path):
    """A working folder with the same files, which no other test leaves anything in."""
    for part in ("train", "eval"):
        shutil.copytree(folder / part, tmp_path / part)
    return tmp_path


def start(folder, name, num_processes=1, file_limit=None, open_files=None, **changes):
    """Starts a training run whose files are named after `name`; returns its processes, as torchrun would start them."""
    settings = {**SETTINGS, "WEIGHTS_PATH": f"{name}.pth", "LOGS_PATH": f"{name}.txt", **changes}
    environments = torchrun_environments(num_processes) if num_processes > 1 else [{}]
    return [
        Running("train-gen.py", *options(**settings), cwd=folder, env=env, file_limit=file_limit, open_files=open_files)
        for env in environments
    ]


def train(folder, name, **changes):
    """Runs a training to its end, where nobody waits for a save within an epoch; returns its first process."""
    done = [process.wait() for process in start(folder, name, **{"SAVE_MINUTES": 10, **changes})]
    assert [process.returncode for process in done] == [0] * len(done), done[0].stderr
    return done[0]


def load(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_end(folder, name, other):
    """Checks that two runs ended with the same bits: weights, moments, random state, figures and logs."""
    assert (folder / f"{name}.txt").read_text() == (folder / f"{other}.txt").read_text()
    for part in ("", "-last"):
        states = [load(folder, run + part) for run in (name, other)]
        for key in ("model", "optimizer", "epoch", "best_epoch", "min_eval_loss", "figures", "random_states"):
            torch.testing.assert_close(*(state[key] for state in states), rtol=0, atol=0)
    assert not list(folder.glob(".*.tmp")) and not list(folder.glob("*.bak"))


def wait_for(path, running):
    """Waits until a file is there, as long as the first of some running processes runs."""
    while running[0].process.is_alive() and not path.exists():
        time.sleep(0.01)


def stop(folder, name, number, after=0.0, **changes):
    """Starts a run and sends it a signal `after` seconds from its next save; returns the finished processes."""
    return interrupt(start(folder, name, **changes), folder / f"{name}-last.pth", number, after)


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(folder, request):
    """The settings of a long run, with one process or two, and the name of one that nothing happened to."""
    name, settings = f"whole{request.param}", {"num_processes": request.param, "NUM_EPOCHS": 12}
    train(folder, name, **settings)
    return settings, name


def test_a_run_killed_at_random_moments_ends_the_same(folder, uninterrupted):
    settings, whole = uninterrupted
    name = f"killed{settings['num_processes']}"
    statuses = []
    for moment in np.random.default_rng(settings["num_processes"]).uniform(0, 0.06, 9):
        done = stop(folder, name, signal.SIGKILL, moment, **settings)
        statuses.append(done[0].returncode)
    assert statuses.count(-signal.SIGKILL) >= 5 and set(statuses) <= {-signal.SIGKILL, 0}
    train(folder, name, **settings, NUM_WORKERS=2)
    assert_same_end(folder, whole, name)


def test_sigterm_saves_the_step_in_hand(folder, uninterrupted):
    settings, whole = uninterrupted
    name = f"terminated{settings['num_processes']}"
    done = stop(folder, name, signal.SIGTERM, **settings)
    assert [process.returncode for process in done] == [143] * settings["num_processes"]
    state = load(folder, f"{name}-last")
    words = f"stopped by SIGTERM in epoch {state['epoch'] + 1} after {state['position']} examples: the same command goes on"
    assert words in done[0].stderr and all("stopped" not in process.stderr for process in done[1:])
    train(folder, name, **settings)
    assert_same_end(folder, whole, name)


def test_the_gradient_is_that_of_the_whole_batch(folder):
    """One process, micro-batches and two processes, with ragged lengths and a short last batch, learn the same."""
    same = {"DROPOUT": 0, "PATCH_SAMPLING_BATCH_SIZE": 0, "NUM_EPOCHS": 2}
    train(folder, "eight", BATCH_SIZE=8, **same)
    train(folder, "micro", BATCH_SIZE=8, ACCUMULATION_STEPS=4, **same)
    train(folder, "halves", BATCH_SIZE=4, num_processes=2, **same)
    train(folder, "micro-halves", BATCH_SIZE=4, ACCUMULATION_STEPS=2, num_processes=2, NUM_WORKERS=1, **same)
    expected = load(folder, "eight-last")["figures"]
    for name in ("micro", "halves", "micro-halves"):
        assert load(folder, f"{name}-last")["figures"] == pytest.approx(expected, rel=1e-5), name


def test_more_processes_than_files_are_left(folder):
    """In the last step of eleven files one of two processes has none: its spare batch counts nothing."""
    same = {"DROPOUT": 0, "PATCH_SAMPLING_BATCH_SIZE": 0, "NUM_EPOCHS": 2}
    train(folder, "two", BATCH_SIZE=2, **same)
    train(folder, "one-each", BATCH_SIZE=1, num_processes=2, **same)
    assert load(folder, "one-each-last")["figures"] == pytest.approx(load(folder, "two-last")["figures"], rel=1e-5)


def test_a_run_moves_to_more_processes(folder):
    """In the middle of an epoch: every file is still seen once, the sums of the epoch are kept."""
    same = {"DROPOUT": 0, "PATCH_SAMPLING_BATCH_SIZE": 0, "NUM_EPOCHS": 1, "TRAIN_FOLDERS": ["train", "many"]}
    train(folder, "stays", BATCH_SIZE=2, **same)
    done = stop(folder, "moves", signal.SIGTERM, BATCH_SIZE=2, **same)
    assert done[0].returncode == 143, done[0].stderr
    assert 0 < load(folder, "moves-last")["position"] < 71
    done = train(folder, "moves", BATCH_SIZE=1, num_processes=2, **same)
    assert "1 processes have become 2" in done.stdout and "BATCH_SIZE was 2 and is now 1" in done.stdout
    assert load(folder, "moves-last")["figures"] == pytest.approx(load(folder, "stays-last")["figures"], rel=1e-5)


def test_torchrun(folder):
    """As users start it; only the first process prints."""
    arguments = options(**SETTINGS, WEIGHTS_PATH="torchrun.pth", LOGS_PATH="torchrun.txt")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train-gen.py"), *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("BATCH_SIZE = 2", "a new run, from random weights", "epoch 3  train_loss", "finished 3 of NUM_EPOCHS 3"):
        assert done.stdout.count(words) == 1, words
    train(folder, "forked", num_processes=2)
    assert_same_end(folder, "torchrun", "forked")


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_file_that_vanishes_ends_a_run_whose_state_is_saved(own_folder, num_processes, num_workers):
    """One process fails: all end with its message; without consent a rerun is refused, with it the epoch begins anew."""
    gone, settings = own_folder / "train" / "gone.bin", {"SAVE_MINUTES": 60, "NUM_WORKERS": num_workers}
    gone.write_bytes(b"x")
    running = start(own_folder, "gone", num_processes, **settings, NUM_EPOCHS=10000)
    wait_for(own_folder / "gone-last.pth", running)
    gone.unlink()
    done = [process.wait(60) for process in running]
    said = "".join(one_message(process) if process.stderr.strip() else "" for process in done)
    assert [process.returncode for process in done] == [1] * num_processes
    state = load(own_folder, "gone-last")
    assert said.count("cannot read 'train/gone.bin': No such file or directory. When it is back, the same command goes on") == 1
    assert f"The state of epoch {state['epoch'] + 1} after {state['position']} examples is saved" in said
    rest = {**settings, "NUM_EPOCHS": state["epoch"] + 1}
    refused = "".join(process.wait().stderr for process in start(own_folder, "gone", num_processes, **rest))
    assert "; 1 gone (train/gone.bin)." in refused and "add --ALLOW_CHANGED_FILES True" in refused
    assert not list(own_folder.glob(".*"))
    done = train(own_folder, "gone", num_processes=num_processes, **rest, ALLOW_CHANGED_FILES=True)
    assert f"1 gone (train/gone.bin): epoch {state['epoch'] + 1} begins anew with the files as they are" in done.stdout
    assert load(own_folder, "gone-last")["epoch"] == state["epoch"] + 1


def test_unreadable_files_are_left_out_before_training(folder):
    for part in ("train", "eval"):
        (folder / f"links-{part}").mkdir()
        for i in range(3):
            (folder / f"links-{part}" / f"{i}.bin").write_bytes(b"x" * i)
    done = train(folder, "whole-links", TRAIN_FOLDERS=["links-train"], EVAL_FOLDERS=["links-eval"], NUM_EPOCHS=1)
    for part in ("train", "eval"):
        (folder / f"links-{part}" / "dead.bin").symlink_to("nowhere")
    done = train(folder, "links", TRAIN_FOLDERS=["links-train"], EVAL_FOLDERS=["links-eval"], NUM_EPOCHS=1)
    assert "TRAIN_FOLDERS: 1 of 4 files cannot be read and are left out:\n  links-train/dead.bin: a link" in done.stdout
    assert "EVAL_FOLDERS: 1 of 4 files" in done.stdout
    assert_same_end(folder, "links", "whole-links")


def test_a_rerun_names_the_files_that_differ(folder):
    (folder / "grows").mkdir()
    for i in range(6):
        (folder / "grows" / f"{i}.bin").write_bytes(b"x" * (i + 1))
    train(folder, "grows", TRAIN_FOLDERS=["grows"], NUM_EPOCHS=1)
    (folder / "grows" / "2.bin").unlink()
    (folder / "grows" / "3.bin").write_bytes(b"more")
    (folder / "grows" / "4.bin").write_bytes(b"other than 5 bytes")
    for i in range(12):
        (folder / "grows" / f"new{i}.bin").write_bytes(b"")
    before = (folder / "grows-last.pth").read_bytes()
    message = one_message(start(folder, "grows", TRAIN_FOLDERS=["grows"], NUM_EPOCHS=2)[0].wait())
    assert "12 added (grows/new0.bin, grows/new1.bin," in message and " and 2 more)" in message
    assert "1 of another size (grows/4.bin), 1 gone (grows/2.bin)" in message
    assert (folder / "grows-last.pth").read_bytes() == before
    state = load(folder, "grows-last")
    del state["names"]
    torch.save(state, folder / "grows-last.pth")
    message = one_message(start(folder, "grows", TRAIN_FOLDERS=["grows"], NUM_EPOCHS=2)[0].wait())
    assert "1 gone (an older checkpoint keeps no names)" in message


def test_other_evaluation_files_begin_a_new_best(folder):
    """Their figures do not compare; the former best model is kept. Files that were trained on are counted."""
    (folder / "pool").mkdir()
    for i in range(10):
        (folder / "pool" / f"{i}.bin").write_bytes(b"x" * i)
    held = {"TRAIN_FOLDERS": ["pool"], "EVAL_FOLDERS": [], "EVAL_SPLIT": 0.3, "ALLOW_CHANGED_FILES": True}
    assert "ALLOW_CHANGED_FILES" in train(folder, "pool", **held, NUM_EPOCHS=1).stdout
    best = (folder / "pool.pth").read_bytes()
    for i in range(10, 15):
        (folder / "pool" / f"{i}.bin").write_bytes(b"x" * i)
    done = train(folder, "pool", **held, NUM_EPOCHS=2)
    known, now = (torch.load(path, weights_only=True)["data"] for path in (folder / "pool.pth.bak", folder / "pool.pth"))
    num_seen = int(torch.isin(now["EVAL_FOLDERS"][:, 0], known["TRAIN_FOLDERS"][:, 0]).sum())
    assert f"the run has trained on {num_seen} of these 4" in done.stdout and num_seen > 0
    assert "the next epoch counts as the best so far" in done.stdout
    assert load(folder, "pool")["best_epoch"] == 2 and (folder / "pool.pth.bak").read_bytes() == best
    (folder / "pool.pth.bak").unlink()
    assert "begins anew" not in train(folder, "pool", **held, NUM_EPOCHS=3).stdout


def test_the_files_of_runs_are_no_data(tmp_path, folder):
    """`--TRAIN_FOLDERS .`: weights, log, backups, outputs and wandb are left out, and the run goes on."""
    for i in range(6):
        (tmp_path / f"{i}.bin").write_bytes(b"x" * i)
    shutil.copytree(folder / "eval", tmp_path / "eval")
    for name in ("own.pth.bak", "output/1.bin", "output/index.tsv", "wandb/run/files/x.json", ".bgpt-01234567-x.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    here = {"TRAIN_FOLDERS": ["."], "EVAL_FOLDERS": ["./eval"]}
    done = train(tmp_path, "own", **here, NUM_EPOCHS=1)
    assert "left out (./output/, ./own.pth.bak, ./wandb/)" in done.stdout
    assert "; 9 training and 3 evaluation examples" in done.stdout
    done = train(tmp_path, "own", **here, NUM_EPOCHS=2)
    assert "TRAIN_FOLDERS: 6 files and folders" in done.stdout and "goes on from own-last.pth after epoch 1" in done.stdout
    assert "(./output/, ./own-last.pth, ./own.pth, ./own.pth.bak, ./own.txt, ./wandb/)" in done.stdout
    named = {"TRAIN_FOLDERS": ["output"], "EVAL_FOLDERS": ["eval"]}  # a folder that is asked for is data
    assert "; 2 training and 3 evaluation" in train(tmp_path, "other", **named, NUM_EPOCHS=1).stdout


def test_the_same_data_under_another_name(folder, tmp_path):
    """A run goes on in a moved folder, to the end that it would have come to; so do two spellings of one place."""
    moved, same = {"TRAIN_FOLDERS": ["train", "many"]}, {"NUM_EPOCHS": 2}
    train(folder, "stayed", **moved, **same)
    assert stop(folder, "moved", signal.SIGTERM, **moved, **same)[0].returncode == 143
    for part in ("many", "train"):
        shutil.copytree(folder / part, tmp_path / "elsewhere" / part)
    moved["TRAIN_FOLDERS"] = [str(tmp_path / "elsewhere" / "train"), f"{folder}/many"]
    done = train(folder, "moved", **moved, EVAL_FOLDERS=[f"../{folder.name}/eval/"], **same)
    assert "goes on from moved-last.pth after epoch" in done.stdout
    assert_same_end(folder, "moved", "stayed")
    states = [load(folder, f"{name}-last") for name in ("stayed", "moved")]
    assert all(torch.equal(states[0]["data"][name], states[1]["data"][name]) for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"))
    message = one_message(start(folder, "moved", TRAIN_FOLDERS=["many", "train"], NUM_EPOCHS=3)[0].wait())
    assert "TRAIN_FOLDERS: the files are not those" in message


@pytest.mark.parametrize("folders", [["train"], ["train", "many"]])
def test_a_checkpoint_that_knows_files_by_whole_paths_goes_on(folder, folders):
    """In several folders not in the order of their names, an epoch in hand begins anew."""
    name, settings = f"paths{len(folders)}", {"TRAIN_FOLDERS": folders}
    train(folder, name, NUM_EPOCHS=1, **settings)
    state = load(folder, f"{name}-last")
    for key, which in (("TRAIN_FOLDERS", folders), ("EVAL_FOLDERS", ["eval"])):
        paths = sorted(str(path.relative_to(folder)) for each in which for path in (folder / each).iterdir())
        sizes = np.array([(folder / path).stat().st_size for path in paths], dtype=np.int64)
        state["data"][key] = hashlib.sha256(sizes.tobytes() + b"".join(path.encode() + b"\0" for path in paths)).hexdigest()
    torch.save({**state, "position": 2}, folder / f"{name}-last.pth")
    done = train(folder, name, NUM_EPOCHS=2, **settings)
    assert "goes on from" in done.stdout
    assert ("of several folders in another order: epoch 2 begins anew" in done.stdout) == (len(folders) > 1)
    assert load(folder, f"{name}-last")["data"]["TRAIN_FOLDERS"].shape[1] == 2
    torch.save(state, folder / f"{name}-last.pth")
    message = one_message(start(folder, name, TRAIN_FOLDERS=["eval"], NUM_EPOCHS=3)[0].wait())
    assert "TRAIN_FOLDERS: the files are not those" in message


def test_what_a_rerun_with_other_settings_says(folder):
    train(folder, "changed", NUM_EPOCHS=1, LR_SCHEDULE="constant")
    done = train(folder, "changed", NUM_EPOCHS=1)
    assert "LR_SCHEDULE was 'constant' and is now 'cosine'" in done.stdout
    assert "finished 1 of NUM_EPOCHS 1" in done.stdout and "raise NUM_EPOCHS to go on" in done.stdout
    done = train(folder, "changed", NUM_EPOCHS=2, MAX_GRAD_NORM=0.5)
    assert "NUM_EPOCHS was 1 and is now 2: the schedule is laid anew" in done.stdout
    assert "MAX_GRAD_NORM was 1.0 and is now 0.5" in done.stdout
    assert "MODE was" not in done.stdout
    before = (folder / "changed-last.pth").read_bytes()
    for changes, words in [
        ({"TRAIN_FOLDERS": ["eval"]}, "TRAIN_FOLDERS: the files are not those"),
        ({"EVAL_FOLDERS": ["train"]}, "EVAL_FOLDERS: the files are not those"),
        ({"PATCH_NUM_LAYERS": 1}, "set PATCH_NUM_LAYERS = 2 (now 1)"),
    ]:
        message = one_message(start(folder, "changed", NUM_EPOCHS=3, **changes)[0].wait())
        assert words in message, message
    assert (folder / "changed-last.pth").read_bytes() == before


def test_another_conversion_mode_stops_a_rerun(folder):
    for part in ("train", "eval"):
        (folder / f"pairs-{part}").mkdir()
        for i in range(3):
            for extension in ("abc", "mid"):
                (folder / f"pairs-{part}" / f"{i}.{extension}").write_bytes(b"x" * i)
    pairs = {"TRAIN_FOLDERS": ["pairs-train"], "EVAL_FOLDERS": ["pairs-eval"], "NUM_EPOCHS": 1}
    train(folder, "pairs", CONVERSION_MODE="abc->mid", **pairs)
    message = one_message(start(folder, "pairs", CONVERSION_MODE="mid->abc", **pairs)[0].wait())
    assert "CONVERSION_MODE is 'mid->abc', but the run at 'pairs-last.pth' trains with 'abc->mid'" in message
    assert "goes on from pairs-last.pth" in train(folder, "pairs", CONVERSION_MODE="ABC->mid", **pairs).stdout


def test_leaks_of_pairs_are_counted_by_example(own_folder):
    (own_folder / "tunes").mkdir()
    for i in range(8):
        for extension in ("abc", "mid"):
            (own_folder / "tunes" / f"{i}.{extension}").write_bytes(b"x" * i)
    pairs = {"TRAIN_FOLDERS": ["tunes"], "EVAL_FOLDERS": [], "EVAL_SPLIT": 0.4, "CONVERSION_MODE": "abc&mid"}
    train(own_folder, "tunes", **pairs, NUM_EPOCHS=1)
    known = load(own_folder, "tunes-last")["data"]["TRAIN_FOLDERS"][:, 0]
    done = train(own_folder, "tunes", **pairs, NUM_EPOCHS=2, SEED=1, ALLOW_CHANGED_FILES=True)
    held_out = load(own_folder, "tunes-last")["data"]["EVAL_FOLDERS"][:, 0].view(-1, 2)  # three pairs, both ways
    num_seen = int(torch.isin(held_out, known).any(1).sum())
    assert f"the run has trained on {num_seen} of these 6" in done.stdout and num_seen > 0


def test_another_seed_in_the_middle_of_an_epoch(folder):
    same = {"NUM_EPOCHS": 1, "TRAIN_FOLDERS": ["train", "many"]}
    done = stop(folder, "seed", signal.SIGTERM, **same)
    assert done[0].returncode == 143
    done = train(folder, "seed", SEED=5, **same)
    assert "SEED has changed, and with it the order of an epoch: epoch 1 begins anew" in done.stdout


def test_a_checkpoint_from_before_the_order_was_a_permutation(folder):
    """It goes on where an epoch ended; one from within an epoch begins that anew, and says so."""
    for name, position in (("newer", 0), ("older", 0), ("oldest", 6)):
        train(folder, name, NUM_EPOCHS=1)
        state = load(folder, f"{name}-last")
        assert state["position"] == 0
        if name != "newer":
            del state["order"]
        torch.save({**state, "position": position}, folder / f"{name}-last.pth")
        done = train(folder, name, NUM_EPOCHS=2)
        assert ("epoch 2 begins anew" in done.stdout) == (position > 0)
    assert_same_end(folder, "older", "newer")
    assert load(folder, "oldest-last")["epoch"] == 2


def test_what_a_kill_leaves_of_the_log_is_put_right(folder):
    """Between the checkpoint and the log there is a moment; also a line may be cut short."""
    train(folder, "log")
    log = folder / "log.txt"
    whole = log.read_bytes()
    for left in (whole[: whole.rindex(b"epoch 3")], whole[:-1], whole[:-30], whole):
        log.write_bytes(left)
        train(folder, "log")
        assert log.read_bytes() == whole
    last, others = whole[whole.rindex(b"epoch 3") :], b"what others wrote\n" * 100  # that is nobody's to change
    log.write_bytes(others)
    for _ in range(2):
        train(folder, "log")
        assert log.read_bytes() == others + last
    log.unlink()
    for _ in range(2):
        train(folder, "log")
        assert log.read_bytes() == last


def test_a_full_disk_does_not_end_a_run(folder):
    train(folder, "full", NUM_EPOCHS=2)
    before = [(folder / name).read_bytes() for name in ("full.pth", "full-last.pth")]
    done = start(folder, "full", NUM_EPOCHS=4, file_limit=100_000)[0].wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot save full-last.pth: File too large; it stays as it was, and the run goes on" in done.stdout
    assert "epoch 4  train_loss" in done.stdout and "could not be saved" in done.stderr
    assert [(folder / name).read_bytes() for name in ("full.pth", "full-last.pth")] == before
    assert not list(folder.glob(".*.tmp"))
    train(folder, "full", NUM_EPOCHS=4)
    assert load(folder, "full-last")["epoch"] == 4


def test_workers_end_with_a_killed_run(folder):
    """Nobody is left to tell them: they must notice."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not tell the children of a process")
    process = start(folder, "orphans", NUM_WORKERS=2, NUM_EPOCHS=10000)[0]
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
    workers, deadline = [], time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline:  # they are started anew for each epoch
        workers = children.read_text().split()
    assert len(workers) == 2
    process.send(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if is_running(worker)]


def is_running(pid: str) -> bool:
    """Whether a process still runs: one that ended stays listed as a zombie where process 1 collects no orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_cannot_be_said_on_a_full_disk_ends_nothing():
    """As with `python train-gen.py > run.txt 2>&1`, on the disk that is full."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError), full.open("w") as stream:
        stream.write("a line")
    stream = full.open("w")
    print("a line" * 10000, file=system.Unstoppable(stream), flush=True)
    with pytest.raises(OSError):
        stream.close()


def test_what_cannot_be_said_to_a_closed_terminal_ends_nothing():
    """As where a run was left in the background, and its terminal is gone."""
    terminal, descriptor = os.openpty()
    stream = open(descriptor, "w")
    os.close(terminal)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(descriptor, b"a line")
    print("a line", file=system.Unstoppable(stream), flush=True)
    with pytest.raises(OSError):
        stream.close()


def test_too_many_readers_for_the_open_files_that_are_allowed(own_folder):
    running = start(own_folder, "few", NUM_WORKERS=16, open_files=64)[0]
    assert "lower NUM_WORKERS, or allow more with `ulimit -n`" in one_message(running.wait())


def test_weights_whose_folder_vanishes_do_not_end_a_run(own_folder):
    """As on a drive that is unplugged for a while; where it comes back, the run goes on saving there."""
    (own_folder / "drive").mkdir()
    running = start(own_folder, "drive/run", NUM_EPOCHS=10000)
    wait_for(own_folder / "drive" / "run-last.pth", running)
    (own_folder / "drive").rename(own_folder / "unplugged")
    time.sleep(0.3)
    assert running[0].process.is_alive()
    (own_folder / "unplugged").rename(own_folder / "drive")
    before = (own_folder / "drive" / "run-last.pth").stat().st_mtime_ns
    while running[0].process.is_alive() and (own_folder / "drive" / "run-last.pth").stat().st_mtime_ns == before:
        time.sleep(0.01)
    running[0].send(signal.SIGTERM)
    done = running[0].wait(30)
    assert "stopped by SIGTERM" in one_message(done, 143) and "cannot save drive/run-last.pth" in done.stdout


def test_weights_that_are_no_numbers_are_not_saved(folder):
    """The step itself may break them, after a loss that was a number; the run can then go on from before."""
    done = start(folder, "broken", LEARNING_RATE=1e39)[0].wait()
    assert "the weights have become none" in one_message(done)
    assert "Nothing of that was saved: the same command goes on from before" in done.stderr
    train(folder, "broken")


def test_goes_on_from_a_published_checkpoint(folder):
    """It lacks what later versions added, and is kept."""
    train(folder, "published", NUM_EPOCHS=1)
    state = load(folder, "published")
    published = {key: state[key] for key in ("model", "optimizer", "lr_sched", "epoch", "best_epoch", "min_eval_loss")}
    (folder / "published-last.pth").unlink()
    torch.save({**published, "min_eval_loss": 100.0}, folder / "published.pth")
    before = (folder / "published.pth").read_bytes()
    done = train(folder, "published", NUM_EPOCHS=2)
    assert "goes on from published.pth after epoch 1" in done.stdout
    assert (folder / "published.pth.bak").read_bytes() == before
    for epochs in (3, 4):
        done = train(folder, "published", NUM_EPOCHS=epochs)
        assert "best model of this run is not" not in done.stdout
    assert not (folder / "published.pth.bak2").exists()
    (folder / "published.pth.bak").unlink()


def test_processes_that_see_different_files_end(folder, tmp_path):
    settings = options(**{**SETTINGS, "WEIGHTS_PATH": "apart.pth", "LOGS_PATH": "apart.txt"})
    for part in ("train", "eval"):
        (tmp_path / part).mkdir()
        for path in list((folder / part).iterdir())[1:]:
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    places = zip((folder, tmp_path), torchrun_environments(2))
    done = [process.wait(60) for process in [Running("train-gen.py", *settings, cwd=cwd, env=env) for cwd, env in places]]
    assert [process.returncode for process in done] == [1, 1]
    assert "must lie on a disk that all share" in one_message(done[0])
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    places = zip((folder, tmp_path), torchrun_environments(2))
    done = [process.wait(60) for process in [Running("train-gen.py", *settings, cwd=cwd, env=env) for cwd, env in places]]
    assert [process.returncode for process in done] == [1, 1]  # the one that finds none says so, and the other waits for nothing
    assert "TRAIN_FOLDERS: no files to train on in train" in "".join(process.stderr for process in done)


def test_two_runs_at_the_same_weights(folder):
    first = start(folder, "twice", NUM_EPOCHS=10000)[0]
    while not (folder / "twice-last.pth").exists():
        time.sleep(0.01)
    assert "WEIGHTS_PATH: another run is at work at" in one_message(start(folder, "twice")[0].wait())
    first.send(signal.SIGKILL)
    first.wait()
    assert "goes on from" in train(folder, "twice", NUM_EPOCHS=1).stdout


def test_stopping_a_run_that_does_not_load_its_checkpoint(folder):
    done = stop(folder, "anew", signal.SIGINT, LOAD_FROM_CHECKPOINT=False, NUM_EPOCHS=1000)[0]
    assert done.returncode == 130
    assert "stopped by Ctrl-C" in done.stderr and "the same command with LOAD_FROM_CHECKPOINT True goes on" in done.stderr


def test_another_seed_holds_out_other_files(folder):
    train(folder, "held", EVAL_FOLDERS=[], EVAL_SPLIT=0.3, NUM_EPOCHS=1)
    message = one_message(start(folder, "held", EVAL_FOLDERS=[], EVAL_SPLIT=0.3, NUM_EPOCHS=2, SEED=1)[0].wait())
    assert "SEED was 0 and is now 1" in message


def test_weights_and_log_in_one_file(folder):
    message = one_message(start(folder, "same", LOGS_PATH="same-last.pth")[0].wait())
    assert "LOGS_PATH: 'same-last.pth' is where the run keeps its weights" in message


def test_a_link_to_the_weights_stays_one(folder, tmp_path):
    (folder / "linked.pth").symlink_to(tmp_path / "elsewhere.pth")
    train(folder, "linked", NUM_EPOCHS=1)
    assert (folder / "linked.pth").is_symlink() and load(tmp_path, "elsewhere")["epoch"] == 1


def test_a_state_cut_short_is_one_message(folder):
    train(folder, "short", NUM_EPOCHS=1)
    whole = (folder / "short-last.pth").read_bytes()
    (folder / "short-last.pth").write_bytes(whole[: len(whole) // 2])
    message = one_message(start(folder, "short", NUM_EPOCHS=2)[0].wait())
    assert "damaged, cut short" in message and "the run goes on from its best model, short.pth" in message


@pytest.mark.parametrize(
    "damage",
    [
        {"position": 5000},
        {"position": -1},
        {"position": 2, "totals": []},
        {"position": 2, "totals": [{"other": 1.0}]},
        {"position": 2, "random_states": [{}]},
        {"position": 2, "random_states": [{"cpu": torch.zeros(3), "cuda": None}]},
        {"config": "text"},
        {"config": [1]},
        {"data": "text"},
        {"figures": 3},
        {"optimizer": {"state": {0: {"step": torch.tensor(torch.nan)}}}},
    ],
)
def test_a_damaged_state_is_one_message(folder, monkeypatch, damage):
    monkeypatch.chdir(folder)
    if not (folder / "damaged-last.pth").exists():
        train(folder, "damaged", NUM_EPOCHS=1)
    torch.save({**load(folder, "damaged-last"), **damage}, folder / "hurt-last.pth")
    for name, value in {**SETTINGS, "WEIGHTS_PATH": "hurt.pth", "LOGS_PATH": "hurt.txt"}.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(system.UserError, match="not the state of a run to go on from"):
        load_script("train-gen").main()


def children_of(process):
    """Returns the process numbers of a running process's children."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, 1), (signal.SIGSTOP, 143)])
def test_a_reader_that_dies_or_hangs_ends_a_run_and_hangs_none(folder, number, status):
    """A reader is killed, as when memory is short; or it hangs, as on a network disk, and the run gets SIGTERM."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not tell the children of a process")
    name, left_by_others = f"reader{status}", set(folder.glob(".bgpt-*"))
    running = start(folder, name, NUM_WORKERS=1, NUM_EPOCHS=10000, TRAIN_FOLDERS=["train", "many"])[0]
    while not (folder / f"{name}-last.pth").exists():
        time.sleep(0.01)
    readers, deadline = [], time.monotonic() + 60
    while not readers and time.monotonic() < deadline:
        readers = children_of(running.process)
    with contextlib.suppress(ProcessLookupError):  # it has just ended with its epoch
        os.kill(int(readers[0]), number)
    if number == signal.SIGSTOP:
        time.sleep(1)
        running.send(signal.SIGTERM)
    done = running.wait(60)
    assert done.returncode == status, done.stderr
    assert ("a reading process was killed" if status == 1 else "stopped by SIGTERM in epoch") in one_message(done, status)
    assert set(folder.glob(".bgpt-*")) == left_by_others


def test_progress_in_a_file_is_short(folder):
    """As with `2> log`: a line a minute, not ten a second."""
    done = train(folder, "quiet", TRAIN_FOLDERS=["train", "many"], NUM_EPOCHS=2)
    assert 0 < len(done.stderr) < 4000 and "epoch 2 train" in done.stderr


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_read_that_never_ends_does_not_keep_a_run_from_stopping(own_folder, number, num_processes, num_workers):
    """The state of the last finished step is saved, though no step comes any more."""
    running = start(own_folder, "hangs", num_processes, NUM_WORKERS=num_workers, SAVE_MINUTES=60, NUM_EPOCHS=10000)
    wait_for(own_folder / "hangs-last.pth", running)
    (own_folder / "train" / "9.bin").unlink()
    os.mkfifo(own_folder / "train" / "9.bin")  # who opens it waits for ever, as on a disk of the network whose server is gone
    time.sleep(1)
    for process in running:
        process.send(number)
    sent = time.monotonic()
    done = [process.wait(30) for process in running]
    assert time.monotonic() - sent < 10 and [process.returncode for process in done] == [128 + number] * num_processes
    state, words = load(own_folder, "hangs-last"), "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {words} in epoch {state['epoch'] + 1} after {state['position']} examples: the same" in done[0].stderr
    assert not any("Traceback" in process.stderr for process in done)
    assert not list(own_folder.glob(".*"))


def test_a_hanging_reader_does_not_keep_a_run_that_has_batches_from_ending(own_folder):
    """The run stops within a step; the reader, which is stopped itself, is killed, not waited for."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not tell the children of a process")
    running = start(own_folder, "reads", NUM_WORKERS=1, NUM_EPOCHS=10000)[0]
    wait_for(own_folder / "reads-last.pth", [running])
    readers, deadline = [], time.monotonic() + 60
    while not readers and time.monotonic() < deadline:
        readers = children_of(running.process)
    with contextlib.suppress(ProcessLookupError):  # it has just ended with its epoch
        os.kill(int(readers[0]), signal.SIGSTOP)
    running.send(signal.SIGTERM)
    assert "stopped by SIGTERM in epoch" in one_message(running.wait(10), 143)


def test_a_terminal_that_is_closed_stops_a_run(own_folder):
    """With the state saved."""
    running = start(own_folder, "closed", NUM_EPOCHS=10000)
    done = interrupt(running, own_folder / "closed-last.pth", signal.SIGHUP)[0]
    assert "stopped by SIGHUP in epoch" in one_message(done, 129) and not list(own_folder.glob(".*"))
    assert load(own_folder, "closed-last")["epoch"] < 10000


def test_signals_that_a_shell_has_ignored_stay_ignored():
    """As by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with system.delayed_signals(impatient=True) as stop_signal:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert stop_signal() == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("end", ["twice Ctrl-C", "full disk", "no numbers", "a process that cannot begin"])
def test_no_end_leaves_locks_or_unfinished_files(own_folder, tmp_path_factory, end):
    """Other ends are looked at in the tests above."""
    if end == "twice Ctrl-C":
        running = start(own_folder, "end", NUM_EPOCHS=10000)
        wait_for(own_folder / "end-last.pth", running)
        for _ in range(2):
            running[0].send(signal.SIGINT)
            time.sleep(0.01)
    elif end == "full disk":
        running = start(own_folder, "end", file_limit=100_000)
    elif end == "no numbers":
        running = start(own_folder, "end", LEARNING_RATE=1e38)
    else:
        other = tmp_path_factory.mktemp("other")
        for part in ("train", "eval"):
            (other / part).symlink_to(own_folder / part)
        (other / "end.pth").mkdir()  # it cannot write there
        settings, places = options(**SETTINGS, WEIGHTS_PATH="end.pth"), (own_folder, other)
        environments = torchrun_environments(2)
        running = [Running("train-gen.py", *settings, cwd=cwd, env=env) for cwd, env in zip(places, environments)]
    done = [process.wait(60) for process in running]
    assert all(process.returncode == (130 if end == "twice Ctrl-C" else 1) for process in done), done[0].stderr
    assert not list(own_folder.glob(".*"))


def test_a_small_dev_shm(own_folder):
    """As a container has it, 64 MB or less: here, smaller than a batch."""
    mount = "mount -t tmpfs -o size=128k none /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    for i in range(16):
        (own_folder / "train" / f"long{i}.bin").write_bytes(bytes(range(256)) * 16)
    settings = {**SETTINGS, "PATCH_SIZE": 64, "PATCH_LENGTH": 70, "BATCH_SIZE": 27, "NUM_EPOCHS": 1, "NUM_WORKERS": 2}
    command = [sys.executable, str(ROOT / "train-gen.py"), *options(**settings)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command], cwd=own_folder, capture_output=True, text=True,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
