"""The training loop of the tiny models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """How long and how wide a stage trains."""

    seconds: float
    max_steps: int
    batch: int
    learning_rate: float
    num_clips: int
    """Clips whose latents are kept to train a transformer on, and to measure."""
    num_frames: int
    """Of the VAE's clips."""
    device: str
    graph: bool
    """Replay a step as one CUDA graph, and compile what it repeats."""


def fit(
    path: Path, plan: Plan, modules: Iterable[nn.Module], loss: Callable[[], Tensor], save: Callable[[], None]
) -> list[float]:
    """Minimise `loss` by AdamW until the plan's seconds or steps are over; save every minute and at the end.

    A step may become one CUDA graph, so `loss` draws its batch from tensors that are on the device already.
    Returns some of the losses, and adds them to `path`.txt."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    rate = torch.zeros((), device=plan.device)
    step = make_step(parameters, rate, plan, loss)

    def report(num_steps: int) -> None:
        seconds = time.monotonic() - begin
        print(f"{path.name}: {num_steps} steps, {seconds:.0f} s, loss {mean(losses[-50:]):.5f}", flush=True)

    begin = saved = time.monotonic()
    replay = capture(step) if plan.graph else step
    few = plan.max_steps < 1000
    warm_up = plan.max_steps / 10 if few else 100
    losses: list[float] = []
    for index in range(plan.max_steps):
        done = max((time.monotonic() - begin) / plan.seconds, index / plan.max_steps)
        if done >= 1:
            break
        rate.fill_(plan.learning_rate * min(1, (index + 1) / warm_up) * min(1, (1 - done) / 0.4))
        value = replay()
        if few or index % 20 == 0:
            losses.append(value.item())  # waits for the device, which keeps its queue short
            if time.monotonic() - saved > 60:
                save()
                saved = time.monotonic()
        if index % 1000 == 0:
            report(index + 1)
    with path.with_suffix(".txt").open("a") as log:
        log.writelines(f"{value:.6f}\n" for value in losses)
    save()
    report(index + 1)
    return losses


def make_step(
    parameters: list[nn.Parameter], rate: Tensor, plan: Plan, loss: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    """Return what does one step of AdamW at the learning rate `rate`, and returns the loss."""
    optimiser = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True, capturable=plan.graph
    )

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return value.detach()

    return step


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return what replays `step` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def replay() -> Tensor:
        graph.replay()
        return value

    return replay
