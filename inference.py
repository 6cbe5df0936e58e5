"""Generates, converts, completes, classifies, evaluates or compresses files with a trained model; the settings are in config.py.

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
from bgpt import system

CODING_MODES = ("compress", "decompress")


def check_settings():
    """Raises UserError for what can be told without PyTorch."""
    system.check_checkpoint(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    if config.MODE != "generate":
        check_folders()
    if config.MODE in CODING_MODES:
        if importlib.util.find_spec("constriction") is None:
            raise system.UserError(f"MODE {config.MODE!r} needs the package constriction: pip install -r requirements.txt")
        if config.PRECISION not in ("auto", "fp32"):
            raise system.UserError(f"PRECISION is {config.PRECISION!r}; MODE {config.MODE!r} computes in float32: auto or fp32")


def check_folders():
    """Raises UserError if INPUT_FOLDER is missing, or it and OUTPUT_FOLDER lie in each other, or INPUT_EXT is to be given."""
    if config.MODE == "convert" and config.INPUT_EXT is None:
        raise system.UserError('INPUT_EXT is None; to convert, it must be the extension of the input files, such as "abc"')
    system.check_folders([config.INPUT_FOLDER], "INPUT_FOLDER")
    inputs, outputs = (os.path.realpath(folder) for folder in (config.INPUT_FOLDER, config.OUTPUT_FOLDER))
    shared = os.path.commonpath([inputs, outputs])
    if shared in (inputs, outputs):
        inner, outer = ("OUTPUT_FOLDER", "INPUT_FOLDER") if shared == inputs else ("INPUT_FOLDER", "OUTPUT_FOLDER")
        raise system.UserError(
            f"{inner}: {getattr(config, inner)!r} lies in {outer} {getattr(config, outer)!r}, so results would mix with inputs, or take "
            "their places; it must be a folder apart from it"
        )


if __name__ == "__main__":
    # here, so that mistakes are answered before the seconds that PyTorch takes to load
    system.start(config.override, check_settings, system.choose_waiting)

import dataclasses
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

from bgpt import checkpoint
from bgpt import distributed as devices
from bgpt import evaluation
from bgpt import generation
from bgpt import gallery as index_page
from bgpt import labels as labeling
from bgpt import files as listing
from bgpt import report as report_page
from bgpt import examples as selection
import utils
from bgpt import windows as windowing

INDEX_SECONDS = 60  # seconds after which the index is written anew, so that a killed run's outputs are listed, too


@dataclasses.dataclass
class Output:
    """A file to be written."""

    path: str  # where
    source: str  # the input file, "" if there is none
    prefix: bytes  # what it begins with, before the model's continuation


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def seen_extension(extension, known):
    """Returns an extension as a model saw it in training: in lower case, unless `known`, its checkpoint's, has this very one."""
    return extension if extension in known else extension.lower()


def check_extensions(loaded):
    """Checks that a model can know what it is to convert; prints a note where it has never converted that.

    Args:
        loaded: its checkpoint.

    Raises:
        UserError: no training file had the extension.
    """
    known, settings = loaded.get("extensions"), loaded.get("config")
    for name in ("INPUT_EXT", "TARGET_EXT"):
        extension = getattr(config, name)
        if known is not None and seen_extension(extension, known) not in known:
            raise system.UserError(
                f"{name} is {extension!r}, but {config.INFERENCE_WEIGHTS_PATH} was trained on no such file; its training files' "
                f"extensions: {listing.first_names([each or '(none)' for each in known])}"
            )
    direction, where = (config.INPUT_EXT.lower(), config.TARGET_EXT.lower()), config.INFERENCE_WEIGHTS_PATH
    if not isinstance(settings, dict):
        print(f"note: {where} does not tell what it was trained on, so it may not have learned {direction[0]} -> {direction[1]}")
    elif settings.get("CONVERSION_MODE") is None:
        print(f"note: {where} was trained on plain files, without CONVERSION_MODE: it has never converted anything")
    else:
        source, target, both = selection.split_conversion_mode(settings["CONVERSION_MODE"])
        if direction != (source, target) and not (both and direction == (target, source)):
            print(f"note: {where} was trained with CONVERSION_MODE {settings['CONVERSION_MODE']!r}, never {direction[0]} -> {direction[1]}")


def new_prompts(patch_size, known):
    """Yields the Prompts of NUM_SAMPLES files of TARGET_EXT from nothing, named YYYYmmdd-HHMMSS-i.ext.

    The key of a Prompt is (Output, number of the candidate); here, there is one candidate of each. `known`: the extensions of
    the model's training files.
    """
    taken = {name[:15] for name in os.listdir(config.OUTPUT_FOLDER)}
    while (stamp := time.strftime("%Y%m%d-%H%M%S")) in taken:  # another run of this very second
        time.sleep(0.1)
    suffix = f".{config.TARGET_EXT}" if config.TARGET_EXT else ""
    symbols = utils.extension_patch(seen_extension(config.TARGET_EXT, known), patch_size)
    for i in range(1, config.NUM_SAMPLES + 1):
        path = os.path.join(config.OUTPUT_FOLDER, f"{stamp}-{i}{suffix}")
        yield generation.Prompt((Output(path, "", b""), 0), symbols, [config.SEED, i])


def find_inputs():
    """Returns the input files of every MODE but generate.

    Raises:
        UserError: there are none.
    """
    pairs = config.MODE == "evaluate" and config.CONVERSION_MODE is not None  # then INPUT_EXT is that of their inputs
    files = listing.list_files([config.INPUT_FOLDER], "INPUT_FOLDER", None if pairs else config.INPUT_EXT)
    if not files:
        kind = "files" if config.INPUT_EXT is None or pairs else f"files of INPUT_EXT {config.INPUT_EXT!r}"
        others = listing.list_files([config.INPUT_FOLDER], "INPUT_FOLDER")
        there = f", but {listing.describe_extensions(others)}" if others else ""
        raise system.UserError(f"INPUT_FOLDER: no {kind} in {config.INPUT_FOLDER!r}{there}")
    return files


def input_prompts(files, patch_size, patch_length, known, failed):
    """Yields NUM_CANDIDATES Prompts for each input file; appends (path, reason) to `failed` for those that cannot be done.

    `known`: the extensions of the model's training files.
    """
    for path in files:
        name = os.path.relpath(path, config.INPUT_FOLDER)
        output = os.path.join(config.OUTPUT_FOLDER, name)
        try:
            # reads at most as many bytes as fill the context: enough to notice a file that is too long
            given = config.PROMPT_BYTES if config.MODE == "complete" and config.PROMPT_BYTES else patch_size * patch_length
            content = np.fromfile(path, dtype=np.uint8, count=min(given, patch_size * patch_length))
        except OSError as error:
            failed.append((path, error.strerror))
            continue
        patches = utils.to_patches(content, seen_extension(listing.extension_of(path), known), patch_size)
        if config.MODE == "convert":
            target = utils.extension_patch(seen_extension(config.TARGET_EXT, known), patch_size)
            symbols = np.concatenate((patches[:-1].reshape(-1), target))  # [abc] content [mid]
            output, prefix = (f"{output}.{config.TARGET_EXT}" if config.TARGET_EXT else f"{output}-converted"), b""
        else:
            symbols = patches.reshape(-1)[: patch_size + len(content)]  # [abc] content, which may end inside a patch
            prefix = content.tobytes()
        if len(symbols) >= patch_size * patch_length:
            why = f"too long: no room is left in the model's {patch_length} patches of {patch_size} bytes"
            if config.MODE == "complete":
                why += f"; PROMPT_BYTES {patch_size * (patch_length - 1) - 1} or fewer leave some"
            failed.append((path, why))
            continue
        if os.path.relpath(output, config.OUTPUT_FOLDER).lower() in index_page.INDEX_NAMES:
            failed.append((path, "its output would have the name of a file that lists the outputs"))
            continue
        for candidate in range(config.NUM_CANDIDATES):
            # the random numbers of a file follow its name, not what else is in the folder; a 0 at the end changes nothing
            stream = [config.SEED, zlib.crc32(os.fsencode(name)), candidate]
            yield generation.Prompt((Output(output, path, prefix), candidate), symbols, stream)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def best_candidates(continuations, count):
    """Yields (Output, Continuation) once all `count` candidates of an Output are there: the likeliest, the first of equals."""
    waiting = {}  # path -> (candidates still to come, rank of the best so far, that candidate)
    for continuation in continuations:
        output, candidate = continuation.key
        rank = (continuation.mean_log_probability(), -candidate)
        missing, best_rank, best = waiting.pop(output.path, (count, None, None))
        if best is None or rank > best_rank:
            best_rank, best = rank, continuation
        if missing == 1:
            yield output, best
        else:
            waiting[output.path] = (missing - 1, best_rank, best)


def summarize(num_written, cut_off, failed, patch_length):
    """Prints how the run went: what was written, what was cut off, what could not be done."""
    print(f"{num_written} files written to {config.OUTPUT_FOLDER}")
    if cut_off:
        print(f"{len(cut_off)} of them cut off, since the model's {patch_length} patches (PATCH_LENGTH) were full:")
        print("\n".join(f"  {system.escape_name(path)}" for path in cut_off))
    list_failed(failed)


def list_failed(failed):
    """Prints the files that could not be done, pairs of path and reason."""
    if failed:
        print(f"{len(failed)} could not be done:")
        print("\n".join(f"  {system.escape_name(path)}: {why}" for path, why in failed))


def list_written(rows):
    """Writes the index of OUTPUT_FOLDER with these rows; raises UserError where it cannot."""
    try:
        index_page.write_index(config.OUTPUT_FOLDER, rows)
    except OSError as error:
        raise system.UserError(
            f"OUTPUT_FOLDER: cannot write {error.filename!r}: {error.strerror}; the {len(rows)} files that this run has written there stay, "
            "but are not all listed"
        ) from None


def write_output(path, content, is_ours, failed):
    """Writes an output file and returns whether it could; appends (path, reason) to `failed` if not.

    Args:
        is_ours: function of the path: whether the file that is there is that of an earlier run; any other is kept as a backup.

    Raises:
        OSError: the disk is full, so that no other file would fit either.
    """
    if os.path.islink(path):
        failed.append((path, "a link stands in its place, and may lead to a file of yours"))
        return False
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isfile(path) and not is_ours(path):
            system.keep_backup(path)
        system.write_whole(path, content)
    except OSError as error:
        if error.errno in system.FULL_DISK:
            raise
        failed.append((path, error.strerror))
        return False
    return True


def write_files(model, extensions, files, check_stop):
    """Writes what the model generates, or makes of the input files; returns the exit status.

    Args:
        model: bGPTLMHeadModel.
        extensions: those of its training files.
        files: the input files; None = none, to generate.
        check_stop: called between steps; raises KeyboardInterrupt to stop.
    """
    patch_size, patch_length = model.patch_size, model.patch_length
    rows, cut_off, failed = [], [], []  # rows: of the index
    known = index_page.read_index(os.path.join(config.OUTPUT_FOLDER, index_page.INDEX_NAMES[0])) or {}
    indexed_at = time.monotonic()
    num_candidates = 1 if files is None else config.NUM_CANDIDATES
    if files is None:
        num_outputs, prompts = config.NUM_SAMPLES, new_prompts(patch_size, extensions)
    else:
        num_outputs, prompts = len(files), input_prompts(files, patch_size, patch_length, extensions, failed)
    batch_size = min(config.INFERENCE_BATCH_SIZE, num_outputs * num_candidates)
    sampling = generation.Sampling(config.TOP_K, config.TOP_P, config.TEMPERATURE)

    def is_listed(path):
        return system.escape_name(os.path.relpath(path, config.OUTPUT_FOLDER)) in known

    try:
        with tqdm(unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

            def progress(num_patches):
                bar.update(num_patches * patch_size)
                check_stop()

            continuations = generation.generate(model, prompts, batch_size, sampling, progress)
            for output, continuation in best_candidates(continuations, num_candidates):
                content = output.prefix + utils.to_content(continuation.symbols)
                if not write_output(output.path, content, is_listed, failed):
                    continue
                if continuation.cut_off:
                    cut_off.append(output.path)
                how = "cut off" if continuation.cut_off else "ended"
                name = os.path.relpath(output.path, config.OUTPUT_FOLDER)
                rows.append((name, output.source, len(content), continuation.bits_per_byte(), how, config.SEED))
                bar.set_postfix_str(f"{len(rows)}/{num_outputs} files", refresh=False)
                if time.monotonic() - indexed_at > INDEX_SECONDS:
                    list_written(rows)
                    indexed_at = time.monotonic()
    finally:  # also after Ctrl-C or on a full disk: what is written stays, and is told
        summarize(len(rows), cut_off, failed, patch_length)
        list_written(rows)
    return 1 if failed else 0


def classify_files(model, labels, label_mode, files, dtype, check_stop):
    """Writes predictions.tsv: of each file the three likeliest labels with their probabilities; returns the exit status.

    A run that is stopped writes predictions-partial.tsv.

    Where the files' names carry labels that the model knows, prints how many predictions are right.

    Args:
        model: bGPTForClassification.
        labels: list of its labels.
        label_mode: what the label of a file is, see `labeling.label_of`.
        files: the input files.
        dtype: torch.dtype to compute in.
        check_stop: see `write_files`.
    """
    examples = utils.Examples.of(files)
    dataset = utils.ByteDataset(examples, model.patch_size, model.patch_length)
    lengths = examples.lengths(model.patch_size)
    if longer := int((lengths > model.patch_length).sum()):
        print(f"{longer} of {len(files)} files are longer than the model's {model.patch_length} patches: their heads are classified")
    order = np.argsort(lengths.clip(max=model.patch_length), kind="stable").tolist()  # least padding
    found, failed = {}, []  # found: {index of a file: [(probability, index of a label), …]}, the likeliest first
    try:
        with tqdm(total=len(files), unit="file", desc=config.MODE, **system.progress_options()) as bar:
            for start in range(0, len(order), config.INFERENCE_BATCH_SIZE):
                check_stop()
                chosen, sequences = order[start : start + config.INFERENCE_BATCH_SIZE], {}
                for index in chosen:
                    try:
                        sequences[index] = dataset[index]
                    except system.UserError as error:
                        failed.append((files[index], str(error)))
                if sequences:
                    batch = utils.Batch(sequences.values())
                    with torch.inference_mode(), devices.autocast(model.device, dtype):
                        logits = model(batch.patches_on(model.device), batch.masks)  # (B, labels)
                    likeliest = logits.double().softmax(-1).topk(min(3, len(labels)))  # (B, 3) each
                    found |= {i: list(zip(*each)) for i, *each in zip(sequences, likeliest.values.tolist(), likeliest.indices.tolist())}
                bar.update(len(chosen))
    finally:  # also after Ctrl-C: what is done stays, and is told, but takes the place of no earlier run's predictions
        is_whole = len(found) + len(failed) == len(files)
        if is_whole:
            report(found, files, labels, label_mode)
        list_failed(failed)
        if found or is_whole:
            write_predictions(found, files, labels, "predictions.tsv" if is_whole else "predictions-partial.tsv")
    return 1 if failed else 0


def write_predictions(found, files, labels, name):
    """Writes a table into OUTPUT_FOLDER, of that name, from {index of a file: [(probability, index of a label), …]}."""
    path = os.path.join(config.OUTPUT_FOLDER, name)
    ranks = ("", " 2", " 3")[: min(3, len(labels))]
    lines = [["file"] + [word for rank in ranks for word in (f"label{rank}", f"probability{rank}")]]
    for index in sorted(found):
        name = system.escape_name(os.path.relpath(files[index], config.INPUT_FOLDER))
        shown = [word for probability, label in found[index] for word in (system.escape_name(labels[label]), f"{probability:.4f}")]
        lines.append([name, *shown])
    system.write_whole(path, "".join("\t".join(line) + "\n" for line in lines).encode())
    print(f"{len(found)} of {len(files)} files classified in {path}")


def report(found, files, labels, label_mode):
    """Prints how many predictions are right, among the files whose names (or folders) carry a label that the model knows."""
    indices = {label: index for index, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)))
    for index in found:
        true = indices.get(labeling.label_of(files[index], label_mode))
        if true is not None:
            confusion[true, found[index][0][1]] += 1
    if confusion.any():
        print(f"the {'folders' if label_mode == 'folder' else 'names'} of {confusion.sum():.0f} of them carry a label that the model knows:")
        print(evaluation.classification_report(confusion, labels), end="")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def examples_to_score(files, patch_size, patch_length):
    """Returns (Examples to evaluate, the names of the pairs that do not fit in `patch_length` and their patches).

    Raises:
        UserError: CONVERSION_MODE and INPUT_EXT leave no pair that fits.
    """
    if config.CONVERSION_MODE is None:
        return utils.Examples.of(files), []
    pairs = selection.directed(selection.find_pairs(files, config.CONVERSION_MODE, "INPUT_FOLDER"), config.CONVERSION_MODE)
    if config.INPUT_EXT is not None:
        wanted = config.INPUT_EXT.lower()
        pairs = pairs.select([i for i, (source, _) in enumerate(pairs) if listing.extension_of(source).lower() == wanted])
        if not pairs:
            raise system.UserError(f"INPUT_EXT: {config.INPUT_EXT!r} is not what CONVERSION_MODE {config.CONVERSION_MODE!r} converts from")
    lengths = pairs.lengths(patch_size)
    unfit = [(" -> ".join(pairs[i]), int(lengths[i])) for i in np.flatnonzero(lengths > patch_length)]
    if len(unfit) == len(pairs):
        raise system.UserError(
            f"INPUT_FOLDER: no pair fits in the model's {patch_length} patches (PATCH_LENGTH); the shortest has {min(lengths)}"
        )
    return pairs.select(np.flatnonzero(lengths <= patch_length)), unfit


def evaluate_files(model, files, dtype, check_stop):
    """Writes evaluation.tsv, .json and .html, and prints how well the model predicts the input files; returns the exit status.

    The arguments are those of `classify_files`; the model is a bGPTLMHeadModel.
    """
    examples, unfit = examples_to_score(files, model.patch_size, model.patch_length)
    windows, scores, failed = windowing.evaluation_windows(examples, model.patch_size, model.patch_length), [], []
    total = int(windows.sizes.sum() + len(examples))
    with tqdm(total=total, unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

        def progress(num_symbols):
            bar.update(num_symbols)
            check_stop()

        for score in evaluation.score_files(model, windows, config.INPUT_FOLDER, config.INFERENCE_BATCH_SIZE, dtype, progress, failed):
            scores.append(score)
            bar.set_postfix_str(f"{len(scores)}/{len(examples)} files", refresh=False)
    if scores:
        scores.sort(key=lambda score: score.index)
        training = config.as_dict(training_only=True).keys() - {"PRECISION", "CONVERSION_MODE"}  # the model's own are not config.py's
        settings = {name: value for name, value in config.as_dict().items() if name not in training}
        print(report_page.write_report(config.OUTPUT_FOLDER, model, windows, scores, dtype, settings, unfit, failed))
    if unfit:
        print(f"{len(unfit)} pairs do not fit in the model's {model.patch_length} patches (PATCH_LENGTH) and are left out:")
        print("\n".join(f"  {system.escape_name(name)}: {length} patches" for name, length in unfit))
    list_failed(failed)
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Compression
# ---------------------------------------------------------------------------------------------------------------------


def code_files(model, files, check_stop):
    """Compresses the input files, or decompresses them, and prints how large they are; returns the exit status.

    The arguments are those of `classify_files`; the model is a bGPTLMHeadModel in float32 on the CPU.
    """
    from bgpt import lossless  # here, since no other MODE needs the package constriction

    is_compressing, failed = config.MODE == "compress", []
    paths = [files[i] for i in np.argsort(-files.sizes, kind="stable")]  # the longest first, so that the last batches are full
    if not is_compressing:
        paths = [path for path in paths if path.endswith(lossless.SUFFIX)]
        if not paths:
            raise system.UserError(f"INPUT_FOLDER: no file in {config.INPUT_FOLDER!r} ends in {lossless.SUFFIX}")
        if len(paths) < len(files):
            print(f"{len(files) - len(paths)} of {len(files)} files do not end in {lossless.SUFFIX} and are left out")
    coder = lossless.Coder(model, config.INFERENCE_BATCH_SIZE)
    total = int(files.sizes.clip(min=0).sum()) * (1 + config.VERIFY) if is_compressing else None  # else the containers know
    sizes, start = [], time.monotonic()  # sizes: (bytes of the file, of its container, with xz) of each
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=config.MODE, **system.progress_options()) as bar:

            def progress(num_bytes):
                bar.update(num_bytes)
                check_stop()

            if is_compressing:
                coded = lossless.compress(coder, paths, config.VERIFY, progress, failed)
            else:
                coded = lossless.decompress(coder, paths, progress, failed)
            for path, content, container in coded:
                output = os.path.join(config.OUTPUT_FOLDER, os.path.relpath(path, config.INPUT_FOLDER))
                output = output + lossless.SUFFIX if is_compressing else output.removesuffix(lossless.SUFFIX)
                result = container if is_compressing else content
                if write_output(output, result, lambda path, content=result: holds(path, content), failed):
                    sizes.append((len(content), len(container), len(evaluation.COMPRESSORS["xz -9e"](content))))
                bar.set_postfix_str(f"{len(sizes)}/{len(paths)} files", refresh=False)
    finally:  # also after Ctrl-C or on a full disk: what is written stays, and is told
        print(f"{len(sizes)} files written to {config.OUTPUT_FOLDER}")
        if sizes:
            report_sizes(*np.array(sizes, dtype=np.int64).sum(0).tolist(), time.monotonic() - start)
        list_failed(failed)
    return 1 if failed else 0


def holds(path, content):
    """Returns whether the file at a path has this very content."""
    if os.path.getsize(path) != len(content):
        return False
    with open(path, "rb") as file:
        return file.read() == content


def report_sizes(content, containers, compressed, seconds):
    """Prints the bytes of files, of their containers and with xz, in bits per byte."""
    sizes = f"{content:,} bytes, {containers:,} in containers"
    if content:
        sizes += f": {8 * containers / content:.4f} bits per byte (xz -9e, file by file: {8 * compressed / content:.4f})"
    print(f"{sizes}; {seconds:.1f} s, {content / seconds:,.0f} bytes/s")


def main():
    devices.tune_memory()
    is_coding = config.MODE in CODING_MODES
    device = torch.device("cpu") if is_coding else devices.pick_device()
    dtype = torch.float32 if is_coding else devices.pick_dtype(config.PRECISION, device)
    files = None if config.MODE == "generate" else find_inputs()
    model, loaded = checkpoint.load_model(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    kind = checkpoint.model_sizes(loaded["model"], "").kind
    wanted = "classifier" if config.MODE == "classify" else "generative model"
    if kind != wanted:
        raise system.UserError(
            f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r} is a {kind}; MODE {config.MODE!r} needs a {wanted}, from "
            f"{'train-cls.py' if config.MODE == 'classify' else 'train-gen.py'}"
            + "; MODE 'classify' tells how good a classifier is" * (config.MODE == "evaluate")
        )
    if config.MODE == "convert":
        check_extensions(loaded)
    system.make_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    own_names = {"classify": ("predictions.tsv",), "evaluate": report_page.NAMES, "compress": (), "decompress": ()}
    for name in own_names.get(config.MODE, index_page.INDEX_NAMES):
        system.check_writable(os.path.join(config.OUTPUT_FOLDER, name), "OUTPUT_FOLDER")
    seed = "" if config.MODE in own_names else f", seed {config.SEED}"
    print(f"{config.MODE} with {config.INFERENCE_WEIGHTS_PATH}: {dtype} on {device}{seed}")
    # two runs at once would take each other's places, in the names of files and in the index
    locked = index_page.locked_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    with devices.memory_errors(), system.delayed_signals(impatient=True) as stop_signal, locked:

        def check_stop():
            if stop_signal():
                raise KeyboardInterrupt(stop_signal())

        if config.MODE == "classify":
            labels = checkpoint.label_list(loaded, f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r}")
            return classify_files(model.to(device).eval(), labels, checkpoint.label_mode(loaded), files, dtype, check_stop)
        if config.MODE == "evaluate":
            return evaluate_files(model.to(device).eval(), files, dtype, check_stop)
        if is_coding:
            return code_files(model.eval(), files, check_stop)
        return write_files(model.to(device, dtype).eval(), loaded.get("extensions") or [], files, check_stop)


if __name__ == "__main__":
    system.run(main)
