"""Members' updates as a matrix: there and back, hand-computed distances, and what does not fit."""

import pytest
import torch

from splitlearn.deltas import applied, deltas, gram, squared_distances

START = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": torch.tensor(7), "b": torch.tensor([0.5])}


def test_a_row_a_member_in_float64_and_back() -> None:
    own = {"w": START["w"] + 1, "n": torch.tensor(9), "b": torch.tensor([0.25])}
    found = deltas([START, own], START)
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.0] * 5, [1.0, 1.0, 1.0, 1.0, -0.25]]
    back = applied(found[1], own, START)
    assert {name: tensor.dtype for name, tensor in back.items()} == {name: own[name].dtype for name in own}
    assert all(torch.equal(back[name], own[name]) for name in own)


def test_entries_that_members_keep_are_left_out() -> None:
    own = {"b": torch.tensor([1.5])}
    found = deltas([own], START)
    assert found.tolist() == [[1.0]]
    assert applied(found[0], own, START)["b"].tolist() == [1.5]


def test_distances_by_hand_however_far_the_rows_are_from_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 25, 1], [25, 0, 18], [1, 18, 0]], dtype=torch.float64)
    for shift in (0.0, 1e6):
        assert torch.allclose(squared_distances(gram(rows + shift)), expected, atol=1e-6)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        deltas([], START)
    with pytest.raises(ValueError, match="same entries"):
        deltas([START, {"w": START["w"]}], START)
    with pytest.raises(ValueError, match=r"'b' of shape \(1,\) from every member, got \(1,\), \(2,\)"):
        deltas([START, {**START, "b": torch.zeros(2)}], START)
    with pytest.raises(ValueError, match="a delta of 5 numbers"):
        applied(torch.zeros(6), START, START)
