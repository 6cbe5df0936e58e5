"""CPU states: the data on which bGPT learns to be a processor (CPU state modelling in arXiv 2402.19155).

    python cpu-simulation.py --mode generate     writes random programs and their states to DIR/train and DIR/test
    python cpu-simulation.py --mode translate    shows one .bin file as text
    python cpu-simulation.py --mode evaluate     compares the .bin files in a folder with what their programs really do

The machine has an accumulator ACC, registers A, B, C…, a program counter PC, an instruction register IR, and a byte
memory that holds the program. An instruction is 4 bytes: the opcode, then up to three operands. An operand is the number of
a register, counted from 1; 0 means that there is none. There are no jumps. A step loads the instruction at PC into IR, moves
PC to the next one, writes the state, and only then executes IR.

A .bin file:   [memory: memory_size bytes] [initial state] [state written by step 1] [by step 2] …
A state:       [PC] [ACC] [IR: 4 bytes] [registers]

Only instructions that have an assembly line are executed. Any other is malformed: its opcode is unknown, operands are
missing or too many, or there is no such register. A malformed instruction changes nothing, and the program goes on. A
program ends with HLT, or without one after memory_size / 4 steps, each instruction once.

Dimensions in shape comments: B programs or files, T = memory_size / 4 instructions in memory, R = num_registers registers,
N steps of all B programs together, state_size = 6 + R bytes in a state.
"""

from bgpt import system

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from concurrent.futures.process import BrokenProcessPool

DEFAULT_SIZES = {"num_registers": 10, "memory_size": 1024}
STORED = ("num_registers", "memory_size", "num_min_program", "num_max_program", "num_train_instance",
          "num_test_instance", "random_seed")  # the options in cpu_states.json
LONGEST = 1024 + 258 * 32  # bytes to read of a file: the longest right one, with 257 states of 32 bytes, and one state more
BATCH = 512  # instances or files in one job
FEW = 3000  # instances or files that one process does sooner than worker processes start
SAMPLE = 64  # files that evaluate reads first, to see whether the sizes fit
WORST = 3  # files of which evaluate shows the first wrong state
UNFINISHED = ".bgpt-00000000-"  # how the names of unfinished instances begin; the rest is a process id and .tmp

# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    """Returns the options from the command line; a wrong one is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description="A toy CPU: generate, translate and evaluate its states.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"cpu-simulation.py: {message}\n")
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    path = functools.partial(parser.add_argument, metavar="PATH")
    parser.add_argument("--mode", required=True, choices=["generate", "translate", "evaluate"])
    number("--num_registers", help="1 to 26 (default 10; translate and evaluate: what cpu_states.json says, if there)")
    number("--memory_size", help="bytes, a multiple of 4 up to 1024 (default 1024; likewise)")
    path("--dir_path", default="cpu_states", help="generate: data set to write; evaluate: folder with .bin files (default %(default)s)")
    path("--states_path", default="cpu_states/cpu.bin", help="translate: the file to read (default %(default)s)")
    path("--output_path", default="cpu_states.txt", help="translate: the text to write (default %(default)s)")
    number("--num_min_program", default=1, help="generate: fewest instructions of a program, HLT included (default %(default)s)")
    number("--num_max_program", default=255, help="generate: most instructions of a program (default %(default)s)")
    number("--num_train_instance", default=2100000, help="generate: instances in DIR/train (default %(default)s)")
    number("--num_test_instance", default=21000, help="generate: instances in DIR/test (default %(default)s)")
    number("--random_seed", default=0, help="generate: 0 or more (default %(default)s)")
    path("--json", help="evaluate: write everything to this file too")
    args = parser.parse_args(argv)
    if args.mode == "generate":
        for name, default in DEFAULT_SIZES.items():
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    R, size, shortest, longest = args.num_registers, args.memory_size, args.num_min_program, args.num_max_program
    rules = [(R is None or 1 <= R <= 26, f"--num_registers {R}: must be 1 to 26"),
             (size is None or 4 <= size <= 1024 and size % 4 == 0, f"--memory_size {size}: must be a multiple of 4, from 4 to 1024")]
    if args.mode == "generate":
        for name, least in {"num_min_program": 1, "num_train_instance": 0, "num_test_instance": 0, "random_seed": 0}.items():
            rules.append((getattr(args, name) >= least, f"--{name} {getattr(args, name)}: must be {least} or more"))
        rules += [(longest <= size // 4, f"--num_max_program {longest}: must be {size // 4} or less, "
                                         f"the instructions that --memory_size {size} holds"),
                  (shortest <= longest, f"--num_min_program {shortest}: must be 1 to --num_max_program, which is {longest}"),
                  (args.num_train_instance + args.num_test_instance > 0,
                   "--num_train_instance 0 --num_test_instance 0: one of them must be 1 or more")]
    for kept, message in rules:
        if not kept:
            parser.error(message)
    return args


def stored_options(folder, levels):
    """Returns (options, path) of the cpu_states.json in a folder or one of `levels` folders above, ({}, None) without one."""
    folder = os.path.abspath(folder)
    for _ in range(levels + 1):
        path = os.path.join(folder, "cpu_states.json")
        if os.path.isfile(path):
            with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
                with open(path, encoding="utf-8") as file:
                    options = json.load(file)
                if isinstance(options, dict) and all(type(options.get(name)) is int for name in STORED):
                    return options, path
            raise system.UserError(f"{path}: is damaged; it must hold the options of the data set as JSON")
        folder = os.path.dirname(folder)
    return {}, None


def settle_sizes(args, folder):
    """Sets the sizes that the command line leaves open to those in cpu_states.json, or else to the defaults.

    args.sizes_from becomes the path of the cpu_states.json, or None.
    """
    stored, args.sizes_from = stored_options(folder, 2)
    for name, default in DEFAULT_SIZES.items():
        given = getattr(args, name)
        if stored and given not in (None, stored[name]):
            raise system.UserError(f"--{name} {given}: {args.sizes_from} says that these files have {stored[name]}")
        setattr(args, name, given if given is not None else stored.get(name, default))


def is_stream(path):
    """Returns whether a path leads to a terminal, a pipe or the like, which must not be replaced by a new file."""
    if re.fullmatch(r"/dev/(stdout|stderr|fd/\d+)", os.path.abspath(path)):
        return True  # even if it is a file, this script may have written to it
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def read_options(argv=None):
    """Returns the options from the command line, or from `argv`; raises UserError if a path cannot be read or written."""
    args = parse(argv)
    if args.mode == "evaluate":
        system.check_folders([args.dir_path], "--dir_path")
        settle_sizes(args, args.dir_path)
    if args.mode == "translate":
        if not os.path.isfile(args.states_path):
            kind = "is not a file" if os.path.exists(args.states_path) else "there is no such file"
            raise system.UserError(f"--states_path {args.states_path}: {kind}; it must be a .bin file")
        settle_sizes(args, os.path.dirname(os.path.abspath(args.states_path)))
        if os.path.exists(args.output_path) and os.path.samefile(args.states_path, args.output_path):
            raise system.UserError(f"--output_path {args.output_path}: is the file to translate; give another")
    option, output = ("--output_path", args.output_path) if args.mode == "translate" else ("--json", args.json)
    if args.mode != "generate" and output is not None and not is_stream(output):
        system.check_writable(os.path.realpath(output), option)  # a link stays one, and what it leads to is replaced
    return args


if __name__ == "__main__":
    system.start(read_options, unstoppable=("stderr",))  # answers mistakes before NumPy has loaded, which takes longer than all that is above

import dataclasses

import numpy as np
from tqdm import tqdm

from bgpt import intervals
from bgpt import files as listing

# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

# What an instruction works on, by its number of operands: (destination, x, y), where 0 is ACC and 1 to 3 are its operands.
# It does destination <- effect(x, y); SWAP also does y <- x.
UNARY = {0: (0, 0, 0), 1: (1, 1, 0)}
BINARY = {1: (0, 0, 1), 2: (1, 1, 2), 3: (3, 1, 2)}

# In the order of the opcodes, from 0. Effects work on arrays of ints 0 to 255.
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
    """Returns what `decode` and `execute` look up.

    Returns:
        effects: (21·65536,) uint8 by opcode << 16 | x << 8 | y.
        faults: (22·8,) indices into FAULTS by opcode << 3 | a bit for each operand, 1 if it is not 0; 21 is any unknown opcode.
        wirings: (22·8, 3) destination, x and y by the same index.
    """
    x, y = np.arange(256)[:, None], np.arange(256)[None, :]
    effects = np.empty((len(NAMES), 256, 256), np.uint8)
    faults = np.full((len(NAMES) + 1, 8), FAULTS.index("unknown opcode"))
    wirings = np.zeros((len(NAMES) + 1, 8, 3), np.intp)
    for opcode, (by_count, effect) in enumerate(INSTRUCTIONS.values()):
        effects[opcode] = effect(x, y)
        for bits in range(8):
            given = bits | 4 if opcode == LOADI else bits  # the number of LOADI may be 0
            count = (0, 3, 2, 3, 1, 3, 2, 3)[given]  # operands up to the last one
            if count > max(by_count):
                faults[opcode, bits] = FAULTS.index("too many operands")
            elif given not in (0, 4, 6, 7) or count not in by_count:
                faults[opcode, bits] = FAULTS.index("operand missing")
            else:
                faults[opcode, bits], wirings[opcode, bits] = 0, by_count[count]
    return effects.reshape(-1), faults.reshape(-1), wirings.reshape(-1, 3)


def decode(instructions, num_registers):
    """Returns opcodes (N,), wirings (N, 3) and faults (N,), indices into FAULTS, of instructions (N, 4) uint8.

    A malformed instruction comes back as HLT without operands, which changes nothing.
    """
    _, faults_by_index, wirings = tables()
    opcodes = np.minimum(instructions[:, 0], len(NAMES)).astype(np.intp)
    a1, a2, a3 = instructions[:, 1], instructions[:, 2], instructions[:, 3]
    index = opcodes << 3 | (a1 > 0) << 2 | (a2 > 0) << 1 | (a3 > 0)
    faults = faults_by_index[index]
    past_last = (a1 > num_registers) & (opcodes != LOADI) | (a2 > num_registers) | (a3 > num_registers)
    faults[past_last & (faults == 0)] = FAULTS.index("register past the last")
    index[faults > 0] = HLT << 3
    return index >> 3, wirings[index], faults


def simulate(memory, initial, num_registers):
    """Runs B programs together, each step of all of them at once.

    Args:
        memory: (B, 4·T) uint8.
        initial: (B, 1 + R) uint8, ACC and registers at the start.

    Returns:
        states: (N, state_size) uint8, the states that the steps write, program after program.
        offsets: (B + 1,) ints; program b wrote states[offsets[b] : offsets[b + 1]].
        faults: (N,) ints, indices into FAULTS, of the instruction that each step executes.
    """
    words, T = memory.view("<u4"), memory.shape[1] // 4  # (B, 4·T) -> (B, T): one number is one instruction
    halts = words == 0  # (B, T); HLT is four zero bytes
    lengths = np.where(halts.any(axis=1), halts.argmax(axis=1) + 1, T)  # (B,) steps
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    # The longest programs come first. So the programs that are still running at any step are the first rows.
    order = np.argsort(-lengths, kind="stable")  # (B,) the program in each row
    active = lengths[order] > np.arange(T)[:, None]  # (T, B)
    steps, rows = np.nonzero(active)  # (N,) each: step by step, in each step row by row
    instructions = words[order[rows], steps].view(np.uint8).reshape(-1, 4)  # (N,) -> (N, 4)
    opcodes, wirings, faults_by_step = decode(instructions, num_registers)
    states_by_step = execute(instructions, opcodes, wirings, rows, active.sum(axis=1), initial[order])
    states_by_step[:, 0] = np.minimum(steps + 1, T - 1)  # PC has moved on, but not past the memory
    positions = offsets[order[rows]] + steps  # (N,) where each step comes program after program
    states, faults = np.empty_like(states_by_step), np.empty_like(faults_by_step)
    states[positions], faults[positions] = states_by_step, faults_by_step
    return states, offsets, faults


def execute(instructions, opcodes, wirings, rows, running, initial):
    """Returns the states (N, state_size) uint8 that the steps of B programs write, step by step; PC is left unset.

    Args:
        instructions, opcodes, wirings: (N, 4), (N,) and (N, 3), step by step, see `decode`.
        rows: (N,) the row of `initial` that each works on; 0, 1, 2… in each step.
        running: (T,) how many programs have an instruction in each step.
        initial: (B, 1 + R) uint8, ACC and registers at the start.
    """
    effects, *_ = tables()
    B, width = initial.shape  # width = 1 + R

    # One flat array of cells: ACC and registers of every program, the numbers 0 to 255 for LOADI, and one that is never read.
    cells = np.concatenate([initial.reshape(-1), np.arange(256), [0]]).astype(np.intp)
    values = cells[: B * width].reshape(B, width)  # (B, 1 + R) a view
    operands = instructions.copy()
    operands[:, 0] = 0  # ACC takes the place of the opcode
    operand_starts = np.arange(0, 4 * len(rows), 4)  # (N,) in the flat array of operands
    destination, x, y = (rows * width + operands.reshape(-1)[operand_starts + wirings[:, i]] for i in range(3))  # (N,) cells
    loads = np.flatnonzero(opcodes == LOADI)
    x[loads] = operands[loads, 1] + np.intp(B * width)
    swapped = np.where(opcodes == SWAP, y, len(cells) - 1)  # (N,) cells that x goes to
    effect_index = opcodes << 16
    states = np.empty((len(rows), 5 + width), np.uint8)
    states[:, 2:6] = instructions
    end = 0
    for count in running[running > 0].tolist():
        now = slice(end, end + count)
        end += count
        states[now, 1] = values[:count, 0]
        states[now, 6:] = values[:count, 1:]
        x_values = cells[x[now]]
        cells[destination[now]] = effects[effect_index[now] | x_values << 8 | cells[y[now]]]
        cells[swapped[now]] = x_values
    return states


@functools.cache
def assembly(word):
    """Returns the assembly line of an instruction given as a little-endian int: 0x02010D is "ADD A B".

    An unknown opcode or register is written as #number, and a missing operand before another one as #0.
    """
    opcode, *operands = word.to_bytes(4, "little")
    name = NAMES[opcode] if opcode < len(NAMES) else f"#{opcode}"
    while operands and not operands[-1]:
        operands.pop()
    texts = [chr(64 + operand) if 1 <= operand <= 26 else f"#{operand}" for operand in operands]
    if opcode == LOADI:
        texts[:1] = [str(operands[0] if operands else 0)]
    return " ".join([name, *texts])


# ---------------------------------------------------------------------------------------------------------------------
# Jobs and output
# ---------------------------------------------------------------------------------------------------------------------


def count_workers(total):
    """Returns how many worker processes that many instances or files are worth: one for each core, or none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if total > FEW else 0


def results_of(jobs, num_workers):
    """Returns a generator of the results of jobs as `system.run_jobs` does; without workers, the jobs run in this process."""
    if num_workers:
        return system.run_jobs(jobs, num_workers)
    return (function(*arguments) for _, function, *arguments in jobs)


def show(text):
    """Prints a text; raises OSError if that fails, but not if a reader such as `| head` has seen enough of it."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again when it exits
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from None


def write_output(path, text):
    """Writes a text to the file or the stream that the user asked for."""
    if not is_stream(path):
        return system.write_whole(path, text.encode())
    try:
        with open(path, "a", encoding="utf-8") as file:  # where /dev/stdout is a file, this goes to its end
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


# ---------------------------------------------------------------------------------------------------------------------
# Generate
# ---------------------------------------------------------------------------------------------------------------------


def draw(rng, count, args):
    """Returns random instances: memory (count, memory_size) uint8, and ACC and registers (count, 1 + R) uint8 at the start.

    The numbers are those of rng.randint and rng.choice. Both take n.bit_length() bits, again and again until the number is
    below n. That loop is written out here, because the calls would take several times as long. A choice from one draws too.
    """
    getrandbits, R, shortest, longest = rng.getrandbits, args.num_registers, args.num_min_program, args.num_max_program
    register_bits, length_bits = R.bit_length(), (longest - shortest + 1).bit_length()
    counts = [(min(by_count), len(by_count), len(by_count).bit_length()) for by_count, _ in INSTRUCTIONS.values()]
    initial, words, lengths = [], [], []
    for _ in range(count):
        for _ in range(1 + R):
            while (value := getrandbits(9)) > 255:
                pass
            initial.append(value)
        while (length := shortest + getrandbits(length_bits)) > longest:
            pass
        lengths.append(length)
        for _ in range(length - 1):
            while (opcode := 1 + getrandbits(5)) > 20:  # any but HLT
                pass
            if opcode == LOADI:
                while (value := getrandbits(9)) > 255:
                    pass
                words.append(opcode | value << 8)
                continue
            fewest, choices, choices_bits = counts[opcode]
            while (choice := getrandbits(choices_bits)) >= choices:
                pass
            word, shift = opcode, 8
            for _ in range(fewest + choice):
                while (register := 1 + getrandbits(register_bits)) > R:
                    pass
                word |= register << shift
                shift += 8
            words.append(word)
        words.append(HLT)
    memory = np.zeros((count, args.memory_size // 4), "<u4")
    memory[np.arange(memory.shape[1]) < np.array(lengths)[:, None]] = words
    return memory.view(np.uint8), np.array(initial, np.uint8).reshape(count, 1 + R)


def write_instances(folder, memory, initial, num_registers):
    """Runs B programs, see `simulate`, and writes their files; of two instances of one program the later stays. Returns B."""
    states, offsets, _ = simulate(memory, initial, num_registers)
    initial_states = np.zeros((len(memory), 6 + num_registers), np.uint8)  # (B, state_size): PC and IR are 0
    initial_states[:, 1], initial_states[:, 6:] = initial[:, 0], initial[:, 1:]
    words = memory.view("<u4")
    instances = {}
    for b, length in enumerate(np.diff(offsets)):
        program = "".join(map(assembly, words[b, :length].tolist()))
        instances[hashlib.md5(program.encode(), usedforsecurity=False).hexdigest()] = b
    files = (
        (f"{name}.bin", memory[b].tobytes() + initial_states[b].tobytes() + states[offsets[b] : offsets[b + 1]].tobytes())
        for name, b in instances.items()
    )
    system.write_small_files(folder, files, temporary=f"{UNFINISHED}{os.getpid()}.tmp")
    return len(memory)


def generate_jobs(args, folders, num_workers):
    """Draws all instances in order; yields them as jobs for `results_of`.

    A program always goes to the same worker. So of two instances that share a file, the later one is written later.
    """
    rng = random.Random(args.random_seed)
    shares = max(num_workers, 1)
    for folder, total in zip(folders, (args.num_train_instance, args.num_test_instance)):
        for start in range(0, total, BATCH * shares):
            memory, initial = draw(rng, min(BATCH * shares, total - start), args)
            workers = memory.view("<u4").sum(axis=1, dtype=np.int64) % shares  # (B,) who writes each program
            for worker in np.unique(workers).tolist():
                mine = workers == worker
                yield worker, write_instances, folder, memory[mine], initial[mine], args.num_registers


def remove_unfinished(folders):
    """Removes the instances that killed processes left unfinished."""
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.name.startswith(UNFINISHED):
                os.unlink(entry.path)


def claim(args, options_path, folders):
    """Makes the folders of a data set ready: DIR, DIR/train, DIR/test; raises UserError if they hold another data set.

    Writes the options to `options_path`, which this run must have locked, and removes what killed runs left unfinished.
    """
    options = {name: getattr(args, name) for name in STORED}
    stored, path = stored_options(args.dir_path, 0)
    other = [f"{name} {stored.get(name)}, not {options[name]}" for name in STORED if stored.get(name) != options[name]]
    if path and other:
        raise system.UserError(f"--dir_path {args.dir_path}: holds a data set with {', '.join(other)}; "
                               "give another folder, or delete this one first")
    for folder in (args.dir_path, *folders):
        os.makedirs(folder, exist_ok=True)
        if not path and any(entry.name.endswith(".bin") for entry in os.scandir(folder)):
            raise system.UserError(f"--dir_path {args.dir_path}: {folder} already holds .bin files, and no cpu_states.json says "
                                   "with which options; give another folder, or delete this one first")
    system.remove_leftovers(options_path)
    remove_unfinished(folders)
    if not path:
        system.write_whole(options_path, f"{json.dumps(options, indent=1)}\n".encode())


def generate(args):
    """Writes the data set that a seed stands for; it is byte for byte that of the published generator."""
    system.make_folder(args.dir_path, "--dir_path")
    options_path = os.path.join(args.dir_path, "cpu_states.json")
    folders = [os.path.join(args.dir_path, name) for name in ("train", "test")]
    total = args.num_train_instance + args.num_test_instance
    num_workers = count_workers(total)
    with system.locked(options_path, "--dir_path"):
        claim(args, options_path, folders)
        began = time.monotonic()
        results = results_of(generate_jobs(args, folders, num_workers), num_workers)
        try:
            bar = tqdm(total=total, unit=" instances", unit_scale=total >= 10_000, **system.progress_options())
            with bar, contextlib.closing(results):
                for count in results:
                    bar.update(count)
        except BrokenProcessPool:
            remove_unfinished(folders)
            raise
        seconds = time.monotonic() - began
    files = [sum(entry.name.endswith(".bin") for entry in os.scandir(folder)) for folder in folders]
    show(f"{args.dir_path}: {args.num_train_instance:,} training and {args.num_test_instance:,} test instances in "
         f"{files[0]:,} + {files[1]:,} files (one program, one file), {seconds:.1f} s, {total / seconds:,.0f} instances/s")


# ---------------------------------------------------------------------------------------------------------------------
# Translate
# ---------------------------------------------------------------------------------------------------------------------


def heading(num_registers):
    """Returns the names over the columns of `state_line`."""
    names = ["PC", "ACC", "IR", "", "", "", *(chr(65 + i) for i in range(num_registers))]
    return "".join(f"{name:>4} " for name in names).rstrip()


def state_line(state, other):
    """Returns a state, or the first bytes of one, as a line of numbers; those that differ from `other` have a * behind them."""
    return "".join(f"{value:>4}{'*' if other[i] != value else ' '}" for i, value in enumerate(state)).rstrip()


def describe(data, num_registers, memory_size):
    """Returns the bytes of a .bin file as (lines of text, [(byte, what is wrong there), …])."""
    state_size = 6 + num_registers
    words = [data[i : i + 4] for i in range(0, min(len(data) // 4 * 4, memory_size), 4)]
    length = words.index(bytes(4)) + 1 if bytes(4) in words else len(words)
    *_, faults = decode(np.frombuffer(b"".join(words[:length]), np.uint8).reshape(-1, 4), num_registers)
    text = [assembly(int.from_bytes(word, "little")) for word in words]
    lines, malformed = ["program"], []
    for i in range(length):
        lines.append(f"{i + 1:5}  {text[i]}" + (f"    <- {FAULTS[faults[i]]}, has no effect" if faults[i] else ""))
        if faults[i]:
            malformed.append((4 * i, f"{FAULTS[faults[i]]} in instruction {i + 1} ({text[i]})"))
    unreached = [i for i in range(length, len(words)) if any(words[i])]
    lines += [f"{i + 1:5}  {text[i]}    <- after HLT, never reached" for i in unreached]
    if unreached:
        malformed.append((4 * unreached[0], "memory after HLT that is not 0"))
    if len(data) < memory_size:
        return lines, [*malformed, (len(data), f"the file ends inside the memory of {memory_size} bytes")]
    if bytes(4) not in words:
        malformed.append((memory_size, "the program has no HLT"))

    states = [data[i : i + state_size] for i in range(memory_size, len(data), state_size)]
    if not states or len(states[0]) < state_size:
        malformed.append((len(data), f"the file ends before the initial state of {state_size} bytes does"))
    elif states[0][0] or any(states[0][2:6]):
        malformed.append((memory_size, "PC and IR of the initial state are not 0"))
    for i, state in enumerate(states):
        fetched = [assembly(int.from_bytes(part[2:6], "little")) for part in states[max(i - 1, 0) : i + 1]]
        after = "initial" if i == 0 else f"fetched {fetched[1]}" if i == 1 else f"after {fetched[0]}, fetched {fetched[1]}"
        lines += ["", f"state {i}   {after if len(state) >= 6 else ''}".rstrip(), heading(num_registers),
                  state_line(state, states[i - 1] if i else state)]
        if i and len(state) < state_size:
            malformed.append((len(data), f"the file ends inside state {i} ({len(state)} of {state_size} bytes)"))
    end = memory_size + state_size * (length + 1)
    if states and len(data) > end:
        malformed.append((end, f"the program's last state, {length}, ends here, the file only {len(data) - end:,} bytes later"))
    elif 0 < len(states) <= length and len(states[-1]) == state_size:
        malformed.append((len(data), f"the file ends after state {len(states) - 1} of {length}"))
    return lines, sorted(malformed)


def translate(args):
    """Writes one .bin file as text, to the screen and to args.output_path; raises UserError in the end if it is malformed."""
    with open(args.states_path, "rb") as file:
        data = file.read()
    lines, malformed = describe(data, args.num_registers, args.memory_size)
    name = system.escape_name(args.states_path)
    title = (f"{name}: {len(data):,} bytes, {args.num_registers} registers, "
             f"{args.memory_size} bytes of memory; * marks what a step changed")
    text = "\n".join([title, "", *lines, *(f"byte {byte}: {what}" for byte, what in malformed)])
    try:
        show(text)
    finally:  # a full disk behind the screen keeps no text from the file
        write_output(args.output_path, text + "\n")
    if malformed:
        more = f" (and {len(malformed) - 1} more, listed above)" if len(malformed) > 1 else ""
        raise system.UserError(f"{name}: malformed at byte {malformed[0][0]}: {malformed[0][1]}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


def read_file(path):
    """Returns a file's first LONGEST bytes, and how many it has; no bytes and -1 if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(LONGEST), os.fstat(file.fileno()).st_size
    except OSError:
        return b"", -1


def fits(data, num_registers, memory_size):
    """Returns whether the bytes of a file may have been made with these sizes.

    Looks only at what no program changes, in the memory and the first three states: PC and IR, ACC and registers of the first
    two states, which are the same, and zeros after HLT. A program of one instruction ends after two states.
    """
    state_size, T = 6 + num_registers, memory_size // 4
    starts = range(memory_size, memory_size + 3 * state_size, state_size)
    first, second, third = (data[start : start + state_size] for start in starts)

    def written_by(step, state):
        return state[:1] + state[2:6] == bytes([min(step, T - 1)]) + data[4 * step - 4 : 4 * step]

    if first[:1] + first[2:6] != bytes(5) or not written_by(1, second) or first[1:2] + first[6:] != second[1:2] + second[6:]:
        return False
    program = [data[i : i + 4] for i in range(0, memory_size, 4)]
    length = program.index(bytes(4)) + 1 if bytes(4) in program else T
    goes_on = written_by(2, third) if length > 1 else len(data) == memory_size + 2 * state_size
    return goes_on and not any(map(any, program[length:]))


def check_sizes(paths, args):
    """Raises UserError if most files of a sample were made with other sizes than those of args."""
    heads = [read_file(paths[i])[0] for i in range(0, len(paths), math.ceil(len(paths) / SAMPLE))]

    def count(sizes):
        return sum(fits(head, *sizes) for head in heads)

    options, given = "--num_registers {} --memory_size {}".format, (args.num_registers, args.memory_size)
    if 2 * count(given) > len(heads):
        return
    best = max(((R, size) for R in range(1, 27) for size in range(4, 1025, 4)), key=count)
    if 2 * count(best) > len(heads):
        raise system.UserError(f"{options(*given)}: does not fit the files in {args.dir_path}; "
                               f"{count(best)} of {len(heads)} looked at say {options(*best)}")


@dataclasses.dataclass
class Comparison:
    """A batch of B files beside the truth, which is what their own programs make of their own initial states."""

    memory: np.ndarray  # (B, 4·T) uint8
    initial_states: np.ndarray  # (B, state_size) uint8; missing bytes are 0
    sizes: np.ndarray  # (B,) bytes after the initial state; below 0 if that is not whole
    states: np.ndarray  # (N, state_size) uint8: the true states
    offsets: np.ndarray  # (B + 1,) the true states of file b are states[offsets[b] : offsets[b + 1]]
    positions: np.ndarray  # (N,) the number of each state in its file, from 0
    faults: np.ndarray  # (N,) indices into FAULTS, of the instruction that each step executes
    present: np.ndarray  # (N,) bool: whether the whole state is in the file
    values_right: np.ndarray  # (N,) bool: whether ACC and registers in the file are right
    right_bytes: np.ndarray  # (N,) how many bytes of the state in the file are right


def compare(contents, sizes, num_registers, memory_size):
    """Returns the Comparison of B files, from their bytes and their sizes after the initial state (B,)."""
    state_size = 6 + num_registers
    begin = memory_size + state_size
    heads = np.frombuffer(b"".join(content[:begin].ljust(begin, b"\0") for content in contents), np.uint8).reshape(-1, begin)
    memory, initial_states = np.ascontiguousarray(heads[:, :memory_size]), heads[:, memory_size:]
    initial = np.concatenate([initial_states[:, 1:2], initial_states[:, 6:]], axis=1)  # (B, 1 + R)
    states, offsets, faults = simulate(memory, initial, num_registers)
    lengths = np.diff(offsets)  # (B,) states
    # the states in the files, cut or filled with zeros to the length of the true ones
    needed = (lengths * state_size).tolist()
    claimed = b"".join(content[begin : begin + n].ljust(n, b"\0") for content, n in zip(contents, needed))
    positions = np.arange(len(states)) - np.repeat(offsets[:-1], lengths)  # (N,)
    present = positions[:, None] * state_size + np.arange(state_size) < np.repeat(sizes, lengths)[:, None]  # (N, state_size)
    right = (np.frombuffer(claimed, np.uint8).reshape(-1, state_size) == states) & present  # (N, state_size)
    values_right = np.delete(right, [0, 2, 3, 4, 5], axis=1).all(axis=1)
    right_bytes, present = right.sum(axis=1), present[:, -1]  # (N,) each
    return Comparison(memory, initial_states, sizes, states, offsets, positions, faults, present, values_right, right_bytes)


def first_wrong(batch, b, content):
    """Returns a dict about the first wrong state of file b of a Comparison, whose bytes after the initial state are `content`.

    "expected" is [] if the program has ended before this state, "predicted" is [] if the file has.
    """
    states = batch.states[batch.offsets[b] : batch.offsets[b + 1]]  # (n, state_size)
    n, state_size = states.shape
    wrong = batch.right_bytes[batch.offsets[b] : batch.offsets[b + 1]] < state_size  # (n,)
    i = int(np.append(wrong, True).argmax())
    return {
        "state": i + 1, "states": n, "expected": states[i].tolist() if i < n else [],
        "predicted": list(content[i * state_size : (i + 1) * state_size]),
        "after": assembly(int.from_bytes(states[i - 1, 2:6].tobytes(), "little")) if i else "",
    }


def new_tally(memory_size):
    """Returns a dict of counts that can be added up."""
    return {
        "files": np.zeros(2, np.int64),  # right, all
        "programs": 0, "long_enough": 0,  # files with a whole program, with a whole initial state
        "bytes": np.zeros(5), "states": np.zeros(5),  # sums over the files, of right ones x, of all n, of x², x·n and n²
        "opcodes": np.zeros((len(NAMES) + 1, 5), np.int64),  # [steps, right bytes, right states, executed, executed right]
        "positions": np.zeros((memory_size // 4, 3), np.int64),  # [states, right bytes, right states]
        "malformed": {}, "worst": [],
    }


def add(tally, later):
    """Adds the tally of later files to that of earlier ones."""
    for name in ("files", "programs", "long_enough", "bytes", "states", "opcodes", "positions"):
        tally[name] += later[name]
    for reason, entry in later["malformed"].items():
        sums = tally["malformed"].setdefault(reason, {**entry, "files": 0, "times": 0})
        sums["files"] += entry["files"]
        sums["times"] += entry["times"]
    tally["worst"] = sorted(tally["worst"] + later["worst"], key=lambda entry: (entry["accuracy"], entry["path"]))[:WORST]


def count_files(tally, batch):
    """Counts the bytes, states and files of a Comparison; returns the share of right bytes in each file, (B,) floats."""
    starts, lengths, state_size = batch.offsets[:-1], np.diff(batch.offsets), batch.states.shape[1]
    surplus = np.maximum(batch.sizes - lengths * state_size, 0)  # (B,) bytes after the true end, all of them wrong
    right_bytes, all_bytes = np.add.reduceat(batch.right_bytes, starts), lengths * state_size + surplus  # (B,) each
    right_states = np.add.reduceat(batch.right_bytes == state_size, starts, dtype=np.int64)
    all_states = lengths + -(-surplus // state_size)
    tally["files"][0] += (right_bytes == all_bytes).sum()
    tally["programs"] += len(starts)
    tally["long_enough"] += int((batch.sizes >= 0).sum())
    for name, x, n in (("bytes", right_bytes, all_bytes), ("states", right_states, all_states)):
        x, n = x.astype(float), n.astype(float)
        tally[name] += [x.sum(), n.sum(), x @ x, x @ n, n @ n]
    return right_bytes / all_bytes


def count_steps(tally, batch):
    """Counts the steps of a Comparison by opcode (malformed ones in the last row) and by position in the program.

    What an instruction does shows in the state after the one that its own step writes. So a step counts as executed only if
    that next state is in the file, and if ACC and registers were right before.
    """
    has_next = np.append(batch.present[1:], False)
    has_next[batch.offsets[1:] - 1] = False
    executed = batch.values_right & has_next
    executed_right = executed & np.append(batch.values_right[1:], False)
    exact = batch.right_bytes == batch.states.shape[1]
    opcodes = np.where(batch.faults == 0, batch.states[:, 2], len(NAMES)).astype(np.intp)
    for i, column in enumerate((np.ones_like(exact), batch.right_bytes, exact, executed, executed_right)):
        tally["opcodes"][:, i] = np.bincount(opcodes, column, len(NAMES) + 1)
        if i < 3:
            tally["positions"][:, i] = np.bincount(batch.positions, column, len(tally["positions"]))


def malformed_files(reasons, paths):
    """Returns what is malformed in B files, with the first as an example, from {reason: (B,) how many times in each}."""
    return {reason: {"files": int(np.count_nonzero(times)), "times": int(times.sum()), "example": paths[(times > 0).argmax()]}
            for reason, times in reasons.items() if times.any()}


def find_malformed(batch):
    """Returns {reason: (B,) how many times in each file} of a Comparison."""
    lengths, state_size, T = np.diff(batch.offsets), batch.states.shape[1], batch.memory.shape[1] // 4
    true_sizes = lengths * state_size
    cut_off = (batch.sizes >= 0) & (batch.sizes < true_sizes)
    after_hlt = np.arange(T) >= lengths[:, None]  # (B, T)
    return {
        "no whole initial state": batch.sizes < 0,
        "PC and IR of the initial state are not 0": batch.initial_states[:, [0, 2, 3, 4, 5]].any(axis=1),
        **{FAULTS[i]: np.add.reduceat(batch.faults == i, batch.offsets[:-1], dtype=np.int64) for i in range(1, len(FAULTS))},
        "no HLT": batch.states[batch.offsets[1:] - 1, 2:6].any(axis=1),
        "memory after HLT is not 0": ((batch.memory.view("<u4") != 0) & after_hlt).any(axis=1),
        "too long": batch.sizes > true_sizes,
        "ends inside a state": cut_off & (batch.sizes % state_size > 0),
        "states missing": cut_off & (batch.sizes % state_size == 0),
    }


def evaluate_files(paths, num_registers, memory_size):
    """Returns the tally of some files.

    Where the initial state is not whole, all states after it are missing, and so wrong. Where the program is not whole, nobody
    knows how many states are missing.
    """
    tally = new_tally(memory_size)
    tally["files"][1] = len(paths)
    contents, file_sizes = zip(*map(read_file, paths))
    file_sizes = np.array(file_sizes)
    short = (file_sizes >= 0) & (file_sizes < memory_size)
    tally["malformed"] = malformed_files({"unreadable": file_sizes < 0, "no whole program": short}, paths)
    whole = np.flatnonzero(file_sizes >= memory_size).tolist()
    if not whole:
        return tally
    paths, contents = ([column[b] for b in whole] for column in (paths, contents))
    begin = memory_size + 6 + num_registers
    batch = compare(contents, file_sizes[whole] - begin, num_registers, memory_size)
    tally["malformed"].update(malformed_files(find_malformed(batch), paths))
    accuracies = count_files(tally, batch).tolist()
    count_steps(tally, batch)
    for accuracy, path, b in sorted(zip(accuracies, paths, range(len(paths))))[:WORST]:
        if accuracy < 1:
            tally["worst"].append({"path": path, "accuracy": accuracy, **first_wrong(batch, b, contents[b][begin:])})
    return tally


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def share(right, total):
    """Returns a share as a dict of plain numbers; the share of nothing is None."""
    return {"right": int(right), "total": int(total), "share": right / total if total else None}


def percent(right, total):
    """Returns a share in percent with two digits, rounded down, so that only a share of all is 100.00."""
    return f"{int(right) * 10000 // int(total) / 100:.2f}" if total else "-"


def report_shares(tally):
    """Returns a part of the report, as all report_… do: (lines of text, what goes into the JSON file)."""
    lines, details = [], {}
    for name, unit in (("byte_accuracy", "bytes"), ("exact_states", "states"), ("exact_files", "files")):
        right, total = map(int, tally[unit][:2])
        draws = total if unit == "files" else intervals.independent_draws(*tally[unit].tolist(), tally["programs"])
        _, low, high = intervals.wilson_interval(right / total, draws)
        details[name] = {**share(right, total), "low": low, "high": high}
        lines.append(f"{name.replace('_', ' '):<13} {percent(right, total):>6} %  (95 % interval {math.floor(1e4 * low) / 100:.2f}"
                     f" - {math.ceil(1e4 * high) / 100:.2f} %, {right:,} of {total:,} {unit})")
    unknown = int(tally["files"][1]) - tally["programs"]
    if unknown:
        lines.append(f"{unknown:,} files have no whole program: they are wrong files, and of bytes and states nobody knows how many")
    return lines, details


def report_opcodes(opcodes, state_size):
    details, rows = {}, []
    for name, (steps, good, exact, executed, done) in zip([*NAMES, "(malformed)"], opcodes.tolist()):
        if steps:
            details[name] = {"steps": steps, "executed": share(done, executed),
                             "byte_accuracy": share(good, steps * state_size), "exact_states": share(exact, steps)}
            rows.append((done / executed if executed else math.inf, good / steps,  # inf: what was never executed comes last
                         f"{name:<12} {steps:>12,} {percent(done, executed):>10} {percent(good, steps * state_size):>8} "
                         f"{percent(exact, steps):>8}"))
    lines = ["opcodes, worst first: executed = ACC and registers right in the next state, of the steps that began with",
             "them right; bytes and states = right in the state that the step itself writes",
             f"{'opcode':<12} {'steps':>12} {'executed %':>10} {'bytes %':>8} {'states %':>8}"]
    return [*lines, *(line for *_, line in sorted(rows))], details


def report_positions(positions, state_size):
    details = [{"position": position, "states": states, "byte_accuracy": share(good, states * state_size),
                "exact_states": share(exact, states)} for position, (states, good, exact) in enumerate(positions.tolist(), 1) if states]
    lines = ["position in the program (state written by that step)",
             f"{'position':<12} {'states':>12} {'':10} {'bytes %':>8} {'states %':>8}"]
    low = 1
    while low <= len(positions) and positions[low - 1, 0]:  # lines for 1, 2, 3-4, 5-8, 9-16, …
        high = min(2 * (low - 1) or 1, len(positions))
        states, good, exact = positions[low - 1 : high].sum(axis=0).tolist()
        name = f"{low}-{high}" if high > low else f"{low}"
        lines.append(f"{name:<12} {states:>12,} {'':10} {percent(good, states * state_size):>8} {percent(exact, states):>8}")
        low = high + 1
    return lines, details


def report_worst(worst_files, num_registers):
    lines = ["worst files, first wrong state of each (* marks a wrong byte)"] if worst_files else []
    details = [{**worst, "path": system.escape_name(worst["path"])} for worst in worst_files]
    for worst in details:
        expected, predicted = worst["expected"], worst["predicted"]
        where = f"state {worst['state']} of {worst['states']}" + (f", after {worst['after']}" if worst["after"] else "")
        true_line = state_line(expected, expected) or "nothing: the program has ended"
        line = state_line(predicted, expected or [None] * len(predicted)) or "nothing: the file has ended"
        lines += [f"{worst['path']}: {100 * worst['accuracy']:.2f} % of its bytes right, {where}",
                  f"            {heading(num_registers)}", f"  expected  {true_line}", f"  predicted {line}"]
    return lines, details


def report_malformed(malformed):
    lines, details = ["malformed"] if malformed else [], {}
    for reason, entry in sorted(malformed.items(), key=lambda item: (-item[1]["files"], item[0])):
        details[reason] = {**entry, "example": system.escape_name(entry["example"])}
        times = f" ({entry['times']:,} instructions)" if reason in FAULTS else ""
        lines.append(f"{entry['files']:>12,} files: {reason}{times}, e.g. {details[reason]['example']}")
    return lines, details


def report(tally, args):
    """Returns what evaluate found, as (lines of text, dict for JSON)."""
    state_size = 6 + args.num_registers
    share_lines, shares = report_shares(tally)
    parts = {
        "opcodes": report_opcodes(tally["opcodes"], state_size),
        "positions": report_positions(tally["positions"], state_size),
        "worst_files": report_worst(tally["worst"], args.num_registers),
        "malformed": report_malformed(tally["malformed"]),
    }
    lines = share_lines + [line for part_lines, _ in parts.values() if part_lines for line in ("", *part_lines)]
    details = {"dir_path": system.escape_name(args.dir_path), "num_registers": args.num_registers, "memory_size": args.memory_size}
    return lines, {**details, **{name: part_details for name, (_, part_details) in parts.items()}, **shares}


def evaluate(args):
    """Prints how much of the .bin files below args.dir_path is what their programs really do."""
    R, memory_size = args.num_registers, args.memory_size
    paths = listing.list_files([args.dir_path], "--dir_path", "bin")
    total = len(paths)
    if not total:
        raise system.UserError(f"--dir_path {args.dir_path}: there are no .bin files in it")
    if not args.sizes_from:
        check_sizes(paths, args)
    batches = (range(start, min(start + BATCH, total)) for start in range(0, total, BATCH))
    jobs = ((key, evaluate_files, [paths[i] for i in batch], R, memory_size) for key, batch in enumerate(batches))
    results = results_of(jobs, count_workers(total))
    tally = new_tally(memory_size)
    with tqdm(total=total, unit=" files", unit_scale=total >= 10_000, **system.progress_options()) as bar, contextlib.closing(results):
        for part in results:
            add(tally, part)
            bar.update(int(part["files"][1]))
    if not tally["long_enough"]:
        raise system.UserError(f"--dir_path {args.dir_path}: none of its {total:,} .bin files has the {memory_size} + {6 + R} bytes "
                               f"that --memory_size {memory_size} and --num_registers {R} ask for, e.g. {system.escape_name(paths[0])}")
    lines, details = report(tally, args)
    source = f" (from {args.sizes_from})" if args.sizes_from else ""
    lines += ["", f"{total:,} files in {details['dir_path']}, {R} registers, {memory_size} bytes of memory{source}"]
    try:
        show("\n".join(lines))
    finally:  # a full disk behind the screen keeps no text from the file
        if args.json is not None:
            write_output(args.json, json.dumps(details, indent=1) + "\n")


def main(argv=None):
    args = read_options(argv)
    try:
        {"generate": generate, "translate": translate, "evaluate": evaluate}[args.mode](args)
    except BrokenProcessPool:
        raise system.UserError("a worker process was killed (out of memory?); run the same command again") from None


if __name__ == "__main__":
    system.run(main, hint="; the same command again starts over and ends with the same result")
