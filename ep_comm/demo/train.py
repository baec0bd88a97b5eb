"""The training loop of one rank, which is also that of the one process it is compared with.

A step's batch has as many shards as the run has ranks. Whoever holds a shard computes its partial
gradients; these are added in the order of the shards, wherever they were computed. Nothing else is
summed across ranks but what dispatch and combine add, in their documented order. So the numbers do
not depend on how many processes share the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ep_comm.buffer import Buffer
from ep_comm.demo.model import LanguageModel, Size, forward, make_replicas

LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
BALANCE = 0.05  # how much of the routers' balance loss is added


@dataclass(frozen=True)
class Job:
    """A training run; picklable, the same on all ranks."""

    text: bytes
    num_shards: int
    steps: int
    seed: int = 0
    size: Size = field(default_factory=Size)
    backend: str = "auto"


@dataclass
class Report:
    """What one rank saw."""

    losses: Tensor  # float32 [steps, shards here] mean over tokens, nats per byte
    load: Tensor  # int32 [steps, layers, local experts] rows of each expert
    experts: list[int]  # global ids of the local experts
    dropped: int  # choices lost to the capacity factor
    choices: int  # choices made
    seconds: float  # all steps
    exchange_seconds: float  # of these, inside dispatch and combine, waiting for peers included
    gradient_seconds: float  # of these, exchanging gradients of replicated parameters
    num_parameters: int  # of this rank
    buffer: str  # repr


class TimedBuffer(Buffer):
    """Adds up the time spent in the two verbs, backward passes included."""

    seconds = 0.0

    def dispatch(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return super().dispatch(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start

    def combine(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return super().combine(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start


def train(rank: int, num_ranks: int, job: Job, progress: Any) -> Report:
    """Train; `progress` is a queue that gets (step, loss) from rank 0, or None."""
    torch.set_num_threads(1)  # ranks share the machine, and one thread adds in one order
    num_here = job.num_shards // num_ranks
    first = rank * num_here
    size = job.size
    with TimedBuffer(
        num_experts=size.num_experts,
        num_topk=size.num_topk,
        hidden=size.hidden,
        max_tokens=num_here * size.tokens,
        backend=job.backend,
        device="cpu",
    ) as buffer:
        replicas = make_replicas(size, buffer, job.seed, num_here)
        return _Run(rank, num_ranks, job, buffer, replicas, first).run(progress)


class Adam:
    """Kingma and Ba 2014. `torch.optim` would take a second to import, on every rank."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float, beta1: float = 0.9, beta2: float = 0.95) -> None:
        self.steps += 1
        for p, (mean, square) in zip(self.parameters, self.moments, strict=True):
            grad = _gradient(p)
            mean.mul_(beta1).add_(grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            scale = (square / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
            p.addcdiv_(mean, scale, value=-rate / (1 - beta1**self.steps))


class _Run:
    def __init__(
        self,
        rank: int,
        num_ranks: int,
        job: Job,
        buffer: TimedBuffer,
        replicas: list[LanguageModel],
        first: int,
    ) -> None:
        self.rank, self.num_ranks, self.job, self.buffer = rank, num_ranks, job, buffer
        self.replicas, self.model, self.first_shard = replicas, replicas[0], first
        self.text = torch.frombuffer(bytearray(job.text), dtype=torch.uint8)
        self.adam = Adam(list(self.model.parameters()))
        self.gradient_seconds = 0.0

    def run(self, progress: Any) -> Report:
        losses, load, dropped = [], [], 0
        self.buffer.seconds = 0.0
        start = time.perf_counter()
        for step in range(self.job.steps):
            losses.append(self.step(step))
            moes = self.model.moe_layers()
            load.append(torch.stack([moe.load for moe in moes]))
            dropped += sum(moe.dropped for r in self.replicas for moe in r.moe_layers())
            if progress is not None and self.rank == 0:
                progress.put((step, float(losses[-1].mean())))
        size, shards = self.job.size, len(self.replicas)
        return Report(
            losses=torch.stack(losses),
            load=torch.stack(load),
            experts=self.buffer.local_experts,
            dropped=dropped,
            choices=self.job.steps * shards * size.tokens * size.num_topk * size.num_layers,
            seconds=time.perf_counter() - start,
            exchange_seconds=self.buffer.seconds,
            gradient_seconds=self.gradient_seconds,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            buffer=repr(self.buffer),
        )

    def step(self, step: int) -> Tensor:
        """One step; the loss of every shard here."""
        shards = [self.batch(step, self.first_shard + s) for s in range(len(self.replicas))]
        outputs = forward(self.replicas, [x for x, _ in shards])
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), y.flatten())
            for logits, (_, y) in zip(outputs, shards, strict=True)
        ]
        balance = [
            sum(moe.balance_loss for moe in replica.moe_layers()) for replica in self.replicas
        ]
        totals = [
            (loss + BALANCE * even) / self.job.num_shards
            for loss, even in zip(losses, balance, strict=True)
        ]
        torch.autograd.backward(totals)
        self.add_gradients()
        self.adam.step(LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS))
        for replica in self.replicas:
            replica.zero_grad(set_to_none=True)
        return torch.stack(losses).detach()

    def batch(self, step: int, shard: int) -> tuple[Tensor, Tensor]:
        """Sequences of a shard, and the bytes that follow; the same wherever it is computed."""
        size = self.job.size
        numbers = torch.Generator().manual_seed((self.job.seed * 1_000_003 + step) * 1009 + shard)
        last = self.text.numel() - size.length - 1
        start = torch.randint(0, last + 1, (size.batch, 1), generator=numbers)
        window = self.text[start + torch.arange(size.length + 1)].long()
        return window[:, :-1], window[:, 1:]

    def add_gradients(self) -> None:
        """Sum the gradients of replicated parameters over all shards, in the shards' order."""
        start = time.perf_counter()
        here = torch.stack([_flat_gradient(replica) for replica in self.replicas])
        total = _sum_in_order(_gather(here, self.num_ranks))
        at = 0
        for p in self.model.replicated():
            p.grad = total[at : at + p.numel()].view_as(p)
            at += p.numel()
        self.gradient_seconds += time.perf_counter() - start


def _flat_gradient(model: LanguageModel) -> Tensor:
    return torch.cat([_gradient(p).flatten() for p in model.replicated()])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _gather(rows: Tensor, num_ranks: int) -> Tensor:
    """Rows of all ranks, by rank."""
    if num_ranks == 1:
        return rows
    everybody = [torch.empty_like(rows) for _ in range(num_ranks)]
    torch.distributed.all_gather(everybody, rows)
    return torch.cat(everybody)


def _sum_in_order(rows: Sequence[Tensor] | Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
