"""A toy CPU: instructions, .bin files and random programs (CPU state modelling, arXiv 2402.19155).

The machine has an accumulator ACC, registers A, B, C…, a program counter PC, an instruction register IR, and a byte memory with
the program. An instruction is 4 bytes, the opcode and three operands. An operand is a register's number, from 1, or 0 for none.
A step loads the instruction at PC into IR, moves PC to the next one, writes the state, and only then executes IR.

A .bin file:   [memory: memory_size bytes] [initial state] [state written by step 1] [by step 2] …
A state:       [PC] [ACC] [IR: 4 bytes] [registers]

An instruction without an assembly line is malformed and changes nothing. A program ends with HLT. Without HLT it ends after
memory_size / 4 steps.

Dimensions in shape comments: B programs or files, T = memory_size / 4 instructions in memory, R = num_registers registers,
N steps of all B programs together, S = 6 + R bytes in a state.
"""

import collections
import functools
import hashlib
import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from bgpt.system import UserError

BATCH = 512  # instances or files in one job
UNFINISHED = ".unfinished-"  # prefix of temporary files

# By opcode, from 0: ({number of operands: (destination, x, y)}, effect). 0 is ACC, 1 to 3 are the operands. An instruction does
# destination <- effect(x, y), on ints 0 to 255. SWAP also does y <- x.
UNARY = {0: (0, 0, 0), 1: (1, 1, 0)}
BINARY = {1: (0, 0, 1), 2: (1, 1, 2), 3: (3, 1, 2)}
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
    "LOADI": ({1: (0, 1, 0)}, lambda x, y: x),  # its operand is a value, not a register
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


@functools.cache
def tables():
    """Returns the lookup tables of `decode` and `simulate`.

    effects is uint8 (21·65536,), with index opcode << 16 | x << 8 | y. valid is bool (22·8,), with index opcode << 3 | a bit
    for each operand that is not 0. Opcode 21 is any unknown one. shifts is uint32 (3, 22·8), with the same index. It has the
    bits to shift an instruction by for the numbers of destination, x and y.
    """
    x, y = np.arange(256)[:, None], np.arange(256)[None, :]
    effects = np.empty((len(NAMES), 256, 256), np.uint8)
    valid = np.zeros((len(NAMES) + 1, 8), bool)
    shifts = np.zeros((3, len(NAMES) + 1, 8), np.uint32)
    for opcode, (by_count, effect) in enumerate(INSTRUCTIONS.values()):
        effects[opcode] = effect(x, y)
        for count, wiring in by_count.items():
            for bits in (0, 4) if opcode == LOADI else ((0, 4, 6, 7)[count],):  # LOADI's value may be 0
                valid[opcode, bits] = True
                shifts[:, opcode, bits] = np.multiply(wiring, 8)
    return effects.reshape(-1), valid.reshape(-1), shifts.reshape(3, -1)


def decode(words, num_registers):
    """Returns (opcodes, valid, [numbers of destination, x, y]) of instructions, each (N,).

    `words` are little-endian uint32 (N,). Number 0 is ACC, registers count from 1. A malformed instruction becomes HLT.
    """
    _, valid_by_index, shifts = tables()
    opcodes = np.minimum(words & 255, len(NAMES)).astype(np.intp)
    operands = [words >> shift & 255 for shift in (8, 16, 24)]
    index = opcodes << 3
    for bit, operand in zip((2, 1, 0), operands):
        index |= (operand > 0).astype(np.intp) << bit
    operands[0] = np.where(opcodes == LOADI, 0, operands[0])
    valid = valid_by_index[index] & (np.maximum.reduce(operands) <= num_registers)
    index[~valid] = HLT << 3
    with_acc = words & 0xFFFFFF00  # the opcode's byte becomes number 0
    return index >> 3, valid, [with_acc >> shift[index] & 255 for shift in shifts]


def simulate(memory, initial, num_registers):
    """Runs B programs. `memory` is uint8 (B, 4·T), `initial` ACC and registers, uint8 (B, 1 + R).

    Returns:
        states: (N, S) uint8, the states that the steps write, program after program.
        offsets: (B + 1,) int64. Program b wrote states[offsets[b] : offsets[b + 1]].
        valid: (N,) bool, whether the instruction that each step executes is valid.
    """
    effects, *_ = tables()
    words, (B, width) = memory.view("<u4"), initial.shape  # (B, 4·T) -> (B, T): one number is one instruction
    T = words.shape[1]
    halts = words == 0  # (B, T), HLT is four zero bytes
    lengths = np.where(halts.any(axis=1), halts.argmax(axis=1) + 1, T)  # (B,) steps
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    # longest programs first, so that those still running are the first rows at every step
    order = np.argsort(-lengths, kind="stable")  # (B,) the program in each row
    running = np.arange(T)[:, None] < lengths[order]  # (T, B)
    steps, rows = np.nonzero(running)  # (N,) each, sorted by step, then by row
    words = words[order[rows], steps]  # (B, T) -> (N,)
    opcodes, valid, numbers = decode(words, num_registers)

    # one flat array of cells: ACC and registers of all rows, the values 0 to 255 for LOADI, and one that is never read
    cells = np.concatenate([initial[order].reshape(-1), np.arange(256), [0]]).astype(np.intp)
    values = cells[: B * width].reshape(B, width)  # a view
    destination, x, y = (rows * width + number for number in numbers)  # (N,) cells
    x = np.where(opcodes == LOADI, B * width + (words >> 8 & 255), x)
    swapped = np.where(opcodes == SWAP, y, len(cells) - 1)  # (N,) cells that x is copied to
    effect_index = opcodes << 16
    states = np.empty((len(words), 5 + width), np.uint8)
    states[:, 0] = np.minimum(steps + 1, T - 1)  # PC
    states[:, 2:6] = words[:, None].view(np.uint8)
    counts = running.sum(axis=1)
    for end, count in zip(np.cumsum(counts).tolist(), counts.tolist()):
        now = slice(end - count, end)
        states[now, 1] = values[:count, 0]
        states[now, 6:] = values[:count, 1:]
        x_values = cells[x[now]]
        cells[destination[now]] = effects[effect_index[now] | x_values << 8 | cells[y[now]]]
        cells[swapped[now]] = x_values
    by_program = np.empty_like(steps)  # (N,) index into `states`, which is sorted by step
    by_program[offsets[order[rows]] + steps] = np.arange(len(steps))
    return states[by_program], offsets, valid[by_program]


@functools.cache
def assembly(word):
    """Returns an instruction's assembly line, "ADD A B" for 0x02010D. Unknown opcodes and registers are #numbers."""
    opcode, *operands = word.to_bytes(4, "little")
    name = NAMES[opcode] if opcode < len(NAMES) else f"#{opcode}"
    while operands and not operands[-1]:
        operands.pop()
    texts = [chr(64 + operand) if 1 <= operand <= 26 else f"#{operand}" for operand in operands]
    if opcode == LOADI:
        texts[:1] = [str(operands[0] if operands else 0)]
    return " ".join([name, *texts])


def draw(rng, count, num_registers, memory_size, shortest, longest):
    """Returns random memory, uint8 (count, memory_size), and ACC and registers, uint8 (count, 1 + R).

    Draws the same numbers as rng.randint and rng.choice, which repeat n.bit_length() bits until the number is below n, also for
    n = 1. Calling them takes several times as long.
    """
    getrandbits, R = rng.getrandbits, num_registers
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
            word = opcode
            for shift in (8, 16, 24)[: fewest + choice]:
                while (register := 1 + getrandbits(register_bits)) > R:
                    pass
                word |= register << shift
            words.append(word)
        words.append(HLT)
    memory = np.zeros((count, memory_size // 4), "<u4")
    memory[np.arange(memory.shape[1]) < np.array(lengths)[:, None]] = words
    return memory.view(np.uint8), np.array(initial, np.uint8).reshape(count, 1 + R)


def instance_jobs(totals, seed, num_workers, num_registers, *sizes):
    """Yields jobs for `run_jobs` that write all instances, `totals` {folder: number of instances}.

    Instances of the same program go to the same worker, so that the last one drawn is written last.
    """
    rng, shards = random.Random(seed), max(num_workers, 1)
    for folder, total in totals.items():
        for start in range(0, total, BATCH * shards):
            memory, initial = draw(rng, min(BATCH * shards, total - start), num_registers, *sizes)
            shard_of = memory.view("<u4").sum(axis=1, dtype=np.int64) % shards  # (B,)
            for shard in np.unique(shard_of).tolist():
                chosen = shard_of == shard
                yield shard, write_instances, folder, memory[chosen], initial[chosen], num_registers


def write_instances(folder, memory, initial, num_registers):
    """Runs B programs, see `simulate`, and writes each program's last instance as a file. Returns B."""
    states, offsets, _ = simulate(memory, initial, num_registers)
    initial_states = np.insert(initial, [0, 1, 1, 1, 1], 0, axis=1)  # (B, 1 + R) -> (B, S), PC and IR are 0
    words, instances = memory.view("<u4"), {}
    for b, length in enumerate(np.diff(offsets)):
        program = "".join(map(assembly, words[b, :length].tolist()))
        instances[hashlib.md5(program.encode(), usedforsecurity=False).hexdigest()] = b
    temporary = os.path.join(folder, f"{UNFINISHED}{os.getpid()}")
    for name, b in instances.items():
        path = f"{folder}/{name}.bin"
        content = memory[b].tobytes() + initial_states[b].tobytes() + states[offsets[b] : offsets[b + 1]].tobytes()
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)  # faster than open()
            try:
                while content:  # on a full disk a part is written, and the next call fails
                    content = content[os.write(file, content) :]
            finally:
                os.close(file)
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    return len(memory)


def remove_unfinished(folders):
    """Removes the temporary files of interrupted runs."""
    for path in (entry.path for folder in folders for entry in os.scandir(folder) if entry.name.startswith(UNFINISHED)):
        os.unlink(path)


def end_with_parent():
    """Ends this worker process as soon as its parent has died."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_jobs(jobs, num_workers, receive):
    """Runs jobs (shard, function, *arguments) in worker processes, in this one without workers.

    Jobs of the same shard modulo `num_workers` run one after another. `receive` gets the results in the order of the jobs.
    """
    if not num_workers:
        for _, function, *arguments in jobs:
            receive(function(*arguments))
        return
    context, pending = multiprocessing.get_context("spawn"), collections.deque()
    pools = [ProcessPoolExecutor(1, context, initializer=end_with_parent) for _ in range(num_workers)]
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C lets workers finish their job
        for pool in pools:
            pool.submit(os.getpid)  # starts the worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for shard, function, *arguments in jobs:
            pending.append(pools[shard % num_workers].submit(function, *arguments))
            while pending and (pending[0].done() or len(pending) > 4 * num_workers):  # bounds the memory
                receive(pending.popleft().result())
        for job in pending:
            receive(job.result())
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); run the same command again") from None
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
