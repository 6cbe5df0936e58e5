"""The index of a folder of outputs: index.tsv, and index.html, one page that shows them."""

import base64
import contextlib
import html
import os
import re

from bgpt import files as listing
from bgpt import system

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
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({width}, 1fr)); gap: 1em; }}
article {{ border: 1px solid #bbb; border-radius: 4px; padding: .7em; min-width: 0; content-visibility: auto; }}
h2 {{ font-size: 1em; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .2em 0 .6em; color: #555; overflow-wrap: anywhere; }}
pre {{ margin: 0; max-height: 20em; overflow: auto; background: #f4f4f4; padding: .4em; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 11px; }}
img {{ max-width: 100%; min-width: 8em; image-rendering: pixelated; }}
audio {{ width: 100%; }}
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
    width = "32em" if any("<pre>" in article for article in articles) else "15em"  # pictures and sounds take less than text
    note = f"All figures: {INDEX_NAMES[0]}. Contents are shown up to {SHOWN_BYTES / 2**20:.0f} MiB in all."
    system.write_whole(page, _PAGE.format(width=width, count=len(names), note=note, articles="\n".join(articles)).encode())


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
