"""A detector stays calm with an honest server, also on hard data and late in a training, and catches a hijacker."""

from collections.abc import Callable
from functools import partial
from math import acos, exp, pi

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from defenses.detectors.detector import Detector, first_gradient
from defenses.detectors.policies import Average, Fast, Voting, batches_until
from defenses.detectors.scrutinizer import Alikeness, GradientsScrutinizer, alikeness, gap, scrutinizer_score
from defenses.detectors.splitguard import Pile, SplitGuard, splitguard_score
from defenses.detectors.splitout import SplitOut, honest_gradients
from splitlearn import (
    Batches,
    Grants,
    Guard,
    Learner,
    Member,
    Party,
    Threat,
    cut,
    epochs_of,
    evaluate,
    fit,
    granted,
    load_checkpoint,
    save_checkpoint,
    u_shaped,
    vanilla,
)  # fmt: skip
from splitlearn.data import Splits, load, split
from splitlearn.metrics import auc
from splitlearn.models import digits_cnn
from splitlearn.train import TrainingStopped

Maker = Callable[["World"], Detector]


class Hijacker(Learner):
    """FSHA's heart: what it sends back makes activations look like a pilot's to a critic, whatever the labels are."""

    def __init__(self, pilot: nn.Module, x: Tensor, *, seed: int):
        self.pilot, self.x, self.draws = pilot, x, torch.Generator().manual_seed(seed)
        width = pilot(x[:1]).numel()
        critic = nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))
        super().__init__("server", critic, torch.optim.Adam(critic.parameters(), 1e-3), seed=seed)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.optimizer is not None
        real = self.pilot(self.x[torch.randint(len(self.x), (len(z),), generator=self.draws)]).detach()
        told = self.stage(torch.cat([real, z.detach()]))
        self.optimizer.zero_grad()
        bce(told, (torch.arange(len(told)) < len(real)).float()[:, None]).backward()
        self.optimizer.step()
        z = z.detach().requires_grad_()
        fooled = bce(self.stage(z), torch.ones(len(z), 1))
        return fooled.detach(), torch.autograd.grad(fooled, z)[0]


class RandomLabels(Learner):
    """A server that trains another task than it is told to."""

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().learn(z, torch.randint(10, y.shape, generator=torch.Generator().manual_seed(self.steps)))


class World:
    """A client and a server on digits; ``noise`` is the share of labels that are random."""

    def __init__(self, server: str = "honest", *, seed: int = 0, noise: float = 0.0, place: str = "relu1"):
        self.parts = digits()
        self.x, self.y = self.parts.private.x, self.parts.private.y.clone()
        draws = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(self.y), generator=draws) < noise
        self.y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=draws)
        torch.manual_seed(seed)
        bottom, self.top = cut(digits_cnn(), place)
        self.seed, self.client = seed, Learner("client", bottom, adam(bottom.parameters()), seed=seed)
        self.server: Learner
        if server == "hijacker":
            self.server = Hijacker(cut(digits_cnn(), place)[0], self.parts.auxiliary.x, seed=seed)
        else:
            kind = RandomLabels if server == "random" else Learner
            self.server = kind("server", self.top, adam(self.top.parameters()), seed=seed)
        self.batches = Batches(self.x, self.y, batch_size=32, seed=seed)

    def train(self, client: Party, *, epochs: int, server: Party | None = None) -> str:
        step = partial(vanilla, client, server or self.server)
        return fit(epochs_of(step, self.batches), epochs=epochs).stopped_by


def digits() -> Splits:
    return split(load("digits"), private=800, auxiliary=600, test=397, seed=0)


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3)


def splitguard(world: World, **settings) -> SplitGuard:
    return SplitGuard(world.client, num_classes=10, seed=world.seed, **settings)


def scrutinizer(world: World, **settings) -> GradientsScrutinizer:
    return GradientsScrutinizer(world.client, **settings)


def splitout(world: World, *, epochs: int = 20, **settings) -> SplitOut:
    own = Batches(world.x[:200], world.y[:200], batch_size=32, seed=world.seed + 100)
    return SplitOut(world.client, honest_gradients(world.client, world.top, adam, own, epochs=epochs), **settings)


MAKERS = [
    pytest.param(splitguard, id="SplitGuard"),
    pytest.param(scrutinizer, id="Scrutinizer"),
    pytest.param(splitout, id="SplitOut"),
]
PASSIVE = MAKERS[1:]
LATEST = {splitguard: 170, scrutinizer: 20, splitout: 60}  # batches until the hijacker is caught


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("make", MAKERS)
def test_an_honest_server_is_not_suspected_and_a_hijacker_is_caught(make: Maker, seed: int) -> None:
    honest, hijacked = World(seed=seed), World("hijacker", seed=seed)
    calm, alarmed = make(honest), make(hijacked)
    honest.train(calm, epochs=7)
    hijacked.train(alarmed, epochs=7)
    assert not calm.verdict
    assert alarmed.detected_at is not None
    assert alarmed.detected_at <= LATEST[make]
    scores = torch.tensor(calm.scores + alarmed.scores)
    scores = scores if calm.above else -scores
    taken = torch.tensor([0] * len(calm.scores) + [1] * len(alarmed.scores))
    assert auc(scores, taken) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("make", MAKERS)
def test_an_honest_server_of_noisy_labels_is_not_suspected(make: Maker, seed: int) -> None:
    world = World(seed=seed, noise=0.2)
    detector = make(world)
    world.train(detector, epochs=7)
    assert not detector.verdict


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_an_honest_server_is_not_suspected_late_in_a_training(make: Maker) -> None:
    world = World()
    world.train(world.client, epochs=15)
    detector = make(world)
    world.train(detector, epochs=7)
    assert not detector.verdict


@pytest.mark.slow
def test_random_labels_are_caught_by_those_that_know_labels_and_pass_the_outlier_factor() -> None:
    caught = {}
    for make in (splitguard, scrutinizer, splitout):
        world = World("random")
        detector = make(world)
        world.train(detector, epochs=7)
        caught[make.__name__] = detector.verdict
    assert caught == {"splitguard": True, "scrutinizer": True, "splitout": False}


def test_gradients_of_one_label_are_alike_with_an_honest_server_only() -> None:
    means = {}
    for server in ("honest", "hijacker"):
        world = World(server)
        detector = scrutinizer(world)
        world.train(detector, epochs=1)
        means[server] = sum(detector.scores[15:]) / 10
        assert detector.verdict is (server == "hijacker")
    assert means["honest"] > 0.4
    assert means["hijacker"] < 0.05


@pytest.mark.slow
def test_training_goes_on_under_splitguard_and_reaches_about_the_same_accuracy() -> None:
    reached = []
    for watched in (False, True):
        world = World()
        client = splitguard(world) if watched else world.client
        world.train(client, epochs=12)
        reached.append(evaluate([client, world.server], world.parts.test.x, world.parts.test.y)["accuracy"])
    assert reached[0] > 0.93
    assert reached[1] > reached[0] - 0.03


@pytest.mark.parametrize("make", PASSIVE)
def test_passive_detectors_change_no_bit(make: Callable[..., Detector]) -> None:
    plain, watched = World(), World()
    detector = make(watched, **({"epochs": 1} if make is splitout else {}))
    for world, client in ((plain, plain.client), (watched, detector)):
        world.train(client, epochs=1)
    assert detector.scores
    for one, other in ((plain.client, watched.client), (plain.server, watched.server)):
        assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in one.weights().items())


def test_the_client_learns_nothing_from_false_labels_and_the_server_does() -> None:
    world = World()
    detector = splitguard(world, probability=1 - 1e-9, start=1)
    x, y = world.x[:32], world.y[:32]
    vanilla(detector, world.server, x, y)
    client, server = detector.weights(), world.server.weights()
    optimizer = world.client.state_dict()["optimizer"]["state"][0]["exp_avg"].clone()
    vanilla(detector, world.server, x, y)
    assert all(torch.equal(tensor, client[name]) for name, tensor in detector.weights().items())
    assert torch.equal(world.client.state_dict()["optimizer"]["state"][0]["exp_avg"], optimizer)
    assert any(not torch.equal(tensor, server[name]) for name, tensor in world.server.weights().items())


@pytest.mark.parametrize(("share", "wrong"), [(1.0, 64), (0.25, 16)])
def test_false_labels_are_never_the_true_ones(share: float, wrong: int) -> None:
    world = World()
    detector = splitguard(world, probability=1 - 1e-9, share=share, start=0)
    detector.forward(world.x[:64])
    sent = detector.label(world.y[:64])
    assert int((sent != world.y[:64]).sum()) == wrong
    assert 0 <= int(sent.min()) <= int(sent.max()) < 10
    detector.abandon()
    assert torch.equal(detector.label(world.y[:64]), world.y[:64])  # no step is open: nobody is to be fooled


def test_the_scores_are_the_papers() -> None:
    fake, first, second = pile([[0.0, 3.0]]), pile([[1.0, 0.0]]), pile([[1.0, 0.0], [3.0, 0.0]])
    # R's mean norm is 5/3, F's 3, R1's 1, R2's 2; F stands at a right angle to R, the halves at none.
    s = (pi / 2 * 4 / 3) / (4 / 3 + 1)
    assert splitguard_score(fake, first, second) == pytest.approx((1 / (1 + exp(-5 * s))) ** 2)
    tilted = pile([[1.0, 1.0]])
    s = -(acos(2**-0.5) * (2**0.5 - 1)) / (2**0.5 - 1)  # F is as long as R's mean, so only the halves differ
    fake = pile([[(1 + 2**0.5) / 2, 0.0]])
    assert splitguard_score(fake, first, tilted) == pytest.approx((1 / (1 + exp(-5 * s))) ** 2)
    zero = pile([[0.0, 0.0]])
    assert splitguard_score(zero, zero, zero) == pytest.approx(0.25)  # a server that sends nothing

    g = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    one = alikeness(g, torch.tensor([0, 0, 1, 1]))
    assert one is not None
    assert (one.same, one.different) == (pytest.approx(0.5), 0.0)  # cosines 1 and 0 of one label, all others 0
    assert gap([one]) == pytest.approx(0.5)
    assert alikeness(g, torch.tensor([0, 1, 2, 3])) is None
    assert alikeness(g, torch.tensor([0, 0, 0, 0])) is None
    apart = scrutinizer_score([Alikeness(0.8, -0.2, 0.1, 0.1)] * 60)
    # gap .5/1.3, no misfit (2), no overlap (1)
    assert apart == pytest.approx(1 / (1 + exp(-5 * ((0.5 / 1.3) ** 0.4 * 2 - 0.7))))
    assert scrutinizer_score([Alikeness(0.3, 0.3, 0.2, 0.2)] * 60) == pytest.approx(1 / (1 + exp(5 * 0.7)))


def pile(gradients: list[list[float]]) -> Pile:
    whole = Pile()
    for gradient in gradients:
        whole.add(torch.tensor(gradient, dtype=torch.float64))
    return whole


def test_policies_hold_back_until_their_scores_are_enough() -> None:
    scores = [0.5, 1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.8]
    assert batches_until(scores, 0.9) == batches_until(scores, 0.9, policy=Fast()) == 1
    assert batches_until(scores, 0.9, policy=Average(2)) == 2
    assert batches_until(scores, 0.9, policy=Average(3)) == 3
    assert batches_until(scores[1:], 0.9, policy=Average(3)) == 5
    assert batches_until(scores, 0.9, policy=Voting(2)) == 2
    assert batches_until(scores[1:], 0.9, policy=Voting(2)) is None  # 1.0, 0.9, 0.8: one of three
    assert batches_until([0.0] * 4, 0.9, policy=Average(5)) is None
    assert batches_until([0.2, 0.4, 0.6], 0.5, above=True) == 3
    assert batches_until([0.6, 0.4, 0.4, 0.4], 0.5, policy=Voting(1), above=True) == 1
    assert batches_until([0.4, 0.6, 0.6], 0.5, policy=Voting(1), above=True) == 3  # of two, one is no majority


@pytest.mark.parametrize("make", PASSIVE)
def test_with_stop_the_training_ends_and_nothing_more_is_sent(make: Callable[..., Detector]) -> None:
    world = World("hijacker")
    detector = make(world, stop=True)
    said = world.train(detector, epochs=4)
    assert said.startswith("client: the server hijacks the training, by ")
    assert "\n" not in said
    assert detector.detected_at == detector.batches
    before = world.server.steps
    with pytest.raises(TrainingStopped, match=f"at batch {detector.detected_at}"):
        vanilla(detector, world.server, world.x[:32], world.y[:32])
    assert world.server.steps == before


@pytest.mark.parametrize("make", MAKERS)
def test_a_training_resumes_bit_for_bit_with_what_was_seen(make: Callable[..., Detector], tmp_path) -> None:
    settings = {splitguard: {"start": 2, "probability": 0.5}, splitout: {"epochs": 1}}.get(make, {})
    whole, first, second = (World() for _ in range(3))
    detectors = [make(world, **settings) for world in (whole, first, second)]
    for x, y in whole.batches:
        vanilla(detectors[0], whole.server, x, y)
    rows = list(first.batches)
    for x, y in rows[:12]:
        vanilla(detectors[1], first.server, x, y)
    save_checkpoint(tmp_path / "state", {"client": detectors[1].state_dict(), "server": first.server.state_dict()})
    state = load_checkpoint(tmp_path / "state")
    detectors[2].load_state_dict(state["client"])
    second.server.load_state_dict(state["server"])
    for x, y in rows[12:]:
        vanilla(detectors[2], second.server, x, y)
    assert detectors[0].scores
    assert detectors[2].scores == detectors[0].scores
    assert detectors[2].batches == detectors[0].batches == 25
    assert all(torch.equal(tensor, detectors[2].weights()[name]) for name, tensor in detectors[0].weights().items())


def test_what_was_seen_stays_seen_where_the_best_state_is_put_back() -> None:
    world = World()
    detector = scrutinizer(world)
    start = detector.state_dict()
    world.train(detector, epochs=1)
    detector.put_back(start)
    assert len(detector.scores) == detector.batches == 25
    assert all(torch.equal(tensor, start["learner"]["stage"][name]) for name, tensor in detector.weights().items())


def test_a_simulation_leaves_the_client_and_the_top_as_they_are() -> None:
    world = World()
    client, top = world.client.state_dict(), {name: tensor.clone() for name, tensor in world.top.state_dict().items()}
    own = Batches(world.x[:64], world.y[:64], batch_size=32)
    honest = honest_gradients(world.client, world.top, adam, own, epochs=2)
    assert honest.shape == (4, 16 * 9)
    assert all(torch.equal(tensor, client["stage"][name]) for name, tensor in world.client.weights().items())
    assert torch.equal(world.client.state_dict()["rng"]["cpu"], client["rng"]["cpu"])
    assert all(torch.equal(tensor, top[name]) for name, tensor in world.top.state_dict().items())


def test_a_detector_takes_part_as_a_member_does() -> None:
    world = World()
    detector = scrutinizer(world)
    member = Member(detector, world.server, world.batches)  # type: ignore[arg-type]
    weights, count = member.round(detector.weights())
    assert (count, len(detector.scores)) == (800, 25)
    assert all(torch.equal(tensor, world.client.weights()[name]) for name, tensor in weights.items())


def test_labels_are_those_that_were_sent() -> None:
    class Shifted(Guard):
        def label(self, y: Tensor) -> Tensor:
            return (y + 1) % 10

    world = World()
    world.client.guard = Shifted()
    detector = scrutinizer(world)
    world.train(detector, epochs=1)
    assert min(detector.scores) > 0.1


def test_bad_settings_say_what_is_expected() -> None:
    world = World()
    honest = torch.zeros(5, 144)
    for match, make in [
        ("at least two classes", lambda: SplitGuard(world.client, num_classes=1)),
        ("a probability in", lambda: SplitGuard(world.client, num_classes=10, probability=0.0)),
        ("a share in", lambda: SplitGuard(world.client, num_classes=10, share=1.5)),
        ("start ≥ 0", lambda: SplitGuard(world.client, num_classes=10, start=-1)),
        ("threshold that is a number", lambda: GradientsScrutinizer(world.client, threshold=float("nan"))),
        ("at least one gradient", lambda: SplitOut(world.client, honest, window=0)),
        ("at least 3 honest gradients of 144 entries", lambda: SplitOut(world.client, torch.zeros(2, 144))),
        ("at least 3 honest gradients of 144 entries", lambda: SplitOut(world.client, torch.zeros(5, 7))),
        ("at least one score", lambda: Average(0)),
        ("at least one score", lambda: Voting(0)),
        ("a learner that trains", lambda: SplitGuard(Learner("client", world.client.stage), num_classes=10)),
        ("at least one epoch", lambda: honest_gradients(world.client, world.top, adam, [], epochs=0)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(ValueError, match=r"labels from 0 to 4, got torch.int64 .*num_classes"):
        world.train(SplitGuard(world.client, num_classes=5), epochs=1)


@pytest.mark.parametrize("make", MAKERS)
def test_in_the_u_shape_detectors_that_go_by_labels_say_so(make: Callable[..., Detector]) -> None:
    world = World()
    middle, head = cut(world.top, 2)
    detector = make(world, **({"epochs": 1} if make is splitout else {}))
    parties = [Learner(name, stage, adam(stage.parameters()), seed=0) for name, stage in (("s", middle), ("h", head))]
    step = partial(u_shaped, detector, *parties)
    if detector.needs_labels:
        with pytest.raises(ValueError, match="client: expected a step in which the client sends its labels") as caught:
            step(world.x[:32], world.y[:32])
        assert "\n" not in str(caught.value)
        return
    fit(epochs_of(step, world.batches), epochs=1)
    assert len(detector.scores) == 25 - 9


def test_a_detector_is_ready_once_its_policy_can_tell() -> None:
    world = World()
    detector = scrutinizer(world, policy=Average(3))
    for count, (x, y) in zip(range(1, 5), world.batches, strict=False):
        assert not detector.ready or count > 3
        vanilla(detector, world.server, x, y)
    assert detector.ready


def test_the_first_gradient_is_of_the_first_parameter_that_is_trained() -> None:
    stage = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    client = Learner("client", stage, torch.optim.SGD(stage[1].parameters(), 0.1))
    assert not first_gradient(client).any()
    for _ in range(2):  # the second step's alone
        g = torch.ones_like(client.forward(torch.ones(5, 4)))
        client.backward(g)
    assert torch.equal(first_gradient(client), stage[1].weight.grad.flatten().double())


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_fsha_is_caught(make: Maker) -> None:
    from attacks.inversion.fsha import FSHA

    world = World(seed=1)
    grants = Grants(auxiliary_x=world.parts.auxiliary.x)
    hijacker = FSHA().insider(world.server, granted(Threat(auxiliary=True), grants))
    detector = make(world)
    world.train(detector, epochs=7, server=hijacker)
    assert detector.verdict
