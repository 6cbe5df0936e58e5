"""Scores of conversions, with a hand-made MIDI file and damaged copies."""

import pytest
from bench_convert import is_whole, main, read_notes, share_right

from bgpt import report as report_page

NAME = b"\x00\xff\x03\x02ab"  # a meta event
EVENTS = (
    b"\x00\x90\x3c\x40",  # C sounds
    b"\x81\x00\x3c\x00",  # 128 ticks later it ends, by velocity 0 and the running status
    b"\x05\xc0\x07",  # another instrument
    b"\x03\x90\x40\x40",  # 8 ticks later E sounds
    b"\x60\x80\x40\x00",  # for 96 ticks
    b"\x00\xff\x2f\x00",
)


def midi(events):
    track = NAME + b"".join(events)
    return b"MThd\0\0\0\6\0\0\0\1\x01\xe0MTrk" + len(track).to_bytes(4, "big") + track


def test_notes_of_a_midi_file():
    two_channels = midi([b"\x00\x90\x3c\x40\x00\x91\x3c\x40", b"\x60\x80\x3c\x00\x00\x81\x3c\x00", EVENTS[-1]])
    assert read_notes(two_channels) == [(0, 0x3C, 96)] * 2 and is_whole(two_channels, "mid")
    assert read_notes(midi(EVENTS)) == [(0, 0x3C, 128), (136, 0x40, 96)]
    assert is_whole(midi(EVENTS), "mid") and share_right(midi(EVENTS), midi(EVENTS)) == 1


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        midi(EVENTS)[1:],
        midi(EVENTS)[:-1],
        midi(EVENTS) + b"\0",
        midi([*EVENTS[:4], EVENTS[5]]),  # E never ends
        midi(EVENTS[:5]),  # no end of the track
        midi([*EVENTS, EVENTS[5]]),  # it ends twice
        midi([b"\x00\x3c\x40", *EVENTS]),  # no running status after a meta event
        midi([b"\x00\xf8", *EVENTS]),  # a status that is illegal in files
        midi([b"\x00\x90\x90\x10", *EVENTS]),  # no pitch
        midi([*EVENTS, b"\x00\x90\x3c"]),  # an event cut short
        midi(EVENTS).replace(b"\0\1\x01\xe0", b"\0\2\x01\xe0"),  # two tracks, of which one is missing
    ],
)
def test_files_that_are_not_whole(damaged):
    assert not is_whole(damaged, "mid")


def test_share_of_the_notes_that_is_right():
    lower, cut_short = midi([b"\x00\x90\x3b\x40", b"\x81\x00\x3b\x00", *EVENTS[2:]]), midi(EVENTS)[:-15]
    assert share_right(midi(EVENTS), lower) == share_right(midi(EVENTS), cut_short) == 0.5
    assert share_right(midi(EVENTS), b"") == 0 and share_right(b"", b"") == 1 and share_right(midi([*EVENTS[:5], *EVENTS]), midi(EVENTS)) == 0.5


def test_tunes_in_abc():
    assert is_whole(b"X:1\nT:A\nK:C\nCDE|", "abc") and not is_whole(b"T:X:1\nK:C\nCDE|", "abc")


def test_the_outputs_of_mode_convert(tmp_path, capsys):
    for folder in ("true", "made"):
        (tmp_path / folder).mkdir()
    (tmp_path / "true" / "a.mid").write_bytes(midi(EVENTS))
    (tmp_path / "true" / "b.mid").write_bytes(midi(EVENTS))
    (tmp_path / "made" / "a.abc.mid").write_bytes(midi(EVENTS))
    (tmp_path / "made" / "b.abc.mid").write_bytes(midi(EVENTS)[:-15])
    report_page.write_index(
        tmp_path / "made", [("a.abc.mid", "a.abc", 9, None, "ended", "0"), ("b.abc.mid", "b.abc", 9, None, "cut off", "0")]
    )
    main(["--true", str(tmp_path / "true"), "--made", str(tmp_path / "made")])
    shares = [line.split("%")[0].rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shares == ["50.00", "50.00", "75.00", "50.00"]  # exact, whole, notes right, cut off
    (tmp_path / "made" / "b.abc.mid").unlink()
    with pytest.raises(SystemExit):
        main(["--true", str(tmp_path / "true"), "--made", str(tmp_path / "made")])
    assert "b.abc.mid': No such file" in capsys.readouterr().err
