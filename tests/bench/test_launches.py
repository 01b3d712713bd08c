"""Launches per layer: what few tokens cost on a GPU. A number that grows here is a price to be known of."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from mumoe_fast.bench.static import launches

LAYER, LEVELS, BLOCK = launches.WORKLOADS


def test_a_layer_of_one_input_is_at_most_three_launches() -> None:
    """Four for Tucker: its core needs all of B, a GEMM, and its output factor all of c."""
    assert launches.count(LAYER) == {"cp": (3, 16), "tr": (3, 18), "tt": (3, 18), "tucker": (4, 22), "full": (2, 15)}


def test_all_levels_of_experts_are_one_gate() -> None:
    """Full's third is the product of the levels' coefficients."""
    assert launches.count(LEVELS) == {
        "cp": (3, 21),
        "tr": (3, 27),
        "tt": (3, 27),
        "tucker": (4, 32),
        "full": (3, 23),
    }


def test_a_block_is_a_gate_and_two_expert_layers() -> None:
    forward = {name: counts[0] for name, counts in launches.count(BLOCK).items()}
    assert forward == {"cp": 5, "tr": 5, "tt": 5, "tucker": 8, "full": 4}


def test_the_tables_hold_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "WORKLOADS", (LAYER,))
    row = "| layer 768→1000, N = 128 | 3 / 16 | 3 / 18 | 3 / 18 | 4 / 22 | 2 / 15 |"
    assert row in launches.markdown().splitlines()
    assert launches.table().row_count == 1
