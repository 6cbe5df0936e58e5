"""Lists of files: paths and sizes of millions of them, in little memory; needs no PyTorch."""

import array
import bisect
import collections
import errno
import os

import numpy as np

from bgpt import system


SHOWN_FILES = 10  # most files that a message names


def extension_of(path):
    """Returns the extension of a file's name, without the dot; "" if it has none."""
    return os.path.splitext(path)[1][1:]


def describe_extensions(files, most=5):
    """Returns the extensions of files, in lower case, with their counts, for messages; of many, the `most` most frequent."""
    counts = collections.Counter(extension_of(path).lower() for path in files).most_common()
    shown = [f"{count} {system.escape_name('.' + extension) if extension else 'without any'}" for extension, count in counts]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} other extensions" if len(shown) > most else "")


class Files:
    """The paths of files, sorted, and their sizes: a sequence of str that keeps no Python object per file.

    A file takes 20 bytes beside those of its path: 2.1 million files with paths of 61 bytes, 170 MB, and 700 MB while they are
    listed, which takes 10 s.

    Attributes:
        sizes: int64 (n,), bytes in each file when it was listed; -1 where it could not be reached.
        places: int32 (n,), the place of the folder that each was found below in the list of folders.
    """

    def __init__(self, paths, sizes, places=None, folders=(b".",)):
        """Takes paths as bytes, a list in any order; their sizes and places (None: all 0); and the folders, as bytes."""
        order = sorted(range(len(paths)), key=paths.__getitem__)
        self.sizes = np.array(sizes, dtype=np.int64)[order]
        self.places = np.array(np.zeros(len(paths)) if places is None else places, dtype=np.int32)[order]
        self._prefixes = [os.path.join(folder, b"") for folder in folders]
        self._ends = np.cumsum([0] + [len(paths[i]) for i in order])  # int64 (n+1,), where each path ends in the text
        self._text = b"".join([paths[i] for i in order])

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return os.fsdecode(self.encoded(index))

    def encoded(self, index):
        """Returns the path at `index`, 0 to n-1, as the bytes that the file system knows it by."""
        if not 0 <= index < len(self):
            raise IndexError(f"file {index} of {len(self)}")
        return self._text[self._ends[index] : self._ends[index + 1]]

    def identity(self, index):
        """Returns what a file is known by, as bytes: its folder's place, and its path below that folder.

        It stays the same when the folder is named in another way, or moved.
        """
        place = int(self.places[index])
        return b"%d/%s" % (place, self.encoded(index).removeprefix(self._prefixes[place]))

    def locate(self, identity):
        """Returns the path of the file that has an identity, see there, below these folders, whether it exists or not."""
        place, _, path = identity.partition(b"/")
        folder = self._prefixes[int(place)] if int(place) < len(self._prefixes) else b""
        return os.fsdecode(folder + path)

    def select(self, indices):
        """Returns the Files at `indices`, integers."""
        paths = [self.encoded(index) for index in indices]
        return Files(paths, self.sizes[indices], self.places[indices], self._prefixes)

    def find(self, path):
        """Returns the index of a path, given as bytes; -1 if it is none of these."""
        index = bisect.bisect_left(range(len(self)), path, key=self.encoded)
        return index if index < len(self) and self.encoded(index) == path else -1


def list_files(folders, name, extension=None, own=()):
    """Returns all files below the folders, each once, as Files; hidden files and folders are left out.

    Prints how many are left out because they are a run's own, and which folders within cannot be read.

    Args:
        folders: list of paths.
        name: the constant that holds them, for messages.
        extension: only files of this one, in upper or lower case; None = all.
        own: paths of files and folders that runs write or start from. Folders that are asked for are searched all the same.

    Raises:
        UserError: one of the folders is missing, is a file, or cannot be read.
    """
    system.check_folders(folders, name)
    wanted = None if extension is None else extension.lower()
    paths, sizes, places, seen = [], array.array("q"), array.array("i"), set()
    roots = [os.path.normpath(os.fsencode(folder)) for folder in folders]
    waiting, links = [(folder, place) for place, folder in enumerate(roots)], []
    own_ids, found_own, lost = _file_ids(own) - _file_ids(roots), [], {}
    while waiting or links:
        folder, place = (waiting or links).pop()  # links to folders come last: what they lead to keeps its own name
        real = os.path.realpath(folder)
        if real in seen:  # also ends a link that leads round and round
            continue
        seen.add(real)
        if _file_ids([real]) & own_ids:
            found_own.append(os.path.join(folder, b""))
            continue
        try:
            with os.scandir(folder) as found:
                entries = [(entry, *_look_at(entry)) for entry in found if not entry.name.startswith(b".")]
        except OSError as error:
            if folder in roots:
                raise system.UserError(f"{name}: cannot read the folder {os.fsdecode(folder)!r}: {error.strerror}") from None
            lost[os.fsdecode(folder)] = error.strerror
            continue
        for entry, kind, size, file_id in entries:
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append((entry.path, place))
            elif kind == "file" and (wanted is None or extension_of(os.fsdecode(entry.name)).lower() == wanted):
                if file_id in own_ids:
                    found_own.append(entry.path)
                    continue
                paths.append(entry.path)
                sizes.append(size)
                places.append(place)
    if lost:
        why = ", ".join(sorted(set(lost.values())))
        print(f"{name}: {len(lost)} folders cannot be read and are left out ({first_names(lost)}): {why}")
    if found_own:
        names = first_names(map(os.fsdecode, found_own))
        print(f"{name}: {len(found_own)} files and folders that runs themselves write or start from are left out ({names})")
    return Files(paths, sizes, places, roots)


def list_readable_files(folders, name, own=()):
    """Returns what `list_files` does without the files that cannot be read; says which they are, and why.

    Links that lead nowhere are such files, and those that others have deleted in the meantime or do not let this user read.
    """
    files = list_files(folders, name, own=own)
    lost = [index for index in range(len(files)) if not os.access(files.encoded(index), os.R_OK)]
    if not lost:
        return files
    print(f"{name}: {len(lost)} of {len(files)} files cannot be read and are left out:")
    for path in (files[index] for index in lost[:SHOWN_FILES]):
        print(f"  {system.escape_name(path)}: {_why_unreadable(path)}")
    if len(lost) > SHOWN_FILES:
        print(f"  and {len(lost) - SHOWN_FILES} more")
    return files.select(np.setdiff1d(np.arange(len(files)), lost))


def first_names(paths):
    """Returns the first of some paths, in their order, for a message, and how many more there are."""
    paths = sorted(paths)
    shown = ", ".join(map(system.escape_name, paths[:SHOWN_FILES]))
    return f"{shown} and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else shown


def _look_at(entry):
    """Returns (what an os.DirEntry is: "folder", "file" or "other", such as a pipe; the bytes in a file; its id, see `_file_ids`).

    A link that leads nowhere, round and round, or where this user may not go counts as a file, of -1 bytes and no id, and so
    does a file that has gone in the meantime: reading it says what it is.

    Raises:
        OSError: this user may not reach what is in the folder.
    """
    try:
        if entry.is_dir():
            return "folder", 0, None
        if not (entry.is_file() or entry.is_symlink()):
            return "other", 0, None
        found = entry.stat()
    except OSError as error:
        if entry.is_symlink() or error.errno == errno.ENOENT:
            return "file", -1, None
        raise
    return "file", found.st_size, (found.st_dev, found.st_ino)


def _why_unreadable(path):
    """Returns why a file cannot be read, in a few words."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            return "a link that leads nowhere" if os.path.islink(path) else "gone"
    return "no permission to read it"


def _file_ids(paths):
    """Returns the set of the ids, (device, inode), of those files and folders that exist."""
    found = [os.stat(path) for path in paths if os.path.exists(path)]
    return {(each.st_dev, each.st_ino) for each in found}
