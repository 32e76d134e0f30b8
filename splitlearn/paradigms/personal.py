"""Models of one's own: heads that stay at home, and a global model tuned at home."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from splitlearn.cut import layer_names
from splitlearn.paradigms.hooks import trained
from splitlearn.party import Learner

__all__ = ["entries_above", "fine_tuned"]


def entries_above(model: nn.Sequential, layer: str) -> frozenset[str]:
    """Return the names of all entries above a layer, for ``Member(local=…)``: heads that stay with their members.

    (FedPer, Arivazhagan et al. 2019, arXiv:1912.00818.) ``layer`` is the last shared one, as ``cut`` names layers.
    """
    names = layer_names(model)
    if layer not in names:
        raise ValueError(f"expected a layer among {', '.join(names)}; got {layer!r}")
    shared = tuple(f"{name}." for name in names[: names.index(layer) + 1])
    return frozenset(entry for entry in model.state_dict() if not entry.startswith(shared))


def fine_tuned(
    learner: Learner, batches: Iterable[tuple[Tensor, Tensor]], *, epochs: int, name: str = "tuned"
) -> Learner:
    """Return a copy of a learner of the whole model, trained further on one member's batches.

    (Local fine-tuning of the federated model, such as Yu et al. 2020, arXiv:2002.04758.) It is the baseline that
    personalised methods are to beat.
    """
    if epochs < 1:
        raise ValueError(f"expected to tune for an epoch or more, got {epochs}")
    if isinstance(batches, Iterator):
        raise ValueError(f"{name}: expected batches that can be gone through every epoch, got an iterator; pass a list")
    trained(learner)  # or an error: without an optimizer nothing would be tuned
    tuned = learner.replica(name)
    for _ in range(epochs):
        for x, y in batches:
            tuned.learn(x, tuned.label(y))
    return tuned
