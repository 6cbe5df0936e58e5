"""The report of an evaluation: figures of many files as a table, for machines, and as a page.

The page shows a chart, and files whose bytes are coloured by their bits. It is one HTML file, which runs no script and
loads nothing, whatever the files' names and contents are. The colours are those of ColorBrewer's YlGnBu, which people who
are colour-blind can tell apart: on a light page the more surprising is darker, on a dark page brighter.
"""

import hashlib
import html
import json
import math
import os
import platform

import numpy as np
import torch
import transformers

from bgpt import evaluation
from bgpt import intervals
from bgpt import system
from bgpt import windows as windowing
from utils import END

NAMES = ("evaluation.tsv", "evaluation.json", "evaluation.html")

SHOWN_SYMBOLS = 4000  # most bytes of a file that are shown, around its most surprising ones
PAGE_BYTES = 2**22  # most bytes of the page; files that would not fit are left out, with a line that says so
MOST_GROUPS = 12  # in the chart; the largest are shown
SHOWN_FILES = 3  # of the worst, the median and the best files each

_LEVELS = (0.5, 1, 2, 3, 4, 6, 8, 12)  # bits at which the colours change
_RAMP = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
_BARS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # of the model and the compressors: Okabe and Ito's colours

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bGPT: evaluation</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --page: #fff; --ink: #222; --faint: #666; --line: #bbb; --mean: #0072b2; }}
{light}
@media (prefers-color-scheme: dark) {{
:root {{ --page: #16181c; --ink: #ddd; --faint: #999; --line: #555; --mean: #56b4e9; }}
{dark}
}}
body {{ font: 15px/1.4 sans-serif; margin: 1.5em; background: var(--page); color: var(--ink); }}
h2, h3, p {{ overflow-wrap: anywhere; }}
h3 {{ font-size: 1em; margin: 2em 0 0; }}
p {{ color: var(--faint); margin: .3em 0; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
td:first-child {{ text-align: left; }}
pre {{ font: 12px/1.5 monospace; margin: .3em 0; max-height: 40em; overflow: auto; white-space: pre-wrap; }}
pre.hex {{ white-space: pre; }}
section {{ content-visibility: auto; contain-intrinsic-size: auto 40em; }}
i {{ font-style: normal; }}
svg {{ display: block; max-width: 100%; }}
svg text {{ font: 12px sans-serif; fill: var(--ink); }}
.mean {{ fill: none; stroke: var(--mean); stroke-width: 1.5; }}
.peak {{ fill: var(--line); }}
{bars}
</style></head><body><h1>bGPT: evaluation</h1>
{body}
</body></html>
"""

# ---------------------------------------------------------------------------------------------------------------------
# Figures of many files
# ---------------------------------------------------------------------------------------------------------------------


def sum_up(scores):
    """Returns the figures of FileScores as a dict; each but `files` and `bytes` is (value, lower, upper end of 95 %).

    `compressors` holds those of gzip, bz2 and xz, in bits per byte, and `gains` what the model needs less than they do.
    """

    def column(function):
        return np.array([function(score) for score in scores], dtype=np.float64)

    num_bytes, bits = column(lambda s: s.bytes), column(lambda s: s.bits)
    compressed = {name: column(lambda s: s.compressed[name]) for name in evaluation.COMPRESSORS}
    return {
        "files": len(scores),
        "bytes": int(num_bytes.sum()),
        "bits_per_byte": intervals.ratio_interval(bits, num_bytes),
        "nats_per_symbol": intervals.ratio_interval(column(lambda s: s.nats), column(lambda s: s.symbols)),
        "top1": intervals.ratio_interval(column(lambda s: s.top1), num_bytes + 1, highest=1.0),
        "exact_files": intervals.wilson_interval(sum(score.exact for score in scores) / len(scores), len(scores)),
        "compressors": {name: intervals.ratio_interval(each, num_bytes) for name, each in compressed.items()},
        "gains": {name: intervals.ratio_interval(each - bits, num_bytes, lowest=-math.inf) for name, each in compressed.items()},
    }


def sum_up_groups(scores):
    """Returns {group: its figures}, "all" first, then the groups by name; see `sum_up`."""
    groups = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score)
    return {"all": sum_up(scores), **{group: sum_up(groups[group]) for group in sorted(groups)}}


def with_interval(figure, digits):
    """Returns a (value, lower, upper end) as text: "1.23 (1.20 to 1.26)"; "-" for a value that is None."""
    value, low, high = (None if each is None else f"{each:.{digits}f}" for each in figure)
    return "-" if value is None else value if low is None else f"{value} ({low} to {high})"


def figures_table(groups):
    """Returns the rows of a table, texts, of what `sum_up_groups` returns."""
    rows = [["", "files", "bytes", "bits per byte", "nats per symbol", "top-1", "exact files", *evaluation.COMPRESSORS]]
    for group, figures in groups.items():
        rows.append(
            [
                system.escape_name(group),
                f"{figures['files']:,}",
                f"{figures['bytes']:,}",
                *(with_interval(figures[name], 4) for name in ("bits_per_byte", "nats_per_symbol", "top1", "exact_files")),
                *(with_interval(figure[:1] + (None, None), 4) for figure in figures["compressors"].values()),
            ]
        )
    return rows


def comparison(gains):
    """Returns the line that says which compressors a model beats, from the `gains` of `sum_up`."""
    verdicts = {"beats": [], "does not clearly differ from": [], "is beaten by": []}
    for name, (gain, low, high) in gains.items():
        if gain is None:
            return "There are no bytes to compare the compressors by."
        if low is None:  # a single file is what it is
            by, low, high = f"{abs(gain):.2f}", gain, gain
        else:
            by = with_interval((abs(gain), *sorted((abs(low), abs(high)))), 2)
        if low > 0 or high < 0:
            verdicts["beats" if low > 0 else "is beaten by"].append(f"{name} by {by}")
        else:
            verdicts["does not clearly differ from"].append(name)
    verdicts = "; it ".join(f"{verdict} {', '.join(names)}" for verdict, names in verdicts.items() if names)
    return f"In bits per byte, the model {verdicts}."


def table_of_files(scores):
    """Returns evaluation.tsv as text: a line for each FileScore."""
    head = ["file", "group", "bytes", "bits per byte", "bits", "nats per symbol", "top-1", "exact"]
    lines = [[*head, *evaluation.COMPRESSORS, "stretches (offset+bytes: bits)"]]
    for score in scores:
        by_bytes = [f"{bits / score.bytes:.4f}" if score.bytes else "" for bits in (score.bits, *score.compressed.values())]
        stretches = "; ".join(f"{offset}+{count}: {bits:.2f}" for offset, count, bits in score.stretches)
        names, share = [system.escape_name(each) for each in (score.name, score.group)], score.top1 / (score.bytes + 1)
        exact, numbers = "yes" if score.exact else "no", (f"{score.bits:.3f}", f"{score.loss:.5f}", f"{share:.4f}")
        lines.append([*names, str(score.bytes), by_bytes[0], *numbers, exact, *by_bytes[1:], stretches])
    return "".join("\t".join(line) + "\n" for line in lines)


def plain_score(score):
    """Returns a FileScore as a dict of plain types, for JSON."""
    return {
        "file": system.escape_name(score.name),
        "group": system.escape_name(score.group),
        "bytes": score.bytes,
        "bits": score.bits,
        "bits_per_byte": score.bits_per_byte if score.bytes else None,
        "nats_per_symbol": score.loss,
        "top1": score.top1 / (score.bytes + 1),
        "exact": score.exact,
        "compressed_bits": score.compressed,
        "stretches": [dict(zip(("offset", "bytes", "bits"), stretch)) for stretch in score.stretches],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def choose_files(scores):
    """Returns [(FileScore, what it is)] to show: the worst, the median and the best by bits per byte, each file once.

    Files without bytes have no bits per byte; they are shown only where there are no others.
    """
    ranked = sorted((score for score in scores if score.bytes), key=lambda score: (-score.bits_per_byte, score.name)) or scores[:1]
    count, middle = len(ranked), max((len(ranked) - SHOWN_FILES) // 2, 0)
    places = {}  # place in the ranking -> what it is
    for title, first in (("worst", 0), ("best", max(count - SHOWN_FILES, 0)), ("median", middle)):
        for place in range(first, min(first + SHOWN_FILES, count)):
            places.setdefault(place, f"{title}, number {place + 1} of {count} from the worst")
    return [(ranked[place], places[place]) for place in sorted(places)]


def shown_parts(score, most):
    """Returns the parts [(start, stop)] of a file's bytes and the 256 after it to show: all, or around its worst stretches.

    They begin at multiples of 16, are in order, and hold at most `most` symbols.
    """
    total = score.bytes + 1
    if total <= most:
        return [(0, total)]
    width, parts = max(most // max(len(score.stretches), 1) // 16, 1) * 16, []
    for offset, _, _ in sorted(score.stretches):
        start = max(offset - width // 2, 0) // 16 * 16
        stop = min(start + width, total)
        if parts and start <= parts[-1][1]:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page
# ---------------------------------------------------------------------------------------------------------------------


def _level(bits):
    """Returns the number of the colour of bits, 0 to 8."""
    return sum(bits >= level for level in _LEVELS)


def _colours(ramp):
    """Returns the style of the colours of a page: text on the lighter ones is black, on the others white."""
    ink = {colour: "#000" if place < 6 else "#fff" for place, colour in enumerate(_RAMP)}
    return "\n".join(f".c{level} {{ background: {colour}; color: {ink[colour]}; }}" for level, colour in enumerate(ramp))


def _legend():
    labels = [f"below {_LEVELS[0]}", *(f"{low} to {high}" for low, high in zip(_LEVELS, _LEVELS[1:])), f"{_LEVELS[-1]} or more"]
    cells = " ".join(f'<i class="c{level}">&nbsp;{label}&nbsp;</i>' for level, label in enumerate(labels))
    return f"<p>Bits of a byte, how surprising the model found it: {cells}. Hover over a byte for what it expected.</p>"


def _symbol_name(symbol):
    """Returns what a symbol is called: the character of a printable one, else its value in hexadecimal; "end" is 256."""
    return "end" if symbol == END else chr(symbol) if 32 < symbol < 127 else f"x{symbol:02x}"


def _titles(start, symbols, bits, likeliest, probabilities):
    """Returns what hovering over each symbol tells, escaped: offset, value, bits, and the symbols held likeliest."""
    found = []
    for place, (symbol, cost) in enumerate(zip(symbols.tolist(), bits.tolist())):
        expected = zip(likeliest[place].tolist(), probabilities[place].tolist())
        expected = ", ".join(f"{_symbol_name(each)} {100 * probability:.1f} %" for each, probability in expected)
        value = "end" if symbol == END else f"{symbol} ({_symbol_name(symbol)})"
        found.append(html.escape(f"{start + place}: {value}, {cost:.2f} bits; likeliest {expected}"))
    return found


def _characters(symbols):
    """Returns how each symbol (n,) of a text is shown, and whether the symbols are one: UTF-8, but for one byte in twenty.

    The first byte of a longer character shows it, the others a dot.
    """
    content = bytes(symbol for symbol in symbols.tolist() if symbol != END)
    shown, place, odd = [], 0, 0
    while place < len(content):
        length = next((n for n, low in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if content[place] >= low), 1)
        try:
            character = content[place : place + length].decode()
        except UnicodeDecodeError:
            character, length = "\ufffd", 1
        character = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}.get(character) or (character if character.isprintable() else "\ufffd")
        odd += character == "\ufffd"
        shown += [character, *"·" * (length - 1)]
        place += length
    return shown + ["⏹"] * (len(symbols) - len(content)), 20 * odd <= len(content)


def _cell(text, bits, title=None):
    hover = "" if title is None else f' title="{title}"'
    return f'<i class="c{_level(bits)}"{hover}>{html.escape(text)}</i>'


def _map(parts, symbols, total):
    """Returns the surprisal map of a file: text as text, else hexadecimal beside characters.

    Args:
        parts: [(start, stop)], see `shown_parts`.
        symbols: what `evaluation.score_symbols` returns for them.
        total: bytes of the file.
    """
    characters, are_text = zip(*(_characters(each[0]) for each in symbols))
    shown, reached = [], 0
    for (start, stop), columns, texts in zip(parts, symbols, characters):
        if start > reached:
            shown.append(f"<p>… {start - reached:,} bytes that surprised it less …</p>")
        reached, costs, titles = stop, columns[1].tolist(), _titles(start, *columns)
        if all(are_text):
            shown.append(f"<pre>{''.join(map(_cell, texts, costs, titles))}</pre>")
            continue
        lines = []
        for first in range(0, stop - start, 16):
            row = list(zip(columns[0].tolist(), costs, titles))[first : first + 16]
            values = " ".join(_cell("⏹ " if symbol == END else f"{symbol:02x}", cost, title) for symbol, cost, title in row)
            names = "".join(_cell(chr(symbol) if 32 <= symbol < 127 else ".", cost) for symbol, cost, _ in row if symbol != END)
            lines.append(f"{start + first:08x}  {values}{' ' * 3 * (16 - len(row))}  {names}")
        shown.append('<pre class="hex">' + "\n".join(lines) + "</pre>")
    if total > reached:
        shown.append(f"<p>… {total - reached:,} bytes that surprised it less</p>")
    return "".join(shown)


def _line(score):
    """Returns an SVG of the bits along a file: the highest in each part of it in grey, their mean as a line."""
    mean, peak = score.profile.tolist()
    top, step = max(max(peak), 1.0), 800 / len(peak)

    def corners(values):  # each part of the file is a level stretch of the line
        return " ".join(f"{x * step:.1f},{75 - 70 * value / top:.1f}" for i, value in enumerate(values) for x in (i, i + 1))

    return (
        '<svg viewBox="0 0 900 80" width="900" role="img" aria-label="bits along the file">'
        f'<polygon class="peak" points="0,75 {corners(peak)} 800,75"/><polyline class="mean" points="{corners(mean)}"/>'
        f'<text x="806" y="15">{top:.1f} bits</text><text x="806" y="75">0 at {score.bytes:,}</text></svg>'
    )


def _chart(groups):
    """Returns an SVG of bars, the bits per byte of the model and of each compressor, for each group of files."""
    shown = {name: figures for name, figures in groups.items() if figures["bits_per_byte"][0] is not None}
    kept = sorted(shown, key=lambda name: -shown[name]["bytes"])[: MOST_GROUPS + 1]
    shown = {name: figures for name, figures in shown.items() if name in kept}
    rows, y = [], 0
    values = {  # {group: bits per byte by what}
        name: {"model": each["bits_per_byte"][0], **{what: figure[0] for what, figure in each["compressors"].items()}}
        for name, each in shown.items()
    }
    top = max((value for each in values.values() for value in each.values()), default=1) or 1
    for name, each in values.items():
        rows.append(f'<text x="0" y="{y + 14}">{html.escape(system.escape_name(name)[:24])}</text>')
        for number, (what, value) in enumerate(each.items()):
            width = 480 * value / top
            rows.append(
                f'<rect class="bar{number}" x="150" y="{y + 3}" width="{width:.1f}" height="12"/>'
                f'<text x="{156 + width:.1f}" y="{y + 14}">{value:.3f} {what}</text>'
            )
            y += 16
        y += 10
    return f'<svg viewBox="0 0 800 {y or 1}" width="800" role="img" aria-label="bits per byte">{"".join(rows)}</svg>'


def _table(rows):
    """Returns a table of rows of texts; the first row is its head."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row))
    return "<div><table><tr>" + "</tr><tr>".join(lines) + "</tr></table></div>"


def _section(score, title, parts, symbols):
    """Returns a file's part of the page."""
    figures = f"{score.bits_per_byte:.4f} bits per byte, " if score.bytes else ""
    shown = sum(stop - start for start, stop in parts)
    note = "" if shown == score.bytes + 1 else f"; shown: {shown:,} around its most surprising stretches"
    return (
        f"<section><h3>{html.escape(system.escape_name(score.name))}</h3><p>{title}: {figures}{score.bits:,.1f} bits, "
        f"{score.bytes:,} bytes{note}</p>{_line(score)}{_map(parts, symbols, score.bytes)}</section>"
    )


def build_page(notes, table, groups, files):
    """Returns the page as bytes.

    Args:
        notes: lines of text about the evaluation as a whole.
        table: rows of texts, the figures of each group of files; the first row is its head.
        groups: {group: its figures}, see `sum_up_groups`.
        files: iterable of (FileScore, what it is, parts, symbols), see `choose_files`, `shown_parts` and
            `evaluation.score_symbols`.
    """
    body = [*(f"<p>{html.escape(note)}</p>" for note in notes), _table(table), "<h2>Bits per byte</h2>", _chart(groups)]
    if len(groups) > MOST_GROUPS + 1:
        body.append(f"<p>The chart shows the {MOST_GROUPS} largest of {len(groups) - 1} groups.</p>")
    body += ["<h2>Surprisal maps</h2>", _legend()]
    size, left_out = sum(len(part.encode()) for part in body), 0
    for score, title, parts, symbols in files:
        section = _section(score, title, parts, symbols)
        if size + len(section.encode()) > PAGE_BYTES:
            left_out += 1
            continue
        size += len(section.encode())
        body.append(section)
    if left_out:
        body.append(f"<p>{left_out} more files would not fit on the page.</p>")
    bars = "\n".join(f".bar{number} {{ fill: {colour}; }}" for number, colour in enumerate(_BARS))
    return _PAGE.format(light=_colours(_RAMP), dark=_colours(_RAMP[::-1]), bars=bars, body="\n".join(body)).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The files of a report
# ---------------------------------------------------------------------------------------------------------------------


def write_report(folder, model, windows, scores, dtype, settings, unfit, failed):
    """Writes the files NAMES into a folder; returns what the screen shows of them.

    Args:
        model, windows, dtype: see `evaluation.score_files`.
        scores: list of FileScores, one or more.
        settings: the constants of config.py that bear on inference, as a dict; the checkpoint is that of INFERENCE_WEIGHTS_PATH.
        unfit: (name, patches) of the pairs that were left out.
        failed: (path, reason) of the files that could not be read; gets those that have become unreadable since.
    """
    groups, weights = sum_up_groups(scores), settings["INFERENCE_WEIGHTS_PATH"]
    paths = [os.path.join(folder, name) for name in NAMES]
    table, verdict = figures_table(groups), comparison(groups["all"]["gains"])
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shown = []
    for score, title in choose_files(scores):
        parts = shown_parts(score, SHOWN_SYMBOLS)
        try:
            shown.append((score, title, parts, evaluation.score_symbols(model, windows, score.index, parts, dtype)))
        except (OSError, system.UserError) as error:
            failed.append((score.path, f"cannot be shown: {getattr(error, 'strerror', None) or error}"))
    everything = {
        "checkpoint": {"path": weights, "sha256": digest, "parameters": model.num_parameters()},
        "patch_size": model.patch_size,
        "patch_length": model.patch_length,
        "advance": windowing.ADVANCE,
        "dtype": str(dtype),
        "device": str(model.device),
        "versions": {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in (torch, transformers, np)}},
        "settings": settings,
        "groups": groups,
        "comparison": verdict,
        "files": list(map(plain_score, scores)),
        "pairs_that_do_not_fit": [{"pair": system.escape_name(name), "patches": length} for name, length in unfit],
        "failed": [{"file": system.escape_name(path), "reason": why} for path, why in failed],
    }
    system.write_whole(paths[0], table_of_files(scores).encode())
    system.write_whole(paths[1], json.dumps(everything, indent=1).encode())
    notes = [f"{weights}, SHA-256 {digest}, {dtype} on {model.device}; 95 % intervals over files.", verdict]
    system.write_whole(paths[2], build_page(map(system.escape_name, notes), table, groups, shown))
    lines = [f"{len(scores)} files evaluated in {', '.join(paths)}; 95 % intervals over files:", *evaluation.aligned(table), verdict]
    if len(scores) == 1:
        rows = [[str(offset), str(count), f"{bits:.2f}"] for offset, count, bits in scores[0].stretches]
        lines += ["the most surprising stretches:", *evaluation.aligned([["offset", "bytes", "bits"], *rows])]
    return "\n".join(lines)
