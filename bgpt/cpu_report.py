"""The toy CPU's .bin files as text, and their comparison with the true states. See cpu.py."""

import contextlib
import math
import os

import numpy as np

from bgpt.cpu import NAMES, assembly, simulate
from bgpt.intervals import bootstrap_interval, wilson_interval
from bgpt.system import escape_name

LONGEST = 1024 + 258 * 32  # most bytes to read: the longest true file, with 257 states of 32 bytes, and one state more
WORST = 3  # inexact files in the report


def run_files(contents, num_registers, memory_size):
    """Runs the programs in the bytes of B files. Missing bytes count as 0.

    Returns memory (B, memory_size) and initial states (B, S), both uint8, then states, offsets and valid, see `simulate`.
    """
    begin = memory_size + 6 + num_registers
    ends = (begin if len(content) >= memory_size else len(content) // 4 * 4 for content in contents)  # whole instructions
    heads = b"".join(content[:end].ljust(begin, b"\0") for content, end in zip(contents, ends))
    heads = np.frombuffer(heads, np.uint8).reshape(-1, begin)
    memory, initial_states = np.ascontiguousarray(heads[:, :memory_size]), heads[:, memory_size:]
    initial = np.delete(initial_states, [0, 2, 3, 4, 5], axis=1)  # (B, S) -> (B, 1 + R)
    return memory, initial_states, *simulate(memory, initial, num_registers)


def find_malformed(sizes, memory, initial_states, states, offsets, valid):
    """Returns {problem: (B,) its offset in each file, or -1}. `sizes` are (B,), -1 = unreadable. See `run_files`."""
    memory_size, starts, lengths = memory.shape[1], offsets[:-1], np.diff(offsets)
    T = memory_size // 4
    end = memory_size + (lengths + 1) * states.shape[1]  # (B,)
    steps = np.arange(len(states)) - np.repeat(starts, lengths)  # (N,)
    malformed = np.minimum.reduceat(np.where(valid, T, steps), starts)  # (B,) the first such instruction
    unreached = (memory.view("<u4") != 0) & (np.arange(T) >= lengths[:, None])  # (B, T)
    problems = {
        "unreadable": (sizes < 0, 0),
        "malformed instruction": (malformed < T, 4 * malformed),
        "memory after HLT is not 0": (unreached.any(axis=1), 4 * unreached.argmax(axis=1)),
        "no HLT": ((sizes >= memory_size) & states[offsets[1:] - 1, 2:6].any(axis=1), memory_size),
        "PC and IR of the initial state are not 0": (initial_states[:, [0, 2, 3, 4, 5]].any(axis=1), memory_size),
        "no whole program": ((sizes >= 0) & (sizes < memory_size), sizes),
        "states missing": ((sizes >= memory_size) & (sizes < end), sizes),
        "too long": (sizes > end, end),
    }
    return {problem: np.where(mask, byte, -1) for problem, (mask, byte) in problems.items()}


def state_line(state, other):
    """Returns a state as a line of numbers, with * after each that differs from `other`."""
    return "".join(f"{value:>4}{' ' if other[i : i + 1] == state[i : i + 1] else '*'}" for i, value in enumerate(state)).rstrip()


def describe(data, num_registers, memory_size):
    """Returns the bytes of a .bin file as (lines of text, [(offset, problem), …])."""
    run = memory, *_, valid = run_files([data], num_registers, memory_size)
    lines = ["program"]
    for i, word in enumerate(memory.view("<u4")[0, : len(data) // 4].tolist()):
        if i < len(valid):
            lines.append(f"{i + 1:5}  {assembly(word)}" + ("" if valid[i] else "    <- malformed, has no effect"))
        elif word:
            lines.append(f"{i + 1:5}  {assembly(word)}    <- after HLT, never reached")
    heading = "".join(f"{name:>4} " for name in ["PC", "ACC", "IR", "", "", "", *(chr(65 + i) for i in range(num_registers))])
    states = [data[start : start + 6 + num_registers] for start in range(memory_size, len(data), 6 + num_registers)]
    fetched = [assembly(int.from_bytes(state[2:6], "little")) for state in states]
    for i, state in enumerate(states):
        title = "initial" if i == 0 else f"fetched {fetched[1]}" if i == 1 else f"after {fetched[i - 1]}, fetched {fetched[i]}"
        lines += ["", f"state {i}   {title}", heading.rstrip(), state_line(state, states[max(i - 1, 0)])]
    problems = find_malformed(np.array([len(data)]), *run).items()
    return lines, sorted((int(byte), problem) for problem, [byte] in problems if byte >= 0)


def read_file(path, most=LONGEST):
    """Returns a file's first `most` bytes and its size, (b"", -1) if unreadable."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        content, size = file.read(most), os.fstat(file.fileno()).st_size
        if len(content) == min(size, most):
            return content, size
    return b"", -1


def evaluate_files(paths, num_registers, memory_size):
    """Compares B files with the true states of their programs. Missing bytes count as wrong.

    Returns:
        files: (B, 6) right bytes, all bytes, right states, all states, whether it is exact, bytes after the true end. The first
            four are 0 for a file without a whole program.
        opcodes: (22, 5) steps, right bytes, right states, executed, executed right. The last row is for malformed ones.
        malformed: {problem: (number of files, path of the first)}.
        worst: the WORST inexact files. "expected" is [] after the end of the program, "predicted" after the end of the file.
    """
    contents, sizes = zip(*map(read_file, paths))
    sizes = np.array(sizes)
    run = run_files(contents, num_registers, memory_size)
    states, offsets, valid = run[2:]
    starts, lengths, (N, state_size) = offsets[:-1], np.diff(offsets), states.shape
    begin, true_sizes = memory_size + state_size, lengths * state_size  # true_sizes: after the initial state
    # the states in the files, cut or filled with zeros to the true length
    claimed = b"".join(content[begin : begin + size].ljust(size, b"\0") for content, size in zip(contents, true_sizes.tolist()))
    right = np.frombuffer(claimed, np.uint8).reshape(N, state_size) == states  # (N, S)
    for b in np.flatnonzero(sizes < begin + true_sizes):  # missing bytes
        right.reshape(-1)[starts[b] * state_size + max(sizes[b] - begin, 0) : offsets[b + 1] * state_size] = False
    right_bytes = right.sum(axis=1)  # (N,)
    right_states = right_bytes == state_size

    whole = sizes >= memory_size  # (B,)
    sums = [np.add.reduceat(right_bytes, starts), true_sizes, np.add.reduceat(right_states, starts, dtype=np.int64), lengths]
    exact = (sums[0] == true_sizes) & (sizes == begin + true_sizes)
    files = np.stack([*(whole * each for each in sums), exact, np.maximum(sizes - begin - true_sizes, 0)], axis=1)

    # the next state shows an instruction's effect, so a step counts as executed only if the file has that state and if ACC
    # and registers were right before
    next_ends = (np.arange(N) - np.repeat(starts, lengths) + 2) * state_size  # (N,) after the initial state
    has_next = next_ends <= np.repeat(np.minimum(sizes - begin, true_sizes), lengths)
    values_right = right[:, 1] & right[:, 6:].all(axis=1)  # (N,)
    executed = values_right & has_next
    columns = np.ones(N), right_bytes, right_states, executed, executed & np.append(values_right[1:], False)
    known = np.repeat(whole, lengths)  # (N,)
    opcodes = np.where(valid, states[:, 2], len(NAMES))[known]
    opcodes = np.stack([np.bincount(opcodes, column[known], len(NAMES) + 1) for column in columns], axis=1).astype(np.int64)

    malformed = {problem: first >= 0 for problem, first in find_malformed(sizes, *run).items()}
    malformed = {problem: (int(mask.sum()), paths[mask.argmax()]) for problem, mask in malformed.items() if mask.any()}
    accuracies = {int(b): int(files[b, 0]) / int(files[b, 1]) for b in np.flatnonzero(whole & ~exact)}
    worst = []
    for b in sorted(accuracies, key=lambda b: (accuracies[b], paths[b]))[:WORST]:
        i = int(np.append(right_states[starts[b] : offsets[b + 1]], False).argmin())  # the first wrong state
        expected = states[starts[b] + i].tolist() if i < lengths[b] else []
        predicted = list(contents[b][begin + i * state_size : begin + (i + 1) * state_size])
        where = {"path": paths[b], "accuracy": accuracies[b], "state": i + 1, "states": int(lengths[b])}
        worst.append({**where, "expected": expected, "predicted": predicted})
    return files, opcodes, malformed, worst


def share(right, total, low_high=None):
    """Returns a share as a dict of plain numbers. The share of 0 is None."""
    ends = {} if low_high is None else dict(zip(("low", "high"), low_high))
    return {"right": int(right), "total": int(total), "share": int(right) / int(total) if total else None, **ends}


def percent(share):
    """Returns a share in percent with two digits. Rounds down, so that 100.00 means all."""
    return f"{share['right'] * 10000 // share['total'] / 100:.2f}" if share["total"] else "-"


def summarize(parts, num_registers):
    """Combines results of `evaluate_files` into a dict for JSON."""
    files, opcodes, malformed, worst = zip(*parts)
    right_bytes, all_bytes, right_states, all_states, exact, surplus = np.concatenate(files).T
    by_opcode = {}
    for name, (steps, good, right, executed, done) in zip([*NAMES, "(malformed)"], sum(opcodes).tolist()):
        if steps:
            shares = {"byte_accuracy": share(good, steps * (6 + num_registers)), "exact_states": share(right, steps)}
            by_opcode[name] = {"steps": steps, "executed": share(done, executed), **shares}
    problems = {}
    for problem, (count, path) in (item for each in malformed for item in each.items()):
        entry = problems.setdefault(problem, {"files": 0, "example": escape_name(path)})
        entry["files"] += count
    worst = sorted((file for each in worst for file in each), key=lambda file: (file["accuracy"], file["path"]))[:WORST]
    return {
        "byte_accuracy": share(right_bytes.sum(), all_bytes.sum(), bootstrap_interval(right_bytes, all_bytes)[1:]),
        "exact_states": share(right_states.sum(), all_states.sum(), bootstrap_interval(right_states, all_states)[1:]),
        "exact_files": share(exact.sum(), len(exact), wilson_interval(int(exact.sum()), len(exact))[1:]),
        "surplus": {"files": int((surplus > 0).sum()), "bytes": int(surplus.sum())},
        "opcodes": by_opcode,
        "worst_files": [{**file, "path": escape_name(file["path"])} for file in worst],
        "malformed": dict(sorted(problems.items(), key=lambda item: -item[1]["files"])),
    }


def report(summary):
    """Returns a dict of `summarize` as lines of text."""
    lines = []
    for name, unit in (("byte_accuracy", "bytes"), ("exact_states", "states"), ("exact_files", "files")):
        entry = summary[name]
        line = f"{name.replace('_', ' '):<13} {percent(entry):>6} % of {entry['total']:,} {unit}"
        if entry["low"] is not None:
            line += f" (95 % interval {math.floor(1e4 * entry['low']) / 100:.2f} - {math.ceil(1e4 * entry['high']) / 100:.2f} %)"
        lines.append(line)
    if summary["surplus"]["files"]:
        lines.append("{files:,} files continue after their true end: {bytes:,} bytes in all".format(**summary["surplus"]))
    lines += [
        "",
        "opcodes, worst first: executed = of the steps that began with right ACC and registers, those that left them right",
        "bytes and states = right in the state that the step itself writes",
        f"{'opcode':<12} {'steps':>12} {'executed %':>10} {'bytes %':>10} {'states %':>10}",
    ]
    keys = "executed", "byte_accuracy", "exact_states"
    shares = {name: [entry[key]["share"] for key in keys] for name, entry in summary["opcodes"].items()}
    for name in sorted(shares, key=lambda name: [math.inf if share is None else share for share in shares[name]]):
        entry = summary["opcodes"][name]
        lines.append(f"{name:<12} {entry['steps']:>12,} " + " ".join(f"{percent(entry[key]):>10}" for key in keys))
    if summary["worst_files"]:
        lines += ["", "worst files, first wrong state of each (* marks a wrong byte)"]
    for file in summary["worst_files"]:
        expected, predicted = file["expected"], file["predicted"]
        lines += [
            f"{file['path']}: {100 * file['accuracy']:.2f} % of its bytes right, state {file['state']} of {file['states']}",
            f"  expected  {state_line(expected, expected) or 'nothing: the program has ended'}",
            f"  predicted {state_line(predicted, expected) or 'nothing: the file has ended'}",
        ]
    if summary["malformed"]:
        lines += ["", "malformed"]
    return lines + [f"{each['files']:>12,} files: {why}, e.g. {each['example']}" for why, each in summary["malformed"].items()]
