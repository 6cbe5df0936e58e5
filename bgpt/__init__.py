"""bGPT, a language model of bytes. From Python, in the root of the repository:

    import bgpt
    model = bgpt.load("midi.pth")
    files = model.generate("mid", count=3, top_p=0.9, seed=0)  # [bytes, bytes, bytes]
"""


def load(path, device=None, precision="auto"):
    """Returns the model of a checkpoint, a `bgpt.model.Generator` or `bgpt.model.Classifier`.

    Args:
        path: the checkpoint, `.pth` or `.safetensors`. Code in it is never run.
        device: "cpu", "cuda", … None = a GPU if there is one, else the CPU.
        precision: "auto", "fp32", "bf16" or "fp16", as PRECISION in config.py.

    Raises:
        UserError (a ValueError): the file is missing or damaged.
    """
    from bgpt.model import load_model  # here, so that importing a part of bgpt needs no PyTorch

    return load_model(path, device, precision)
