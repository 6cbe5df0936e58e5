"""Generates, converts or completes files with a trained model; the settings are in config.py.

    python inference.py --MODE generate --TARGET_EXT mid --NUM_SAMPLES 10
    python inference.py --MODE convert --INPUT_EXT abc --TARGET_EXT mid --INPUT_FOLDER tunes
    python inference.py --MODE complete --INPUT_FOLDER tunes --PROMPT_BYTES 200
"""

import dataclasses
import errno
import os
import sys
import time
import zlib

import numpy as np
from tqdm import tqdm

import config
import utils


@dataclasses.dataclass
class Output:
    """A file to be written."""

    path: str  # where
    prefix: bytes  # what it begins with, before the model's continuation


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def new_prompts(patch_size):
    """Yields the Prompts of NUM_SAMPLES files of TARGET_EXT from nothing, named YYYYmmdd-HHMMSS-i.ext."""
    taken = {name[:15] for name in os.listdir(config.OUTPUT_FOLDER)}
    while (stamp := time.strftime("%Y%m%d-%H%M%S")) in taken:  # another run of this very second
        time.sleep(0.1)
    suffix = f".{config.TARGET_EXT}" if config.TARGET_EXT else ""
    symbols = utils.extension_patch(config.TARGET_EXT, patch_size)
    for i in range(1, config.NUM_SAMPLES + 1):
        path = os.path.join(config.OUTPUT_FOLDER, f"{stamp}-{i}{suffix}")
        yield utils.Prompt(Output(path, b""), symbols, [config.SEED, i])


def find_inputs():
    """Returns the input files of MODE convert or complete.

    Raises:
        UserError: there are none, or the settings do not allow to tell.
    """
    if config.MODE == "convert" and config.INPUT_EXT is None:
        raise utils.UserError('INPUT_EXT is None; to convert, it must be the extension of the input files, such as "abc"')
    files = utils.list_files([config.INPUT_FOLDER], "INPUT_FOLDER", config.INPUT_EXT)
    if not files:
        kind = "files" if config.INPUT_EXT is None else f"files of INPUT_EXT {config.INPUT_EXT!r}"
        raise utils.UserError(f"INPUT_FOLDER: no {kind} in {config.INPUT_FOLDER!r}")
    folders = [os.path.realpath(folder) for folder in (config.INPUT_FOLDER, config.OUTPUT_FOLDER)]
    if os.path.commonpath(folders) == folders[0]:
        raise utils.UserError(
            f"OUTPUT_FOLDER: {config.OUTPUT_FOLDER!r} lies in INPUT_FOLDER {config.INPUT_FOLDER!r}, so results would mix with "
            "inputs; it must be another folder"
        )
    return files


def input_prompts(files, patch_size, patch_length, failed):
    """Yields the Prompt of each input file; appends (path, reason) to `failed` for those that cannot be done."""
    for path in files:
        name = os.path.relpath(path, config.INPUT_FOLDER)
        output = os.path.join(config.OUTPUT_FOLDER, name)
        try:
            # no more is read than tells that it is too much
            given = config.PROMPT_BYTES if config.MODE == "complete" and config.PROMPT_BYTES else patch_size * patch_length
            content = np.fromfile(path, dtype=np.uint8, count=min(given, patch_size * patch_length))
        except OSError as error:
            failed.append((path, error.strerror))
            continue
        patches = utils.to_patches(content, utils.extension_of(path), patch_size)
        if config.MODE == "convert":
            target = utils.extension_patch(config.TARGET_EXT, patch_size)
            symbols = np.concatenate((patches[:-1].reshape(-1), target))  # [abc] content [mid]
            output, prefix = (f"{output}.{config.TARGET_EXT}" if config.TARGET_EXT else f"{output}-converted"), b""
        else:
            symbols = patches.reshape(-1)[: patch_size + len(content)]  # [abc] content, which may end inside a patch
            prefix = content.tobytes()
        if len(symbols) >= patch_size * patch_length:
            failed.append((path, f"too long: no room is left in the model's {patch_length} patches of {patch_size} bytes"))
            continue
        # the random numbers of a file follow its name, not what else is in the folder
        yield utils.Prompt(Output(output, prefix), symbols, [config.SEED, zlib.crc32(os.fsencode(name))])


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def summarize(num_written, cut_off, failed, patch_length):
    """Prints how the run went: what was written, what was cut off, what could not be done."""
    print(f"{num_written} files written to {config.OUTPUT_FOLDER}")
    if cut_off:
        print(f"{len(cut_off)} of them cut off, since the model's {patch_length} patches (PATCH_LENGTH) were full:")
        print("\n".join(f"  {path}" for path in cut_off))
    if failed:
        print(f"{len(failed)} could not be done:")
        print("\n".join(f"  {path}: {why}" for path, why in failed))


def main():
    device = utils.pick_device()
    dtype = utils.pick_dtype(config.PRECISION, device)
    files = None if config.MODE == "generate" else find_inputs()
    model, _ = utils.load_model(config.INFERENCE_WEIGHTS_PATH, "INFERENCE_WEIGHTS_PATH")
    if not isinstance(model, utils.bGPTLMHeadModel):
        raise utils.UserError(
            f"INFERENCE_WEIGHTS_PATH: {config.INFERENCE_WEIGHTS_PATH!r} is a classifier; MODE {config.MODE!r} needs a "
            "generative model, from train-gen.py"
        )
    model = model.to(device, dtype).eval()
    utils.make_folder(config.OUTPUT_FOLDER, "OUTPUT_FOLDER")
    patch_size, patch_length = model.patch_level_decoder.patch_size, model.patch_level_decoder.config.n_positions
    print(f"{config.MODE} with {config.INFERENCE_WEIGHTS_PATH}: {dtype} on {device}, seed {config.SEED}")

    written, cut_off, failed = [], [], []
    if files is None:
        num_prompts, prompts = config.NUM_SAMPLES, new_prompts(patch_size)
    else:
        num_prompts, prompts = len(files), input_prompts(files, patch_size, patch_length, failed)
    batch_size = min(config.INFERENCE_BATCH_SIZE, num_prompts)
    sampling = utils.Sampling(config.TOP_K, config.TOP_P, config.TEMPERATURE)
    try:
        with tqdm(unit="B", unit_scale=True, desc=config.MODE, dynamic_ncols=True) as bar:
            steps = utils.generate(model, prompts, batch_size, sampling, lambda patches: bar.update(patches * patch_size))
            for continuation in steps:
                output = continuation.key
                try:
                    os.makedirs(os.path.dirname(output.path), exist_ok=True)
                    with utils.replacing(output.path) as file:
                        file.write(output.prefix + utils.to_content(continuation.symbols))
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # nor will the others fit
                        raise
                    failed.append((output.path, error.strerror))
                    continue
                written.append(output.path)
                if continuation.cut_off:
                    cut_off.append(output.path)
                bar.set_postfix_str(f"{len(written)}/{num_prompts} files", refresh=False)
    finally:  # also after Ctrl-C or on a full disk: what is written stays, and is told
        summarize(len(written), cut_off, failed, patch_length)
    return 1 if failed else 0


if __name__ == "__main__":
    config.override(sys.argv[1:])
    utils.run_main(main)
