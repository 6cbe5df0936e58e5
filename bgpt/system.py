"""What all scripts share and needs no PyTorch: errors, whole files, locks, signals, streams, how a script starts and ends."""

import builtins
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # how writing fails when nothing more fits
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; a job system; a terminal that is closed
_CPU_TIMES = "/proc/stat"
_STALE_SECONDS = 3600  # an unfinished file that nobody has written to for so long is nobody's


class UserError(ValueError):
    """Something that the user can put right; its message says what is wrong and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Names and folders
# ---------------------------------------------------------------------------------------------------------------------


def escape_name(name):
    """Returns a name with backslashes and all that is not printable (tabs, newlines, broken UTF-8) as escapes such as \\t."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def unescape_name(text):
    """Returns the name that `escape_name` made a text of."""
    escapes = r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[tnr\\])"
    return re.sub(escapes, lambda match: match[0].encode().decode("unicode_escape"), text)


def check_folders(folders, name):
    """Raises UserError, which names the constant that holds the folders, if one is missing or is a file."""
    for folder in folders:
        if not os.path.isdir(folder):
            what = "is a file" if os.path.exists(folder) else "does not exist"
            raise UserError(f"{name}: {folder!r} {what}; it must be a folder")


def check_checkpoint(path, name):
    """Raises UserError, which names the constant that holds the path, if there is no file at the path of a checkpoint."""
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{name}: {path!r} {what}; it must be a checkpoint (.pth)")


def latest_path(weights_path):
    """Returns where the latest state of a run lies, beside its best: weights.pth -> weights-last.pth."""
    stem, extension = os.path.splitext(weights_path)
    return f"{stem}-last{extension}"


def check_training_paths(settings):
    """Raises UserError if a folder or a file that a trainer begins with is missing.

    Args:
        settings: the constants of config.py, as a dict.
    """
    for name in ("TRAIN_FOLDERS", "EVAL_FOLDERS"):
        check_folders(settings[name], name)
    own = settings["WEIGHTS_PATH"], latest_path(settings["WEIGHTS_PATH"])
    goes_on = settings["LOAD_FROM_CHECKPOINT"] and any(map(os.path.exists, own))
    if settings["LOAD_FROM_PRE_CHECKPOINT"] and not goes_on:
        check_checkpoint(settings["PRE_WEIGHTS_PATH"], "PRE_WEIGHTS_PATH")


def make_folder(folder, name):
    """Makes a folder if it is missing, and checks that files can be written there.

    Raises:
        UserError: names the constant that holds the path, and why it cannot be used.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{name}: cannot write to the folder {folder!r}: {error.strerror}") from None


def check_writable(path, name):
    """Checks that a file can be written at `path`, and makes the folder that it is to lie in; see `make_folder`."""
    make_folder(os.path.dirname(path) or ".", name)
    if os.path.isdir(path):
        raise UserError(f"{name}: {path!r} is a folder; it must be a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{name}: {path!r} is read-only")


# ---------------------------------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------------------------------


def write_whole(path, content):
    """Writes a file beside `path` and moves it there: at any moment the path holds the whole old file or the whole new one.

    It waits until all is on the disk, so that it outlasts a power cut. After an error nothing is left beside it; after a kill,
    what `remove_leftovers` removes.

    Args:
        path: where the file is to be; a link stays one, and what it leads to is replaced.
        content: bytes, or a function that writes them to the open binary file that it is given.

    Raises:
        OSError: names `path`, not the temporary file.
    """
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f"{_prefix(path)}{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)  # the new name itself is on the disk only after its folder is synced
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_small_files(folder, files, temporary):
    """Writes many small files in a folder, each whole or not at all, as `write_whole` does; with few calls of the system.

    Args:
        folder: where they are to be.
        files: iterable of (name, bytes).
        temporary: the name of the file to write first, in the same folder.

    Raises:
        OSError: names the file that could not be written.
    """
    descriptor, name = os.open(folder, os.O_RDONLY), None
    try:
        for name, content in files:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=descriptor)
            try:
                while content:  # the system writes a part of it where no more fits, and says why at the next call
                    content = content[os.write(file, content) :]
            finally:
                os.close(file)
            os.replace(temporary, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=descriptor)
        if isinstance(error, OSError) and name is not None:
            raise OSError(error.errno, error.strerror, os.path.join(folder, name)) from None
        raise
    finally:
        os.close(descriptor)


def _prefix(path):
    """Returns how the names of the files beside `path` begin; of fixed length, since names have a limit."""
    return f".bgpt-{zlib.crc32(os.fsencode(os.path.basename(path))):08x}-"


def remove_leftovers(path):
    """Removes the unfinished files that runs killed in the middle of saving `path` left beside it."""
    path = os.path.realpath(path)
    for name in os.listdir(os.path.dirname(path)):
        if name.startswith(_prefix(path)) and name.endswith(".tmp"):
            os.unlink(os.path.join(os.path.dirname(path), name))


def remove_stale_files(folder):
    """Removes unfinished files below a folder that nobody has written to for an hour: another run may be saving there."""
    for inner, _, names in os.walk(folder):
        for leftover in (os.path.join(inner, name) for name in names if re.fullmatch(r"\.bgpt-[0-9a-f]{8}-.*\.tmp", name)):
            with contextlib.suppress(FileNotFoundError):  # finished at this moment
                if time.time() - os.lstat(leftover).st_mtime > _STALE_SECONDS:
                    os.unlink(leftover)


def keep_backup(path, why="not made by this run"):
    """Keeps the file at `path`, if there is one, as the first free of path.bak, path.bak2, …, and says so, and why."""
    if not os.path.exists(path):
        return
    backup, number = f"{path}.bak", 1
    while os.path.lexists(backup):
        number += 1
        backup = f"{path}.bak{number}"
    print(f"{path} was {why}: kept as {backup}")
    try:
        os.link(os.path.realpath(path), backup)  # not the link, if it is one; the path itself is never without its file
    except OSError:  # a file system without hard links
        with open(path, "rb") as file:
            write_whole(backup, lambda copy: shutil.copyfileobj(file, copy))


@contextlib.contextmanager
def locked(path, name):
    """Keeps other runs away from the file at `path` within the block; its lock file is removed at the end.

    Raises:
        UserError: another run holds the lock; names the constant that holds the path.
    """
    path = os.path.realpath(path)
    lock_path = os.path.join(os.path.dirname(path), f"{_prefix(path)}lock")
    while True:
        lock = open(lock_path, "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which worker processes would hold on to
        except (BlockingIOError, PermissionError):
            raise UserError(f"{name}: another run is at work at {path!r}; wait for its end, or give another path") from None
        except OSError:
            break  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock_path)):
                break
        lock.close()  # the run that held it ended in between, and took the file away: nobody else would find this lock
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock_path)
        lock.close()


# ---------------------------------------------------------------------------------------------------------------------
# Processes and signals
# ---------------------------------------------------------------------------------------------------------------------


def is_first_process():
    """Returns whether this is the only process of a run, or the first of those that torchrun started: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def run_jobs(jobs, num_workers, method="spawn", initializer=None, initargs=(), expendable=False, while_waiting=None):
    """Runs jobs (key, function, *arguments) in worker processes; yields their results in order.

    Jobs of the same key modulo `num_workers` run one after another, in one process. Results come through pipes. At most a few
    jobs for each worker are under way, so that memory stays flat.

    Args:
        jobs: iterable of jobs.
        num_workers: 1 or more.
        method: how processes start, see multiprocessing.get_context.
        initializer, initargs: called in each new process.
        expendable: kill the workers at the end rather than wait for what they are doing.
        while_waiting: called about twice a second while a result is not there yet; it may raise an error.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed.
        Exception: what a job raised.
    """
    context, setup = multiprocessing.get_context(method), (initializer, *initargs)
    # a pool for each worker: where one of several in a pool dies, Python sends the others a signal that they hold back
    pools = [ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=setup) for _ in range(num_workers)]
    others, pending = multiprocessing.active_children(), collections.deque()

    def result():
        while while_waiting is not None and not concurrent.futures.wait([pending[0]], timeout=0.5).done:
            while_waiting()
        return pending.popleft().result()

    try:
        with held_back_signals():
            for pool in pools:
                pool.submit(os.getpid)  # starts its worker
        for key, function, *arguments in jobs:
            pending.append(pools[key % num_workers].submit(function, *arguments))
            while pending and (pending[0].done() or len(pending) > 4 * num_workers):
                yield result()
        while pending:
            yield result()
    finally:
        for worker in multiprocessing.active_children() if expendable else ():
            if worker not in others:
                worker.kill()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _start_worker(initializer, *initargs):
    parent = multiprocessing.parent_process()  # a parent that was killed takes its workers along
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


class StopSignals:
    """The stop signals that came while `delayed_signals` held them back: called, returns the number of the first, 0 if none."""

    def __init__(self, impatient):
        self._received, self._impatient, self._is_waiting = [], impatient, False

    def __call__(self):
        return self._received[0] if self._received else 0

    def remember(self, number, frame):
        """Handles a signal."""
        self._received.append(number)
        if self._is_waiting or (self._impatient and self._received.count(signal.SIGINT) > 1):
            raise KeyboardInterrupt(number)

    @contextlib.contextmanager
    def waiting(self):
        """Lets a signal, also one that came before, end the block by a KeyboardInterrupt: for what may be given up halfway."""
        self._is_waiting = True
        try:
            if self():
                raise KeyboardInterrupt(self())
            yield
        finally:
            self._is_waiting = False


@contextlib.contextmanager
def delayed_signals(impatient):
    """Lets the step in hand finish before one of STOP_SIGNALS takes effect; yields the StopSignals.

    Args:
        impatient: whether a second Ctrl-C acts at once.
    """
    signals = StopSignals(impatient)
    with _handled_by(signals.remember):
        yield signals


@contextlib.contextmanager
def _handled_by(handler, for_good=False):
    """Has a function handle the stop signals within the block, but for those that a shell has ignored: `nohup`, `… &`.

    Args:
        handler: as `signal.signal` takes it.
        for_good: whether it, or what it has set in its place, stays after the block.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: other for number, other in before.items() if other != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, other in before.items() if not for_good else ():
            signal.signal(number, other)


@contextlib.contextmanager
def held_back_signals():
    """Holds back the stop signals until the end of the block; processes that start within it never get them."""
    with delayed_signals(impatient=False) as received:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # is inherited; but here, another thread may take the signal
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if received():
        signal.raise_signal(received())


def signal_name(number):
    """Returns what a stop signal is called in a message."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


# ---------------------------------------------------------------------------------------------------------------------
# Scripts: how they start, speak and end
# ---------------------------------------------------------------------------------------------------------------------


class Unstoppable:
    """A text stream that ends no run: what it would say to a full disk, a closed pipe or a closed terminal is lost."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with _nobody_listens():
            return self._stream.write(text)

    def flush(self):
        with _nobody_listens():
            self._stream.flush()


@contextlib.contextmanager
def _nobody_listens():
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL_DISK, errno.EPIPE, errno.EIO):  # the last is how a terminal that was closed answers
            raise


def progress_options():
    """Returns how tqdm shows progress: as wide as a terminal is; to a file, one line a minute, not ten a second."""
    if _is_notebook():
        return {"ncols": 100, "mininterval": 1}
    if sys.stderr is not None and sys.stderr.isatty():
        return {"dynamic_ncols": True}
    return {"ncols": 120, "mininterval": 60, "maxinterval": 60}


def _is_notebook():
    """Returns whether a script runs within IPython, as by %run: the process was there before it and goes on after it."""
    return hasattr(builtins, "__IPYTHON__")


def start(*checks, unstoppable=("stdout", "stderr")):
    """Answers a script's options and the likeliest mistakes at once; called before the script imports PyTorch.

    From here on, Ctrl-C ends the script without a traceback.

    Args:
        checks: functions of no arguments, called one after another: the first reads the command line, others raise UserError
            for what can be told without PyTorch.
        unstoppable: the streams whose reader may go away, see `Unstoppable`.
    """
    if not _is_notebook():  # whose streams and signals are not the script's
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal can show
            setattr(sys, name, Unstoppable(stream) if name in unstoppable else stream)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, no Python code can catch it everywhere
    with _messages(quiet=not is_first_process()):
        for check in checks:
            check()


def choose_waiting():
    """Has this process's threads wait for each other asleep where other processes keep the CPU busy; called before PyTorch loads.

    The threads of GNU's OpenMP, which PyTorch brings on Linux, spin for milliseconds while they wait: on an idle machine that
    is fastest, but beside a busy process it takes the core from the very thread that the others wait for. How they wait does
    not change what they compute; how many they are would, so that stays. OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment
    decide instead; processes that torchrun started take each other for others, and have one thread each anyway.
    """
    is_told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "WORLD_SIZE"} & set(os.environ) or os.environ.get("OMP_NUM_THREADS") == "1"
    if is_told or "torch" in sys.modules or not os.path.exists(_CPU_TIMES):
        return
    cores, times = os.sched_getaffinity(0), []
    for wait in (0.1, 0):
        with open(_CPU_TIMES) as file:
            times.append(cpu_times(file.read(), cores))
        time.sleep(wait)
    busy, total = (after - before for before, after in zip(*times))
    if busy * len(cores) > 0.5 * total:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        print(f"other processes keep {busy / max(total, 1):.0%} of {len(cores)} CPU cores busy: OMP_WAIT_POLICY is set to passive")


def cpu_times(text, cores):
    """Returns the (busy, whole) time of some cores since the machine started, from the text of Linux's /proc/stat."""
    busy = whole = 0
    for line in text.splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            ticks = list(map(int, ticks[:8]))  # user, nice, system, idle, waiting for a disk, two of interrupts, stolen by a host
            whole += sum(ticks)
            busy += sum(ticks) - ticks[3] - ticks[4]
    return busy, whole


def run(main, hint=""):
    """Runs a script's main function and exits: a user's mistake is one message and status 1, a signal 128 and its number.

    Args:
        main: function of no arguments; what it returns is the exit status.
        hint: what follows "stopped by Ctrl-C".
    """
    with _handled_by(_raise_once, for_good=not _is_notebook()), _messages(hint=hint):
        sys.exit(main())


def _raise_once(number, frame):
    """Handles the first stop signal; a second one does not keep the script from tidying up."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def _messages(hint="", quiet=False):
    try:
        yield
    except (UserError, OSError, KeyboardInterrupt) as error:
        sys.exit(explain(error, hint, quiet))


def explain(error, hint="", quiet=False):
    """Prints an error that the user can understand as one line on stderr; returns the exit status, None for other errors.

    Args:
        hint: what follows "stopped by Ctrl-C".
        quiet: say nothing.
    """
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        message, status = f"stopped by {signal_name(number)}{hint}", 128 + number
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message, status = f"error: {error.filename}: {error.strerror}", 1
    elif isinstance(error, (UserError, OSError)):
        message, status = f"error: {error}", 1
    else:
        return None
    if not quiet:
        print(message, file=sys.stderr, flush=True)
    return status
