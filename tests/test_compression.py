"""Lossless compression: round trips, refused containers, and MODE compress as a user runs it."""

import binascii
import builtins
import copy
import errno
import os
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import TINY, Running, as_batch, load_script, one_message, options, run_fresh, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from bgpt import checkpoint, evaluation, lossless
from bgpt.files import list_files
from bgpt.windows import evaluation_windows

LETTERS = b"ABCDabcd|:\n "


def tune(size, seed=0):
    """Returns a content of `size` bytes that the model below has learned to expect."""
    return bytes(np.random.default_rng([size, seed]).choice(np.frombuffer(LETTERS, dtype=np.uint8), size))


def noise(size):
    """Returns a content that nothing can shorten."""
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def model():
    """A small model that has learned an alphabet of twelve letters."""
    torch.manual_seed(0)
    model = utils.ModelSizes(**TINY).build(dropout=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = as_batch(utils.to_patches(tune(3 * i, step), "abc", 4) for i in range(16))
        loss = model(batch.patches.long(), batch.masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def coder(model):
    return lossless.Coder(model, 32)


def write(folder, contents):
    """Writes {name: content} into a folder and returns the paths."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def compress(coder, folder, contents, verify=False, failed=None):
    """Writes {name: content} into a folder and returns {name: container}."""
    done = lossless.compress(coder, write(folder, contents), verify, lambda count: None, failed)
    return {os.path.basename(path): container for path, _, container in done}


def decompress(coder, folder, containers):
    """Writes {name: container} into a folder and returns ({name: content}, {name: reason of its failure})."""
    failed, paths = [], write(folder, {name + lossless.SUFFIX: container for name, container in containers.items()})
    done = [(path, content) for path, content, _ in lossless.decompress(coder, paths, lambda count: None, failed)]
    return tuple({os.path.basename(path).removesuffix(lossless.SUFFIX): each for path, each in pairs} for pairs in (done, failed))


def seal(container, extension=b"abc"):
    """Returns a container with a valid CRC-16, as an attacker would make it."""
    check = binascii.crc_hqx((extension if container[0] == lossless.CODED else b"") + container[3:], container[0])
    return container[:1] + check.to_bytes(2, "little") + container[3:]


def test_files_come_back_whatever_the_batch_and_the_threads(tmp_path, model, monkeypatch):
    monkeypatch.setattr(lossless, "CHUNK", 150)  # windows have 60 bytes and then 32: four in a chunk
    sizes = [0, 1, 3, 4, 5, 60, 61, 92, 93, 150, 151, 300]
    contents = {f"{size}.abc": tune(size) for size in sizes} | {"noise": noise(70), "mixed.x": tune(130) + noise(40)}
    one, three = (compress(lossless.Coder(model, size), tmp_path / "in", contents, verify=size == 3) for size in (1, 3))
    assert one == three and set(one) == set(contents)
    kinds = {name: container[0] for name, container in one.items()}
    assert kinds["noise"] == kinds["0.abc"] == lossless.STORED and kinds["300.abc"] == kinds["60.abc"] == lossless.CODED
    assert len(one["noise"]) == 70 + 7 and len(one["0.abc"]) == 7
    assert decompress(lossless.Coder(model, 32), tmp_path / "out", one) == (contents, {})

    few = {"5.abc": contents["5.abc"]}  # since two threads are slow while other tests run
    try:
        torch.set_num_threads(2)
        containers = compress(lossless.Coder(model, 32), tmp_path / "few", few)
        assert containers == {name: one[name] for name in few}
        assert decompress(lossless.Coder(model, 1), tmp_path / "out-few", containers) == (few, {})
    finally:
        torch.set_num_threads(1)


def test_files_are_finished_as_early_as_possible(tmp_path, coder):
    containers = compress(coder, tmp_path / "in", {"long.abc": tune(300), "short.abc": tune(30), "stored.abc": noise(30)})
    paths = write(tmp_path / "out", {name + lossless.SUFFIX: container for name, container in containers.items()})
    next(lossless.compress(coder, paths, False, lambda count: None, []))  # a run that is stopped leaves nothing to the next
    steps = []
    done = [(os.path.basename(path), len(steps)) for path, _, _ in lossless.decompress(coder, sorted(paths), steps.append, [])]
    assert [name.split(".")[0] for name, _ in done] == ["stored", "short", "long"]
    assert done[0][1] == 0 and done[1][1] < 10 < done[2][1]  # 4 bytes a step


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=300), st.text("ABCab|", max_size=300).map(str.encode)), min_size=1, max_size=8),
    st.sampled_from(["abc", "", "longer-than-a-patch", "字"]),
)
def test_any_content_comes_back(tmp_path_factory, coder, contents, extension):
    folder = tmp_path_factory.mktemp("any")
    contents = {f"{i}.{extension}".rstrip("."): content for i, content in enumerate(contents)}
    containers = compress(coder, folder / "in", contents)
    assert decompress(coder, folder / "out", containers) == (contents, {})
    assert all(len(containers[name]) <= len(content) + 7 for name, content in contents.items())


def test_sizes_are_those_that_evaluate_counts(tmp_path, coder):
    contents = {f"{size}.abc": tune(size) for size in (1, 30, 60, 61, 100, 700)}
    containers = compress(coder, tmp_path / "in", contents)
    windows = evaluation_windows(utils.Examples(list_files([str(tmp_path / "in")], "")), 4, 16)
    scores = evaluation.score_files(coder.model, windows, str(tmp_path / "in"), 8, torch.float32, lambda count: None, [])
    bits = {score.name: score.bits for score in scores}
    for name, content in contents.items():
        is_stored, expected = containers[name][0] == lossless.STORED, bits[name] / 8
        assert is_stored or abs(len(containers[name]) - expected) <= 0.005 * expected + 16


def test_numbers_that_change_are_noticed(tmp_path, model):
    class Unsteady(lossless.Coder):
        def choose(self, logits, uniforms):
            return super().choose(logits + torch.rand(257), uniforms)

    failed = []
    assert compress(Unsteady(model, 4), tmp_path / "in", {"a.abc": tune(100), "b": noise(100)}, True, failed).keys() == {"b"}
    assert [os.path.basename(path) for path, _ in failed] == ["a.abc"] and "does not give the content back" in failed[0][1]


# ---- Refused containers ---------------------------------------------------------------------------------------------

def outcomes(coder, folder, variants, content=None):
    """Returns the messages of damaged containers; the others must give the right content."""
    done, failed = decompress(coder, folder, {f"{i}.abc": variant for i, variant in enumerate(variants)})
    assert len(done) + len(failed) == len(variants) and set(done.values()) <= {content}
    return set(failed.values())


@pytest.mark.parametrize("content", [tune(60), noise(30)], ids=["coded", "stored"])
def test_every_bit_and_every_length(tmp_path, coder, content):
    [container] = compress(coder, tmp_path / "in", {"a.abc": content}).values()
    number, size = int.from_bytes(container, "little"), len(container)
    flipped = [(number ^ 1 << bit).to_bytes(size, "little") for bit in range(8 * size)]
    cut = [container[:length] for length in range(size)] + [container + b"\0"]
    for name, variants in (("flipped", flipped), ("cut", cut)):
        messages = outcomes(coder, tmp_path / name, variants, content)
        assert messages and all("damaged or cut short" in each or "no container" in each for each in messages)
        # with a valid CRC-16: the digests, the lengths and the CRC-32 of the content remain
        sealed = [seal(variant) for variant in variants if len(variant) >= 3]
        messages = outcomes(coder, tmp_path / (name + "-sealed"), sealed, content)
        if name == "flipped" and container[0] == lossless.CODED:
            assert all(any(words in each for each in messages) for words in ("another model", "other libraries", "CRC-32"))


def test_hostile_containers_take_no_memory(tmp_path, coder):
    start = compress(coder, tmp_path / "in", {"a.abc": tune(60)})["a.abc"][:10]
    lengths = [b"\xff" * 8 + b"\x7f", b"\xff" * 12, b"\x80\x80\x80\x80\x04", b""]  # 2**63 - 1, none, 2**30, none
    variants = [start + length + rest for length in lengths for rest in (b"", bytes(40), noise(400))]
    two = start + b"\x80\x80\x04"  # 65,536 bytes, so two chunks
    variants += [two + b"\xff\xff\x03" * 2, two + b"\0\x09" + bytes(36), start + b"\x09" + bytes(5)]
    tracemalloc.start()
    messages = outcomes(coder, tmp_path / "out", [seal(variant) for variant in variants])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert any("its lengths do not fit" in message for message in messages)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=60)), min_size=1, max_size=20))
def test_no_code_is_an_error_of_ours(tmp_path_factory, coder, codes):
    head = bytes([lossless.CODED, 0, 0]) + b"1234" + coder.weights + coder.machine
    variants = [seal(head + (bytes([size]) if size < 128 else bytes([size, 1])) + code) for size, code in codes]
    outcomes(coder, tmp_path_factory.mktemp("hostile") / "out", variants)


def test_other_models_names_and_files_are_refused(tmp_path, model, coder):
    containers = compress(coder, tmp_path / "in", {"a.abc": tune(100), "noise.abc": noise(100)})
    other = copy.deepcopy(model)
    other.patch_level_decoder.base.wpe.weight.data[3, 5] += 1e-6
    done, failed = decompress(lossless.Coder(other, 4), tmp_path / "out", containers)  # stored files need no model
    assert done == {"noise.abc": noise(100)} and failed == {"a.abc": "was compressed with another model"}
    renamed = {"a.txt": containers["a.abc"], "b.abc": containers["a.abc"], "c.abc": b"MThd", "d.abc": b""}
    done, failed = decompress(coder, tmp_path / "out", renamed)
    assert done == {"b.abc": tune(100)} and "or its extension was changed" in failed["a.txt"]
    assert all("is no container of MODE 'compress'" in failed[name] for name in ("c.abc", "d.abc"))


# ---- inference.py ---------------------------------------------------------------------------------------------------

BACK = {"INPUT_FOLDER": "output", "OUTPUT_FOLDER": "back"}


def infer(folder, mode, **constants):
    return run_script("inference.py", *options(MODE=mode, **constants), cwd=folder)


def contents_of(folder):
    """Returns {path within the folder: content} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture()
def ready(tmp_path, model):
    """A folder with weights.pth and input files."""
    checkpoint.save_checkpoint(tmp_path / "weights.pth", {"model": model.state_dict()})
    contents = {"a.abc": tune(300), "sub/a.abc": tune(40), "\udcff\t.abc": tune(30), "b.bgpt": tune(9), "empty.x": b""}
    write(tmp_path / "input", contents | {"none": noise(50)})
    return tmp_path


def test_there_and_back(ready):
    done = infer(ready, "compress", INFERENCE_BATCH_SIZE=3)
    assert done.returncode == 0, done.stderr
    before, containers = contents_of(ready / "input"), contents_of(ready / "output")
    assert set(containers) == {name + ".bgpt" for name in before}
    assert f"{sum(map(len, before.values()))} bytes, {sum(map(len, containers.values()))} in containers: " in done.stdout
    assert "float32 on cpu" in done.stdout and "xz -9e" in done.stdout and "6 files written to output" in done.stdout
    write(ready / "output", {"notes.txt": b"of no concern"})
    write(ready / "back", {"a.abc": b"mine"})
    (ready / "back" / "none").symlink_to(ready / "elsewhere")
    done = infer(ready, "decompress", **BACK)
    assert done.returncode == 1 and "1 of 7 files do not end in .bgpt" in done.stdout and "back/none: " in done.stdout
    assert not (ready / "elsewhere").exists() and "back/a.abc.bak" in done.stdout
    (ready / "back" / "none").unlink()
    done = infer(ready, "decompress", **BACK)
    assert done.returncode == 0 and ".bak" not in done.stdout  # the same content needs no backup
    assert contents_of(ready / "back") == before | {"a.abc.bak": b"mine"}


def test_an_output_that_cannot_be_read_ends_no_run(tmp_path, monkeypatch):
    """An existing output file is read, to decide whether it needs a backup."""
    inference, failed, opened = load_script("inference"), [], builtins.open
    [output] = write(tmp_path, {"a.abc": b"abc"})

    def refuse(path, *arguments, **keywords):  # root may read all
        if str(path) == output:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", refuse)
    assert not inference.write_output(output, b"abc", [], failed)
    assert failed == [(output, "Permission denied")]


def test_files_that_cannot_be_done_are_listed_and_the_rest_is_done(ready):
    (ready / "input" / "dead.abc").symlink_to(ready / "gone")
    done = infer(ready, "compress", VERIFY=False)
    assert done.returncode == 1 and "dead.abc: No such file or directory" in done.stdout and "6 files written" in done.stdout
    container = bytearray((ready / "output" / "a.abc.bgpt").read_bytes())
    container[40] ^= 4
    write(ready / "output", {"a.abc.bgpt": container, "foreign.mid.bgpt": b"MThd"})
    done = infer(ready, "decompress", **BACK)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "5 files written to back" in done.stdout
    assert "output/a.abc.bgpt: " in done.stdout and "foreign.mid.bgpt: " in done.stdout
    assert not (ready / "back" / "a.abc").exists() and not (ready / "back" / "foreign.mid").exists()


def test_a_file_is_written_as_soon_as_it_ends(ready):
    """Ctrl-C in the middle: files written so far are whole."""
    write(ready / "input", {f"{i}.abc": tune(800 + i) for i in range(100)})
    running = Running("inference.py", *options(MODE="compress", INFERENCE_BATCH_SIZE=4), cwd=ready)
    deadline = time.monotonic() + 120
    while not list(ready.glob("output/*.bgpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send(signal.SIGINT)
    assert "stopped by Ctrl-C" in one_message(done := running.wait(60), 130)
    written = contents_of(ready / "output")
    assert 0 < len(written) < 100 and f"{len(written)} files written" in done.stdout
    assert infer(ready, "decompress", **BACK).returncode == 0
    before = contents_of(ready / "input")
    assert contents_of(ready / "back") == {name: before[name] for name in (each.removesuffix(".bgpt") for each in written)}


def test_mistakes_are_one_message(ready):
    (ready / "input" / "b.bgpt").unlink()
    assert "INPUT_FOLDER" in one_message(infer(ready, "decompress"))
    assert "PRECISION" in one_message(infer(ready, "compress", PRECISION="bf16"))
    assert "OUTPUT_FOLDER" in one_message(infer(ready, "compress", OUTPUT_FOLDER="input/sub"))
    (ready / "sitecustomize.py").write_text("import sys; sys.modules['constriction'] = None")
    done = run_fresh("inference.py", *options(MODE="compress"), cwd=ready, env={"PYTHONPATH": str(ready)})
    assert "constriction" in one_message(done)


def test_another_processor_is_refused(ready):
    """Other CPU instructions, as set for PyTorch, sum in another order."""
    assert infer(ready, "compress", VERIFY=False).returncode == 0
    env = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    done = run_fresh("inference.py", *options(MODE="decompress", **BACK), cwd=ready, env=env)
    assert done.returncode == 1 and "numbers differ" in done.stdout
