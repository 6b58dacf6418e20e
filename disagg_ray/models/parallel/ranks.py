"""One process's membership in a gang: the processes that compute one request together."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disagg_ray.config.parallel import ParallelConfig

T = TypeVar("T")

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By device; words between ranks are tensors on the CPU, so they pass through gloo in either case."""


class Ranks:
    """This process's rank and its groups. Every method but `leave` is called by all ranks, in the same order.

    A rank that waits longer than `timeout_s` for another one gets torch's error (`dist.DistError` or `RuntimeError`);
    with NCCL, torch ends its process.
    """

    def __init__(self, parallel: ParallelConfig, device: str, mesh: DeviceMesh) -> None:
        self.rank = dist.get_rank()
        self.size = parallel.size
        self.parallel = parallel
        self.device = device
        self.mesh = mesh
        """Dimensions cfg, ring and ulysses."""

    @classmethod
    def join(cls, rank: int, address: str, parallel: ParallelConfig, device: str, timeout_s: float) -> Ranks:
        """Meet the other ranks at `address` (host:port), where rank 0 listens; return when all are there.

        `device` is cpu or cuda; each process must see exactly one GPU.
        """
        host, port = address.rsplit(":", 1)
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host.strip("[]"), int(port), parallel.size, is_master=rank == 0, timeout=timeout)
        dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=parallel.size, timeout=timeout)
        shape = (parallel.cfg, parallel.ring, parallel.ulysses)
        return cls(parallel, device, init_device_mesh(device, shape, mesh_dim_names=("cfg", "ring", "ulysses")))

    def share(self, value: T | None, tensors: Mapping[str, Tensor] | None) -> tuple[T, dict[str, Tensor]]:
        """Give rank 0's value and tensors to all; the other ranks' arguments do not count.

        The value is pickled: ranks trust each other. Tensors arrive on the gang's device, whatever rank 0 has them on.
        """
        sent = tensors or {}
        words = [(value, {name: (tensor.shape, tensor.dtype) for name, tensor in sent.items()})]
        dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
        value, shapes = words[0]
        assert value is not None
        shared = {}
        for name, (shape, dtype) in shapes.items():
            tensor = sent[name] if self.rank == 0 else torch.empty(shape, dtype=dtype, device=self.device)
            shared[name] = tensor.to(self.device).contiguous()
            if tensor.numel():
                dist.broadcast(shared[name].view(-1).view(torch.uint8), src=0)  # gloo does not know all dtypes
        return value, shared

    def agree(self, go: bool) -> bool:
        """Return rank 0's word on every rank."""
        word = torch.tensor([go], dtype=torch.uint8)
        dist.broadcast(word, src=0)
        return bool(word)

    @property
    def branch(self) -> int:
        """Which half of guidance is this rank's: 0 with the prompt, 1 with the negative prompt."""
        return int(self.mesh["cfg"].get_local_rank())

    def gather_branches(self, own: Tensor) -> tuple[Tensor, ...]:
        """Return what each half of guidance predicted, in the order of `branch`."""
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.parallel.cfg)]
        dist.all_gather(parts, own.contiguous(), group=self.mesh["cfg"].get_group())
        return tuple(parts)

    def leave(self) -> None:
        """Take this process out of its gang; the others may be gone already."""
        dist.destroy_process_group()
