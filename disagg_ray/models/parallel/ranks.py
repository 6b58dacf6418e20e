"""One process's membership in a gang: the processes that compute one request together."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disagg_ray.config.parallel import ParallelConfig

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor that the ranks share, by name."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By device; words between ranks are tensors on the CPU, so they pass through gloo in either case."""


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


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
        """Dimensions rows, cfg, ring and ulysses."""

    @classmethod
    def join(cls, rank: int, address: str, parallel: ParallelConfig, device: str, timeout_s: float) -> Ranks:
        """Meet the other ranks at `address` (host:port), where rank 0 listens; return when all are there.

        `device` is cpu or cuda; each process must see exactly one GPU.
        """
        host, port = address.rsplit(":", 1)
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host.strip("[]"), int(port), parallel.size, is_master=rank == 0, timeout=timeout)
        dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=parallel.size, timeout=timeout)
        shape = (parallel.rows, parallel.cfg, parallel.ring, parallel.ulysses)
        return cls(parallel, device, init_device_mesh(device, shape, mesh_dim_names=("rows", "cfg", "ring", "ulysses")))

    def share(self, layout: Layout, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Give rank 0's tensors, which have this layout, to all ranks, on the gang's device.

        Bytes of tensors are all that ranks send each other: these connections are not authenticated, and what is
        unpickled can run code. Everything else comes through Ray.
        """
        shared = {}
        for name, (shape, dtype) in layout.items():
            tensor = torch.empty(shape, dtype=dtype, device=self.device) if tensors is None else tensors[name]
            shared[name] = tensor.to(self.device).contiguous()
            if tensor.numel():
                dist.broadcast(shared[name].view(-1).view(torch.uint8), src=0)  # gloo does not know all dtypes
        return shared

    def agree(self, word: int) -> int:
        """Return rank 0's word on every rank."""
        shared = torch.tensor(word)
        dist.broadcast(shared, src=0)
        return int(shared)

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
