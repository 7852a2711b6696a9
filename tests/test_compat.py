"""Other libraries' values where the golden files say nothing, and the search for a definition."""

import math

import pytest
import torch

from cl_plugins import functional as F
from cl_plugins.compat import definitions, match_definitions, peer_values

MATRIX = torch.tensor([[0.6, 0.4, 0.3], [0.7, 0.65, 0.45], [0.8, 0.75, 0.7]])
ZERO_SHOT = torch.tensor([[0.80, 0.93, 0.74], [0.72, 0.75, 0.99], [0.61, 0.67, 0.94]])


def test_one_run_has_five_values_of_forgetting():
    values = {
        "peak": F.forgetting(ZERO_SHOT).item(),
        "start": F.forgetting(ZERO_SHOT, since="start").item(),
        "mammoth": peer_values(ZERO_SHOT, "mammoth")["forgetting"],
        "renate": peer_values(ZERO_SHOT, "renate")["forgetting"],
        "continuum": peer_values(ZERO_SHOT, "continuum")["forgetting"],
    }
    assert values["peak"] == pytest.approx((0.19 + 0.08) / 2)
    assert values["start"] == values["renate"] == pytest.approx((0.19 + 0.26) / 2)
    assert values["mammoth"] == pytest.approx((0.19 + 0.26) / 2)
    assert values["continuum"] == pytest.approx(0.19 / 2)


def test_keys_follow_what_was_given():
    assert "forward_transfer" not in peer_values(MATRIX, "renate")
    assert "forward_transfer" in peer_values(MATRIX, "renate", initial=torch.zeros(3))
    assert "FR" not in peer_values(MATRIX, "clarena")
    assert peer_values(MATRIX, "zscl") == {}


def test_two_tasks_leave_an_empty_file():
    assert peer_values(MATRIX[:2, :2], "clarena")["BWT"] == "EmptyDataError"
    assert peer_values(MATRIX[:2, :2], "continuum")["remembering"] == 1.0


def test_renate_drops_a_hole_that_does_not_come_first():
    matrix = MATRIX.clone()
    matrix[1, 0] = math.nan
    assert peer_values(matrix, "renate")["forgetting"] == pytest.approx((0.6 - 0.8 + 0.65 - 0.75) / 2)
    matrix = MATRIX.clone()
    matrix[0, 1] = math.nan
    assert math.isnan(peer_values(matrix, "renate")["forgetting"])


def test_pilot_rounds_to_two_decimals_of_a_percent():
    matrix = torch.tensor([[0.123456, 0.0], [0.1, 0.5]], dtype=torch.float64)
    assert peer_values(matrix, "pilot")["forgetting"] == pytest.approx(0.1235 - 0.1, abs=1e-12)


def test_the_matrix_is_given_to_peers_in_the_order_of_learning():
    order = [2, 0, 1]
    for peer in ("avalanche", "mammoth", "continuum", "continuum-head", "renate", "pilot", "clarena"):
        straight = peer_values(ZERO_SHOT, peer, initial=ZERO_SHOT[0])
        assert peer_values(ZERO_SHOT[:, order], peer, learned_at=order, initial=ZERO_SHOT[0][order]) == straight


def test_definitions_are_the_functions():
    values = definitions(MATRIX, initial=torch.full((3,), 0.2), n_test=torch.tensor([1, 1, 2]))
    assert values["average_accuracy[micro]"] == pytest.approx((0.8 + 0.75 + 1.4) / 4)
    assert values["backward_transfer"] == F.backward_transfer(MATRIX).item()
    assert values["forward_transfer"] == pytest.approx(0.225)
    assert math.isnan(values["forgetting_ratio"])


def test_a_published_value_finds_its_definition():
    found = match_definitions({"F": 0.0, "Forgetting": -15.0, "other": 0.123}, MATRIX)
    assert "forgetting[peak,since=learned,clip]" in found["F"].agrees
    assert "mammoth: forgetting" in found["F"].agrees
    assert "forgetting[peak,since=learned]" not in found["F"].agrees
    assert "forgetting[learned]" in found["Forgetting"].agrees  # percent, since beyond 1
    assert "avalanche: Forgetting.mean" in found["Forgetting"].agrees
    assert found["other"].agrees == []
    assert found["other"].nearest is not None


def test_percent_can_be_said():
    assert match_definitions({"F": 0.5}, MATRIX, percent=True)["F"].value == 0.005
    assert match_definitions({"F": 0.5}, MATRIX, percent=False)["F"].value == 0.5


def test_two_tasks_at_one_row_match_our_definitions_alone():
    found = match_definitions({"F": 0.9}, torch.tensor([[0.9, 0.9]]), learned_at=[0, 0])
    assert "average_accuracy" in found["F"].agrees
    with pytest.raises(ValueError, match=r"`learned_at` must have one task per row .* got \[0, 0\]"):
        peer_values(torch.tensor([[0.9, 0.9]]), "renate", learned_at=[0, 0])


def test_error_texts():
    with pytest.raises(ValueError, match=r"`compat` must be one of 'avalanche', .*, got 'facil'"):
        peer_values(MATRIX, "facil")
    with pytest.raises(ValueError, match=r"`learned_at` must name a row of the matrix \(3 rows\)"):
        peer_values(MATRIX, "renate", learned_at=[None, None, None])
