"""Tables and pages: the report of an evaluation, and the index of a folder of outputs."""

import html.parser
import os
import re

import numpy as np
import torch
from conftest import options, run_script
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import LINES, score, write_files

import utils
from bgpt import report, system
from bgpt.evaluation import FileScore, score_symbols
from bgpt.windows import evaluation_windows


def shown_files(model, folder, contents, most):
    """Returns (FileScores of {name: bytes}, their data for a page)."""
    windows = evaluation_windows(utils.Examples(write_files(folder, contents)), 4, 16)
    scores, shown = list(score(model, windows.examples, folder).values()), []
    for each, title in report.choose_files(scores):
        parts = report.shown_parts(each, most)
        shown.append((each, title, parts, score_symbols(model, windows, each.index, parts, torch.float32)))
    return scores, shown


def test_the_page_of_large_files_is_bounded(tmp_path, tiny_model):
    random = np.random.default_rng(0)
    contents = {f"{i}.bin": random.integers(0, 256, 1500, dtype=np.uint8).tobytes() for i in range(3)}
    scores, shown = shown_files(tiny_model, tmp_path, contents, 320)
    for each, _, parts, _ in shown:
        assert sum(stop - start for start, stop in parts) <= 320 and all(start % 16 == 0 for start, _ in parts)
        assert all(before[1] < after[0] for before, after in zip(parts, parts[1:]))
        assert all(any(start <= offset < stop for start, stop in parts) for offset, _, _ in each.stretches)
    page = report.build_page(["note"], report.sum_up_groups(scores), shown).decode()
    assert page.count("<section>") == 3 and "less surprising bytes" in page and len(page) < 3 * 320 * 200


def test_text_is_shown_as_text_even_with_a_damaged_byte(tmp_path, tiny_model):
    contents = {"a.abc": LINES + b"\xff" + LINES, "b.abc": "naïve ☕ 字\r\n".encode(), "c.abc": bytes(range(64))}
    scores, shown = shown_files(tiny_model, tmp_path, contents | {"d.abc": b"a\xe2\x80\xae" + LINES * 2}, 4000)
    page = report.build_page([], report.sum_up_groups(scores), shown).decode()
    texts = [re.sub("<[^>]*>", "", text) for text in re.findall("<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]
    texts = {each.name: text for (each, *_), text in zip(shown, texts, strict=True)}
    line = LINES.decode().replace("\n", "↵\n")
    assert texts["a.abc"] == line + "\ufffd" + line + "⏹" and texts["b.abc"] == "naï·ve ☕·· 字··␍↵\n⏹"
    assert texts["c.abc"].startswith("00000000  00 01 02") and "\u202e" not in texts["d.abc"]


def test_the_worst_the_median_and_the_best_are_shown():
    scores = [FileScore(name=str(i), bits=i, bytes=1) for i in range(20)]
    scores.append(FileScore(name="empty", bits=9, bytes=0))
    chosen = report.choose_files(scores)
    assert [score.name for score, _ in chosen] == "19 18 17 11 10 9 2 1 0".split()
    assert chosen[0][1] == "worst, number 1 of 20 from the worst"
    assert len(report.choose_files(scores[:4])) == 4 and report.choose_files(scores[-1:])[0][0].name == "empty"


def test_what_the_model_beats_is_told_with_its_uncertainty():
    gains = {"gzip -9": (1.0, 0.5, 1.5), "bz2 -9": (0.2, -0.3, 0.7), "xz -9e": (-1.0, -1.2, -0.8)}
    assert report.comparison(gains) == (
        "In bits per byte, the model beats gzip -9 by 1.00 (0.50 to 1.50); it does not clearly differ from bz2 -9; "
        "it is beaten by xz -9e by 1.00 (0.80 to 1.20)."
    )
    assert report.comparison({"gzip -9": (0.5, None, None)}) == "In bits per byte, the model beats gzip -9 by 0.50."


# ---- The index ------------------------------------------------------------------------------------------------------

@given(st.text(alphabet=st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1))
def test_names_survive_the_index(name):
    escaped = system.escape_name(name)
    assert system.unescape_name(escaped) == name and escaped.isprintable()


class Reader(html.parser.HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_page_holds_whatever_the_outputs_hold(tmp_path):
    hostile = b"</pre><script>alert(1)</script><img src=x onerror=alert(1)>\0\x1b\xff &amp;"
    files = {
        "plain.abc": b"X:1\nK:C\n<CDEF>", "a\tb\nc<script>.txt": hostile, "hostile": hostile, "picture.bmp": b"BM<>",
        "sound.wav": b"RIFF", "x.bin": bytes(range(256)) * 2, "sub/empty.txt": b"", "cut.md": "naïve ☕".encode()[:-1],
    }  # fmt: skip
    write_files(tmp_path, files)
    rows = [(name, "in<put>", len(content), 1.5 if content else None, "ended", 0) for name, content in files.items()]
    report.write_index(tmp_path, rows)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    read = Reader(page)
    shown = "html head meta title style body h1 p main article h2 pre img audio".split()
    assert read.tags == set(shown) and "onerror" not in read.attributes and "\0" not in page
    texts = "X:1\nK:C\n<CDEF>", "</script><img src=x onerror=alert(1)>", "a\\tb\\nc<script>.txt", "naïve", "0010  10 11 12"
    assert all(text in read.text for text in texts)
    assert "default-src 'none'; img-src data:; media-src data:;" in page and "prefers-color-scheme: dark" in page
    assert "… and 256 more bytes" in read.text and "data:image/bmp;base64,Qk08Pg==" in page and "data:audio/wav" in page
    lines = (tmp_path / "index.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == list(report.INDEX_COLUMNS) and all(line.count("\t") == 5 for line in lines)
    assert len(lines) == 1 + len(files) and "sub/empty.txt\tin<put>\t0\t\tended\t0" in lines


def test_index_goes_on_stays_small_and_keeps_what_is_not_its_own(tmp_path, monkeypatch):
    write_files(tmp_path, {"f-2.x": b"word", "f-10.x": b"word", "index.tsv": b"my own table", "index.html": b"my own page"})
    report.write_index(tmp_path, [("f-10.x", "", 4, 2.0, "ended", 0), ("gone.x", "", 3, 2.0, "ended", 0)])
    assert (tmp_path / "index.tsv.bak").read_text() == "my own table"
    assert (tmp_path / "index.html.bak").read_text() == "my own page"
    os.utime(tmp_path / "f-10.x", (1, 1))
    report.write_index(tmp_path, [("f-2.x", "", 4, 2.0, "cut off", 1)])
    assert list(report.read_index(tmp_path / "index.tsv")) == ["f-2.x", "f-10.x"]
    for constant, most in (("SHOWN_BYTES", 2000), ("SHOWN_FILES", 1)):  # a text counts as 2000 bytes
        with monkeypatch.context() as patch:
            patch.setattr(report, constant, most)
            report.write_index(tmp_path, [])
            text = Reader((tmp_path / "index.html").read_text(encoding="utf-8")).text
            assert text.count("word") == 1 and text.index("f-2.x") < text.index("word") < text.index("f-10.x")  # newest first
    assert not (tmp_path / "index.tsv.bak2").exists() and not (tmp_path / "index.html.bak2").exists()
    # a page of the user's own next to an index, an index with notes of the user's own
    write_files(tmp_path, {"index.html": b"my next page"})
    report.write_index(tmp_path, [])
    with open(tmp_path / "index.tsv", "a", encoding="utf-8") as file:
        file.write("my notes\n")
    report.write_index(tmp_path, [("f-2.x", "", 4, 2.0, "cut off", 1)])
    assert (tmp_path / "index.html.bak2").read_text() == "my next page"
    assert (tmp_path / "index.tsv.bak2").read_text().endswith("my notes\n")


def test_the_gallery_shows_no_file_outside_its_folder(tmp_path):
    """An index.tsv of others may name any path, and symlinks lead anywhere."""
    folder, secret = tmp_path / "output", tmp_path / "output-2" / "secret.txt"
    write_files(folder, {"mine.txt": b"to be shown"})
    write_files(secret.parent, {"secret.txt": b"never to be shown"})
    (folder / "link.txt").symlink_to(secret)
    (folder / "sub").symlink_to(secret.parent)
    names = ["mine.txt", "link.txt", "sub/secret.txt", "../output-2/secret.txt", str(secret)]
    lines = ["\t".join(report.INDEX_COLUMNS), *(f"{name}\t\t9\t\tended\t0" for name in names)]
    (folder / "index.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report.write_index(str(folder), [])
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("to be shown") == 1 and "never" not in page and "href" not in page


def test_the_page_of_many_outputs_stays_small(tmp_path):
    names = [f"{i}.bmp" for i in range(3000)]
    for name in names:
        (tmp_path / name).write_bytes(b"BM" + bytes(5000))
    report.write_index(str(tmp_path), [(name, "", 5002, 3.5, "ended", 0) for name in names])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == report.SHOWN_FILES and len(page) < 4 / 3 * report.SHOWN_BYTES + 500 * len(names)
    assert "2999.bmp" in page.split("<img")[0] and "0.bmp" in page.split("<ul>")[1]


def test_an_output_never_takes_the_place_of_the_index(tmp_path, tiny_checkpoint):
    write_files(tmp_path / "input", {"index.html": b"abc"})
    done = run_script("inference.py", *options(MODE="complete"), cwd=tmp_path)
    assert done.returncode == 1 and "index.html: its output would replace the index" in done.stdout
