"""Examples to train and evaluate on: pairs for conversion, the held-out set, labels for classification."""

import collections
import functools
import hashlib
import math
import os
import re

import numpy as np

from bgpt.files import describe_extensions, extension_of, list_readable_files
from bgpt.system import UserError, escape_name, first_names
from utils import Examples

SHOWN_LABELS = 20  # most lines of the table of labels
FEW_FILES = 100  # with fewer evaluation files, an accuracy is imprecise
FEW_BYTES = 4096  # with fewer bytes of evaluation files, bits per byte are imprecise

# ---- Sets of files --------------------------------------------------------------------------------------------------


def hash_texts(texts):
    """Returns a 64-bit hash of each text, int64 (n,)."""
    hashes = (hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(each, "little", signed=True) for each in hashes), np.int64)


def real_paths(paths):
    """Yields each path with its folder resolved, so that all its spellings are equal."""
    real = functools.cache(os.path.realpath)
    return (os.path.join(real(os.path.dirname(path)), os.path.basename(path)) for path in paths)


def digest(examples):
    """Returns the SHA-256 (hex) of the files' names, sizes and parts. It stays the same when a folder moves."""
    sha256 = hashlib.sha256(repr(sorted(examples.parts.items())).encode())
    files = examples.indices.reshape(-1)  # (n, 1) or (n, 2) -> (files,)
    sha256.update(examples.files.sizes[files].tobytes())
    for file in files.tolist():
        sha256.update(os.fsencode(examples.files.name(file)) + b"\0")
    return sha256.hexdigest()


def extensions_of(examples):
    """Returns the sorted extensions as the model sees them, in pairs in lower case."""
    extensions = {extension_of(examples.files[file]) for file in examples.indices.reshape(-1).tolist()}
    return sorted({extension.lower() for extension in extensions} if examples.are_pairs else extensions)


def print_sets(train, held_out, settings, cuts_windows):
    """Prints both sets' folders, counts and shared files, and the share seen of long files.

    With `cuts_windows` it is all, in windows. Otherwise an epoch sees a crop, and evaluation the head.
    """
    kind = "pairs" if train.are_pairs else "files"
    print(f"trains on {len(train)} {kind} of {', '.join(settings['TRAIN_FOLDERS'])}")
    where = ", ".join(settings["EVAL_FOLDERS"]) or "the same folders, held out by EVAL_SPLIT"
    print(f"evaluates on {len(held_out)} {kind} of {where}")
    if held_out.files is not train.files:
        known = set(real_paths(path for path, *_ in train))
        if shared := sum(path in known for path in real_paths(path for path, *_ in held_out)):
            print(f"warning: {shared} evaluation examples are training examples too, so their figures are too good")
    patch_size, patch_length = settings["PATCH_SIZE"], settings["PATCH_LENGTH"]
    for examples, who, how in ((train, "an epoch", "a crop of each"), (held_out, "evaluation", "the head of each")):
        first, last = examples.spans(patch_size).T
        lengths = last - first
        longer = int((lengths > patch_length).sum())
        if longer and not examples.are_pairs:
            share = f"{lengths.clip(max=patch_length).sum() / lengths.sum():.2%} of all bytes, {how}"
            seen, limit = "all bytes, in windows" if cuts_windows else share, f"{patch_length} patches of {patch_size} bytes"
            print(f"{longer} of {len(examples)} files are longer than PATCH_LENGTH ({limit}): {who} sees {seen}")


# ---- Pairs ----------------------------------------------------------------------------------------------------------


def directions_of(mode):
    """Returns the list of (input, target) extensions of a CONVERSION_MODE in lower case, [] for None."""
    if mode is None:
        return []
    source, sign, target = re.split("(->|&)", mode.lower())
    return [(source, target), (target, source)][: 1 + (sign == "&")]


def pair_files(files, mode):
    """Returns Examples of (input, target) Files with the same folder and stem, ordered by input.

    Case of extensions is ignored. Of tune.mid and tune.MID, the former is the target.
    """
    source, target = directions_of(mode)[0]
    split = [os.path.splitext(path) for path in files]
    # paths are sorted, lower case last, so that it wins
    targets = {stem: index for index, (stem, extension) in enumerate(split) if extension[1:].lower() == target}
    inputs = [(index, stem) for index, (stem, extension) in enumerate(split) if extension[1:].lower() == source]
    pairs = [(index, targets[stem]) for index, stem in inputs if stem in targets]
    return Examples(files, np.array(pairs, dtype=np.int64).reshape(-1, 2))


def find_pairs(files, mode, name):
    """Returns the pairs among Files and prints the number of unpaired ones. Raises UserError if there are no pairs."""
    pairs = pair_files(files, mode)
    if len(files) and not len(pairs):
        (source, target), there = directions_of(mode)[0], f"{len(files)} files ({describe_extensions(files)})"
        wanted = f"two in one folder like tune.{source} and tune.{target}"
        raise UserError(f"{name}: CONVERSION_MODE is {mode!r}, but among {there} there are no {wanted}")
    if unpaired := len(files) - len(np.unique(pairs.indices)):
        print(f"{name}: {unpaired} of {len(files)} files are in no pair and are left out")
    return pairs


def directed(examples, mode):
    """Returns Examples in all directions of a CONVERSION_MODE or None. "&" gives each pair, then its reverse."""
    if len(directions_of(mode)) < 2:
        return examples
    both = np.stack((examples.indices, examples.indices[:, ::-1]), axis=1)  # (n, 2) -> (n, 2 directions, 2)
    return Examples(examples.files, both.reshape(-1, 2))  # (2·n, 2)


def find_examples(folders, name, mode, patch_size, patch_length, own=()):
    """Returns the readable files of folders as Examples, or their pairs that fit in PATCH_LENGTH.

    `mode` is CONVERSION_MODE. Raises UserError with the constant `name` if a folder is missing or no pair fits.
    """
    files = list_readable_files(folders, name, own)
    if mode is None:
        return Examples(files)
    pairs = find_pairs(files, mode, name)
    lengths = pairs.lengths(patch_size)
    fitting = np.flatnonzero(lengths <= patch_length)
    if len(fitting) < len(pairs):
        message = f"{name}: {len(pairs) - len(fitting)} of {len(pairs)} pairs do not fit in PATCH_LENGTH {patch_length}"
        message += f" and are left out; PATCH_LENGTH {lengths.max()} would keep them all"
        if not len(fitting):
            raise UserError(message)
        print(message)
    return pairs.select(fitting)


def check_extensions(extensions, patch_size):
    """Raises UserError if different extensions have the same extension patch. Case is ignored."""
    encoded = sorted({(each.encode("utf-8", "surrogateescape"), each) for each in extensions})
    alike, length = set(), 0
    for (first, a), (second, b) in zip(encoded, encoded[1:]):
        common = len(os.path.commonprefix([first, second]))  # bytes
        if common >= patch_size and a.lower() != b.lower():
            alike, length = alike | {a, b}, max(length, common)
    if alike:
        what = f"PATCH_SIZE is {patch_size}, but different extensions then have the same extension patch"
        raise UserError(f"{what}: {first_names(sorted(alike))}. Set PATCH_SIZE to {length + 1} or more, or rename the files")


def find_sets(settings, own):
    """Returns the Examples of TRAIN_FOLDERS and of EVAL_FOLDERS, None for []. Raises UserError if a folder cannot be used."""
    sets, names = [], ("CONVERSION_MODE", "PATCH_SIZE", "PATCH_LENGTH")
    for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"):
        folders = settings[name]
        sets.append(find_examples(folders, name, *(settings[each] for each in names), own) if folders else None)
        if folders and not sets[-1]:
            raise UserError(f"{name}: no files in {', '.join(folders)}" + "; [] holds out EVAL_SPLIT instead" * (len(sets) - 1))
    check_extensions(sum((extensions_of(each) for each in sets if each is not None), []), settings["PATCH_SIZE"])
    return sets


# ---- Held-out examples ----------------------------------------------------------------------------------------------


def draw_by_name(examples, seed):
    """Returns a hash of each example's name, float64 (n,), from 0 to 1.

    The name is the path below the data folder, of pairs without extension. The number does not depend on other files, so that a
    file stays in its set when others are added or removed.
    """
    names = map(examples.files.below, examples.indices[:, 0].tolist())
    return hash_texts(f"{seed}/{os.path.splitext(name)[0] if examples.are_pairs else name}" for name in names) / 2.0**64 + 0.5


def hold_out(examples, share, seed, groups=None):
    """Splits Examples by `draw_by_name` into the rest and a held-out set of about `share`.

    Stratified by `groups`, int64 (n,), the labels of a classifier. Each label keeps at least one example, and holds out at
    least one if `share` of its examples is one or more. None = all examples are one group. At least one example is held out.

    Returns ascending indices, int64 (rest,) and (held out,). Raises UserError if there are too few examples.
    """
    draws = draw_by_name(examples, seed)
    groups = np.zeros(len(draws), np.int64) if groups is None else groups
    order, sizes = np.lexsort((draws, groups)), np.bincount(groups)  # order: by group, then by draw
    ends = sizes.cumsum()
    lowest, highest = order[ends - sizes], order[ends - 1]
    is_chosen = draws < share
    is_chosen[lowest[share * sizes >= 1]] = True
    is_chosen[highest] = False
    if (sizes < 2).all():
        raise UserError(f"EVAL_SPLIT: cannot hold out a part of {len(draws)} examples: add files, or set EVAL_FOLDERS")
    if not is_chosen.any():
        is_chosen[min(lowest[sizes > 1], key=draws.__getitem__)] = True
    return np.flatnonzero(~is_chosen), np.flatnonzero(is_chosen)


def hold_out_parts(examples, share, seed, patch_size, longest):
    """Splits Examples into training and held-out Examples. Of a large file, the end is held out.

    A large file has more than ten times `share` of all patches (or half of them), and more than 8 times `longest`. A single
    file is large if it is longer than `longest`. Others are held out whole by `draw_by_name`, at least one if none is large.

    `longest` is PATCH_LENGTH. None = no file is large, as for pairs.
    """
    lengths = examples.lengths(patch_size)
    least = math.inf if longest is None else longest if len(examples) == 1 else 8 * longest  # patches of a large file
    is_large = (lengths > min(10 * share, 0.5) * lengths.sum()) & (lengths > least)
    large = np.flatnonzero(is_large)
    if len(large):
        is_chosen = (draw_by_name(examples, seed) < share) & ~is_large
        kept, chosen = np.flatnonzero(~is_chosen), np.flatnonzero(is_chosen)
    else:
        kept, chosen = hold_out(examples, share, seed)
    # enough bytes in all, but at most a tenth of a file, and 3 patches or more, since no window predicts a part's first patch
    fewest = np.minimum(FEW_BYTES // patch_size // max(len(large), 1), lengths // 10).clip(min=3)
    cuts = lengths - np.clip((share * lengths).round().astype(np.int64), fewest, lengths - 2)
    train_parts = {i: (0, int(cuts[index])) for i, index in enumerate(kept.tolist()) if is_large[index]}
    held_out_parts = {len(chosen) + i: (int(cuts[index]), int(lengths[index])) for i, index in enumerate(large.tolist())}
    if len(large):
        names = first_names(os.path.basename(examples[index][0]) for index in large.tolist())
        print(f"EVAL_SPLIT: of {names}, the end is held out, {int((lengths - cuts)[large].sum()) * patch_size:,} bytes")
    train = Examples(examples.files, examples.indices[kept], train_parts)
    return train, Examples(examples.files, examples.indices[np.concatenate((chosen, large))], held_out_parts)


def check_content(held_out, settings):
    """Raises UserError if the held-out Examples have no byte to predict. Prints a warning if they have few."""
    starts = held_out.spans(settings["PATCH_SIZE"])[:, 0]
    num_bytes = int((held_out.sizes()[:, -1] - starts * settings["PATCH_SIZE"]).clip(min=0).sum())
    more = "add files to EVAL_FOLDERS, or raise EVAL_SPLIT"
    if not num_bytes:
        name = "EVAL_FOLDERS" if settings["EVAL_FOLDERS"] else "EVAL_SPLIT"
        raise UserError(f"{name}: the {len(held_out)} evaluation files have no bytes to predict: {more}")
    if num_bytes < FEW_BYTES:
        print(f"warning: only {num_bytes:,} bytes to evaluate on, so bits per byte are imprecise: {more}")


# ---- Labels ---------------------------------------------------------------------------------------------------------

LABEL_RULES = {
    "name": "a file's name up to the first '_', and its extension (Business_1.txt is Business.txt)",
    "prefix": "a file's name up to the last '_', and its extension (new_york_1.txt is new_york.txt)",
    "folder": "the name of a file's folder (Business/1.txt is Business)",
    "path": "the path of a file's folder below the data folder (2024/Business/1.txt is 2024/Business)",
}


def label_of(path, mode="name"):
    """Returns a file's label by any of `LABEL_RULES` but "path". "name" is the paper's (3.3)."""
    if mode == "folder":
        return os.path.basename(os.path.dirname(os.path.abspath(path)))
    stem, extension = os.path.splitext(os.path.basename(path))
    return (stem.split("_")[0] if mode == "name" else stem.rpartition("_")[0] or stem) + extension


def labels_of(examples, mode):
    """Returns the list of labels of single files. By "path", a file directly in a data folder has that folder's name."""
    if mode != "path":
        return [label_of(path, mode) for path, in examples]
    folders = map(os.path.dirname, map(examples.files.below, examples.indices[:, 0].tolist()))
    return [folder or label_of(path, "folder") for folder, (path,) in zip(folders, examples)]


def merged_folders(train):
    """Returns the sorted labels by "path" that "folder" would merge."""
    folders = set(zip(labels_of(train, "folder"), labels_of(train, "path")))
    counts = collections.Counter(name for name, _ in folders)
    return sorted(path for name, path in folders if counts[name] > 1)


def find_labels(train, mode):
    """Returns label indices, int64 (n,), and {label: index}, sorted. Raises UserError for one label or merged folders."""
    names = labels_of(train, mode)
    if mode == "folder" and (merged := merged_folders(train)):
        what = f"LABELS 'folder' would make one label of folders of the same name: {first_names(merged)}"
        raise UserError(f"TRAIN_FOLDERS: {what}. Add --LABELS path for a label of each, or rename them")
    labels = {label: index for index, label in enumerate(sorted(set(names)))}
    if len(labels) < 2:
        rules = [other for other in LABEL_RULES if other != ("folder" if merged_folders(train) else "path")]
        counts = {other: len(set(labels_of(train, other))) for other in rules}
        others = "".join(f"; --LABELS {other} finds {count} labels" for other, count in counts.items() if count > 1)
        only = f"the only label of its {len(train)} files is {names[0]!r}, but training needs two or more"
        raise UserError(f"TRAIN_FOLDERS: {only}. With LABELS {mode!r} it is {LABEL_RULES[mode]}{others}")
    if mode in ("folder", "path"):
        if count := len(set(zip(names, train.files.folder_indices[train.indices[:, 0]].tolist()))) - len(labels):
            print(f"note: {count} folders have the same label as folders of the same name in another of TRAIN_FOLDERS")
    return np.array([labels[name] for name in names], dtype=np.int64), labels


def labels_table(labels, train_counts, held_out_counts):
    """Returns a table of labels with their numbers of files, and warnings, as lines."""
    shown = [escape_name(label) for label in labels[:SHOWN_LABELS]]
    width = max(map(len, ["label", *shown]))
    lines = [f"{'label':<{width}}  training  evaluation"]
    lines += [f"{label:<{width}}  {n:>8}  {m:>10}" for label, n, m in zip(shown, train_counts, held_out_counts)]
    if len(labels) > SHOWN_LABELS:
        lines.append(f"and {len(labels) - SHOWN_LABELS} more of {len(labels)} labels")
    more = "add to EVAL_FOLDERS, or raise EVAL_SPLIT"
    if single := [label for label, n in zip(labels, train_counts) if n == 1]:
        lines.append(f"warning: a single training file: {first_names(single)}; hidden files (.name) do not count")
    if missing := [label for label, n, m in zip(labels, train_counts, held_out_counts) if n > 1 and not m]:
        lines.append(f"warning: no evaluation file: {first_names(missing)}; {more}")
    if sum(held_out_counts) < FEW_FILES:
        lines.append(f"warning: only {sum(held_out_counts)} evaluation files, so the accuracy is imprecise: {more}")
    distinct = set(labels)  # faster than the list if there are many
    if same := [label for label in labels if label != label.lower() and label.lower() in distinct]:
        lines.append(f"warning: labels that differ from others in case only: {first_names(same)}; rename files")
    return lines
