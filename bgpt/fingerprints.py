"""What a run's files are known by in its checkpoint, and which of them differ when it goes on."""

import hashlib
import math
import zlib

import numpy as np
import torch

from bgpt import files as listing


class Fingerprints:
    """What the files of a run are known by: their paths below the folder, their sizes, and which parts of them are taken.

    Args:
        train, held_out: Examples to train and to evaluate on.
        with_names: whether to keep the names too; only the process that writes checkpoints needs them.
    """

    def __init__(self, train, held_out, with_names):
        self.examples = {"TRAIN_FOLDERS": train, "EVAL_FOLDERS": held_out}
        self.hashes = {name: torch.from_numpy(each.hashes()) for name, each in self.examples.items()}
        self.parts = {name: [[i, *part] for i, part in sorted(each.parts.items())] for name, each in self.examples.items()}
        self.names = {name: torch.from_numpy(pack_names(each)) for name, each in self.examples.items() if with_names}

    def to_checkpoint(self):
        """Returns the keys of a checkpoint that hold them, see checkpoint.py."""
        return {"data": self.hashes, "parts": self.parts, "names": self.names}

    def digests(self):
        """Returns a SHA-256 in hex of the hashes of each set, by which processes compare what files they see."""
        return [hashlib.sha256(hashes.numpy().tobytes()).hexdigest() for hashes in self.hashes.values()]

    def differences(self, found):
        """Returns {constant: how its files differ from those of a checkpoint, as a clause for messages}.

        Args:
            found: the checkpoint, a dict; published ones know no files, and differ in none.
        """
        data, parts, all_names = (found.get(key) or {} for key in ("data", "parts", "names"))
        differences = {}
        for name, known in data.items():
            examples, hashes = self.examples[name], self.hashes[name]
            is_older = isinstance(known, str)  # of a version that knew files by their whole paths
            is_same = known == path_fingerprint(examples) if is_older else torch.equal(known, hashes)
            if is_same and parts.get(name, []) != self.parts[name]:
                differences[name] = "; other parts of long files are taken"
            elif not is_same:
                names = unpack_names(all_names[name].numpy()) if name in all_names else None
                differences[name] = "" if is_older else describe_difference(examples, hashes.numpy(), known.numpy(), names)
        return differences

    def count_leaks(self, found):
        """Returns how many of the examples held out now the run of a checkpoint has trained on; None = it does not tell."""
        known = (found.get("data") or {}).get("TRAIN_FOLDERS")
        if isinstance(known, str):
            return None
        examples, whole, num_seen = self.examples["EVAL_FOLDERS"], (0, math.inf), 0
        trained = {identity: row for row, identity in enumerate(known[:, 0].tolist())}
        parts = {row: part for row, *part in (found.get("parts") or {}).get("TRAIN_FOLDERS", [])}  # pairs have none
        identities = self.hashes["EVAL_FOLDERS"][:, 0].reshape(examples.indices.shape)  # (files,) -> (n, 1) or (n, 2)
        for index, files in enumerate(identities.tolist()):
            start, stop = examples.parts.get(index, whole)
            takes = [parts.get(trained[identity], whole) for identity in files if identity in trained]
            num_seen += any(max(first, start) < min(last, stop) for first, last in takes)
        return num_seen


def path_fingerprint(examples):
    """Returns a hex digest of the Examples' whole paths and sizes, by which older checkpoints know them.

    Their order was that of the paths, whatever the places of the folders.
    """
    indices, sizes = examples.indices, examples.files.sizes
    both_ways = len(indices) > 1 and np.array_equal(indices[::2], indices[1::2, ::-1])  # pair by pair, see `both_ways`
    keys = np.repeat(indices[::2, 0], 2) if both_ways else indices[:, 0]
    indices = indices[np.argsort(keys, kind="stable")]
    digest = hashlib.sha256(sizes[indices].tobytes())
    for part in np.array_split(indices.reshape(-1), len(indices) // 65536 + 1):
        digest.update(b"".join([examples.files.encoded(file) + b"\0" for file in part.tolist()]))
    return digest.hexdigest()


def pack_names(examples):
    """Returns uint8 (bytes,), compressed: what the files of Examples are known by, in the order of `Examples.hashes`."""
    packer, packed = zlib.compressobj(), bytearray()
    for file in examples.indices.reshape(-1).tolist():
        packed += packer.compress(examples.files.identity(file) + b"\0")
    return np.frombuffer(packed + packer.flush(), dtype=np.uint8).copy()


def unpack_names(packed):
    """Returns the list of bytes that `pack_names` packed."""
    return zlib.decompress(packed.tobytes()).split(b"\0")[:-1]


def describe_difference(examples, hashes, known, names):
    """Returns which files were added, are gone or have changed in size, as a clause for messages; "" if none.

    Args:
        examples: the Examples now.
        hashes: their `Examples.hashes`.
        known: those of the examples before.
        names: what `pack_names` packed of the examples before; None = unknown, as of older checkpoints.
    """
    files = examples.indices.reshape(-1)
    gone, where = np.unique(known[:, 0], return_index=True)  # a pair in both directions has each file twice
    is_gone = ~np.isin(gone, hashes[:, 0])
    lost = [None if names is None else examples.files.locate(names[i]) for i in where[is_gone].tolist()]
    known = known[np.argsort(known[:, 0])]
    nearest = known[np.searchsorted(known[:, 0], hashes[:, 0]).clip(max=len(known) - 1)]  # int64 (files, 2)
    is_known = nearest[:, 0] == hashes[:, 0]
    found = {"added": ~is_known, "of another size": is_known & (nearest[:, 1] != hashes[:, 1])}
    found = {what: [examples.files[file] for file in np.unique(files[chosen]).tolist()] for what, chosen in found.items()}
    clauses = [f"{len(paths)} {what} ({listing.first_names(paths)})" for what, paths in found.items() if paths]
    if lost:
        clauses.append(f"{len(lost)} gone ({'an older checkpoint keeps no names' if names is None else listing.first_names(lost)})")
    return "; " + ", ".join(clauses) if clauses else ""
