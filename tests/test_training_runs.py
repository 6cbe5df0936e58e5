"""Training runs that are stopped, killed, resumed, changed or finished."""

import contextlib
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
from conftest import ROOT, TINY, Running, interrupt, one_message, options, torchrun_environments
from logs import read_log

from bgpt import distributed, system

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
    """A working folder with the same files, not shared with other tests."""
    for part in ("train", "eval"):
        shutil.copytree(folder / part, tmp_path / part)
    return tmp_path


def start(folder, name, num_processes=1, file_limit=None, **changes):
    """Starts a training run whose files are named after `name`; returns its processes, as torchrun would start them."""
    settings = {**SETTINGS, "WEIGHTS_PATH": f"{name}.pth", "LOGS_PATH": f"{name}.txt", **changes}
    environments = torchrun_environments(num_processes) if num_processes > 1 else [{}]
    return [
        Running("train-gen.py", *options(**settings), cwd=folder, env=env, file_limit=file_limit)
        for env in environments
    ]


def train(folder, name, **changes):
    """Runs a training to its end, without saves within an epoch. Returns its first process."""
    done = [process.wait() for process in start(folder, name, **{"SAVE_MINUTES": 10, **changes})]
    assert [process.returncode for process in done] == [0] * len(done), done[0].stderr
    return done[0]


def load(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_end(folder, name, other):
    """Checks that two runs ended with the same bits: weights, moments, random state, figures and the lines of their logs."""
    lines = [(folder / f"{run}.txt").read_text().splitlines() for run in (name, other)]
    assert set(lines[0]) <= set(lines[1]) or set(lines[1]) <= set(lines[0])  # a kill may lose or repeat a line
    for part in ("", "-last"):
        states = [load(folder, run + part) for run in (name, other)]
        for state in states:
            state["moments"] = state["optimizer"]["state"]
        for key in ("model", "moments", "epoch", "position", "best_epoch", "min_eval_loss", "figures", "totals", "random_states"):
            torch.testing.assert_close(*(state[key] for state in states), rtol=0, atol=0)
    assert not list(folder.glob("*.bak"))


def wait_for(path, running):
    """Waits until a file exists, while the first of some processes runs."""
    while running[0].process.is_alive() and not path.exists():
        time.sleep(0.01)


def stop(folder, name, number, after=0.0, **changes):
    """Starts a run and sends it a signal `after` seconds from its next save; returns the finished processes."""
    return interrupt(start(folder, name, **changes), folder / f"{name}-last.pth", number, after)


@pytest.fixture(scope="module", params=[(1, "muon"), (2, "adamw")])
def uninterrupted(folder, request):
    """The settings of a long run, with one process or two, and the name of an uninterrupted one."""
    num_processes, optimizer = request.param
    name, settings = f"whole{num_processes}", {"num_processes": num_processes, "OPTIMIZER": optimizer, "NUM_EPOCHS": 12}
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


def test_a_stop_signal_saves_the_step_in_hand(folder, uninterrupted):
    settings, whole = uninterrupted
    name = f"stopped{settings['num_processes']}"
    number = signal.SIGHUP if settings["num_processes"] == 1 else signal.SIGTERM  # a closed terminal, a job system
    done = stop(folder, name, number, **settings)
    assert [process.returncode for process in done] == [128 + number] * settings["num_processes"]
    state = load(folder, f"{name}-last")
    words = f"stopped by {number.name} in epoch {state['epoch'] + 1} after {state['position']} examples"
    assert words in done[0].stderr and all("stopped" not in process.stderr for process in done[1:])
    train(folder, name, **settings)
    assert_same_end(folder, whole, name)


def test_the_gradient_is_that_of_the_whole_batch(folder):
    """One process, micro-batches and two processes, with ragged lengths and a short last batch, learn the same."""
    same = {"DROPOUT": 0, "PATCH_SAMPLING_BATCH_SIZE": 0, "NUM_EPOCHS": 2, "OPTIMIZER": "adamw"}
    train(folder, "eight", BATCH_SIZE=8, **same)
    train(folder, "micro", BATCH_SIZE=8, ACCUMULATION_STEPS=4, **same)
    train(folder, "halves", BATCH_SIZE=4, num_processes=2, **same)
    train(folder, "micro-halves", BATCH_SIZE=4, ACCUMULATION_STEPS=2, num_processes=2, NUM_WORKERS=1, **same)
    expected = load(folder, "eight-last")["figures"]
    for name in ("micro", "halves", "micro-halves"):
        assert load(folder, f"{name}-last")["figures"] == pytest.approx(expected, rel=1e-5), name
    same["OPTIMIZER"] = "muon"  # it rounds to bf16, so its steps agree less closely
    train(folder, "muon", BATCH_SIZE=8, **same)
    train(folder, "muon-halves", BATCH_SIZE=4, ACCUMULATION_STEPS=2, num_processes=2, **same)
    expected, actual = (load(folder, f"{name}-last")["figures"] for name in ("muon", "muon-halves"))
    assert actual == pytest.approx(expected, rel=1e-3)


def test_another_optimizer(folder):
    """A run may continue with the other optimizer, whose moments are then new."""
    for before, now in [("adamw", "muon"), ("muon", "adamw")]:
        name = f"was-{before}"
        train(folder, name, NUM_EPOCHS=1, OPTIMIZER=before)
        first = load(folder, f"{name}-last")
        done = train(folder, name, NUM_EPOCHS=2, OPTIMIZER=now)
        assert "OPTIMIZER" in done.stdout and "moments" in done.stdout
        second = load(folder, f"{name}-last")
        steps = {moments["step"].item() for moments in second["optimizer"]["state"].values() if "step" in moments}
        assert steps == {second["lr_sched"]["last_epoch"] - first["lr_sched"]["last_epoch"]}  # those of the second epoch alone


def test_more_processes_than_files_are_left(folder):
    """In the last step of eleven files one of two processes has none. Its dummy batch does not count."""
    same = {"DROPOUT": 0, "PATCH_SAMPLING_BATCH_SIZE": 0, "NUM_EPOCHS": 2}
    train(folder, "two", BATCH_SIZE=2, **same)
    train(folder, "one-each", BATCH_SIZE=1, num_processes=2, **same)
    assert load(folder, "one-each-last")["figures"] == pytest.approx(load(folder, "two-last")["figures"], rel=1e-5)


def test_torchrun(folder):
    """As users start it. Only the first process prints."""
    arguments = options(**SETTINGS, WEIGHTS_PATH="torchrun.pth", LOGS_PATH="torchrun.txt")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train-gen.py"), *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("BATCH_SIZE = 2", "a new run, from random weights", "epoch 3  train_loss", "finished 3 of NUM_EPOCHS 3"):
        assert done.stdout.count(words) == 1, words
    assert load(folder, "torchrun-last")["epoch"] == 3


@pytest.mark.parametrize("missing", [("LOCAL_RANK",), ("MASTER_ADDR", "MASTER_PORT"), ("RANK",)])
def test_what_a_job_system_left_in_the_environment_is_not_torchruns(monkeypatch, capsys, missing):
    """Errors are printed, and the run has a single process."""
    for name, value in {**torchrun_environments(2)[1], "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.delenv(name, raising=False) if name in missing else monkeypatch.setenv(name, value)
    with distributed.connected_ranks() as ranks:
        assert (ranks.rank, ranks.count) == (0, 1)
    with pytest.raises(SystemExit), system.user_errors():
        raise system.UserError("WEIGHTS_PATH: wrong")
    printed = capsys.readouterr()
    assert printed.err == "error: WEIGHTS_PATH: wrong\n" and "note: WORLD_SIZE is set" in printed.out
    monkeypatch.setenv("WORLD_SIZE", "")
    assert system.torchrun_rank() == (0, 1)


@pytest.mark.parametrize("num_processes, num_workers", [(1, 2), (2, 0)])
def test_a_file_that_vanishes_ends_a_run(own_folder, num_processes, num_workers):
    """All processes save first. A rerun is refused without consent; with it, the epoch restarts."""
    gone, settings = own_folder / "train" / "gone.bin", {"SAVE_MINUTES": 60, "NUM_WORKERS": num_workers}
    gone.write_bytes(b"x")
    running = start(own_folder, "gone", num_processes, **settings, NUM_EPOCHS=10000)
    wait_for(own_folder / "gone-last.pth", running)
    gone.unlink()
    done = [process.wait(60) for process in running]
    assert all(process.returncode != 0 for process in done)
    assert any("train/gone.bin: No such file" in process.stderr for process in done)
    state = load(own_folder, "gone-last")
    assert f"ended by an error in epoch {state['epoch'] + 1} after {state['position']} examples: the same" in one_message(done[0])
    assert all("Traceback" not in process.stderr for process in done)
    rest = {**settings, "NUM_EPOCHS": state["epoch"] + 1}
    refused = "".join(process.wait().stderr for process in start(own_folder, "gone", num_processes, **rest))
    assert "TRAIN_FOLDERS: other files than" in refused and "--ALLOW_CHANGED_FILES True" in refused
    done = train(own_folder, "gone", num_processes=num_processes, **rest, ALLOW_CHANGED_FILES=True)
    assert (f"epoch {state['epoch'] + 1} restarts" in done.stdout) == (state["position"] > 0)
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
    assert "TRAIN_FOLDERS: 1 of 4 files are unreadable and left out (links-train/dead.bin)" in done.stdout
    assert "EVAL_FOLDERS: 1 of 4 files" in done.stdout
    assert_same_end(folder, "links", "whole-links")


def test_other_evaluation_files_reset_the_best_score(folder):
    """The best score is reset, and the former best model is kept."""
    (folder / "pool").mkdir()
    for i in range(10):
        (folder / "pool" / f"{i}.bin").write_bytes(b"x" * i)
    hold_out = {"TRAIN_FOLDERS": ["pool"], "EVAL_FOLDERS": [], "EVAL_SPLIT": 0.3}
    train(folder, "pool", **hold_out, NUM_EPOCHS=1)
    best, before = [(folder / f"pool{part}.pth").read_bytes() for part in ("", "-last")]
    for i in range(10, 30):
        (folder / "pool" / f"{i}.bin").write_bytes(b"x" * i)
    message = one_message(start(folder, "pool", **hold_out, NUM_EPOCHS=2)[0].wait())
    assert message.startswith("error: TRAIN_FOLDERS, EVAL_FOLDERS:") and (folder / "pool-last.pth").read_bytes() == before
    message = one_message(start(folder, "pool", **hold_out, NUM_EPOCHS=2, SEED=1)[0].wait())
    assert "SEED was 0 and is now 1" in message
    done = train(folder, "pool", **hold_out, NUM_EPOCHS=2, ALLOW_CHANGED_FILES=True)
    assert "best score reset" in done.stdout
    assert load(folder, "pool")["best_epoch"] == 2 and (folder / "pool.pth.bak").read_bytes() == best
    (folder / "pool.pth.bak").unlink()
    assert "reset" not in train(folder, "pool", **hold_out, NUM_EPOCHS=3).stdout


def test_the_files_of_runs_are_no_data(tmp_path, folder):
    """`--TRAIN_FOLDERS .`: weights, log, backups, outputs and wandb are left out, and the run resumes."""
    for i in range(6):
        (tmp_path / f"{i}.bin").write_bytes(b"x" * i)
    shutil.copytree(folder / "eval", tmp_path / "eval")
    for name in ("own.pth.bak", "output/1.bin", "output/index.tsv", "wandb/run/files/x.json", ".bgpt-01234567-x.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    here = {"TRAIN_FOLDERS": ["."], "EVAL_FOLDERS": ["./eval"]}
    done = train(tmp_path, "own", **here, NUM_EPOCHS=1)
    assert "left out (./output/, ./own.pth.bak, ./wandb/)" in done.stdout
    assert "trains on 9 files of .\nevaluates on 3 files of ./eval\n" in done.stdout
    done = train(tmp_path, "own", **here, NUM_EPOCHS=2)
    assert "TRAIN_FOLDERS: 6 files and folders" in done.stdout and "resumes from own-last.pth after epoch 1" in done.stdout
    assert "(./output/, ./own-last.pth, ./own.pth, ./own.pth.bak, ./own.txt, ./wandb/)" in done.stdout
    named = {"TRAIN_FOLDERS": ["output"], "EVAL_FOLDERS": ["eval"]}  # a folder that is asked for is data
    assert "trains on 2 files of output" in train(tmp_path, "other", **named, NUM_EPOCHS=1).stdout


def test_the_same_data_under_another_name(folder, tmp_path):
    """A run resumes in a moved folder or with another spelling of it, bit for bit."""
    moved, same = {"TRAIN_FOLDERS": ["train", "many"]}, {"NUM_EPOCHS": 2}
    train(folder, "stayed", **moved, **same)
    assert stop(folder, "moved", signal.SIGTERM, **moved, **same)[0].returncode == 143
    for part in ("many", "train"):
        shutil.copytree(folder / part, tmp_path / "elsewhere" / part)
    moved["TRAIN_FOLDERS"] = [str(tmp_path / "elsewhere" / "train"), f"{folder}/many"]
    done = train(folder, "moved", **moved, EVAL_FOLDERS=[f"../{folder.name}/eval/"], **same)
    assert "resumes from moved-last.pth after epoch" in done.stdout
    assert_same_end(folder, "moved", "stayed")
    assert load(folder, "stayed-last")["data"] == load(folder, "moved-last")["data"]
    message = one_message(start(folder, "moved", TRAIN_FOLDERS=["many", "train"], NUM_EPOCHS=3)[0].wait())
    assert message.startswith("error: TRAIN_FOLDERS: other files")


def test_a_rerun_with_other_settings(folder):
    train(folder, "changed", NUM_EPOCHS=1, LR_SCHEDULE="constant")
    done = train(folder, "changed", NUM_EPOCHS=2, MAX_GRAD_NORM=0.5)
    for words in ("LR_SCHEDULE was 'constant' and is now 'cosine'", "MAX_GRAD_NORM was 1.0 and is now 0.5", "NUM_EPOCHS was 1"):
        assert words in done.stdout


def test_another_conversion_mode_stops_a_rerun(folder):
    for part in ("train", "eval"):
        (folder / f"pairs-{part}").mkdir()
        for i in range(3):
            for extension in ("abc", "mid"):
                (folder / f"pairs-{part}" / f"{i}.{extension}").write_bytes(b"x" * i)
    pairs = {"TRAIN_FOLDERS": ["pairs-train"], "EVAL_FOLDERS": ["pairs-eval"], "NUM_EPOCHS": 1}
    train(folder, "pairs", CONVERSION_MODE="abc->mid", **pairs)
    message = one_message(start(folder, "pairs", CONVERSION_MODE="mid->abc", **pairs)[0].wait())
    assert "CONVERSION_MODE is 'mid->abc'" in message
    assert "resumes from pairs-last.pth" in train(folder, "pairs", CONVERSION_MODE="ABC->mid", **pairs).stdout


@pytest.mark.parametrize("changes", [{"SEED": 5}, {"num_processes": 2, "BATCH_SIZE": 1}])
def test_changes_that_restart_an_epoch(folder, changes):
    """Another order of the files, or other shares of the ranks, restarts the epoch: it sees every file once."""
    name, same = f"restarts{len(changes)}", {"NUM_EPOCHS": 1, "TRAIN_FOLDERS": ["train", "many"]}
    assert stop(folder, name, signal.SIGTERM, **same)[0].returncode == 143
    assert 0 < load(folder, f"{name}-last")["position"] < 71
    done = train(folder, name, **same, **changes)
    assert "epoch 1 restarts" in done.stdout and load(folder, f"{name}-last")["epoch"] == 1
    assert read_log(folder / f"{name}.txt")[0]["epoch"] == 1


def test_a_full_disk_does_not_end_a_run(folder):
    train(folder, "full", NUM_EPOCHS=2)
    before = [(folder / name).read_bytes() for name in ("full.pth", "full-last.pth")]
    done = start(folder, "full", NUM_EPOCHS=4, file_limit=100_000)[0].wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot save full-last.pth: File too large" in done.stdout
    assert "epoch 4  train_loss" in done.stdout and "could not be saved" in done.stderr
    assert [(folder / name).read_bytes() for name in ("full.pth", "full-last.pth")] == before
    assert not list(folder.glob(".*.tmp"))
    train(folder, "full", NUM_EPOCHS=4)
    assert load(folder, "full-last")["epoch"] == 4


def test_workers_end_with_a_killed_run(folder):
    """The workers must notice it."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not tell the children of a process")
    process = start(folder, "orphans", NUM_WORKERS=2, NUM_EPOCHS=10000)[0]
    workers, deadline = [], time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline:  # they are restarted for each epoch
        workers = children_of(process.process)
    assert len(workers) == 2
    process.send(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if is_running(worker)]


def is_running(pid: str) -> bool:
    """Whether a process still runs. Zombies do not count, as process 1 may not reap orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_weights_with_nan_are_not_saved(folder):
    """A step may make them NaN after a finite loss. The run can resume from the checkpoint before."""
    done = start(folder, "broken", OPTIMIZER="adamw", LEARNING_RATE=1e39)[0].wait()
    assert "NaN" in one_message(done) and "LEARNING_RATE" in done.stderr
    train(folder, "broken")


def test_resumes_from_a_published_checkpoint(folder):
    """It has the published keys only, and is kept."""
    train(folder, "published", NUM_EPOCHS=1)
    state = load(folder, "published")
    published = {key: state[key] for key in ("model", "optimizer", "lr_sched", "epoch", "best_epoch", "min_eval_loss")}
    (folder / "published-last.pth").unlink()
    torch.save({**published, "min_eval_loss": 100.0}, folder / "published.pth")
    before = (folder / "published.pth").read_bytes()
    done = train(folder, "published", NUM_EPOCHS=2)
    assert "resumes from published.pth after epoch 1" in done.stdout
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
    assert "TRAIN_FOLDERS" in one_message(done[0])


def test_two_runs_at_the_same_weights(folder):
    first = start(folder, "twice", NUM_EPOCHS=10000)[0]
    while not (folder / "twice-last.pth").exists():
        time.sleep(0.01)
    assert "WEIGHTS_PATH: another run is using" in one_message(start(folder, "twice")[0].wait())
    first.send(signal.SIGKILL)
    first.wait()
    assert "resumes from" in train(folder, "twice", NUM_EPOCHS=1).stdout


def test_weights_and_log_in_one_file(folder):
    message = one_message(start(folder, "same", LOGS_PATH="same-last.pth")[0].wait())
    assert "LOGS_PATH: 'same-last.pth'" in message


def test_a_link_to_the_weights_stays_one(folder, tmp_path):
    (folder / "linked.pth").symlink_to(tmp_path / "elsewhere.pth")
    train(folder, "linked", NUM_EPOCHS=1)
    assert (folder / "linked.pth").is_symlink() and load(tmp_path, "elsewhere")["epoch"] == 1


def test_moments_of_other_shapes_are_one_message(folder):
    """The fused optimizer step would read past the end of moments that are too small."""
    train(folder, "moments", NUM_EPOCHS=1)
    saved = load(folder, "moments-last")
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(saved, folder / "moments-last.pth")
    assert "the optimizer's exp_avg 0 is not" in one_message(start(folder, "moments", NUM_EPOCHS=2)[0].wait())


def children_of(process):
    """Returns the process numbers of a running process's children."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_a_reader_that_is_killed_ends_a_run(folder):
    """As if memory is short. The last finished step is saved."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not list the children of a process")
    settings = {"NUM_WORKERS": 1, "NUM_EPOCHS": 10000, "TRAIN_FOLDERS": ["train", "many"], "SAVE_MINUTES": 60}
    running = start(folder, "reader", **settings)[0]
    wait_for(folder / "reader-last.pth", [running])
    deadline = time.monotonic() + 60
    while running.process.is_alive() and time.monotonic() < deadline:  # readers are new in each epoch
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            for reader in children_of(running.process):
                os.kill(int(reader), signal.SIGKILL)
    done = running.wait(60)
    state = load(folder, "reader-last")
    message = one_message(done)
    assert "error: NUM_WORKERS: a worker process exited unexpectedly" in message
    assert f"in epoch {state['epoch'] + 1} after {state['position']} examples: the same command resumes" in message


def test_progress_in_a_file_is_short(folder):
    """As with `2> log`: a line a minute, not ten a second."""
    done = train(folder, "quiet", TRAIN_FOLDERS=["train", "many"], NUM_EPOCHS=2)
    assert 0 < len(done.stderr) < 4000 and "epoch 2 train" in done.stderr


def test_signals_that_a_shell_has_ignored_stay_ignored():
    """As by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with system.delayed_signals(impatient=True) as stop_signals:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert stop_signals.first == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("end", ["twice Ctrl-C", "full disk"])
def test_no_end_leaves_unfinished_files(own_folder, end):
    running = start(own_folder, "end", NUM_EPOCHS=10000 if end == "twice Ctrl-C" else 3, file_limit=None if end == "twice Ctrl-C" else 100_000)
    if end == "twice Ctrl-C":
        wait_for(own_folder / "end-last.pth", running)
        for _ in range(2):
            running[0].send(signal.SIGINT)
            time.sleep(0.01)
    done = running[0].wait(60)
    assert done.returncode == (130 if end == "twice Ctrl-C" else 1), done.stderr
    assert not list(own_folder.glob(".*.tmp"))
