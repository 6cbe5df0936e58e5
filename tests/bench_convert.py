"""How good the files are that MODE convert made, against the true ones.

    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER abc_midi/test --TEMPERATURE 0
    python tests/bench_convert.py --true abc_midi/test --made output [--extension mid]

Prints how many files are the true ones byte for byte; how many are whole: MIDI files whose header and track lengths add up, or
ABC tunes with the fields X and K; of MIDI files, which share of the notes is right, by an alignment of both files' notes (pitch
and length in ticks) in their order, relative to the longer file; and how many files were cut off, as index.tsv says.
"""

import argparse
import difflib
import os
import re
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import index_page


def read_tracks(content):
    """Returns the tracks of a MIDI file, bytes each. Raises ValueError unless its header and track lengths add up."""
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
        raise ValueError("the header counts other tracks")
    return tracks


def read_number(track, position):
    """Returns the variable-length number at a position of a track, and the position after it."""
    number = 0
    while True:
        byte = track[position]
        number, position = number << 7 | byte & 127, position + 1
        if byte < 128:
            return number, position


def read_events(track):
    """Returns the notes of a track, a list of (start, pitch, length) in ticks, and whether all of it could be read."""
    notes, sounding, time, position, status = [], {}, 0, 0, 0  # sounding: {pitch: start}
    try:
        while position < len(track):
            delta, position = read_number(track, position)
            time += delta
            if track[position] >= 128:
                status, position = track[position], position + 1
            if status in (0xFF, 0xF0, 0xF7):  # a meta event has its kind first
                size, position = read_number(track, position + (status == 0xFF))
                position += size
            elif status >> 4 in (0xC, 0xD):
                position += 1
            else:
                pitch, velocity, position = track[position], track[position + 1], position + 2
                if status >> 4 in (0x8, 0x9) and pitch in sounding:
                    start = sounding.pop(pitch)
                    notes.append((start, pitch, time - start))
                if status >> 4 == 0x9 and velocity:
                    sounding[pitch] = time
    except IndexError:
        return notes, False
    return notes, position == len(track) and not sounding


def read_notes(content):
    """Returns the notes of a MIDI file, (start, pitch, length) in ticks, in the order of their starts.

    Of a file that is none, those up to where its events cannot be read, whatever lengths its tracks have.
    """
    tracks = content.split(b"MTrk")[1:]
    return sorted(note for track in tracks for note in read_events(track[4:])[0])


def is_whole(content, extension):
    """Returns whether a file of that extension, "mid" or "abc", is one."""
    if extension == "abc":
        return all(re.search(rb"^%b:" % field, content, re.MULTILINE) for field in (b"X", b"K"))
    try:
        return all(read_events(track)[1] for track in read_tracks(content))
    except ValueError:
        return False


def share_right(true, made):
    """Returns which share of two MIDI files' notes agrees."""
    expected, heard = ([note[1:] for note in read_notes(content)] for content in (true, made))
    blocks = difflib.SequenceMatcher(None, expected, heard, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(expected), len(heard), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--true", required=True, help="folder of the true files")
    parser.add_argument("--made", required=True, help="OUTPUT_FOLDER of MODE convert")
    parser.add_argument("--extension", choices=["mid", "abc"], default="mid")
    options = parser.parse_args()
    index = index_page.read_index(os.path.join(options.made, "index.tsv"))
    if index is None:
        parser.error(f"{options.made!r} holds no index.tsv of MODE convert")
    pairs, is_cut_off = [], []  # (true content, made content) of each file; whether it was cut off
    for name, fields in index.items():
        if name.endswith("." + options.extension):
            with open(os.path.join(options.true, name), "rb") as true, open(os.path.join(options.made, name), "rb") as made:
                pairs.append((true.read(), made.read()))
            is_cut_off.append(fields[index_page.INDEX_COLUMNS.index("cut off or ended")] == "cut off")
    if not pairs:
        parser.error(f"{options.made!r} holds no .{options.extension} files")

    def show(what, values):
        print(f"{what:<12} {statistics.fmean(values):7.2%}  ({sum(values):.1f} of {len(values)})")

    show("exact", [true == made for true, made in pairs])
    show("whole", [is_whole(made, options.extension) for _, made in pairs])
    if options.extension == "mid":
        show("notes right", [share_right(true, made) for true, made in pairs])
    show("cut off", is_cut_off)


if __name__ == "__main__":
    main()
