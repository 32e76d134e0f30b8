"""A server that backdoors its clients' model: it trains the top, beside them, on a surrogate client of its own.

After the first of two attacks in Tajalli, Ersoy and Picek 2023, "On feasibility of server-side backdoor attacks on
split learning" (IEEE SPW, arXiv:2302.09578), from its description. The malicious server has labelled samples, and a
surrogate bottom. Between the clients' steps it trains the surrogate through the top, so that it stands in for theirs,
and the top on what the surrogate makes of triggered samples. Clients that later meet the trigger are to be told its
target.

The paper finds split learning to resist: whether it works depends on how near the surrogate comes to the clients' own
bottoms. A server that knows these (in SplitFed, one in league with the fed server) loads them into ``surrogate`` at
the start of a round and trains the surrogate no further (``lr=0``); that is the strongest form of it. On digits, cut
behind one convolution, SplitFed V2, 300 own samples, one seed, the success of a 2×2 patch was .97 so; with an untrained
surrogate of another start .05, with one trained at 1e-2 .32, and .93 where it was pulled to the clients' (``pull=10``).

Deviations: the surrogate is also pulled to the clients' activations, class mean by class mean; the gradients sent are
those of the true loss, in a top that has been poisoned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from attacks.impostor import Impostor
from attacks.poisoning.backdoor import Backdoor
from splitlearn import Learner
from splitlearn.randomness import Randomness

__all__ = ["ServerBackdoor", "SurrogateServer"]


@dataclass(frozen=True, kw_only=True)
class ServerBackdoor:
    """Settings of a malicious server in vanilla or SplitFed training; ``party`` puts it in the honest one's place.

    ``surrogate`` makes a bottom of the clients' architecture (their public model). After each of a client's steps it
    is trained for ``steps`` steps at ``lr`` (Adam; 0: not at all) on ``batch_size`` own samples, and the top for
    as many on the same, of which ``backdoor`` has poisoned its share. ``pull`` is the weight of the distance between
    the means of a class's activations, the surrogate's and the client's.
    """

    backdoor: Backdoor
    surrogate: Callable[[], nn.Module]
    steps: int = 1
    lr: float = 1e-3
    pull: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not min(self.lr, self.pull) >= 0:
            raise ValueError(
                f"expected steps, lr and pull of 0 or more and a batch of one at least, got {self.steps}, {self.lr}, "
                f"{self.pull} and {self.batch_size}"
            )

    def party(self, server: Learner, x: Tensor, y: Tensor) -> "SurrogateServer":
        """Return the malicious party in the place of ``server``, with labelled samples of its own."""
        return SurrogateServer(self, server, x, y)


class SurrogateServer(Impostor):
    """The server that lies: a party's methods, of which ``learn`` also trains a ``surrogate`` client and a backdoor.

    Its loss and gradients are the honest server's. It never sees a client's input or weights. What it draws itself
    comes from a randomness of its own; with 0 steps it is the honest server, bit for bit.
    """

    def __init__(self, settings: ServerBackdoor, server: Learner, x: Tensor, y: Tensor):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"expected labelled samples, at least one, got {len(x)} inputs and {len(y)} labels")
        super().__init__(server)
        self.settings = settings
        self.x, self.y = x, y
        self._randomness = Randomness(settings.seed, server.name, "surrogate")
        with self._randomness.own(x.device):
            self.surrogate = settings.surrogate().to(x)
        self._optimizer = torch.optim.Adam(self.surrogate.parameters(), settings.lr) if settings.lr else None

    def forward(self, x: Tensor) -> Tensor:
        """Raise ``ValueError``: in the U shape the server sees no labels, and this attack has nothing to go by."""
        raise ValueError(
            f"{self.name}: expected a protocol in which the server learns from labels, got a U shape; use vanilla or "
            "SplitFed training"
        )

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learn as the honest server does and return what it returns; then train the surrogate and the backdoor."""
        answer = self.server.learn(z, y)
        for _ in range(self.settings.steps):
            self._poison(z.detach(), y)
        return answer

    def _poison(self, z: Tensor, y: Tensor) -> None:
        with self._randomness.own(self.x.device):
            rows = torch.randint(len(self.x), (self.settings.batch_size,)).to(self.x.device)
            x, labels = self.x[rows], self.y[rows]
            if self._optimizer is not None:
                self._imitate(x, labels, z, y)
            bad_x, bad_y = self.settings.backdoor(x, labels)
            with torch.no_grad():
                lies = self.surrogate(bad_x)
        self.server.learn(lies, bad_y)

    def _imitate(self, x: Tensor, labels: Tensor, z: Tensor, y: Tensor) -> None:
        """Take one step of the surrogate: the task through the top as it stands, and the clients' class means."""
        assert self._optimizer is not None
        made = self.surrogate(x)
        loss = self.server.loss(self.server.stage(made), labels)
        both = [label for label in labels.unique().tolist() if (y == label).any()]
        if both and self.settings.pull:
            own = torch.stack([made[labels == label].mean(0) for label in both])
            theirs = torch.stack([z[y == label].mean(0) for label in both]).to(own)
            loss = loss + self.settings.pull * mse_loss(own, theirs)
        parameters = list(self.surrogate.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
