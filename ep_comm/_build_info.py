"""What this build of ep_comm contains, and why the rest is missing."""

from typing import TypedDict


class BuildInfo(TypedDict):
    """`None` for what is not there; `*_missing` is then a reason for people, else `None`."""

    version: str
    build_type: str
    compiler: str
    simd: tuple[str, ...]
    cuda: str | None
    cuda_archs: tuple[str, ...]  # "90": code for sm_90; "90+PTX": later ones compile it
    cuda_missing: str | None
    nvshmem: str | None
    nvshmem_missing: str | None


def build_info() -> BuildInfo:
    """Describe the compiled core: version, compiler, instruction sets, CUDA and NVSHMEM.

    Needs no GPU and no driver; `ep-comm doctor` tells what this machine has.

    Returns:
        BuildInfo: for example `{"version": "0.1.0", "simd": ("portable", "avx2", "avx512"),
        "cuda": None, "cuda_archs": (), "cuda_missing": "nvcc was not found", ...}`.
    Raises:
        ImportError: the native core is missing; the message says how to build it.
    """
    try:
        from . import _core
    except ImportError as error:
        raise ImportError(
            f"ep_comm._core cannot be imported ({error}); "
            "build it with `pip install .`, or `make` in a checkout"
        ) from error
    made = _core.BUILD
    return {
        "version": made["version"],
        "build_type": made["build_type"],
        "compiler": made["compiler"],
        "simd": tuple(made["simd"].split()),
        "cuda": made["cuda"] or None,
        "cuda_archs": tuple(made["cuda_archs"].split()),
        "cuda_missing": made["cuda_missing"] or None,
        "nvshmem": made["nvshmem"] or None,
        "nvshmem_missing": made["nvshmem_missing"] or None,
    }
