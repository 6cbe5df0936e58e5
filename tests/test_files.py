"""Files as patches, lists of files, conversion pairs, data sets, batches."""

import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import as_batch, make_files

import utils
from bgpt import cpu_report, examples, system
from bgpt.files import describe_extensions, extension_of, list_files, list_readable_files

E = utils.END


def spelled_out(content, extension, size):
    """A file as patches, symbol by symbol as in the specification."""
    symbols = list(extension.encode())[:size]
    symbols += [E] * (size - len(symbols))
    symbols += list(content)
    symbols += [E] * (-len(symbols) % size)
    symbols += [E] * size
    return np.array(symbols).reshape(-1, size)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 510 * 16 - 1, 510 * 16])
@pytest.mark.parametrize("extension", ["", "abc", "x" * 16, "y" * 40])
def test_patches_of_a_file(tmp_path, length, extension):
    content = np.random.default_rng(length).integers(0, 256, length).astype(np.uint8).tobytes()
    path = tmp_path / ("tune." + extension if extension else "tune")
    path.write_bytes(content)
    patches, counted = utils.read_patches(path, 16)
    assert patches.dtype == np.int16
    np.testing.assert_array_equal(patches, spelled_out(content, extension, 16))
    # counted: the content and one end symbol, nothing else
    where = np.flatnonzero(counted)
    np.testing.assert_array_equal(where, np.arange(16, 16 + length + 1))
    assert utils.to_content(patches[1:]) == content


def test_the_example_of_the_specification(tmp_path):
    (tmp_path / "tune.abc").write_bytes(bytes(range(20)))
    patches, _ = utils.read_patches(tmp_path / "tune.abc", 16)
    expected = [[97, 98, 99] + [E] * 13, list(range(16)), [16, 17, 18, 19] + [E] * 12, [E] * 16]
    assert patches.tolist() == expected


@pytest.mark.parametrize(
    "name, extension",
    [("a.abc", "abc"), ("a.tar.gz", "gz"), ("a", ""), ("a.", ""), (".hidden", ""), ("d.x/a", ""), ("a.é", "é")],
)
def test_extension(name, extension):
    assert extension_of(name) == extension


def test_extension_of_many_bytes_is_cut_within_a_symbol():
    assert utils.extension_patch("éé", 3).tolist() == [0xC3, 0xA9, 0xC3]
    assert utils.extension_patch("\udcff", 2).tolist() == [0xFF, E]  # a name that is not UTF-8


@pytest.mark.parametrize(
    "extensions, size, names, needed",
    [
        (["tsv", "bin", "txt"], 1, "tsv, txt", 2),
        (["jpg", "JPEG", "jpeg", ""], 2, "jpeg, jpg", 3),
        (["abc", "abcd", "x", "xyzw1", "xyzw2"], 3, "abc, abcd, xyzw1, xyzw2", 5),
        (["é", "è"], 1, "è, é", 2),  # the second byte differs
        (["Jpg", "JPG", "jpg", "png"], 1, None, None),  # one extension, apart from case
        (["txt", "tsv"], 2, None, None),
    ],
)
def test_extensions_that_patch_size_cuts_alike(extensions, size, names, needed):
    if names is None:
        return examples.check_extensions(extensions, size)
    with pytest.raises(system.UserError, match=f"PATCH_SIZE is {size}.*extension patch: {names}.*PATCH_SIZE to {needed} or more"):
        examples.check_extensions(extensions, size)
    examples.check_extensions(extensions, needed)


def test_one_patch_over_is_cut(tmp_path):
    """A file of one patch too many has two crops: head (evaluation and training) and tail (training)."""
    path = tmp_path / "long.bin"
    path.write_bytes(bytes(range(7)) * 2)  # 14 bytes in patches of 2: 7 patches, and 2 more
    whole, _ = utils.read_patches(path, 2)
    assert len(whole) == 9
    head, counted = utils.read_patches(path, 2, *utils.crop(9, 8))
    np.testing.assert_array_equal(head, whole[:8])
    assert counted.sum() == 14  # the content, but no end symbol: it was cut away
    seen = {utils.crop(9, 8, np.random.default_rng(i)) for i in range(50)}
    assert seen == {(0, 8), (1, 9)}


def test_long_files_are_cut_to_head_body_or_tail_with_equal_chance(tmp_path):
    path = tmp_path / "long.bin"
    content = np.arange(100, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    whole, whole_counted = utils.read_patches(path, 2)  # 52 patches, all different
    starts = []
    for i in range(3000):
        span = utils.crop(52, 10, np.random.default_rng([i]))
        patches, counted = utils.read_patches(path, 2, *span)
        assert len(patches) == 10
        start = int(np.flatnonzero((whole == patches[0]).all(1))[0])
        np.testing.assert_array_equal(patches, whole[start : start + 10])
        np.testing.assert_array_equal(counted, whole_counted[start : start + 10])
        starts.append(start)
    heads, tails = starts.count(0), starts.count(42)
    body = set(starts) - {0, 42}
    assert body == set(range(1, 42))  # every window without the extension patch and the end patch
    for count in (heads, tails, 3000 - heads - tails):
        assert abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9)


def test_only_the_kept_bytes_of_a_huge_file_are_read(tmp_path):
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a terabyte of holes
    for i in range(6):
        total = utils.count_patches(1 << 40, 16)
        patches, _ = utils.read_patches(path, 16, *utils.crop(total, 32, np.random.default_rng(i)), 1 << 40)
        assert patches.shape == (32, 16)


def test_list_files(tmp_path):
    for name in ["b/2.txt", "b/1.txt", "a.txt", "a/z.txt", ".hidden", ".git/x.txt", "b/.h.txt", "c.mid"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "c.fifo")
    listed = list_files([str(tmp_path), str(tmp_path / "b")], "TRAIN_FOLDERS", "txt")
    assert [os.path.relpath(path, tmp_path) for path in listed] == ["a.txt", "a/z.txt", "b/1.txt", "b/2.txt"]
    names = [os.path.basename(path) for path in list_files([str(tmp_path)], "TRAIN_FOLDERS")]
    assert "c.mid" in names and ".hidden" not in names and "c.fifo" not in names


@pytest.mark.parametrize("wrong", ["missing", "file.txt"])
def test_list_files_names_what_is_no_folder(tmp_path, wrong):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(system.UserError, match=f"TRAIN_FOLDERS.*{wrong}"):
        list_files([str(tmp_path / wrong)], "TRAIN_FOLDERS")


def test_files_are_a_sequence_of_paths_with_sizes(tmp_path):
    names = {"b.x": 3, "a.x": 0, "é.x": 5, "c/d.x": 7, os.fsdecode(b"\xff.x"): 2}
    (tmp_path / "c").mkdir()
    for name, size in names.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "dead.x").symlink_to(tmp_path / "nowhere")
    files = list_files([str(tmp_path)], "TRAIN_FOLDERS")
    listed = {os.path.relpath(path, tmp_path): int(size) for path, size in zip(files, files.sizes, strict=True)}
    assert listed == {**names, "dead.x": -1} and list(listed)[:4] == ["a.x", "b.x", "c/d.x", "dead.x"]
    assert len(files) == 6 and files[5] == list(files)[5] and files.sizes.dtype == np.int64
    with pytest.raises(IndexError):
        files[6]
    assert len(list_files([str(tmp_path / "c")], "TRAIN_FOLDERS", "abc")) == 0
    dataset = utils.ByteDataset(utils.Examples(files, [[3]]), 4, 8)
    with pytest.raises(FileNotFoundError, match="dead.x"):
        dataset[0]


def held_out_names(names, share, seed=0, mode=None, labels=None):
    """Returns the files of the held-out examples."""
    pool = utils.Examples(make_files(dict.fromkeys(names, 1)))
    pool = pool if mode is None else examples.pair_files(pool.files, mode)
    rest, held_out = examples.hold_out(pool, share, seed, labels and np.array([labels.index(path[0]) for path, *_ in pool]))
    assert sorted([*rest, *held_out]) == list(range(len(pool))) and len(rest) and len(held_out) and (np.diff(held_out) > 0).all()
    return {path for index in held_out for path in pool[index]}


def test_hold_out():
    names = [f"sub/{i}.x" for i in range(2000)]
    held_out = held_out_names(names, 0.2)
    assert 330 < len(held_out) < 470 and held_out == held_out_names(names, 0.2) != held_out_names(names, 0.2, seed=1)
    for some in (names[:300], names[500:] + ["new.x"]):  # a file keeps its side when others come or go
        assert held_out_names(some, 0.2) - {"new.x"} == held_out & set(some)
    for count in range(2, 30):  # both sides have a file
        assert len(held_out_names(names[:count], 0.001)) == 1 and len(held_out_names(names[:count], 0.999)) == count - 1
    with pytest.raises(system.UserError, match="EVAL_SPLIT"):
        held_out_names(names[:1], 0.5)
    pairs = [f"{i}.{extension}" for i in range(300) for extension in ("abc", "ABC", "mid")]
    held_out = held_out_names(pairs, 0.2, mode="abc->mid")  # both inputs of a stem, or neither
    others = {name for name in held_out if "ABC" in name}
    assert len(held_out) % 3 == 0 and held_out == held_out_names(pairs, 0.2, mode="mid->abc") | others


def test_files_are_held_out_by_label():
    names = [f"{label}/{i}.x" for label, count in zip("abcde", (2000, 400, 60, 2, 1)) for i in range(count)]
    for seed in range(5):
        held_out = held_out_names(names, 0.1, seed, labels="abcde")
        counts = [sum(name[0] == label for name in held_out) for label in "abcde"]
        assert 140 < counts[0] < 260 and 15 < counts[1] < 65 and 1 <= counts[2] < 20 and counts[3] <= 1 and not counts[4]
        fewer = names[:1000] + names[2000:]
        assert held_out_names(fewer, 0.1, seed, labels="abcde") == held_out & set(fewer)
    assert len(held_out_names(["a/1.x", "b/1.x", "b/2.x"], 0.01, labels="ab") & {"b/1.x", "b/2.x"}) == 1


def test_lengths_are_those_of_the_sequences(tmp_path):
    for name in ("abc", "mid"):
        for length in (0, 1, 4, 5, 40):
            (tmp_path / f"{length}.{name}").write_bytes(bytes(length))
    files = list_files([str(tmp_path)], "TRAIN_FOLDERS")
    pairs = examples.pair_files(files, "abc&mid")
    for chosen, longest in ((utils.Examples(files), 8), (pairs, 23), (examples.directed(pairs, "abc&mid"), 23)):
        dataset = utils.ByteDataset(chosen, 4, longest)
        lengths = dataset.lengths(np.arange(len(chosen)))
        assert lengths.tolist() == [len(dataset[i][0]) for i in range(len(chosen))] and lengths.max() == longest
    chosen = pairs.select(np.array([3, 1]))
    assert list(chosen) == [pairs[3], pairs[1]] and list(examples.directed(chosen, "abc&mid"))[1] == pairs[3][::-1]


def test_digest_depends_on_names_order_and_sizes():
    sizes = {"a.abc": 1, "a.mid": 2, "b.abc": 3, "b.mid": 4}
    pairs = examples.pair_files(make_files(sizes), "abc->mid")
    same = examples.pair_files(make_files({"0.txt": 9, **sizes}), "abc->mid")  # other files do not matter
    assert examples.digest(pairs) == examples.digest(same)
    others = [pairs.select([1, 0]), pairs.select([0]), examples.directed(pairs, "abc&mid"), examples.pair_files(same.files, "mid->abc")]
    others += [examples.pair_files(make_files({**sizes, change: 5}), "abc->mid") for change in sizes]
    assert len({examples.digest(each) for each in [pairs, *others]}) == 9


def test_a_name_is_the_folders_index_and_the_path_below_it(tmp_path, monkeypatch):
    """Other spellings of the folders give the same order, hashes and crops. Another order of the folders does not."""
    for name in ("b/x/1.bin", "b/2.bin", "a/1.bin", "a/y/3.bin"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(name.encode() * 50)
    monkeypatch.chdir(tmp_path / "here")
    here = str(tmp_path / "here")

    def seen(*folders):
        chosen = utils.Examples(list_files(folders, "TRAIN_FOLDERS"))
        dataset = utils.ByteDataset(chosen, 2, 10, [0, 1])
        return examples.digest(chosen), [dataset[i][0].tobytes() for i in range(4)]

    spelled = seen("b", "a")
    assert seen(f"{here}/b", "a") == seen("../here/b/", f"{here}/a") == seen("./b", "../here/a") == spelled
    assert seen("a", "b") != spelled and seen(".") == seen(here) != spelled
    (tmp_path / "here").rename(tmp_path / "there")
    assert seen(str(tmp_path / "there" / "b"), str(tmp_path / "there" / "a")) == spelled
    files = list_files([str(tmp_path / "there" / each) for each in ("b", "a")], "TRAIN_FOLDERS")
    assert [os.path.relpath(path, tmp_path / "there") for path in files] == ["b/2.bin", "b/x/1.bin", "a/1.bin", "a/y/3.bin"]


def test_unreadable_files_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    for i in range(4):
        (tmp_path / f"{i}.x").write_bytes(bytes(i))
    assert len(list_readable_files([str(tmp_path)], "TRAIN_FOLDERS")) == 4 and not capsys.readouterr().out
    (tmp_path / "0\n.x").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")  # a symlink to itself
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("2.x") and access(path, mode))  # root may read all
    files = list_readable_files([str(tmp_path)], "TRAIN_FOLDERS")
    assert [os.path.basename(path) for path in files] == ["0.x", "1.x", "3.x"] and files.sizes.tolist() == [0, 1, 3]
    names = ", ".join(f"{tmp_path}/{name}" for name in ("0\\n.x", "2.x", "round"))
    assert capsys.readouterr().out == f"TRAIN_FOLDERS: 3 of 6 files are unreadable and left out ({names})\n"
    for i in range(12):
        (tmp_path / f"dead{i}.x").symlink_to("nowhere")
    list_readable_files([str(tmp_path)], "TRAIN_FOLDERS")
    assert "and 5 more)" in capsys.readouterr().out


def test_unreadable_folders_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    """For example lost+found on a drive. A folder of TRAIN_FOLDERS itself must be readable."""
    for name in ("1.x", "lost+found/2.x", "sub/3.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def refuse(folder):  # root may read all
        if folder.endswith("lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [os.path.basename(path) for path in list_files([str(tmp_path)], "TRAIN_FOLDERS")] == ["1.x", "3.x"]
    assert f"TRAIN_FOLDERS: 1 folders are unreadable and left out ({tmp_path}/lost+found)" in capsys.readouterr().out
    with pytest.raises(system.UserError, match="cannot read the folder .*lost.found': Permission denied"):
        list_files([str(tmp_path), str(tmp_path / "lost+found")], "TRAIN_FOLDERS")


def test_parts_have_nearly_the_same_number_of_patches():
    random = np.random.default_rng(0)
    for count, n in ((1, 5), (2, 16), (8, 64), (3, 2), (4, 0)):
        lengths = random.integers(2, 513, n)
        parts = utils.balanced_parts(lengths, count)
        assert len(parts) == count and sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
        assert [part.tolist() for part in parts] == [part.tolist() for part in utils.balanced_parts(lengths, count)]
        sums = [lengths[part].sum() for part in parts]
        if n >= 2 * count:
            assert max(sums) < 1.03 * min(sums)
        assert all(map(len, parts[:n]))  # nobody is without work while there is some
    assert [part.tolist() for part in utils.balanced_parts([1, 9, 5, 4], 2)] == [[0, 1], [2, 3]]


@pytest.fixture()
def pairs_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, length in {"a.abc": 5, "a.mid": 8, "sub/a.abc": 0, "sub/a.mid": 1, "b.abc": 3, "c.mid": 3, "a.b.abc": 4}.items():
        (tmp_path / name).write_bytes(bytes(range(length)))
    return tmp_path


def test_conversion_pairs(pairs_folder):
    files = list_files([str(pairs_folder)], "TRAIN_FOLDERS")
    pairs = examples.pair_files(files, "abc->mid")
    short = [tuple(os.path.relpath(path, pairs_folder) for path in pair) for pair in pairs]
    assert short == [("a.abc", "a.mid"), ("sub/a.abc", "sub/a.mid")]
    assert list(examples.pair_files(files, "mid&abc")) == [(b, a) for a, b in pairs]
    folders = [str(pairs_folder)]
    # a.abc 2 patches, a.mid 2 patches, 3 more
    for patch_length, kept in ((7, [0, 1]), (6, [1])):
        assert list(examples.find_examples(folders, "X", "abc->mid", 4, patch_length)) == [pairs[i] for i in kept]
    with pytest.raises(system.UserError, match="X: 2 of 2 pairs do not fit in PATCH_LENGTH 3.*PATCH_LENGTH 7"):
        examples.find_examples(folders, "X", "abc->mid", 4, 3)
    with pytest.raises(system.UserError, match=r"X: CONVERSION_MODE is 'abc->midi', but among 7 files \(4 .abc, 3 .mid\)"):
        examples.find_examples(folders, "X", "abc->midi", 4, 7)


def test_pairs_do_not_mind_case():
    """Of several targets the one in lower case is taken; a CONVERSION_MODE in upper case means the same."""
    sizes = {"a.ABC": 1, "a.MID": 1, "b.abc": 1, "b.Mid": 1, "c.abc": 1, "c.mid": 1, "c.MID": 1, "D.abc": 1, "d.mid": 1}
    for mode in ("abc->mid", "ABC->Mid"):
        pairs = examples.pair_files(make_files(sizes), mode)
        assert list(pairs) == [("a.ABC", "a.MID"), ("b.abc", "b.Mid"), ("c.abc", "c.mid")]
    assert examples.extensions_of(pairs) == ["abc", "mid"]
    assert examples.extensions_of(utils.Examples(pairs.files)) == ["ABC", "MID", "Mid", "abc", "mid"]


def test_extension_patches_of_pairs_are_in_lower_case(tmp_path):
    (tmp_path / "a.ABC").write_bytes(b"x")
    (tmp_path / "a.MID").write_bytes(b"y")
    files = list_files([str(tmp_path)], "")
    patches, *_ = utils.ByteDataset(utils.Examples(files, [[0, 1]]), 4, 16)[0]
    assert patches[[0, 2]].tolist() == [[*b"abc", E], [*b"mid", E]]
    patches, *_ = utils.ByteDataset(utils.Examples(files, [[0]]), 4, 16)[0]
    assert patches[0].tolist() == [*b"ABC", E]  # plain files stay as they are


def test_lists_of_one_extension_do_not_mind_case(tmp_path):
    for name in ("a.abc", "b.ABC", "c.abcd", "abc"):
        (tmp_path / name).write_bytes(b"x")
    for extension in ("abc", "Abc"):
        listed = list_files([str(tmp_path)], "INPUT_FOLDER", extension)
        assert [os.path.basename(path) for path in listed] == ["a.abc", "b.ABC"]
    assert describe_extensions(["a.abc", "b.ABC", "c", "d.x", "e.x", "f.x"]) == "3 .x, 2 .abc, 1 without any"
    assert describe_extensions([f"a.{i}" for i in range(9)]).endswith(" and 4 other extensions")


def test_conversion_sequence(pairs_folder):
    """[abc] content [mid] content [end]: the input's end patch is left out, the target is whole."""
    files = list_files([str(pairs_folder)], "")
    pair = [files.paths.index(str(pairs_folder / name)) for name in ("a.abc", "a.mid")]
    patches, counted, _ = utils.ByteDataset(utils.Examples(files, [pair]), 4, 16)[0]
    expected = [list(b"abc") + [E], [0, 1, 2, 3], [4, E, E, E], list(b"mid") + [E], [0, 1, 2, 3], [4, 5, 6, 7], [E] * 4]
    assert patches.tolist() == expected
    # bits per byte: both contents with the end of each, where there is one; no extension, no padding
    assert counted.astype(int).tolist() == [
        [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0],
    ]  # fmt: skip


def test_dataset_crops_follow_seed_epoch_and_path(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.bin").write_bytes(bytes(range(200)))
    every = utils.Examples(list_files([str(tmp_path)], ""))

    def crops(chosen, *seed):
        dataset = utils.ByteDataset(chosen, 2, 10, list(seed))
        return {example: dataset[i][0].tobytes() for i, example in enumerate(chosen)}

    first = crops(every, 0, 1)
    fewer = crops(every.select(range(39, 9, -1)), 0, 1)  # the order or number of files decides nothing
    assert len(fewer) == 30 and fewer.items() <= first.items()
    assert first != crops(every, 0, 2) and first != crops(every, 1, 1)
    assert len(set(first.values())) > 5
    head = utils.ByteDataset(every, 2, 10)
    assert len({head[i][0].tobytes() for i in range(40)}) == 1


def test_batches(tmp_path):
    lengths = [3, 0, 9, 4, 30]
    for i, length in enumerate(lengths):
        (tmp_path / f"{i}.x").write_bytes(bytes(length))
    dataset = utils.ByteDataset(utils.Examples(list_files([str(tmp_path)], "")), 4, 8)
    index_batches = [np.array(indices) for indices in ([4, 2], [0, 1], [3])]
    state = torch.get_rng_state()
    alone, workers = (list(utils.batches(dataset, index_batches, num_workers=n)) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing that training could have drawn
    for items in (alone, workers):
        assert [indices.tolist() for indices, _ in items] == [indices.tolist() for indices in index_batches]
    alone, workers = ([batch for _, batch in items] for items in (alone, workers))
    for one, other in zip(alone, workers, strict=True):
        for name in ("patches", "masks", "counted", "targets"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert [batch.masks.sum(1).tolist() for batch in alone] == [[8, 5], [3, 2], [3]]
    first = alone[0]
    assert first.patches.shape == (2, 8, 4) and (first.patches[1, 5:] == E).all()
    assert (first.counted & (first.patches != E)).sum() == 28 + 9  # file 4 is cut to its head
    split = first.split(2)
    assert [(rows.tolist(), part.patches.shape) for rows, part in split] == [([0], (1, 8, 4)), ([1], (1, 5, 4))]
    assert first.targets.tolist() == [[True] * 7, [True] * 4 + [False] * 3]  # all real patches but the first
    assert torch.equal(split[1][1].patches[0], first.patches[1, :5]) and sum(part.masks.sum() for _, part in split) == 13


@pytest.mark.parametrize("num_workers", [0, 2])
def test_file_that_vanishes(tmp_path, num_workers):
    for name in ("a.x", "gone.x"):
        (tmp_path / name).write_text("a")
    dataset = utils.ByteDataset(utils.Examples(list_files([str(tmp_path)], "")), 4, 8)
    (tmp_path / "gone.x").unlink()
    with pytest.raises(OSError) as caught:
        list(utils.batches(dataset, [[0], [1]], num_workers))
    assert caught.value.filename.endswith("gone.x") and caught.value.strerror == "No such file or directory"


def test_reads_that_fall_short_are_errors(tmp_path, monkeypatch):
    """A file that has shrunk or grown, and a disk that returns less than the file's size."""
    path = str(tmp_path / "a.x")
    with open(path, "wb") as file:
        file.write(bytes(range(100)))
    assert utils.read_bytes(path, 10, 20) == bytes(range(10, 20)) and utils.read_bytes(path, 95, 200) == bytes(range(95, 100))
    with pytest.raises(OSError, match="has 100 bytes now, but had 101"):
        utils.read_bytes(path, size=101)
    for unreadable in ("/proc/self/mem", str(tmp_path)):
        with pytest.raises(OSError, match=re.escape(unreadable)):  # a failed read is no end of the file, and is named
            utils.read_bytes(unreadable, stop=10)
    fstat, sizes = os.fstat, [120, 60, 0]
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result([*fstat(descriptor)[:6], sizes[0], *fstat(descriptor)[7:]]))
    assert cpu_report.read_file(path) == (b"", -1)
    with pytest.raises(OSError, match="ends 20 bytes too early.*a.x"):
        utils.read_bytes(path)
    for sizes[0] in (60, 0):  # some file systems have another size than reading gives
        assert cpu_report.read_file(path) == (b"", -1)
        for start in (0, 60):
            with pytest.raises(OSError, match=f"longer than its reported size, {sizes[0]} bytes.*a.x"):
                utils.read_bytes(path, start, 60)


def test_split_of_a_short_batch_leaves_no_empty_part():
    batch = as_batch([utils.to_patches(b"abc", "x", 4)] * 3)
    assert [rows.tolist() for rows, _ in batch.split(4)] == [[0], [1], [2]]
    assert [rows.tolist() for rows, _ in batch.split(2)] == [[0, 2], [1]]
