"""Stage 8, the hardware at hand: what it is fast with, and several processes, one for each GPU or share of the cores.

Started by `torchrun --nproc-per-node=2 program.py`, every process runs the same program and draws the same random
numbers, then works on its own share of each batch. Started without torchrun there is one process, and its share is the whole.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def get_device() -> torch.device:
    """CUDA where it is present, else the CPU. Started by torchrun, the process joins the others and has a GPU of its own."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Does the device calculate in bfloat16? GPUs since Ampere and CPUs with AVX-512 BF16 do; others imitate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def memory_format(device: torch.device, autocast: bool = False) -> torch.memory_format:
    """The layout of weights in memory that makes convolutions fast: channels last, but for bfloat16 on a CPU (notebook 08)."""
    return torch.contiguous_format if device.type == "cpu" and autocast and has_bfloat16(device) else torch.channels_last


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(whole: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have: every world-th row, so that no two parts overlap."""
    rank, world = rank_and_world()
    return whole[rank::world]


def gather(part: Tensor, count: int) -> Tensor:
    """The opposite of `share`: all parts, in every process, as (count, ...) in the old order."""
    _, world = rank_and_world()
    if world == 1:
        return part
    longest = torch.cat([part, part.new_zeros(-(-count // world) - len(part), *part.shape[1:])])
    parts = [torch.empty_like(longest) for _ in range(world)]
    dist.all_gather(parts, longest)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]
