"""CPU states: the data to learn a processor from. bgpt/cpu.py describes the machine and its files.

    python cpu-simulation.py --mode generate     writes random programs and their states to DIR/train and DIR/test
    python cpu-simulation.py --mode translate    writes one .bin file as text
    python cpu-simulation.py --mode evaluate     compares the .bin files in a folder with the true states of their programs
"""

import argparse
import json
import os
import time

from bgpt import system

STORED = "num_registers memory_size num_min_program num_max_program num_train_instance num_test_instance random_seed".split()


def parse(argv):
    """Returns the options from the command line. A wrong one exits with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(description="A toy CPU: generate, translate and evaluate its states.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"cpu-simulation.py: {message}\n")
    parser.add_argument("--mode", required=True, choices=["generate", "translate", "evaluate"])
    number, path = {"type": int, "metavar": "N"}, {"metavar": "PATH"}
    for name, kind, default, text in (
        ("num_registers", number, None, "1 to 26 (default 10; translate and evaluate: from cpu_states.json, if it exists)"),
        ("memory_size", number, None, "bytes, a multiple of 4 up to 1024 (default 1024; likewise)"),
        ("dir_path", path, "cpu_states", "generate: data set to write; evaluate: folder of .bin files"),
        ("states_path", path, "cpu_states/cpu.bin", "translate: the file to read"),
        ("output_path", path, "cpu_states.txt", "translate: the text to write"),
        ("num_min_program", number, 1, "generate: fewest instructions of a program, HLT included"),
        ("num_max_program", number, 255, "generate: most instructions of a program"),
        ("num_train_instance", number, 2100000, "generate: instances in DIR/train"),
        ("num_test_instance", number, 21000, "generate: instances in DIR/test"),
        ("random_seed", number, 0, "generate: 0 or more"),
        ("json", path, None, "evaluate: write everything to this file too"),
    ):
        text += "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", **kind, default=default, help=text)
    args = parser.parse_args(argv)

    def check(name, is_right, rule):
        if not is_right:
            parser.error(f"--{name} {getattr(args, name)}: must be {rule}")

    R, size = args.num_registers, args.memory_size
    check("num_registers", R is None or 1 <= R <= 26, "1 to 26")
    check("memory_size", size is None or 4 <= size <= 1024 and size % 4 == 0, "a multiple of 4, from 4 to 1024")
    if args.mode == "generate":
        args.num_registers, args.memory_size = R or 10, size or 1024
        most, longest = args.memory_size // 4, args.num_max_program
        check("num_max_program", longest <= most, f"{most} or less, a quarter of --memory_size {args.memory_size}")
        check("num_min_program", 1 <= args.num_min_program <= longest, f"1 to --num_max_program, which is {longest}")
        for name in ("num_train_instance", "num_test_instance", "random_seed"):
            check(name, getattr(args, name) >= 0, "0 or more")
        check("num_test_instance", args.num_train_instance + args.num_test_instance, "1 or more without training instances")
    return args


def read_options(argv=None):
    """Returns the options from the command line or `argv`. Raises UserError for unusable paths."""
    args = parse(argv)
    if args.mode == "generate":
        return args
    folder, output, name = args.dir_path, args.json, "--json"
    if args.mode == "translate":
        if not os.path.isfile(args.states_path):
            raise system.UserError(f"--states_path: {args.states_path!r} does not exist; give a .bin file")
        folder, output, name = os.path.dirname(args.states_path) or ".", args.output_path, "--output_path"
    system.check_folders([folder], "--dir_path")
    stored = stored_options(folder) or stored_options(os.path.dirname(os.path.abspath(folder)))
    for size, default in (("num_registers", 10), ("memory_size", 1024)):
        given = getattr(args, size)
        if stored and given not in (None, stored[size]):
            raise system.UserError(f"--{size} {given}: cpu_states.json has {stored[size]} for these files")
        setattr(args, size, given or stored.get(size, default))
    if output is not None:
        system.check_writable(output, name)
    return args


def stored_options(folder):
    """Returns the options in a folder's cpu_states.json, {} without one. Raises UserError if it is damaged."""
    path = os.path.join(folder, "cpu_states.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        return {name: int(stored[name]) for name in STORED}
    except (ValueError, TypeError, KeyError):
        problem = f"{path!r} is damaged: it must have {', '.join(STORED)}"
        raise system.UserError(f"--dir_path: {problem}; restore or delete it") from None


if __name__ == "__main__":
    system.start(read_options)  # before NumPy loads, so that mistakes are answered at once

from tqdm import tqdm

from bgpt.cpu import BATCH, instance_jobs, remove_unfinished, run_jobs
from bgpt.cpu_report import describe, evaluate_files, read_file, report, summarize
from bgpt.files import list_files


def count_workers(total):
    """Returns the number of worker processes. 0 for few instances or files, since workers take time to start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if total > 3000 else 0


def progress_bar(total, unit):
    return tqdm(total=total, unit=f" {unit}", unit_scale=total >= 10_000, **system.progress_options())


def claim(args, folders):
    """Creates the folders and cpu_states.json of a data set. Raises UserError if another one is there."""
    options, stored = {name: getattr(args, name) for name in STORED}, stored_options(args.dir_path)
    other = [f"{name} {stored[name]}, not {options[name]}" for name in stored if stored[name] != options[name]]
    existing = filter(os.path.isdir, (args.dir_path, *folders))
    if not stored and any(entry.name.endswith(".bin") for folder in existing for entry in os.scandir(folder)):
        other = [".bin files but no cpu_states.json"]
    if other:
        problem = f"contains a data set with {', '.join(other)}"
        raise system.UserError(f"--dir_path {args.dir_path}: {problem}; give another folder, or delete this one")
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    if not stored:
        system.write_whole(os.path.join(args.dir_path, "cpu_states.json"), f"{json.dumps(options, indent=1)}\n".encode())


def generate(args):
    """Writes a data set, byte for byte the same as the published generator's."""
    system.make_folder(args.dir_path, "--dir_path")
    folders = [os.path.join(args.dir_path, name) for name in ("train", "test")]
    totals = args.num_train_instance, args.num_test_instance
    total, workers = sum(totals), count_workers(sum(totals))
    sizes = args.num_registers, args.memory_size, args.num_min_program, args.num_max_program
    jobs = instance_jobs(dict(zip(folders, totals)), args.random_seed, workers, *sizes)
    with system.lock(os.path.join(args.dir_path, "cpu_states.json"), "--dir_path"):
        claim(args, folders)
        remove_unfinished(folders)
        began = time.monotonic()
        try:
            with progress_bar(total, "instances") as bar:
                run_jobs(jobs, workers, bar.update)
        finally:
            remove_unfinished(folders)
        seconds = time.monotonic() - began
    files = [sum(entry.name.endswith(".bin") for entry in os.scandir(folder)) for folder in folders]
    instances = f"{args.dir_path}: {totals[0]:,} training and {totals[1]:,} test instances in {files[0]:,} + {files[1]:,} files"
    print(f"{instances} (one program, one file), {seconds:.1f} s, {total / seconds:,.0f} instances/s")


def translate(args):
    """Writes a .bin file as text to stdout and args.output_path. Raises UserError at the end if it is malformed."""
    name = system.escape_name(args.states_path)
    data, size = read_file(args.states_path, os.path.getsize(args.states_path) + 1)
    if size < 0:
        raise system.UserError(f"--states_path: {name} cannot be read completely")
    lines, problems = describe(data, args.num_registers, args.memory_size)
    title = f"{name}: {len(data):,} bytes, {args.num_registers} registers, {args.memory_size} bytes of memory; * marks changes"
    problems = [f"malformed at byte {byte}: {problem}" for byte, problem in problems]
    text = "\n".join([title, "", *lines, *problems])
    system.write_results({args.output_path: f"{text}\n".encode()})
    print(text)
    if problems:
        raise system.UserError(f"{name}: {problems[0]}" + f" (and {len(problems) - 1} more)" * (len(problems) > 1))


def evaluate(args):
    """Prints how much of the .bin files below args.dir_path is predicted correctly."""
    R, memory_size = args.num_registers, args.memory_size
    paths = list_files([args.dir_path], "--dir_path", "bin").paths
    total, folder, parts = len(paths), system.escape_name(args.dir_path), []
    if not total:
        raise system.UserError(f"--dir_path {folder}: contains no .bin files")

    def receive(part):
        parts.append(part)
        bar.update(len(part[0]))

    batches = (paths[start : start + BATCH] for start in range(0, total, BATCH))
    jobs = ((shard, evaluate_files, batch, R, memory_size) for shard, batch in enumerate(batches))
    with progress_bar(total, "files") as bar:
        run_jobs(jobs, count_workers(total), receive)
    results = {"dir_path": folder, "num_registers": R, "memory_size": memory_size, **summarize(parts, R)}
    if not results["byte_accuracy"]["total"]:
        problem = f"none of its {total:,} .bin files has a whole program, the {memory_size} bytes of --memory_size"
        reasons = ", ".join(f"{each['files']:,} {why}, e.g. {each['example']}" for why, each in results["malformed"].items())
        raise system.UserError(f"--dir_path {folder}: {problem}: {reasons}")
    if args.json is not None:
        system.write_results({args.json: f"{json.dumps(results, indent=1)}\n".encode()})
    print(*report(results), "", f"{total:,} files in {folder}, {R} registers, {memory_size} bytes of memory", sep="\n")
    if unread := results["malformed"].get("unreadable"):
        raise system.UserError(f"--dir_path: {unread['files']:,} files could not be read, e.g. {unread['example']}")


def main(argv=None):
    args = read_options(argv)
    {"generate": generate, "translate": translate, "evaluate": evaluate}[args.mode](args)


if __name__ == "__main__":
    system.run(main)
