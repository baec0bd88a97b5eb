"""Every instruction set that this processor runs gives the same bits, and those of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import compare
import pytest
import torch
from torch import Tensor

from ep_comm import Buffer, Received, _core, reference

NAMES = ("portable", "avx2", "avx512")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows that end in the middle of a vector of every width, and one that fills many.
HIDDENS = (8, 24, 40, 72, 136, 264, 1000)


@pytest.fixture(params=NAMES)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if not _core.force_simd(name):
        pytest.skip(f"this processor does not run {name}")
    assert _core.simd() == name
    yield name
    _core.force_simd(None)


def all_bit_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type; for fp32 all exponents with assorted mantissas."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    exponents = torch.arange(512).to(torch.int32) << 23
    mantissas = torch.tensor([0, 1, 0x7FFFFF, 0x400000, 0x0FFFFF, 0x100000, 0x7FFF, 0x8000, 0x8001])
    random = torch.randint(0, 2**23, (119,), generator=torch.Generator().manual_seed(1))
    return (exponents[:, None] | torch.cat([mantissas, random]).to(torch.int32)).view(dtype)


def one_rank(hidden: int, tokens: int, topk: int = 4) -> Buffer:
    return Buffer(num_experts=8, num_topk=topk, hidden=hidden, max_tokens=tokens, device="cpu")


def identity(tokens: int, topk: int = 4) -> Tensor:
    """Distinct experts: as many rows per token, in slot order, as there are slots."""
    return torch.arange(topk).expand(tokens, topk).contiguous()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_conversions_are_those_of_torch_for_every_value(simd: str, dtype: torch.dtype) -> None:
    values = all_bit_patterns(dtype).flatten()
    hidden = 512
    x = values.view(-1, hidden)
    with one_rank(hidden, x.shape[0], 1) as buffer:
        recv = buffer.dispatch(x, identity(x.shape[0], 1), layout="grouped")
        compare.same_bits(recv.x, x)
        compare.same_values(buffer.combine(recv.x, recv.handle), x + 0.0)  # 0 + -0.0 = 0.0
        # Rounding: an addition of two terms of every magnitude.
        bias = x.flip(0).contiguous()
        want = (bias.float() + x.float()).to(dtype)
        compare.same_values(buffer.combine(recv.x, recv.handle, bias=bias), want)


@pytest.mark.parametrize("kind", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_quantization_is_that_of_the_reference_for_every_value(
    simd: str, dtype: torch.dtype, kind: str
) -> None:
    values = all_bit_patterns(dtype).flatten()
    g = torch.Generator().manual_seed(3)
    shuffled = values[torch.randperm(values.numel(), generator=g)]
    scale = torch.exp2(torch.randint(-30, 30, (128, 512), generator=g).float())
    ordinary = (torch.randn(128, 512, generator=g) * scale).to(dtype)
    x = torch.cat([values.view(-1, 512), shuffled.view(-1, 512), ordinary])
    with one_rank(512, x.shape[0], 1) as buffer:
        for block in (32, 128):
            q, scales = reference.quantize(x, kind=kind, scale_block=block)
            recv = buffer.dispatch(x, identity(x.shape[0], 1), quantize=kind, scale_block=block)
            compare.same_values(recv.x, q, f"q, blocks of {block}")
            compare.same_values(recv.scales, scales, f"scales, blocks of {block}")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("hidden", HIDDENS)
def test_sums_are_those_of_the_reference_for_every_row_length(
    simd: str, hidden: int, dtype: torch.dtype, weighted: bool
) -> None:
    tokens, topk = 6, 4
    g = torch.Generator().manual_seed(hidden)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    weights = torch.randn(tokens, topk, generator=g)
    with one_rank(hidden, tokens) as buffer:
        recv: Received = buffer.dispatch(x, identity(tokens), weights, layout="grouped")
        y = torch.randn(recv.x.shape, generator=g).to(dtype)
        biases = [torch.randn(tokens, hidden, generator=g).to(dtype) for _ in range(2)]
        for bias in ((None, None), (biases[0], None), (None, biases[1]), (biases[0], biases[1])):
            want = reference.combine([y], [recv.handle], weighted=weighted, bias=[bias])
            got = buffer.combine(y, recv.handle, weighted=weighted, bias=bias)
            compare.same_values(got, want[0], f"{[b is not None for b in bias]}")


@pytest.mark.parametrize("row_bytes", [16, 32, 48, 80, 112, 128, 144, 272, 4112])
def test_rows_are_copied_whole_through_and_past_the_cache(simd: str, row_bytes: int) -> None:
    tokens = (5 << 20) // row_bytes + 1  # more than what bypasses the cache
    x = torch.randint(0, 256, (tokens, row_bytes), dtype=torch.uint8)
    for count in (3, tokens):
        with one_rank(row_bytes, count, 1) as buffer:
            topk_idx = torch.zeros(count, 1, dtype=torch.int64)
            assert torch.equal(buffer.dispatch(x[:count], topk_idx).x, x[:count])


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    before = _core.simd()
    assert not _core.force_simd("mmx")
    assert _core.simd() == before
    assert _core.force_simd(None)


def test_the_widest_set_is_chosen() -> None:
    assert _core.force_simd(None)
    with open("/proc/cpuinfo") as file:
        flags: Any = next((line for line in file if line.startswith("flags")), "").split()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags):
        assert _core.simd() == "avx512"
    elif "avx2" in flags:
        assert _core.simd() == "avx2"
    else:
        assert _core.simd() == "portable"
