"""Generates, converts, completes, classifies, evaluates or compresses files. The settings are in config.py.

    python inference.py --MODE generate --TARGET_EXT mid --NUM_SAMPLES 10
    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER tunes
    python inference.py --MODE complete --INPUT_FOLDER tunes --PROMPT_BYTES 200
    python inference.py --MODE classify --INPUT_FOLDER news --INFERENCE_WEIGHTS_PATH news.pth
    python inference.py --MODE evaluate --INPUT_FOLDER midi/test --INFERENCE_WEIGHTS_PATH midi.pth
    python inference.py --MODE compress --INPUT_FOLDER midi/test --INFERENCE_WEIGHTS_PATH midi.pth --OUTPUT_FOLDER small
    python inference.py --MODE decompress --INPUT_FOLDER small --INFERENCE_WEIGHTS_PATH midi.pth --OUTPUT_FOLDER back
"""

import importlib.util
import os

import config
from bgpt import settings, system

CODING_MODES = ("compress", "decompress")


def check_settings():
    """Raises UserError for mistakes that can be found without PyTorch."""
    system.check_checkpoint(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    if config.MODE == "convert" and config.INPUT_EXT is None:
        raise system.UserError('INPUT_EXT is None, but MODE "convert" needs the inputs\' extension, for example "abc"')
    if config.MODE != "generate":
        system.check_folders([config.INPUT_FOLDER], "INPUT_FOLDER")
        inputs, outputs = (os.path.realpath(folder) for folder in (config.INPUT_FOLDER, config.OUTPUT_FOLDER))
        if os.path.commonpath([inputs, outputs]) in (inputs, outputs):
            both = f"{config.OUTPUT_FOLDER!r} and INPUT_FOLDER {config.INPUT_FOLDER!r}"
            raise system.UserError(f"OUTPUT_FOLDER: {both} overlap, so that results could replace inputs; give another")
    if config.MODE in CODING_MODES:
        if importlib.util.find_spec("constriction") is None:
            raise system.UserError(f"MODE {config.MODE!r} needs the package constriction: pip install -r requirements.txt")
        if config.PRECISION not in ("auto", "fp32"):
            raise system.UserError(f"PRECISION is {config.PRECISION!r}, but MODE {config.MODE!r} needs auto or fp32")


if __name__ == "__main__":
    system.start(lambda: settings.override(config), check_settings)  # before PyTorch loads, which takes seconds

import collections
import functools
import time
import zlib

import numpy as np
from tqdm import tqdm

import utils
from bgpt import distributed, evaluation, examples, generation, report
from bgpt.files import describe_extensions, extension_of, list_files
from bgpt.model import Classifier, load_model
from bgpt.windows import evaluation_windows

INDEX_SECONDS = 60  # between writes of the index, to look at while the model generates


def find_inputs():
    """Returns the files of INPUT_FOLDER, except an index of outputs. Raises UserError if it has no files of INPUT_EXT."""
    pairs = config.MODE == "evaluate" and config.CONVERSION_MODE is not None  # then INPUT_EXT selects pairs by their input
    extension = None if pairs else config.INPUT_EXT
    index = [os.path.join(config.INPUT_FOLDER, name) for name in report.INDEX_NAMES]
    has_index = config.MODE not in CODING_MODES and report.read_index(index[0]) is not None
    files = list_files([config.INPUT_FOLDER], "INPUT_FOLDER", extension, index if has_index else ())
    if not files:
        others = describe_extensions(list_files([config.INPUT_FOLDER], "INPUT_FOLDER"))
        kind = "files" if extension is None else f"files of INPUT_EXT {extension!r}"
        raise system.UserError(f"INPUT_FOLDER: no {kind} in {config.INPUT_FOLDER!r}" + (f", but {others}" if others else ""))
    return files


def print_first(lines):
    """Prints the first lines of an iterable, and the number of the others."""
    lines = [f"  {line}" for line in lines]
    more = [f"  and {len(lines) - system.SHOWN_NAMES} more"] * (len(lines) > system.SHOWN_NAMES)
    print(*lines[: system.SHOWN_NAMES], *more, sep="\n")


def write_output(path, content, backups, failed):
    """Writes an output file and returns True, or appends (path, reason) to `failed` and returns False.

    An existing file with other content is backed up, and the backup is appended to `backups`. Raises OSError if the disk is
    full, since no other file would fit either.
    """
    if os.path.islink(path):
        failed.append((path, "is a symlink, and its target may be a file of yours"))
        return False
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isfile(path):
            backups.append(system.keep_backup(path, content))
        system.write_whole(path, content)
    except OSError as error:
        if error.errno in system.FULL_DISK:
            raise
        failed.append((path, error.strerror))
        return False
    return True


# ---- Generate, convert, complete ------------------------------------------------------------------------------------


# path, path of the input or "", the bytes before the model's continuation, index of the candidate
Output = collections.namedtuple("Output", "path source prefix candidate")


def new_prompts(model, target):
    """Yields Prompts for NUM_SAMPLES new files YYYYmmdd-HHMMSS-i.`target`. Their keys are Outputs."""
    stamp, suffix = time.strftime("%Y%m%d-%H%M%S"), f".{target}" if target else ""
    for i in range(1, config.NUM_SAMPLES + 1):
        path = os.path.join(config.OUTPUT_FOLDER, f"{stamp}-{i}{suffix}")
        yield generation.Prompt(Output(path, "", b"", 0), model.extension_patch(target), [config.SEED, i])


def input_prompts(model, files, target, num_candidates, failed):
    """Yields `num_candidates` Prompts for each input file. Failed files are appended to `failed` as (path, reason)."""
    patch_size, patch_length = model.net.patch_size, model.net.patch_length
    for path in files:
        name = os.path.relpath(path, config.INPUT_FOLDER)
        output, prefix = os.path.join(config.OUTPUT_FOLDER, name), b""
        try:
            # bytes that fill the context are enough to detect a file that is too long
            most = config.PROMPT_BYTES if config.MODE == "complete" and config.PROMPT_BYTES else model.num_symbols
            content = utils.read_bytes(path, stop=min(most, model.num_symbols))
        except OSError as error:
            failed.append((path, error.strerror))
            continue
        if config.MODE == "convert":
            symbols = model.conversion_prompt(content, extension_of(path), target)
            output = f"{output}.{target}" if target else f"{output}-converted"
        else:
            symbols, prefix = model.completion_prompt(content, extension_of(path)), content
        if len(symbols) >= model.num_symbols:
            why = f"too long: it fills the model's {patch_length} patches of {patch_size} bytes"
            if config.MODE == "complete":
                why += f"; set PROMPT_BYTES to {patch_size * (patch_length - 1) - 1} or less"
            failed.append((path, why))
            continue
        if os.path.relpath(output, config.OUTPUT_FOLDER).lower() in report.INDEX_NAMES:
            failed.append((path, "its output would replace the index of the outputs"))
            continue
        for candidate in range(num_candidates):
            # seeded by the file's name, so that other files do not change its random numbers
            stream = [config.SEED, zlib.crc32(os.fsencode(name)), candidate]
            yield generation.Prompt(Output(output, path, prefix, candidate), symbols, stream)


def best_candidates(continuations, count):
    """Yields the likeliest of each path's `count` Continuations once all have ended, the first of equals."""
    ended = collections.defaultdict(list)  # {path: continuations}
    for continuation in continuations:
        candidates = ended[continuation.key.path]
        candidates.append(continuation)
        if len(candidates) == count:
            yield max(ended.pop(continuation.key.path), key=lambda each: (each.mean_log_probability(), -each.key.candidate))


def write_files(model, files, stop_signals, failed, target):
    """Writes new files, or conversions or continuations of the input files.

    Args:
        model: the Generator.
        files: the input files, or None for new ones.
        stop_signals: the `system.StopSignals`.
        failed: list to append (path, reason) of each failed file to.
        target: TARGET_EXT, or the model's own if that is None.
    """
    rows, cut_off, backups = [], [], []  # rows: of the index
    indexed_at = time.monotonic()
    report.read_index(os.path.join(config.OUTPUT_FOLDER, report.INDEX_NAMES[0]))  # an OSError now, not at the end
    num_outputs, num_candidates = (config.NUM_SAMPLES, 1) if files is None else (len(files), config.NUM_CANDIDATES)
    if config.NUM_CANDIDATES > 1 and (files is None or config.TEMPERATURE == 0 or config.TOP_K == 1):
        when = "in MODE 'generate'" if files is None else "with TEMPERATURE 0 or TOP_K 1, since all candidates are equal"
        print(f"note: NUM_CANDIDATES is {config.NUM_CANDIDATES}, but 1 is drawn {when}")
        num_candidates = 1
    prompts = new_prompts(model, target) if files is None else input_prompts(model, files, target, num_candidates, failed)
    batch_size = min(config.INFERENCE_BATCH_SIZE, num_outputs * num_candidates)
    sampling = generation.Sampling(config.TOP_K, config.TOP_P, config.TEMPERATURE)

    try:
        with tqdm(unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

            def progress(num_patches):
                bar.update(num_patches * model.net.patch_size)
                stop_signals.check()

            continuations = generation.generate(model.cast, prompts, batch_size, sampling, progress)
            for continuation in best_candidates(continuations, num_candidates):
                output = continuation.key
                content = output.prefix + utils.to_content(continuation.symbols)
                if not write_output(output.path, content, backups, failed):
                    continue
                if continuation.cut_off:
                    cut_off.append(output.path)
                how = "cut off" if continuation.cut_off else "ended"
                name = os.path.relpath(output.path, config.OUTPUT_FOLDER)
                rows.append((name, output.source, len(content), continuation.bits_per_byte(), how, config.SEED))
                bar.set_postfix_str(f"{len(rows)}/{num_outputs} files", refresh=False)
                if time.monotonic() - indexed_at > INDEX_SECONDS:
                    report.write_index(config.OUTPUT_FOLDER, rows)
                    indexed_at = time.monotonic()
    finally:  # also after Ctrl-C or on a full disk, to list the files that were written
        print(f"{len(rows)} files written to {config.OUTPUT_FOLDER}")
        system.print_backups(backups)
        if cut_off:
            reason = f"the model's {model.net.patch_length} patches (PATCH_LENGTH) were full"
            print(f"{len(cut_off)} of them cut off, since {reason}: {system.first_names(cut_off)}")
        report.write_index(config.OUTPUT_FOLDER, rows)


# ---- Classify -------------------------------------------------------------------------------------------------------


def classify_files(model, files, stop_signals, failed):
    """Writes each file's three likeliest labels to predictions.tsv.

    A stopped run writes predictions-partial.tsv. The arguments are as in `write_files`, the model is a Classifier.
    """
    dataset = utils.ByteDataset(utils.Examples(files), model.net.patch_size, model.net.patch_length)
    lengths = dataset.examples.lengths(model.net.patch_size)
    if longer := int((lengths > model.net.patch_length).sum()):
        print(f"{longer} of {len(files)} files exceed the model's {model.net.patch_length} patches: their heads are classified")
    order = np.argsort(lengths.clip(max=model.net.patch_length), kind="stable").tolist()  # least padding
    predictions = {}  # {index of a file: (probabilities, label indices) of the likeliest labels}
    try:
        with tqdm(total=len(files), unit="file", desc=config.MODE, **system.progress_options()) as bar:
            for start in range(0, len(order), config.INFERENCE_BATCH_SIZE):
                stop_signals.check()
                chosen, sequences = order[start : start + config.INFERENCE_BATCH_SIZE], {}
                for index in chosen:
                    try:
                        sequences[index] = dataset[index]
                    except OSError as error:
                        failed.append((files[index], error.strerror))
                if sequences:
                    probabilities = model.probabilities(utils.Batch(sequences.values()))  # (B, labels)
                    likeliest = probabilities.topk(min(3, len(model.labels)))  # (B, 3) each
                    predictions |= dict(zip(sequences, zip(likeliest.values.tolist(), likeliest.indices.tolist())))
                bar.update(len(chosen))
    finally:  # also after Ctrl-C; a partial table must not replace an earlier run's whole one
        is_whole = len(predictions) + len(failed) == len(files)
        if is_whole:
            report_labels(model, files, predictions)
        if predictions or is_whole:
            write_predictions(model, files, predictions, "predictions.tsv" if is_whole else "predictions-partial.tsv")


def write_predictions(model, files, predictions, name):
    """Writes `predictions`, {index of a file: (probabilities, label indices)}, as a table into OUTPUT_FOLDER."""
    path = os.path.join(config.OUTPUT_FOLDER, name)
    lines = [["file"]]
    for rank in ("", " 2", " 3")[: len(model.labels)]:
        lines[0] += [f"label{rank}", f"probability{rank}"]
    for index in sorted(predictions):
        lines.append([system.escape_name(os.path.relpath(files[index], config.INPUT_FOLDER))])
        for probability, label in zip(*predictions[index]):
            lines[-1] += [system.escape_name(model.labels[label]), f"{probability:.4f}"]
    system.write_results({path: "".join("\t".join(line) + "\n" for line in lines).encode()})
    print(f"{len(predictions)} of {len(files)} files classified in {path}")


def report_labels(model, files, predictions):
    """Prints the accuracy on the files whose names or folders have one of the model's labels."""
    truth = examples.labels_of(utils.Examples(files), model.label_mode)
    confusion, indices = collections.Counter(), {label: index for index, label in enumerate(model.labels)}
    for index, (_, likeliest) in predictions.items():
        if truth[index] in indices:
            confusion[indices[truth[index]], likeliest[0]] += 1
    if confusion:
        where = "folders" if model.label_mode in ("folder", "path") else "names"
        print(f"the {where} of {confusion.total()} of them have one of the model's labels:")
        print(evaluation.classification_report(confusion, model.labels)[0], end="")


# ---- Evaluate -------------------------------------------------------------------------------------------------------


def examples_to_score(files, patch_size, patch_length):
    """Returns (Examples to evaluate, [(name, patches)] of pairs that do not fit). Raises UserError if no pair fits."""
    if config.CONVERSION_MODE is None:
        return utils.Examples(files), []
    pairs = examples.directed(examples.find_pairs(files, config.CONVERSION_MODE, "INPUT_FOLDER"), config.CONVERSION_MODE)
    if config.INPUT_EXT is not None:
        wanted = config.INPUT_EXT.lower()
        pairs = pairs.select([i for i, (source, _) in enumerate(pairs) if extension_of(source).lower() == wanted])
        if not pairs:
            raise system.UserError(f"INPUT_EXT: CONVERSION_MODE {config.CONVERSION_MODE!r} converts no {config.INPUT_EXT!r}")
    lengths = pairs.lengths(patch_size)
    unfit = [(" -> ".join(pairs[i]), int(lengths[i])) for i in np.flatnonzero(lengths > patch_length)]
    if len(unfit) == len(pairs):
        problem = f"no pair fits in the model's {patch_length} patches (PATCH_LENGTH); the shortest has {min(lengths)}"
        raise system.UserError(f"INPUT_FOLDER: {problem}")
    return pairs.select(np.flatnonzero(lengths <= patch_length)), unfit


def evaluate_files(model, files, stop_signals, failed):
    """Writes evaluation.tsv, .json and .html, and prints bits per byte. Arguments as in `write_files`."""
    net = model.net
    scored, unfit = examples_to_score(files, net.patch_size, net.patch_length)
    windows, scores = evaluation_windows(scored, net.patch_size, net.patch_length), []
    total = int(windows.sizes.sum() + len(scored))
    with tqdm(total=total, unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

        def progress(num_symbols):
            bar.update(num_symbols)
            stop_signals.check()

        batch_size = config.INFERENCE_BATCH_SIZE
        for score in evaluation.score_files(net, windows, config.INPUT_FOLDER, batch_size, model.dtype, progress, failed):
            scores.append(score)
            bar.set_postfix_str(f"{len(scores)}/{len(scored)} files", refresh=False)
    if scores:
        scores.sort(key=lambda score: score.index)
        # config.py's constants of training do not apply to this model, except for these two
        hidden = settings.as_dict(config, training_only=True).keys() - {"PRECISION", "CONVERSION_MODE"}
        constants = {name: value for name, value in settings.as_dict(config).items() if name not in hidden}
        print(report.write_report(config.OUTPUT_FOLDER, net, windows, scores, model.dtype, constants, unfit, failed))
    if unfit:
        print(f"{len(unfit)} pairs do not fit in the model's {net.patch_length} patches (PATCH_LENGTH) and are left out:")
        print_first(f"{system.escape_name(name)}: {length} patches" for name, length in unfit)


# ---- Compress, decompress -------------------------------------------------------------------------------------------


def code_files(model, files, stop_signals, failed):
    """Compresses or decompresses the input files. Arguments as in `write_files`."""
    from bgpt import lossless  # imported here, since only these MODEs need constriction

    is_compressing, backups = config.MODE == "compress", []
    paths = [files[i] for i in np.argsort(-files.sizes, kind="stable")]  # the longest first, so that the last batches are full
    if not is_compressing:
        paths = [path for path in paths if path.endswith(lossless.SUFFIX)]
        if not paths:
            raise system.UserError(f"INPUT_FOLDER: no file in {config.INPUT_FOLDER!r} ends in {lossless.SUFFIX}")
        if len(paths) < len(files):
            print(f"{len(files) - len(paths)} of {len(files)} files do not end in {lossless.SUFFIX} and are left out")
    coder = lossless.Coder(model.net, config.INFERENCE_BATCH_SIZE)
    total = int(files.sizes.clip(min=0).sum()) * (1 + config.VERIFY) if is_compressing else None
    sizes, start = [], time.monotonic()  # sizes: (bytes of the file, of its container, with xz) of each
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

            def progress(num_bytes):
                bar.update(num_bytes)
                stop_signals.check()

            if is_compressing:
                coded = lossless.compress(coder, paths, config.VERIFY, progress, failed)
            else:
                coded = lossless.decompress(coder, paths, progress, failed)
            for path, content, container in coded:
                output = os.path.join(config.OUTPUT_FOLDER, os.path.relpath(path, config.INPUT_FOLDER))
                output = output + lossless.SUFFIX if is_compressing else output.removesuffix(lossless.SUFFIX)
                if write_output(output, container if is_compressing else content, backups, failed):
                    sizes.append((len(content), len(container), len(evaluation.COMPRESSORS["xz -9e"](content))))
                bar.set_postfix_str(f"{len(sizes)}/{len(paths)} files", refresh=False)
    finally:  # also after Ctrl-C or on a full disk, to count the files that were written
        print(f"{len(sizes)} files written to {config.OUTPUT_FOLDER}")
        system.print_backups(backups)
        if sizes:
            content, containers, compressed = np.array(sizes, dtype=np.int64).sum(0).tolist()
            seconds = time.monotonic() - start
            line = f"{content:,} bytes, {containers:,} in containers"
            if content:
                line += f": {8 * containers / content:.4f} bits per byte (xz -9e, file by file: {8 * compressed / content:.4f})"
            print(f"{line}; {seconds:.1f} s, {content / seconds:,.0f} bytes/s")


def main():
    """Runs MODE and returns the exit status, 1 if files failed."""
    distributed.tune_memory()
    mode, where = config.MODE, f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r}"
    is_coding = mode in CODING_MODES
    files = None if mode == "generate" else find_inputs()
    device, precision = ("cpu", "fp32") if is_coding else (None, config.PRECISION)
    model = load_model(config.INFERENCE_WEIGHTS_PATH, device, precision, "INFERENCE_WEIGHTS_PATH")
    if mode == "classify" and not isinstance(model, Classifier):
        raise system.UserError(f"{where} is a generative model; MODE 'classify' needs a classifier, from train-cls.py")
    if mode != "classify" and isinstance(model, Classifier):
        hint = "; MODE 'classify' reports a classifier's accuracy" * (mode == "evaluate")
        raise system.UserError(f"{where} is a classifier; MODE {mode!r} needs a generative model, from train-gen.py{hint}")
    constants = config.INPUT_EXT, config.TARGET_EXT, config.CONVERSION_MODE
    target = None if mode == "classify" else model.check_task(mode, *constants)
    if mode not in ("generate", "decompress"):
        model.check_files(files, are_scored=mode not in ("convert", "complete"))
    system.make_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    run_mode, names = {
        "classify": (classify_files, ("predictions.tsv",)),
        "evaluate": (evaluate_files, report.NAMES),
        "compress": (code_files, ()),
        "decompress": (code_files, ()),
    }.get(mode, (functools.partial(write_files, target=target), report.INDEX_NAMES))
    for name in names:
        system.check_writable(os.path.join(config.OUTPUT_FOLDER, name), "OUTPUT_FOLDER")
    seed = f", seed {config.SEED}" * (names == report.INDEX_NAMES)
    print(f"{mode} with {config.INFERENCE_WEIGHTS_PATH}: {model.dtype} on {model.net.device}{seed}")
    # two runs at once would replace each other's files and index
    locked = system.lock(os.path.join(config.OUTPUT_FOLDER, report.INDEX_NAMES[0]), "OUTPUT_FOLDER")
    failed, memory_errors = [], distributed.memory_errors("lower INFERENCE_BATCH_SIZE")  # failed: (path, reason) of files
    with memory_errors, system.delayed_signals(impatient=True) as stop_signals, locked:
        try:
            run_mode(model, files, stop_signals, failed)
        finally:  # also after Ctrl-C or on a full disk
            if failed:
                print(f"{len(failed)} files failed:")
                print_first(f"{system.escape_name(path)}: {why}" for path, why in failed)
    return 1 if failed else 0


if __name__ == "__main__":
    system.run(main)
