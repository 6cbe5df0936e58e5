"""Tables and pages of results: MODE evaluate's report, and the index of outputs.

The pages are single HTML files without scripts, see report.html.j2 and gallery.html.j2. Their Content-Security-Policy forbids
loading anything, and Jinja's autoescape makes hostile names and contents harmless.
"""

import base64
import bisect
import contextlib
import hashlib
import json
import os
import platform
import re

import numpy as np
import torch
import transformers

from bgpt import system
from bgpt.evaluation import COMPRESSORS, aligned, score_symbols
from bgpt.files import extension_of
from bgpt.intervals import bootstrap_interval, wilson_interval
from bgpt.system import escape_name
from utils import END, read_bytes

NAMES = ("evaluation.tsv", "evaluation.json", "evaluation.html")
LEVELS = (0.5, 1, 2, 3, 4, 6, 8, 12)  # bits at which the colour of a byte changes

INDEX_NAMES = ("index.tsv", "index.html")
INDEX_COLUMNS = ("file", "source", "bytes", "bits per byte", "cut off or ended", "seed")
SHOWN_FILES, SHOWN_BYTES = 1000, 2**23  # most files and bytes in the gallery, so that the page opens at once
SHOWN_TEXT = 2000  # most bytes of a text

_SYMBOLS = [*(chr(byte) if 32 < byte < 127 else f"x{byte:02x}" for byte in range(256)), "end"]  # names for hover titles
_IMAGES = {"jpg": "jpeg", "svg": "svg+xml"} | {name: name for name in ("bmp", "gif", "jpeg", "png", "webp")}
_SOUNDS = {"mp3": "mpeg", "flac": "flac", "ogg": "ogg", "wav": "wav"}


def _render(template, **values):
    import jinja2  # here, since only the end of a run needs it

    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"commas": "{:,}".format, "escape_name": escape_name}
    return environment.get_template(template).render(values).encode()


# ---- Figures of many files ------------------------------------------------------------------------------------------

def sum_up(scores):
    """Returns the figures of FileScores as a dict.

    `files` and `bytes` are sums. The others are (value, low, high) with a 95 % interval. `compressors` are the bits per byte of
    gzip, bz2 and xz. `gains` are those minus the model's.
    """
    columns = ((each.bytes, each.bits, each.nats, each.symbols, each.top1, each.exact) for each in scores)
    num_bytes, bits, nats, symbols, top1, exact = np.array(list(columns), dtype=np.float64).T
    compressed = {name: np.array([each.compressed[name] for each in scores], dtype=np.float64) for name in COMPRESSORS}
    return {
        "files": len(scores),
        "bytes": int(num_bytes.sum()),
        "bits_per_byte": bootstrap_interval(bits, num_bytes),
        "nats_per_symbol": bootstrap_interval(nats, symbols),
        "top1": bootstrap_interval(top1, num_bytes + 1),
        "exact_files": wilson_interval(int(exact.sum()), len(scores)),
        "compressors": {name: bootstrap_interval(each, num_bytes) for name, each in compressed.items()},
        "gains": {name: bootstrap_interval(each - bits, num_bytes) for name, each in compressed.items()},
    }


def sum_up_groups(scores):
    """Returns {group: figures}, "all" first, then the groups by name. See `sum_up`."""
    groups = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score)
    return {"all": sum_up(scores), **{group: sum_up(groups[group]) for group in sorted(groups)}}


def with_interval(figure, digits):
    """Returns a (value, low, high) as "1.23 (1.20 to 1.26)", or "-" without a value."""
    value, low, high = (None if each is None else f"{each:.{digits}f}" for each in figure)
    return "-" if value is None else value if low is None else f"{value} ({low} to {high})"


def figures_table(groups):
    """Returns the table of `sum_up_groups` as rows of texts."""
    rows = [["", "files", "bytes", "bits per byte", "nats per symbol", "top-1", "exact files", *COMPRESSORS]]
    for group, figures in groups.items():
        shown = [figures[name] for name in ("bits_per_byte", "nats_per_symbol", "top1", "exact_files")]
        shown += [(value, None, None) for value, _, _ in figures["compressors"].values()]
        counts = f"{figures['files']:,}", f"{figures['bytes']:,}"
        rows.append([escape_name(group), *counts, *(with_interval(figure, 4) for figure in shown)])
    return rows


def comparison(gains):
    """Returns a sentence that compares the model with the compressors, from the `gains` of `sum_up`."""
    verdicts = {"beats": [], "does not clearly differ from": [], "is beaten by": []}
    for name, (gain, low, high) in gains.items():
        if gain is None:
            return "There are no bytes to compare the compressors on."
        if (gain if low is None else low) > 0:  # a single file has no interval
            verdicts["beats"].append(f"{name} by {with_interval((gain, low, high), 2)}")
        elif (gain if high is None else high) < 0:
            loss = [each and -each for each in (gain, high, low)]
            verdicts["is beaten by"].append(f"{name} by {with_interval(loss, 2)}")
        else:
            verdicts["does not clearly differ from"].append(name)
    verdicts = "; it ".join(f"{verdict} {', '.join(names)}" for verdict, names in verdicts.items() if names)
    return f"In bits per byte, the model {verdicts}."


def plain_score(score):
    """Returns a FileScore as a dict of plain types, for JSON."""
    return {
        "file": escape_name(score.name),
        "group": escape_name(score.group),
        "bytes": score.bytes,
        "bits": score.bits,
        "bits_per_byte": score.bits_per_byte,
        "nats_per_symbol": score.nats / score.symbols,
        "top1": score.top1 / (score.bytes + 1),
        "exact": score.exact,
        "compressed_bits": score.compressed,
        "stretches": [dict(zip(("offset", "bytes", "bits"), stretch)) for stretch in score.stretches],
    }


def table_of_files(files):
    """Returns evaluation.tsv as text, from a list of `plain_score`."""
    head = ["file", "group", "bytes", "bits per byte", "bits", "nats per symbol", "top-1", "exact"]
    rows = [[*head, *COMPRESSORS, "stretches (offset+bytes: bits)"]]
    for file in files:
        bits = (file["bits"], *file["compressed_bits"].values())
        per_byte, *compressed = (f"{each / file['bytes']:.4f}" if file["bytes"] else "" for each in bits)
        numbers = f"{file['bits']:.3f}", f"{file['nats_per_symbol']:.5f}", f"{file['top1']:.4f}", "yes" if file["exact"] else "no"
        stretches = "; ".join("{offset}+{bytes}: {bits:.2f}".format(**stretch) for stretch in file["stretches"])
        rows.append([file["file"], file["group"], str(file["bytes"]), per_byte, *numbers, *compressed, stretches])
    return "".join("\t".join(row) + "\n" for row in rows)


# ---- The page of an evaluation --------------------------------------------------------------------------------------

def choose_files(scores):
    """Returns [(FileScore, rank as text)] of the 3 worst, median and best files, without repeats."""
    # empty files have no bits per byte, so one is shown only if all are empty
    ranked = sorted((each for each in scores if each.bytes), key=lambda each: (-each.bits_per_byte, each.name)) or scores[:1]
    count, titles = len(ranked), {}  # {rank: text}
    for title, first in (("worst", 0), ("best", max(count - 3, 0)), ("median", max((count - 3) // 2, 0))):
        for rank in range(first, min(first + 3, count)):
            titles.setdefault(rank, f"{title}, number {rank + 1} of {count} from the worst")
    return [(ranked[rank], titles[rank]) for rank in sorted(titles)]


def shown_parts(score, most):
    """Returns [(start, stop)] of at most `most` symbols to show, around the surprising stretches."""
    total = score.bytes + 1
    if total <= most:
        return [(0, total)]
    width, parts = max(most // max(len(score.stretches), 1) // 16, 1) * 16, []  # starts are multiples of 16
    for offset, _, _ in sorted(score.stretches):
        start = max(offset - width // 2, 0) // 16 * 16
        stop = min(start + width, total)
        if parts and start <= parts[-1][1]:
            start, _ = parts.pop()
        parts.append((start, stop))
    return parts


def _characters(symbols):
    """Returns the shown text of each symbol (n,), and whether 95 % are valid UTF-8."""
    content, shown = symbols[symbols != END].astype(np.uint8).tobytes(), []
    for character in content.decode("utf-8", "surrogateescape"):  # an invalid byte becomes unprintable
        name = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}.get(character, character if character.isprintable() else "\ufffd")
        # the first byte of a multi-byte character shows it, the others a dot
        shown += [name, *"·" * (len(character.encode("utf-8", "surrogateescape")) - 1)]
    return shown + ["⏹"] * (len(symbols) - len(content)), 20 * shown.count("\ufffd") <= len(content)


def _cells(start, symbols, bits, likeliest, probabilities):
    """Returns [(symbol, colour index, hover title, shown text)], and whether they look like text."""
    characters, is_text = _characters(symbols)
    columns = (each.tolist() for each in (symbols, bits, likeliest, probabilities))
    cells = []
    for offset, (symbol, cost, *expected, character) in enumerate(zip(*columns, characters), start):
        value = "end" if symbol == END else f"{symbol} ({_SYMBOLS[symbol]})"
        expected = ", ".join(f"{_SYMBOLS[each]} {100 * probability:.1f} %" for each, probability in zip(*expected))
        title = f"{offset}: {value}, {cost:.2f} bits; likeliest {expected}"
        cells.append((symbol, bisect.bisect(LEVELS, cost), title, character))
    return cells, is_text


def build_page(notes, groups, files):
    """Returns the page (bytes). `files` are (FileScore, title, parts, `score_symbols` of the parts), `notes` lines of text."""
    with_bytes, most_groups = [name for name in groups if groups[name]["bytes"]], 12
    largest = sorted(with_bytes, key=lambda name: -groups[name]["bytes"])[: most_groups + 1]  # "all" is the largest
    bars = []  # (group, [("model" or a compressor, bits per byte)])
    for name in sorted(largest, key=list(groups).index):
        figures = {"model": groups[name]["bits_per_byte"], **groups[name]["compressors"]}
        bars.append((name, [(what, value) for what, (value, _, _) in figures.items()]))
    shown = []  # (FileScore, title, whether it is text, [(start, stop, cells)])
    for score, title, parts, symbols in files:
        cells, are_text = zip(*(_cells(start, *columns) for (start, _), columns in zip(parts, symbols)))
        shown.append((score, title, all(are_text), [(*part, each) for part, each in zip(parts, cells)]))
    data = {"notes": notes, "table": figures_table(groups), "bars": bars, "num_groups": len(groups) - 1, "files": shown}
    return _render("report.html.j2", most_groups=most_groups, levels=LEVELS, END=END, **data)


def write_report(folder, model, windows, scores, dtype, settings, unfit, failed):
    """Writes the files NAMES into a folder and returns their summary for the screen.

    `settings` are the constants of config.py as a dict. `unfit` are (name, patches) of the pairs that were left out. `failed`
    are (path, reason) of unreadable files, to which files that have become unreadable since are appended.
    """
    groups, weights = sum_up_groups(scores), settings["INFERENCE_WEIGHTS_PATH"]
    paths = [os.path.join(folder, name) for name in NAMES]
    table, verdict = figures_table(groups), comparison(groups["all"]["gains"])
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shown = []
    for score, title in choose_files(scores):
        parts = shown_parts(score, 4000)
        try:
            shown.append((score, title, parts, score_symbols(model, windows, score.index, parts, dtype)))
        except OSError as error:
            failed.append((score.path, f"cannot be shown: {getattr(error, 'strerror', None) or error}"))
    everything = {
        "checkpoint": {"path": weights, "sha256": digest, "parameters": model.num_parameters()},
        "patch_size": model.patch_size,
        "patch_length": model.patch_length,
        "advance": 0.5,
        "dtype": str(dtype),
        "device": str(model.device),
        "versions": {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in (torch, transformers, np)}},
        "settings": settings,
        "groups": groups,
        "comparison": verdict,
        "files": list(map(plain_score, scores)),
        "pairs_that_do_not_fit": [{"pair": escape_name(name), "patches": length} for name, length in unfit],
        "failed": [{"file": escape_name(path), "reason": why} for path, why in failed],
    }
    notes = [escape_name(f"{weights}, SHA-256 {digest}, {dtype} on {model.device}; 95 % intervals over files."), verdict]
    table_and_json = table_of_files(everything["files"]).encode(), json.dumps(everything, indent=1).encode()
    system.write_results(dict(zip(paths, (*table_and_json, build_page(notes, groups, shown)))))
    lines = [f"{len(scores)} files evaluated in {', '.join(paths)}; 95 % intervals over files:", *aligned(table), verdict]
    if len(scores) == 1:
        rows = [[str(offset), str(count), f"{bits:.2f}"] for offset, count, bits in scores[0].stretches]
        lines += ["the most surprising stretches:", *aligned([["offset", "bytes", "bits"], *rows])]
    return "\n".join(lines)


# ---- The index of a folder of outputs -------------------------------------------------------------------------------

def read_index(path):
    """Returns {file: fields} of an index.tsv, or None if it is missing or foreign."""
    try:
        lines = [line.split("\t") for line in read_bytes(path).decode().split("\n") if line]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if lines[:1] != [list(INDEX_COLUMNS)] or any(len(fields) != len(INDEX_COLUMNS) for fields in lines):
        return None
    return {fields[0]: fields for fields in lines[1:]}


def write_index(folder, rows):
    """Writes index.tsv and index.html into a folder of outputs.

    Existing files of earlier runs stay listed. A foreign index.tsv gets a backup, as does its page, and so does a foreign
    index.html. The page has the contents of the newest files, never of one outside the folder. `rows` are tuples of
    INDEX_COLUMNS, with the path within the folder. Bits per byte may be None.
    """
    table, page = (os.path.join(folder, name) for name in INDEX_NAMES)
    listed = read_index(table)
    is_gallery = os.path.isfile(page) and b"<title>bGPT: " in read_bytes(page, stop=200)
    foreign = [table, page] if listed is None else [page] * (not is_gallery)
    system.print_backups(map(system.keep_backup, foreign))
    listed = listed or {}
    for file, source, num_bytes, bits, how, seed in rows:
        bits = "" if bits is None else f"{bits:.4f}"
        listed[escape_name(file)] = [escape_name(file), escape_name(source), str(num_bytes), bits, how, str(seed)]
    # sorts numbers in names as numbers, 2 before 10
    names = sorted(listed, key=lambda name: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    paths = {name: path for name in names if os.path.isfile(path := os.path.join(folder, system.unescape_name(name)))}
    system.write_whole(table, "".join("\t".join(fields) + "\n" for fields in [INDEX_COLUMNS, *map(listed.get, paths)]).encode())
    shown, others, room = [], [], SHOWN_BYTES  # shown: (fields, kind, content)
    for name in sorted(reversed(paths), key=lambda name: -os.stat(paths[name]).st_mtime_ns):
        content, extension = None, extension_of(paths[name]).lower()
        size = os.path.getsize(paths[name]) if extension in _IMAGES or extension in _SOUNDS else SHOWN_TEXT
        is_inside = os.path.realpath(paths[name]).startswith(os.path.join(os.path.realpath(folder), ""))
        if len(shown) < SHOWN_FILES and size <= room and is_inside:
            with contextlib.suppress(OSError):  # of an unreadable file only the figures are shown
                content = _shown_content(read_bytes(paths[name], stop=size), os.path.getsize(paths[name]), extension)
        if content is None:
            others.append(listed[name])
        else:
            room -= size
            shown.append((listed[name], *content))
    system.write_whole(page, _render("gallery.html.j2", shown=shown, others=others, table=INDEX_NAMES[0]))


def _shown_content(content, size, extension):
    """Returns ("image" or "audio", data URI) or ("text", text or hex dump) for the gallery."""
    for kind, media in (("image", _IMAGES), ("audio", _SOUNDS)):
        if extension in media:
            return kind, f"data:{kind}/{media[extension]};base64,{base64.b64encode(content).decode()}"
    most = SHOWN_TEXT
    text = content.decode("utf-8", "replace").replace("\r\n", "\n")
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    if extension not in ("abc", "txt") and (printable != text or "\ufffd" in text[:-1]):  # the last character may be cut
        rows, most = [], 256
        for start in range(0, min(len(content), most), 16):
            row = content[start : start + 16]
            characters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            rows.append(f"{start:04x}  {row.hex(' '):<47}  {characters}")
        printable = "\n".join(rows)
    more = f"\n… and {size - most:,} more bytes" if size > most else ""
    return "text", printable + more
