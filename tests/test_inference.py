"""inference.py as a user runs it, and the same from Python."""

import re
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, Running, fill_by_recipe, load_script, one_message, options, run_script
from test_generation import recompute_greedy

import bgpt
import config
import utils
from bgpt import checkpoint, generation, report, system
from bgpt import model as models
from bgpt.files import extension_of


def outputs_in(folder):
    """Returns the sorted relative paths of all files in a folder without the index."""
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in paths if path not in report.INDEX_NAMES)


def infer(folder, **constants):
    return run_script("inference.py", *options(**constants), cwd=folder)


def test_generate(tmp_path, monkeypatch, capsys, tiny_checkpoint):
    done = infer(tmp_path, MODE="generate", TARGET_EXT="mid", NUM_SAMPLES=5, INFERENCE_BATCH_SIZE=2)
    assert done.returncode == 0, done.stderr
    names = outputs_in(tmp_path / "output")
    assert len(names) == 5 and all(re.fullmatch(r"\d{8}-\d{6}-[1-5]\.mid", name) for name in names)
    assert "5 files written to output" in done.stdout and "seed 0" in done.stdout
    again = infer(tmp_path, MODE="generate", TARGET_EXT="mid", NUM_SAMPLES=5, OUTPUT_FOLDER="again")
    assert again.returncode == 0
    contents = [[(tmp_path / f / name).read_bytes() for name in outputs_in(tmp_path / f)] for f in ("output", "again")]
    assert contents[0] == contents[1] and len(set(contents[0])) > 1  # the same seed, the same files
    inference = load_script("inference")  # the outputs as inputs, without their index
    monkeypatch.setattr(inference.config, "MODE", "evaluate")
    monkeypatch.setattr(inference.config, "INPUT_FOLDER", str(tmp_path / "again"))
    assert list(inference.find_inputs()) == [str(tmp_path / "again" / name) for name in outputs_in(tmp_path / "again")]
    assert "INPUT_FOLDER: 2 files and folders of runs are left out" in capsys.readouterr().out


def test_convert_and_complete(tmp_path, tiny_model, tiny_checkpoint):
    (tmp_path / "input" / "sub").mkdir(parents=True)
    files = {"a.abc": b"12345", "b.abc": b"", "sub/c.abc": b"x" * 8, "long.abc": b"y" * 57, "d.txt": b"not one of them"}
    for name, content in files.items():
        (tmp_path / "input" / name).write_bytes(content)
    exact = {"TEMPERATURE": 0, "PRECISION": "fp32"}
    done = infer(tmp_path, MODE="convert", INPUT_EXT="abc", TARGET_EXT="mid", OUTPUT_FOLDER="converted", **exact)
    assert done.returncode == 1 and "Traceback" not in done.stderr  # one failed, the others did not
    assert "1 files failed" in done.stdout and "long.abc: too long" in done.stdout
    assert set(outputs_in(tmp_path / "converted")) == {"a.abc.mid", "b.abc.mid", "sub/c.abc.mid"}
    for name in ("a.abc", "sub/c.abc"):
        # [abc] content [mid], then what the model writes
        prompt = np.concatenate((utils.to_patches(files[name], "abc", 4)[:-1].reshape(-1), utils.extension_patch("mid", 4)))
        symbols, cut_off = recompute_greedy(tiny_model, prompt, 1000)
        assert (tmp_path / "converted" / f"{name}.mid").read_bytes() == bytes(symbols)
        assert (f"converted/{name}.mid" in done.stdout) == cut_off  # named in the summary if it was cut off

    assert "note: INFERENCE_WEIGHTS_PATH: 'weights.pth' has no record of its training data" in done.stdout

    done = infer(tmp_path, MODE="complete", OUTPUT_FOLDER="too-long")
    assert done.returncode == 0 and "too long" not in done.stdout, done.stderr
    (tmp_path / "input" / "long.abc").write_bytes(b"y" * 60)
    done = infer(tmp_path, MODE="complete", OUTPUT_FOLDER="too-long")
    assert done.returncode == 1 and "long.abc: too long" in done.stdout and "set PROMPT_BYTES to 59 or less" in done.stdout
    done = infer(tmp_path, MODE="complete", PROMPT_BYTES=6, OUTPUT_FOLDER="completed", **exact)
    assert done.returncode == 0, done.stderr
    for name, content in files.items():
        given = content[:6]
        prompt = np.concatenate((utils.extension_patch(extension_of(name), 4), np.frombuffer(given, np.uint8)))
        symbols, _ = recompute_greedy(tiny_model, prompt, 1000)
        assert (tmp_path / "completed" / name).read_bytes() == given + bytes(symbols), name


def test_what_was_wrong_with_each_input_is_told(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "fine.x").write_bytes(b"abc")
    (tmp_path / "input" / "dead.x").symlink_to(tmp_path / "gone")
    (tmp_path / "input" / "taken.x").write_bytes(b"abd")
    (tmp_path / "output" / "taken.x").mkdir(parents=True)  # the output cannot be written; the others are
    (tmp_path / "input" / ("字" * 80 + ".x")).write_bytes(b"abc")
    (tmp_path / "input" / "full.x").write_bytes(bytes(60))  # with its extension patch it fills all 16 patches of 4
    done = infer(tmp_path, MODE="complete")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 files failed" in done.stdout
    assert re.search(r"dead\.x: No such file", done.stdout) and "full.x: too long" in done.stdout
    assert set(outputs_in(tmp_path / "output")) == {"fine.x", "字" * 80 + ".x"}
    for i in range(30):  # of many files the first ten are named
        (tmp_path / "input" / f"dead{i}.y").symlink_to(tmp_path / "gone")
        (tmp_path / "input" / f"long{i}.y").write_bytes(bytes(57))
    done = infer(tmp_path, MODE="complete", INPUT_EXT="y")
    assert "30 files failed" in done.stdout and done.stdout.count("dead") == 10 and "  and 20 more" in done.stdout
    [cut_off] = re.findall(r"(\d+) of them cut off", done.stdout)
    assert done.stdout.count("long") == 10 and f"and {int(cut_off) - 10} more" in done.stdout


PAIRS = {"INFERENCE_WEIGHTS_PATH": "pairs.pth"}  # of a model that was trained to convert abc to mid


@pytest.mark.parametrize(
    "constants, words",
    [
        ({"INFERENCE_WEIGHTS_PATH": "gone.pth"}, "INFERENCE_WEIGHTS_PATH: 'gone.pth' does not exist"),
        ({"MODE": "convert"}, "INPUT_EXT is None"),
        ({"MODE": "complete"}, "INPUT_FOLDER: 'input' does not exist"),
        ({"MODE": "complete", "INPUT_FOLDER": "empty"}, "INPUT_FOLDER: no files in 'empty'"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "INPUT_EXT": "mid"}, "INPUT_FOLDER: no files of INPUT_EXT 'mid'"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "OUTPUT_FOLDER": "data"}, "OUTPUT_FOLDER: 'data' and INPUT_FOLDER 'data'"),
        ({"MODE": "complete", "INPUT_FOLDER": "data", "OUTPUT_FOLDER": "."}, "OUTPUT_FOLDER: '.' and INPUT_FOLDER 'data'"),
        ({"OUTPUT_FOLDER": "data/a.x"}, "OUTPUT_FOLDER: cannot write"),
        ({"INFERENCE_WEIGHTS_PATH": "cls.pth"}, "is a classifier"),
        ({**PAIRS, "TARGET_EXT": "bin"}, "TARGET_EXT is 'bin'"),
        (PAIRS, "TARGET_EXT is None"),
        ({**PAIRS, "MODE": "convert", "INPUT_EXT": "x", "TARGET_EXT": "abc", "INPUT_FOLDER": "data"}, "INPUT_EXT is 'x'"),
        ({**PAIRS, "MODE": "evaluate", "INPUT_FOLDER": "data", "CONVERSION_MODE": "abc&mid"}, "CONVERSION_MODE is 'abc&mid'"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, tiny_checkpoint, constants, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.x").write_bytes(b"abc")
    model = utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3)
    torch.save({"model": model.state_dict(), "labels": {"a": 0, "b": 1, "c": 2}}, tmp_path / "cls.pth")
    record = {"extensions": ["abc", "mid"], "config": {"CONVERSION_MODE": "abc->mid"}}
    torch.save({**torch.load(tiny_checkpoint), **record}, tmp_path / "pairs.pth")
    monkeypatch.chdir(tmp_path)
    for name, value in constants.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(system.UserError, match=re.escape(words)):
        script = load_script("inference")
        script.check_settings()
        script.main()
    assert (tmp_path / "data" / "a.x").read_bytes() == b"abc" and not (tmp_path / "output").exists()


def generator(net, **record):
    return models.Generator(net, record, where="here")


def test_tasks_that_the_model_was_not_trained_on(tiny_model, capsys):
    """A mistake is an error, an unusual task a note, and a trained or unknown task prints nothing."""
    plain = generator(tiny_model, extensions=["TXT", "txt"], config={"CONVERSION_MODE": None})
    pairs = generator(tiny_model, extensions=["abc", "mid"], config={"CONVERSION_MODE": "ABC->mid"})
    both = generator(tiny_model, extensions=["abc", "mid"], config={"CONVERSION_MODE": "abc&mid"})
    published = generator(tiny_model)
    for model, task, target in (
        (plain, {"mode": "generate"}, "txt"),
        (plain, {"mode": "generate", "target_ext": "TXT"}, "TXT"),
        (plain, {"mode": "evaluate"}, None),
        (generator(tiny_model, extensions=[""]), {"mode": "generate", "input_ext": "mid"}, ""),
        (pairs, {"mode": "convert", "input_ext": "ABC"}, "mid"),
        (both, {"mode": "convert", "input_ext": "mid"}, "abc"),
        (pairs, {"mode": "evaluate", "conversion_mode": "abc->mid"}, None),
        (pairs, {"mode": "evaluate", "conversion_mode": "mid&abc", "input_ext": "Abc"}, None),
        (published, {"mode": "generate", "target_ext": "bmp"}, "bmp"),
    ):
        assert model.check_task(**task) == target and not capsys.readouterr().out, task
    for model, task, words in (
        (published, {"mode": "generate"}, "TARGET_EXT is None"),
        (published, {"mode": "evaluate", "conversion_mode": "abc->mid"}, "no record of its training data"),
        (pairs, {"mode": "evaluate"}, "CONVERSION_MODE 'ABC->mid'"),
        (pairs, {"mode": "compress"}, "CONVERSION_MODE 'ABC->mid'"),
        (pairs, {"mode": "convert", "input_ext": "mid"}, "never on mid -> abc"),
    ):
        model.check_task(**task)
        assert re.fullmatch(f"note: .*{words}.*\n", capsys.readouterr().out), task
    for model, task, words in (
        (plain, {"mode": "generate", "target_ext": "bin"}, "TARGET_EXT is 'bin'"),
        (pairs, {"mode": "generate"}, "TARGET_EXT is None"),
        (published, {"mode": "convert", "input_ext": "abc"}, "TARGET_EXT is None"),
        (plain, {"mode": "evaluate", "conversion_mode": "txt->mid"}, "CONVERSION_MODE is 'txt->mid'"),
        (pairs, {"mode": "evaluate", "conversion_mode": "mid->abc"}, "CONVERSION_MODE is 'mid->abc'"),
    ):
        with pytest.raises(system.UserError, match=words):
            model.check_task(**task)
    plain.check_files(["a.txt", "b.TXT"], True)
    published.check_files(["a.nosuch"], True)
    assert not capsys.readouterr().out
    plain.check_files(["a.txt", "b.Txt", "c.nosuch", "d"], True)
    assert "note: 2 of 4 files" in capsys.readouterr().out  # b.Txt is read as b.txt


def test_what_others_put_in_the_output_folder_stays(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    (tmp_path / "output").mkdir()
    for name in ("a.x", "link.x"):
        (tmp_path / "input" / name).write_bytes(b"abc")
    (tmp_path / "output" / "a.x").write_bytes(b"the user's")
    (tmp_path / "output" / "link.x").symlink_to(tmp_path / "input" / "link.x")
    done = infer(tmp_path, MODE="complete")
    assert done.returncode == 1 and "link.x: is a symlink" in done.stdout
    assert (tmp_path / "output" / "a.x.bak").read_bytes() == b"the user's"
    assert (tmp_path / "output" / "a.x").read_bytes() != b"the user's"
    assert (tmp_path / "input" / "link.x").read_bytes() == b"abc"
    assert "kept as output/a.x.bak" in done.stdout
    done = infer(tmp_path, MODE="complete")  # the same content needs no backup
    assert "kept as" not in done.stdout and outputs_in(tmp_path / "output") == ["a.x", "a.x.bak", "link.x"]
    before = (tmp_path / "output" / "a.x").read_bytes()
    done = infer(tmp_path, MODE="complete", SEED=1)  # that of an earlier run does
    assert "kept as output/a.x.bak2" in done.stdout and (tmp_path / "output" / "a.x.bak2").read_bytes() == before


def test_no_result_of_others_is_replaced(tmp_path, tiny_checkpoint):
    """Each output of every MODE and script, over a file of the user and over its backup."""
    net = fill_by_recipe(utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3))
    checkpoint.save_checkpoint(tmp_path / "cls.pth", {"model": net.state_dict(), "labels": {"c.x": 2, "a.x": 0, "b.x": 1}})
    for name in ("data/a.x", "data/b.x", "cpu/a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(4 + 7 + 7))
    inputs = {"INPUT_FOLDER": "data"}
    runs = [
        ("inference.py", options(MODE="evaluate", **inputs), [f"output/{name}" for name in report.NAMES]),
        ("inference.py", options(MODE="classify", INFERENCE_WEIGHTS_PATH="cls.pth", **inputs), ["output/predictions.tsv"]),
        ("inference.py", options(NUM_SAMPLES=1), [f"output/{name}" for name in report.INDEX_NAMES]),
        ("inference.py", options(MODE="compress", **inputs), ["output/a.x.bgpt"]),
    ]
    sizes = "--num_registers", "1", "--memory_size", "4"
    runs.append(("cpu-simulation.py", ["--mode", "translate", "--states_path", "cpu/a.bin", *sizes], ["cpu_states.txt"]))
    runs.append(("cpu-simulation.py", ["--mode", "evaluate", "--dir_path", "cpu", "--json", "x.json", *sizes], ["x.json"]))
    (tmp_path / "output").mkdir()
    for script, arguments, names in runs:
        for name in names:
            (tmp_path / name).write_text("my own")
            (tmp_path / f"{name}.bak").write_text("my own backup")
        done = run_script(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        [line] = [line for line in done.stdout.splitlines() if "kept as" in line]
        for name in names:
            assert (tmp_path / name).read_bytes() != b"my own" and f"{name}.bak2" in line
            assert (tmp_path / f"{name}.bak").read_text() == "my own backup" and (tmp_path / f"{name}.bak2").read_text() == "my own"


def test_two_runs_never_share_a_folder(tmp_path, tiny_checkpoint):
    (tmp_path / "output").mkdir()
    with system.lock(tmp_path / "output" / "index.tsv", "OUTPUT_FOLDER"):
        assert "OUTPUT_FOLDER: another run is using" in one_message(infer(tmp_path))
    assert infer(tmp_path, NUM_SAMPLES=1).returncode == 0


def test_a_closed_pipe_ends_quietly(tmp_path, tiny_checkpoint):
    """As with `python inference.py | head -1`."""
    command = f"{sys.executable} {ROOT / 'inference.py'} --NUM_SAMPLES 3 | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


def test_a_mistake_is_one_line(tmp_path):
    message = one_message(infer(tmp_path))
    assert message == "error: INFERENCE_WEIGHTS_PATH: 'weights.pth' does not exist; it must be a checkpoint (.pth)\n"


def test_ctrl_c_leaves_whole_files_only(tmp_path):
    model = fill_by_recipe(utils.ModelSizes(16, 512, 256, 4, 2).build())
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    running = Running("inference.py", *options(NUM_SAMPLES=10000, INFERENCE_BATCH_SIZE=2), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("output/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send(signal.SIGINT)
    done = running.wait(60)
    assert "stopped by Ctrl-C" in one_message(done, 130)
    written = outputs_in(tmp_path / "output")
    assert f"{len(written)} files written" in done.stdout and all(name.endswith(".bin") for name in written)
    assert set(report.read_index(tmp_path / "output" / "index.tsv")) == set(written)


@pytest.mark.parametrize("known, spelling", [(None, "abc"), (["abc"], "abc"), (["ABC", "abc"], "ABC")])
def test_extensions_are_spelled_as_the_model_saw_them(tmp_path, tiny_model, known, spelling):
    torch.save({"model": tiny_model.state_dict(), **({"extensions": known} if known else {})}, tmp_path / "weights.pth")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.ABC").write_bytes(b"123")
    assert infer(tmp_path, MODE="complete", TEMPERATURE=0, PRECISION="fp32").returncode == 0
    prompt = np.concatenate((utils.extension_patch(spelling, 4), np.frombuffer(b"123", np.uint8)))
    symbols, _ = recompute_greedy(tiny_model, prompt, 1000)
    assert (tmp_path / "output" / "a.ABC").read_bytes() == b"123" + bytes(symbols)


def test_candidates(tmp_path, tiny_model, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    for name in ("a.x", "b.x", "c.x"):
        (tmp_path / "input" / name).write_bytes(name.encode() * 3)
    for count, folder in ((1, "one"), (4, "four")):
        done = infer(tmp_path, MODE="complete", NUM_CANDIDATES=count, OUTPUT_FOLDER=folder, PRECISION="fp32", SEED=5)
        assert done.returncode == 0, done.stderr
        listed = report.read_index(tmp_path / folder / "index.tsv")
        assert sorted(listed) == outputs_in(tmp_path / folder) == ["a.x", "b.x", "c.x"]
        for name, (_, source, size, bits, how, seed) in listed.items():
            prompt = np.concatenate((utils.extension_patch("x", 4), np.frombuffer(name.encode() * 3, np.uint8)))
            streams = [[5, zlib.crc32(name.encode())], *([5, zlib.crc32(name.encode()), i] for i in range(1, count))]
            prompts = [generation.Prompt(i, prompt, stream) for i, stream in enumerate(streams)]
            best = max(generation.generate(tiny_model, prompts, 1, generation.Sampling()), key=lambda c: c.mean_log_probability())
            content = name.encode() * 3 + bytes(best.symbols.tolist())
            assert (tmp_path / folder / name).read_bytes() == content
            assert [source, size, how, seed] == [f"input/{name}", str(len(content)), "cut off" if best.cut_off else "ended", "5"]
            assert float(bits) == pytest.approx(best.bits_per_byte(), abs=1e-3)


@pytest.mark.parametrize("changes", [{"TEMPERATURE": 0}, {"TOP_K": 1}, {"MODE": "generate", "NUM_SAMPLES": 2}])
def test_equal_candidates_are_computed_once(tmp_path, monkeypatch, capsys, tiny_checkpoint, changes):
    (tmp_path / "input").mkdir()
    for name in ("a.x", "b.x"):
        (tmp_path / "input" / name).write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    written, generate = [], generation.generate

    def count(model, prompts, *more):
        written.extend(prompts)
        return generate(model, written, *more)

    monkeypatch.setattr(generation, "generate", count)
    for name, value in {"MODE": "complete", "NUM_CANDIDATES": 8, "TARGET_EXT": "x", **changes}.items():
        monkeypatch.setattr(config, name, value)
    assert load_script("inference").main() == 0
    assert len(written) == 2 and "note: NUM_CANDIDATES is 8" in capsys.readouterr().out


# ---- From Python ----------------------------------------------------------------------------------------------------


def test_a_model_from_python_writes_what_the_script_writes(tmp_path, tiny_checkpoint):
    (tmp_path / "input").mkdir()
    contents = [b"12345", b"", b"x" * 8]
    for i, content in enumerate(contents):
        (tmp_path / "input" / f"{i}.abc").write_bytes(content)
    model = bgpt.load(str(tiny_checkpoint), device="cpu", precision="fp32")
    exact = {"TEMPERATURE": 0, "PRECISION": "fp32"}
    assert infer(tmp_path, MODE="complete", OUTPUT_FOLDER="completed", **exact).returncode == 0
    written = [(tmp_path / "completed" / f"{i}.abc").read_bytes() for i in range(3)]
    assert model.complete(contents, "abc", temperature=0) == written
    assert model.complete(contents[0], "abc", temperature=0) == written[0]
    assert infer(tmp_path, MODE="convert", INPUT_EXT="abc", TARGET_EXT="mid", OUTPUT_FOLDER="converted", **exact).returncode == 0
    written = [(tmp_path / "converted" / f"{i}.abc.mid").read_bytes() for i in range(3)]
    assert model.convert(contents, "abc", "mid", temperature=0, batch_size=2) == written
    sampling = {"TOP_P": 0.9, "SEED": 3, "TARGET_EXT": "mid", "PRECISION": "fp32"}
    assert infer(tmp_path, MODE="generate", NUM_SAMPLES=4, OUTPUT_FOLDER="generated", **sampling).returncode == 0
    written = [(tmp_path / "generated" / name).read_bytes() for name in outputs_in(tmp_path / "generated")]
    assert model.generate("mid", count=4, top_p=0.9, seed=3) == written
    with pytest.raises(ValueError, match="no room"):
        model.complete(bytes(60), "abc")
    for match, ext, wrong in (("dot", ".mid", {}), ("TOP_P", "mid", {"top_p": 0}), ("TEMPERATURE", "mid", {"temperature": -1})):
        with pytest.raises(ValueError, match=match):
            model.generate(ext, **wrong)
    with pytest.raises(ValueError, match="does not exist"):
        bgpt.load(str(tmp_path / "gone.pth"))


def test_bits_per_byte_and_compression_from_python(tmp_path, tiny_model, tiny_checkpoint):
    model, random = bgpt.load(str(tiny_checkpoint), device="cpu", precision="fp32"), np.random.default_rng(0)
    (tmp_path / "input").mkdir()
    contents = [random.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (0, 5, 40, 300)]  # the last is longer than L
    for i, content in enumerate(contents):
        (tmp_path / "input" / f"{i}.abc").write_bytes(content)
    assert infer(tmp_path, MODE="evaluate", PRECISION="fp32").returncode == 0
    rows = [line.split("\t") for line in (tmp_path / "output" / "evaluation.tsv").read_text().splitlines()[1:]]
    bits = model.bits_per_byte(contents, "abc")
    assert np.isnan(bits[0]) and bits[1:] == pytest.approx([float(row[3]) for row in rows[1:]], abs=1e-4)
    packed = model.compress(contents, "abc")
    assert model.decompress(packed, "abc") == contents and model.decompress(packed[2], "abc") == contents[2]
    with pytest.raises(ValueError, match="damaged"):
        model.decompress(packed[2][:-1], "abc")
    for method in (model.bits_per_byte, model.compress):
        for match, ext, batch_size in (("dot", ".abc", 1), ("INFERENCE_BATCH_SIZE is 0", "abc", 0)):
            with pytest.raises(ValueError, match=match):
                method(b"x", ext, batch_size=batch_size)


def test_a_classifier_from_python(tmp_path):
    net = fill_by_recipe(utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3))
    path = str(tmp_path / "cls.pth")
    checkpoint.save_checkpoint(path, {"model": net.state_dict(), "labels": {"c.x": 2, "a.x": 0, "b.x": 1}})
    predictions = bgpt.load(path, device="cpu", precision="fp32").classify([b"abc", bytes(100)], "x", batch_size=1)
    for content, shares in zip((b"abc", bytes(100)), predictions):
        with torch.no_grad():
            expected = net(torch.from_numpy(utils.to_patches(content, "x", 4)[:16]).long()[None]).softmax(-1)[0]
        assert [shares[label] for label in ("a.x", "b.x", "c.x")] == pytest.approx(expected.tolist(), abs=1e-5)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
