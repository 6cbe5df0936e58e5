"""What a model runs on: device, number format, memory, processes."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from bgpt import system

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def pick_device():
    """Returns the torch.device to run on: a CUDA GPU if there is one, else the CPU.

    Attention on a GPU is then left to PyTorch's other kernels than cuDNN's, which it prefers on some: cuDNN prepares tens of
    milliseconds for each new shape, and nearly every batch of files has shapes of its own.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.backends.mps.is_available():
        print("the Apple GPU is not used: this runs on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision, device):
    """Returns the torch.dtype of PRECISION on a device.

    Raises:
        UserError: fp16 without CUDA.
    """
    if precision == "fp16" and device.type != "cuda":
        raise system.UserError("PRECISION is 'fp16', which needs a CUDA GPU; on a CPU it may be auto, fp32 or bf16")
    if precision == "auto":
        if device.type == "cuda":
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if in_hardware else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device, dtype):
    """Returns the context in which a model with float32 weights computes in `dtype`."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def memory_errors():
    """Turns an error that PyTorch raises when memory is full into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        where = "the GPU's memory"
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # PyTorch has no class of its own for this one
            raise
        where = "the memory"
    else:
        return
    raise system.UserError(f"{where} is full: lower BATCH_SIZE or INFERENCE_BATCH_SIZE, or raise ACCUMULATION_STEPS")


def tune_memory():
    """Sets how this process uses memory on a CPU; called before the first product.

    glibc keeps the memory of freed tensors for the next ones, instead of handing it back to the system each time: a step of
    training allocates the same large tensors over and over, and getting their pages anew took a fifth of it.

    oneDNN keeps 128 of the kernels that it makes for each shape of a product, instead of 1024. Nearly every batch of files of
    different lengths brings new shapes, whose kernels are of no use again: a run of 1.7 million parameters peaked at 1.9
    instead of 3.2 GB after 550 steps, at the same speed. A step needs about 40 kernels; ONEDNN_PRIMITIVE_CACHE_CAPACITY in the
    environment asks for another number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # large blocks too come from the heap…
        mallopt(_M_TRIM_THRESHOLD, -1)  # …whose free end is never handed back


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, each with a device of its own, as torchrun started them; without torchrun, this one alone."""

    device: torch.device
    rank: int = 0  # the number of this process
    count: int = 1

    def sum(self, values):
        """Returns the sums over all processes of each of some numbers: a list of floats, or of an array a float64 array."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(sums)
        return sums.numpy() if isinstance(values, np.ndarray) else sums.tolist()

    def gather(self, value):
        """Returns the list of every process's `value`, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def distribute(self, model):
        """Returns what trains the model: itself, or PyTorch's wrapper that averages the gradients of all processes."""
        if self.count == 1:
            return model
        # With find_unused_parameters GPT-2's own embeddings of patches, which nothing uses, are no error, and gradients are
        # summed up in one and the same order from the first step on, so that a resumed run computes the same bits.
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)

    def agree(self, error=None, before_end=None):
        """Ends the run on all processes if one of them met an error (UserError or OSError); all call it at the same point.

        Args:
            error: the one that this process met, None = none.
            before_end: called on all processes before they end; what it returns follows the error's message.

        Raises:
            UserError, OSError: this process is alone, and met it.
            SystemExit: status 1; the message was printed, once.
        """
        if self.sum([error is not None]) == [0]:
            return
        more = "" if before_end is None else before_end()
        if self.count == 1:
            raise system.UserError(f"{error}{more}") if more else error
        messages = self.gather(None if error is None else str(error))
        rank = next(rank for rank, message in enumerate(messages) if message is not None)
        where = "" if None not in messages else f"process {rank}: "
        self.leave(f"error: {where}{messages[rank]}{more}", 1)

    @contextlib.contextmanager
    def agreeing(self, before_end=None):
        """Runs a block in which an error that any process meets ends all of them; see `agree`."""
        error = None
        try:
            yield
        except (system.UserError, OSError) as caught:
            error = caught
        self.agree(error, before_end)

    def leave(self, message, status):
        """Prints a message, once, and raises SystemExit on all processes, which all call it at the same point."""
        if self.rank == 0:
            tqdm.write(message, file=sys.stderr)
        if self.count > 1:
            dist.barrier()  # torchrun ends the others as soon as one has left: not before all is said
        raise SystemExit(status)


@contextlib.contextmanager
def connected_processes():
    """Yields the Processes of a run; those that torchrun started are connected, and only the first prints.

    Raises:
        UserError: there are more processes than GPUs, memory is full, or another process has ended.
    """
    tune_memory()
    processes = _connect()
    try:
        with memory_errors():
            yield processes
    except BaseException as error:
        if processes.count > 1 and not isinstance(error, SystemExit):
            # how PyTorch says that the connection is gone; it has no class of its own for it
            if isinstance(error, RuntimeError) and re.search(r"(?i)connection (closed|reset)|broken pipe|socket", str(error)):
                error = system.UserError(f"process {processes.rank}: stopped, since another process has ended")
            status = system.explain(error)
            if status is not None:
                os._exit(status)  # the usual way out would wait for the other processes, which may be waiting for this one
        raise
    if processes.count > 1:
        dist.destroy_process_group()


def _connect():
    device, count = pick_device(), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:  # some job systems set only the former
        return Processes(device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise system.UserError(
                f"torchrun: --nproc_per_node is {os.environ['LOCAL_WORLD_SIZE']}, but there are {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Processes(device, dist.get_rank(), count)


def local_gradients(engine, local):
    """Returns the context of a backward pass whose gradients stay in this process for now, to be added to, if `local`."""
    return engine.no_sync() if local and hasattr(engine, "no_sync") else contextlib.nullcontext()
