"""A recorded routing: which experts every token chose, step by step and layer by layer.

Files are safetensors or npz with one array of ids, int [steps, layers, tokens, top-k], -1 = none:
the array named "topk_idx", or the only one. The number of experts is the metadata entry
"num_experts" (safetensors) or the array of that name (npz), else the largest id plus one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm.errors import make_error

NAME: Final = "topk_idx"
_DTYPES: Final = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_MAX_HEADER: Final = 1 << 20


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing decisions. S steps, L layers, T tokens a step, K top-k, E experts.

    Raises:
        EPArgumentError: E201 another shape, E213 an id that names no expert.
    """

    ids: Tensor  # int64 [S, L, T, K], -1 = none
    num_experts: int

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.dim() != 4 or ids.dtype != torch.int64:
            got = f"{ids.dtype} {list(ids.shape)}"
            raise make_error("E201", f"rejected trace: got {got}, want int64 [S, L, T, K]")
        if ids.numel() > 0 and not -1 <= int(ids.min()) <= int(ids.max()) < self.num_experts:
            raise make_error("E213", f"rejected trace: ids outside [-1, {self.num_experts})")

    @property
    def num_steps(self) -> int:
        return self.ids.shape[0]

    @property
    def num_layers(self) -> int:
        return self.ids.shape[1]

    @property
    def num_topk(self) -> int:
        return self.ids.shape[3]

    def steps(self, which: slice) -> Trace:
        """Some of the steps."""
        return Trace(self.ids[which], self.num_experts)

    def of_layer(self, layer: int) -> Tensor:
        """int64 [S * T, K] all tokens of a layer."""
        return self.ids[:, layer].flatten(0, 1)

    def step_load(self) -> Tensor:
        """float64 [S, L, E] selections of each expert."""
        steps, layers = self.ids.shape[:2]
        flat = self.ids.flatten(2) + 1  # "none" is counted, too, and cut off
        count = torch.zeros((steps, layers, self.num_experts + 1), dtype=torch.int64)
        count.scatter_add_(2, flat, torch.ones_like(flat))
        return count[..., 1:].to(torch.float64)

    def load(self) -> Tensor:
        """float64 [L, E] selections of each expert, over all steps."""
        return self.step_load().sum(0)

    def together(self) -> Tensor:
        """float32 [L, E, E] tokens that chose both experts of a pair; the diagonal is 0.

        Cost: one matrix product [E, S * T] x [S * T, E] per layer.
        """
        pairs = torch.empty((self.num_layers, self.num_experts, self.num_experts))
        for layer in range(self.num_layers):
            ids = self.of_layer(layer) + 1
            chosen = torch.zeros((ids.shape[0], self.num_experts + 1)).scatter_(1, ids, 1.0)[:, 1:]
            pairs[layer] = chosen.T @ chosen
            pairs[layer].fill_diagonal_(0)
        return pairs

    # ---- files ----

    @classmethod
    def read(cls, path: Path | str, num_experts: int | None = None) -> Trace:
        """Read a .safetensors or .npz file.

        Args:
            num_experts: E, when the file does not say.
        Raises:
            EPArgumentError: E203, not such a file; E201, E213, not such an array.
            OSError: it cannot be read.
        """
        path = Path(path)
        if path.suffix == ".npz":
            ids, said = _read_npz(path)
        elif path.suffix == ".safetensors":
            ids, said = _read_safetensors(path)
        else:
            raise make_error("E203", f"rejected {path.name}: want a .safetensors or .npz file")
        largest = int(ids.max()) + 1 if ids.numel() > 0 else 1
        return cls(ids.to(torch.int64), num_experts or said or largest)

    def write(self, path: Path | str) -> None:
        """Write a .safetensors or .npz file; int32, or int16 where that is enough."""
        path = Path(path)
        ids = self.ids.to(torch.int16 if self.num_experts <= 1 << 15 else torch.int32).contiguous()
        if path.suffix == ".npz":
            import numpy

            numpy.savez_compressed(path, topk_idx=ids.numpy(), num_experts=self.num_experts)
            return
        if path.suffix != ".safetensors":
            raise make_error("E203", f"rejected {path.name}: want a .safetensors or .npz name")
        data = ids.view(torch.uint8).flatten().numpy().tobytes()
        header: dict[str, Any] = {
            "__metadata__": {"num_experts": str(self.num_experts)},
            NAME: {
                "dtype": "I16" if ids.dtype == torch.int16 else "I32",
                "shape": list(ids.shape),
                "data_offsets": [0, len(data)],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _choose(names: Mapping[str, Any], path: Path) -> str:
    if NAME in names:
        return NAME
    if len(names) == 1:
        return next(iter(names))
    what = f"rejected {path.name}: arrays {sorted(names)}, want one named {NAME!r}"
    raise make_error("E203", what)


def _read_npz(path: Path) -> tuple[Tensor, int | None]:
    import zipfile

    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            said = int(arrays["num_experts"]) if "num_experts" in arrays else None
            name = _choose({n: None for n in arrays.files if n != "num_experts"}, path)
            array = arrays[name]
    except (ValueError, zipfile.BadZipFile) as error:
        raise make_error("E203", f"rejected {path.name}: {error}") from error
    if array.dtype.kind not in "iu":
        raise make_error("E200", f"rejected {path.name}: {array.dtype}, want integers")
    return torch.from_numpy(array.astype(numpy.int64)), said


def _read_safetensors(path: Path) -> tuple[Tensor, int | None]:
    """The whole format: 8 bytes of length, a JSON header, the arrays. Nothing in it is trusted."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(_MAX_HEADER, len(data) - 8):
        raise make_error("E203", f"rejected {path.name}: no header of a safetensors file")
    try:
        header = json.loads(data[8 : 8 + size])
        said = header.pop("__metadata__", {}).get("num_experts")
        entry = header[_choose(header, path)]
        dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
        start, end = (8 + size + int(n) for n in entry["data_offsets"])
        number = None if said is None else int(said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"rejected {path.name}: header of no integer array ({error!r})"
        raise make_error("E203", what) from error
    if min(shape, default=0) < 0 or not 8 + size <= start <= end <= len(data):
        raise make_error("E203", f"rejected {path.name}: array outside the file")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise make_error("E203", f"rejected {path.name}: {end - start} bytes for {shape}")
    if start == end:
        return torch.empty(shape, dtype=dtype), number
    return torch.frombuffer(bytearray(data[start:end]), dtype=dtype).view(shape), number
