"""Lossless compression of files with a trained model: range coding by its probabilities.

A file is cut into stretches of 32 KB, which are coded separately, each as a file of the same extension, many at once. Within a
stretch, windows of PATCH_LENGTH patches advance as in MODE evaluate. The length is known, so the end needs no symbol.

Decoding needs the same probabilities, to the last digit. So both directions use one PatchWriter, in float32 on a CPU, where a
row's numbers depend neither on its batch nor on the number of threads.

A container, the file name.ext.bgpt, little-endian:

    bytes  content
    1      STORED or CODED: the format's version, and whether the content is coded
    2      CRC-16 of the bytes behind it (and of the extension, if coded): refuses a damaged container before it is decoded
    4      CRC-32 of the content: no wrong content is ever written
    …      the content, if stored; if coded:
    2      of the SHA-256 of the model's weights and sizes     } these two refuse early
    1      of the SHA-256 of the libraries and their numbers   } what the CRC-32 would refuse in the end
    1-9    bytes of the content, as a varint: 7 bits a byte, the lowest first, 128 added to all but the last
    …      words of each stretch but the last, as varints
    …      the stretches, 32-bit words of constriction's range coder

The version also stands for how windows advance, STRETCH, how generation.py computes, and the coder's fixed-point numbers.

The module cannot be called `compression`: since Python 3.14 that is a package of the standard library.
"""

import binascii
import collections
import hashlib
import importlib.metadata
import os
import platform
import zlib

import constriction
import numpy as np
import torch

from bgpt.files import extension_of
from bgpt.generation import PatchWriter, Prompt, Sampling
from bgpt.system import UserError
from bgpt.windows import evaluation_advance
from utils import END, extension_patch, read_bytes

SUFFIX = ".bgpt"
STORED, CODED = 0xB0, 0xB2
STRETCH = 2**15  # bytes of a stretch; the last of a file may be shorter

_FAMILY = constriction.stream.model.Categorical(perfect=False)  # 24-bit fixed-point probabilities, none of them 0


class BadContainer(UserError):
    """A container that is damaged, of something else, or not to be decoded by this model or machine."""


# ---- Stretches ------------------------------------------------------------------------------------------------------

class Stretch:
    """A part of a file, coded byte by byte. Its `content` is whole when encoding, and grows when decoding."""

    def __init__(self, extension, size, content=b""):
        self.extension, self.size, self.content = extension, size, bytearray(content)
        self.done = 0  # coded bytes

    def next_prompt(self, patch_size, patch_length):
        """Returns the Prompt of the next window: the last of the extension patch and the coded bytes."""
        context = (patch_length - evaluation_advance(patch_length)) * patch_size  # symbols
        coded = np.array(self.content[max(self.done - context, 0) : self.done], dtype=np.int16)
        return Prompt(self, np.concatenate((extension_patch(self.extension, patch_size), coded))[-context:], [0])

    def code(self, probabilities):
        """Codes the next byte by float32 (256,) probabilities and returns it; END after the last."""
        if self.done == self.size:
            return END
        symbol = self._code_byte(probabilities)
        self.done += 1
        return symbol


class Encoding(Stretch):
    """A stretch to encode."""

    def __init__(self, extension, content):
        super().__init__(extension, len(content), content)
        self.encoder = constriction.stream.queue.RangeEncoder()
        self._pending = []  # probabilities of up to 64 symbols, which are encoded together: that is faster

    def _code_byte(self, probabilities):
        self._pending.append(probabilities)
        if len(self._pending) == 64 or self.done + 1 == self.size:
            symbols = self.content[self.done + 1 - len(self._pending) : self.done + 1]
            self.encoder.encode(np.array(symbols, dtype=np.int32), _FAMILY, np.stack(self._pending))  # (n,), (n, 256)
            self._pending = []
        return self.content[self.done]


class Decoding(Stretch):
    """A stretch to decode from its code, uint32 (n,). A damaged code gives wrong or less content."""

    def __init__(self, extension, size, words):
        super().__init__(extension, size)
        self._decoder = constriction.stream.queue.RangeDecoder(words)

    def _code_byte(self, probabilities):
        try:
            symbol = int(self._decoder.decode(_FAMILY, probabilities[None])[0])
        except AssertionError:  # constriction's error for a code that no content has
            symbol, self.size = 0, self.done + 1  # ends here: the rest cannot be decoded
        self.content.append(symbol)
        return symbol


class Probe(Stretch):
    """A stretch whose probabilities go into a hash, to the last bit, after `num_given` bytes of prompt (whole patches)."""

    def __init__(self, digest, num_given, num_probed):
        super().__init__("abc", num_given + num_probed, hashlib.shake_128(b"bGPT").digest(num_given + num_probed))
        self.done, self._digest = num_given, digest

    def _code_byte(self, probabilities):
        self._digest.update(probabilities.tobytes())
        return self.content[self.done]


class Coder(PatchWriter):
    """A PatchWriter of a float32 model on the CPU whose rows are stretches, which choose each symbol.

    `weights` and `machine` are the digests of the model and of its numbers here, as in containers.
    """

    def __init__(self, model, batch_size):
        assert model.dtype == torch.float32 and model.device.type == "cpu"
        super().__init__(model, batch_size, Sampling())
        self.num_coded = 0  # bytes
        weights, machine = hashlib.sha256(), hashlib.sha256(describe_machine().encode())
        for name, tensor in sorted(model.state_dict().items()):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode() + tensor.numpy().tobytes())
        num_given = (self.length - 1) // 2  # patches, which pass the patch-level decoder together; then up to 2 one by one
        num_probed = min(self.length - 1 - num_given, 2)
        self.admit([Probe(machine, num_given * self.size, num_probed * self.size).next_prompt(self.size, self.length)])
        while self.rows:
            self.step()
        self.weights, self.machine = weights.digest()[:2], machine.digest()[:1]

    def choose(self, logits, uniforms):
        """Returns the next symbols of the stretches, int64 (B,), coded by logits (B, V)."""
        probabilities = torch.softmax(logits[:, :END], dim=-1).numpy()  # (B, 256)
        symbols = [row.prompt.key.code(each) for row, each in zip(self.rows, probabilities)]
        self.num_coded += len(symbols) - symbols.count(END)
        return torch.tensor(symbols)


def describe_machine():
    """Returns the libraries and the processor's instructions that the numbers depend on, in words."""
    packages = f"torch {torch.__version__}, constriction {importlib.metadata.version('constriction')}"
    return f"{packages}, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


# ---- Containers -----------------------------------------------------------------------------------------------------

def _varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + _varint(number // 128)


def _read_varint(view):
    """Returns (number, rest) of a memoryview that begins with a varint; raises IndexError if it is cut or too long."""
    number = 0
    for i in range(9):
        number += view[i] % 128 << 7 * i
        if view[i] < 128:
            return number, view[i + 1 :]
    raise IndexError


def _seal(kind, extension, body):
    check = binascii.crc_hqx(extension + body, kind)
    return bytes([kind]) + check.to_bytes(2, "little") + body


def pack(content, extension, coder, codes):
    """Returns a file as a container, coded or stored, whichever is shorter; `codes` are its stretches' uint32 (n,) words."""
    checksum = zlib.crc32(content).to_bytes(4, "little")
    lengths = b"".join(_varint(len(words)) for words in codes[:-1])
    words = b"".join(words.astype("<u4").tobytes() for words in codes)
    coded = checksum + coder.weights + coder.machine + _varint(len(content)) + lengths + words
    if len(coded) < len(checksum) + len(content):
        return _seal(CODED, os.fsencode(extension), coded)
    return _seal(STORED, b"", checksum + content)


def unpack(container, extension, coder):
    """Returns (CRC-32 of the content, the content or None if it is coded, then its Decodings).

    Raises BadContainer if it is no container of a file with this extension, damaged, or not for this Coder.
    """
    if container[:1] not in (bytes([STORED]), bytes([CODED])):
        raise BadContainer("is no container of MODE 'compress', or one of another version")
    is_coded, body = container[0] == CODED, container[3:]
    sealed, hint = (os.fsencode(extension), ", or its extension was changed") if is_coded else (b"", "")
    if len(body) < 4 or _seal(container[0], sealed, body) != container:
        raise BadContainer(f"is damaged or cut short{hint}")
    checksum, view = int.from_bytes(body[:4], "little"), memoryview(body)[4:]
    if not is_coded:
        return checksum, bytes(view), []
    if view[:2] != coder.weights:
        raise BadContainer("was compressed with another model")
    if view[2:3] != coder.machine:
        other = "other libraries or on another kind of processor, where the model's numbers differ in the last digits"
        raise BadContainer(f"was compressed with {other}; here: {describe_machine()}")
    try:
        return checksum, None, [Decoding(extension, size, words) for size, words in _split(view[3:])]
    except IndexError:
        raise BadContainer("is damaged: its lengths do not fit") from None


def _split(view):
    """Returns (bytes, words uint32 (n,)) of each stretch of a coded container; raises IndexError if its lengths do not fit."""
    size, view = _read_varint(view)
    count = max(-(-size // STRETCH), 1)
    if count > len(view):  # before anything is allocated for a number that may be huge
        raise IndexError
    lengths = []
    for _ in range(count - 1):
        length, view = _read_varint(view)
        lengths.append(length)
    lengths.append(len(view) // 4 - sum(lengths))
    if len(view) % 4 or min(lengths) < 1:
        raise IndexError
    codes = np.split(np.frombuffer(view, dtype="<u4").astype(np.uint32), np.cumsum(lengths[:-1]))
    return list(zip([STRETCH] * (count - 1) + [size - STRETCH * (count - 1)], codes))


# ---- Files ----------------------------------------------------------------------------------------------------------

def compress(coder, files, verify, progress, failed):
    """Yields (path, content, container) of files, an iterable of paths, each as soon as it is finished.

    With `verify` each container is decoded, too. A file that does not come back has failed. `progress` is called with the number
    of bytes coded, after each step. (path, reason) of each file that cannot be compressed is appended to `failed`.
    """

    def code(path):
        extension, content = extension_of(path), read_bytes(path)
        stretches = [Encoding(extension, content[i : i + STRETCH]) for i in range(0, len(content), STRETCH)]
        yield stretches
        container = pack(content, extension, coder, [each.encoder.get_compressed() for each in stretches])
        if verify and container[0] == CODED:
            _, _, decodings = unpack(container, extension, coder)
            yield decodings
            if b"".join(each.content for each in decodings) != content:
                raise BadContainer("decoding does not give the content back: the model's numbers are not the same twice here")
        return content, container

    return _run(coder, files, code, progress, failed)


def decompress(coder, files, progress, failed):
    """Yields (path, content, container) of containers, whose paths end with SUFFIX; see `compress`."""

    def code(path):
        container = read_bytes(path)
        checksum, content, decodings = unpack(container, extension_of(path.removesuffix(SUFFIX)), coder)
        yield decodings
        content = b"".join(each.content for each in decodings) if content is None else content
        if zlib.crc32(content) != checksum:
            raise BadContainer("its content has another CRC-32: it is damaged, or the model's numbers differ here")
        return content, container

    return _run(coder, files, code, progress, failed)


def _run(coder, files, code, progress, failed):
    """Yields (path, content, container) of files, the stretches of many of them in one batch.

    `code(path)` is a generator that yields lists of stretches, continues when they are coded, returns (content, container).
    """
    paths, waiting = iter(files), collections.deque()  # waiting: stretches to code
    jobs = {}  # stretch -> (path, its generator, set of its stretches that are not yet coded)
    coder.rows.clear()  # of a run that was stopped

    def resume(path, coding):
        """Continues a file up to its next stretches; yields its result if there are none."""
        try:
            while not (stretches := next(coding)):
                pass
            jobs.update(dict.fromkeys(stretches, (path, coding, set(stretches))))
            waiting.extend(stretches)
        except StopIteration as end:
            yield path, *end.value
        except (OSError, BadContainer) as error:
            failed.append((path, getattr(error, "strerror", None) or str(error)))

    while True:
        while len(coder.rows) + len(waiting) < coder.batch_size and (path := next(paths, None)) is not None:
            yield from resume(path, code(path))
        count = min(len(waiting), coder.batch_size - len(coder.rows))
        coder.admit([waiting.popleft().next_prompt(coder.size, coder.length) for _ in range(count)])
        if not coder.rows:
            return
        num_coded, ended = coder.num_coded, coder.step()
        progress(coder.num_coded - num_coded)
        for stretch in (continuation.key for continuation in ended):
            if stretch.done < stretch.size:  # its window is full
                waiting.appendleft(stretch)
                continue
            path, coding, missing = jobs.pop(stretch)
            missing.remove(stretch)
            if not missing:
                yield from resume(path, coding)
