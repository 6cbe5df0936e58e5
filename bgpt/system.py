"""Errors, atomic writes, locks, signals, and the start and end of scripts. No PyTorch here."""

import builtins
import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import sys
import tempfile

import filelock

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # errors of a write to a full disk or quota
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # errors of fsync on a file system without it
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a job system, a closed terminal
SHOWN_NAMES = 10  # most names in a message


class UserError(ValueError):
    """A mistake that the user can correct. The message names the constant or file, the problem and the remedy."""


# ---- Names and folders ----------------------------------------------------------------------------------------------


def escape_name(name):
    """Returns a name with backslashes, tabs, newlines, broken UTF-8 and the like as escapes like \\t."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def unescape_name(text):
    """Reverts `escape_name`."""
    escapes = r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[tnr\\])"
    return re.sub(escapes, lambda match: match[0].encode().decode("unicode_escape"), text)


def first_names(names, most=SHOWN_NAMES):
    """Returns the first names of a sequence and the number of others, for a message."""
    names = list(names)
    shown = ", ".join(map(escape_name, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def check_folders(folders, name):
    """Raises UserError if a folder of the constant `name` is missing or a file."""
    for folder in folders:
        if not os.path.isdir(folder):
            problem = "is a file" if os.path.exists(folder) else "does not exist"
            raise UserError(f"{name}: {folder!r} {problem}; it must be a folder")


def check_checkpoint(path, name):
    """Raises UserError if the path of the constant `name` is not a file."""
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{name}: {path!r} {problem}; it must be a checkpoint (.pth)")


def make_folder(folder, name):
    """Makes the folder of the constant `name` if it is missing. Raises UserError if files cannot be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{name}: cannot write to the folder {folder!r}: {error.strerror}") from None


def check_writable(path, name):
    """Makes the folder of a file if it is missing. Raises UserError if the file cannot be written."""
    make_folder(os.path.dirname(path) or ".", name)
    # a rename would replace a device with a file
    if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
        kind = "a folder" if os.path.isdir(path) else "read-only or a device"
        raise UserError(f"{name}: {path!r} is {kind}; it must be a file that can be replaced")


# ---- Whole files ----------------------------------------------------------------------------------------------------


def hidden(path, ending):
    """Returns a hidden path next to a file or a symlink's target, .weights.pth.tmp for weights.pth."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.{ending}")


def write_whole(path, content):
    """Writes a file atomically, as a temporary file that is renamed.

    Calls fsync before the rename. Of a symlink, the target is replaced. A replaced file keeps its mode and group, and its owner
    if root replaces it. The caller must have locked the file or its folder, since the temporary name is fixed, so that a killed
    run's temporary file is overwritten by the next run's.

    Args:
        path: the file, also the filename of every OSError.
        content: bytes, or a function that writes them to an open binary file.
    """
    path, temporary = os.path.realpath(path), hidden(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # no old file, no modes here, or a group without this user
                before = os.stat(path)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))  # before the content, which may be private
                os.fchown(file.fileno(), before.st_uid if os.geteuid() == 0 else -1, before.st_gid)
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise
    with contextlib.suppress(OSError):  # syncs the rename, unless the file system cannot open or sync a folder
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def keep_backup(path, content=None):
    """Keeps a file under the first free of path.bak, path.bak2, … and returns that path.

    Returns None if there is no file, or if it equals `content` (bytes).
    """
    if not os.path.exists(path):
        return None
    if content is not None and os.path.getsize(path) == len(content):
        with open(path, "rb") as file:
            if file.read() == content:
                return None
    backup, number = f"{path}.bak", 1
    while os.path.lexists(backup):
        number += 1
        backup = f"{path}.bak{number}"
    try:
        os.link(os.path.realpath(path), backup)  # of a symlink's target, and not a move, so that `path` always exists
    except OSError:  # a file system without hard links
        shutil.copy2(path, backup)
    return backup


def print_backups(backups, why="not made by this run"):
    """Prints paths from `keep_backup`."""
    if backups := list(filter(None, backups)):
        print(f"{why}: kept as {first_names(backups)}")


def write_results(contents):
    """Writes files, {path: bytes}, see `write_whole`. Existing files of other content get backups."""
    print_backups([keep_backup(path, content) for path, content in contents.items()])
    for path, content in contents.items():
        write_whole(path, content)


@contextlib.contextmanager
def lock(path, name):
    """Locks a file or folder against other runs. Raises UserError with the constant `name` if another run has locked it."""
    lock_path = hidden(path, "lock")
    try:
        with filelock.FileLock(lock_path, timeout=0):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock_path)
    except filelock.Timeout:
        raise UserError(f"{name}: another run is using {str(path)!r}; wait for its end, or give another path") from None


# ---- Signals --------------------------------------------------------------------------------------------------------


class StopSignals:
    """The stop signals received so far.

    Args:
        impatient: whether a second Ctrl-C takes effect at once.
    """

    def __init__(self, impatient):
        self._impatient, self.first = impatient, 0  # first: its number, or 0

    def receive(self, number, frame):
        """Handles a signal."""
        if self._impatient and self.first == number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.first = self.first or number

    def check(self):
        """Raises KeyboardInterrupt if a signal has been received."""
        if self.first:
            raise KeyboardInterrupt(self.first)


@contextlib.contextmanager
def delayed_signals(impatient):
    """Delays stop signals until the current step has finished. Yields the StopSignals."""
    signals = StopSignals(impatient)
    with _handled_by(signals.receive):
        yield signals


@contextlib.contextmanager
def _handled_by(handler, restores=True):
    """Sets a handler of the stop signals, except of those that a shell ignores (nohup)."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: each for number, each in before.items() if each != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, each in before.items() if restores else ():
            signal.signal(number, each)


def signal_name(number):
    """Returns a stop signal's name for a message."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


# ---- Scripts --------------------------------------------------------------------------------------------------------


def torchrun_rank():
    """Returns (rank, number of ranks). It is (0, 1) without torchrun, whatever a job system sets."""
    if not all(map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def progress_options():
    """Returns tqdm's options: the terminal's width, or in a file one line a minute."""
    if _is_notebook():
        return {"ncols": 100, "mininterval": 1}
    if sys.stderr is not None and sys.stderr.isatty():
        return {"dynamic_ncols": True}
    return {"ncols": 120, "mininterval": 60, "maxinterval": 60}


def _is_notebook():
    return hasattr(builtins, "__IPYTHON__")  # under %run, where streams and signals are not the script's


def start(*checks):
    """Runs a script's checks before its slow import of PyTorch.

    From here to `run`, Ctrl-C ends the script without a traceback.
    """
    if not _is_notebook():
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # file names may contain bytes that no terminal can show
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if a shell ignores it, after `&`
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    with user_errors():
        for check in checks:
            check()


def run(main):
    """Runs a script's main function and exits with its status, or as `user_errors` does."""

    def stop(number, frame):
        for each in STOP_SIGNALS:  # a second signal does not interrupt the cleanup
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    with _handled_by(stop, restores=_is_notebook()), user_errors():
        sys.exit(main())


@contextlib.contextmanager
def user_errors():
    """Turns errors into one line on stderr. Exits with 1 for UserError and OSError, 128 + number for stop signals."""
    try:
        yield
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes again at exit and fails
        sys.exit(1)
    except (UserError, OSError, KeyboardInterrupt) as error:
        (rank, _), status, message = torchrun_rank(), 1, f"error: {error}"
        if isinstance(error, KeyboardInterrupt):
            number = error.args[0] if error.args else signal.SIGINT
            message, status = f"stopped by {signal_name(number)}", 128 + number
        elif isinstance(error, OSError) and error.filename and error.strerror:
            message = f"error: {escape_name(os.fsdecode(error.filename))}: {error.strerror}"
        print(f"process {rank}: {message}" if rank else message, file=sys.stderr, flush=True)
        sys.exit(status)
