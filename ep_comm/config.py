"""Options that rarely change: clocks, paranoia, masks, direct mode. See Buffer for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ep_comm.errors import make_error, shown

MAX_S: Final = 1e9  # longer than any job


@dataclass(frozen=True)
class EPConfig:
    """How long to wait for other ranks, and how far to trust the memory between them.

    Args:
        arrival_warn_s: seconds after which a peer that has not entered the operation is logged, as
            a warning W101 of the logger "ep_comm".
        arrival_s: seconds after which such a peer ends the communicator (E101); None = never. It
            limits the construction of a buffer, too (E120).
        progress_s: seconds without progress by a peer that has entered (E102). A peer whose process
            is stopped (SIGSTOP, a debugger) is given up after this time already (E101).
        paranoid: cpu backend: every dispatched row travels with a checksum over itself, its ids,
            weights, scales, place and operation, and every expert's rows are counted; damage is
            E241 or E242 on all ranks. Rows that nothing was sent to are NaN or -1 instead of
            whatever lay there. Costs a pass over all rows on both sides. The same on all ranks
            (E221).
        masking: cpu and nvlink backends, and hybrid in direct mode, up to 64 ranks: slab calls go
            on without a rank that died, left, or did not come in time, instead of ending the
            communicator; see `Buffer.masked_ranks`. On GPUs other calls then ask the device first
            whether all ranks are there. The same on all ranks (E221).
        direct: hybrid backend: small batches go straight to their ranks on other nodes, where
            memory for that is within reason: slabs, and compact outputs of sync=False, of up to
            1024 tokens a rank on up to 64 ranks. False: all goes by rails, which takes less memory.
            Results are the same bit for bit. The same on all ranks (E221).
    Raises:
        EPArgumentError: E203, a limit is not a positive number, or another option is no bool.

    Clocks are run-time seconds of the wall clock and may differ between ranks.
    """

    arrival_warn_s: float = 5.0
    arrival_s: float | None = 600.0
    progress_s: float = 30.0
    paranoid: bool = False
    masking: bool = False
    direct: bool = True

    def __post_init__(self) -> None:
        for name in ("arrival_warn_s", "arrival_s", "progress_s"):
            value = getattr(self, name)
            if value is None and name == "arrival_s":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= MAX_S:
                what = f"rejected {name}={shown(value)}: want seconds > 0, at most {MAX_S:g}"
                raise make_error("E203", what)
        for name in ("paranoid", "masking", "direct"):
            if not isinstance(value := getattr(self, name), bool):
                raise make_error("E203", f"rejected {name}={shown(value)}: want a bool")
