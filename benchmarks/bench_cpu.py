"""Times cpu-simulation.py against a plain generator: one instruction at a time, reopening the file for each state.

    python benchmarks/bench_cpu.py [--instances 60000] [--plain 150] [--rounds 5] [--dir FOLDER]

Prints the time per instruction and the instances per second of both, in alternating rounds, and their ratio. The floor is the
time to create as many files of the same sizes in as many processes. The tests compare bgpt/cpu.py with the plain machine below.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cpu-simulation.py")

# Instructions in the order of their opcodes, with their possible numbers of operands.
OPERANDS = {"HLT": [0]}
OPERANDS.update({name: [0, 1] for name in "CLR INC DEC SHL SHR ROL ROR NOT".split()})
OPERANDS.update({"PUSH": [1], "POP": [1], "LOADI": [1], "SWAP": [1, 2]})
OPERANDS.update({name: [1, 2, 3] for name in "ADD SUB MUL DIV AND OR XOR".split()})
OPERANDS["MOV"] = [2]


def assemble(line):
    """Returns the 4 bytes of an assembly line."""
    name, *operands = line.split()
    numbers = [int(text) if name == "LOADI" else ord(text) - ord("A") + 1 for text in operands]
    return bytes([list(OPERANDS).index(name), *numbers] + [0] * (3 - len(numbers)))


def disassemble(instruction, num_registers):
    """Returns the assembly line of 4 bytes, or None if they are malformed."""
    names = list(OPERANDS)
    if instruction[0] >= len(names):
        return None
    name = names[instruction[0]]
    if name == "LOADI":
        return f"LOADI {instruction[1]}" if instruction[2:] == b"\0\0" else None
    for count in OPERANDS[name]:
        operands, rest = instruction[1 : 1 + count], instruction[1 + count :]
        if all(1 <= number <= num_registers for number in operands) and not any(rest):
            return " ".join([name, *(chr(ord("A") + number - 1) for number in operands)])
    return None


def execute(line, cells):
    """Executes an assembly line on `cells`, a dict of ACC, A, B, …, in place."""
    name, *operands = line.split()
    if name in ("CLR", "INC", "DEC", "SHL", "SHR", "ROL", "ROR", "NOT"):
        where = operands[0] if operands else "ACC"
        value = cells[where]
        bits = f"{value:08b}"
        if name == "CLR":
            value = 0
        elif name == "INC":
            value = value if value == 255 else value + 1
        elif name == "DEC":
            value = value if value == 0 else value - 1
        elif name == "SHL":
            value = int(bits[1:] + "0", 2)
        elif name == "SHR":
            value = int("0" + bits[:-1], 2)
        elif name == "ROL":
            value = int(bits[1:] + bits[0], 2)
        elif name == "ROR":
            value = int(bits[-1] + bits[:-1], 2)
        elif name == "NOT":
            value = int(bits.translate({48: "1", 49: "0"}), 2)
        cells[where] = value
    elif name == "PUSH":
        cells["ACC"] = cells[operands[0]]
    elif name == "POP":
        cells[operands[0]] = cells["ACC"]
    elif name == "LOADI":
        cells["ACC"] = int(operands[0])
    elif name == "SWAP":
        one, other = operands if len(operands) == 2 else ("ACC", operands[0])
        cells[one], cells[other] = cells[other], cells[one]
    elif name == "MOV":
        cells[operands[0]] = cells[operands[1]]
    elif name != "HLT":
        if len(operands) == 1:
            to, left, right = "ACC", cells["ACC"], cells[operands[0]]
        else:
            to, left, right = operands[2 if len(operands) == 3 else 0], cells[operands[0]], cells[operands[1]]
        if name == "ADD":
            value = 255 if left + right > 255 else left + right
        elif name == "SUB":
            value = 0 if left < right else left - right
        elif name == "MUL":
            value = 255 if left * right > 255 else left * right
        elif name == "DIV":
            value = 255 if right == 0 else left // right
        elif name == "AND":
            value = left & right
        elif name == "OR":
            value = left | right
        elif name == "XOR":
            value = left ^ right
        cells[to] = value


def run(memory, acc, registers):
    """Yields the state after each step, as bytes. A malformed instruction changes nothing."""
    cells = {"ACC": acc, **{chr(ord("A") + i): value for i, value in enumerate(registers)}}
    slots = len(memory) // 4
    pc = 0
    for _ in range(slots):
        instruction = memory[4 * pc : 4 * pc + 4]
        pc = min(pc + 1, slots - 1)
        values = list(cells.values())
        yield bytes([pc, values[0], *instruction, *values[1:]])
        line = disassemble(instruction, len(registers))
        if line:
            execute(line, cells)
        if line == "HLT":
            return


def draw(rng, num_registers, num_min_program, num_max_program):
    """Returns an instance: ACC, a list of registers, and a list of assembly lines."""
    acc = rng.randint(0, 255)
    registers = [rng.randint(0, 255) for _ in range(num_registers)]
    letters = [chr(ord("A") + i) for i in range(num_registers)]
    lines = []
    for _ in range(rng.randint(num_min_program, num_max_program) - 1):
        name = rng.choice(list(OPERANDS)[1:])
        if name == "LOADI":
            lines.append(f"LOADI {rng.randint(0, 255)}")
        else:
            count = rng.choice(OPERANDS[name])
            lines.append(" ".join([name, *(rng.choice(letters) for _ in range(count))]))
    return acc, registers, [*lines, "HLT"]


def generate(folder, rng, count, num_registers=10, memory_size=1024, num_min_program=1, num_max_program=255):
    """Writes `count` instances the plain way. Returns the number of executed instructions."""
    steps = 0
    for _ in range(count):
        acc, registers, lines = draw(rng, num_registers, num_min_program, num_max_program)
        memory = b"".join(map(assemble, lines)).ljust(memory_size, b"\0")
        path = os.path.join(folder, hashlib.md5("".join(lines).encode()).hexdigest() + ".bin")
        with open(path, "wb") as file:
            file.write(memory)
            file.write(bytes([0, acc, 0, 0, 0, 0, *registers]))
        for state in run(memory, acc, registers):
            with open(path, "ab") as file:
                file.write(state)
            steps += 1
    return steps


def make_files(folder, sizes):
    """Creates files of the given sizes in bytes, as fast as possible with names like the data set's."""
    descriptor, content = os.open(folder, os.O_RDONLY), bytes(max(sizes))
    for number, size in enumerate(sizes):
        name = hashlib.md5(f"{os.getpid()} {number}".encode()).hexdigest()
        file = os.open(f"{name}.bin", os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=descriptor)
        os.write(file, content[:size])
        os.close(file)
    os.close(descriptor)


def make_files_together(folder, sizes, count):
    """Runs make_files in `count` processes."""
    processes = [multiprocessing.Process(target=make_files, args=(folder, sizes[start::count])) for start in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main():
    parser = argparse.ArgumentParser(description="Time cpu-simulation.py against the plain way.")
    parser.add_argument("--instances", type=int, default=60000, help="instances of cpu-simulation.py per round")
    parser.add_argument("--plain", type=int, default=150, help="instances of the plain way per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="folder for the files, which are deleted; default: a temporary one")
    args = parser.parse_args()

    def fast(folder):
        command = [sys.executable, SCRIPT, "--mode", "generate", "--dir_path", folder, "--num_test_instance", "0"]
        subprocess.run([*command, "--num_train_instance", str(args.instances)], check=True, capture_output=True)

    rng = random.Random(0)  # the same instances as the script's
    steps, lengths = 0, {}  # steps of all instances, {program: its length}; equal programs share a file
    for _ in range(args.instances):
        *_, lines = draw(rng, 10, 1, 255)
        steps += len(lines)
        lengths["".join(lines)] = len(lines)
    sizes = [1024 + 16 * (length + 1) for length in lengths.values()]  # bytes of each file
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    plain_times, fast_times, ratios, shares = [], [], [], []  # seconds per instruction; shares of the floor
    with tempfile.TemporaryDirectory(dir=args.dir) as top:
        for turn in range(args.rounds + 1):  # the first one warms up
            one, other, bare = (os.path.join(top, f"{name}{turn}") for name in ("plain", "fast", "bare"))
            os.mkdir(one)
            os.mkdir(bare)
            begin = time.perf_counter()
            plain_steps = generate(one, random.Random(turn), args.plain)
            middle = time.perf_counter()
            fast(other)
            end = time.perf_counter()
            make_files_together(bare, sizes, cores)
            floor = time.perf_counter() - end
            if turn:  # no deletions between rounds, since some file systems are slow after them
                plain_times.append((middle - begin) / plain_steps)
                fast_times.append((end - middle) / steps)
                ratios.append(plain_times[-1] / fast_times[-1])
                shares.append(floor / (end - middle))

    print(f"{platform.processor() or platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}; "
          f"10 registers, 1024 bytes of memory, programs of 1 to 255 instructions; median of {args.rounds} rounds")
    per_instance = steps / args.instances
    for name, times in (("plain", plain_times), ("cpu-simulation.py", fast_times)):
        middle = statistics.median(times)
        print(f"{name:<18} {1e6 * middle:7.3f} us per instruction ({1e6 * min(times):.3f} to {1e6 * max(times):.3f})  "
              f"{1 / middle / per_instance:9,.0f} instances/s")
    print(f"ratio              {statistics.median(ratios):7.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    print(f"share of the floor {statistics.median(shares):6.0%} ({min(shares):.0%} to {max(shares):.0%}): "
          f"making {len(sizes):,} files of these sizes in {cores} processes")
    rate = 1 / statistics.median(fast_times) / per_instance
    print(f"2,100,000 + 21,000 instances at that rate: {2121000 / rate / 60:.1f} minutes")


if __name__ == "__main__":
    main()
