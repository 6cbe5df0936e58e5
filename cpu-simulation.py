"""CPU states: the data on which bGPT learns to be a processor (arXiv 2402.19155, CPU state modelling).

    python cpu-simulation.py --mode generate     random programs and their states → DIR/train, DIR/test
    python cpu-simulation.py --mode translate    one .bin file as text
    python cpu-simulation.py --mode evaluate     how much of the .bin files in a folder is true

The machine: an accumulator ACC, registers A, B, C…, a program counter PC, an instruction register IR, and a
byte memory that holds the program, 4 bytes an instruction (opcode, then operands; registers count from 1, 0 is
"no operand"). There are no jumps. A step fetches IR and moves PC on, writes the state, then executes IR.

A .bin file:   [memory: memory_size bytes] [initial state] [state written by step 1] [by step 2] …
A state:       [PC] [ACC] [IR: 4 bytes] [registers]                     6 + num_registers bytes

Only what the assembler can write is executed. Any other instruction (unknown opcode, operands missing or too
many, a register past the last; HLT and LOADI are no exceptions) is malformed: it changes nothing and the run
goes on. A program without HLT ends after memory_size / 4 steps, each instruction once.

Dims in comments: B programs, T = memory_size / 4 instructions in memory, R = num_registers, S = 6 + R bytes in a
state, N steps of all programs together.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the modules below load ends the script, without a traceback

import argparse
import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

SIZES = {"num_registers": 10, "memory_size": 1024}  # defaults
STORED = ("num_registers", "memory_size", "num_min_program", "num_max_program", "num_train_instance",
          "num_test_instance", "random_seed")  # the options in cpu_states.json
LONGEST = 1024 + 258 * 32  # bytes of the longest legal file, and of one state more
BATCH = 512  # instances or files in one job
SMALL = 3000  # instances or files that are done sooner than worker processes start
SAMPLE = 64  # files that evaluate looks at to see whether the sizes fit them
WORST = 3  # files shown
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# ---------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------

# How an instruction with a given number of operands is wired: (destination, x, y), each 0 = ACC or 1–3 = operand.
# It does destination ← effect(x, y); SWAP also does y ← x.
UNARY = {0: (0, 0, 0), 1: (1, 1, 0)}
BINARY = {1: (0, 0, 1), 2: (1, 1, 2), 3: (3, 1, 2)}

# In the order of the opcodes from 0. Effects work on arrays of ints 0–255.
INSTRUCTIONS = {
    "HLT": ({0: (0, 0, 0)}, lambda x, y: x),
    "CLR": (UNARY, lambda x, y: 0 * x),
    "INC": (UNARY, lambda x, y: np.minimum(x + 1, 255)),
    "DEC": (UNARY, lambda x, y: np.maximum(x - 1, 0)),
    "SHL": (UNARY, lambda x, y: x << 1 & 255),
    "SHR": (UNARY, lambda x, y: x >> 1),
    "ROL": (UNARY, lambda x, y: (x << 1 | x >> 7) & 255),
    "ROR": (UNARY, lambda x, y: (x >> 1 | x << 7) & 255),
    "NOT": (UNARY, lambda x, y: 255 - x),
    "PUSH": ({1: (0, 1, 0)}, lambda x, y: x),
    "POP": ({1: (1, 0, 0)}, lambda x, y: x),
    "LOADI": ({1: (0, 1, 0)}, lambda x, y: x),  # its operand is a number, not a register
    "SWAP": ({1: (0, 0, 1), 2: (1, 1, 2)}, lambda x, y: y),
    "ADD": (BINARY, lambda x, y: np.minimum(x + y, 255)),
    "SUB": (BINARY, lambda x, y: np.maximum(x - y, 0)),
    "MUL": (BINARY, lambda x, y: np.minimum(x * y, 255)),
    "DIV": (BINARY, lambda x, y: np.where(y == 0, 255, x // np.maximum(y, 1))),
    "AND": (BINARY, lambda x, y: x & y),
    "OR": (BINARY, lambda x, y: x | y),
    "XOR": (BINARY, lambda x, y: x ^ y),
    "MOV": ({2: (1, 2, 0)}, lambda x, y: x),
}
NAMES = list(INSTRUCTIONS)
HLT, LOADI, SWAP = (NAMES.index(name) for name in ("HLT", "LOADI", "SWAP"))
FAULTS = ["", "unknown opcode", "operand missing", "too many operands", "register past the last"]


@functools.cache
def tables():
    """What `decode` and `simulate` look up: effects (21·65536,) uint8 by opcode << 16 | x << 8 | y; and by opcode << 3 |
    which of the three operands are not 0 (21 for any opcode past the last): faults (22·8,), wires (22·8, 3)."""
    x, y = np.arange(256)[:, None], np.arange(256)[None, :]
    effects = np.empty((len(NAMES), 256, 256), np.uint8)
    faults = np.full((len(NAMES) + 1, 8), FAULTS.index("unknown opcode"))
    wires = np.zeros((len(NAMES) + 1, 8, 3), np.intp)
    for opcode, (wirings, effect) in enumerate(INSTRUCTIONS.values()):
        effects[opcode] = effect(x, y)
        for there in range(8):
            given = [opcode == LOADI or there & 4, there & 2, there & 1]  # LOADI's number may be 0
            while given and not given[-1]:
                given.pop()
            if len(given) > max(wirings):
                faults[opcode, there] = FAULTS.index("too many operands")
            elif not all(given) or len(given) not in wirings:
                faults[opcode, there] = FAULTS.index("operand missing")
            else:
                faults[opcode, there] = 0
                wires[opcode, there] = wirings[len(given)]
    return effects.reshape(-1), faults.reshape(-1), wires.reshape(-1, 3)


def decode(instructions, num_registers):
    """Check instructions (N, 4) uint8. Returns opcodes (N,), wires (N, 3) and faults (N,), indices into FAULTS.
    Malformed ones come back as HLT without operands, which changes nothing."""
    _, faults, wires = tables()
    opcode = np.minimum(instructions[:, 0], len(NAMES)).astype(np.intp)
    a1, a2, a3 = instructions[:, 1], instructions[:, 2], instructions[:, 3]
    index = opcode << 3 | (a1 > 0) << 2 | (a2 > 0) << 1 | (a3 > 0)
    fault = faults[index]
    past = (a1 > num_registers) & (opcode != LOADI) | (a2 > num_registers) | (a3 > num_registers)
    fault[past & (fault == 0)] = FAULTS.index("register past the last")
    index[fault > 0] = HLT << 3
    return index >> 3, wires[index], fault


def simulate(memory, initial, num_registers):
    """Run B programs, all of them a step at a time (the machine of section 5 of the specification).

    memory (B, 4·T) uint8; initial (B, 1 + R) uint8: ACC and registers. Returns states (N, S) uint8, program after
    program; offsets (B + 1,): program b wrote states[offsets[b]:offsets[b + 1]]; faults (N,), indices into FAULTS,
    of the instruction that each step executes.
    """
    effects, *_ = tables()
    B, width = initial.shape  # width = 1 + R
    words = memory.view("<u4")  # (B, T), an instruction each
    T = words.shape[1]
    halts = words == 0  # (B, T); HLT is four zero bytes
    lengths = np.where(halts.any(axis=1), halts.argmax(axis=1) + 1, T)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    # Longest program first, then step by step: the programs still running at a step are the first `running` ones.
    order = np.argsort(-lengths, kind="stable")
    active = lengths[order] > np.arange(T)[:, None]  # (T, B)
    running = active.sum(axis=1)  # (T,)
    step, rank = np.nonzero(active)  # (N,) each
    fetched = words[order[rank], step].view(np.uint8).reshape(-1, 4)  # (N,) -> (N, 4)
    opcode, wires, fault = decode(fetched, num_registers)

    # One flat row of cells: ACC and registers of every program, the numbers 0–255 for LOADI, one cell to throw away.
    cells = np.concatenate([initial[order].reshape(-1), np.arange(256), [0]]).astype(np.intp)
    own = cells[: B * width].reshape(B, width)
    operands = fetched.copy()
    operands[:, 0] = 0  # ACC, in place of the opcode
    first = np.arange(0, 4 * len(rank), 4)  # (N,) of each step's operands in the flat ones
    target, x, y = (rank * width + operands.reshape(-1)[first + wires[:, i]] for i in range(3))
    loadi = np.flatnonzero(opcode == LOADI)
    x[loadi] = operands[loadi, 1] + np.intp(B * width)
    swapped = np.where(opcode == SWAP, y, len(cells) - 1)
    effect_of = opcode << 16

    rows = np.empty((len(rank), 5 + width), np.uint8)  # the states, step by step
    rows[:, 0] = np.minimum(step + 1, T - 1)
    rows[:, 2:6] = fetched
    end = 0
    for count in running[running > 0].tolist():
        now = slice(end, end + count)
        end += count
        rows[now, 1] = own[:count, 0]
        rows[now, 6:] = own[:count, 1:]
        x_value = cells[x[now]]
        cells[target[now]] = effects[effect_of[now] | x_value << 8 | cells[y[now]]]
        cells[swapped[now]] = x_value

    place = offsets[order[rank]] + step  # (N,) from step by step to program by program
    states, faults = np.empty_like(rows), np.empty_like(fault)
    states[place], faults[place] = rows, fault
    return states, offsets, faults


@functools.cache
def assembly(word):
    """The assembly line of an instruction given as a little-endian int: 0x02010D → "ADD A B". An unknown opcode or
    register is written as #number, and an operand left out before another as #0."""
    opcode, *operands = word.to_bytes(4, "little")
    name = NAMES[opcode] if opcode < len(NAMES) else f"#{opcode}"
    while operands and not operands[-1]:
        operands.pop()
    letters = [chr(64 + a) if 1 <= a <= 26 else f"#{a}" for a in operands]
    if opcode == LOADI:
        letters[:1] = [str(operands[0] if operands else 0)]
    return " ".join([name, *letters])


# ---------------------------------------------------------------------------------------------------------------
# Worker processes and files
# ---------------------------------------------------------------------------------------------------------------


def set_up_worker():
    """In a new worker: a parent that was killed takes it along."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_jobs(jobs, num_workers):
    """Run jobs (key, function, *arguments) and yield their results in order. Jobs with the same key modulo
    num_workers run one after another in one process. num_workers 0: all in this process."""
    if num_workers == 0:
        for _, function, *arguments in jobs:
            yield function(*arguments)
        return
    spawn = multiprocessing.get_context("spawn")  # the one start method that is safe everywhere
    pools = [ProcessPoolExecutor(1, spawn, initializer=set_up_worker) for _ in range(num_workers)]
    pending = collections.deque()
    try:
        with signals_held_back():
            for pool in pools:
                pool.submit(os.getpid)  # starts the worker
        for key, function, *arguments in jobs:
            pending.append(pools[key % num_workers].submit(function, *arguments))
            # As many as keep the workers busy, and no more: memory stays flat.
            while pending and (pending[0].done() or len(pending) > 4 * num_workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def signals_held_back():
    """Ctrl-C and SIGTERM wait until the end of the block, and the processes that start in it never get them."""
    received = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # is inherited; but here, another thread may take the signal
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received[:1]:
        signal.raise_signal(number)


def write_whole(path, data, part):
    """Write bytes to path by way of the file `part` in the same folder: at any moment of a kill or a full disk, path
    holds all of them or what it held before."""
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError):  # name the file that the user knows
            raise OSError(error.errno, error.strerror, path) from None
        raise


def check_output(option, path):
    """Refuse, before any work, a path that cannot be written."""
    folder, name = os.path.split(os.path.realpath(path))  # through a link, not over it
    if not path or os.path.isdir(path):
        raise SystemExit(f"{option} {path}: is a folder; it must be a file")
    if name == "cpu_states.json":
        raise SystemExit(f"{option} {path}: that name is for the options of a data set; give another")
    if is_stream(path):
        folder = path
    elif not os.path.isdir(folder):
        raise SystemExit(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"{option} {path}: {folder} is not writable")


def own_descriptor(path):
    """The number of this process's own open file that a path such as /dev/stdout or /dev/fd/3 stands for, or None."""
    found = re.fullmatch(r"/dev/(stdout|stderr|fd/(\d+))", os.path.abspath(path))
    return found and int(found[2] or ("stdout", "stderr").index(found[1]) + 1)


def is_stream(path):
    """Whether a path leads to a pipe, a terminal or the like, which can only be written into, not replaced."""
    return own_descriptor(path) is not None or os.path.exists(path) and not os.path.isfile(path)


def write_output(path, text):
    """Write a text that the user asked for."""
    if is_stream(path):
        own = own_descriptor(path)
        try:
            # to go on where its last writer was, an own file needs a copy of its descriptor: its path would start anew
            with open(path if own is None else os.dup(own), "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    else:
        path = os.path.realpath(path)
        write_whole(path, text.encode(), os.path.join(os.path.dirname(path), f".part-{os.getpid()}"))


def show(text):
    """Print a text; a reader such as `| head` may have seen enough of it."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from None


def progress(total, unit):
    return tqdm(total=total, unit=unit, unit_scale=total >= 10_000)


class Unstoppable:
    """A text stream whose reader may be gone, as stderr's in `2>&1 | head`: what it would have shown is lost."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()


def stored_options(folder, levels):
    """The options in FOLDER/cpu_states.json, or in that of one of `levels` folders above. Returns (dict, its path),
    or ({}, None) where there is none."""
    folder = os.path.abspath(folder)
    for _ in range(levels + 1):
        path = os.path.join(folder, "cpu_states.json")
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    options = json.load(file)
                if isinstance(options, dict) and all(type(options.get(name)) is int for name in STORED):
                    return options, path
            except (ValueError, RecursionError):  # not UTF-8, not JSON
                pass
            raise SystemExit(f"{path}: is damaged; it must hold the options of the data set as JSON")
        folder = os.path.dirname(folder)
    return {}, None


def settle_sizes(args, folder):
    """Fill in num_registers and memory_size: from the command line, else from cpu_states.json, else the defaults."""
    stored, path = stored_options(folder, 2)
    for name, default in SIZES.items():
        given = getattr(args, name)
        if path and given is not None and stored[name] != given:
            raise SystemExit(f"--{name} {given}: {path} says that these files have {stored[name]}")
        setattr(args, name, given if given is not None else stored.get(name, default))
    wrong = wrong_size(args)
    if wrong:
        raise SystemExit(f"{path}: {wrong}")
    return path


# ---------------------------------------------------------------------------------------------------------------
# Generate
# ---------------------------------------------------------------------------------------------------------------

def draw(rng, count, args):
    """Draw `count` instances: memory (count, memory_size) uint8 and initial (count, 1 + R) uint8.

    The numbers are those of rng.randint and rng.choice. Both take n.bit_length() bits, again and again until they are
    below n; that loop is written out here, as the calls would cost several times as much. A choice from one draws too.
    """
    bits = rng.getrandbits
    R, span = args.num_registers, args.num_max_program - args.num_min_program + 1
    R_bits, span_bits = R.bit_length(), span.bit_length()
    counts = [(min(wires), len(wires), len(wires).bit_length()) for wires, _ in INSTRUCTIONS.values()]
    initial, words, lengths = [], [], []
    for _ in range(count):
        for _ in range(1 + R):
            value = bits(9)
            while value > 255:
                value = bits(9)
            initial.append(value)
        length = bits(span_bits)
        while length >= span:
            length = bits(span_bits)
        length += args.num_min_program
        lengths.append(length)
        for _ in range(length - 1):
            opcode = bits(5)  # of the 20 after HLT
            while opcode > 19:
                opcode = bits(5)
            opcode += 1
            if opcode == LOADI:
                value = bits(9)
                while value > 255:
                    value = bits(9)
                words.append(opcode | value << 8)
                continue
            fewest, choices, choices_bits = counts[opcode]
            operands = bits(choices_bits)
            while operands >= choices:
                operands = bits(choices_bits)
            word, shift = opcode, 8
            for _ in range(fewest + operands):
                register = bits(R_bits)
                while register >= R:
                    register = bits(R_bits)
                word |= register + 1 << shift
                shift += 8
            words.append(word)
        words.append(HLT)
    memory = np.zeros((count, args.memory_size // 4), "<u4")
    memory[np.arange(memory.shape[1]) < np.array(lengths)[:, None]] = words
    return memory.view(np.uint8), np.array(initial, np.uint8).reshape(count, 1 + R)


def write_instances(folder, memory, initial, num_registers):
    """Run and write some instances, a later one over an earlier one of the same program. Returns how many."""
    states, offsets, _ = simulate(memory, initial, num_registers)
    first = np.zeros((len(memory), 6 + num_registers), np.uint8)  # PC 0, IR zeros
    first[:, 1], first[:, 6:] = initial[:, 0], initial[:, 1:]
    words = memory.view("<u4")
    rows = {}
    for row, length in enumerate(np.diff(offsets)):
        text = "".join(map(assembly, words[row, :length].tolist()))
        rows[hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()] = row
    part = os.path.join(folder, f".part-{os.getpid()}")
    for name, row in rows.items():
        data = memory[row].tobytes() + first[row].tobytes() + states[offsets[row] : offsets[row + 1]].tobytes()
        write_whole(os.path.join(folder, f"{name}.bin"), data, part)
    return len(memory)


def generate_jobs(args, folders, num_workers):
    """All instances, drawn in order, as jobs for `run_jobs`. A program always goes to the same worker, so that of two
    instances that share a file the later one is written later."""
    rng = random.Random(args.random_seed)
    shares = max(num_workers, 1)
    for folder, total in zip(folders, (args.num_train_instance, args.num_test_instance)):
        for start in range(0, total, BATCH * shares):
            memory, initial = draw(rng, min(BATCH * shares, total - start), args)
            share = memory.view("<u4").sum(axis=1, dtype=np.int64) % shares
            for worker in range(shares):
                mine = share == worker
                if mine.any():
                    yield worker, write_instances, folder, memory[mine], initial[mine], args.num_registers


def claim(args, folders):
    """Make DIR, DIR/train and DIR/test this data set's: refuse a folder that holds another or is being written to,
    keep the options in DIR/cpu_states.json, and sweep what a killed run has left. Returns what to hold open."""
    os.makedirs(args.dir_path, exist_ok=True)
    lock = os.open(args.dir_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"--dir_path {args.dir_path}: another run is writing to it") from None
    except OSError:  # a file system without locks
        pass
    options = {name: getattr(args, name) for name in STORED}
    stored, path = stored_options(args.dir_path, 0)
    other = [f"{name} {stored.get(name)}, not {options[name]}" for name in STORED if stored.get(name) != options[name]]
    if path and other:
        raise SystemExit(f"--dir_path {args.dir_path}: holds a data set with {', '.join(other)}; "
                         "give another folder, or delete this one first")
    leftovers = []
    for folder in (args.dir_path, *filter(os.path.isdir, folders)):
        with os.scandir(folder) as entries:
            for entry in entries:
                if not path and entry.name.endswith(".bin"):
                    raise SystemExit(f"--dir_path {args.dir_path}: {folder} already holds .bin files, and no cpu_states.json "
                                     "says with which options; give another folder, or delete this one first")
                if re.fullmatch(r"\.part-\d+", entry.name) and entry.is_file():
                    leftovers.append(entry.path)
    for leftover in leftovers:
        with contextlib.suppress(FileNotFoundError):  # a worker that outlived a killed run by a moment has finished it
            os.remove(leftover)
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    if not path:
        write_output(os.path.join(args.dir_path, "cpu_states.json"), json.dumps(options, indent=1) + "\n")
    return lock


def generate(args):
    """Write the data set of a seed: byte for byte the published generator's."""
    folders = [os.path.join(args.dir_path, name) for name in ("train", "test")]
    total = args.num_train_instance + args.num_test_instance
    num_workers = available_cores() if total > SMALL else 0
    lock = claim(args, folders)
    began = time.monotonic()
    with progress(total, " instances") as bar:
        with contextlib.closing(run_jobs(generate_jobs(args, folders, num_workers), num_workers)) as results:
            for written in results:
                bar.update(written)
    seconds = time.monotonic() - began
    os.close(lock)
    files = [sum(entry.name.endswith(".bin") for entry in os.scandir(folder)) for folder in folders]
    show(f"{args.dir_path}: {args.num_train_instance:,} training and {args.num_test_instance:,} test instances in "
         f"{files[0]:,} + {files[1]:,} files (one program, one file), {seconds:.1f} s, {total / seconds:,.0f} instances/s")


# ---------------------------------------------------------------------------------------------------------------
# Translate
# ---------------------------------------------------------------------------------------------------------------


def heading(num_registers):
    """The column heads over `row`."""
    heads = ["PC", "ACC", "IR", "", "", "", *(chr(65 + i) for i in range(num_registers))]
    return "".join(f"{head:>4} " for head in heads).rstrip()


def row(state, other):
    """One state (S bytes) as a line of numbers, * behind those that differ from `other`; bytes may be missing."""
    return "".join(f"{value:>4}{'*' if other[i] != value else ' '}" for i, value in enumerate(state)).rstrip()


def describe(data, num_registers, memory_size):
    """A .bin file's bytes as (lines of text, [(byte, what is wrong there), …])."""
    S, wrong = 6 + num_registers, []
    program = data[:memory_size]
    words = [program[i : i + 4] for i in range(0, len(program) - 3, 4)]
    length = words.index(bytes(4)) + 1 if bytes(4) in words else len(words)
    *_, faults = decode(np.frombuffer(b"".join(words[:length]), np.uint8).reshape(-1, 4), num_registers)
    text = [assembly(int.from_bytes(word, "little")) for word in words]
    lines = ["program"]
    for i in range(length):
        lines.append(f"{i + 1:5}  {text[i]}" + (f"    <- {FAULTS[faults[i]]}, has no effect" if faults[i] else ""))
        if faults[i]:
            wrong.append((4 * i, f"{FAULTS[faults[i]]} in instruction {i + 1} ({text[i]})"))
    unreached = [i for i in range(length, len(words)) if any(words[i])]
    lines += [f"{i + 1:5}  {text[i]}    <- after HLT, never reached" for i in unreached]
    if unreached:
        wrong.append((4 * unreached[0], "memory after HLT that is not 0"))
    if len(program) < memory_size:
        return lines, [*wrong, (len(data), f"the file ends inside the memory of {memory_size} bytes")]
    if bytes(4) not in words:
        wrong.append((memory_size, "the program has no HLT"))

    states = [data[i : i + S] for i in range(memory_size, len(data), S)]
    if not states or len(states[0]) < S:
        wrong.append((len(data), f"the file ends before the initial state of {S} bytes does"))
    elif states[0][0] or any(states[0][2:6]):
        wrong.append((memory_size, "PC and IR of the initial state are not 0"))
    for i, state in enumerate(states):
        fetched = [assembly(int.from_bytes(part[2:6], "little")) for part in states[max(i - 1, 0) : i + 1]]
        after = "initial" if i == 0 else f"fetched {fetched[1]}" if i == 1 else f"after {fetched[0]}, fetched {fetched[1]}"
        lines += ["", f"state {i}   {after if len(state) >= 6 else ''}".rstrip(), heading(num_registers),
                  row(state, states[i - 1] if i else state)]
        if i and len(state) < S:
            wrong.append((len(data), f"the file ends inside state {i} ({len(state)} of {S} bytes)"))
    end = memory_size + S * (length + 1)
    if states and len(data) > end:
        wrong.append((end, f"the program's last state, {length}, ends here, the file only {len(data) - end:,} bytes later"))
    elif 0 < len(states) <= length and len(states[-1]) == S:
        wrong.append((len(data), f"the file ends after state {len(states) - 1} of {length}"))
    return lines, sorted(wrong)


def translate(args):
    """Write one .bin file as text, to the screen and to args.output_path."""
    if not os.path.isfile(args.states_path):
        kind = "is not a file" if os.path.exists(args.states_path) else "there is no such file"
        raise SystemExit(f"--states_path {args.states_path}: {kind}; it must be a .bin file")
    settle_sizes(args, os.path.dirname(os.path.abspath(args.states_path)))
    check_output("--output_path", args.output_path)
    if os.path.exists(args.output_path) and os.path.samefile(args.states_path, args.output_path):
        raise SystemExit(f"--output_path {args.output_path}: is the file to translate; give another")
    with open(args.states_path, "rb") as file:
        data = file.read()
    lines, wrong = describe(data, args.num_registers, args.memory_size)
    title = (f"{printable(args.states_path)}: {len(data):,} bytes, {args.num_registers} registers, "
             f"{args.memory_size} bytes of memory; * marks what a step changed")
    text = "\n".join([title, "", *lines, *(f"byte {byte}: {what}" for byte, what in wrong)])
    try:
        show(text)
    finally:
        write_output(args.output_path, text + "\n")
    if not wrong:
        return
    more = f" (and {len(wrong) - 1} more, listed above)" if len(wrong) > 1 else ""
    raise SystemExit(f"{printable(args.states_path)}: malformed at byte {wrong[0][0]}: {wrong[0][1]}{more}")


# ---------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------


def find_files(folder):
    """Every .bin file below folder, hidden files and folders aside, in sorted order. Links are followed, and no folder is
    walked twice."""

    def fail(error):
        raise error

    found, seen = [], set()
    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            found += [os.path.join(path, name) for name in sorted(names) if name.endswith(".bin") and name[0] != "."]
        seen.add(real)
    return found


def read_file(path):
    """A file's first LONGEST bytes, and how many it has; no bytes and -1 where it cannot be read."""
    try:
        if os.path.isfile(path):  # a pipe would never end
            with open(path, "rb") as file:
                return file.read(LONGEST), os.fstat(file.fileno()).st_size
    except OSError:
        pass
    return b"", -1


def fits(data, num_registers, memory_size):
    """Whether a file's memory and first states, up to three, are where these sizes put them, by what no program changes:
    zeros after HLT, PC and IR, ACC and registers of the first two states, and the end if it is among these."""
    size, T = 6 + num_registers, memory_size // 4
    first, second, third = (data[start : start + size] for start in range(memory_size, memory_size + 3 * size, size))

    def fetched(state, step):
        return state[:1] + state[2:6] == bytes([min(step, T - 1)]) + data[4 * step - 4 : 4 * step]

    if first[:1] + first[2:6] != bytes(5) or not fetched(second, 1) or first[1:2] + first[6:] != second[1:2] + second[6:]:
        return False
    program = [data[i : i + 4] for i in range(0, memory_size, 4)]
    length = program.index(bytes(4)) + 1 if bytes(4) in program else T
    ends = fetched(third, 2) if length > 1 else len(data) == memory_size + 2 * size
    return ends and not any(map(any, program[length:]))


def check_sizes(paths, args):
    """Refuse to score with sizes that most of the files, of a sample, were clearly not made with."""
    heads = [read_file(path)[0] for path in paths[:: math.ceil(len(paths) / SAMPLE)]]

    def count(sizes):
        return sum(fits(head, *sizes) for head in heads)

    if 2 * count((args.num_registers, args.memory_size)) > len(heads):
        return
    sizes = max(((R, size) for R in range(1, 27) for size in range(4, 1025, 4)), key=count)
    if 2 * count(sizes) > len(heads):
        raise SystemExit(f"--num_registers {args.num_registers} --memory_size {args.memory_size}: does not fit the files in "
                         f"{args.dir_path}; {count(sizes)} of {len(heads)} looked at say --num_registers {sizes[0]} "
                         f"--memory_size {sizes[1]}")


def new_tally(memory_size):
    """Counts that add up. For bytes and states: sums over the files of [right, all, right², right·all, all²]; for files:
    [right, all]; how many have a whole program; for each opcode (the last for malformed instructions): [steps, right
    bytes, right states, executed, executed right]; for each position: [states, right bytes, right states]."""
    return {
        "bytes": np.zeros(5), "states": np.zeros(5), "files": np.zeros(2, np.int64), "programs": 0, "long_enough": 0,
        "opcodes": np.zeros((len(NAMES) + 1, 5), np.int64), "positions": np.zeros((memory_size // 4, 3), np.int64),
        "malformed": {}, "worst": [],
    }


def note(tally, reason, files, times, example):
    """Count files that are malformed in one way, so many times in all; the first of them is the example."""
    entry = tally["malformed"].setdefault(reason, {"files": 0, "times": 0, "example": example})
    entry["files"] += files
    entry["times"] += times


def note_all(tally, reasons, paths):
    """Count what is malformed in files, from {reason: how many times in each, (B,)}."""
    for reason, times in reasons.items():
        if times.any():
            note(tally, reason, int(np.count_nonzero(times)), int(times.sum()), paths[(times > 0).argmax()])


def add_worst(tally, worst):
    """Keep the WORST files of those in the tally and these."""
    tally["worst"] = sorted(tally["worst"] + worst, key=lambda entry: (entry["accuracy"], entry["path"]))[:WORST]


def add(tally, other):
    """Add a later tally to an earlier one."""
    for name in ("bytes", "states", "files", "programs", "long_enough", "opcodes", "positions"):
        tally[name] += other[name]
    for reason, entry in other["malformed"].items():
        note(tally, reason, **entry)
    add_worst(tally, other["worst"])


def evaluate_files(paths, num_registers, memory_size):
    """Compare files with the truth that their own program and initial state have; returns a tally. Where the initial
    state is not whole, every true byte after it is missing and wrong; where the program is not, nobody knows how many."""
    S, T = 6 + num_registers, memory_size // 4
    begin = memory_size + S
    tally = new_tally(memory_size)
    tally["files"][1] = len(paths)
    data, whole = zip(*map(read_file, paths))  # B each: the first bytes, the size
    reasons = {"unreadable": np.array(whole) < 0, "no whole program": (np.array(whole) >= 0) & (np.array(whole) < memory_size)}
    note_all(tally, reasons, paths)
    known = [b for b in range(len(paths)) if whole[b] >= memory_size]
    if not known:
        return tally
    paths, data, whole = ([column[b] for b in known] for column in (paths, data, whole))

    heads = np.frombuffer(b"".join(part[:begin].ljust(begin, b"\0") for part in data), np.uint8).reshape(-1, begin)
    memory, first = np.ascontiguousarray(heads[:, :memory_size]), heads[:, memory_size:]  # (B, 4·T), (B, S)
    initial = np.concatenate([first[:, 1:2], first[:, 6:]], axis=1)
    states, offsets, faults = simulate(memory, initial, num_registers)
    lengths, starts = np.diff(offsets), offsets[:-1]  # (B,) each

    # What the files say, cut or filled to the length of the truth, and whether each byte is in the file at all.
    claims = b"".join(part[begin : begin + n * S].ljust(n * S, b"\0") for part, n in zip(data, lengths.tolist()))
    sizes = np.array(whole) - begin  # (B,) bytes after the initial state
    place = np.arange(len(states)) - np.repeat(starts, lengths)  # (N,) 0 at each file's first step
    there = place[:, None] * S + np.arange(S) < np.repeat(sizes, lengths)[:, None]  # (N, S)
    right = (np.frombuffer(claims, np.uint8).reshape(-1, S) == states) & there
    exact, good = right.all(axis=1), right.sum(axis=1)  # (N,) each
    extra = np.maximum(sizes - lengths * S, 0)  # (B,) bytes beyond the true end: all wrong
    good_bytes, all_bytes = np.add.reduceat(good, starts), lengths * S + extra  # (B,) each
    good_states, all_states = np.add.reduceat(exact, starts, dtype=np.int64), lengths + -(-extra // S)

    tally["files"][0] = (good_bytes == all_bytes).sum()
    tally["programs"], tally["long_enough"] = len(paths), int((sizes >= 0).sum())
    for name, x, n in (("bytes", good_bytes, all_bytes), ("states", good_states, all_states)):
        x, n = x.astype(float), n.astype(float)
        tally[name] += [x.sum(), n.sum(), x @ x, x @ n, n @ n]

    # An instruction shows in the state after the one that its step writes. It was executed right or wrong only where
    # ACC and registers were right before it, and where that next state is in the file.
    result = np.delete(right, [0, 2, 3, 4, 5], axis=1).all(axis=1)  # (N,) ACC and registers
    has_next = np.append(there[1:, -1], False)
    has_next[offsets[1:] - 1] = False
    executed = result & has_next
    executed_right = executed & np.append(result[1:], False)
    opcode = np.where(faults == 0, states[:, 2], len(NAMES)).astype(np.intp)
    for i, column in enumerate((np.ones_like(good), good, exact, executed, executed_right)):
        tally["opcodes"][:, i] = np.bincount(opcode, column, len(NAMES) + 1)
        if i < 3:
            tally["positions"][:, i] = np.bincount(place, column, T)

    cut_off = (sizes >= 0) & (sizes < lengths * S)
    after_hlt = (memory.view("<u4") != 0) & (np.arange(T) >= lengths[:, None])  # (B, T)
    reasons = {
        "no whole initial state": sizes < 0,
        "PC and IR of the initial state are not 0": first[:, [0, 2, 3, 4, 5]].any(axis=1),
        **{FAULTS[i]: np.add.reduceat(faults == i, starts, dtype=np.int64) for i in range(1, len(FAULTS))},
        "no HLT": states[offsets[1:] - 1, 2:6].any(axis=1),
        "memory after HLT is not 0": after_hlt.any(axis=1),
        "too long": extra > 0,
        "ends inside a state": cut_off & (sizes % S > 0),
        "states missing": cut_off & (sizes % S == 0),
    }
    note_all(tally, reasons, paths)
    accuracy = (good_bytes / all_bytes).tolist()
    wrong = [b for b in range(len(paths)) if accuracy[b] < 1]
    for b in sorted(wrong, key=lambda b: (accuracy[b], paths[b]))[:WORST]:
        steps = slice(offsets[b], offsets[b + 1])
        add_worst(tally, [first_wrong(paths[b], accuracy[b], states[steps], exact[steps], data[b][begin:])])
    return tally


def first_wrong(path, accuracy, states, exact, claimed):
    """A file's first wrong state: as it must be (nothing where the program has ended) and as the file has it (nothing
    where that has ended), from its true states (n, S), which of them are in it (n,), and its bytes after the initial state."""
    n, S = states.shape
    i = int(np.append(exact, False).argmin())
    return {
        "path": path, "accuracy": accuracy, "state": i + 1, "states": n,
        "expected": states[i].tolist() if i < n else [], "predicted": list(claimed[i * S : i * S + S]),
        "after": assembly(int.from_bytes(states[i - 1, 2:6].tobytes(), "little")) if i else "",
    }


def share(right, total):
    """A share as a dict of plain numbers (null where there is nothing)."""
    return {"right": int(right), "total": int(total), "share": right / total if total else None}


def independent_draws(sums, files):
    """How many single draws at random, right or wrong, would give a share as much spread as one of `files` files has, from
    its sums [right, all, right², right·all, all²]. It is files that are drawn at random: their bytes are right or wrong
    together. Where none has an error, or nothing but errors, their spread is unknown, and each counts as one draw. Kinds of
    files that are too rare to be among these are unknown, too."""
    right, total, right_right, right_all, all_all = sums.tolist()
    p = right / total
    squares = right_right - 2 * p * right_all + p * p * all_all  # of what the files are off the common share
    if right in (0, total) or files == 1 or squares < 1e-9 * all_all:
        return files
    student = 1 + 1.21 / (files - 1)  # Student's quantile by the normal one, about: 1.21 = (1.96² + 1) / 4
    return min(p * (1 - p) * total**2 / (squares * files / (files - 1) * student**2), total)


def interval(p, draws):
    """95 % interval of a share p of so many independent draws (Wilson, 1927)."""
    z = 1.959964
    middle, half = p + z * z / (2 * draws), z * math.sqrt(p * (1 - p) / draws + z * z / (4 * draws * draws))
    low, high = ((middle + sign * half) / (1 + z * z / draws) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def percent(right, total):
    """In percent, two digits, cut off and not rounded: 100.00 is all of them."""
    return f"{int(right) * 10000 // int(total) / 100:.2f}" if total else "-"


def report(tally, args):
    """What evaluate found, as (lines of text, a dict for JSON)."""
    S = 6 + args.num_registers
    found = {
        "dir_path": printable(args.dir_path), "num_registers": args.num_registers, "memory_size": args.memory_size,
        "opcodes": {}, "positions": [], "worst_files": [], "malformed": {},
    }
    lines = []
    for name, unit in (("byte_accuracy", "bytes"), ("exact_states", "states"), ("exact_files", "files")):
        right, total = map(int, tally[unit][:2])
        files = tally["files"][1] if unit == "files" else tally["programs"]
        low, high = interval(right / total, files if unit == "files" else independent_draws(tally[unit], files))
        found[name] = {**share(right, total), "low": low, "high": high}
        lines.append(f"{name.replace('_', ' '):<13} {percent(right, total):>6} %  (95 % interval {math.floor(1e4 * low) / 100:.2f}"
                     f" - {math.ceil(1e4 * high) / 100:.2f} %, {right:,} of {total:,} {unit})")

    unknown = int(tally["files"][1]) - tally["programs"]
    if unknown:
        lines.append(f"{unknown:,} files have no whole program: they are wrong files, and of bytes and states nobody knows how many")

    rows = []
    for name, (steps, good, exact, executed, done) in zip([*NAMES, "(malformed)"], tally["opcodes"].tolist()):
        if steps:
            found["opcodes"][name] = {"steps": steps, "executed": share(done, executed),
                                      "byte_accuracy": share(good, steps * S), "exact_states": share(exact, steps)}
            rows.append((done / executed if executed else math.inf, good / steps,  # inf: what was never executed comes last
                         f"{name:<12} {steps:>12,} {percent(done, executed):>10} {percent(good, steps * S):>8} "
                         f"{percent(exact, steps):>8}"))
    lines += ["", "opcodes, worst first: executed = ACC and registers right in the next state, of the steps that began with",
              "them right; bytes and states = right in the state that the step itself writes",
              f"{'opcode':<12} {'steps':>12} {'executed %':>10} {'bytes %':>8} {'states %':>8}"]
    lines += [line for *_, line in sorted(rows)]

    table = tally["positions"]
    for position, (steps, good, exact) in enumerate(table.tolist(), 1):
        if steps:
            found["positions"].append({"position": position, "states": steps, "byte_accuracy": share(good, steps * S),
                                       "exact_states": share(exact, steps)})
    lines += ["", "position in the program (state written by that step)",
              f"{'position':<12} {'states':>12} {'':10} {'bytes %':>8} {'states %':>8}"]
    low = 1
    while low <= len(table) and table[low - 1, 0]:  # 1, 2, 3-4, 5-8, 9-16, …
        high = min(2 * (low - 1) or 1, len(table))
        steps, good, exact = table[low - 1 : high].sum(axis=0).tolist()
        name = f"{low}-{high}" if high > low else f"{low}"
        lines.append(f"{name:<12} {steps:>12,} {'':10} {percent(good, steps * S):>8} {percent(exact, steps):>8}")
        low = high + 1

    if tally["worst"]:
        lines += ["", "worst files, first wrong state of each (* marks a wrong byte)"]
    for worst in tally["worst"]:
        found["worst_files"].append({**worst, "path": printable(worst["path"])})
        expected, predicted = worst["expected"], worst["predicted"]
        where = f"state {worst['state']} of {worst['states']}" + (f", after {worst['after']}" if worst["after"] else "")
        nothing = "nothing: the program has ended"
        lines += [f"{printable(worst['path'])}: {100 * worst['accuracy']:.2f} % of its bytes right, {where}",
                  f"            {heading(args.num_registers)}",
                  f"  expected  {row(expected, expected) if expected else nothing}",
                  f"  predicted {row(predicted, expected or [None] * len(predicted)) or 'nothing: the file has ended'}"]

    if tally["malformed"]:
        lines += ["", "malformed"]
    for reason, entry in sorted(tally["malformed"].items(), key=lambda item: (-item[1]["files"], item[0])):
        found["malformed"][reason] = {**entry, "example": printable(entry["example"])}
        times = f" ({entry['times']:,} instructions)" if reason in FAULTS else ""
        lines.append(f"{entry['files']:>12,} files: {reason}{times}, e.g. {printable(entry['example'])}")
    return lines, found


def evaluate(args):
    """Print how much of the .bin files below args.dir_path is what their programs really do."""
    if not os.path.isdir(args.dir_path):
        kind = "is not a folder" if os.path.exists(args.dir_path) else "there is no such folder"
        raise SystemExit(f"--dir_path {args.dir_path}: {kind}; it must be a folder with .bin files")
    source = settle_sizes(args, args.dir_path)
    if args.json is not None:
        check_output("--json", args.json)
    paths = find_files(args.dir_path)
    if not paths:
        raise SystemExit(f"--dir_path {args.dir_path}: there are no .bin files in it")
    num_workers = available_cores() if len(paths) > SMALL else 0
    if not source:
        check_sizes(paths, args)
    jobs = ((i, evaluate_files, paths[i * BATCH : (i + 1) * BATCH], args.num_registers, args.memory_size)
            for i in range(math.ceil(len(paths) / BATCH)))
    tally = new_tally(args.memory_size)
    with progress(len(paths), " files") as bar:
        with contextlib.closing(run_jobs(jobs, num_workers)) as results:
            for part in results:
                add(tally, part)
                bar.update(int(part["files"][1]))
    if not tally["long_enough"]:
        raise SystemExit(f"--dir_path {args.dir_path}: none of its {len(paths):,} .bin files has the {args.memory_size} + "
                         f"{6 + args.num_registers} bytes that --memory_size {args.memory_size} and --num_registers "
                         f"{args.num_registers} ask for, e.g. {printable(paths[0])}")
    lines, found = report(tally, args)
    sizes = f"{args.num_registers} registers, {args.memory_size} bytes of memory" + (f" (from {source})" if source else "")
    try:
        show("\n".join([*lines, "", f"{len(paths):,} files in {printable(args.dir_path)}, {sizes}"]))
    finally:
        if args.json is not None:
            write_output(args.json, json.dumps(found, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------

def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def printable(path):
    """A path for the screen or JSON, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def wrong_size(args):
    """What is wrong with num_registers or memory_size, or None."""
    R, size = args.num_registers, args.memory_size
    if R is not None and not (type(R) is int and 1 <= R <= 26):
        return f"--num_registers {R}: must be 1 to 26"
    if size is not None and not (type(size) is int and 4 <= size <= 1024 and size % 4 == 0):
        return f"--memory_size {size}: must be a multiple of 4, from 4 to 1024"
    return None


def parse(argv):
    """Options from the command line; a wrong one is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description="A toy CPU: generate, translate and evaluate its states.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"cpu-simulation.py: {message}\n")
    whole = functools.partial(parser.add_argument, type=int, metavar="N")
    text = functools.partial(parser.add_argument, metavar="PATH")
    parser.add_argument("--mode", required=True, choices=["generate", "translate", "evaluate"])
    whole("--num_registers", help="1 to 26 (default 10; translate and evaluate: what cpu_states.json says, if there)")
    whole("--memory_size", help="bytes, a multiple of 4 up to 1024 (default 1024; likewise)")
    text("--dir_path", default="cpu_states", help="generate: data set to write; evaluate: folder with .bin files (default %(default)s)")
    text("--states_path", default="cpu_states/cpu.bin", help="translate: the file to read (default %(default)s)")
    text("--output_path", default="cpu_states.txt", help="translate: the text to write (default %(default)s)")
    whole("--num_min_program", default=1, help="generate: fewest instructions of a program, HLT included (default %(default)s)")
    whole("--num_max_program", default=255, help="generate: most instructions of a program (default %(default)s)")
    whole("--num_train_instance", default=2100000, help="generate: instances in DIR/train (default %(default)s)")
    whole("--num_test_instance", default=21000, help="generate: instances in DIR/test (default %(default)s)")
    whole("--random_seed", default=0, help="generate: 0 or more (default %(default)s)")
    text("--json", help="evaluate: write everything to this file too")
    args = parser.parse_args(argv)

    wrong = wrong_size(args)
    if args.mode == "generate" and not wrong:
        for name, default in SIZES.items():
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        room = args.memory_size // 4
        least = {"num_min_program": 1, "num_train_instance": 0, "num_test_instance": 0, "random_seed": 0}
        for name, value in least.items():
            if getattr(args, name) < value:
                wrong = wrong or f"--{name} {getattr(args, name)}: must be {value} or more"
        if args.num_max_program > room:
            wrong = wrong or (f"--num_max_program {args.num_max_program}: must be {room} or less, "
                              f"the instructions that --memory_size {args.memory_size} holds")
        if args.num_min_program > args.num_max_program:
            wrong = wrong or (f"--num_min_program {args.num_min_program}: must be 1 to --num_max_program, "
                              f"which is {args.num_max_program}")
        if args.num_train_instance + args.num_test_instance == 0:
            wrong = wrong or "--num_train_instance 0 --num_test_instance 0: one of them must be 1 or more"
    if wrong:
        parser.error(wrong)
    return args


def interrupt(number, frame):
    """On Ctrl-C or SIGTERM: stop, and don't be stopped from tidying up by a second one."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main(argv=None):
    try:
        args = parse(argv)
        {"generate": generate, "translate": translate, "evaluate": evaluate}[args.mode](args)
    except KeyboardInterrupt as stop:
        print("interrupted; the same command again starts over and ends with the same result", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenProcessPool:
        raise SystemExit("a worker process was killed (out of memory?); run the same command again") from None
    except OSError as error:
        raise SystemExit(f"{error.filename or args.mode}: {error.strerror or error}") from None
    finally:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is interrupt:  # nothing is left to interrupt
                signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # not where a shell has it ignored
            signal.signal(number, interrupt)
    sys.stderr = Unstoppable(sys.stderr or open(os.devnull, "w"))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal can show
    sys.exit(main())
