"""Stage 8, several processes, one for each GPU or share of the cores: `torchrun --nproc-per-node=2 program.py`.

Every process runs the same program and draws the same random numbers, then works on its own share of each batch.
Started without torchrun there is one process, and its share is the whole.
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
