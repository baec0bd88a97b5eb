"""The short form of bench/kill_trials.py: any rank, at any moment, named by all within a second."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import kill_trials
from patience import three_tries, within


@pytest.mark.parametrize("seed", range(1000, 1008))
@three_tries
def test_c2_c3_a_rank_killed_at_a_random_moment_is_named_by_all_within_a_second(seed: int) -> None:
    victim, seen, ms = kill_trials.trial(seed)
    assert kill_trials.named(victim, seen), seen
    assert len(seen) == 3
    within(1.0, ms / 1e3, seen)
