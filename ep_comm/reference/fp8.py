"""FP8 quantization per block of a row, stated operation by operation.

Division is spelled with tensors on both sides: torch computes `number / tensor`, and on some
devices `tensor / number`, as a multiplication by a reciprocal, which rounds twice.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ep_comm.errors import make_error

KINDS: Final = ("fp8", "fp8_ue8m0")
FP8_MAX: Final = 448.0  # largest finite float8_e4m3fn
MIN_AMAX: Final = 1e-4  # keeps 448 / amax finite for a block of zeros
EXPONENTS_PER_WORD: Final = 4


def quantize(x: Tensor, *, kind: str = "fp8", scale_block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize rows to float8_e4m3fn with one scale per block of `scale_block` elements.

    With fp32 arithmetic: amax = max(max|x|, 1e-4), where a NaN stays a NaN.
    "fp8":       scale = amax / 448, q = e4m3fn(x * (448 / amax)).
    "fp8_ue8m0": scale = amax / 448 rounded up to a power of two 2^e, q = e4m3fn(x * 2^-e); the
                 scale travels as its biased exponent e + 127. A block whose amax is not finite has
                 exponent 255, which UE8M0 reads as NaN, and q is NaN throughout.

    Args:
        x: [..., H] floating point, H a multiple of scale_block ("fp8_ue8m0": of 4 * scale_block).
    Returns:
        q: float8_e4m3fn [..., H].
        scales: float32 [..., H / scale_block], or int32 [..., H / (4 * scale_block)] whose byte j
            of word i is the exponent of block 4 * i + j.
    Raises:
        EPArgumentError: E203 unknown kind or block, E211 H is not a multiple.
    """
    _check(x.shape[-1], kind, scale_block)
    num_blocks = x.shape[-1] // scale_block
    blocks = x.to(torch.float32).reshape(*x.shape[:-1], num_blocks, scale_block)
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX)  # both let NaN through
    fp8_max = torch.full_like(amax, FP8_MAX)
    scale = amax / fp8_max
    if kind == "fp8":
        inverse, scales = fp8_max / amax, scale.squeeze(-1)
    else:
        exponents = _exponent_rounded_up(scale)
        inverse, scales = _power_of_two(-exponents), _pack_exponents(exponents.squeeze(-1))
    return (blocks * inverse).to(torch.float8_e4m3fn).flatten(-2), scales


def dequantize(q: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply every block of q by its scale, in fp32, and round to `dtype`.

    Args:
        q: [..., H] one byte per element, any dtype fp32 can hold.
        scales: float32 [..., blocks] or int32 [..., blocks / 4], as `quantize` returns them; the
            block size follows from the shapes.
    Returns:
        [..., H] of dtype.
    """
    scale = scales if scales.is_floating_point() else _power_of_two(_unpack_exponents(scales))
    scale_block = q.shape[-1] // max(scale.shape[-1], 1)
    blocks = q.to(torch.float32).reshape(*scale.shape, scale_block)
    return (blocks * scale.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


def _check(hidden: int, kind: str, scale_block: int) -> None:
    if kind not in KINDS:
        raise make_error("E203", f"rejected quantize={kind}: want one of {KINDS}")
    if scale_block not in (32, 128):
        raise make_error("E203", f"rejected scale_block={scale_block}: want 32 or 128")
    multiple = scale_block * (EXPONENTS_PER_WORD if kind == "fp8_ue8m0" else 1)
    if hidden % multiple:
        raise make_error("E211", f"rejected hidden={hidden}: want multiple of {multiple}")


# A scale below is its unbiased exponent e, int32; 128 stands for "not finite".


def _exponent_rounded_up(scale: Tensor) -> Tensor:
    """Smallest e with 2^e >= scale, from the bits of a positive float32; 128 for Inf, NaN."""
    bits = scale.view(torch.int32)
    mantissa, biased = bits & 0x7FFFFF, (bits >> 23) & 0xFF
    return torch.where(biased == 255, 255, biased + (mantissa != 0)) - 127


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 2^e, exact for -127 <= e <= 127; NaN for e = 128 and its negative."""
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return torch.where(exponent.abs() == 128, float("nan"), power.to(torch.float32))


def _pack_exponents(exponent: Tensor) -> Tensor:
    """int32 [..., blocks] -> int32 [..., blocks / 4], little endian."""
    return (exponent + 127).to(torch.uint8).contiguous().view(torch.int32)


def _unpack_exponents(words: Tensor) -> Tensor:
    """int32 [..., words] -> int32 [..., 4 * words]."""
    return words.contiguous().view(torch.uint8).to(torch.int32) - 127
