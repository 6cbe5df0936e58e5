"""A trained model as an object: `bgpt.load(path)` returns a Generator or a Classifier."""

import contextlib
import copy
import functools
import math
import pathlib
import tempfile

import numpy as np
import torch

import utils
from bgpt import checkpoint, distributed, evaluation, generation, settings
from bgpt.examples import directions_of, hash_texts, real_paths
from bgpt.files import describe_extensions, extension_of, list_files
from bgpt.system import UserError, first_names
from bgpt.windows import evaluation_windows


def load_model(path, device=None, precision="auto", name="path"):
    """Returns the Generator or Classifier of a checkpoint, see `bgpt.load`. `name` is the constant with the path."""
    settings.check_value("PRECISION", precision)
    saved, where = checkpoint.load_checkpoint(path, name), f"{name}: {path!r}"
    net = checkpoint.model_sizes(saved["model"], where).build()
    checkpoint.load_weights(net, saved["model"], where)
    device = distributed.pick_device() if device is None else torch.device(device)
    kind = Classifier if isinstance(net, utils.bGPTForClassification) else Generator
    return kind(net.to(device).eval(), saved, distributed.pick_dtype(precision, device), where)


def _takes_one_or_many(method):
    """Lets a method for a list of contents also take a single one (bytes)."""

    @functools.wraps(method)
    def call(self, content, *arguments, **keywords):
        if isinstance(content, (list, tuple)):
            return method(self, list(content), *arguments, **keywords) if content else []
        return method(self, [content], *arguments, **keywords)[0]

    return call


@contextlib.contextmanager
def _files_of(contents, ext, batch_size, suffix=""):
    """Yields a temporary folder of files with these contents, in the order of their names."""
    settings.check_value("INFERENCE_BATCH_SIZE", batch_size)
    utils.extension_patch(ext, 1)  # raises ValueError for a dot
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(contents):
            pathlib.Path(folder, f"{number:09}.{ext}{suffix}").write_bytes(content)
        yield folder


class Trained:
    """A trained model and its checkpoint's metadata.

    Attributes:
        net: the bGPTLMHeadModel or bGPTForClassification, in eval mode, its weights in float32.
        dtype: torch.dtype to compute in.
        where: the checkpoint's constant and path, for messages.
        extensions: list of str, of the training files. None = unknown.
        file_hashes: int64 (n,), of the training files' real paths. Empty = unknown.
    """

    def __init__(self, net, saved, dtype=torch.float32, where=""):
        self.net, self.dtype, self.where, self.extensions = net, dtype, where, saved.get("extensions")
        self.file_hashes = saved.get("file_hashes", torch.zeros(0, dtype=torch.int64))

    def has_seen(self, extension):
        """Returns whether a training file had an extension, True if unknown."""
        return self.extensions is None or bool({extension, extension.lower()} & set(self.extensions))

    def shown_extensions(self):
        """Returns the extensions of the training files for messages."""
        return "unknown" if self.extensions is None else first_names(each or "(none)" for each in self.extensions)

    def check_files(self, files, are_scored):
        """Prints a note on files of untrained extensions, and a warning on scored training files."""
        new = {extension for extension in set(map(extension_of, files)) if not self.has_seen(extension)}
        if new := [path for path in files if extension_of(path) in new]:
            what = f"{len(new)} of {len(files)} files have extensions that {self.where} was not trained on"
            print(f"note: {what} ({describe_extensions(new)}); its extensions: {self.shown_extensions()}")
        if are_scored and (count := int(np.isin(hash_texts(real_paths(files)), self.file_hashes).sum())):
            print(f"warning: {self.where} was trained on {count} of {len(files)} files, so their figures are too good")


class Generator(Trained):
    """A generative model. Methods take one content (bytes), or a list, for which they return a list.

    Attributes:
        conversion_mode: CONVERSION_MODE of the training. False = unknown.
    """

    def __init__(self, net, saved, dtype=torch.float32, where=""):
        super().__init__(net, saved, dtype, where)
        self.conversion_mode = saved["config"].get("CONVERSION_MODE") if "config" in saved else False
        self.num_symbols = net.patch_size * net.patch_length  # most symbols of a sequence, extension patch included

    @functools.cached_property
    def cast(self):
        """The net with its weights in `dtype`, for generation."""
        return self.net if self.dtype == torch.float32 else copy.deepcopy(self.net).to(self.dtype)

    def extension_patch(self, extension):
        """Returns the extension patch, int16 (S,), in lower case unless training files had this spelling."""
        extension = extension if extension in (self.extensions or ()) else extension.lower()
        return utils.extension_patch(extension, self.net.patch_size)

    def completion_prompt(self, content, extension):
        """Returns the symbols [ext] content, int16 (n,). The content may end within a patch."""
        return np.concatenate((self.extension_patch(extension), np.frombuffer(content, np.uint8).astype(np.int16)))

    def conversion_prompt(self, content, source, target):
        """Returns the symbols [abc] content [mid], int16 (n,)."""
        patches = utils.to_patches(content, "", self.net.patch_size)[1:-1].reshape(-1)
        return np.concatenate((self.extension_patch(source), patches, self.extension_patch(target)))

    def check_task(self, mode, input_ext=None, target_ext=None, conversion_mode=None):
        """Compares a task with the training and prints a note if they differ.

        The arguments are constants of config.py. Returns `target_ext`, or for None the only extension of the training files.
        Raises UserError for an extension of no training file, and in MODE evaluate for an untrained conversion.
        """
        own, sources = self.conversion_mode, [input_ext] * (mode == "convert")
        wanted = directions_of(conversion_mode) if mode == "evaluate" else []
        conversions = [each for each in wanted if (input_ext or each[0]).lower() == each[0]]
        if mode in ("generate", "convert"):
            target_ext = self._own_extension(sources) if target_ext is None else target_ext
            for name, extension in zip(("TARGET_EXT", "INPUT_EXT"), (target_ext, *sources)):
                if not self.has_seen(extension):
                    text = f"{name} is {extension!r}, but {self.where} was trained on no such file"
                    raise UserError(f"{text}; its extensions: {self.shown_extensions()}")
            conversions = [(source.lower(), target_ext.lower()) for source in sources]
        how = {
            False: "has no record of its training data, so it may not have learned",
            None: "was trained on plain files, without CONVERSION_MODE, never on",
        }.get(own, f"was trained with CONVERSION_MODE {own!r}, never on")
        new = [" -> ".join(each) for each in conversions if each not in directions_of(own or None)]
        if new and own is not False and mode == "evaluate":
            raise UserError(f"CONVERSION_MODE is {conversion_mode!r}, but {self.where} {how} {' or '.join(new)}")
        if new or (own and not conversions):
            print(f"note: {self.where} {how} {' or '.join(new) or 'single files'}")
        return target_ext

    def _own_extension(self, sources):
        """Returns the training files' only extension outside `sources`, or raises UserError."""
        if self.extensions is None and not sources:
            print(f"note: TARGET_EXT is None, and {self.where} has no record of its extensions: writes .bin files")
            return "bin"  # the published code's default
        own = {each.lower(): each for each in sorted(self.extensions or ())}  # of ABC and abc, abc is kept
        own = [each for key, each in own.items() if key not in map(str.lower, sources)]
        if len(own) != 1:
            raise UserError(f"TARGET_EXT is None, but must be one of the extensions of {self.where}: {self.shown_extensions()}")
        return own[0]

    def generate(self, ext, count=1, *, top_k=0, top_p=1.0, temperature=1.0, seed=0, batch_size=32):
        """Returns `count` new files of an extension, a list of bytes. For sampling see TOP_K, TOP_P, … in config.py."""
        ext = self.check_task("generate", target_ext=ext)
        prompts = [(self.extension_patch(ext), [seed, i]) for i in range(1, count + 1)]  # as inference.py seeds them
        return self._continue(prompts, (top_k, top_p, temperature), batch_size)

    @_takes_one_or_many
    def complete(self, content, ext, *, top_k=0, top_p=1.0, temperature=1.0, seed=0, batch_size=32):
        """Returns content and its continuation, bytes. Raises ValueError if no room is left in PATCH_LENGTH."""
        prompts = [(self.completion_prompt(each, ext), [seed, i]) for i, each in enumerate(content)]
        written = self._continue(prompts, (top_k, top_p, temperature), batch_size)
        return [each + rest for each, rest in zip(content, written)]

    @_takes_one_or_many
    def convert(self, content, source, target, *, top_k=0, top_p=1.0, temperature=1.0, seed=0, batch_size=32):
        """Returns the conversion of a file from extension `source` to `target`, bytes. Raises ValueError as `complete`."""
        self.check_task("convert", input_ext=source, target_ext=target)
        prompts = [(self.conversion_prompt(each, source, target), [seed, i]) for i, each in enumerate(content)]
        return self._continue(prompts, (top_k, top_p, temperature), batch_size)

    def _continue(self, prompts, sampling, batch_size):
        for name, value in zip(("TOP_K", "TOP_P", "TEMPERATURE", "INFERENCE_BATCH_SIZE"), (*sampling, batch_size)):
            settings.check_value(name, value)
        for symbols, _ in prompts:
            if len(symbols) >= self.num_symbols:
                raise ValueError(f"no room is left: {len(symbols)} of the model's {self.num_symbols} symbols are given")
        prompts = [generation.Prompt(key, symbols, stream) for key, (symbols, stream) in enumerate(prompts)]
        done = generation.generate(self.cast, prompts, min(batch_size, len(prompts)), generation.Sampling(*sampling))
        done = {each.key: utils.to_content(each.symbols) for each in done}
        return [done[key] for key in range(len(prompts))]

    @_takes_one_or_many
    def bits_per_byte(self, content, ext, *, batch_size=32):
        """Returns the bits per byte of a content, its end included, or NaN if empty. Long ones are cut into windows."""
        failed, scores = [], {}
        with _files_of(content, ext, batch_size) as folder:
            windows = evaluation_windows(utils.Examples(list_files([folder], "ext")), self.net.patch_size, self.net.patch_length)
            for score in evaluation.score_files(self.net, windows, folder, batch_size, self.dtype, lambda count: None, failed):
                scores[score.index] = math.nan if score.bits_per_byte is None else score.bits_per_byte
        return [scores[index] for index in range(len(content))]

    @_takes_one_or_many
    def compress(self, content, ext, *, batch_size=32):
        """Returns the container of a content, see `bgpt.lossless`. Only the same kind of machine can decompress it."""
        return self._code("compress", content, ext, batch_size)

    @_takes_one_or_many
    def decompress(self, container, ext, *, batch_size=32):
        """Returns the content of a container. Raises ValueError if it is damaged, or of another model or machine."""
        from bgpt.lossless import SUFFIX

        return self._code("decompress", container, ext, batch_size, SUFFIX)

    def _code(self, how, content, ext, batch_size, suffix=""):
        """Returns the results of `lossless.compress` or `decompress`, which take files."""
        from bgpt import lossless  # needs constriction, which nothing else does

        failed, done = [], {}
        with _files_of(content, ext, batch_size, suffix) as folder:
            coder = lossless.Coder(self.net if self.net.device.type == "cpu" else copy.deepcopy(self.net).cpu(), batch_size)
            arguments = (coder, list_files([folder], "ext"), *[True] * (how == "compress"), lambda count: None, failed)
            for path, original, container in getattr(lossless, how)(*arguments):
                done[path] = container if how == "compress" else original
        if failed:
            raise ValueError(failed[0][1])
        return [done[path] for path in sorted(done)]


class Classifier(Trained):
    """A classifier.

    Attributes:
        labels: list of str, by index.
        label_mode: LABELS of its training.
    """

    def __init__(self, net, saved, dtype=torch.float32, where=""):
        super().__init__(net, saved, dtype, where)
        self.labels = checkpoint.label_list(saved, where)
        self.label_mode = saved.get("label_mode", "name")  # published checkpoints have none

    @_takes_one_or_many
    def classify(self, content, ext, *, batch_size=32):
        """Returns {label: probability} of a content's first PATCH_LENGTH patches, likeliest first."""
        settings.check_value("INFERENCE_BATCH_SIZE", batch_size)
        patches = [utils.to_patches(each, ext, self.net.patch_size)[: self.net.patch_length] for each in content]
        batches = (patches[start : start + batch_size] for start in range(0, len(patches), batch_size))
        rows = (self.probabilities(utils.Batch((each, each != utils.END, 1) for each in batch)) for batch in batches)
        return [dict(sorted(zip(self.labels, row), key=lambda item: -item[1])) for row in torch.cat(list(rows)).tolist()]

    @torch.inference_mode()
    def probabilities(self, batch):
        """Returns float64 (B, labels) on the CPU for a `utils.Batch`."""
        with distributed.autocast(self.net.device, self.dtype):
            logits = self.net(batch.patches_on(self.net.device), batch.masks)
        return logits.double().softmax(-1).cpu()
