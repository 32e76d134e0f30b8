"""A few seconds of split training across a real wire, compared bit for bit with the same training unsplit."""

import copy

import torch

from splitlearn.cut import cut, join
from splitlearn.data import load, split
from splitlearn.models import digits_cnn
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import wire
from splitlearn.train import Batches, epochs_of, fit

__all__ = ["split_equals_unsplit"]


def split_equals_unsplit(*, epochs: int = 2, place: str = "relu2") -> str:
    """Return a line on what was compared; ``ValueError`` where one weight differs by one bit.

    The digits CNN in float64 with Adam, cut after the layer ``place``, under vanilla split learning.
    """
    digits = split(load("digits"), private=800, auxiliary=600, test=397).private
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits_cnn().double()
    unsplit = copy.deepcopy(model)
    bottom, top = cut(model, place)
    client = Learner("client", bottom, torch.optim.Adam(bottom.parameters()))
    server = wire(Learner("server", top, torch.optim.Adam(top.parameters())))
    whole = Learner("unsplit", unsplit, torch.optim.Adam(unsplit.parameters()))

    def batches() -> Batches:
        return Batches(digits.x.double(), digits.y, batch_size=64)

    fit(epochs_of(lambda x, y: vanilla(client, server.party, x, y), batches()), epochs=epochs)
    fit(epochs_of(lambda x, y: whole.learn(x, y)[0], batches()), epochs=epochs)
    expected = unsplit.state_dict()
    different = [name for name, got in join(bottom, top).state_dict().items() if not torch.equal(got, expected[name])]
    if different:
        raise ValueError(
            f"expected split training to equal unsplit training, but after {client.steps} steps "
            f"{', '.join(different)} differ; this installation of torch computes differently in the two"
        )
    nbytes = sum(sum(kinds.values()) for kinds in server.meter.nbytes.values())
    return f"{client.steps} steps of a split CNN equal unsplit training bit for bit ({nbytes / 1e6:.1f} MB crossed)"
