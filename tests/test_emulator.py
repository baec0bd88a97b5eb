"""What stands in for torch.cuda under --emulator, held to what torch does on a GPU."""

from __future__ import annotations

import gc
import re
import threading
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from emulator.lacks import LACKS, SLOW

gpu = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def test_every_test_that_the_emulator_lacks_something_for_exists() -> None:
    folder = Path(__file__).parent
    names = [
        f"{file.name}::{name}"
        for file in folder.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    for pattern in [*SLOW, *(pattern for patterns in LACKS.values() for pattern in patterns)]:
        assert any(fnmatchcase(name, pattern.partition("[")[0]) for name in names), pattern


@gpu
def test_tensors_say_where_they_are() -> None:
    host = torch.arange(6)
    there = [
        host.cuda(), host.to("cuda"), host.to(GPU, torch.float32), torch.zeros(0, device="cuda"),
        torch.empty((2, 3), device=GPU), torch.tensor([1], device="cuda"),
    ]  # fmt: skip
    x = there[0]
    there += [
        x[2:], x.view(2, 3).t(), x + 1, x.float(), torch.empty_like(x), x.new_zeros(0),
        torch.stack([x, x]), x[host], x.to(torch.int32), host.to(x), *x.split(2),
    ]  # fmt: skip
    for tensor in there:
        assert tensor.device == GPU
        assert tensor.is_cuda
        assert not tensor.is_cpu
    for tensor in (
        host,
        x.cpu(),
        x.to("cpu"),
        host.to(torch.int32),
        torch.empty_like(x, device="cpu"),
    ):
        assert tensor.device == torch.device("cpu")
        assert not tensor.is_cuda
    assert x.cuda() is x
    assert host.cpu() is host
    assert x.tolist() == x.cpu().tolist() == list(range(6))


@gpu
def test_copies_between_host_and_gpu_share_nothing() -> None:
    host = torch.zeros(3)
    there = host.cuda()
    host += 1
    assert there.tolist() == [0, 0, 0]
    host.copy_(there)
    assert not host.is_cuda
    assert host.tolist() == [0, 0, 0]
    back = there.cpu()
    there += 1
    assert back.tolist() == [0, 0, 0]


@gpu
def test_where_a_tensor_is_outlives_its_names() -> None:
    x = torch.ones(4, device="cuda")
    part = x[1:3]
    del x
    gc.collect()
    assert part[:1].device == GPU


@gpu
def test_gradients_are_where_their_tensors_are() -> None:
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            seen.append(dy.device)
            return dy * torch.full((), 2.0, device=dy.device)

    x = torch.ones(4, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert seen == [GPU]
    assert x.grad is not None
    assert x.grad.device == GPU
    assert x.grad.tolist() == [2.0] * 4


@gpu
def test_threads_begin_on_the_default_stream_and_see_the_gpu() -> None:
    found = []

    def look() -> None:
        found.append(torch.cuda.current_stream() == torch.cuda.default_stream())
        found.append(torch.zeros(1, device="cuda").is_cuda)

    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == [True, True]


@gpu
def test_events_say_when_what_was_queued_is_over() -> None:
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    event = one.record_event()
    other.wait_event(event)
    other.wait_stream(one)
    other.synchronize()
    assert event.query()
    assert one.query()
    assert other.query()
