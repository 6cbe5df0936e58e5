"""Golden numbers, reproducible models, and scripts run like a user runs them."""

import importlib.util
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from bgpt import checkpoint, files  # noqa: E402

# a shell ignores Ctrl-C in background jobs, and the scripts under test would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup has SIGHUP

torch.set_num_threads(1)  # products as small as the tests' are faster so, above all on a busy machine

TINY = {"PATCH_SIZE": 4, "PATCH_LENGTH": 16, "HIDDEN_SIZE": 64, "PATCH_NUM_LAYERS": 2, "BYTE_NUM_LAYERS": 1}


def fill_by_recipe(model):
    """Gives a model the weights of golden/model.json's recipe: each tensor is drawn from the CRC-32 of its name."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name.endswith((".attn.bias", ".attn.masked_bias", ".base.lm_head.weight")):
            continue
        drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tensor.shape).astype(np.float32) * 0.08
        if "ln_" in name and name.endswith("weight"):
            drawn = drawn + 1
        tensor.copy_(torch.from_numpy(drawn))
    return model.eval()


# Scripts run in forks of a process that has imported PyTorch, since the import takes seconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "tqdm"])


def _run_here(script, arguments, cwd, env, out, err, file_limit):
    """Runs a script in this process."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


class Running:
    """A run of a script of the repository in a folder, under way.

    Args:
        file_limit: bytes; writing a longer file fails, as it does on a full disk.
    """

    def __init__(self, script, *arguments, cwd, env=None, file_limit=None):
        self.script = script
        self.out, self.err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        arguments = [str(argument) for argument in arguments]
        self.process = FORKSERVER.Process(
            target=_run_here,
            args=(script, arguments, cwd, env or {}, self.out.name, self.err.name, file_limit),
        )
        self.process.start()

    def send(self, number):
        """Sends a signal if the process still runs."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, timeout=240):
        """Returns the finished process, with stdout and stderr as text."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{self.script} took over {timeout} s")
        with self.out, self.err:
            out, err = self.out.read().decode(), self.err.read().decode()
        return subprocess.CompletedProcess(self.script, self.process.exitcode, out, err)


def interrupt(processes, latest, number, after=0.0):
    """Sends a signal to running processes `after` seconds from their next save; returns them when they have finished.

    Args:
        latest: path of the latest state that they save.
    """

    def stamp():
        return latest.stat().st_mtime_ns if latest.exists() else 0

    before = stamp()
    while processes[0].process.is_alive() and stamp() == before:
        time.sleep(0.005)
    time.sleep(after)
    for process in processes:
        process.send(number)
    return [process.wait() for process in processes]


def run_script(script, *arguments, **keywords):
    """Runs a script to its end, see `Running`."""
    return Running(script, *arguments, **keywords).wait()


def torchrun_environments(count):
    """Returns the environment variables that torchrun sets for each of `count` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(count)} for i in range(count)]


def run_fresh(script, *arguments, cwd, env):
    """Like `run_script`, in a new Python process."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def load_script(name):
    """Returns a script as a module, to call its functions."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**constants):
    """Returns the command line that sets constants: options(BATCH_SIZE=4) is ["--BATCH_SIZE", "4"]."""
    line = []
    for name, value in constants.items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def one_message(process, status=1):
    """Checks that a process failed with one line on stderr, as for a user's mistake, and returns the line."""
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.strip()
    return process.stderr


@pytest.fixture(scope="session")
def golden():
    return json.loads((ROOT / "tests/data/model.json").read_text())


@pytest.fixture(scope="session")
def golden_model(golden):
    return fill_by_recipe(utils.ModelSizes(**golden["recipe"]["sizes"]).build())


@pytest.fixture(scope="session")
def golden_sequences(golden):
    """The sequences of the recipe, int16 (P, 16) each."""
    random = np.random.RandomState(7)
    sequences = []
    for i, length in enumerate(golden["lengths"]):
        content = random.randint(0, 256, (length - 2) * 16 - 5 * i).astype(np.uint8)
        sequences.append(utils.to_patches(content, "bin", 16))
        assert len(sequences[-1]) == length
    return sequences


def make_files(sizes):
    """Returns Files that exist in name only, from {path: size}."""
    paths = sorted(sizes)
    return files.Files(paths, np.array([sizes[path] for path in paths]), np.zeros(len(paths), np.int64), [""])


def as_batch(sequences):
    """Returns the Batch of sequences of patches, int16 (P, S) each."""
    return utils.Batch((patches, patches != utils.END, 1) for patches in sequences)


@pytest.fixture()
def tiny_model():
    return fill_by_recipe(utils.ModelSizes(**TINY).build())


@pytest.fixture()
def tiny_checkpoint(tmp_path, tiny_model):
    """A generative checkpoint of the TINY sizes, as inference.py needs it."""
    path = tmp_path / "weights.pth"
    checkpoint.save_checkpoint(path, {"model": tiny_model.state_dict()})
    return path
