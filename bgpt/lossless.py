"""Lossless compression of files with a trained model: range coding by its probabilities.

A file is cut into chunks of 32 KB, which are coded separately in batches, each as a file of the same extension. Within a chunk,
windows of PATCH_LENGTH patches advance as in MODE evaluate. The container has the length, so the end needs no symbol.

Decoding needs the same probabilities, bit for bit. So both directions use one PatchWriter, in float32 on a CPU, where a row's
numbers depend neither on its batch nor on the number of threads.

A container, the file name.ext.bgpt, little-endian:

    bytes  content
    1      STORED or CODED: the format's version, and whether the content is coded
    2      CRC-16 of the bytes after it (and of the extension, if coded), to refuse damage before decoding
    4      CRC-32 of the content, so that wrong content is never written
    …      the content, if stored. If coded:
    2      of the SHA-256 of the model's weights and sizes     } others are refused
    1      of the SHA-256 of the libraries and their results   } before decoding
    1-9    number of content bytes, as a varint (7 bits a byte, the lowest first, 128 added to all but the last)
    …      number of words of each chunk but the last, as varints
    …      the chunks, 32-bit words of constriction's range coder

A change of CHUNK, the windows' advance, generation.py's arithmetic or the coder's fixed-point numbers needs a new version.

The module is not called `compression`, since Python 3.14 has a standard package of that name.
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
CHUNK = 2**15  # bytes of a chunk, the last of a file may be shorter

_FAMILY = constriction.stream.model.Categorical(perfect=False)  # 24-bit fixed-point probabilities, none of them 0


class BadContainer(UserError):
    """A container that is damaged, foreign, or of another model or kind of machine."""


# ---- Chunks ---------------------------------------------------------------------------------------------------------

class Chunk:
    """A part of a file, coded byte by byte. Its `content` is complete when encoding, and grows when decoding."""

    def __init__(self, extension, size, content=b""):
        self.extension, self.size, self.content = extension, size, bytearray(content)
        self.done = 0  # coded bytes

    def next_prompt(self, patch_size, patch_length):
        """Returns the Prompt of the next window: the last symbols of extension patch and coded bytes."""
        context = (patch_length - evaluation_advance(patch_length)) * patch_size  # symbols
        coded = np.array(self.content[max(self.done - context, 0) : self.done], dtype=np.int16)
        return Prompt(self, np.concatenate((extension_patch(self.extension, patch_size), coded))[-context:], [0])

    def code(self, probabilities):
        """Codes the next byte by float32 (256,) probabilities. Returns it, or END after the last."""
        if self.done == self.size:
            return END
        symbol = self._code_byte(probabilities)
        self.done += 1
        return symbol


class Encoding(Chunk):
    """A chunk to encode."""

    def __init__(self, extension, content):
        super().__init__(extension, len(content), content)
        self.encoder = constriction.stream.queue.RangeEncoder()

    def _code_byte(self, probabilities):
        symbol = self.content[self.done]
        self.encoder.encode(np.array([symbol], dtype=np.int32), _FAMILY, probabilities[None])  # (1,), (1, 256)
        return symbol


class Decoding(Chunk):
    """A chunk to decode from `words`, uint32 (n,). A damaged code gives wrong or less content."""

    def __init__(self, extension, size, words):
        super().__init__(extension, size)
        self._decoder = constriction.stream.queue.RangeDecoder(words)

    def _code_byte(self, probabilities):
        try:
            symbol = int(self._decoder.decode(_FAMILY, probabilities[None])[0])
        except AssertionError:  # constriction's error for an invalid code
            symbol, self.size = 0, self.done + 1  # ends here, since the rest cannot be decoded
        self.content.append(symbol)
        return symbol


class Probe(Chunk):
    """A chunk that hashes its probabilities after a prompt of `num_given` bytes (whole patches)."""

    def __init__(self, digest, num_given, num_probed):
        super().__init__("abc", num_given + num_probed, hashlib.shake_128(b"bGPT").digest(num_given + num_probed))
        self.done, self._digest = num_given, digest

    def _code_byte(self, probabilities):
        self._digest.update(probabilities.tobytes())
        return self.content[self.done]


class Coder(PatchWriter):
    """A PatchWriter whose rows are chunks, which choose each symbol.

    `model` is float32, on the CPU. `weights` and `machine` are digests of the model and of its results here, as in containers.
    """

    def __init__(self, model, batch_size):
        assert model.dtype == torch.float32 and model.device.type == "cpu"
        super().__init__(model, batch_size, Sampling())
        self.num_coded = 0  # bytes
        weights, machine = hashlib.sha256(), hashlib.sha256(describe_machine().encode())
        for name, tensor in sorted(model.state_dict().items()):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode() + tensor.numpy().tobytes())
        num_given = (self.length - 1) // 2  # patches that pass the patch-level decoder together, before up to 2 one by one
        num_probed = min(self.length - 1 - num_given, 2)
        self.admit([Probe(machine, num_given * self.size, num_probed * self.size).next_prompt(self.size, self.length)])
        while self.rows:
            self.step()
        self.weights, self.machine = weights.digest()[:2], machine.digest()[:1]

    def choose(self, logits, uniforms):
        """Returns the next symbols of the chunks, int64 (B,), coded by logits (B, V)."""
        probabilities = torch.softmax(logits[:, :END], dim=-1).numpy()  # (B, 256)
        symbols = [row.prompt.key.code(each) for row, each in zip(self.rows, probabilities)]
        self.num_coded += len(symbols) - symbols.count(END)
        return torch.tensor(symbols)


def describe_machine():
    """Returns the libraries and CPU instructions that the model's results depend on, as text."""
    packages = f"torch {torch.__version__}, constriction {importlib.metadata.version('constriction')}"
    return f"{packages}, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


# ---- Containers -----------------------------------------------------------------------------------------------------

def _varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + _varint(number // 128)


def _read_varint(view):
    """Returns the number of a leading varint and the rest of a memoryview, or raises IndexError."""
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
    """Returns a file's container, coded or stored, whichever is shorter. `codes` are its chunks' words, uint32 (n,) each."""
    checksum = zlib.crc32(content).to_bytes(4, "little")
    lengths = b"".join(_varint(len(words)) for words in codes[:-1])
    words = b"".join(words.astype("<u4").tobytes() for words in codes)
    coded = checksum + coder.weights + coder.machine + _varint(len(content)) + lengths + words
    if len(coded) < len(checksum) + len(content):
        return _seal(CODED, os.fsencode(extension), coded)
    return _seal(STORED, b"", checksum + content)


def unpack(container, extension, coder):
    """Returns (CRC-32 of the content, content if stored else None, Decodings if coded else []).

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
    """Returns (bytes, words uint32 (n,)) of each chunk, or raises IndexError for wrong lengths."""
    size, view = _read_varint(view)
    count = max(-(-size // CHUNK), 1)
    lengths = []
    for _ in range(count - 1):
        length, view = _read_varint(view)
        lengths.append(length)
    lengths.append(len(view) // 4 - sum(lengths))
    if len(view) % 4 or min(lengths) < 1:
        raise IndexError
    codes = np.split(np.frombuffer(view, dtype="<u4").astype(np.uint32), np.cumsum(lengths[:-1]))
    return list(zip([CHUNK] * (count - 1) + [size - CHUNK * (count - 1)], codes))


# ---- Files ----------------------------------------------------------------------------------------------------------

def compress(coder, files, verify, progress, failed):
    """Yields (path, content, container) of each path in `files` as soon as it is finished.

    With `verify` each container is decoded too, and fails if its content differs. After each step `progress` is called with the
    number of bytes coded. (path, reason) of each file that cannot be compressed is appended to `failed`.
    """

    def code(path):
        extension, content = extension_of(path), read_bytes(path)
        chunks = [Encoding(extension, content[i : i + CHUNK]) for i in range(0, len(content), CHUNK)]
        yield chunks
        container = pack(content, extension, coder, [each.encoder.get_compressed() for each in chunks])
        if verify and container[0] == CODED:
            _, _, decodings = unpack(container, extension, coder)
            yield decodings
            if b"".join(each.content for each in decodings) != content:
                raise BadContainer("decoding does not give the content back: the model's results differ from run to run")
        return content, container

    return _run(coder, files, code, progress, failed)


def decompress(coder, files, progress, failed):
    """Yields (path, content, container) of containers, whose paths end with SUFFIX. See `compress`."""

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
    """Runs the generators `code(path)`, which yield lists of chunks to code and return (content, container)."""
    paths, pending = iter(files), collections.deque()  # pending: chunks to code
    jobs = {}  # chunk -> (path, its generator, set of its chunks that are not yet coded)
    coder.rows.clear()  # left by a stopped run

    def resume(path, coding):
        """Continues a file up to its next chunks, or yields its result."""
        try:
            while not (chunks := next(coding)):
                pass
            jobs.update(dict.fromkeys(chunks, (path, coding, set(chunks))))
            pending.extend(chunks)
        except StopIteration as end:
            yield path, *end.value
        except (OSError, BadContainer) as error:
            failed.append((path, getattr(error, "strerror", None) or str(error)))

    while True:
        while len(coder.rows) + len(pending) < coder.batch_size and (path := next(paths, None)) is not None:
            yield from resume(path, code(path))
        count = min(len(pending), coder.batch_size - len(coder.rows))
        coder.admit([pending.popleft().next_prompt(coder.size, coder.length) for _ in range(count)])
        if not coder.rows:
            return
        num_coded, ended = coder.num_coded, coder.step()
        progress(coder.num_coded - num_coded)
        for chunk in (continuation.key for continuation in ended):
            if chunk.done < chunk.size:  # its window is full
                pending.appendleft(chunk)
                continue
            path, coding, missing = jobs.pop(chunk)
            missing.remove(chunk)
            if not missing:
                yield from resume(path, coding)
