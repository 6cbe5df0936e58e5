"""Lists of files: paths, sizes, and names relative to their folders. No PyTorch here."""

import collections
import dataclasses
import os

import numpy as np

from bgpt.system import UserError, escape_name, first_names


def extension_of(path):
    """Returns a file name's extension without the dot, "" if it has none."""
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
    sizes: np.ndarray  # int64 (n,), bytes, -1 if unreachable
    folder_indices: np.ndarray  # int64 (n,), each file's folder in `folders`
    folders: list  # of str

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.paths[index]

    def below(self, index):
        """Returns a file's path below its folder."""
        return self.paths[index].removeprefix(os.path.join(self.folders[self.folder_indices[index]], ""))

    def name(self, index):
        """Returns a file's folder index and path below it, which do not change when the folder moves."""
        return f"{self.folder_indices[index]}/{self.below(index)}"


def list_files(folders, name, extension=None, own=()):
    """Returns all files below the folders as Files, each path once, and prints those left out.

    Hidden ones are skipped. `extension` selects one, in upper or lower case, None = all. `own` are paths that runs write, left
    out unless they are in `folders`. Raises UserError with the constant `name` if a folder is missing, a file or unreadable.
    """
    roots = [os.path.normpath(folder) for folder in folders]
    own = {os.path.realpath(path) for path in own} - {os.path.realpath(root) for root in roots}
    files, seen, left_out, unreadable = [], set(), [], []
    stack, links = [(root, index) for index, root in enumerate(roots)], []
    while stack or links:
        folder, index = (stack or links).pop()  # symlinks last, so that files are listed by their real paths
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
                    (links if entry.is_symlink() else stack).append((entry.path, index))
                    continue
                if not entry.is_file() and not entry.is_symlink():  # a pipe, for example
                    continue
                size = entry.stat().st_size
            except OSError:
                size = -1  # a dangling symlink, for example
            if extension is not None and extension_of(entry.name).lower() != extension.lower():
                continue
            if own and os.path.join(real, entry.name) in own:
                left_out.append(entry.path)
            else:
                files.append((index, entry.path, size))
    if unreadable:
        print(f"{name}: {len(unreadable)} folders are unreadable and left out ({first_names(sorted(unreadable))})")
    if left_out:
        print(f"{name}: {len(left_out)} files and folders of runs are left out ({first_names(sorted(left_out))})")
    indices, paths, sizes = zip(*sorted(files)) if files else ((), (), ())
    return Files(list(paths), np.array(sizes, dtype=np.int64), np.array(indices, dtype=np.int64), roots)


def list_readable_files(folders, name, own=()):
    """Returns the readable files of `list_files` and prints the others, dangling symlinks for example."""
    files = list_files(folders, name, own=own)
    is_unreadable = [size < 0 or not os.access(path, os.R_OK) for path, size in zip(files, files.sizes.tolist())]
    if not any(is_unreadable):
        return files
    names = first_names(files[index] for index in np.flatnonzero(is_unreadable))
    print(f"{name}: {sum(is_unreadable)} of {len(files)} files are unreadable and left out ({names})")
    kept = np.flatnonzero(~np.array(is_unreadable))
    return Files([files[index] for index in kept], files.sizes[kept], files.folder_indices[kept], files.folders)
