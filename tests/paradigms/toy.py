"""What the tests of paradigms share: small models, parties and data, all in float64."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from splitlearn import Learner
from splitlearn.party import Loss

Batch = tuple[Tensor, Tensor]


def data(number: int, sizes: Sequence[int] = (4, 6)) -> list[Batch]:
    """Return batches of these sizes, 3 features and 2 classes, fixed by their number."""
    generator = torch.Generator().manual_seed(number)
    return [
        (
            torch.rand(size, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (size,), generator=generator),
        )
        for size in sizes
    ]


def plain() -> nn.Sequential:
    """Return a model without buffers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def model() -> nn.Sequential:
    """Return a model with batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def learner(name: str, stage: nn.Module, *, lr: float = 0.1, momentum: float = 0.0) -> Learner:
    """Return a party that trains a copy of the stage."""
    stage = copy.deepcopy(stage)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=lr, momentum=momentum))


def point(name: str, curve: float, *, lr: float, start: float = 0.0) -> Learner:
    """Return a party whose one parameter w, ``weight``, has the loss curve/2·(w − y)² on x = 1."""
    stage = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        stage.weight.fill_(start)
    loss: Loss = lambda output, y: (curve / 2 * (output[:, 0] - y) ** 2).mean()  # noqa: E731
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=lr), loss=loss)


def pulled_to(y: float, *, steps: int, samples: int = 1) -> list[Batch]:
    """Return so many batches for a ``point`` with its optimum at ``y``."""
    return [(torch.ones(samples, 1, dtype=torch.float64), torch.full((samples,), y, dtype=torch.float64))] * steps


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Say whether all entries are equal, bit for bit (but for the sign of zero)."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float) -> bool:
    """Say whether all entries are equal to ``atol``."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


def entries(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the floating-point entries."""
    return {name: w for name, w in weights.items() if w.is_floating_point()}


def crossed(counts: Iterable[Mapping[str, int]]) -> set[str]:
    """Return the kinds of which a meter counted any bytes."""
    return {kind for one in counts for kind, nbytes in one.items() if nbytes}


class Lost:
    """A server, or a member, that cannot be reached from the given call on."""

    def __init__(self, name: str, inner: Learner | None = None, *, after: int = 0):
        self.name, self._inner, self._left = name, inner, after

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        self._left -= 1
        if self._left < 0:
            raise ConnectionResetError("gone")
        assert self._inner is not None
        return self._inner.learn(z, y)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        raise ConnectionRefusedError("gone")
