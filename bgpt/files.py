"""Lists of files: paths, sizes, and names that stay the same when a folder moves. No PyTorch here."""

import collections
import dataclasses
import os

import numpy as np

from bgpt.system import UserError, check_folders, escape_name, first_names


def extension_of(path):
    """Returns the extension of a file's name without the dot, or "" if it has none."""
    return os.path.splitext(path)[1][1:]


def describe_extensions(files, most=5):
    """Returns the most frequent extensions of files in lower case, with their counts, for messages."""
    counts = collections.Counter(extension_of(path).lower() for path in files).most_common()
    shown = [f"{count} {escape_name('.' + extension) if extension else 'without any'}" for extension, count in counts]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} other extensions" if len(shown) > most else "")


@dataclasses.dataclass
class Files:
    """A sequence of paths, sorted by folder as listed, then by path."""

    paths: list  # of str
    sizes: np.ndarray  # int64 (n,), bytes; -1 if unreachable
    places: np.ndarray  # int64 (n,), the index of each file's folder in `folders`
    folders: list  # of str

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.paths[index]

    def below(self, index):
        """Returns a file's path below its folder."""
        return self.paths[index].removeprefix(os.path.join(self.folders[self.places[index]], ""))

    def name(self, index):
        """Returns the index of a file's folder and its path below it: it stays the same when the folder moves."""
        return f"{self.places[index]}/{self.below(index)}"

    def select(self, indices):
        """Returns the Files at `indices`, integers."""
        return Files([self.paths[index] for index in indices], self.sizes[indices], self.places[indices], self.folders)


def list_files(folders, name, extension=None, own=()):
    """Returns all files below the folders as Files, each once, without hidden files and folders; prints those left out.

    `extension` is the only one to list, in upper or lower case. None = all. `own` are files and folders that runs write, to be
    left out unless they are in `folders`. Raises UserError with the constant `name` if a folder is missing, a file or unreadable.
    """
    check_folders(folders, name)
    roots = [os.path.normpath(folder) for folder in folders]
    own = {os.path.realpath(path) for path in own} - {os.path.realpath(root) for root in roots}
    found, seen, left_out, unreadable = [], set(), [], []
    stack, links = [(root, place) for place, root in enumerate(roots)], []
    while stack or links:
        folder, place = (stack or links).pop()  # symlinks last: their targets are known by their own names
        real = os.path.realpath(folder)
        if real in seen:  # also ends a loop of symlinks
            continue
        seen.add(real)
        if real in own:
            left_out.append(os.path.join(folder, ""))
            continue
        try:
            with os.scandir(folder) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            if folder in roots:
                raise UserError(f"{name}: cannot read the folder {folder!r}: {error.strerror}") from None
            unreadable.append(folder)
            continue
        for entry in entries:
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else stack).append((entry.path, place))
                    continue
                if not entry.is_file() and not entry.is_symlink():  # a pipe, for example
                    continue
                size = entry.stat().st_size
            except OSError:
                size = -1  # a symlink without a target, for example
            if extension is not None and extension_of(entry.name).lower() != extension.lower():
                continue
            if own and os.path.join(real, entry.name) in own:
                left_out.append(entry.path)
            else:
                found.append((place, entry.path, size))
    if unreadable:
        print(f"{name}: {len(unreadable)} folders are unreadable and left out ({first_names(sorted(unreadable))})")
    if left_out:
        print(f"{name}: {len(left_out)} files and folders of runs are left out ({first_names(sorted(left_out))})")
    places, paths, sizes = zip(*sorted(found)) if found else ((), (), ())
    return Files(list(paths), np.array(sizes, dtype=np.int64), np.array(places, dtype=np.int64), roots)


def list_readable_files(folders, name, own=()):
    """Returns the readable files of `list_files`, and prints which are not: symlinks without a target, no permission."""
    files = list_files(folders, name, own=own)
    is_lost = [size < 0 or not os.access(path, os.R_OK) for path, size in zip(files, files.sizes.tolist())]
    if not any(is_lost):
        return files
    lost = np.flatnonzero(is_lost)
    print(f"{name}: {len(lost)} of {len(files)} files are unreadable and left out ({first_names(map(files.__getitem__, lost))})")
    return files.select(np.flatnonzero(~np.array(is_lost)))
