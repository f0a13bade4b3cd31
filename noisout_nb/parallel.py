"""Stage 8, the hardware at hand: devices, and several processes, one per GPU or share of the cores.

Started by `torchrun --nproc-per-node=2 program.py`, every process runs the same program and draws
the same random numbers, then works on its own share of each batch. Started without torchrun there
is one process, and its share is the whole.
"""

import atexit
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor


def get_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU; NOISOUT_DEVICE ("cpu", "cuda", "mps") overrides it.

    Apple's GPUs (MPS) are not used by default, as some computations here need float64, which they
    lack; a warning says so. Started by torchrun, the process joins the others and takes a GPU of
    its own.

    Raises ValueError for a device that is unknown or absent, and for more processes than GPUs.
    """
    device = _chosen_device()
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = _own_gpu(int(os.environ["LOCAL_RANK"]))
        _join(device)
    return device


def _chosen_device() -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name := os.environ.get("NOISOUT_DEVICE"):
        if not available.get(name):
            there = ", ".join(name for name, is_there in available.items() if is_there)
            raise ValueError(f"NOISOUT_DEVICE is {name!r}: this machine has {there}")
        return torch.device(name)
    if available["cuda"]:
        return torch.device("cuda", 0)
    if available["mps"]:
        warnings.warn(
            "Apple's GPU (MPS) is not used, as parts of the series need float64, which it lacks; "
            "for training and sampling alone, try NOISOUT_DEVICE=mps",
            stacklevel=3,
        )
    return torch.device("cpu")


def _own_gpu(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} has no GPU of its own: this machine has {count}, so start "
            f"torchrun with --nproc-per-node={count}, or set NOISOUT_DEVICE=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device) -> None:
    if dist.is_initialized():
        return
    # Its functions take the group there is at import as their default: imported later, by torch
    # itself, they would keep ours, and its threads, alive until the interpreter is gone.
    import torch.distributed.nn  # noqa: F401

    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def has_bfloat16(device: torch.device) -> bool:
    """Does the device compute in bfloat16 natively? Others emulate it, slowly.

    GPUs since Ampere and CPUs with AVX-512 BF16 do.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return is_cpu and torch.cpu._is_avx512_bf16_supported()


def memory_format(device: torch.device, autocast: bool = False) -> torch.memory_format:
    """The memory layout of weights that makes convolutions fast.

    It is channels last, except for bfloat16 on a CPU (notebook 08).
    """
    if device.type == "cpu" and autocast and has_bfloat16(device):
        return torch.contiguous_format
    return torch.channels_last


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Return once all processes are here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def share(whole: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have: every world-th row, maybe none."""
    rank, world = rank_and_world()
    return whole[rank::world]


def gather(part: Tensor, count: int) -> Tensor:
    """The opposite of `share`: all parts, in every process, as (count, ...) in the old order."""
    _, world = rank_and_world()
    if world == 1:
        return part
    rows = -(-count // world)
    longest = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
    parts = [torch.empty_like(longest) for _ in range(world)]
    dist.all_gather(parts, longest)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]
