"""Compresses any file with a trained model, and decompresses it, byte for byte: entropy coding by the model's probabilities.

A file is cut into stretches of 32 KB, mostly one. Each is coded on its own, as a file of the same extension, so that many can be
coded at once; within a stretch, windows of PATCH_LENGTH patches advance as those of MODE evaluate do. The model gives a
probability to each of 256 bytes (the length is known, so no symbol is needed for the end), and a range coder turns the bytes into
about as many bits as those probabilities say.

What is coded can be decoded only where the model computes the same probabilities, to the last digit. So both directions go through
one PatchWriter, in float32 on a CPU, where a row's numbers depend neither on its batch nor on the number of threads.

A container, the file name.ext.bgpt, little-endian:

    bytes  what
    1      STORED or CODED: the format's version, and whether the content is stored as it is or coded
    2      CRC-16 of the bytes behind it (and of the extension, if coded): a damaged or cut container is known before it is decoded
    4      CRC-32 of the content: what makes sure that no wrong content is ever written

    stored:
    …      the content

    coded:
    2      of the SHA-256 of the model's weights and sizes  } these two only refuse early what the CRC-32 of the content
    1      of that of the libraries and their numbers       } would refuse in the end
    1-9    bytes of the content, as a varint: 7 bits a byte, the lowest first, 128 added to all but the last
    …      words of each stretch but the last, as varints
    …      the stretches, 32-bit words as constriction's range coder makes them

What else a code depends on (how windows advance, STRETCH, how generation.py computes, the coder's fixed-point numbers) belongs to
the version.

The module cannot be called `compression`: since Python 3.14 that is a package of its own, which gzip and others import.
"""

import binascii
import collections
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import zlib

import constriction
import numpy as np
import torch

from bgpt import generation
from bgpt import files as listing
from bgpt import system
import utils
from bgpt import windows as windowing
from utils import END

SUFFIX = ".bgpt"
STORED, CODED = 0xB0, 0xB2
STRETCH = 2**15  # bytes of the stretches of a file; the last may be shorter

_FAMILY = constriction.stream.model.Categorical(perfect=False)  # 24-bit fixed-point probabilities, none of them 0
_PENDING = 64  # symbols that are encoded in one call


class BadContainer(system.UserError):
    """A file that is no container, or a damaged one, or one that this model or machine cannot decode."""


# ---------------------------------------------------------------------------------------------------------------------
# Stretches
# ---------------------------------------------------------------------------------------------------------------------


class Stretch:
    """A part of a file under way through the model, window by window.

    Args:
        owner: the file that it is of.
        extension: that file's.
        size: bytes.
        content: the bytes that are known already, all or none of them.
    """

    def __init__(self, owner, extension, size, content=b""):
        self.owner, self.extension, self.size = owner, extension, size
        self.content = bytearray(content)
        self.done = 0  # bytes that are coded

    @property
    def finished(self):
        """Whether all of its bytes are coded."""
        return self.done == self.size

    def next_prompt(self, patch_size, patch_length):
        """Returns the Prompt of the next window: the extension patch or, in later windows, the content before the next byte."""
        if self.done == 0:
            return self.prompt_from_extension(patch_size)
        context = (patch_length - windowing.evaluation_advance(patch_length)) * patch_size  # bytes
        return generation.Prompt(self, np.array(self.content[self.done - context : self.done]), [0])

    def prompt_from_extension(self, patch_size):
        """Returns the Prompt of the extension patch and all bytes that are coded."""
        given = np.array(self.content[: self.done], dtype=np.int16)
        return generation.Prompt(self, np.concatenate((utils.extension_patch(self.extension, patch_size), given)), [0])

    def code(self, probabilities):
        """Takes float32 (256,), the probabilities of the next byte, and returns its value; END if there is none."""
        if self.finished:
            return END
        symbol = self.code_byte(probabilities)
        self.done += 1
        return symbol

    def code_byte(self, probabilities):
        """Returns the value of the next byte, after encoding or decoding it."""
        raise NotImplementedError


class Encoding(Stretch):
    """A stretch that is encoded."""

    def __init__(self, owner, extension, content):
        super().__init__(owner, extension, len(content), content)
        self._encoder = constriction.stream.queue.RangeEncoder()
        self._pending = []  # probabilities of the last symbols, which are encoded together

    def code_byte(self, probabilities):
        self._pending.append(probabilities)
        if len(self._pending) == _PENDING or self.done + 1 == self.size:
            symbols = self.content[self.done + 1 - len(self._pending) : self.done + 1]
            self._encoder.encode(np.array(symbols, dtype=np.int32), _FAMILY, np.stack(self._pending))  # (n,), (n, 256)
            self._pending = []
        return self.content[self.done]

    def words(self):
        """Returns the code, uint32 (n,)."""
        return self._encoder.get_compressed()


class Decoding(Stretch):
    """A stretch that is decoded from its code, uint32 (n,); a damaged one gives other content, or less."""

    def __init__(self, owner, extension, size, words):
        super().__init__(owner, extension, size)
        self._decoder = constriction.stream.queue.RangeDecoder(words)

    def code_byte(self, probabilities):
        try:
            symbol = int(self._decoder.decode(_FAMILY, probabilities[None])[0])
        except AssertionError:  # how constriction says that no content has this code
            symbol, self.size = 0, self.done + 1  # the rest cannot be told
        self.content.append(symbol)
        return symbol


class Probe(Stretch):
    """A stretch whose probabilities themselves are of interest: they go into a hash, to the last bit.

    Args:
        digest: the hash.
        num_given: bytes that are given, whole patches.
        num_probed: bytes after those.
    """

    def __init__(self, digest, num_given, num_probed):
        content = hashlib.shake_128(b"bGPT").digest(num_given + num_probed)
        super().__init__(None, "abc", len(content), content)
        self.done, self._digest = num_given, digest

    def next_prompt(self, patch_size, patch_length):
        return self.prompt_from_extension(patch_size)

    def code_byte(self, probabilities):
        self._digest.update(probabilities.tobytes())
        return self.content[self.done]


class Coder(generation.PatchWriter):
    """Takes stretches through a model, many at once, each symbol chosen by its stretch rather than drawn.

    Args:
        model: bGPTLMHeadModel in eval mode, float32, on the CPU.
        batch_size: most stretches at once.

    Attributes:
        waiting: deque of stretches to code before others.
        weights, machine: what containers hold of the model and of what computes its numbers, bytes.
    """

    def __init__(self, model, batch_size):
        assert model.dtype == torch.float32 and model.device.type == "cpu"
        super().__init__(model, batch_size, generation.Sampling(), guesses=False)
        self._stretches = [None] * batch_size  # of each row
        self._num_coded = 0  # bytes
        self.waiting = collections.deque()
        self.weights = _digest_weights(model)[:2]
        self.machine = self._digest_machine()[:1]

    def _digest_machine(self):
        """Returns a SHA-256 of the libraries' versions and of a few numbers that they compute with the model here."""
        digest = hashlib.sha256(describe_machine().encode())
        num_given = (self.length - 1) // 2  # patches, which pass the patch-level decoder together; then up to 2 one by one
        num_probed = min(self.length - 1 - num_given, 2)
        list(self.run([Probe(digest, num_given * self.size, num_probed * self.size)], lambda count: None))
        return digest.digest()

    def admit(self, places, prompts):
        """Puts the Prompts of stretches into rows of the batch, see PatchWriter."""
        super().admit(places, prompts)
        for place, prompt in zip(places, prompts):
            self._stretches[place] = prompt.key

    def move(self, source, target, count):
        """Moves a row to another row, see PatchWriter."""
        super().move(source, target, count)
        self._stretches[target] = self._stretches[source]

    def choose(self, logits, uniforms):
        """Returns what the stretches make of the logits (B, V) of their next symbols: those, int64 (B,)."""
        probabilities = torch.softmax(logits[:, :END], dim=-1).numpy()  # (B, 256)
        symbols = [stretch.code(row) for stretch, row in zip(self._stretches, probabilities)]
        self._num_coded += len(symbols) - symbols.count(END)
        return torch.tensor(symbols)

    def run(self, stretches, progress):
        """Yields the stretches of an iterable, each when all of it is coded; meanwhile, some may be put into `waiting`.

        Args:
            stretches: read as places become free.
            progress: called with the number of bytes coded, after each step.
        """
        stretches, finished = iter(stretches), collections.deque()

        def take(count):
            prompts = []
            while len(prompts) < count and (stretch := self.waiting.popleft() if self.waiting else next(stretches, None)):
                if stretch.finished:  # an empty one
                    finished.append(stretch)
                else:
                    prompts.append(stretch.next_prompt(self.size, self.length))
            return prompts

        def on_patches(num_patches):
            num_coded, self._num_coded = self._num_coded, 0
            progress(num_coded)

        for continuation in generation.continue_prompts(self, take, on_patches):
            (finished if continuation.key.finished else self.waiting).append(continuation.key)
            while finished:
                yield finished.popleft()
        yield from finished


def _digest_weights(model):
    """Returns the SHA-256 of a model's tensors: their names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.digest()


def describe_machine():
    """Returns the libraries and the instructions that the numbers depend on, in words."""
    version = importlib.metadata.version("constriction")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, constriction {version}, {platform.machine()} with {capability}"


# ---------------------------------------------------------------------------------------------------------------------
# Containers
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Container:
    """What a container holds."""

    checksum: int  # CRC-32 of the content
    content: bytes | None  # None if it is coded
    parts: list  # (bytes, words uint32 (n,)) of each stretch, if it is coded


def _varint(number):
    """Returns a number as 7 bits a byte, the lowest first, 128 added to all but the last."""
    coded = bytearray()
    while number >= 128:
        coded.append(number % 128 + 128)
        number //= 128
    return bytes(coded) + bytes([number])


def _read_varint(view):
    """Returns (a number, the rest of a memoryview that begins with it); raises IndexError where the view ends before it does."""
    number = 0
    for i in range(9):
        number += view[i] % 128 << 7 * i
        if view[i] < 128:
            return number, view[i + 1 :]
    raise IndexError("a varint of more than 9 bytes")


def _seal(kind, extension, body):
    """Returns a container of what follows its CRC-16."""
    check = binascii.crc_hqx(extension + body, kind)
    return bytes([kind]) + check.to_bytes(2, "little") + body


def pack(content, extension, coder, codes):
    """Returns a file as a container, coded or stored, whichever is shorter.

    Args:
        content: the file's bytes.
        extension: the file's.
        coder: the Coder.
        codes: the words of the content's stretches, uint32 (n,) each.
    """
    checksum = zlib.crc32(content).to_bytes(4, "little")
    lengths = b"".join(_varint(len(words)) for words in codes[:-1])
    words = b"".join(words.astype("<u4").tobytes() for words in codes)
    coded = checksum + coder.weights + coder.machine + _varint(len(content)) + lengths + words
    if len(coded) < len(checksum) + len(content):
        return _seal(CODED, os.fsencode(extension), coded)
    return _seal(STORED, b"", checksum + content)


def unpack(container, extension, coder):
    """Returns the Container that bytes hold, of a file with an extension.

    Raises:
        BadContainer: they are no container, or a damaged one, or one that the Coder cannot decode.
    """
    if container[:1] not in (bytes([STORED]), bytes([CODED])):
        raise BadContainer("is no container of MODE 'compress', or one of another version")
    is_coded, body = container[0] == CODED, container[3:]
    extension, hint = (os.fsencode(extension), ", or its extension was changed") if is_coded else (b"", "")
    if len(body) < 4 or _seal(container[0], extension, body) != container:
        raise BadContainer(f"is damaged or cut short{hint}")
    checksum, view = int.from_bytes(body[:4], "little"), memoryview(body)[4:]
    if not is_coded:
        return Container(checksum, bytes(view), [])
    weights, machine, view = bytes(view[:2]), bytes(view[2:3]), view[3:]
    if weights != coder.weights:
        raise BadContainer("was compressed with another model")
    if machine != coder.machine:
        raise BadContainer(
            "was compressed with other libraries or on another kind of processor, where the model's numbers differ in the last "
            f"digits; here: {describe_machine()}"
        )
    try:
        return Container(checksum, None, _split(view))
    except IndexError:
        raise BadContainer("is damaged: what it says of its length cannot be") from None


def _split(view):
    """Returns the parts of a Container from what follows the digests; raises IndexError where lengths do not fit."""
    size, view = _read_varint(view)
    count = max(-(-size // STRETCH), 1)
    if count > len(view):  # before anything is made of a number that may be huge
        raise IndexError("more stretches than bytes")
    lengths = []
    for _ in range(count - 1):
        length, view = _read_varint(view)
        lengths.append(length)
    lengths.append(len(view) // 4 - sum(lengths))
    if len(view) % 4 or min(lengths) < 1:
        raise IndexError("a stretch without words")
    words, ends = np.frombuffer(view, dtype="<u4"), np.cumsum(lengths)
    sizes = [STRETCH] * (count - 1) + [size - STRETCH * (count - 1)]
    return [(size, words[end - length : end].astype(np.uint32)) for size, length, end in zip(sizes, lengths, ends)]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class _Job:
    """A file under way; it is finished when none of its stretches is missing."""

    def __init__(self, path, extension):
        self.path, self.extension = path, extension
        self.content = self.container = self.checksum = None
        self.stretches, self.missing = [], 0

    def begin(self, stretches):
        """Sets what is to be done; returns it."""
        self.stretches, self.missing = stretches, len(stretches)
        return stretches

    def decodings(self, found):
        """Returns the stretches that decode a Container."""
        return [Decoding(self, self.extension, size, words) for size, words in found.parts]

    def decoded(self):
        """Returns the content of the stretches."""
        return b"".join(stretch.content for stretch in self.stretches)


def compress(coder, files, verify, progress, failed):
    """Yields (path, content, container) of files, each when it is finished.

    Args:
        coder: a Coder.
        files: sequence of paths.
        verify: decode what was encoded, too; a file that does not come back is not yielded.
        progress: called with the number of bytes encoded or decoded, after each step.
        failed: gets (path, reason) of files that cannot be done.
    """

    def stretches():
        for path in files:
            job = _Job(path, listing.extension_of(path))
            try:
                with open(path, "rb") as file:
                    job.content = file.read()
            except OSError as error:
                failed.append((path, error.strerror))
                continue
            starts = range(0, max(len(job.content), 1), STRETCH)
            yield from job.begin([Encoding(job, job.extension, job.content[i : i + STRETCH]) for i in starts])

    for stretch in coder.run(stretches(), progress):
        job = stretch.owner
        job.missing -= 1
        if job.missing:
            continue
        if job.container is None:
            job.container = pack(job.content, job.extension, coder, [each.words() for each in job.stretches])
            if verify and job.container[0] == CODED:
                coder.waiting.extend(job.begin(job.decodings(unpack(job.container, job.extension, coder))))
                continue
        elif job.decoded() != job.content:
            failed.append((job.path, "decoding does not give the content back: the model's numbers are not the same twice here"))
            continue
        yield job.path, job.content, job.container


def decompress(coder, files, progress, failed):
    """Yields (path, content, container) of containers, each when it is finished and its content has the right CRC-32.

    Args:
        files: paths that end with SUFFIX; the others are those of `compress`.
    """

    def stretches():
        for path in files:
            job = _Job(path, listing.extension_of(path.removesuffix(SUFFIX)))
            try:
                with open(path, "rb") as file:
                    job.container = file.read()
                found = unpack(job.container, job.extension, coder)
            except (OSError, BadContainer) as error:
                failed.append((path, getattr(error, "strerror", None) or str(error)))
                continue
            job.content, job.checksum = found.content, found.checksum
            # of what is stored, nothing needs the model: an empty stretch is finished at once
            yield from job.begin([Stretch(job, "", 0)] if found.content is not None else job.decodings(found))

    for stretch in coder.run(stretches(), progress):
        job = stretch.owner
        job.missing -= 1
        if job.missing:
            continue
        content = job.decoded() if job.content is None else job.content
        if zlib.crc32(content) != job.checksum:
            failed.append((job.path, "its content has another CRC-32: it is damaged, or the model's numbers differ here"))
            continue
        yield job.path, content, job.container
