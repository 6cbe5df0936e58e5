"""What several test files share: the golden numbers, models that anyone can rebuild, and scripts run as a user runs them."""

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

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


def run_script(script, *arguments, cwd, env=None, timeout=240):
    """Runs a script of the repository in a folder; returns the finished process, with stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
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
    """Checks that a process failed the way a user's mistake should, and returns what it said on stderr."""
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


def as_batch(sequences):
    """Returns the Batch of sequences of patches, int16 (P, S) each."""
    return utils.collate([(patches, patches != utils.END) for patches in sequences])


@pytest.fixture()
def tiny_model():
    return fill_by_recipe(utils.ModelSizes(**TINY).build())


@pytest.fixture()
def tiny_checkpoint(tmp_path, tiny_model):
    """A generative checkpoint of the TINY sizes, as inference.py needs it."""
    path = tmp_path / "weights.pth"
    utils.save_checkpoint(path, {"model": tiny_model.state_dict()})
    return path
