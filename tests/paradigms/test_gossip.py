"""Gossip: mixing matrices, what a complete graph is equal to, how fast peers agree, and peers that are lost."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.aggregation import Median, Robust
from splitlearn import Framed, Learner, Member, RemoteMember, Service, fedavg_round, serve
from splitlearn.paradigms import (
    circulant,
    complete,
    consensus_distance,
    gossip_round,
    metropolis,
    ring,
    spectral_gap,
)

from .toy import Lost, data, entries, learner, model, near, same


@dataclass
class Still:
    """A peer that does not train."""

    name: str
    samples: int = 1

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        return dict(weights), self.samples


def graph(peers: int, seed: int, chance: float) -> Tensor:
    """Return a random adjacency, whatever its degrees."""
    drawn = torch.rand(peers, peers, generator=torch.Generator().manual_seed(seed)) < chance
    return torch.triu(drawn, 1) | torch.triu(drawn, 1).T


def drawn(peers: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(2, 3, generator=generator, dtype=torch.float64)} for _ in range(peers)]


# Mixing matrices


@settings(max_examples=40, deadline=None)
@given(peers=st.integers(2, 12), seed=st.integers(0, 1000), chance=st.floats(0.0, 1.0))
def test_metropolis_is_doubly_stochastic_on_any_graph(peers: int, seed: int, chance: float) -> None:
    adjacency = graph(peers, seed, chance)
    mixing = metropolis(adjacency)
    assert mixing.dtype == torch.float64
    assert torch.equal(mixing, mixing.T)
    assert bool((mixing >= 0).all())
    assert torch.allclose(mixing.sum(0), torch.ones(peers, dtype=torch.float64), rtol=0, atol=1e-14)
    off = ~torch.eye(peers, dtype=torch.bool)
    assert torch.equal((mixing > 0) & off, adjacency)
    assert bool((mixing.diagonal() > 0).all())
    degrees = adjacency.sum(1)
    for one, other in adjacency.nonzero().tolist():
        assert mixing[one, other] == 1 / (1 + max(degrees[one], degrees[other]).double())


def test_graphs_by_hand() -> None:
    assert ring(4).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(complete(5), ~torch.eye(5, dtype=torch.bool))
    assert circulant(7, 2).sum(1).tolist() == [4] * 7
    assert circulant(7, 2)[0].tolist() == [False, True, True, False, False, True, True]
    assert torch.equal(ring(2), complete(2))
    assert torch.allclose(metropolis(complete(5)), torch.full((5, 5), 0.2, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(metropolis(ring(5).int()), metropolis(ring(5)))  # truth or 0 and 1: an edge is an edge


def test_spectral_gaps_in_closed_form() -> None:
    assert spectral_gap(metropolis(complete(6))) == pytest.approx(1.0, abs=1e-12)
    # A ring of thirds has eigenvalues (1 + 2·cos(2πk/n))/3.
    closed = 1 - (1 + 2 * float(torch.cos(torch.tensor(2 * torch.pi / 9, dtype=torch.float64)))) / 3
    assert spectral_gap(metropolis(ring(9))) == pytest.approx(closed, abs=1e-12)
    apart = torch.block_diag(complete(3).int(), complete(3).int())
    assert spectral_gap(metropolis(apart)) == pytest.approx(0.0, abs=1e-12)  # two halves that never meet


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        (torch.full((2, 2), 0.5), r"symmetric mixing matrix \(3, 3\) of 0 or more, got \(2, 2\)"),
        (torch.tensor([[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0.2, 0.1, 0.7]]), "symmetric mixing matrix"),
        (torch.tensor([[1.5, -0.5, 0], [-0.5, 1.5, 0], [0, 0, 1.0]]), "of 0 or more"),
        (torch.full((3, 3), 0.5), "rows add up to 1; make one with metropolis"),
        (torch.full((3, 3), float("nan")), "symmetric mixing matrix"),
    ],
)
def test_bad_matrices_are_one_line(mixing: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gossip_round([Still("a"), Still("b"), Still("c")], drawn(3), mixing)


def test_what_does_not_fit_is_one_line() -> None:
    for adjacency in (torch.ones(3, 3), torch.tensor([[0, 1], [0, 0]]), torch.zeros(2, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match="expected a symmetric adjacency without loops"):
            metropolis(adjacency)
    for reach in (0, 4):
        with pytest.raises(ValueError, match=f"a reach from 1 to 3 among 4 peers, got {reach}"):
            circulant(4, reach)
    with pytest.raises(ValueError, match="a state for each of 3 peers, got 2"):
        gossip_round([Still("a"), Still("b"), Still("c")], drawn(2), metropolis(ring(3)))
    with pytest.raises(ValueError, match="a name of its own, got a, a"):
        gossip_round([Still("a"), Still("a")], drawn(2), metropolis(ring(2)))


# Training


def test_all_with_all_and_equal_counts_is_fedavg() -> None:
    def peers() -> list[Member]:
        return [Member(learner(f"c{n}", model(), momentum=0.9), None, data(n)) for n in range(4)]

    everywhere, own, plainly = Learner("all", model()), peers(), peers()
    states = [everywhere.weights() for _ in own]
    for _ in range(3):
        done = gossip_round(own, states, metropolis(complete(4)))
        assert done.counts == fedavg_round(plainly, everywhere).counts
        states = done.states
        for state in states:
            assert near(state, everywhere.weights(), 1e-12)
    assert consensus_distance(states) < 1e-12


def test_peers_across_frames_are_those_of_this_process() -> None:
    def peers() -> list[Member]:
        return [Member(learner(f"c{n}", model()), None, data(n)) for n in range(3)]

    behind = [RemoteMember(one.name, Framed(serve(Service({one.name: one}))), one.name) for one in peers()]
    here = there = [model().state_dict() for _ in range(3)]
    own = peers()
    for _ in range(2):
        here = gossip_round(own, here, metropolis(ring(3))).states
        there = gossip_round(behind, there, metropolis(ring(3))).states
    assert all(same(*pair) for pair in zip(here, there, strict=True))


def test_a_peer_alone_goes_its_own_way() -> None:
    adjacency = torch.zeros(3, 3, dtype=torch.bool)
    adjacency[0, 1] = adjacency[1, 0] = True
    own = [Member(learner(f"c{n}", model()), None, data(n)) for n in range(3)]
    done = gossip_round(own, [model().state_dict() for _ in own], metropolis(adjacency))
    assert done.messages == 2
    assert same(done.states[2], Member(learner("c2", model()), None, data(2)).round(model().state_dict())[0])
    assert near(entries(done.states[0]), entries(done.states[1]), 1e-15)


def test_local_entries_stay_as_they_were_in_the_state() -> None:
    own = [Member(learner(f"c{n}", model()), None, data(n), local=["3.weight"]) for n in range(3)]
    start = model().state_dict()
    done = gossip_round(own, [dict(start) for _ in own], metropolis(ring(3)))
    for one in done.states:
        assert one.keys() == start.keys()
        assert torch.equal(one["3.weight"], start["3.weight"])
        assert not torch.equal(one["0.weight"], start["0.weight"])


def test_states_are_left_as_they_are() -> None:
    states = drawn(3)
    before = [one["w"].clone() for one in states]
    done = gossip_round([Still("a"), Still("b"), Still("c")], states, metropolis(ring(3)))
    assert all(torch.equal(one["w"], was) for one, was in zip(states, before, strict=True))
    assert done.states[0]["w"] is not states[0]["w"]


# Agreement


@pytest.mark.parametrize("mixing", [metropolis(ring(8)), metropolis(circulant(9, 2)), metropolis(graph(7, 3, 0.5))])
def test_without_training_peers_agree_as_fast_as_the_second_eigenvalue(mixing: Tensor) -> None:
    peers = [Still(f"c{n}") for n in range(len(mixing))]
    values, vectors = torch.linalg.eigh(mixing)
    second = values.abs().sort(descending=True).indices[1]
    rate = 1 - spectral_gap(mixing)
    assert 0 < rate < 1
    direction = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    states = [{"w": 7.0 + entry * direction} for entry in vectors[:, second]]
    distance = consensus_distance(states)
    for _ in range(5):
        states = gossip_round(peers, states, mixing).states
        now = consensus_distance(states)
        assert now == pytest.approx(rate * distance, rel=1e-10)
        distance = now
    states = drawn(len(mixing))
    mean = torch.stack([one["w"] for one in states]).mean(0)
    for _ in range(5):
        before, states = consensus_distance(states), gossip_round(peers, states, mixing).states
        assert consensus_distance(states) <= rate * before * (1 + 1e-10)
        assert torch.allclose(torch.stack([one["w"] for one in states]).mean(0), mean, rtol=0, atol=1e-13)


def test_consensus_distance_by_hand() -> None:
    states = [
        {"w": torch.tensor([0.0, 0.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([6.0, 8.0]), "n": torch.tensor(9)},
    ]
    assert consensus_distance(states) == 5.0
    assert consensus_distance(states[:1] * 4) == 0.0


# Peers that are lost


def test_the_mean_of_those_there_is_kept() -> None:
    mixing, states = metropolis(circulant(6, 2)), drawn(6)
    peers = [Lost(f"c{n}") if n in (1, 4) else Still(f"c{n}") for n in range(6)]
    there = [0, 2, 3, 5]
    mean = torch.stack([states[n]["w"] for n in there]).mean(0)
    done = gossip_round(peers, states, mixing)
    assert done.dropped == ("c1", "c4")
    assert list(done.counts) == ["c0", "c2", "c3", "c5"]
    assert all(torch.equal(done.states[n]["w"], states[n]["w"]) for n in (1, 4))
    assert torch.allclose(torch.stack([done.states[n]["w"] for n in there]).mean(0), mean, rtol=0, atol=1e-14)
    assert done.messages == int(circulant(6, 2)[there][:, there].sum())
    own = 1 - sum(mixing[0, n] for n in there[1:])
    expected = own * states[0]["w"] + sum(mixing[0, n] * states[n]["w"] for n in there[1:])
    assert torch.allclose(done.states[0]["w"], expected, rtol=0, atol=1e-14)


def test_a_round_that_all_drop_out_of_is_an_error() -> None:
    with pytest.raises(ValueError, match="all dropped out: a, b"):
        gossip_round([Lost("a"), Lost("b")], drawn(2), metropolis(ring(2)))


# Messages


def test_each_edge_carries_one_message_each_way() -> None:
    adjacency, states = graph(6, 1, 0.4), drawn(6)
    carried: list[tuple[str, str]] = []

    def carry(sender: str, receiver: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        assert torch.equal(weights["w"], states[int(sender[1:])]["w"])
        carried.append((sender, receiver))
        return weights

    done = gossip_round([Still(f"c{n}") for n in range(6)], states, metropolis(adjacency), carry=carry)
    edges = {(f"c{one}", f"c{other}") for one, other in adjacency.nonzero().tolist()}
    assert len(edges) > 4
    assert len(carried) == len(set(carried)) == done.messages == len(edges)
    assert set(carried) == edges


def test_what_arrives_is_what_is_averaged() -> None:
    states = drawn(3)
    done = gossip_round(
        [Still("a"), Still("b"), Still("c")], states, metropolis(complete(3)),
        carry=lambda sender, receiver, weights: {name: w + 3.0 for name, w in weights.items()},
    )  # fmt: skip
    mean = torch.stack([one["w"] for one in states]).mean(0)
    assert all(torch.allclose(one["w"], mean + 2.0, rtol=0, atol=1e-14) for one in done.states)


def test_a_robust_mix_keeps_a_liar_out() -> None:
    states = drawn(5)
    lies = Still("c4")
    lies.round = lambda weights: ({"w": weights["w"] + 1e9}, 1)  # type: ignore[method-assign]
    peers = [*(Still(f"c{n}") for n in range(4)), lies]
    done = gossip_round(peers, states, metropolis(complete(5)), mix=Robust(Median()))
    honest = torch.stack([one["w"] for one in states[:4]])
    for one in done.states[:4]:
        assert bool(((one["w"] >= honest.amin(0) - 1e-9) & (one["w"] <= honest.amax(0) + 1e-9)).all())
    plainly = gossip_round(peers, states, metropolis(complete(5)))
    assert float(plainly.states[0]["w"].abs().max()) > 1e8
