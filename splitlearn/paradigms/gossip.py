"""Peer-to-peer training: everyone averages with its neighbours, and there is no server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitlearn.federation import mean
from splitlearn.members import FedMember, Weights
from splitlearn.rounds import check_names, collect_each, finished

__all__ = [
    "GossipRound", "Mix", "circulant", "complete", "consensus_distance", "gossip_round", "metropolis", "ring",
    "spectral_gap",
]  # fmt: skip

Carry = Callable[[str, str, Weights], Weights]  # from, to and what is sent to what arrives


class Mix(Protocol):
    """Makes one set of weights of a peer's own and its neighbours'."""

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[float], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return the entries, given each one's weights, its coefficient, and what this peer's round started from."""


@dataclass(frozen=True)
class GossipRound:
    """What each peer holds after a round, how many samples it trained on, who dropped out, messages sent."""

    states: list[Weights]
    counts: dict[str, int]
    dropped: tuple[str, ...]
    messages: int


def gossip_round(
    members: Sequence[FedMember],
    states: Sequence[Weights],
    mixing: Tensor,
    *,
    mix: Mix = mean,
    carry: Carry = lambda sender, receiver, weights: weights,
) -> GossipRound:
    """Every peer trains from its own state, then averages with its neighbours; there is no server.

    (D-PSGD, Lian et al. 2017, arXiv:1705.09056.) ``mixing`` (n, n) says what each, by row, takes of whom: symmetric,
    rows of sum 1, such as ``metropolis`` makes of a graph. ``carry`` is the way of a message, of which each neighbour
    gets one. A peer that drops out keeps its state, and its neighbours do without it: they take its part of themselves.
    Deviations: an epoch of steps between averages, where the paper has one step; and peers average what they have
    trained to, where the paper's average what they had before it and then take that step. Every neighbour sees this
    peer's weights. A round that all drop out of is an error, as those of a federation are.
    """
    check_names(members)
    mixing = _checked(mixing, len(members))
    if len(states) != len(members):
        raise ValueError(f"expected a state for each of {len(members)} peers, got {len(states)}")
    results, dropped = collect_each(members, states)
    finished(results, dropped)  # or an error
    there = [member.name in results for member in members]
    trained = [results[m.name][0] if m.name in results else dict(s) for m, s in zip(members, states, strict=True)]
    after, messages = [], 0
    for place, member in enumerate(members):
        if not there[place]:
            after.append(trained[place])
            continue
        others = [one for one in range(len(members)) if one != place and mixing[place, one] and there[one]]
        heard = [carry(members[one].name, member.name, trained[one]) for one in others]
        messages += len(others)
        parts = [float(mixing[place, one]) for one in others]
        own = max(0.0, 1.0 - sum(parts))
        after.append({**states[place], **mix([trained[place], *heard], [own, *parts], states[place])})
    counts = {name: count for name, (_, count) in results.items()}
    return GossipRound(after, counts, tuple(dropped), messages)


def circulant(peers: int, reach: int) -> Tensor:
    """Return the adjacency (n, n), bool, of a ring, each joined to the ``reach`` nearest on both sides."""
    if not (1 <= reach < peers):
        raise ValueError(f"expected a reach from 1 to {peers - 1} among {peers} peers, got {reach}")
    places = torch.arange(peers)
    apart = (places[:, None] - places[None]).abs()
    apart = torch.minimum(apart, peers - apart)
    return (apart > 0) & (apart <= reach)


def ring(peers: int) -> Tensor:
    """Return the adjacency (n, n), bool, of a ring."""
    return circulant(peers, 1)


def complete(peers: int) -> Tensor:
    """Return the adjacency (n, n), bool, of all with all."""
    return circulant(peers, peers - 1)


def metropolis(adjacency: Tensor) -> Tensor:
    """Return the mixing matrix (n, n), float64, of a graph: 1/(1 + the greater degree) an edge.

    Symmetric and doubly stochastic, whatever the graph: Metropolis weights of Xiao, Boyd & Lall 2005 ("A scheme for
    robust distributed sensor fusion based on average consensus").
    """
    if adjacency.dim() != 2 or not torch.equal(adjacency, adjacency.T) or bool(adjacency.diagonal().any()):
        raise ValueError("expected a symmetric adjacency without loops")
    adjacency = adjacency.bool()
    degrees = adjacency.sum(1).double()
    mixing = adjacency.double() / (1 + torch.maximum(degrees[:, None], degrees[None]))
    return mixing + torch.diag(1 - mixing.sum(1))


def spectral_gap(mixing: Tensor) -> float:
    """Return 1 − |λ₂|: a round without training takes the peers' ``consensus_distance`` to |λ₂| of it or less."""
    values = torch.linalg.eigvalsh(_checked(mixing, len(mixing))).abs().sort(descending=True).values
    return 1.0 - float(values[1])


def consensus_distance(states: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the root mean square, over peers, of their distance from the mean (floating-point entries)."""
    rows = torch.stack(
        [torch.cat([w.double().flatten() for w in one.values() if w.is_floating_point()]) for one in states]
    )
    return float((rows - rows.mean(0)).square().sum(1).mean().sqrt())


def _checked(mixing: Tensor, peers: int) -> Tensor:
    mixing = mixing.double()
    if mixing.shape != (peers, peers) or not torch.allclose(mixing, mixing.T) or bool((mixing < 0).any()):
        raise ValueError(
            f"expected a symmetric mixing matrix ({peers}, {peers}) of 0 or more, got {tuple(mixing.shape)}"
        )
    if not torch.allclose(mixing.sum(1), torch.ones(peers, dtype=torch.float64)):
        raise ValueError("expected a mixing matrix whose rows add up to 1; make one with metropolis(graph)")
    return mixing
