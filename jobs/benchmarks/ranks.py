"""Ranks without Ray, one GPU each, for the benchmarks of what they compute together."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

from disagg_ray import environment

Row = dict[str, Any]
Work = Callable[[int, int, str], list[Row]]
"""Takes a rank, the number of ranks and the address where they meet; what rank 0 returns counts."""
ANSWER_S = 600.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


def run_ranks(work: Work, num_ranks: int) -> list[Row]:
    """Return rank 0's rows, or one that says which rank failed."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ours, theirs = context.Pipe(duplex=False)
    children = []
    for rank in range(num_ranks):
        children.append(context.Process(target=_serve, args=(theirs, work, rank, num_ranks, address), daemon=True))
        environment.replace(VISIBLE, str(rank))
        children[-1].start()
    try:
        wait([ours, *(child.sentinel for child in children)], ANSWER_S)
        if not ours.poll():
            raise RuntimeError(f"{num_ranks} ranks gave no answer: one died, or {ANSWER_S:g} s were not enough")
        answer: list[Row] = ours.recv()
    finally:
        for child in children:
            child.kill()
            child.join()
    return answer


def _serve(answers: Any, work: Work, rank: int, num_ranks: int, address: str) -> None:
    try:
        torch.set_num_threads(1)
        rows = work(rank, num_ranks, address)
    except Exception as error:  # noqa: BLE001 - a way that fails is a row
        rows = [{"ranks": num_ranks, "error": " ".join(f"rank {rank}: {type(error).__name__}: {error}".split())[:500]}]
    if rank == 0 or "error" in rows[-1]:
        answers.send(rows)
    time.sleep(ANSWER_S)  # ended by the parent, once it has an answer
