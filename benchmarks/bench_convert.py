"""Compares the outputs of MODE convert with the true files.

    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER abc_midi/test --TEMPERATURE 0
    python benchmarks/bench_convert.py --true abc_midi/test --made output [--extension mid]

Prints the shares of

    exact        files that equal the true one byte for byte
    whole        MIDI files whose track lengths add up, all events are readable and all notes end, or ABC tunes with X and K
    notes right  notes in the blocks that difflib finds in both MIDI files, over the notes of the longer file; a note is its
                 pitch and length in ticks, without rests and tempo
    cut off      files that are cut off according to index.tsv
"""

import argparse
import difflib
import os
import re
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bgpt.report import INDEX_COLUMNS, read_index
from bgpt.system import unescape_name


def read_tracks(content):
    """Returns the tracks of a MIDI file, bytes each. Raises ValueError for a wrong header or track length."""
    if content[:4] != b"MThd" or content[4:8] != b"\0\0\0\6" or len(content) < 14:
        raise ValueError("no MIDI header")
    tracks, position = [], 14
    while position < len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "big")
        if content[position : position + 4] != b"MTrk" or position + 8 + size > len(content):
            raise ValueError("track lengths do not add up")
        tracks.append(content[position + 8 : position + 8 + size])
        position += 8 + size
    if len(tracks) != int.from_bytes(content[10:12], "big"):
        raise ValueError("the header has another number of tracks")
    return tracks


def read_number(track, position):
    """Returns the variable-length number at a position of a track, and the next position."""
    number = 0
    while True:
        byte = track[position]
        number, position = number << 7 | byte & 127, position + 1
        if byte < 128:
            return number, position


def read_events(track):
    """Returns the notes of a track, (start, pitch, length) in ticks each, and whether it is whole.

    A whole track has only readable events, all its notes end, and End of Track comes last.
    """
    notes, time, position = [], 0, 0
    sounding, status = {}, 0  # {(channel, pitch): start}; the running status, 0 = none
    try:
        while position < len(track):
            delta, position = read_number(track, position)
            time += delta
            if track[position] >= 0x80:
                status, position = track[position], position + 1
            if status in (0xF0, 0xF7, 0xFF):
                is_meta = status == 0xFF
                is_end = is_meta and track[position] == 0x2F
                size, position = read_number(track, position + is_meta)  # a meta event has its kind first
                position, status = position + size, 0
                if is_end:
                    return notes, position == len(track) and not sounding
                continue
            size = 1 if status >> 4 in (0xC, 0xD) else 2
            data, position = track[position : position + size], position + size
            if not 0x80 <= status < 0xF0 or len(data) < size or max(data) >= 0x80:
                return notes, False
            if status >> 4 in (0x8, 0x9):
                key = status & 15, data[0]
                if key in sounding:
                    start = sounding.pop(key)
                    notes.append((start, data[0], time - start))
                if status >> 4 == 0x9 and data[1]:
                    sounding[key] = time
    except IndexError:
        pass
    return notes, False


def read_notes(content):
    """Returns the notes of a MIDI file, (start, pitch, length) in ticks, ordered by start.

    If its track lengths are wrong, reading ends at the first unreadable event of each track.
    """
    try:
        tracks = read_tracks(content)
    except ValueError:
        tracks = [track[4:] for track in content.split(b"MTrk")[1:]]
    return sorted(note for track in tracks for note in read_events(track)[0])


def is_whole(content, extension):
    """Returns whether a file with `extension`, "mid" or "abc", is whole."""
    if extension == "abc":
        return all(re.search(rb"^%b:" % field, content, re.MULTILINE) for field in (b"X", b"K"))
    try:
        return all(read_events(track)[1] for track in read_tracks(content))
    except ValueError:
        return False


def share_right(true, made):
    """Returns the share of equal notes of two MIDI files, by pitch and length, in matching blocks."""
    expected, heard = ([note[1:] for note in read_notes(content)] for content in (true, made))
    if not expected and not heard:
        return 1.0
    blocks = difflib.SequenceMatcher(None, expected, heard, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(expected), len(heard))


def read_pair(true_folder, made_folder, name):
    """Returns the contents of a true file and its conversion, tune.mid and tune.abc.mid. `name` is the latter's."""
    stem, extension = os.path.splitext(name)
    true_name = os.path.splitext(stem)[0] + extension
    with open(os.path.join(true_folder, true_name), "rb") as true, open(os.path.join(made_folder, name), "rb") as made:
        return true.read(), made.read()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--true", required=True, help="folder of the true files")
    parser.add_argument("--made", required=True, help="OUTPUT_FOLDER of MODE convert")
    parser.add_argument("--extension", choices=["mid", "abc"], default="mid")
    options = parser.parse_args(arguments)
    index = read_index(os.path.join(options.made, "index.tsv"))
    if index is None:
        parser.error(f"{options.made!r} has no index.tsv of MODE convert")
    pairs, is_cut_off = [], []  # (true content, made content) of each file; whether it was cut off
    for name, fields in index.items():
        if name.endswith("." + options.extension):
            try:
                pairs.append(read_pair(options.true, options.made, unescape_name(name)))
            except OSError as error:
                parser.error(f"cannot read {error.filename!r}: {error.strerror}")
            is_cut_off.append(fields[INDEX_COLUMNS.index("cut off or ended")] == "cut off")
    if not pairs:
        parser.error(f"{options.made!r} has no .{options.extension} files")

    def show(what, values):
        print(f"{what:<12} {statistics.fmean(values):7.2%}  ({sum(values):.1f} of {len(values)})")

    show("exact", [true == made for true, made in pairs])
    show("whole", [is_whole(made, options.extension) for _, made in pairs])
    if options.extension == "mid":
        show("notes right", [share_right(true, made) for true, made in pairs])
    show("cut off", is_cut_off)


if __name__ == "__main__":
    main()
