"""The scripts within IPython, as by `%run train-gen.py`, in a process that outlives them."""

import builtins
import contextlib
import io
import os
import runpy
import signal
import sys
import threading
import time

import numpy as np
import torch
from conftest import FORKSERVER, ROOT, TINY, options

SMALL = {**TINY, "BATCH_SIZE": 2, "PRECISION": "fp32", "SAVE_MINUTES": 0, "WEIGHTS_PATH": "w.pth", "LOGS_PATH": "w.txt"}
TRAINING = {**SMALL, "TRAIN_FOLDERS": ["train"], "EVAL_FOLDERS": ["eval"]}


def percent_run(script, *arguments):
    """Runs a script like IPython's %run, whose streams have no `reconfigure`. Returns (exit status, stdout, stderr)."""
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        streams, status = (sys.stdout, sys.stderr), 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        assert (sys.stdout, sys.stderr) == streams
    return status, out.getvalue(), err.getvalue()


def interrupt_when(path):
    """Sends Ctrl-C to this process once a file exists, like a notebook's stop button."""
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def notebook(folder):
    """Several scripts in one notebook."""
    os.chdir(folder)
    sys.path[0] = str(ROOT)
    builtins.__IPYTHON__ = True
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    threading.Thread(target=interrupt_when, args=(folder / "w-last.pth",)).start()
    status, out, err = percent_run("train-gen.py", *options(**TRAINING, NUM_EPOCHS=10000))
    assert status == 130 and "stopped by Ctrl-C in epoch" in err and "resumes from there" in err, (status, out, err)
    status, out, err = percent_run("train-gen.py", "--TRIAN_FOLDERS", "x")
    assert status == 2 and "did you mean --TRAIN_FOLDERS" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a first Ctrl-C while modules load kills nobody
    epoch = torch.load("w-last.pth", weights_only=True)["epoch"]
    status, out, err = percent_run("train-gen.py", *options(**TRAINING, NUM_EPOCHS=epoch + 1, NUM_WORKERS=1))
    assert status in (0, None) and "resumes from w-last.pth" in out and f"finished {epoch + 1} of NUM_EPOCHS" in out

    labelled = {**TRAINING, "WEIGHTS_PATH": "c.pth", "LOGS_PATH": "c.txt", "NUM_EPOCHS": 1}
    status, out, err = percent_run("train-cls.py", *options(**labelled))
    assert status in (0, None) and "NUM_WORKERS = 1" not in out and "finished 1 of NUM_EPOCHS 1" in out, (out, err)
    status, out, err = percent_run("inference.py", "--NUM_SAMPLES", "2", "--INFERENCE_WEIGHTS_PATH", "w.pth")
    assert status == 0 and "2 files written to output" in out and "PATCH_SIZE =" not in out, (out, err)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_scripts_run_in_a_notebook_one_after_the_other(tmp_path):
    """Ctrl-C saves and ends a script, not the notebook. Signals, streams and settings are restored."""
    random = np.random.default_rng(0)
    for part in ("train", "eval"):
        (tmp_path / part).mkdir()
        for i in range(6):
            (tmp_path / part / f"{'ab'[i % 2]}_{i}.bin").write_bytes(random.integers(0, 8, 10 * i).astype(np.uint8).tobytes())
    process = FORKSERVER.Process(target=notebook, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert not list(tmp_path.glob(".*"))
