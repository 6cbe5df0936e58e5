"""config.py edited by hand, the command line, and imports without side effects."""

import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT, one_message, run_fresh, run_script

import config
from bgpt import settings


def override(line, **constants):
    """Returns the constants of a module as config.py's, with other values, after the command line."""
    module = types.ModuleType("config")
    vars(module).update({**settings.as_dict(config), "__file__": config.__file__, **constants})
    settings.override(module, line.split())
    return module


def test_values_of_every_type(capsys):
    line = "--BATCH_SIZE 4 --LEARNING_RATE 1 --TRAIN_FOLDERS a b --EVAL_FOLDERS --CONVERSION_MODE abc&mid --INPUT_EXT=None"
    changed = override(f"{line} --LOAD_FROM_CHECKPOINT False")
    assert [changed.BATCH_SIZE, changed.LEARNING_RATE, changed.TRAIN_FOLDERS, changed.EVAL_FOLDERS] == [4, 1.0, ["a", "b"], []]
    assert [changed.CONVERSION_MODE, changed.LOAD_FROM_CHECKPOINT, changed.INPUT_EXT] == ["abc&mid", False, None]
    lines = capsys.readouterr().out.splitlines()
    assert "BATCH_SIZE = 4 (config.py: 16)" in lines
    assert not any(line.startswith("INPUT_EXT") for line in lines)  # it is unchanged


@pytest.mark.parametrize(
    "line, words",
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
        ("--CONVERSION_MODE abc->abc", "CONVERSION_MODE.*two extensions"),
        ("--WEIGHTS_PATH a.safetensors", "WEIGHTS_PATH.*only read"),
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
        # names of the published code
        ("--PRETRAINED_PATH x", "PRETRAINED_PATH.*--PRE_WEIGHTS_PATH"),
        ("--LOAD_FROM_PRETRAINED True", "LOAD_FROM_PRETRAINED.*--LOAD_FROM_PRE_CHECKPOINT"),
        ("--INFERENCE_MODE convert", "INFERENCE_MODE.*--MODE"),
        ("--DETERMINISTIC True", "DETERMINISTIC.*SEED"),
        ("--SHOW_WARNS True", "SHOW_WARNS"),
    ],
)
def test_mistakes_are_one_line_and_status_2(line, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        override(line)
    out, message = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert len(message.splitlines()) == 1 and re.search(words, message), message


@pytest.mark.parametrize(
    "constants, words",
    [
        ({"TRAIN_FOLDERS": "data"}, "TRAIN_FOLDERS is 'data', but must be a list of texts"),
        ({"BATCH_SIZE": "8"}, "BATCH_SIZE is '8', but must be a whole number"),
        ({"BATCHSIZE": 8}, "unknown constant BATCHSIZE.*BATCH_SIZE"),
        ({"INFERENCE_MODE": "convert"}, "unknown constant INFERENCE_MODE.*MODE"),
    ],
)
def test_mistakes_in_the_file_itself(constants, words, capsys):
    with pytest.raises(SystemExit):
        override("", **constants)
    assert re.search(words, capsys.readouterr().err)


EDITS = {  # {edit of config.py: (pattern, replacement)}
    "no annotation": (r"BATCH_SIZE: int = 16", "BATCH_SIZE = 8"),
    "another order": (r"(?s)(.*)(INFERENCE_WEIGHTS_PATH: str = \"weights.pth\"\n)", r'\2\1'),
    "one's own format": (r"TRAIN_FOLDERS: .*", "import os\nDATA = 'cpu_states'\nTRAIN_FOLDERS = (\n    os.path.join(DATA, 'train'),\n)"),
    "a whole number for a number": (r"LEARNING_RATE: float = 1e-4", "LEARNING_RATE = 1"),
    "None without a hint": (r"CONVERSION_MODE: str \| None = None", "CONVERSION_MODE = None"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_config_is_edited_by_hand(tmp_path, edit):
    for name in ("train-gen.py", "bgpt"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "train-gen.py", tmp_path / "run.py")
    text, count = re.subn(*EDITS[edit], (ROOT / "config.py").read_text(), count=1)
    (tmp_path / "config.py").write_text(text)
    assert count == 1
    done = subprocess.run([sys.executable, "run.py", "--LEARNING_RATE", "0.5"], cwd=tmp_path, capture_output=True, text=True)
    assert "cpu-simulation.py --mode generate" in one_message(done)
    done = subprocess.run([sys.executable, "run.py", "--LEARNING_RATE", "two"], cwd=tmp_path, capture_output=True, text=True)
    assert "LEARNING_RATE is 'two'" in one_message(done, status=2)


def test_a_constant_that_is_missing_is_named(capsys):
    module = types.ModuleType("config")
    vars(module).update({**settings.as_dict(config), "__file__": config.__file__})
    del module.BATCH_SIZE
    with pytest.raises(SystemExit):
        settings.override(module, [])
    assert "BATCH_SIZE is missing" in capsys.readouterr().err


def test_help_lists_every_constant_with_its_comment_and_value():
    done = run_script("train-gen.py", "--help", cwd=ROOT, env={"COLUMNS": "1000"})
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for name, value in settings.as_dict(config).items():
        gist = re.search(rf"--{name} \S*VALUE( \.\.\.\])? (.*?) Now: {re.escape(repr(value))}", text)
        assert gist and len(gist[2]) > 20 and "--" not in gist[2], name


def test_every_constant_is_used_by_a_script():
    """A constant that nothing reads would be a setting without effect."""
    scripts = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("bgpt/*.py")] if path.name != "config.py")
    unused = [name for name in settings.CONSTANTS if not re.search(rf"config\.{name}\b|settings\[.{name}.\]", scripts)]
    assert unused == []
    assert {name for name in vars(config) if name.isupper()} == set(settings.CONSTANTS)


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


def test_ctrl_c_while_modules_load_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nopen('loading', 'w').close()\ntime.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train-gen.py"), "--TRAIN_FOLDERS", "."], cwd=tmp_path, stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "loading").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b"" and process.returncode == -signal.SIGINT


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
