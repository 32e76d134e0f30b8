"""The fed server's own update for FLTrust: one pass over labelled samples that it holds, from where members started."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.aggregation import Robust, Rooted
from experiments.training import Training, optimizer_for
from splitlearn.data import Dataset
from splitlearn.members import Weights
from splitlearn.party import Learner
from splitlearn.train import Batches

__all__ = ["rooted"]


def rooted(parts: Sequence[Learner], training: Training, root: Dataset) -> list[Robust]:
    """Return an aggregator for each of the global ``parts``, bottom first, that trusts by the ``root`` samples.

    The fed server, who holds these and in V2 the top too, trains all parts together: the part in question from the
    round's start, the others as they are when it is asked. One pass, as a member makes, but each time with a fresh
    optimizer and in the same order. Where that leads to what is not finite, it trusts nobody: the start stays.
    """
    return [Robust(Rooted(_own(parts, place, training, root))) for place in range(len(parts))]


def _own(
    parts: Sequence[Learner], place: int, training: Training, root: Dataset
) -> Callable[[Mapping[str, Tensor]], Weights]:
    def train(start: Mapping[str, Tensor]) -> Weights:
        stages = [copy.deepcopy(part.stage).train() for part in parts]
        stages[place].load_state_dict(start)
        model = nn.Sequential(*stages)
        optimizer = optimizer_for(model, training)
        for x, y in Batches(root.x, root.y, batch_size=training.batch_size, seed=training.seed):
            if optimizer is None:
                break
            optimizer.zero_grad()
            cross_entropy(model(x.to(training.device)), y.to(training.device)).backward()
            optimizer.step()
        found = stages[place].state_dict()
        finite = all(bool(tensor.isfinite().all()) for tensor in found.values())
        return found if finite else dict(start)

    return train
