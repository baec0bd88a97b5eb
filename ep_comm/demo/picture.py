"""One picture of a run: what both models learned, and where the tokens went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

_INK: Final = "#1f2933"
_FAINT: Final = "#7b8794"
_RANKS: Final = "#2f80ed"  # the expert-parallel run
_ONE: Final = "#d64545"  # the single process


@dataclass
class Curves:
    """What there is to draw."""

    ranks: Tensor  # [steps] loss of the expert-parallel run, mean over the batch
    single: Tensor | None  # [steps] of the single process
    difference: float | None  # largest of any step and shard
    unigram: float  # entropy of the text's bytes, nats: a model that only counts them
    load: Tensor  # [steps, layers, experts] rows
    num_ranks: int
    owner: list[int]  # rank of each expert
    caption: str


def draw(curves: Curves, path: Path) -> None:
    """Write the picture as PNG, SVG or PDF, by the ending of `path`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    num_layers = curves.load.shape[1]
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.titlecolor": _INK,
        "text.color": _INK,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1 + num_layers,
            1,
            figsize=(10, 4.2 + 2.4 * num_layers),
            height_ratios=[1.6] + [1.0] * num_layers,
            sharex=True,
            layout="constrained",
        )
        _draw_losses(axes[0], curves)
        for layer in range(num_layers):
            image = _draw_load(axes[1 + layer], curves, layer)
        axes[-1].set_xlabel("training step")
        bar = figure.colorbar(image, ax=list(axes[1:]), pad=0.01, aspect=30, extend="max")
        bar.set_label("tokens of an expert / even share")
        bar.outline.set_visible(False)
        figure.suptitle(curves.caption, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_losses(axes: Any, curves: Curves) -> None:
    steps = range(1, len(curves.ranks) + 1)
    label = f"{curves.num_ranks} ranks, experts spread over them"
    axes.plot(steps, curves.ranks.numpy(), color=_RANKS, linewidth=4.5, alpha=0.35, label=label)
    if curves.single is not None:
        axes.plot(
            steps,
            curves.single.numpy(),
            color=_ONE,
            linewidth=1.1,
            label="one process, all experts",
        )
        text = f"largest difference: {curves.difference:.1e}"
        if curves.difference == 0:
            text = f"equal, bit for bit, in all {len(curves.ranks)} steps"
        axes.text(0.985, 0.7, text, transform=axes.transAxes, ha="right", color=_INK)
    axes.axhline(curves.unigram, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "entropy of single bytes",
        (0.985, curves.unigram),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=_FAINT,
    )
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("Loss", loc="left")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, alpha=0.15)
    axes.set_ylim(bottom=0)


def _draw_load(axes: Any, curves: Curves, layer: int) -> Any:
    load = curves.load[:, layer].float()  # [steps, experts]
    share = load / load.mean(1, keepdim=True).clamp(min=1)
    num_steps, num_experts = share.shape
    image = axes.imshow(
        share.T.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0,
        vmax=2,
        extent=(0.5, num_steps + 0.5, num_experts - 0.5, -0.5),
    )
    for expert in range(1, num_experts):
        if curves.owner[expert] != curves.owner[expert - 1]:
            axes.axhline(expert - 0.5, color="white", linewidth=1.2)
    for rank in sorted(set(curves.owner)):
        mine = [e for e, r in enumerate(curves.owner) if r == rank]
        middle = sum(mine) / len(mine)
        axes.annotate(
            f"rank {rank}",
            (1.008, middle),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=_INK,
        )
    axes.set_yticks(range(0, num_experts, max(1, num_experts // 8)))
    axes.tick_params(length=2)
    axes.set_ylabel("expert")
    axes.set_title(f"Load of the experts, MoE layer {layer + 1}", loc="left")
    axes.spines[:].set_visible(False)
    return image


def unigram_entropy(text: bytes) -> float:
    """Nats per byte of a model that knows only how often each byte occurs."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
    share = counts[counts > 0].double() / len(text)
    return float(-(share * share.log()).sum())
