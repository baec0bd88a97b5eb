"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def run_example(number: int, of: int = 2) -> dict[str, Any]:
    """What it leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == of
    names: dict[str, Any] = {}
    exec(compile(blocks[number], str(README), "exec"), names)
    return names


def test_layer_example_trains_every_parameter() -> None:
    names = run_example(0)
    moe, x = names["moe"], names["x"]
    before = names["loss"].item()
    assert all(p.grad is not None and p.grad.any() for p in moe.parameters())
    assert moe.shared is not None
    assert moe.dropped > 0  # -1 in its ids
    for _ in range(20):
        names["optimizer"].zero_grad()
        loss = (moe(x) - x).square().mean() + 0.01 * moe.balance_loss
        loss.backward()
        names["optimizer"].step()
    assert loss.item() < before


def test_verbs_example_gives_the_weighted_sum() -> None:
    names = run_example(1)
    x, ids, weights, out = (names[name] for name in ("x", "ids", "weights", "out"))
    want = torch.zeros(512, 256)
    for k in range(2):
        row = (x * (1 + ids[:, k : k + 1])).float()  # what expert `ids` makes of x, in bfloat16
        want = want + weights[:, k : k + 1] * row
    assert torch.equal(out, want.to(torch.bfloat16))
