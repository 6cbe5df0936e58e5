"""Generates, converts, completes or classifies files with a trained model; the settings are in config.py.

    python inference.py --MODE generate --TARGET_EXT mid --NUM_SAMPLES 10
    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER tunes
    python inference.py --MODE complete --INPUT_FOLDER tunes --PROMPT_BYTES 200
    python inference.py --MODE classify --INPUT_FOLDER news --INFERENCE_WEIGHTS_PATH news.pth
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the modules below load ends the script, without a traceback

import dataclasses
import os
import sys
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

import config
import utils


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


def new_prompts(patch_size):
    """Yields the Prompts of NUM_SAMPLES files of TARGET_EXT from nothing, named YYYYmmdd-HHMMSS-i.ext.

    The key of a Prompt is (Output, number of the candidate); here, there is one candidate of each.
    """
    taken = {name[:15] for name in os.listdir(config.OUTPUT_FOLDER)}
    while (stamp := time.strftime("%Y%m%d-%H%M%S")) in taken:  # another run of this very second
        time.sleep(0.1)
    suffix = f".{config.TARGET_EXT}" if config.TARGET_EXT else ""
    symbols = utils.extension_patch(config.TARGET_EXT, patch_size)
    for i in range(1, config.NUM_SAMPLES + 1):
        path = os.path.join(config.OUTPUT_FOLDER, f"{stamp}-{i}{suffix}")
        yield utils.Prompt((Output(path, "", b""), 0), symbols, [config.SEED, i])


def find_inputs():
    """Returns the input files of MODE convert, complete or classify.

    Raises:
        UserError: there are none, or the settings do not allow to tell.
    """
    if config.MODE == "convert" and config.INPUT_EXT is None:
        raise utils.UserError('INPUT_EXT is None; to convert, it must be the extension of the input files, such as "abc"')
    files = utils.list_files([config.INPUT_FOLDER], "INPUT_FOLDER", config.INPUT_EXT)
    if not files:
        kind = "files" if config.INPUT_EXT is None else f"files of INPUT_EXT {config.INPUT_EXT!r}"
        raise utils.UserError(f"INPUT_FOLDER: no {kind} in {config.INPUT_FOLDER!r}")
    folders = [os.path.realpath(folder) for folder in (config.INPUT_FOLDER, config.OUTPUT_FOLDER)]
    if os.path.commonpath(folders) in folders:
        inner, outer = ("OUTPUT_FOLDER", "INPUT_FOLDER") if os.path.commonpath(folders) == folders[0] else ("INPUT_FOLDER", "OUTPUT_FOLDER")
        raise utils.UserError(
            f"{inner}: {getattr(config, inner)!r} lies in {outer} {getattr(config, outer)!r}, so results would mix with inputs, or take "
            "their places; it must be a folder apart from it"
        )
    return files


def input_prompts(files, patch_size, patch_length, failed):
    """Yields NUM_CANDIDATES Prompts for each input file; appends (path, reason) to `failed` for those that cannot be done."""
    for path in files:
        name = os.path.relpath(path, config.INPUT_FOLDER)
        output = os.path.join(config.OUTPUT_FOLDER, name)
        try:
            # no more is read than tells that it is too much
            given = config.PROMPT_BYTES if config.MODE == "complete" and config.PROMPT_BYTES else patch_size * patch_length
            content = np.fromfile(path, dtype=np.uint8, count=min(given, patch_size * patch_length))
        except OSError as error:
            failed.append((path, error.strerror))
            continue
        patches = utils.to_patches(content, utils.extension_of(path), patch_size)
        if config.MODE == "convert":
            target = utils.extension_patch(config.TARGET_EXT, patch_size)
            symbols = np.concatenate((patches[:-1].reshape(-1), target))  # [abc] content [mid]
            output, prefix = (f"{output}.{config.TARGET_EXT}" if config.TARGET_EXT else f"{output}-converted"), b""
        else:
            symbols = patches.reshape(-1)[: patch_size + len(content)]  # [abc] content, which may end inside a patch
            prefix = content.tobytes()
        if len(symbols) >= patch_size * patch_length:
            failed.append((path, f"too long: no room is left in the model's {patch_length} patches of {patch_size} bytes"))
            continue
        if os.path.relpath(output, config.OUTPUT_FOLDER).lower() in utils.INDEX_NAMES:
            failed.append((path, "its output would have the name of a file that lists the outputs"))
            continue
        for candidate in range(config.NUM_CANDIDATES):
            # the random numbers of a file follow its name, not what else is in the folder; a 0 at the end changes nothing
            stream = [config.SEED, zlib.crc32(os.fsencode(name)), candidate]
            yield utils.Prompt((Output(output, path, prefix), candidate), symbols, stream)


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
        print("\n".join(f"  {utils.escape_name(path)}" for path in cut_off))
    list_failed(failed)


def list_failed(failed):
    """Prints the files that could not be done, pairs of path and reason."""
    if failed:
        print(f"{len(failed)} could not be done:")
        print("\n".join(f"  {utils.escape_name(path)}: {why}" for path, why in failed))


def list_written(rows):
    """Writes the index of OUTPUT_FOLDER with these rows; raises UserError where it cannot."""
    try:
        utils.write_index(config.OUTPUT_FOLDER, rows)
    except OSError as error:
        raise utils.UserError(
            f"OUTPUT_FOLDER: cannot write {error.filename!r}: {error.strerror}; the {len(rows)} files that this run has written there stay, "
            "but are not all listed"
        ) from None


def write_files(model, files, check_stop):
    """Writes what the model generates, or makes of the input files; returns the exit status.

    Args:
        model: bGPTLMHeadModel.
        files: the input files; None = none, to generate.
        check_stop: called between steps; raises KeyboardInterrupt or SystemExit to stop.
    """
    patch_size, patch_length = model.patch_level_decoder.patch_size, model.patch_level_decoder.config.n_positions
    rows, cut_off, failed = [], [], []  # rows: of the index
    known, indexed_at = utils.read_index(os.path.join(config.OUTPUT_FOLDER, utils.INDEX_NAMES[0])) or {}, time.monotonic()
    num_candidates = 1 if files is None else config.NUM_CANDIDATES
    if files is None:
        num_outputs, prompts = config.NUM_SAMPLES, new_prompts(patch_size)
    else:
        num_outputs, prompts = len(files), input_prompts(files, patch_size, patch_length, failed)
    batch_size = min(config.INFERENCE_BATCH_SIZE, num_outputs * num_candidates)
    sampling = utils.Sampling(config.TOP_K, config.TOP_P, config.TEMPERATURE)
    try:
        with tqdm(unit="B", unit_scale=True, desc=config.MODE, dynamic_ncols=True) as bar:

            def progress(num_patches):
                bar.update(num_patches * patch_size)
                check_stop()

            continuations = utils.generate(model, prompts, batch_size, sampling, progress)
            for output, continuation in best_candidates(continuations, num_candidates):
                content = output.prefix + utils.to_content(continuation.symbols)
                name = os.path.relpath(output.path, config.OUTPUT_FOLDER)
                if os.path.islink(output.path):
                    failed.append((output.path, "a link stands in its place, and may lead to a file of yours"))
                    continue
                try:
                    os.makedirs(os.path.dirname(output.path), exist_ok=True)
                    if utils.escape_name(name) not in known and os.path.isfile(output.path):
                        utils.keep_backup(output.path)
                    with utils.replacing(output.path) as file:
                        file.write(content)
                except OSError as error:
                    if error.errno in utils.FULL_DISK:  # nor will the others fit
                        raise
                    failed.append((output.path, error.strerror))
                    continue
                if continuation.cut_off:
                    cut_off.append(output.path)
                how = "cut off" if continuation.cut_off else "ended"
                rows.append((name, output.source, len(content), continuation.bits_per_byte(), how, config.SEED))
                bar.set_postfix_str(f"{len(rows)}/{num_outputs} files", refresh=False)
                if time.monotonic() - indexed_at > INDEX_SECONDS:
                    list_written(rows)
                    indexed_at = time.monotonic()
    finally:  # also after Ctrl-C or on a full disk: what is written stays, and is told
        summarize(len(rows), cut_off, failed, patch_length)
        list_written(rows)
    return 1 if failed else 0


def classify_files(model, labels, files, dtype, check_stop):
    """Writes predictions.tsv: of each file the three likeliest labels with their probabilities; returns the exit status.

    Where the files' names carry labels that the model knows, prints how many predictions are right.

    Args:
        model: bGPTForClassification.
        labels: list of its labels.
        files: the input files.
        dtype: torch.dtype to compute in.
        check_stop: see `write_files`.
    """
    patch_level = model.patch_level_decoder
    examples = utils.Examples.of(files)
    dataset = utils.ByteDataset(examples, patch_level.patch_size, patch_level.config.n_positions)
    # sorted by length, since that needs the least padding
    order = np.argsort(examples.lengths(dataset.patch_size, dataset.patch_length), kind="stable").tolist()
    num_shown = min(3, len(labels))
    found, failed = {}, []  # found: {place of a file: [(probability, index of a label), …]}, the likeliest first
    with tqdm(total=len(files), unit="file", desc=config.MODE, dynamic_ncols=True) as bar:
        for start in range(0, len(order), config.INFERENCE_BATCH_SIZE):
            check_stop()
            samples = {place: dataset[place] for place in order[start : start + config.INFERENCE_BATCH_SIZE]}
            failed += [(files[place], str(each)) for place, each in samples.items() if isinstance(each, utils.UserError)]
            readable = [place for place, each in samples.items() if not isinstance(each, utils.UserError)]
            if readable:
                batch = utils.collate([samples[place] for place in readable])
                with torch.inference_mode(), utils.autocast(model.device, dtype):
                    logits = model(batch.patches.long().to(model.device), batch.masks)  # (B, labels)
                likeliest = logits.double().softmax(-1).topk(num_shown)  # (B, 3) each
                found |= {
                    place: list(zip(*each)) for place, *each in zip(readable, likeliest.values.tolist(), likeliest.indices.tolist())
                }
            bar.update(len(samples))
    path = os.path.join(config.OUTPUT_FOLDER, "predictions.tsv")
    columns = ["file"] + [word for place in ("", " 2", " 3")[:num_shown] for word in (f"label{place}", f"probability{place}")]
    lines = [columns]
    for place in sorted(found):
        name = utils.escape_name(os.path.relpath(files[place], config.INPUT_FOLDER))
        shown = [word for probability, index in found[place] for word in (utils.escape_name(labels[index]), f"{probability:.4f}")]
        lines.append([name, *shown])
    with utils.replacing(path) as file:
        file.write("".join("\t".join(line) + "\n" for line in lines).encode())
    print(f"{len(found)} files classified in {path}")
    report(found, files, labels)
    list_failed(failed)
    return 1 if failed else 0


def report(found, files, labels):
    """Prints how many predictions are right, among the files whose names carry a label that the model knows."""
    indices = {label: index for index, label in enumerate(labels)}
    known = {place: indices.get(utils.label_of(files[place])) for place in found}
    known = {place: index for place, index in known.items() if index is not None}
    if not known:
        return
    confusion = np.zeros((len(labels), len(labels)))
    for place, index in known.items():
        confusion[index, found[place][0][1]] += 1
    print(f"the names of {len(known)} of them carry a label that the model knows:")
    print(utils.classification_report(confusion, labels), end="")


def main():
    utils.tune_memory()
    device = utils.pick_device()
    dtype = utils.pick_dtype(config.PRECISION, device)
    files = None if config.MODE == "generate" else find_inputs()
    model, checkpoint = utils.load_model(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    wanted = "classifier" if config.MODE == "classify" else "generative model"
    is_classifier = isinstance(model, utils.bGPTForClassification)
    if is_classifier != (config.MODE == "classify"):
        raise utils.UserError(
            f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r} is a {'classifier' if is_classifier else 'generative model'}; "
            f"MODE {config.MODE!r} needs a {wanted}, from {'train-cls.py' if config.MODE == 'classify' else 'train-gen.py'}"
        )
    utils.make_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    for name in ("predictions.tsv",) if is_classifier else utils.INDEX_NAMES:
        utils.check_writable(os.path.join(config.OUTPUT_FOLDER, name), "OUTPUT_FOLDER")
    seed = "" if is_classifier else f", seed {config.SEED}"
    print(f"{config.MODE} with {config.INFERENCE_WEIGHTS_PATH}: {dtype} on {device}{seed}")
    with utils.delayed_signals(impatient=True) as stop_signal:

        def check_stop():
            if stop_signal():
                raise KeyboardInterrupt if stop_signal() == signal.SIGINT else SystemExit(128 + stop_signal())

        # two runs at once would take each other's places, in the names of files and in the index
        with utils.locked_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER"):
            if is_classifier:
                labels = utils.label_list(checkpoint, f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r}")
                return classify_files(model.to(device).eval(), labels, files, dtype, check_stop)
            return write_files(model.to(device, dtype).eval(), files, check_stop)


if __name__ == "__main__":
    utils.run_main(main, config.override)
