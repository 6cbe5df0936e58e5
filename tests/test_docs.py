"""The commands on README.md and the pages of docs/, run with small models on small files."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import utils
from conftest import ROOT, options, run_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {
    "train-gen.py": ["--HIDDEN_SIZE", "64", "--PATCH_NUM_LAYERS", "1", "--BYTE_NUM_LAYERS", "1", "--NUM_EPOCHS", "1"],
    "train-cls.py": ["--HIDDEN_SIZE", "64", "--PATCH_NUM_LAYERS", "1", "--NUM_EPOCHS", "1"],
    "inference.py": [],
    "cpu-simulation.py": "--num_train_instance 4 --num_test_instance 2 --num_max_program 4".split(),
}
FOLDERS = re.compile(r"--(?:TRAIN_FOLDERS|EVAL_FOLDERS|INPUT_FOLDER|true|folder) (\S+)")
BENCHMARKS = [f"python benchmarks/bench_{name}" for name in ("compress", "generate", "gpt2", "train")]
NOT_RUN = "pip ", "git ", "python -m pytest", "bash benchmarks/gpu.sh", *BENCHMARKS  # installed and measured by hand


def commands(page):
    """Returns the commands in a page's blocks of shell commands, except SLURM's job script."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "\n".join(block for block in blocks if not block.startswith("#!")).replace("\\\n", " ")
    lines = re.sub(r"^pip install .* && ", "", text, flags=re.MULTILINE).splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", *NOT_RUN))]


def make_folder(folder):
    """Fills a folder that a command reads with pairs, with labels in their names."""
    folder.mkdir(parents=True)
    for i in range(2):
        for extension in ("abc", "mid", "txt"):
            (folder / f"{'ab'[i]}_{i}.{extension}").write_bytes(bytes(range(40 * i, 40 * i + 24)))


def patch_sizes(line):
    """Returns the PATCH_SIZE of a command and a PATCH_LENGTH of at most 1,200 bytes."""
    sizes = {"PATCH_SIZE": 16, "PATCH_LENGTH": 512}
    sizes.update((name, int(value)) for name, value in re.findall(r"--(PATCH_SIZE|PATCH_LENGTH) (\d+)", line))
    return {**sizes, "PATCH_LENGTH": min(sizes["PATCH_LENGTH"], 1200 // sizes["PATCH_SIZE"])}


def make_weights(path, line):
    """Writes random weights of a generative model in the published layout, to load with the sizes in a command."""
    model = utils.ModelSizes(**patch_sizes(line), HIDDEN_SIZE=64, PATCH_NUM_LAYERS=1, BYTE_NUM_LAYERS=1).build()
    torch.save({"model": model.state_dict()}, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "INSTANCES": "800", "OMP_NUM_THREADS": "1"}
    for line in commands(page):
        for folder in FOLDERS.findall(line):
            if not (tmp_path / folder).exists():
                make_folder(tmp_path / folder)
        for weights in re.findall(r"--(?:INFERENCE_WEIGHTS_PATH|PRE_WEIGHTS_PATH) (\S+)", line):
            if not (tmp_path / weights).exists():
                make_weights(tmp_path / weights, line)
        line = line.replace("/*.py", "/abc.py").replace("runs/", f"{ROOT}/runs/").replace("benchmarks/", f"{ROOT}/benchmarks/")
        words = shlex.split(re.sub(r"^(OMP_NUM_THREADS=\d )?torchrun --nproc_per_node=2", "python", line))
        if words[0] == "python" and words[1] in SMALL:
            arguments = [next((tmp_path / word).parent.glob("*.bin")) if word.endswith("/NAME.bin") else word for word in words[2:]]
            if "generate" in arguments or not words[1].startswith("cpu"):
                arguments += SMALL[words[1]]
            if words[1].startswith("train"):
                arguments += options(**patch_sizes(line))
            if words[1] == "inference.py" and "generate" in arguments:
                arguments += ["--NUM_SAMPLES", "2"]
            done = run_script(words[1], *arguments, cwd=tmp_path)
        else:
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
