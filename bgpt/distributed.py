"""Device, number format, and the ranks of a run that torchrun started."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import shutil
import sys

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from bgpt.system import UserError, torchrun_rank

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def pick_device():
    """Returns the torch.device to use, a CUDA GPU or else the CPU."""
    # cuDNN's attention spends tens of milliseconds planning for every new shape, and nearly every batch has one
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.backends.mps.is_available():
        print("the Apple GPU is not used: this runs on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision, device):
    """Returns the torch.dtype of PRECISION on a device. Raises UserError for fp16 without CUDA."""
    if precision == "fp16" and device.type != "cuda":
        raise UserError("PRECISION is 'fp16', but that needs a CUDA GPU; on a CPU set auto, fp32 or bf16")
    if precision == "auto":
        if device.type == "cuda":
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if in_hardware else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def total_memory(device):
    """Returns the total memory of a device in bytes. For the CPU it is the machine's, or the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit ("max")
        with open("/sys/fs/cgroup/memory.max") as file:
            total = min(total, int(file.read()))
    return total


def check_compiler(device):
    """Raises UserError if torch.compile would find no compiler for a device."""
    variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if device.type == "cuda":  # for Triton
        variable, names = "CC", ["gcc", "clang"]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        hint = f"install it, set {variable} to another in the environment, or set COMPILE to False"
        raise UserError(f"COMPILE: torch.compile needs a compiler, and {' or '.join(names)} was not found: {hint}")


def autocast(device, dtype):
    """Returns the context in which a model with float32 weights computes in `dtype`."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def memory_errors(hint):
    """Turns torch.OutOfMemoryError into a UserError. `hint` says what to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full: {hint}") from None


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as torchrun started them. Without torchrun there is one."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def sum(self, values):
        """Sums a list of numbers elementwise over all ranks. Returns floats."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(sums)  # on the CPU, so that no GPU waits
        return sums.tolist()

    def gather(self, value):
        """Returns the list of all ranks' `value`, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model):
        """Returns the model, wrapped in DDP if there are several ranks."""
        if self.count == 1:
            return model
        # find_unused_parameters: `base.wte` gets no gradient. It also fixes the bucket order from step 1 on, so that
        # resumed runs match bit for bit.
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)

    def leave(self, message, status=1):
        """Ends the run with a message from rank 0. All ranks must call it."""
        if self.rank == 0:
            tqdm.write(message, file=sys.stderr)
        if self.count > 1:
            dist.barrier()  # torchrun kills the other ranks when one exits
        raise SystemExit(status)

    def accumulate(self, engine, is_last):
        """Returns the context of a micro-batch. Only the last one of a step synchronizes gradients."""
        return contextlib.nullcontext() if is_last or self.count == 1 else engine.no_sync()


def tune_memory():
    """Tunes the memory use of oneDNN and glibc. Call it before the first matrix product."""
    # 128 cached kernels are too few for batches of many lengths; oneDNN's default, 1024, raised the peak by 1.3 GB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    if platform.libc_ver()[0] == "glibc":
        # freed memory stays in the process, since the page faults of large tensors took a fifth of a training step
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def connected_ranks():
    """Connects a run's ranks and yields them as Ranks. Only rank 0 prints. Raises UserError for more ranks than GPUs."""
    tune_memory()
    device, (rank, count) = pick_device(), torchrun_rank()
    if count == 1:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            print("note: WORLD_SIZE is set, but not by torchrun: this process runs alone. To start several, use torchrun")
        yield Ranks(device)
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun: --nproc_per_node is {local + 1} or more, but there are {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    yield Ranks(device, rank, count)
    dist.destroy_process_group()
