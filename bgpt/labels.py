"""Labels of files for classification: what they are, and what in a folder suggests that others are meant."""

import collections
import os
import re

import numpy as np

from bgpt import files as listing
from bgpt import system

SHOWN_LABELS = 20  # most lines of the table of labels
SHOWN_NAMES = 5  # most names in a warning
FEW_FILES = 100  # fewer evaluation files than this make an accuracy coarse


def label_of(path, mode="name"):
    """Returns the label of a file for classification.

    Args:
        path: the file.
        mode: as LABELS in config.py. Of news/Business_a_1.txt the label is, by "name", "Business.txt" (paper, 3.3): its name up
            to the first "_", without one its stem, and its extension; by "prefix" "Business_a.txt": up to the last "_"; by
            "folder" "news": the folder that it lies in.
    """
    if mode == "folder":
        return os.path.basename(os.path.dirname(os.path.abspath(path)))
    stem, extension = os.path.splitext(os.path.basename(path))
    return (stem.split("_")[0] if mode == "name" else stem.rpartition("_")[0] or stem) + extension


def table(labels, train_counts, held_out_counts):
    """Returns the lines of a table of labels with their files.

    Args:
        labels: list of str.
        train_counts, held_out_counts: int (labels,), the training and evaluation files of each.
    """
    shown = [system.escape_name(label) for label in labels[:SHOWN_LABELS]]
    width = max(map(len, ["label", *shown]))
    lines = [f"{'label':<{width}}  training  evaluation"]
    lines += [f"{label:<{width}}  {n:>8}  {m:>10}" for label, n, m in zip(shown, train_counts, held_out_counts)]
    if len(labels) > SHOWN_LABELS:
        lines.append(f"and {len(labels) - SHOWN_LABELS} more of {len(labels)} labels")
    return lines


def warnings(paths, truth, labels, held_out_counts, mode):
    """Returns what looks wrong with the labels of training files, a line each that says what to do about it.

    Args:
        paths: an iterable of their paths.
        truth: int64 (n,), the indices of their labels.
        labels: list of str.
        held_out_counts: int (labels,), the evaluation files of each label.
        mode: LABELS.
    """
    counts = np.bincount(truth, minlength=len(labels))
    extensions = collections.Counter()  # of the training files
    first_files = {}  # {label: its first file}
    folders = {}  # {folder that files lie in: its number}
    numbers = np.empty(len(truth), np.int64)  # the number of each file's folder
    prefixes = {}  # {label by "name": {label by "prefix": an example}}, of names such as new_york_1.txt
    for index, (path, label) in enumerate(zip(paths, truth.tolist())):
        extensions[listing.extension_of(path)] += 1
        first_files.setdefault(label, path)
        numbers[index] = folders.setdefault(os.path.dirname(path), len(folders))
        if mode == "name" and re.search(r"_.*[^\d_].*_\d+$", os.path.splitext(os.path.basename(path))[0]):
            prefixes.setdefault(labels[label], {}).setdefault(label_of(path, "prefix"), path)
    single = {labels[label]: first_files[label] for label in np.flatnonzero(counts == 1).tolist()}
    stray = [label for label, path in single.items() if mode != "folder" and extensions[listing.extension_of(path)] == 1]
    # where files are only numbered in folders named after their label, a label by name occurs once in each folder
    num_pairs = len(np.unique(truth * len(folders) + numbers))  # of a label and a folder
    return [
        *_warn_of_single_files(list(single), stray, len(labels)),
        *_warn_of_spellings(labels),
        *_warn_of_prefixes(prefixes),
        *_warn_of_many_labels(len(labels), len(truth), folders, num_pairs, mode),
        *_warn_of_few_evaluation_files(labels, counts, held_out_counts),
    ]


def _warn_of_single_files(single, stray, num_labels):
    """Yields lines on the labels of one training file; `stray` are those that have an extension of their own, too."""
    if num_labels - len(stray) < 2:
        stray = []  # then nothing is left that they could be strays among
    if stray:
        yield (
            f"{_named(stray)}: the only file of its extension, and a label of its own. What is no data belongs out of "
            "TRAIN_FOLDERS, or gets a leading dot, which hides it"
        )
    if rest := [label for label in single if label not in stray]:
        yield f"{_named(rest)}: a label with one training file, too few to learn from or to evaluate; add files, or take it out"


def _warn_of_spellings(labels):
    same = {}  # {label in lower case: its spellings}
    for label in labels:
        same.setdefault(label.lower(), []).append(label)
    for spellings in [each for each in same.values() if len(each) > 1][:SHOWN_NAMES]:
        yield f"{_named(spellings)}: labels that differ in case only; rename the files (or folders) if they are one"


def _warn_of_prefixes(prefixes):
    """Yields a line for each label by "name" that holds several by "prefix": {the one: {the other: an example}}."""
    for label in [label for label, found in prefixes.items() if len(found) > 1][:SHOWN_NAMES]:
        names = [os.path.basename(path) for path in prefixes[label].values()]
        yield (
            f"{system.escape_name(label)} is the label of {_named(names, 'and')}, since LABELS 'name' ends at the first '_'; "
            "--LABELS prefix ends at the last"
        )


def _warn_of_many_labels(num_labels, num_files, folders, num_pairs, mode):
    """Yields a line if the folders, or nothing, seem to be the labels; `num_pairs` are those of a label and a folder."""
    if mode != "folder" and 1 < len(folders) < num_labels and num_pairs > num_files / 2:
        names = sorted(os.path.basename(folder) for folder in folders)
        yield (
            f"{num_labels} labels for {num_files} files, which lie in {len(folders)} folders ({_named(names)}): if the folders are "
            "the labels, give --LABELS folder"
        )
    elif num_labels > num_files / 2:
        yield f"{num_labels} labels for {num_files} files: {described(mode)}"


def _warn_of_few_evaluation_files(labels, counts, held_out_counts):
    total = int(held_out_counts.sum())
    if total < FEW_FILES:
        yield (
            f"only {total} evaluation files: each is {100 / total:.1f} % of the accuracy, by which the best epoch is chosen; add to "
            "EVAL_FOLDERS, or raise EVAL_SPLIT where that is empty"
        )
    if missing := [labels[label] for label in np.flatnonzero((held_out_counts == 0) & (counts > 1)).tolist()]:
        yield (
            f"{_named(missing)}: no evaluation file, so nothing tells how well it is learned; "
            "add to EVAL_FOLDERS, or raise EVAL_SPLIT where that is empty"
        )


def described(mode):
    """Returns what the label of a file is, as a clause for messages."""
    return {
        "name": "the label of a file is its name up to the first '_', and its extension: Business_1.txt is Business.txt",
        "prefix": "the label of a file is its name up to the last '_', and its extension: new_york_1.txt is new_york.txt",
        "folder": "the label of a file is the folder that it lies in: Business/1.txt is Business",
    }[mode]


def other_modes(files, mode):
    """Returns how many labels the other modes would find in files, as a clause for messages; "" if none finds two."""
    found = {other: len({label_of(path, other) for path in files}) for other in ("name", "prefix", "folder") if other != mode}
    clauses = [f"--LABELS {other} finds {count} labels" for other, count in found.items() if count > 1]
    return "".join(f"; {clause}" for clause in clauses)


def _named(names, last=""):
    """Returns names in one line, the first few of many; `last` stands before the last of few."""
    shown = [system.escape_name(name) for name in names[:SHOWN_NAMES]]
    if len(names) > SHOWN_NAMES:
        return f"{', '.join(shown)} and {len(names) - SHOWN_NAMES} more"
    return f" {last} ".join(shown) if last else ", ".join(shown)
