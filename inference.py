"""Generates, converts, completes or classifies files with a trained model; the settings are in config.py.

    python inference.py --MODE generate --TARGET_EXT mid --NUM_SAMPLES 10
    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER tunes
    python inference.py --MODE complete --INPUT_FOLDER tunes --PROMPT_BYTES 200
    python inference.py --MODE classify --INPUT_FOLDER news --INFERENCE_WEIGHTS_PATH news.pth
"""

import os

import config
import system


def check_settings():
    """Raises UserError for what can be told without PyTorch."""
    system.check_checkpoint(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    if config.MODE != "generate":
        check_folders()


def check_folders():
    """Raises UserError if INPUT_FOLDER is missing, or it and OUTPUT_FOLDER lie in each other, or INPUT_EXT is to be given."""
    if config.MODE == "convert" and config.INPUT_EXT is None:
        raise system.UserError('INPUT_EXT is None; to convert, it must be the extension of the input files, such as "abc"')
    system.check_folders([config.INPUT_FOLDER], "INPUT_FOLDER")
    inputs, outputs = (os.path.realpath(folder) for folder in (config.INPUT_FOLDER, config.OUTPUT_FOLDER))
    if os.path.commonpath([inputs, outputs]) in (inputs, outputs):
        inner, outer = ("OUTPUT_FOLDER", "INPUT_FOLDER") if os.path.commonpath([inputs, outputs]) == inputs else ("INPUT_FOLDER", "OUTPUT_FOLDER")
        raise system.UserError(
            f"{inner}: {getattr(config, inner)!r} lies in {outer} {getattr(config, outer)!r}, so results would mix with inputs, or take "
            "their places; it must be a folder apart from it"
        )


if __name__ == "__main__":
    system.start(config.override, check_settings)  # here, so that mistakes are answered before the seconds that PyTorch takes to load

import base64
import contextlib
import dataclasses
import html
import re
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import devices
import evaluation
import generation
import labeling
import listing
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
                f"extensions: {', '.join(system.escape_name(each) or '(none)' for each in known[:20])}"
            )
    direction, where = (config.INPUT_EXT.lower(), config.TARGET_EXT.lower()), config.INFERENCE_WEIGHTS_PATH
    if not isinstance(settings, dict):
        print(f"note: {where} does not tell what it was trained on, so it may not have learned {direction[0]} -> {direction[1]}")
    elif settings.get("CONVERSION_MODE") is None:
        print(f"note: {where} was trained on plain files, without CONVERSION_MODE: it has never converted anything")
    else:
        source, target, both = utils.split_conversion_mode(settings["CONVERSION_MODE"])
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
    """Returns the input files of MODE convert, complete or classify.

    Raises:
        UserError: there are none, or the settings do not allow to tell.
    """
    check_folders()
    files = listing.list_files([config.INPUT_FOLDER], "INPUT_FOLDER", config.INPUT_EXT)
    if not files:
        kind = "files" if config.INPUT_EXT is None else f"files of INPUT_EXT {config.INPUT_EXT!r}"
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
            # no more is read than tells that it is too much
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
        if os.path.relpath(output, config.OUTPUT_FOLDER).lower() in INDEX_NAMES:
            failed.append((path, "its output would have the name of a file that lists the outputs"))
            continue
        for candidate in range(config.NUM_CANDIDATES):
            # the random numbers of a file follow its name, not what else is in the folder; a 0 at the end changes nothing
            stream = [config.SEED, zlib.crc32(os.fsencode(name)), candidate]
            yield generation.Prompt((Output(output, path, prefix), candidate), symbols, stream)


# ---------------------------------------------------------------------------------------------------------------------
# The index of a folder of outputs
# ---------------------------------------------------------------------------------------------------------------------

INDEX_NAMES = ("index.tsv", "index.html")
INDEX_COLUMNS = ("file", "source", "bytes", "bits per byte", "cut off or ended", "seed")
SHOWN_TEXT, SHOWN_HEX = 2000, 256  # most bytes of a file that its text or hex dump on the page stands for
SHOWN_BYTES = 2**24  # most bytes of files that a page holds in all; the files after that are listed with their figures only

_IMAGES = {"bmp": "bmp", "gif": "gif", "jpeg": "jpeg", "jpg": "jpeg", "png": "png", "svg": "svg+xml", "webp": "webp"}
_SOUNDS = {"flac": "flac", "mp3": "mpeg", "ogg": "ogg", "wav": "wav"}

# the policy: whatever an output holds, the page runs no script and loads nothing
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bGPT: {count:,} outputs</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(32em, 1fr)); gap: 1em; }}
article {{ border: 1px solid #bbb; border-radius: 4px; padding: .7em; min-width: 0; content-visibility: auto; }}
h2 {{ font-size: 1em; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .2em 0 .6em; color: #555; overflow-wrap: anywhere; }}
pre {{ margin: 0; max-height: 20em; overflow: auto; background: #f4f4f4; padding: .4em; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 11px; }}
img {{ max-width: 100%; min-width: 8em; image-rendering: pixelated; }}
</style></head><body><h1>bGPT: {count:,} outputs</h1><p>{note}</p><main>
{articles}
</main></body></html>
"""


@contextlib.contextmanager
def locked_folder(folder, name):
    """Keeps other runs out of a folder of outputs, and removes what killed ones left unfinished there."""
    with system.locked(os.path.join(folder, INDEX_NAMES[0]), name):
        system.remove_stale_files(folder)
        yield


def read_index(path):
    """Returns {file: the fields of its line, as they stand there} of an index.tsv; None if the file is missing or no index."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = [line.split("\t") for line in file.read().split("\n") if line]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if not lines or lines[0] != list(INDEX_COLUMNS):
        return None
    return {fields[0]: fields for fields in lines[1:] if len(fields) == len(INDEX_COLUMNS)}


def write_index(folder, rows):
    """Writes index.tsv and index.html into a folder of outputs.

    What an earlier run listed stays listed, as long as its file is there. A file of one of these names that is not an
    index is kept under another name.

    Args:
        folder: where the outputs are.
        rows: list of tuples of INDEX_COLUMNS: path within the folder, path of the input or "", bytes, bits per byte or
            None, "cut off" or "ended", seed.
    """
    table, page = (os.path.join(folder, name) for name in INDEX_NAMES)
    listed = read_index(table)
    if listed is None:
        listed = {}
        system.keep_backup(table)
        system.keep_backup(page)
    for file, source, num_bytes, bits, how, seed in rows:
        bits = "" if bits is None else f"{bits:.4f}"
        listed[system.escape_name(file)] = [system.escape_name(file), system.escape_name(source), str(num_bytes), bits, how, str(seed)]
    # files counted through in their names stand in that order: 2 before 10
    names = sorted(listed, key=lambda name: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    names = [name for name in names if os.path.isfile(os.path.join(folder, system.unescape_name(name)))]
    system.write_whole(table, "".join("\t".join(fields) + "\n" for fields in [INDEX_COLUMNS, *map(listed.get, names)]).encode())
    articles, shown = [], 0
    for name in names:
        path = os.path.join(folder, system.unescape_name(name))
        size, content = os.path.getsize(path), None
        if shown + size <= SHOWN_BYTES:
            shown += size
            with open(path, "rb") as file:
                content = file.read()
        articles.append(_article(listed[name], content, listing.extension_of(path).lower()))
    note = f"All figures: {INDEX_NAMES[0]}. Contents are shown up to {SHOWN_BYTES / 2**20:.0f} MiB in all."
    system.write_whole(page, _PAGE.format(count=len(names), note=note, articles="\n".join(articles)).encode())


def _article(fields, content, extension):
    """Returns a file's part of the page: its figures, and its content (bytes) unless that is None."""
    file, source, num_bytes, bits, how, seed = map(html.escape, fields)
    figures = [f"from {source}"] * bool(source) + [f"{num_bytes} bytes"] + [f"{bits} bits per byte"] * bool(bits)
    figures = ", ".join([*figures, how, f"seed {seed}"])
    shown = "" if content is None else _show(content, extension)
    return f"<article><h2>{file}</h2><p>{figures}</p>{shown}</article>"


def _show(content, extension):
    """Returns a file's content as HTML: an image, a sound, text, or its first bytes in hexadecimal."""
    if extension in _IMAGES:
        return f'<img alt="not a readable image" src="{_data_uri(content, "image/" + _IMAGES[extension])}">'
    if extension in _SOUNDS:
        return f'<audio controls preload="metadata" src="{_data_uri(content, "audio/" + _SOUNDS[extension])}"></audio>'
    text = content[:SHOWN_TEXT].decode("utf-8", "replace").replace("\r\n", "\n")
    odd = {c for c in text if not c.isprintable() and c not in "\n\t"}
    most = SHOWN_TEXT
    if extension not in ("abc", "txt") and (odd or "\ufffd" in text[:-1]):  # the last character may be cut through
        lines = []
        for start in range(0, min(len(content), SHOWN_HEX), 16):
            part = content[start : min(start + 16, SHOWN_HEX)]
            printable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            lines.append(f"{start:04x}  {part.hex(' '):<47}  {printable}")
        text, odd, most = "\n".join(lines), (), SHOWN_HEX
    for character in odd:
        text = text.replace(character, "\ufffd")
    if len(content) > most:
        text += f"\n… and {len(content) - most:,} more bytes"
    return f"<pre>{html.escape(text)}</pre>"


def _data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
        write_index(config.OUTPUT_FOLDER, rows)
    except OSError as error:
        raise system.UserError(
            f"OUTPUT_FOLDER: cannot write {error.filename!r}: {error.strerror}; the {len(rows)} files that this run has written there stay, "
            "but are not all listed"
        ) from None


def write_files(model, extensions, files, check_stop):
    """Writes what the model generates, or makes of the input files; returns the exit status.

    Args:
        model: bGPTLMHeadModel.
        extensions: those of its training files.
        files: the input files; None = none, to generate.
        check_stop: called between steps; raises KeyboardInterrupt or SystemExit to stop.
    """
    patch_size, patch_length = model.patch_size, model.patch_length
    rows, cut_off, failed = [], [], []  # rows: of the index
    known, indexed_at = read_index(os.path.join(config.OUTPUT_FOLDER, INDEX_NAMES[0])) or {}, time.monotonic()
    num_candidates = 1 if files is None else config.NUM_CANDIDATES
    if files is None:
        num_outputs, prompts = config.NUM_SAMPLES, new_prompts(patch_size, extensions)
    else:
        num_outputs, prompts = len(files), input_prompts(files, patch_size, patch_length, extensions, failed)
    batch_size = min(config.INFERENCE_BATCH_SIZE, num_outputs * num_candidates)
    sampling = generation.Sampling(config.TOP_K, config.TOP_P, config.TEMPERATURE)
    try:
        with tqdm(unit="B", unit_scale=True, desc=config.MODE, dynamic_ncols=True) as bar:

            def progress(num_patches):
                bar.update(num_patches * patch_size)
                check_stop()

            continuations = generation.generate(model, prompts, batch_size, sampling, progress)
            for output, continuation in best_candidates(continuations, num_candidates):
                content = output.prefix + utils.to_content(continuation.symbols)
                name = os.path.relpath(output.path, config.OUTPUT_FOLDER)
                if os.path.islink(output.path):
                    failed.append((output.path, "a link stands in its place, and may lead to a file of yours"))
                    continue
                try:
                    os.makedirs(os.path.dirname(output.path), exist_ok=True)
                    if system.escape_name(name) not in known and os.path.isfile(output.path):
                        system.keep_backup(output.path)
                    system.write_whole(output.path, content)
                except OSError as error:
                    if error.errno in system.FULL_DISK:  # nor will the others fit
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


def classify_files(model, labels, label_mode, files, dtype, check_stop):
    """Writes predictions.tsv: of each file the three likeliest labels with their probabilities; returns the exit status.

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
    order = np.argsort(examples.lengths(model.patch_size, model.patch_length), kind="stable").tolist()  # least padding
    found, failed = {}, []  # found: {index of a file: [(probability, index of a label), …]}, the likeliest first
    with tqdm(total=len(files), unit="file", desc=config.MODE, dynamic_ncols=True) as bar:
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
    write_predictions(found, files, labels)
    report(found, files, labels, label_mode)
    list_failed(failed)
    return 1 if failed else 0


def write_predictions(found, files, labels):
    """Writes predictions.tsv from {index of a file: [(probability, index of a label), …]}."""
    path = os.path.join(config.OUTPUT_FOLDER, "predictions.tsv")
    ranks = ("", " 2", " 3")[: min(3, len(labels))]
    lines = [["file"] + [word for rank in ranks for word in (f"label{rank}", f"probability{rank}")]]
    for index in sorted(found):
        name = system.escape_name(os.path.relpath(files[index], config.INPUT_FOLDER))
        shown = [word for probability, label in found[index] for word in (system.escape_name(labels[label]), f"{probability:.4f}")]
        lines.append([name, *shown])
    system.write_whole(path, "".join("\t".join(line) + "\n" for line in lines).encode())
    print(f"{len(found)} files classified in {path}")


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


def main():
    devices.tune_memory()
    device = devices.pick_device()
    dtype = devices.pick_dtype(config.PRECISION, device)
    files = None if config.MODE == "generate" else find_inputs()
    model, loaded = checkpoint.load_model(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    kind, wanted = checkpoint.model_sizes(loaded["model"], "").kind, "classifier" if config.MODE == "classify" else "generative model"
    if kind != wanted:
        raise system.UserError(
            f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r} is a {kind}; MODE {config.MODE!r} needs a {wanted}, from "
            f"{'train-cls.py' if config.MODE == 'classify' else 'train-gen.py'}"
        )
    if config.MODE == "convert":
        check_extensions(loaded)
    system.make_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    for name in ("predictions.tsv",) if config.MODE == "classify" else INDEX_NAMES:
        system.check_writable(os.path.join(config.OUTPUT_FOLDER, name), "OUTPUT_FOLDER")
    seed = "" if config.MODE == "classify" else f", seed {config.SEED}"
    print(f"{config.MODE} with {config.INFERENCE_WEIGHTS_PATH}: {dtype} on {device}{seed}")
    # two runs at once would take each other's places, in the names of files and in the index
    with devices.memory_errors(), system.delayed_signals(impatient=True) as stop_signal, locked_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER"):

        def check_stop():
            if stop_signal():
                raise KeyboardInterrupt(stop_signal())

        if config.MODE == "classify":
            labels = checkpoint.label_list(loaded, f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r}")
            return classify_files(model.to(device).eval(), labels, checkpoint.label_mode(loaded), files, dtype, check_stop)
        return write_files(model.to(device, dtype).eval(), loaded.get("extensions") or [], files, check_stop)


if __name__ == "__main__":
    system.run(main)
