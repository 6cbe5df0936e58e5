"""What to train and evaluate on: pairs for a conversion, what is held out, what two sets share."""

import collections
import itertools
import math
import os
import re
import zlib

import numpy as np

from bgpt import files as listing
from bgpt import system
import utils


def split_conversion_mode(mode):
    """Returns (input extension, target extension, whether both directions are meant) of "abc->mid" or "abc&mid"; in lower case."""
    source, sign, target = re.fullmatch(r"([^&>]+?)(->|&)([^&>]+)", mode.lower()).groups()
    return source, target, sign == "&"


def pair_files(files, mode):
    """Returns Examples of (input, target) for the Files of the same folder and stem, in the order that `Examples.of` gives the inputs.

    Extensions are compared without case: tune.abc and tune.MID are a pair. Of tune.mid and tune.MID, the former is the target.
    """
    source, target, _ = split_conversion_mode(mode)
    inputs, spellings = [], set()  # indices of the inputs; how the targets' extensions are spelled
    for index in range(len(files)):
        extension = os.path.splitext(files.encoded(index))[1]
        lower = os.fsdecode(extension[1:]).lower()
        if lower == source:
            inputs.append(index)
        elif lower == target:
            spellings.add(extension)
    pairs = []
    for index in sorted(inputs, key=files.places.__getitem__):
        stem = os.path.splitext(files.encoded(index))[0]
        found = [files.find(stem + extension) for extension in sorted(spellings, reverse=True)]  # lower case first
        pairs += [(index, other) for other in found if other >= 0][:1]
    return utils.Examples(files, np.array(pairs, dtype=np.int64).reshape(-1, 2))


def find_pairs(files, mode, name):
    """Returns the pairs among Files, see `pair_files`, and prints how many files are in none.

    Args:
        name: the constant that holds the files' folders, for messages.

    Raises:
        UserError: there are files, but no pairs.
    """
    pairs = pair_files(files, mode)
    if files and not pairs:
        raise system.UserError(
            f"{name}: CONVERSION_MODE is {mode!r}, but no two files of those extensions share a folder and a stem "
            f"among {len(files)} files ({listing.describe_extensions(files)}){nearest_pairs(files, mode)}"
        )
    unpaired = len(files) - len(np.unique(pairs.indices))
    if unpaired:
        print(f"{name}: {unpaired} of {len(files)} files are in no pair and are left out")
    return pairs


def directed(examples, mode):
    """Returns Examples in the directions of a CONVERSION_MODE, or None: "&" gives each pair both ways."""
    return examples.both_ways() if mode is not None and split_conversion_mode(mode)[2] else examples


def fitting_pairs(pairs, patch_size, patch_length):
    """Returns the pairs that fit in a sequence, and the patches of the longest pair of all (0 if there are none)."""
    lengths = pairs.lengths(patch_size, patch_length)
    return pairs.select(np.flatnonzero(lengths <= patch_length)), int(lengths.max(initial=0))


def nearest_pairs(files, mode):
    """Returns what comes nearest to pairs of a CONVERSION_MODE among files that hold none, as a clause for messages.

    That is another extension in place of one of the mode's, or files of one stem in different folders.
    """
    source, target, both = split_conversion_mode(mode)
    spots = {}  # {stem: [(folder, extension)]} of all files
    for path in files:
        folder, name = os.path.split(path)
        stem, extension = os.path.splitext(name)
        spots.setdefault(stem, []).append((folder, extension[1:].lower()))
    beside, apart, example = collections.Counter(), 0, None  # beside: {(input, target extension): its pairs}
    for stem, found in spots.items():
        for (folder, extension), (other_folder, other) in itertools.permutations(found[:100], 2):
            if folder == other_folder and extension != other and (extension == source or other == target):
                beside[extension, other] += 1
            if (extension, other) == (source, target):
                apart, example = apart + 1, example or (folder, other_folder, stem)
    if beside:
        (extension, other), count = beside.most_common(1)[0]
        return f"; {extension}{'&' if both else '->'}{other} would find {count} pairs"
    if apart:
        folder, other_folder, stem = map(system.escape_name, example)
        return (
            f"; {apart} have the same stem but lie apart, such as {folder}/{stem}.{source} and {other_folder}/{stem}.{target}: put the "
            "two files of a pair into one folder"
        )
    return "; the two files of a pair have one name but for the extension, such as tune." + source + " and tune." + target


def hold_out(count, share, seed, candidates=None, groups=None):
    """Splits `count` examples in two at random: the rest, and `share` of them (at least one).

    Args:
        count: how many examples there are.
        share: EVAL_SPLIT.
        seed: SEED.
        candidates: int64 (m,), the indices of those that may be held out; None = all.
        groups: int64 (m,), the group of each candidate, of which each gives the same share, as nearly as whole examples can;
            None = they are drawn from all alike.

    Returns:
        int64 (rest,) and (held out,), the indices of both, ascending.

    Raises:
        UserError: there are too few.
    """
    if candidates is None:
        candidates = np.arange(count)
    if count > 1 and not len(candidates):
        raise system.UserError(
            "EVAL_FOLDERS holds nothing, and every label has but one file, which stays in training: add files, or EVAL_FOLDERS"
        )
    if count < 2:
        raise system.UserError(f"EVAL_FOLDERS holds nothing, and EVAL_SPLIT cannot hold out a part of {count}: add files")
    num_chosen = min(max(1, round(share * count)), len(candidates), count - 1)
    drawn = np.random.default_rng([seed, zlib.crc32(b"hold out")]).permutation(len(candidates))
    if groups is not None:
        # the k-th of a group's m examples in the order drawn gets the place (k + 1/2) / m: the first places of all are of
        # every group the same share
        groups = groups[drawn]
        by_group = np.argsort(groups, kind="stable")
        sizes = np.bincount(groups)
        ranks = np.empty(len(drawn), np.int64)
        ranks[by_group] = np.arange(len(drawn)) - (np.cumsum(sizes) - sizes)[groups[by_group]]
        drawn = drawn[np.argsort((ranks + 0.5) / sizes[groups], kind="stable")]
    chosen = np.sort(candidates[drawn[:num_chosen]])
    print(f"EVAL_FOLDERS holds none: {num_chosen} of the training examples are held out for evaluation")
    return np.setdiff1d(np.arange(count), chosen), chosen


def hold_out_parts(examples, share, seed, patch_size, longest):
    """Splits Examples in two, the rest and what is held out; a file that is too large to be held out whole gives its end.

    That is a file with more than ten times `share` of all patches (or more than half of them), and of more than 8 times
    `longest`, so that its end is of use; a lone file need only be longer than that. The others are held out whole at
    random, at least one unless another gives its end.

    Args:
        examples: Examples of single files; of pairs with `longest` None.
        share: EVAL_SPLIT.
        seed: SEED.
        patch_size: S.
        longest: PATCH_LENGTH; None = every file is held out whole or not at all.

    Returns:
        the training Examples and the evaluation Examples.

    Raises:
        UserError: there are too few.
    """
    lengths = examples.lengths(patch_size)
    least = math.inf if longest is None else longest if len(examples) == 1 else 8 * longest  # patches of a large file
    is_large = (lengths > min(10 * share, 0.5) * lengths.sum()) & (lengths > least)
    large, others = np.flatnonzero(is_large), np.flatnonzero(~is_large)
    kept, chosen = np.arange(len(examples)), np.array([], dtype=np.int64)
    if not len(large) or round(share * len(others)):
        kept, chosen = hold_out(len(examples), share, seed, others)
    # two patches at least: of the first of a part no window predicts anything
    cuts = lengths - np.clip((share * lengths).round().astype(np.int64), 2, lengths - 2)
    train_parts = {i: (0, int(cuts[index])) for i, index in enumerate(kept.tolist()) if is_large[index]}
    held_out_parts = {len(chosen) + i: (int(cuts[index]), int(lengths[index])) for i, index in enumerate(large.tolist())}
    if len(large):
        names = ", ".join(system.escape_name(os.path.basename(examples[index][0])) for index in large.tolist())
        held_out_bytes = int((lengths - cuts)[large].sum()) * patch_size
        print(f"EVAL_FOLDERS holds none: of {names}, the end is held out for evaluation, {held_out_bytes:,} bytes")
    train = utils.Examples(examples.files, examples.indices[kept], train_parts)
    return train, utils.Examples(examples.files, examples.indices[np.concatenate((chosen, large))], held_out_parts)


def print_long_files(train, held_out, patch_size, patch_length, cuts_windows):
    """Prints how many files of the training and evaluation Examples are longer than PATCH_LENGTH, and what of them is seen.

    Args:
        cuts_windows: whether that is all of them, or in each epoch a crop, and in evaluation the head.
    """
    for name, examples in (("training", train), ("evaluation", held_out)):
        first, last = examples.spans(patch_size).T
        longer = last - first > patch_length
        if not longer.any() or examples.indices.shape[1] == 2:
            continue
        lengths = last - first
        share = f"{lengths.clip(max=patch_length).sum() / lengths.sum():.2%} of all bytes"
        who, how = ("an epoch", "a crop of each") if name == "training" else ("evaluation", "the head of each")
        seen = "all bytes, in windows" if cuts_windows else f"{share}, {how}"
        print(
            f"longer than PATCH_LENGTH ({patch_length} patches of {patch_size} bytes): {longer.sum()} of {len(examples)} {name} "
            f"files; {who} sees {seen}"
        )


def print_overlap(train, held_out):
    """Prints how many evaluation Examples are training Examples too, by their first files."""
    found = np.array([train.files.find(held_out.files.encoded(file)) for file in held_out.indices[:, 0].tolist()])
    shared = int(np.isin(found, train.indices[:, 0]).sum())
    if shared:
        print(f"{shared} evaluation examples are training examples too: their figures say nothing about unseen files")
