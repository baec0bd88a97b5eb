"""The README's example runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_example_runs_and_gives_the_weighted_sum() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    x, ids, weights, out = (names[name] for name in ("x", "ids", "weights", "out"))
    want = torch.zeros(512, 256)
    for k in range(2):
        row = (x * (1 + ids[:, k : k + 1])).float()  # what expert `ids` makes of x, in bfloat16
        want = want + weights[:, k : k + 1] * row
    assert torch.equal(out, want.to(torch.bfloat16))
