"""Files longer than the context as windows: what each reads, and what the model predicts of it.

A file of more than L = PATCH_LENGTH patches is read in windows of at most L patches. Every patch but the first is predicted
once; what a window holds before those that it predicts is context alone. With L = 8, for a file of 19 patches:

    evaluation: windows advance by half                 training: by all but a patch, from a start drawn anew each epoch

    . = = = = = = =                                     . = = =
            . . . . = = = =                                   . = = = = = = =
                    . . . . = = = =                                         . = = = = = = =
                            . . . . = = =                                                 . =
"""

import zlib

import numpy as np

import utils

ADVANCE = 0.5  # in evaluation, windows advance by this share of PATCH_LENGTH: the rest of each is context


def evaluation_windows(examples, patch_size, patch_length):
    """Returns the Windows to evaluate Examples by: all but the first of an example have a context of half of `patch_length`."""
    return Windows(examples, patch_size, patch_length, evaluation_advance(patch_length))


def evaluation_advance(patch_length):
    """Returns the patches by which windows of `patch_length` advance in evaluation."""
    return max(int(patch_length * ADVANCE), 1)


def training_windows(examples, patch_size, patch_length, seeds):
    """Returns the Windows to train on Examples for an epoch; where those of longer files begin is drawn from `seeds`.

    Args:
        seeds: list of whole numbers such as [seed, epoch].
    """
    rng = np.random.default_rng([*seeds, zlib.crc32(b"windows")])
    return Windows(examples, patch_size, patch_length, patch_length - 1, rng)


def count_training_windows(examples, patch_size, patch_length, seeds):
    """Returns how many windows `training_windows` makes of Examples with each of several seeds: a list.

    Of the files that fit in one window nothing is made anew each time, and there may be millions.
    """
    first, last = examples.spans(patch_size).T
    longer = examples.select(np.flatnonzero(last - first > patch_length))
    num_others = len(examples) - len(longer)
    return [num_others + len(training_windows(longer, patch_size, patch_length, each)) for each in seeds]


class Windows:
    """Examples as windows: a data set for `utils.batches`. Of a pair, the target's content is predicted.

    Windows are numbered, example by example. A window is (first patch, the one after the last, first predicted patch), by
    their places in the example's whole sequence. The memory is that of the examples, however many windows they have.

    Args:
        examples: Examples; pairs must fit in `patch_length`.
        patch_size: S.
        patch_length: L.
        advance: patches by which a window advances, from 1 to L - 1.
        rng: numpy Generator that draws where the first window of a longer file ends; None = it is as long as can be.

    Attributes:
        sizes: int64 (n,), bytes of each file that is predicted.
        totals: int64 (n,), patches of each whole sequence.
        given: int64 (n,), the first patch of each that is predicted: of a pair, that after the target's extension patch.
    """

    def __init__(self, examples, patch_size, patch_length, advance, rng=None):
        self.examples, self.patch_size, self.patch_length, self.advance = examples, patch_size, patch_length, advance
        self.sizes = examples.files.sizes[examples.indices[:, -1]].clip(min=0)
        spans = examples.spans(patch_size)
        self._starts, self.totals = spans[:, 0], spans[:, 1]
        whole = utils.count_patches(self.sizes, patch_size)
        self.given = self._starts + 1 if examples.indices.shape[1] == 1 else self.totals - whole + 1
        self._first_ends = np.minimum(self._starts + patch_length, self.totals)  # int64 (n,), the ends of the first windows
        if rng is not None:
            longer = np.flatnonzero(self.totals - self._starts > patch_length)
            self._first_ends[longer] = self._starts[longer] + 1 + rng.integers(1, patch_length, len(longer))
        counts = 1 - (self._first_ends - self.totals) // advance  # rounded up
        self._numbers = np.concatenate(([0], counts.cumsum()))  # int64 (n + 1,), the number of each example's first window

    def __len__(self):
        return int(self._numbers[-1])

    def bounds(self, numbers):
        """Returns (example, first, last, predicted), int64 (m,) each, of the windows of these numbers, an integer array."""
        example = np.searchsorted(self._numbers, numbers, side="right") - 1
        nth = numbers - self._numbers[example]
        last = np.minimum(self._first_ends[example] + nth * self.advance, self.totals[example])
        before = self._first_ends[example] + (nth - 1) * self.advance  # where the window before ends, if there is one
        first = np.where(nth == 0, self._starts[example], before - (self.patch_length - self.advance))
        return example, first, last, np.where(nth == 0, self.given[example], before)

    def lengths(self, numbers):
        """Returns the patches of the windows of these numbers, int64 (m,)."""
        _, first, last, _ = self.bounds(numbers)
        return last - first

    def of(self, index):
        """Returns the windows of an example, a list."""
        _, *bounds = self.bounds(np.arange(self._numbers[index], self._numbers[index + 1]))
        return list(zip(*map(np.ndarray.tolist, bounds)))

    def by_length(self):
        """Yields (example, window) of all windows, those of the longest examples first, of each one after another."""
        for index in np.argsort(-self.totals.clip(max=self.patch_length), kind="stable").tolist():
            yield from ((index, window) for window in self.of(index))

    def predicted_symbols(self, index, window):
        """Returns the slice of a file's content and first 256, as an array of size + 1 symbols, that a window predicts."""
        _, last, predicted = window
        start, stop = ((patch - int(self.given[index])) * self.patch_size for patch in (predicted, last))
        return slice(start, min(stop, int(self.sizes[index]) + 1))

    def read_window(self, index, window):
        """Returns a window of an example as (patches, counted, context), see `utils.ByteDataset`, reading no other bytes.

        Raises:
            OSError: a file cannot be read.
            utils.UnreadableFile: it has another size than when it was listed.
        """
        (first, last, predicted), paths = window, self.examples[index]
        if len(paths) == 1:
            sequence = utils.read_window(paths[0], self.patch_size, first, last, int(self.sizes[index]))
        else:
            *sequence, _ = utils.ByteDataset(self.examples, self.patch_size, self.patch_length)[index]
            if len(sequence[0]) != self.totals[index] or sequence[1][predicted:].sum() != self.sizes[index] + 1:
                raise utils.UnreadableFile("has another size than when it was listed")
        return *sequence, predicted - first

    def read(self, numbers):
        """Returns the windows of these numbers, a list of what a `utils.Batch` is made of.

        Raises:
            utils.UnreadableFile: a file cannot be read, or has another size than when it was listed.
        """
        found = []
        for index, *window in zip(*map(np.ndarray.tolist, self.bounds(np.asarray(numbers)))):
            try:
                found.append(self.read_window(index, window))
            except OSError as error:
                raise utils.UnreadableFile(f"cannot read {self.examples[index][0]!r}: {error.strerror}") from None
            except utils.UnreadableFile as error:
                raise utils.UnreadableFile(f"{self.examples[index][0]!r} {error}") from None
        return found
