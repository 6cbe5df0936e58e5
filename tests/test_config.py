"""The command line over config.py, and what importing the scripts does not do."""

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_message, run_fresh, run_script

import config
from bgpt import system

LINE = """import sys, config
config.override(sys.argv[1:])
print([config.BATCH_SIZE, config.LEARNING_RATE, config.TRAIN_FOLDERS, config.EVAL_FOLDERS, config.CONVERSION_MODE,
       config.LOAD_FROM_CHECKPOINT, config.INPUT_EXT])"""


def override(*arguments):
    return subprocess.run([sys.executable, "-c", LINE, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_values_of_every_type():
    done = override(
        *"--BATCH_SIZE 4 --LEARNING_RATE 1 --TRAIN_FOLDERS a b --EVAL_FOLDERS --CONVERSION_MODE abc&mid".split(),
        *"--LOAD_FROM_CHECKPOINT False --INPUT_EXT=None".split(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert ast.literal_eval(lines[-1]) == [4, 1.0, ["a", "b"], [], "abc&mid", False, None]
    assert "BATCH_SIZE = 4 (config.py: 16)" in lines
    assert not any(line.startswith("INPUT_EXT") for line in lines)  # it is what it was


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--BATCHSIZE 4", "BATCHSIZE.*BATCH_SIZE"),
        ("--batch_size 4", "batch_size.*BATCH_SIZE"),
        ("--NOTHING_LIKE_IT 4", "NOTHING_LIKE_IT.*--help"),
        ("stray", "stray"),
        ("--BATCH_SIZE four", "BATCH_SIZE is 'four'.*whole number"),
        ("--BATCH_SIZE 4.5", "BATCH_SIZE is '4.5'.*whole number"),
        ("--BATCH_SIZE None", "BATCH_SIZE"),
        ("--BATCH_SIZE", "BATCH_SIZE"),
        ("--BATCH_SIZE 0", "BATCH_SIZE is 0.*1 or more"),
        ("--BATCH_SIZE 6 --ACCUMULATION_STEPS 4", "BATCH_SIZE is 6.*ACCUMULATION_STEPS, 4"),
        ("--HIDDEN_SIZE 100", "HIDDEN_SIZE is 100.*multiple of 64"),
        ("--PATCH_LENGTH 2", "PATCH_LENGTH is 2.*3 or more"),
        ("--LEARNING_RATE 0", "LEARNING_RATE"),
        ("--LEARNING_RATE nan", "LEARNING_RATE is nan"),
        ("--LEARNING_RATE inf", "LEARNING_RATE is inf"),
        ("--DROPOUT 1", "DROPOUT"),
        ("--EVAL_SPLIT 1", "EVAL_SPLIT"),
        ("--TOP_P 0", "TOP_P"),
        ("--TOP_P 1.1", "TOP_P"),
        ("--TOP_K 258", "TOP_K"),
        ("--TEMPERATURE -1", "TEMPERATURE"),
        ("--SEED -1", "SEED"),
        ("--SEED 99999999999999999999", "SEED"),
        ("--CONVERSION_MODE abc->abc", "CONVERSION_MODE.*different"),
        ("--MODE invent", "MODE is 'invent'.*generate, convert, complete"),
        ("--PRECISION fp8", "PRECISION.*bf16"),
        ("--LR_SCHEDULE linear", "LR_SCHEDULE.*cosine"),
        ("--CONVERSION_MODE abc=>mid", "CONVERSION_MODE.*abc->mid"),
        ("--CONVERSION_MODE abc", "CONVERSION_MODE"),
        ("--CONVERSION_MODE .abc->.mid", "CONVERSION_MODE"),
        ("--TARGET_EXT .mid", "TARGET_EXT.*without dots"),
        ("--WANDB_LOG yes", "WANDB_LOG.*True or False"),
        ("--WEIGHTS_PATH None", "WEIGHTS_PATH"),
        ("--TRAIN_FOLDERS", "TRAIN_FOLDERS.*one folder or more"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words):
    done = override(*arguments.split())
    message = one_message(done, status=2)
    assert len(message.splitlines()) == 1 and re.search(words, message), message
    assert done.stdout == ""


def test_a_mistake_in_the_file_itself_is_found(monkeypatch, capsys):
    monkeypatch.setattr(config, "TRAIN_FOLDERS", "data")
    with pytest.raises(SystemExit) as stopped:
        config.override([])
    assert stopped.value.code == 2
    assert "TRAIN_FOLDERS is 'data', but must be a list of texts" in capsys.readouterr().err


def test_help_lists_every_constant_with_its_comment_and_value():
    done = run_script("train-gen.py", "--help", cwd=ROOT, env={"COLUMNS": "1000"})
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for name, value in config.as_dict().items():
        gist = re.search(rf"--{name} \S*VALUE( \.\.\.\])? (.*?) Now: {re.escape(repr(value))}", text)
        assert gist and len(gist[2]) > 20 and "--" not in gist[2], name


def test_every_constant_is_used_by_a_script():
    """A constant that nothing reads would be a setting without effect."""
    scripts = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("bgpt/*.py")] if path.name != "config.py")
    unused = [name for name in config.as_dict() if not re.search(rf"config\.{name}\b|settings\[.{name}.\]", scripts)]
    assert unused == []


def test_importing_does_nothing(tmp_path):
    """No file is touched, nothing printed, no argument parsed, the random numbers are left alone."""
    modules = sorted(path.stem for path in ROOT.glob("*.py")) + sorted(f"bgpt.{path.stem}" for path in ROOT.glob("bgpt/*.py"))
    code = (
        f"import sys, importlib, random; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        "import numpy, torch, transformers, tqdm\n"
        "before = random.getstate(), torch.random.get_rng_state()\n"
        "events = []\n"
        "sys.addaudithook(lambda event, args: events.append(args) if event == 'open' and "
        "isinstance(args[1], str) and set(args[1]) & set('wax+') else None)\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert random.getstate() == before[0] and torch.equal(torch.random.get_rng_state(), before[1]), module\n"
        "    assert not events, (module, events)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


SCRIPTS = {"train-gen.py": [], "train-cls.py": [], "inference.py": [], "cpu-simulation.py": ["--mode", "generate"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_modules_load_shows_no_traceback(script, tmp_path):
    """Stands in for numpy, the first large module of every script, and presses Ctrl-C in its place."""
    for part in ("train", "test"):
        (tmp_path / "cpu_states" / part).mkdir(parents=True)
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {"PYTHONPATH": str(tmp_path), "OMP_WAIT_POLICY": "active"}  # else a busy machine is told
    done = run_fresh(script, *SCRIPTS[script], cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("train-gen.py", "--help", "usage"),
        ("train-gen.py", "--BATCHSIZE 4", "BATCH_SIZE"),
        ("train-gen.py", "", "cpu-simulation.py --mode generate"),
        ("train-gen.py", "--TRAIN_FOLDERS gone", "TRAIN_FOLDERS: 'gone' does not exist"),
        ("train-cls.py", "--TRAIN_FOLDERS . --EVAL_FOLDERS gone", "EVAL_FOLDERS: 'gone' does not exist"),
        ("train-cls.py", "--TRAIN_FOLDERS . --EVAL_FOLDERS --LOAD_FROM_PRE_CHECKPOINT True", "PRE_WEIGHTS_PATH: 'weights-pre.pth'"),
        ("train-cls.py", "--HIDDEN_SIZE 100", "multiple of 64"),
        ("inference.py", "--help", "usage"),
        ("inference.py", "", "INFERENCE_WEIGHTS_PATH: 'weights.pth' does not exist"),
    ],
)
def test_answers_come_before_pytorch_is_loaded(script, arguments, words, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was loaded')")
    done = run_fresh(script, *arguments.split(), cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert words in done.stdout + done.stderr and "PyTorch was loaded" not in done.stderr
    assert done.returncode == (0 if arguments == "--help" else 2 if "SIZE" in arguments else 1)


@pytest.mark.parametrize("script", ["train-gen.py", "train-cls.py", "inference.py"])
def test_threads_wait_asleep_beside_busy_processes(script, tmp_path, monkeypatch):
    """Unless the environment says how they wait; that is read when PyTorch's OpenMP is loaded, not later."""
    if not Path("/proc/stat").exists():
        pytest.skip("this system does not tell how busy its CPU is")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "torch.py").write_text("import os\nraise SystemExit(repr(os.environ.get('OMP_WAIT_POLICY')))")
    (tmp_path / "input").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"")
    arguments = [] if script == "inference.py" else ["--TRAIN_FOLDERS", "input", "--EVAL_FOLDERS"]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        told = [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"WORLD_SIZE": "2"}]
        done = [run_fresh(script, *arguments, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), **env}) for env in told]
    finally:
        busy.kill()
        busy.wait()
    assert [each.stderr.strip() for each in done] == ["'passive'", "'active'", "None", "None"]
    assert "OMP_WAIT_POLICY is set to passive" in done[0].stdout


def test_cpu_times_are_those_of_the_cores_that_may_be_used():
    text = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 40 5 6 7 8 9 9\ncpu1 0 0 0 100 0 0 0 0 0 0\ncpu10 5 0 0 5 0 0 0 0 0 0\nintr 7\n"
    assert system.cpu_times(text, {0, 10}) == (27 + 5, 72 + 10)
    assert system.cpu_times(text, {1}) == (0, 100)
