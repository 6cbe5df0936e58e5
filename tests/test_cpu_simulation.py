"""cpu-simulation.py: the data set byte for byte, the machine against a plain second one, and what users do to it."""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import bench_cpu as plain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgpt import system

SCRIPT = Path(__file__).resolve().parent.parent / "cpu-simulation.py"
GOLDEN = json.loads((Path(__file__).parent / "data" / "cpu.json").read_text())["cases"]
SMALL = "--num_registers 3 --memory_size 64 --num_max_program 16 --num_train_instance 60 --num_test_instance 9".split()

spec = importlib.util.spec_from_file_location("cpu_simulation", SCRIPT)
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(folder, *arguments, **options):
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=120, **options)


def generate(folder, *arguments):
    result = run(folder, "--mode", "generate", *arguments)
    assert result.returncode == 0, result.stderr
    return result


def evaluate(folder, *arguments, process=False):
    """The JSON and the printed text of an evaluation that must work; without a process of its own, for the time it takes."""
    options = ["--mode", "evaluate", "--json", "found.json", *map(str, arguments)]
    if process:
        result = run(folder, *options)
        assert result.returncode == 0, result.stderr
        text = result.stdout
    else:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as screen:
            cpu.main(options)
        text = screen.getvalue()
    return json.loads((folder / "found.json").read_text()), text


def mistake(folder, status, *arguments, **options):
    """The one line on stderr that a run which must fail prints."""
    result = run(folder, *arguments, **options)
    assert result.returncode == status, (result.returncode, result.stderr)
    [message] = said(result.stderr)
    return message


def said(errors):
    """The lines on stderr that are not the progress bar."""
    return [line for line in errors.splitlines() if line.strip() and not re.search(r"\d+%\|.*/s\]", line)]


def snapshot(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(folder):
    """How golden/cpu.json says a folder is digested."""
    whole = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.bin")}
    for name in sorted(files):
        whole.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return len(files), sum(map(len, files.values())), whole.hexdigest()


def build(lines, acc=7, registers=(1, 2, 3), memory_size=64):
    """A true file of a program, by the plain machine. Lines may be bytes, for what no assembler writes."""
    memory = b"".join(line if isinstance(line, bytes) else plain.assemble(line) for line in lines).ljust(memory_size, b"\0")
    first = bytes([0, acc, 0, 0, 0, 0, *registers])
    return memory + first + b"".join(plain.run(memory, acc, registers))


def one_file(folder, data, name="x.bin"):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / name).write_bytes(data)
    return ("--dir_path", "data", "--num_registers", "3", "--memory_size", "64")


# ---------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=["default", "small"])
def test_golden_data_set(tmp_path, case):
    generate(tmp_path, *case["args"].split())
    assert digest(tmp_path / "cpu_states") == (case["files"], case["bytes"], case["sha256"])


def test_worker_processes_write_what_one_process_writes(tmp_path):
    # One register and at most 3 instructions: nearly every instance shares its file with others.
    sizes = "--num_registers 1 --memory_size 16 --num_max_program 3 --num_train_instance 8000 --num_test_instance 20".split()
    generate(tmp_path, *sizes)
    last = {}
    rng = random.Random(0)
    for i in range(8020):
        acc, registers, lines = plain.draw(rng, 1, 1, 3)
        folder = "train" if i < 8000 else "test"
        last[f"{folder}/{hashlib.md5(''.join(lines).encode()).hexdigest()}.bin"] = (lines, acc, registers)
    expected = {name: build(lines, acc, registers, 16) for name, (lines, acc, registers) in last.items()}
    found = snapshot(tmp_path / "cpu_states")
    found.pop("cpu_states.json")
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 26), st.integers(1, 64), st.integers(0, 2**70), st.data())
def test_draws_are_those_of_choice_and_randint(num_registers, slots, seed, data):
    longest = data.draw(st.integers(1, slots))
    shortest = data.draw(st.integers(1, longest))
    args = argparse.Namespace(num_registers=num_registers, memory_size=4 * slots, num_min_program=shortest, num_max_program=longest)
    memory, initial = cpu.draw(random.Random(seed), 5, args)
    rng = random.Random(seed)
    for i in range(5):
        acc, registers, lines = plain.draw(rng, num_registers, shortest, longest)
        assert initial[i].tolist() == [acc, *registers]
        assert memory[i].tobytes() == b"".join(map(plain.assemble, lines)).ljust(4 * slots, b"\0")


def test_options_are_kept_and_other_data_is_not_mixed_in(tmp_path):
    generate(tmp_path, *SMALL)
    before = snapshot(tmp_path)
    kept = json.loads((tmp_path / "cpu_states" / "cpu_states.json").read_text())
    assert kept == {"num_registers": 3, "memory_size": 64, "num_min_program": 1, "num_max_program": 16,
                    "num_train_instance": 60, "num_test_instance": 9, "random_seed": 0}  # fmt: skip
    message = mistake(tmp_path, 1, "--mode", "generate", *SMALL, "--random_seed", 5)
    assert "random_seed 0, not 5" in message and "--dir_path cpu_states" in message
    assert snapshot(tmp_path) == before
    generate(tmp_path, *SMALL)
    assert snapshot(tmp_path) == before

    for damaged in ("{", "{}", json.dumps({**kept, "num_registers": None}), json.dumps({**kept, "memory_size": "64"})):
        (tmp_path / "cpu_states" / "cpu_states.json").write_text(damaged)
        assert "damaged" in mistake(tmp_path, 1, "--mode", "generate", *SMALL)
    (tmp_path / "cpu_states" / "cpu_states.json").unlink()
    assert "already holds .bin files" in mistake(tmp_path, 1, "--mode", "generate", *SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.bin").write_bytes(b"mine")
    assert "already holds .bin files" in mistake(tmp_path, 1, "--mode", "generate", *SMALL, "--dir_path", "other")
    assert snapshot(tmp_path / "other") == {"x.bin": b"mine"} and len(list((tmp_path / "other").iterdir())) == 1


def test_what_a_killed_run_left_is_swept(tmp_path):
    options = f".bgpt-{zlib.crc32(b'cpu_states.json'):08x}-77.tmp"
    for name in (options, "train/.bgpt-00000000-77.tmp", "test/.bgpt-00000000-77.tmp"):
        (tmp_path / "cpu_states" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cpu_states" / name).write_bytes(b"half")
    (tmp_path / "cpu_states" / ".part-of-my-thesis").write_text("mine")
    generate(tmp_path, *SMALL)
    assert [name for name in snapshot(tmp_path) if "/." in name] == ["cpu_states/.part-of-my-thesis"]


# Enough for worker processes, with programs so small that many instances share a file.
LONG = "--num_registers 2 --memory_size 32 --num_max_program 8 --num_train_instance 20000 --num_test_instance 50".split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    generate(folder, *LONG)
    return snapshot(folder / "cpu_states")


def alive(group):
    """Whether a process group still has processes (other than ones that only wait to be reaped)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "terminate"])
def test_an_interrupted_run_goes_on_to_the_same_folder(tmp_path, uninterrupted, number):
    process = subprocess.Popen(command("--mode", "generate", *LONG), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    train = tmp_path / "cpu_states" / "train"
    deadline = time.monotonic() + 60
    # not by glob, which reads the whole of a folder that grows all the while
    while not (train.is_dir() and any(e.name.endswith(".bin") for e in os.scandir(train))) and time.monotonic() < deadline:
        time.sleep(0.005)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert len(said(errors)) == 1 and said(errors)[0].startswith("stopped by")
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(process.pid)

    partial = snapshot(tmp_path / "cpu_states")
    hidden = [name for name in partial if name.rpartition("/")[2].startswith(".")]
    assert number == signal.SIGKILL or not hidden
    assert 0 < len(partial) < len(uninterrupted)
    for name in set(partial) - set(hidden):
        assert len(partial[name]) == len(uninterrupted[name])
    generate(tmp_path, *LONG)
    assert snapshot(tmp_path / "cpu_states") == uninterrupted


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the workers in /proc")
def test_a_killed_worker_is_one_message(tmp_path, uninterrupted):
    process = subprocess.Popen(command("--mode", "generate", *LONG), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cpu_states/train/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and said(errors)[0].startswith("error: a worker process was killed")
    assert not [name for name in snapshot(tmp_path) if "/." in name]
    generate(tmp_path, *LONG)
    assert snapshot(tmp_path / "cpu_states") == uninterrupted


def test_a_full_disk_is_one_message(tmp_path):
    resource = pytest.importorskip("resource")
    limit = 700  # bytes: a file of the longest programs has 512 + 9 * 101

    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    sizes = "--num_registers 3 --memory_size 512 --num_max_program 100 --num_train_instance 50 --num_test_instance 0".split()
    message = mistake(tmp_path, 1, "--mode", "generate", *sizes, preexec_fn=full_disk)
    assert "File too large" in message and ".bin" in message
    assert all(len(data) <= limit for data in snapshot(tmp_path).values())
    assert not [name for name in snapshot(tmp_path) if "/." in name]
    generate(tmp_path, *sizes)
    found, _ = evaluate(tmp_path)
    assert found["exact_files"]["share"] == 1


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "cpu_states").mkdir()
    with system.locked(tmp_path / "cpu_states" / "cpu_states.json", "--dir_path"):
        assert "another run" in mistake(tmp_path, 1, "--mode", "generate", *SMALL)
    generate(tmp_path, *SMALL)
    assert not [name for name in snapshot(tmp_path) if "/." in name]


# ---------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------


def simulate(memory, acc, registers):
    """One program through the fast path: (states as bytes, faults by name)."""
    initial = np.array([[acc, *registers]], np.uint8)
    states, offsets, faults = cpu.simulate(np.frombuffer(memory, np.uint8)[None], initial, len(registers))
    assert offsets.tolist() == [0, len(states)]
    return states.tobytes(), [cpu.FAULTS[fault] for fault in faults]


@pytest.mark.parametrize("name", plain.OPERANDS)
def test_every_instruction_with_every_value(name):
    """Each instruction with each number of operands, on all bytes (pairs of them where two matter)."""
    for count in plain.OPERANDS[name]:
        if name == "LOADI":
            programs = [f"LOADI {value}" for value in range(256)]
        else:
            programs = [" ".join([name, *letters]) for letters in (["A", "B", "C"][:count], ["B", "B", "A"][:count])]
        for line in programs:
            memory = b"".join(map(plain.assemble, [line, "HLT"]))
            values = [(acc, a, b) for acc in (0, 1, 127, 128, 200, 255) for a in range(0, 256, 5) for b in range(0, 256, 15)]
            values = values[:: 97 if name == "LOADI" else 1]
            initial = np.array([[acc, a, b, 9] for acc, a, b in values], np.uint8)
            rows = np.tile(np.frombuffer(memory, np.uint8), (len(values), 1))
            states, offsets, faults = cpu.simulate(rows, initial, 3)
            assert not faults.any()
            truth = b"".join(b"".join(plain.run(memory, acc, (a, b, 9))) for acc, a, b in values)
            assert states.tobytes() == truth


def test_a_few_instructions_by_hand():
    lines = ["LOADI 200", "POP A", "ADD A A B", "SUB A B C", "DIV A C", "SWAP A B", "ROL", "SHL C", "NOT C", "MOV C A", "HLT"]
    states, _ = simulate(b"".join(map(plain.assemble, lines)).ljust(48, b"\0"), 3, (1, 2, 3))
    after = [(s[1], *s[6:]) for s in (states[i : i + 9] for i in range(0, len(states), 9))]
    assert after == [(3, 1, 2, 3), (200, 1, 2, 3), (200, 200, 2, 3), (200, 200, 255, 3), (200, 200, 255, 0), (200, 255, 255, 0),
                     (200, 255, 255, 0), (145, 255, 255, 0), (145, 255, 255, 0), (145, 255, 255, 255), (145, 255, 255, 255)]  # fmt: skip
    assert [states[i] for i in range(0, len(states), 9)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


INSTRUCTION = st.tuples(st.integers(0, 24), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)).map(bytes)
ANY_INSTRUCTION = INSTRUCTION | st.binary(min_size=4, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY_INSTRUCTION, min_size=1, max_size=40), st.integers(0, 255), st.binary(min_size=1, max_size=26))
def test_any_program_runs_as_on_the_plain_machine(instructions, acc, registers):
    memory = b"".join(instructions)
    states, faults = simulate(memory, acc, tuple(registers))
    assert states == b"".join(plain.run(memory, acc, registers))
    for i, fault in enumerate(faults):
        assert (plain.disassemble(memory[4 * i : 4 * i + 4], len(registers)) is None) == bool(fault)


@settings(max_examples=300, deadline=None)
@given(ANY_INSTRUCTION)
def test_assembly_round_trip(instruction):
    text = cpu.assembly(int.from_bytes(instruction, "little"))
    if plain.disassemble(instruction, 26) is None:
        assert (text.split()[0] not in cpu.NAMES) or simulate(instruction, 0, [0] * 26)[1] != [""]
    else:
        assert text == plain.disassemble(instruction, 26)
        assert plain.assemble(text) == instruction


def test_fast_path_equals_plain_path_on_thousands_of_instances():
    rng = random.Random(3)
    for _ in range(60):
        num_registers, slots, count = rng.randint(1, 26), rng.randint(1, 48), rng.randint(1, 100)
        args = argparse.Namespace(num_registers=num_registers, memory_size=4 * slots, num_min_program=1, num_max_program=slots)
        memory, initial = cpu.draw(rng, count, args)
        noisy = memory.copy()
        noisy[rng.randrange(count) :, rng.randrange(4 * slots)] = rng.randrange(256)  # malformed ones, HLTs lost and won
        states, offsets, _ = cpu.simulate(noisy, initial, num_registers)
        for i in range(count):
            acc, *registers = initial[i].tolist()
            assert states[offsets[i] : offsets[i + 1]].tobytes() == b"".join(plain.run(noisy[i].tobytes(), acc, registers))


@pytest.mark.parametrize("instruction, fault", [
    (bytes([21, 0, 0, 0]), "unknown opcode"), (bytes([255, 1, 0, 0]), "unknown opcode"),
    (bytes([13, 0, 0, 0]), "operand missing"), (bytes([13, 1, 0, 2]), "operand missing"),
    (bytes([20, 1, 0, 0]), "operand missing"), (bytes([2, 1, 2, 0]), "too many operands"),
    (bytes([0, 1, 0, 0]), "too many operands"), (bytes([11, 5, 1, 0]), "too many operands"),
    (bytes([11, 5, 0, 9]), "too many operands"), (bytes([13, 4, 1, 0]), "register past the last"),
    (bytes([13, 1, 2, 200]), "register past the last"), (bytes([11, 200, 0, 0]), ""), (bytes([11, 0, 0, 0]), ""),
])  # fmt: skip
def test_malformed_instructions_do_nothing_and_say_why(tmp_path, instruction, fault):
    data = build([instruction, "INC A", "HLT"])
    states, faults = simulate(data[:64], 7, (1, 2, 3))
    assert faults == [fault, "", ""] and states == data[64 + 9 :]
    if fault:
        assert states[9:18][1:2] + states[9:18][6:] == bytes([7, 1, 2, 3])
    found, text = evaluate(tmp_path, *one_file(tmp_path, data))
    assert found["exact_files"]["share"] == 1
    assert list(found["malformed"]) == ([fault] if fault else [])
    assert ("(malformed)" in found["opcodes"]) == bool(fault)
    if fault:
        assert f"1 files: {fault} (1 instructions), e.g. data/x.bin" in text


def test_no_halt_ends_after_each_instruction_once(tmp_path):
    data = build(["INC A"] * 16)
    assert len(data) == 64 + 9 * 17
    found, text = evaluate(tmp_path, *one_file(tmp_path, data))
    assert found["exact_files"]["share"] == 1 and found["exact_states"]["total"] == 16
    assert found["malformed"] == {"no HLT": {"files": 1, "times": 1, "example": "data/x.bin"}}


def test_a_memory_of_zeros_is_one_halt(tmp_path):
    found, _ = evaluate(tmp_path, *one_file(tmp_path, build([])))
    assert found["exact_states"]["total"] == 1 and found["exact_files"]["share"] == 1 and found["malformed"] == {}


# ---------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------

PROGRAM = ["LOADI 9", "DIV A B", "ADD A B C", "HLT"]  # 4 states of 9 bytes after the initial one at 64..73


def test_true_data_is_right_to_the_last_byte(tmp_path):
    generate(tmp_path, *SMALL)
    found, text = evaluate(tmp_path, process=True)
    assert found["num_registers"] == 3 and found["memory_size"] == 64  # from cpu_states.json
    for name in ("byte_accuracy", "exact_states", "exact_files"):
        assert found[name]["share"] == 1 and found[name]["high"] == 1 and 0.9 < found[name]["low"] < 1
    files = list((tmp_path / "cpu_states").rglob("*.bin"))
    assert found["exact_files"]["total"] == len(files)
    assert found["byte_accuracy"]["total"] == sum(len(path.read_bytes()) - 64 - 9 for path in files)
    assert found["malformed"] == {} and found["worst_files"] == []
    assert sum(part["steps"] for part in found["opcodes"].values()) == found["exact_states"]["total"]
    assert sum(part["states"] for part in found["positions"]) == found["exact_states"]["total"]
    assert re.match(r"byte accuracy 100\.00 %  \(95 % interval \d", text)
    assert evaluate(tmp_path, "--dir_path", "cpu_states/test")[0]["num_registers"] == 3  # one folder further up


def test_more_files_than_one_process_takes(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3500):
        data = bytearray(build(["LOADI 9", "HLT"], acc=i % 256))
        if i % 7 == 0:
            data[64 + 9 + 9 + 1] ^= 1  # ACC in the second state: the effect of LOADI
        one_file(tmp_path, bytes(data), f"{i}.bin")
    found, _ = evaluate(tmp_path, *one_file(tmp_path, build([]), "z.bin"), process=True)
    assert (found["exact_files"]["right"], found["exact_files"]["total"]) == (3001, 3501)
    assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (3501 * 18 - 9 - 500, 3501 * 18 - 9)
    assert found["opcodes"]["LOADI"]["executed"]["right"] == 3000
    assert found["opcodes"]["LOADI"]["byte_accuracy"]["share"] == 1


def test_wrong_bytes_are_found_where_they_are(tmp_path):
    data = bytearray(build(PROGRAM))
    data[64 + 9 + 2 * 9 + 6] ^= 255  # register A in state 3: what DIV A B gave
    found, text = evaluate(tmp_path, *one_file(tmp_path, bytes(data)))
    assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (35, 36)
    assert (found["exact_states"]["right"], found["exact_states"]["total"]) == (3, 4)
    assert (found["exact_files"]["right"], found["exact_files"]["total"]) == (0, 1)
    assert found["opcodes"]["DIV"]["executed"]["share"] == 0 and found["opcodes"]["LOADI"]["executed"]["share"] == 1
    assert found["opcodes"]["ADD"]["executed"]["total"] == 0  # it began from a wrong register
    assert found["opcodes"]["ADD"]["byte_accuracy"]["right"] == 8  # the state that ADD's step wrote
    assert [part["exact_states"]["share"] for part in found["positions"]] == [1, 1, 0, 1]
    [worst] = found["worst_files"]
    assert worst["state"] == 3 and worst["after"] == "DIV A B"
    assert worst["predicted"] == list(data[91:100]) and worst["expected"] == list(build(PROGRAM)[91:100])
    assert text.index("\nDIV ") < text.index("\nLOADI ")  # worst first
    assert "byte accuracy  97.22 %" in text and f"{data[97]:>4}*" in text


def test_missing_bytes_are_wrong(tmp_path):
    data = build(PROGRAM)
    for end, reason, right in ((64 + 9 + 27, "states missing", 27), (64 + 9 + 20, "ends inside a state", 20), (64 + 9, "states missing", 0)):
        found, _ = evaluate(tmp_path, *one_file(tmp_path, data[:end]))
        assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (right, 36)
        assert found["exact_states"]["right"] == right // 9 and found["exact_states"]["total"] == 4
        assert list(found["malformed"]) == [reason]
    assert found["worst_files"][0]["predicted"] == []


def test_bytes_beyond_the_end_are_wrong(tmp_path):
    found, text = evaluate(tmp_path, *one_file(tmp_path, build(PROGRAM) + bytes(10)))
    assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (36, 46)
    assert (found["exact_states"]["right"], found["exact_states"]["total"]) == (4, 6)
    assert found["exact_files"]["right"] == 0 and list(found["malformed"]) == ["too long"]
    assert found["worst_files"][0]["predicted"] == [0] * 9
    assert found["worst_files"][0]["state"] == 5 and "the program has ended" in text
    long = build(["INC A"] * 255 + ["HLT"], registers=range(26), memory_size=1024) + bytes(40)  # the longest legal file, and more
    (tmp_path / "data" / "x.bin").write_bytes(long)
    found, _ = evaluate(tmp_path, "--dir_path", "data", "--num_registers", 26, "--memory_size", 1024)
    assert found["worst_files"][0]["state"] == 257 and found["worst_files"][0]["predicted"] == [0] * 32


def test_a_zero_that_is_right_is_not_a_byte_that_is_missing(tmp_path):
    data = build(["HLT"], acc=0, registers=(0, 0, 0))
    found, _ = evaluate(tmp_path, *one_file(tmp_path, data[:-8]))
    assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (1, 9)


def test_files_too_short_are_counted_as_wrong(tmp_path):
    one_file(tmp_path, build(PROGRAM), "a.bin")
    one_file(tmp_path, b"", "empty.bin")
    one_file(tmp_path, build(PROGRAM)[:72], "short.bin")
    found, text = evaluate(tmp_path, *one_file(tmp_path, build(PROGRAM), ".hidden.bin"))
    assert (found["exact_files"]["right"], found["exact_files"]["total"]) == (1, 3)
    # what is not there of short.bin's states is wrong; of how many empty.bin would have, nobody knows
    assert (found["byte_accuracy"]["right"], found["byte_accuracy"]["total"]) == (36, 36 + 36)
    assert (found["exact_states"]["right"], found["exact_states"]["total"]) == (4, 4 + 4)
    assert "\n1 files have no whole program" in text
    assert found["malformed"]["no whole program"] == {"files": 1, "times": 1, "example": "data/empty.bin"}
    assert found["malformed"]["no whole initial state"] == {"files": 1, "times": 1, "example": "data/short.bin"}
    (tmp_path / "data" / "a.bin").unlink()
    message = mistake(tmp_path, 1, "--mode", "evaluate", *one_file(tmp_path, b"", "empty.bin"))
    assert "none of its 2 .bin files" in message and "--memory_size 64" in message


def test_random_bytes_are_evaluated(tmp_path):
    rng = random.Random(0)
    memories = [build(PROGRAM)[:64], rng.randbytes(64)]
    for i in range(40):
        one_file(tmp_path, memories[i % 2] + bytes([0, 1, 0, 0, 0, 0, 1, 2, 3]) + rng.randbytes(rng.randrange(300)), f"{i}.bin")
    one_file(tmp_path, rng.randbytes(700), "all.bin")
    found, _ = evaluate(tmp_path, *one_file(tmp_path, rng.randbytes(20000), "long.bin"))
    assert found["exact_files"]["total"] == 42 and found["byte_accuracy"]["share"] < 0.1
    assert {"too long", "unknown opcode", "no HLT"} <= set(found["malformed"])
    assert "PC and IR of the initial state are not 0" in found["malformed"]


def test_wrong_sizes_are_refused_not_scored(tmp_path):
    generate(tmp_path, *SMALL)
    message = mistake(tmp_path, 1, "--mode", "evaluate", "--num_registers", 2)
    assert "--num_registers 2" in message and "cpu_states.json" in message and "3" in message
    (tmp_path / "cpu_states" / "cpu_states.json").unlink()
    for option, wrong, right in (("num_registers", 2, 3), ("num_registers", 12, 3), ("memory_size", 32, 64), ("memory_size", 80, 64)):
        sizes = {"num_registers": 3, "memory_size": 64, option: wrong}
        message = mistake(tmp_path, 1, "--mode", "evaluate", *(f"--{name}={value}" for name, value in sizes.items()))
        assert f"--{option} {wrong}" in message and message.endswith("say --num_registers 3 --memory_size 64")
    message = mistake(tmp_path, 1, "--mode", "evaluate")  # the defaults
    assert "--num_registers 10 --memory_size 1024: does not fit" in message
    assert evaluate(tmp_path, "--num_registers", 3, "--memory_size", 64)[0]["exact_files"]["share"] == 1


@pytest.mark.parametrize("made, asked", [
    ((2, 512, 100, 128), (10, 1024)), ((2, 512, 100, 128), (2, 256)), ((10, 1024, 1, 255), (12, 1016)),
    ((2, 40, 2, 10), (4, 32)), ((5, 1024, 1, 1), (6, 1024)), ((10, 1024, 1, 1), (18, 1016)), ((3, 4, 1, 1), (3, 8)),
    ((10, 1024, 1, 255), (18, 1016)),
])  # fmt: skip
def test_sizes_that_are_both_wrong_are_refused(tmp_path, made, asked):
    registers, memory, shortest, longest = made
    generate(tmp_path, "--num_registers", registers, "--memory_size", memory, "--num_min_program", shortest,
             "--num_max_program", longest, "--num_train_instance", 60, "--num_test_instance", 0)  # fmt: skip
    options = ["--mode", "evaluate", "--dir_path", "cpu_states/train", "--num_registers", asked[0], "--memory_size", asked[1]]
    (tmp_path / "cpu_states" / "cpu_states.json").unlink()
    message = mistake(tmp_path, 1, *options)
    assert f"--num_registers {asked[0]} --memory_size {asked[1]}: does not fit" in message
    assert message.endswith(f"say --num_registers {registers} --memory_size {memory}")
    right = evaluate(tmp_path, *options[2:], "--num_registers", registers, "--memory_size", memory)[0]
    assert right["byte_accuracy"]["share"] == 1


@pytest.mark.parametrize("weak", [
    lambda d, M, S: d[: M + S] + d[M : M + S] + d[M + S :], lambda d, M, S: d[: M + 2 * S] + d[M + S :],
    lambda d, M, S: d[: M + S], lambda d, M, S: d[: M + S] + bytes(len(d) - M - S), lambda d, M, S: d + bytes(16),
    lambda d, M, S: d[: M + S] + d[M : M + S] * 9, lambda d, M, S: d[: M + S] + b"".join(d[i : i + S] * 2 for i in range(M + S, len(d), S)),
], ids=["initial state twice", "first state twice", "nothing", "zeros", "16 bytes more", "initial state ever more", "states twice"])  # fmt: skip
@pytest.mark.parametrize("sizes", [(2, 40, 2, 10), (10, 1024, 1, 255), (10, 1024, 1, 1), (2, 16, 1, 2)], ids=str)
def test_right_sizes_are_not_refused_for_a_weak_model(tmp_path, sizes, weak):
    registers, memory, shortest, longest = sizes
    rng = random.Random(0)
    options = ["--dir_path", "data", "--num_registers", str(registers), "--memory_size", str(memory)]
    for i in range(30):
        acc, values, lines = plain.draw(rng, registers, shortest, longest)
        one_file(tmp_path, weak(build(lines, acc, values, memory), memory, 6 + registers), f"{i}.bin")
    assert evaluate(tmp_path, *options)[0]["exact_files"] == {"right": 0, "total": 30, "share": 0, "low": 0, "high": pytest.approx(0.1135, abs=1e-4)}


def test_one_file_of_other_sizes_does_not_stop_the_rest(tmp_path):
    for i in range(20):
        one_file(tmp_path, build(["INC A"] * 16, acc=i), f"{i}.bin")  # no HLT: 16 instructions fill the memory
    (tmp_path / "data" / "odd.bin").write_bytes(build(PROGRAM, registers=(1, 2, 3, 4)))
    found, _ = evaluate(tmp_path, *one_file(tmp_path, build(PROGRAM)))
    assert (found["exact_files"]["right"], found["exact_files"]["total"]) == (21, 22)


def test_links_to_folders_are_followed_and_none_is_counted_twice(tmp_path):
    options = one_file(tmp_path, build(PROGRAM))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.bin").write_bytes(build(PROGRAM))
    (tmp_path / "data" / "link").symlink_to("../elsewhere")
    (tmp_path / "data" / "again").symlink_to("../data")
    assert evaluate(tmp_path, *options)[0]["exact_files"]["total"] == 2


def test_a_model_that_always_stops_a_state_early_is_scored(tmp_path):
    generate(tmp_path, *SMALL)
    for path in (tmp_path / "cpu_states").rglob("*.bin"):
        path.write_bytes(path.read_bytes()[:-9])
    found, _ = evaluate(tmp_path)
    files = found["exact_files"]["total"]
    assert found["exact_files"]["right"] == 0 and found["malformed"]["states missing"]["files"] == files
    assert found["exact_states"]["right"] == found["exact_states"]["total"] - files


def test_what_is_not_a_file_is_not_read(tmp_path):
    folder = tmp_path / "data"
    options = one_file(tmp_path, build(PROGRAM))
    (folder / "folder.bin").mkdir()
    (folder / "link.bin").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.bin")
    found, _ = evaluate(tmp_path, *options)
    assert found["malformed"]["unreadable"]["files"] == 1 and found["exact_files"]["total"] == 2


def test_percent_is_cut_off():
    assert cpu.share(0, 0)["share"] is None
    assert cpu.percent(99999999, 100000000) == "99.99" and cpu.percent(5, 5) == "100.00"


# ---------------------------------------------------------------------------------------------------------------
# Translate
# ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("change, byte, reason", [
    (lambda d: d[:30], 30, "inside the memory"), (lambda d: b"", 0, "inside the memory"),
    (lambda d: d[:70], 70, "before the initial state"), (lambda d: d[:64], 64, "before the initial state"),
    (lambda d: d[:85], 85, "inside state 2 (3 of 9 bytes)"), (lambda d: d[:82], 82, "after state 1 of 4"),
    (lambda d: d + b"abc", 109, "ends here"), (lambda d: d[:8] + b"\x63" + d[9:], 8, "unknown opcode in instruction 3"),
    (lambda d: d[:4] + bytes([13, 0, 0, 0]) + d[8:], 4, "operand missing"),
    (lambda d: d[:64] + b"\1" + d[65:], 64, "PC and IR of the initial state"),
    (lambda d: d[:20] + b"\2" + d[21:], 20, "memory after HLT"),
])  # fmt: skip
def test_translate_says_at_which_byte_a_file_is_malformed(tmp_path, change, byte, reason):
    text, errors = translate(tmp_path, change(build(PROGRAM)), status=1)
    assert f"malformed at byte {byte}: " in errors and reason in errors and errors.count("\n") == 1
    assert f"byte {byte}: " in text and ("LOADI 9" in text or byte == 0)


def test_translate_keeps_its_hands_off_other_files(tmp_path):
    one_file(tmp_path, build(PROGRAM))
    sizes = ["--mode", "translate", "--states_path", "data/x.bin", "--num_registers", "3", "--memory_size", "64"]
    before = snapshot(tmp_path)
    assert "is the file to translate" in mistake(tmp_path, 1, *sizes, "--output_path", "data/../data/x.bin")
    assert "is a folder" in mistake(tmp_path, 1, *sizes, "--output_path", "data")
    assert "cannot write to the folder" in mistake(tmp_path, 1, *sizes, "--output_path", "data/x.bin/x.txt")
    assert "there is no such file" in mistake(tmp_path, 1, "--mode", "translate")
    assert "is not a file" in mistake(tmp_path, 1, "--mode", "translate", "--states_path", "data")
    assert snapshot(tmp_path) == before
    assert run(tmp_path, *sizes, "--output_path", os.devnull).returncode == 0
    assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize("mode", ["translate", "evaluate"])
def test_a_pipe_closed_early_is_no_error(tmp_path, mode):
    options = one_file(tmp_path, build(["INC A"] * 15 + ["HLT"]))
    process = subprocess.Popen(command("--mode", mode, "--states_path", "data/x.bin", *options), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0 and "Error" not in errors and "Exception" not in errors


@pytest.mark.parametrize("stderr", ["reader gone", "closed", "full"])
def test_nobody_sees_the_progress_bar(tmp_path, stderr):
    gone, broken = os.pipe()
    os.close(gone)
    for arguments in (["generate", *SMALL], ["evaluate", "--json", "found.json"]):
        line = command("--mode", *arguments)
        if stderr == "closed":
            line = ["sh", "-c", 'exec "$@" 2>&-', "sh", *line]
        with open("/dev/full" if stderr == "full" else broken, "w", closefd=stderr == "full") as file:
            done = subprocess.run(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=file, timeout=60)
        assert done.returncode == 0 and done.stdout
    os.close(broken)
    assert json.loads((tmp_path / "found.json").read_text())["exact_files"]["share"] == 1


def test_a_full_disk_on_the_screens_side_loses_no_output(tmp_path):
    options = one_file(tmp_path, build(PROGRAM))
    for mode, output in (("translate", "--output_path"), ("evaluate", "--json")):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command("--mode", mode, "--states_path", "data/x.bin", *options, output, "out"), cwd=tmp_path,
                                  stdout=full, stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert done.returncode == 1 and said(done.stderr) == ["error: standard output: No space left on device"]
        assert (tmp_path / "out").read_text()
        (tmp_path / "out").unlink()
        assert said(run(tmp_path, "--mode", mode, "--states_path", "data/x.bin", *options, output, "/dev/full").stderr) == [
            "error: /dev/full: No space left on device"]  # fmt: skip


def test_outputs_go_into_a_pipe(tmp_path):
    options = one_file(tmp_path, build(PROGRAM))
    shown = run(tmp_path, "--mode", "evaluate", *options, "--json", "/dev/stdout")
    assert shown.returncode == 0 and json.loads(shown.stdout[shown.stdout.index("{\n") :])["exact_files"]["share"] == 1
    shown = run(tmp_path, "--mode", "translate", "--states_path", "data/x.bin", *options, "--output_path", "/dev/stdout")
    with open(tmp_path / "screen", "w") as file:  # the same where /dev/stdout is a file
        subprocess.run(shown.args, cwd=tmp_path, stdout=file, check=True)
    assert (tmp_path / "screen").read_text() == shown.stdout
    assert shown.returncode == 0 and shown.stdout == 2 * shown.stdout[: len(shown.stdout) // 2] and "LOADI 9" in shown.stdout


# ---------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    ("", "--mode"), ("--mode simulate", "--mode"), ("--mode generate --seed 3", "--seed"), ("--mode generate --random 3", "--random"),
    ("--mode generate --num_registers 27", "--num_registers 27: must be 1 to 26"),
    ("--mode generate --num_registers 0", "--num_registers 0: must be 1 to 26"),
    ("--mode generate --memory_size 18", "--memory_size 18: must be a multiple of 4"),
    ("--mode generate --memory_size 0", "--memory_size 0: must be a multiple of 4, from 4 to 1024"),
    ("--mode evaluate --memory_size 1028", "--memory_size 1028: must be a multiple of 4, from 4 to 1024"),
    ("--mode generate --memory_size 64 --num_max_program 17", "--num_max_program 17: must be 16 or less"),
    ("--mode generate --num_max_program 257", "--num_max_program 257: must be 256 or less"),
    ("--mode generate --num_min_program 9 --num_max_program 8", "--num_min_program 9: must be 1 to --num_max_program, which is 8"),
    ("--mode generate --num_min_program 0", "--num_min_program 0: must be 1 or more"),
    ("--mode generate --num_train_instance -5", "--num_train_instance -5: must be 0 or more"),
    ("--mode generate --num_train_instance 0 --num_test_instance 0", "--num_test_instance 0: one of them"),
    ("--mode generate --random_seed -1", "--random_seed -1: must be 0 or more"),
    ("--mode generate --num_train_instance 1e6", "--num_train_instance: invalid int value: '1e6'"),
])  # fmt: skip
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments.split())
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert snapshot(tmp_path) == {} and not (tmp_path / "cpu_states").exists()


def test_a_wrong_argument_as_a_user_sees_it(tmp_path):
    assert "--num_registers 27: must be 1 to 26" in mistake(tmp_path, 2, "--mode", "generate", "--num_registers", 27)
    assert snapshot(tmp_path) == {}


def test_wrong_places_are_one_line_and_status_1(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert "does not exist; it must be a folder" in mistake(tmp_path, 1, "--mode", "evaluate")
    assert "is a file; it must be a folder" in mistake(tmp_path, 1, "--mode", "evaluate", "--dir_path", "file")
    assert "there are no .bin files" in mistake(tmp_path, 1, "--mode", "evaluate", "--dir_path", "empty")
    assert "file" in mistake(tmp_path, 1, "--mode", "generate", "--dir_path", "file", *SMALL)
    assert "file" in mistake(tmp_path, 1, "--mode", "generate", "--dir_path", "file/deeper", *SMALL)
    options = one_file(tmp_path, build(PROGRAM))
    assert "is a folder; it must be a file" in mistake(tmp_path, 1, "--mode", "evaluate", *options, "--json", "empty")
    assert "--json: cannot write" in mistake(tmp_path, 1, "--mode", "evaluate", *options, "--json", "file/x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments, status, words", [
    (["--help"], 0, ""), (["--mode", "generate", "--num_registers", "27"], 2, "must be 1 to 26"),
    (["--mode", "evaluate"], 1, "error: --dir_path: 'cpu_states' does not exist"), (["--mode", "translate"], 1, "no such file"),
    (["--mode", "generate"], -signal.SIGINT, ""),
])  # fmt: skip
def test_mistakes_are_answered_before_numpy_loads_and_ctrl_c_is_quiet_while_it_does(tmp_path, arguments, status, words):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = run(tmp_path, *arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == status and words in result.stderr and result.stderr.count("\n") == (words != "")
    assert not (tmp_path / "cpu_states").exists()


def test_import_does_nothing(tmp_path):
    code = f"import importlib.util as u, sys; s = u.spec_from_file_location('c', {str(SCRIPT)!r}); s.loader.exec_module(u.module_from_spec(s))"
    code += "; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"") and snapshot(tmp_path) == {}
