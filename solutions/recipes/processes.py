"""Several processes that train one model, on one machine or more: `torchrun --nproc-per-node 2 -m solutions.recipes...`

torchrun starts the same program several times and tells each copy, in its environment, which one it is. Every copy
holds the whole model and computes the gradients of its share of each batch; before the optimizer's step these are
averaged (`DistributedDataParallel`), so that all copies take the same step and stay the same. Copy 0 alone evaluates
and writes. Started without torchrun there is one process, and nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes, if torchrun started this one, and leave them at the end; yields the device to use.

    On GPUs each process of a machine gets one of its own and they talk through NCCL, on CPUs through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            stop(f"Every process needs a GPU of its own, and here are {torch.cuda.device_count()}: use --device cpu.")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()  # none leaves while another still talks to it: gloo may end a process that does
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Which of the processes this is: 0, which also evaluates and writes, up to `count() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train the model together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def stop(reason: str) -> None:
    """End every process; the first one says why."""
    raise SystemExit(reason if int(os.environ.get("RANK", "0")) == 0 else 1)


def share(batch: Tensor) -> Tensor:
    """The rows of the batch that are this process's: the same number for each, so that a mean of means is the mean."""
    require_equal_shares(len(batch))
    return batch.chunk(count())[rank()]


def require_equal_shares(n_rows: int) -> None:
    """Stop unless a batch of so many rows can be dealt out evenly."""
    if n_rows % count():
        stop(f"A batch of {n_rows} rows cannot be shared evenly by {count()} processes: take a number that divides it.")


def averaging(model: nn.Module) -> nn.Module:
    """The model whose `backward` leaves the gradients' average over all processes in its parameters."""
    return nn.parallel.DistributedDataParallel(model) if count() > 1 else model


def from_first(value: Any) -> Any:
    """What the first process has here, in all of them: its checkpoint, say, which may lie on another machine."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_over_processes(value: float, device: str) -> float:
    """The mean of what each process has here."""
    if count() == 1:
        return value
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return float(total) / count()
