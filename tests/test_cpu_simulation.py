"""cpu-simulation.py: the data set byte for byte, the machine against a plain one, and mistakes of users."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_script
from hypothesis import given, settings
from hypothesis import strategies as st

from bgpt import cpu, cpu_report, system

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_cpu as plain  # noqa: E402

GOLDEN = json.loads((ROOT / "tests/data/cpu.json").read_text())["cases"]
SMALL = "--num_registers 3 --memory_size 64 --num_max_program 16 --num_train_instance 60 --num_test_instance 9".split()

script = load_script("cpu-simulation")


def command(*arguments):
    return [sys.executable, str(ROOT / "cpu-simulation.py"), *map(str, arguments)]


def run(folder, *arguments, **options):
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=120, **options)


def generate(folder, *arguments):
    result = run(folder, "--mode", "generate", *arguments)
    assert result.returncode == 0, result.stderr


def evaluate(folder, *arguments):
    """The JSON and the printed text of a successful evaluation, run in this process to save time."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as screen:
        script.main(["--mode", "evaluate", "--json", "result.json", *map(str, arguments)])
    return json.loads((folder / "result.json").read_text()), screen.getvalue()


def mistake(folder, status, *arguments, **options):
    """The one line on stderr of a run that must fail."""
    result = run(folder, *arguments, **options)
    assert result.returncode == status, (result.returncode, result.stderr)
    [message] = said(result.stderr)
    return message


def said(errors):
    """The lines on stderr that are not the progress bar."""
    return [line for line in errors.splitlines() if line.strip() and not re.search(r"\d+%\|.*/s\]", line)]


def snapshot(folder):
    """Every file below a folder with its bytes, but no locks."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def hidden_files(folder):
    return [path.name for path in folder.rglob(".*") if not path.name.endswith("lock")]


def digest(folder):
    """The digest of a folder that data/cpu.json describes."""
    whole, files = hashlib.sha256(), {name: data for name, data in snapshot(folder).items() if name.endswith(".bin")}
    for name in sorted(files):
        whole.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return len(files), sum(map(len, files.values())), whole.hexdigest()


def build(lines, acc=7, registers=(1, 2, 3), memory_size=64):
    """A true file of a program, by the plain machine. Lines may be bytes, for malformed instructions."""
    memory = b"".join(line if isinstance(line, bytes) else plain.assemble(line) for line in lines).ljust(memory_size, b"\0")
    first = bytes([0, acc, 0, 0, 0, 0, *registers])
    return memory + first + b"".join(plain.run(memory, acc, registers))


def one_file(folder, data, name="x.bin"):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / name).write_bytes(data)
    return ("--dir_path", "data", "--num_registers", "3", "--memory_size", "64")


def counts(entry):
    return entry["right"], entry["total"]


@pytest.mark.parametrize("case", GOLDEN, ids=["default", "small"])
def test_golden_data_set(tmp_path, case):
    generate(tmp_path, *case["args"].split())
    assert digest(tmp_path / "cpu_states") == (case["files"], case["bytes"], case["sha256"])


def test_worker_processes_write_what_one_process_writes(tmp_path):
    # One register and at most 3 instructions: nearly every instance shares its file with others.
    sizes = "--num_registers 1 --memory_size 16 --num_max_program 3 --num_train_instance 4000 --num_test_instance 20".split()
    generate(tmp_path, *sizes)
    last, rng = {}, random.Random(0)
    for folder in ["train"] * 4000 + ["test"] * 20:
        acc, registers, lines = plain.draw(rng, 1, 1, 3)
        last[f"{folder}/{hashlib.md5(''.join(lines).encode()).hexdigest()}.bin"] = lines, acc, registers, 16
    written = snapshot(tmp_path / "cpu_states")
    written.pop("cpu_states.json")
    assert written == {name: build(*instance) for name, instance in last.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 26), st.integers(1, 64), st.integers(0, 2**70), st.data())
def test_draws_are_those_of_choice_and_randint(num_registers, slots, seed, data):
    longest = data.draw(st.integers(1, slots))
    shortest = data.draw(st.integers(1, longest))
    memory, initial = cpu.draw(random.Random(seed), 5, num_registers, 4 * slots, shortest, longest)
    rng = random.Random(seed)
    for i in range(5):
        acc, registers, lines = plain.draw(rng, num_registers, shortest, longest)
        assert initial[i].tolist() == [acc, *registers]
        assert memory[i].tobytes() == b"".join(map(plain.assemble, lines)).ljust(4 * slots, b"\0")


def test_a_folder_keeps_the_data_of_one_set_of_options(tmp_path):
    for name in ("train/.unfinished-77", "test/.unfinished-77", ".part-of-my-thesis"):
        (tmp_path / "cpu_states" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cpu_states" / name).write_bytes(b"half")
    options = tmp_path / "cpu_states" / "cpu_states.json"
    with system.lock(options, "--dir_path"):  # by another run
        assert "--dir_path" in mistake(tmp_path, 1, "--mode", "generate", *SMALL)
    generate(tmp_path, *SMALL)
    assert hidden_files(tmp_path) == [".part-of-my-thesis"]
    before = snapshot(tmp_path)
    kept = json.loads(options.read_text())
    assert kept == {"num_registers": 3, "memory_size": 64, "num_min_program": 1, "num_max_program": 16,
                    "num_train_instance": 60, "num_test_instance": 9, "random_seed": 0}  # fmt: skip
    message = mistake(tmp_path, 1, "--mode", "generate", *SMALL, "--random_seed", 5)
    assert "random_seed 0, not 5" in message and "--dir_path cpu_states" in message
    generate(tmp_path, *SMALL)
    assert snapshot(tmp_path) == before
    options.unlink()
    assert ".bin files" in mistake(tmp_path, 1, "--mode", "generate", *SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.bin").write_bytes(b"mine")
    assert ".bin files" in mistake(tmp_path, 1, "--mode", "generate", *SMALL, "--dir_path", "other")
    assert snapshot(tmp_path / "other") == {"x.bin": b"mine"} and not (tmp_path / "other" / "train").exists()


# Enough for worker processes, with programs so small that many instances share a file.
LONG = "--num_registers 2 --memory_size 32 --num_max_program 8 --num_train_instance 4000 --num_test_instance 50".split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    generate(folder, *LONG)
    return snapshot(folder / "cpu_states")


def begin(folder):
    """A run with two workers in a new process group, just after its first file."""
    two_cores = sorted(os.sched_getaffinity(0))[:2]
    process = subprocess.Popen(
        command("--mode", "generate", *LONG), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, two_cores),
    )  # fmt: skip
    train = folder / "cpu_states" / "train"
    deadline = time.monotonic() + 60
    # not by glob, which reads all of a growing folder
    while not (train.is_dir() and any(entry.name.endswith(".bin") for entry in os.scandir(train))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return process


def alive(group):
    """Whether a process group still has processes other than zombies."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "terminate"])
def test_an_interrupted_run_leaves_whole_files(tmp_path, uninterrupted, number):
    process = begin(tmp_path)
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)  # a terminal stops the whole group
    _, errors = process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(process.pid)
    partial, hidden = snapshot(tmp_path / "cpu_states"), hidden_files(tmp_path)
    whole = {name: data for name, data in partial.items() if name.endswith(".bin")}
    assert 0 < len(whole) < len(uninterrupted) - 1
    assert all(len(data) == len(uninterrupted[name]) for name, data in whole.items())
    if number == signal.SIGKILL:
        assert process.returncode == -number
        generate(tmp_path, *LONG)
        assert snapshot(tmp_path / "cpu_states") == uninterrupted
    else:
        assert process.returncode == 128 + number and not hidden
        assert len(said(errors)) == 1 and said(errors)[0].startswith("stopped")


def test_a_killed_worker_is_one_message(tmp_path):
    process = begin(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and len(said(errors)) == 1 and "a worker process was killed" in errors
    assert not hidden_files(tmp_path)


def test_a_full_disk_is_one_message(tmp_path):
    generate(tmp_path, *SMALL)
    for path in tmp_path.rglob("*.bin"):
        path.unlink()
    full_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (60, 60))  # bytes, of 73 or more in a file
    message = mistake(tmp_path, 1, "--mode", "generate", *SMALL, preexec_fn=full_disk)
    assert "File too large" in message and ".bin" in message
    assert list(snapshot(tmp_path)) == ["cpu_states/cpu_states.json"]


def simulate(memory, acc, registers):
    """One program through the fast path: (states as bytes, which steps are valid)."""
    initial = np.array([[acc, *registers]], np.uint8)
    states, _, valid = cpu.simulate(np.frombuffer(memory, np.uint8)[None], initial, len(registers))
    return states.tobytes(), valid.tolist()


@pytest.mark.parametrize("name", plain.OPERANDS)
def test_every_instruction_with_every_value(name):
    """Each instruction with each number of operands, on all bytes (pairs of them where two matter)."""
    programs = {" ".join([name, *letters[:count]]) for count in plain.OPERANDS[name] for letters in ("ABC", "BBA")}
    values = [(acc, a, b, 9) for acc in (0, 1, 128, 255) for a in range(0, 256, 5) for b in range(0, 256, 15)]
    if name == "LOADI":
        programs, values = [f"LOADI {value}" for value in range(256)], values[::97]
    for line in programs:
        memory = b"".join(map(plain.assemble, [line, "HLT"]))
        rows = np.tile(np.frombuffer(memory, np.uint8), (len(values), 1))
        states, _, valid = cpu.simulate(rows, np.array(values, np.uint8), 3)
        assert valid.all()
        assert states.tobytes() == b"".join(b"".join(plain.run(memory, acc, registers)) for acc, *registers in values)


def test_a_few_instructions_by_hand():
    lines = ["LOADI 200", "POP A", "ADD A A B", "SUB A B C", "DIV A C", "SWAP A B", "ROL", "SHL C", "NOT C", "MOV C A", "HLT"]
    states, _ = simulate(b"".join(map(plain.assemble, lines)).ljust(48, b"\0"), 3, (1, 2, 3))
    after = [(s[0], s[1], *s[6:]) for s in (states[i : i + 9] for i in range(0, len(states), 9))]
    assert after == [
        (1, 3, 1, 2, 3), (2, 200, 1, 2, 3), (3, 200, 200, 2, 3), (4, 200, 200, 255, 3), (5, 200, 200, 255, 0),
        (6, 200, 255, 255, 0), (7, 200, 255, 255, 0), (8, 145, 255, 255, 0), (9, 145, 255, 255, 0),
        (10, 145, 255, 255, 255), (11, 145, 255, 255, 255),
    ]  # fmt: skip


INSTRUCTION = st.tuples(st.integers(0, 24), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)).map(bytes)
ANY_INSTRUCTION = INSTRUCTION | st.binary(min_size=4, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(ANY_INSTRUCTION, max_size=40), min_size=1, max_size=9), st.integers(1, 26), st.integers(0, 2**32))
def test_any_programs_run_together_as_on_the_plain_machine(programs, num_registers, seed):
    slots = max(1, *map(len, programs))
    memory = [b"".join(program).ljust(4 * slots, b"\0") for program in programs]
    initial = np.random.default_rng(seed).integers(0, 256, (len(programs), 1 + num_registers)).astype(np.uint8)
    rows = np.frombuffer(b"".join(memory), np.uint8).reshape(len(programs), -1)
    states, offsets, valid = cpu.simulate(rows, initial, num_registers)
    for program, (acc, *registers), start, end in zip(memory, initial.tolist(), offsets, offsets[1:]):
        assert states[start:end].tobytes() == b"".join(plain.run(program, acc, registers))
        for i, is_valid in enumerate(valid[start:end]):
            assert (plain.disassemble(program[4 * i : 4 * i + 4], num_registers) is not None) == is_valid


@settings(max_examples=300, deadline=None)
@given(ANY_INSTRUCTION)
def test_assembly_round_trip(instruction):
    text, expected = cpu.assembly(int.from_bytes(instruction, "little")), plain.disassemble(instruction, 26)
    if expected is None:
        assert text.split()[0] not in cpu.NAMES or simulate(instruction, 0, [0] * 26)[1] != [True]
    else:
        assert text == expected and plain.assemble(text) == instruction


@pytest.mark.parametrize("instruction, is_valid", [
    ((21, 0, 0, 0), False), ((255, 1, 0, 0), False), ((13, 0, 0, 0), False), ((13, 1, 0, 2), False), ((20, 1, 0, 0), False),
    ((2, 1, 2, 0), False), ((0, 1, 0, 0), False), ((11, 5, 1, 0), False), ((11, 5, 0, 9), False), ((13, 4, 1, 0), False),
    ((13, 1, 2, 200), False), ((11, 200, 0, 0), True), ((11, 0, 0, 0), True),
])  # fmt: skip
def test_malformed_instructions_do_nothing_and_are_reported(tmp_path, instruction, is_valid):
    data = build([bytes(instruction), "INC A", "HLT"])
    states, valid = simulate(data[:64], 7, (1, 2, 3))
    assert valid == [is_valid, True, True] and states == data[64 + 9 :]
    if not is_valid:
        assert states[9:18][1:2] + states[9:18][6:] == bytes([7, 1, 2, 3])
    result, text = evaluate(tmp_path, *one_file(tmp_path, data))
    assert result["exact_files"]["share"] == 1
    problems = {} if is_valid else {"malformed instruction": {"files": 1, "example": "data/x.bin"}}
    assert result["malformed"] == problems and ("(malformed)" in result["opcodes"]) == (not is_valid)
    assert is_valid or "1 files: malformed instruction, e.g. data/x.bin" in text


def test_no_halt_ends_after_each_instruction_once(tmp_path):
    data = build(["INC A"] * 16)
    assert len(data) == 64 + 9 * 17
    result, _ = evaluate(tmp_path, *one_file(tmp_path, data))
    assert result["exact_files"]["share"] == 1 and result["exact_states"]["total"] == 16
    assert list(result["malformed"]) == ["no HLT"]
    result, _ = evaluate(tmp_path, *one_file(tmp_path, build([])))  # a memory of zeros is one HLT
    assert result["exact_files"]["share"] == 1 and result["exact_states"]["total"] == 1 and result["malformed"] == {}


# ---- Evaluate -------------------------------------------------------------------------------------------------------

PROGRAM = ["LOADI 9", "DIV A B", "ADD A B C", "HLT"]  # 4 states of 9 bytes after the initial one at 64..73


def test_true_data_is_right_to_the_last_byte(tmp_path):
    generate(tmp_path, *SMALL)
    text = run(tmp_path, "--mode", "evaluate", "--json", "result.json").stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_registers"] == 3 and result["memory_size"] == 64  # from cpu_states.json
    for name in ("byte_accuracy", "exact_states", "exact_files"):
        assert result[name]["share"] == result[name]["high"] == 1
    files = list((tmp_path / "cpu_states").rglob("*.bin"))
    assert result["exact_files"]["total"] == len(files) and 0.9 < result["exact_files"]["low"] < 1
    assert result["byte_accuracy"]["total"] == sum(len(path.read_bytes()) - 64 - 9 for path in files)
    assert result["malformed"] == {} and result["worst_files"] == [] and result["surplus"] == {"files": 0, "bytes": 0}
    assert sum(part["steps"] for part in result["opcodes"].values()) == result["exact_states"]["total"]
    assert text.startswith("byte accuracy 100.00 %")
    shares = (0, 0), (99999999, 100000000), (5, 5)
    assert [cpu_report.percent(cpu_report.share(*share)) for share in shares] == ["-", "99.99", "100.00"]
    assert evaluate(tmp_path, "--dir_path", "cpu_states/test")[0]["num_registers"] == 3  # from the parent folder
    message = mistake(tmp_path, 1, "--mode", "evaluate", "--num_registers", 2)
    assert "--num_registers 2" in message and "cpu_states.json" in message and "3" in message
    for damaged in ("{", "{}", "[]"):
        (tmp_path / "cpu_states" / "cpu_states.json").write_text(damaged)
        assert "cpu_states.json' is damaged" in mistake(tmp_path, 1, "--mode", "evaluate")


def test_worker_processes_find_the_same(tmp_path):
    for i in range(3500):
        data = bytearray(build(["LOADI 9", "HLT"], acc=i % 256))
        data[64 + 9 + 9 + 1] ^= i % 7 == 0  # ACC in the second state: the effect of LOADI
        one_file(tmp_path, data, f"{i}.bin")
    options = one_file(tmp_path, build([]), "z.bin")
    result, _ = evaluate(tmp_path, *options)
    assert counts(result["exact_files"]) == (3001, 3501)
    assert counts(result["byte_accuracy"]) == (3501 * 18 - 9 - 500, 3501 * 18 - 9)
    assert result["byte_accuracy"]["low"] < result["byte_accuracy"]["share"] < result["byte_accuracy"]["high"]
    assert result["opcodes"]["LOADI"]["executed"]["right"] == 3000
    assert result["opcodes"]["LOADI"]["byte_accuracy"]["share"] == 1


def test_wrong_bytes_are_found_where_they_are(tmp_path):
    data = bytearray(build(PROGRAM))
    data[64 + 9 + 2 * 9 + 6] ^= 255  # register A in state 3: what DIV A B gave
    result, text = evaluate(tmp_path, *one_file(tmp_path, data))
    assert counts(result["byte_accuracy"]) == (35, 36) and result["byte_accuracy"]["low"] is None  # one file
    assert counts(result["exact_states"]) == (3, 4) and counts(result["exact_files"]) == (0, 1)
    assert result["opcodes"]["DIV"]["executed"]["share"] == 0 and result["opcodes"]["LOADI"]["executed"]["share"] == 1
    assert result["opcodes"]["ADD"]["executed"]["total"] == 0  # it began from a wrong register
    assert result["opcodes"]["ADD"]["byte_accuracy"]["right"] == 8  # the state that ADD's step wrote
    [worst] = result["worst_files"]
    assert (worst["state"], worst["predicted"], worst["expected"]) == (3, list(data[91:100]), list(build(PROGRAM)[91:100]))
    assert text.index("\nDIV ") < text.index("\nLOADI ")  # worst first
    assert "byte accuracy  97.22 %" in text and f"{data[97]:>4}*" in text


def test_missing_bytes_are_wrong(tmp_path):
    data = build(PROGRAM)
    for end, right in ((64 + 9 + 27, 27), (64 + 9 + 20, 20), (64 + 9, 0), (64 + 8, 0)):
        result, _ = evaluate(tmp_path, *one_file(tmp_path, data[:end]))
        assert counts(result["byte_accuracy"]) == (right, 36) and counts(result["exact_states"]) == (right // 9, 4)
        assert list(result["malformed"]) == ["states missing"] and counts(result["exact_files"]) == (0, 1)
    assert result["worst_files"][0]["predicted"] == []
    zeros = build(["HLT"], acc=0, registers=(0, 0, 0))  # a zero that is right is not a byte that is missing
    assert counts(evaluate(tmp_path, *one_file(tmp_path, zeros[:-8]))[0]["byte_accuracy"]) == (1, 9)


def test_bytes_beyond_the_end_do_not_enter_the_shares(tmp_path):
    one_file(tmp_path, build(PROGRAM) + bytes(70000), "y.bin")
    one_file(tmp_path, build(PROGRAM), "z.bin")
    result, text = evaluate(tmp_path, *one_file(tmp_path, build(PROGRAM) + bytes(10)))
    assert counts(result["byte_accuracy"]) == (108, 108) and counts(result["exact_states"]) == (12, 12)
    assert counts(result["exact_files"]) == (1, 3) and result["malformed"]["too long"]["files"] == 2
    assert result["surplus"] == {"files": 2, "bytes": 70010} and "2 files" in text and "70,010 bytes" in text
    worst = result["worst_files"][0]
    assert (worst["accuracy"], worst["state"], worst["expected"], worst["predicted"]) == (1, 5, [], [0] * 9)
    long = build(["INC A"] * 255 + ["HLT"], registers=range(26), memory_size=1024) + bytes(40)  # the longest legal file, and more
    (tmp_path / "data" / "a.bin").write_bytes(long)
    result, _ = evaluate(tmp_path, "--dir_path", "data", "--num_registers", 26, "--memory_size", 1024)
    worst = next(file for file in result["worst_files"] if file["path"] == "data/a.bin")
    assert worst["state"] == 257 and worst["predicted"] == [0] * 32


def test_files_too_short_are_counted_as_wrong(tmp_path):
    one_file(tmp_path, build(PROGRAM), "a.bin")
    one_file(tmp_path, b"", "empty.bin")
    one_file(tmp_path, build(PROGRAM)[:72], "short.bin")
    result, _ = evaluate(tmp_path, *one_file(tmp_path, build(PROGRAM), ".hidden.bin"))
    # the bytes and states of short.bin are missing, of empty.bin unknown
    assert counts(result["exact_files"]) == (1, 3) and counts(result["byte_accuracy"]) == (36, 36 + 36)
    assert counts(result["exact_states"]) == (4, 4 + 4)
    assert result["malformed"] == {"no whole program": {"files": 1, "example": "data/empty.bin"},
                                  "states missing": {"files": 1, "example": "data/short.bin"}}  # fmt: skip
    for name in ("a.bin", "short.bin"):
        (tmp_path / "data" / name).unlink()
    message = mistake(tmp_path, 1, "--mode", "evaluate", *one_file(tmp_path, bytes(50), "b.bin"))
    assert "none of its 2 .bin files" in message and "--memory_size" in message


def test_random_bytes_are_evaluated(tmp_path):
    rng = random.Random(0)
    memories = [build(PROGRAM)[:64], rng.randbytes(64)]
    for i in range(40):
        one_file(tmp_path, memories[i % 2] + bytes([0, 1, 0, 0, 0, 0, 1, 2, 3]) + rng.randbytes(rng.randrange(300)), f"{i}.bin")
    one_file(tmp_path, rng.randbytes(700), "all.bin")
    (tmp_path / "data" / "link.bin").symlink_to("nowhere")
    with pytest.raises(system.UserError, match="1 files could not be read, e.g. data/link.bin"):  # after all is written
        evaluate(tmp_path, *one_file(tmp_path, rng.randbytes(20000), "long.bin"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exact_files"]["total"] == 43 and result["byte_accuracy"]["share"] < 0.1
    assert result["malformed"]["unreadable"]["files"] == 1
    assert {"too long", "malformed instruction", "no HLT", "PC and IR of the initial state are not 0"} <= set(result["malformed"])


def translate(folder, data, status=0):
    (folder / "x.bin").write_bytes(data)
    result = run(folder, "--mode", "translate", "--states_path", "x.bin", "--num_registers", 3, "--memory_size", 64)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert (folder / "cpu_states.txt").read_text() == result.stdout
    return result.stdout, result.stderr


def test_translate_shows_program_and_states(tmp_path):
    data = build(PROGRAM)
    text, errors = translate(tmp_path, data)
    assert not errors
    blocks = text.split("\n\n")
    assert [line.split(maxsplit=1)[1] for line in blocks[1].splitlines()[1:]] == PROGRAM
    assert len(blocks) == 2 + 5
    for i, block in enumerate(blocks[2:]):
        title, heads, numbers = block.splitlines()
        assert heads.split() == ["PC", "ACC", "IR", "A", "B", "C"]
        state, before = data[64 + 9 * i : 73 + 9 * i], data[64 + 9 * max(i - 1, 0) : 73 + 9 * max(i - 1, 0)]
        assert [int(cell.strip("*")) for cell in numbers.split()] == list(state)
        assert ["*" in cell for cell in numbers.split()] == [a != b for a, b in zip(state, before)]
        assert title.split(maxsplit=2)[:2] == ["state", str(i)]
    assert [block.splitlines()[0].split("fetched ")[1] for block in blocks[3:]] == PROGRAM
    assert [re.search("after (.*),", block)[1] for block in blocks[4:]] == PROGRAM[:-1]  # whose effect is marked


@pytest.mark.parametrize("change, byte, problem", [
    (lambda d: d[:30], 30, "no whole program"), (lambda d: d[:70], 70, "states missing"),
    (lambda d: d[:85], 85, "states missing"), (lambda d: d + b"abc", 109, "too long"),
    (lambda d: d[:8] + b"\x63" + d[9:], 8, "malformed instruction"),
    (lambda d: d[:64] + b"\1" + d[65:], 64, "PC and IR of the initial state"),
    (lambda d: d[:20] + b"\2" + d[21:], 20, "memory after HLT"),
])  # fmt: skip
def test_translate_says_at_which_byte_a_file_is_malformed(tmp_path, change, byte, problem):
    text, errors = translate(tmp_path, change(build(PROGRAM)), status=1)
    assert f"malformed at byte {byte}: {problem}" in errors and errors.count("\n") == 1
    assert f"malformed at byte {byte}: {problem}" in text and "LOADI 9" in text


def test_translate_leaves_other_files_alone(tmp_path):
    one_file(tmp_path, build(PROGRAM))
    os.mkfifo(tmp_path / "pipe")
    sizes = ["--mode", "translate", "--states_path", "data/x.bin", "--num_registers", "3", "--memory_size", "64"]
    before = snapshot(tmp_path)
    for output in ("data", "data/x.bin/x.txt", "pipe"):
        assert "--output_path" in mistake(tmp_path, 1, *sizes, "--output_path", output)
    for states in ("cpu_states/cpu.bin", "data"):
        assert "--states_path" in mistake(tmp_path, 1, "--mode", "translate", "--states_path", states)
    assert snapshot(tmp_path) == before and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("mode, arguments, words", [
    (None, "", "--mode"), ("simulate", "", "--mode"), ("generate", "--seed 3", "--seed"), ("generate", "--random 3", "--random"),
    ("evaluate", "--memory_size 1028", "--memory_size 1028: must be a multiple of 4, from 4 to 1024"),
    ("generate", "--memory_size 64 --num_max_program 17", "--num_max_program 17: must be 16 or less"),
    ("generate", "--num_min_program 9 --num_max_program 8", "--num_min_program 9"),
    ("generate", "--num_train_instance 0 --num_test_instance 0", "--num_test_instance 0"),
    ("generate", "--num_train_instance 1e6", "'1e6'"),
    *(("generate", wrong, wrong) for wrong in (
        "--num_registers 27", "--num_registers 0", "--memory_size 18", "--memory_size 0", "--num_max_program 257",
        "--num_min_program 0", "--num_train_instance -5", "--random_seed -1")),
])  # fmt: skip
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, mode, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main([*(["--mode", mode] if mode else []), *arguments.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and words in line and not (tmp_path / "cpu_states").exists()


def test_wrong_places_are_one_line_and_status_1(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for mode, folder in (("evaluate", "cpu_states"), ("evaluate", "file"), ("evaluate", "empty"), ("generate", "file")):
        assert re.search(f"--dir_path.*{folder}", mistake(tmp_path, 1, "--mode", mode, "--dir_path", folder))
    options = one_file(tmp_path, build(PROGRAM))
    for output in ("empty", "file/x"):
        assert "--json" in mistake(tmp_path, 1, "--mode", "evaluate", *options, "--json", output)
    assert (tmp_path / "file").read_text() == "mine"


def test_help_and_mistakes_are_answered_before_numpy_loads(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    for arguments, status in ((["--help"], 0), (["--mode", "generate", "--num_registers", "27"], 2), (["--mode", "evaluate"], 1)):
        assert run(tmp_path, *arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)}).returncode == status
