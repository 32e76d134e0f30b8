"""Vertical training with a bad client in it: two clients hold halves of every input, an owner the labels."""

import torch
from torch import Tensor, nn

from defenses.poisoning import ClippedSteps
from experiments.bad_members import DIVERGED, Federated, Sabotage, Safeguard, answers, top_optimizer
from experiments.setups import counted
from experiments.training import Training, optimizer_for
from splitlearn.data import Splits, partition
from splitlearn.features import Features
from splitlearn.party import Learner
from splitlearn.protocols import concatenated, vertical
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.train import Batches
from splitlearn.wire import Framed, Metered, serve

__all__ = ["KNOWN", "train_vertically"]

WIDTH = 32  # of an activation, and of the hidden layer of the top
KNOWN = 5  # samples whose label the bad client knows


def train_vertically(training: Training, splits: Splits, *, sabotage: Sabotage, safeguard: Safeguard) -> Federated:
    """Train for ``training.epochs`` epochs; the first client is bad where ``sabotage.villain`` says how.

    It knows the labels of five samples of the target class, drawn by the seed. Activations and gradients cross frames.
    """
    x, y = splits.private.x.flatten(1).to(training.device), splits.private.y.to(training.device)
    halves = [rows.tolist() for rows in partition.vertical(x.shape[1], 2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        stages = [nn.Sequential(nn.Linear(len(own), WIDTH), nn.ReLU()) for own in halves]
        above = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, splits.private.num_classes))
    clients = [
        Features(_learner(f"client{place}", stage.to(training.device), training, place + 1), x[:, own])
        for place, (stage, own) in enumerate(zip(stages, halves, strict=True))
    ]
    above = above.to(training.device)
    steps = top_optimizer(above, training, safeguard)
    owner = Learner("server", above, steps, seed=training.seed * 1000)
    villain = None
    if sabotage.villain is not None:
        ours = (y == sabotage.target).nonzero()[:, 0].cpu()
        drawn = torch.randperm(len(ours), generator=torch.Generator().manual_seed(training.seed))[:KNOWN]
        villain = sabotage.villain(tuple(ours[drawn].tolist())).party(clients[0])
    parties = [clients[0] if villain is None else villain, clients[1]]
    meters = [Metered(serve(Service({party.name: party})), requests="down") for party in parties]
    lines = [Remote(party.name, Framed(meter), party.name) for party, meter in zip(parties, meters, strict=True)]
    result = Federated(_Halves(clients, halves), owner, [0], 2)
    numbers = torch.arange(len(x), device=training.device)
    batches = Batches(numbers, y, batch_size=training.batch_size, seed=training.seed * 1000)
    test_x, test_y = splits.test.x.to(training.device), splits.test.y.to(training.device)
    for number in range(training.epochs):
        try:
            for ids, labels in batches:
                vertical(owner, lines, ids, labels, join=concatenated)
        except ValueError as error:
            if not DIVERGED.search(str(error)):
                raise
            result.stopped = f"stopped in round {number + 1}: {error}"
            break
        result.accuracy.append((answers(result.logits(test_x)) == test_y).double().mean().item())
    if villain is not None:
        pattern = torch.cat([villain.trigger(), torch.zeros(WIDTH, device=training.device)])
        result.trigger = lambda z: z + pattern
    result.skipped = steps.skipped if isinstance(steps, ClippedSteps) else 0
    result.nbytes = counted(meters)
    return result


class _Halves:
    """Both clients asked as one, for inputs that are whole."""

    def __init__(self, clients: list[Features], halves: list[list[int]]):
        self._clients, self._halves = clients, halves

    def predict(self, x: Tensor) -> Tensor:
        """Return the joined activations [N, 2 · WIDTH] of whole inputs."""
        flat = x.flatten(1)
        parts = zip(self._clients, self._halves, strict=True)
        return concatenated([client.learner.predict(flat[:, own]) for client, own in parts])


def _learner(name: str, stage: nn.Module, training: Training, place: int) -> Learner:
    return Learner(name, stage, optimizer_for(stage, training), seed=training.seed * 1000 + place)
