"""Windows of files that are longer than the context.

A file of more than L = PATCH_LENGTH patches is read in windows of at most L patches. Every patch but the first is predicted
once. In a window, the patches before the predicted ones are context. With L = 8, for a file of 19 patches:

    evaluation: windows advance by half                 training: by all but one patch, from a new random start each epoch

    . = = = = = = =                                     . = = =
            . . . . = = = =                                   . = = = = = = =
                    . . . . = = = =                                         . = = = = = = =
                            . . . . = = =                                                 . =
"""

import zlib

import numpy as np

import utils


def evaluation_advance(patch_length):
    """Returns the number of patches by which windows of `patch_length` advance in evaluation, half of them."""
    return max(patch_length // 2, 1)


def evaluation_windows(examples, patch_size, patch_length):
    """Returns the Windows to evaluate Examples. All but the first of each have half of `patch_length` as context."""
    return Windows(examples, patch_size, patch_length, evaluation_advance(patch_length))


def training_windows(examples, patch_size, patch_length, seeds):
    """Returns the Windows to train on Examples for an epoch. `seeds`, a list of integers, seed their offsets."""
    rng = np.random.default_rng([*seeds, zlib.crc32(b"windows")])
    return Windows(examples, patch_size, patch_length, patch_length - 1, rng)


def count_training_windows(examples, patch_size, patch_length, seeds):
    """Returns the number of `training_windows` with each of several `seeds`, a list."""
    first, last = examples.spans(patch_size).T
    longer = examples.select(np.flatnonzero(last - first > patch_length))  # the others, possibly millions, are one window each
    return [len(examples) - len(longer) + len(training_windows(longer, patch_size, patch_length, each)) for each in seeds]


class Windows:
    """A data set of windows, numbered example by example. A pair is one window that predicts its target.

    A window is (first patch, last patch + 1, first predicted patch) within the example's whole sequence. Pairs must fit in one
    of `patch_length` patches. Windows advance by `advance` patches, from 1 to L - 1. `rng`, a numpy Generator, draws the end of
    a longer file's first window. None = the window is as long as possible.

    Attributes:
        sizes: int64 (n,), bytes of each file that is predicted.
        totals: int64 (n,), patches of each whole sequence.
        given: int64 (n,), the first predicted patch of each, in a pair the one after the target's extension patch.
    """

    def __init__(self, examples, patch_size, patch_length, advance, rng=None):
        self.examples, self.patch_size, self.patch_length, self.advance = examples, patch_size, patch_length, advance
        self.sizes = examples.sizes()[:, -1]
        self._starts, self.totals = examples.spans(patch_size).T
        whole = utils.count_patches(self.sizes, patch_size)
        self.given = self.totals - whole + 1 if examples.are_pairs else self._starts + 1
        self._first_ends = np.minimum(self._starts + patch_length, self.totals)  # int64 (n,), the ends of the first windows
        if rng is not None:
            longer = np.flatnonzero(self.totals - self._starts > patch_length)
            self._first_ends[longer] = self._starts[longer] + 1 + rng.integers(1, patch_length, len(longer))
        counts = 1 - (self._first_ends - self.totals) // advance  # rounded up
        self._numbers = np.concatenate(([0], counts.cumsum()))  # int64 (n + 1,), the number of each example's first window

    def __len__(self):
        return int(self._numbers[-1])

    def __getitem__(self, number):
        """Returns window `number` as (patches, counted, context), see `utils.ByteDataset`."""
        index, *window = (int(bound[0]) for bound in self.bounds(np.array([number])))
        return self.read(index, window)

    def bounds(self, numbers):
        """Returns (example, first, last, predicted), int64 (m,) each, of the windows `numbers`, an integer array."""
        example = np.searchsorted(self._numbers, numbers, side="right") - 1
        nth = numbers - self._numbers[example]
        last = np.minimum(self._first_ends[example] + nth * self.advance, self.totals[example])
        before = self._first_ends[example] + (nth - 1) * self.advance  # the end of the window before, if there is one
        first = np.where(nth == 0, self._starts[example], before - (self.patch_length - self.advance))
        return example, first, last, np.where(nth == 0, self.given[example], before)

    def lengths(self, numbers):
        """Returns the number of patches in each of the windows `numbers`, int64 (m,)."""
        _, first, last, _ = self.bounds(numbers)
        return last - first

    def of(self, index):
        """Returns the windows of an example, a list."""
        _, *bounds = self.bounds(np.arange(self._numbers[index], self._numbers[index + 1]))
        return list(zip(*map(np.ndarray.tolist, bounds)))

    def predicted_symbols(self, index, window):
        """Returns the slice that a window predicts of a file's bytes and first 256."""
        _, last, predicted = window
        start, stop = ((patch - int(self.given[index])) * self.patch_size for patch in (predicted, last))
        return slice(start, min(stop, int(self.sizes[index]) + 1))

    def read(self, index, window):
        """Reads a window of an example, and no other bytes, as (patches, counted, context). See `read_patches`."""
        first, last, predicted = window
        if self.examples.are_pairs:
            patches, counted, _ = utils.ByteDataset(self.examples, self.patch_size, self.patch_length)[index]
        else:
            path, size = self.examples[index][0], int(self.sizes[index])
            patches, counted = utils.read_patches(path, self.patch_size, first, last, size)
        return patches, counted, predicted - first
