"""What this installation can do, as numbers and reasons: read it instead of trying."""

from typing import TypedDict


class BackendStatus(TypedDict):
    """Whether a buffer can have the backend here; `reason` says what it needs or lacks."""

    built: bool
    available: bool
    reason: str


class Capabilities(TypedDict):
    """Limits of Buffer and its calls. Dtypes are names in torch: `getattr(torch, name)`."""

    max_topk: int
    max_ranks: int
    min_slots: int
    max_slots: int
    max_hidden: int
    row_align_bytes: int  # a row of x is a multiple of this
    hidden_multiple: dict[str, int]  # dtype -> hidden is a multiple of it
    dispatch_dtypes: tuple[str, ...]
    combine_dtypes: tuple[str, ...]  # of expert outputs, bias and results
    index_dtypes: tuple[str, ...]  # of topk_idx
    weight_dtypes: tuple[str, ...]  # of topk_weights given to dispatch; float32 inside
    layouts: tuple[str, ...]
    quantize: tuple[str, ...]
    scale_blocks: tuple[int, ...]  # elements that share a scale
    backends: dict[str, BackendStatus]


def capabilities() -> Capabilities:
    """Describe what this build supports and which backends this machine has.

    Needs no group, no buffer and no GPU; nothing is created. Values are plain, ready for JSON.

    Returns:
        Capabilities: for example `{"max_topk": 32, "layouts": ("compact", "grouped", "slab"),
        "backends": {"cpu": {"built": True, "available": True, "reason": ...}, ...}, ...}`.

    Cost: the first call imports torch.
    """
    from ep_comm import checks, handle

    def names(dtypes: tuple[object, ...]) -> tuple[str, ...]:
        return tuple(str(d).removeprefix("torch.") for d in dtypes)

    return {
        "max_topk": checks.MAX_TOPK,
        "max_ranks": checks.MAX_RANKS,
        "min_slots": checks.MIN_SLOTS,
        "max_slots": checks.MAX_SLOTS,
        "max_hidden": checks.MAX_HIDDEN,
        "row_align_bytes": checks.ROW_ALIGN,
        "hidden_multiple": {
            checks.dtype_name(d): checks.hidden_multiple(d) for d in checks.DISPATCHABLE
        },
        "dispatch_dtypes": names(checks.DISPATCHABLE),
        "combine_dtypes": names(checks.QUANTIZABLE),
        "index_dtypes": names(checks.IDS),
        "weight_dtypes": names(checks.WEIGHTS),
        "layouts": handle.LAYOUTS,
        "quantize": checks.QUANTIZE,
        "scale_blocks": checks.SCALE_BLOCKS,
        "backends": _backends(),
    }


def _backends() -> dict[str, BackendStatus]:
    """The backends by name, those that this build lacks too."""
    import torch
    import torch.distributed as dist

    from ep_comm._build_info import build_info

    found = dist.is_available()
    need = "needs a store that all ranks reach" if found else "torch was built without distributed"
    missing = build_info()["cuda_missing"]
    gpu = missing is None and torch.cuda.is_available()
    built = missing is None
    across = "needs CUDA ranks on several nodes"
    if missing is not None:
        across = missing
    elif (no_network := build_info()["nvshmem_missing"]) is not None:
        across = f"{across}; only pretended ones, of one process, without NVSHMEM: {no_network}"
    if missing is None:
        missing = "needs CUDA ranks on one host" if gpu else "torch sees no GPU here"
    return {
        "cpu": {"built": True, "available": True, "reason": "needs CPU tensors, ranks on one host"},
        "collective": {"built": True, "available": found, "reason": need},
        "nvlink": {"built": built, "available": gpu, "reason": missing},
        "hybrid": {"built": built, "available": gpu, "reason": across},
    }
