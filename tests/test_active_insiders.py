"""Servers that lie: what they rebuild, what they leave alone, and whether detectors would see it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import acos, exp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.inversion.fsha import FSHA, FSHAProperty
from attacks.inversion.networks import Convolutional
from attacks.inversion.splitspy import SplitSpy, Spy
from attacks.inversion.urvfl import URVFL
from defenses import Dropout, NoPeek, TopKActivations
from splitlearn import Grants, Guard, Kind, Learner, Party, Threat, View, cut, granted, observe, u_shaped, vanilla, wire
from splitlearn.data import Splits, load, split, standardise
from splitlearn.metrics import LeakageScore, accuracy, score_reconstruction
from splitlearn.models import digits_cnn

EVERYTHING = Threat("malicious server", auxiliary=True, auxiliary_labels=True)
PARTS = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)
TABLE = standardise(split(load("breast_cancer"), private=300, auxiliary=169, test=100, seed=0))
TINY: dict[str, Any] = {"network": Convolutional(4, 0), "batch_size": 16}

ATTACKS = [
    pytest.param(FSHA(**TINY), id="FSHA"),
    pytest.param(SplitSpy(FSHA(**TINY)), id="SplitSpy"),
    pytest.param(URVFL(classes=10, pretraining=2, **TINY), id="URVFL"),
]


def table_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))


def knowing(threat: Threat = EVERYTHING, *, parts: Splits = PARTS, labels: Tensor | None = None) -> View:
    return granted(threat, Grants(None, parts.auxiliary.x, parts.auxiliary.y if labels is None else labels))


@dataclass
class Run:
    """A client, honest in all that it does, and a server in whose place an attack may sit; of digits, or as told."""

    place: str = "relu2"
    attack: Any = None
    seed: int = 0
    guard: Guard | None = None
    false_labels: float = 0.0  # how often a batch is sent with labels drawn at random, and not trained on
    view: View | None = None
    lr: float = 1e-3
    parts: Splits = PARTS
    model: Callable[[], nn.Sequential] = digits_cnn

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        bottom, top = cut(self.model(), self.place)
        adam = torch.optim.Adam
        self.client = Learner("client", bottom, adam(bottom.parameters(), self.lr), self.guard, seed=self.seed)
        self.server = Learner("server", top, adam(top.parameters(), 1e-3), seed=self.seed)
        self.insider: Any = self.server
        if self.attack is not None:
            self.insider = self.attack.insider(self.server, self.view or knowing(parts=self.parts))
        self.draw = torch.Generator().manual_seed(self.seed)
        self.losses: list[float] = []
        self.gaps: list[float] = []  # the Gradients Scrutinizer's, a batch
        self.piles: dict[bool, list[Tensor]] = {True: [], False: []}  # first-layer gradients, of false labels and true

    def train(self, steps: int, *, batch_size: int = 64) -> "Run":
        weight, private = next(self.client.stage.parameters()), self.parts.private
        for _ in range(steps):
            rows = torch.randperm(len(private.x), generator=self.draw)[:batch_size]
            x, y = private.x[rows], private.y[rows]
            false = torch.rand((), generator=self.draw).item() < self.false_labels
            if false:
                y = (y + torch.randint(1, 10, y.shape, generator=self.draw)) % 10
            kept = self.client.weights()
            z = self.client.forward(x)
            loss, g = self.insider.learn(z, self.client.label(y))
            self.client.backward(g)
            self.losses.append(loss.item())
            self.gaps.append(scrutinizer_gap(g, y))
            assert weight.grad is not None
            self.piles[false].append(weight.grad.flatten().clone())
            if false:
                self.client.load_weights(kept)
        return self

    def seen(self, z: Tensor, threat: Threat = EVERYTHING) -> View:
        carried = wire(self.insider)
        carried.party.predict(z)
        return observe(carried.record, threat=threat)

    def score(self, z: Tensor | None = None, *, num: int = 128) -> LeakageScore:
        x = self.parts.private.x[:num]
        found = self.insider(self.seen(self.client.predict(x) if z is None else z))
        return score_reconstruction(x, found.x_hat, auxiliary_x=self.parts.auxiliary.x)


def scrutinizer_gap(g: Tensor, y: Tensor) -> float:
    """Return the mean cosine of gradients of like labels less that of unlike ones (Fu et al. 2023)."""
    flat = g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines, alike = flat @ flat.T, y[:, None] == y[None, :]
    return (cosines[alike & ~torch.eye(len(y), dtype=torch.bool)].mean() - cosines[~alike].mean()).item()


def splitguard_score(piles: dict[bool, list[Tensor]], start: int) -> float:
    """Return σ(5·S)², S as Erdoğan et al. 2022 have it: whether false labels change the gradients.

    The true ones are halved at random, of which the score depends much: the mean over 50 halvings.
    """
    false, true = (torch.stack(piles[which]) for which in (True, False))
    true, draw = true[start:], torch.Generator().manual_seed(0)

    def angle(a: Tensor, b: Tensor) -> float:
        return acos(max(-1.0, min(1.0, torch.cosine_similarity(a.mean(0), b.mean(0), dim=0).item())))

    def apart(a: Tensor, b: Tensor) -> float:
        return abs(a.norm(dim=1).mean() - b.norm(dim=1).mean()).item()

    scores = []
    for _ in range(50):
        half = torch.rand(len(true), generator=draw) < 0.5
        far, near = apart(false, true), apart(true[half], true[~half])
        s = (angle(false, true) * far - angle(true[half], true[~half]) * near) / (far + near)
        scores.append((1 / (1 + exp(-5 * s))) ** 2)
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def hijacked() -> Run:
    attack = FSHA(pilot=lambda: cut(digits_cnn(), "relu1")[0], spread=1.0, lr=2e-3, batch_size=32)
    return Run("relu1", attack, lr=5e-3).train(200, batch_size=32)


def test_fsha_rebuilds_inputs(hijacked: Run) -> None:
    score = hijacked.score()
    assert score.metrics["mse"] < 0.02
    assert score.baselines["mse_mean_image"] == pytest.approx(0.073, abs=0.006)
    found = hijacked.insider(hijacked.seen(hijacked.client.predict(PARTS.private.x[:4])))
    assert found.x_hat.shape == (4, 1, 8, 8)
    assert 0 <= found.x_hat.min() <= found.x_hat.max() <= 1
    assert found.evidence["auxiliary_mse"] < 0.01 < found.evidence["auxiliary_mse_mean_image"]
    assert found.evidence["converged"] in (0.0, 1.0)


@pytest.mark.parametrize("destroyed", ["permuted", "another client's", "noise", "zero"])
def test_fsha_without_a_signal_falls_to_the_baseline(hijacked: Run, destroyed: str) -> None:
    x = PARTS.private.x[:128]
    z = hijacked.client.predict(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    stranger = Run(hijacked.place, seed=7).client
    z = {
        "permuted": z.roll(1, 0),
        "another client's": stranger.predict(x),  # whom it never trained
        "noise": z.mean() + z.std() * noise,
        "zero": torch.zeros_like(z),
    }[destroyed]
    assert hijacked.score(z).advantage <= 0.1


def test_the_client_of_fsha_sees_a_training_that_goes_well(hijacked: Run) -> None:
    assert sum(hijacked.losses[-20:]) / 20 < 0.5 < hijacked.losses[0]
    test = PARTS.test
    assert accuracy(hijacked.insider.predict(hijacked.client.predict(test.x)), test.y) > 0.8


def test_the_scrutinizer_sees_fsha(hijacked: Run) -> None:
    honest = Run("relu1").train(60)
    assert sum(hijacked.gaps[:100]) / 100 < 0.01  # later some more, as the critic learns
    assert sum(honest.gaps[-20:]) / 20 > 0.25


# On a table an autoencoder is learned; a client of dense layers matches it in distribution alone, unless labels help.
@pytest.mark.parametrize(
    ("attack", "steps", "advantage"),
    [
        pytest.param(FSHA(bounds=None, lr=3e-3), 120, 0.0, id="FSHA"),
        pytest.param(FSHAProperty(classes=2, bounds=None, lr=3e-3), 120, 0.0, id="FSHAProperty"),
        pytest.param(SplitSpy(FSHA(bounds=None, lr=3e-3)), 120, 0.0, id="SplitSpy"),
        pytest.param(URVFL(classes=2, bounds=None, lr=3e-3, label_weight=3.0), 300, 0.05, id="URVFL"),
    ],
)
def test_columns_of_a_table(attack: Any, steps: int, advantage: float) -> None:
    run = Run("1", attack, parts=TABLE, model=table_mlp, lr=5e-3).train(steps, batch_size=32)
    found = run.insider(run.seen(run.client.predict(TABLE.private.x[:4])))
    assert found.x_hat.shape == (4, 30)
    assert found.evidence["auxiliary_mse"] < 0.35 * found.evidence["auxiliary_mse_mean_image"]
    assert run.score().advantage >= advantage


class Masked(Guard):
    """Sends every second channel alone."""

    def activation(self, z: Tensor) -> Tensor:
        kept = torch.ones_like(z)
        kept[:, ::2] = 0
        return z * kept


def test_a_guard_that_is_known_is_put_behind_the_pilot() -> None:
    run = Run(attack=FSHA(**TINY, guard=Masked()), guard=Masked()).train(1)
    plain, x = run.insider.pilot[0], PARTS.auxiliary.x[:4]
    assert torch.equal(run.insider.pilot(x), Masked().activation(plain(x)))
    assert run.insider(run.seen(run.client.predict(x))).x_hat.shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("guard", [Dropout(0.6), TopKActivations(0.1)], ids=["dropout", "top_k"])
def test_who_knows_the_guard_rebuilds_more(guard: Guard) -> None:
    plain, through = (
        Run(attack=FSHA(guard=known), guard=guard).train(1000).score().advantage for known in (Guard(), guard)
    )
    assert through > 0.7
    assert plain < 0.55


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_client_runs_the_protocol_and_its_server_stays_a_party(attack: Any) -> None:
    run = Run(attack=attack, place="relu3")
    x, y = PARTS.private.x[:16], PARTS.private.y[:16]
    seen = wire(run.insider)
    before = run.client.weights()
    for _ in range(3):
        loss = vanilla(run.client, seen.party, x, y)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert any(not torch.equal(before[name], now) for name, now in run.client.weights().items())
    requests = [exchange.request for exchange in seen.record.exchanges]
    assert {Kind.of(key) for request in requests for key in request.tensors} == {Kind.ACTIVATION, Kind.LABEL}
    z = run.client.predict(x)
    loss, g = run.insider.learn(z, y)  # asks for no gradient
    assert g is None
    party: Party = run.insider
    assert party.weights().keys() == run.server.weights().keys()
    assert torch.equal(party.predict(z), run.server.predict(z))


@pytest.mark.parametrize("attack", ATTACKS)
def test_loss_and_top_are_those_of_an_honest_server_on_the_same_activations(attack: Any) -> None:
    run, honest = Run(attack=attack), Run()
    for _ in range(3):
        z = run.client.forward(PARTS.private.x[:16])
        loss, g = run.insider.learn(z, PARTS.private.y[:16])
        expected, _ = honest.server.learn(z, PARTS.private.y[:16])
        assert torch.equal(loss, expected)
        run.client.backward(g)
    assert all(torch.equal(now, run.insider.weights()[name]) for name, now in honest.server.weights().items())


def test_fsha_in_a_u_shape() -> None:
    torch.manual_seed(0)
    bottom, middle, head = cut(digits_cnn(), "relu2", "relu3")
    parties = [
        Learner(name, stage, torch.optim.Adam(stage.parameters(), 1e-3))
        for name, stage in (("bottom", bottom), ("server", middle), ("head", head))
    ]
    insider = FSHA(**TINY).insider(parties[1], knowing())
    x, y = PARTS.private.x[:16], PARTS.private.y[:16]
    for _ in range(2):
        z = parties[0].forward(x)
        with torch.no_grad():
            expected = middle(z)
        h = insider.forward(z)
        assert torch.equal(h, expected)  # the honest middle's
        _, g = parties[2].learn(h, y)
        assert g is not None
        lie = insider.backward(g)
        assert lie is not None
        assert lie.shape == z.shape
        parties[0].backward(lie)
    assert torch.isfinite(u_shaped(parties[0], insider, parties[2], x, y))
    assert len(insider.gaps) == 3


@pytest.mark.parametrize("attack", [SplitSpy(), URVFL(classes=10)])
def test_what_reads_labels_does_not_sit_in_a_u_shape(attack: Any) -> None:
    with pytest.raises(ValueError, match="use FSHA"):
        Run(attack=attack).insider.forward(torch.zeros(2, 32, 8, 8, requires_grad=True))


def test_the_gradient_is_scaled() -> None:
    z, y = torch.rand(8, 32, 8, 8, requires_grad=True), torch.arange(8)
    _, once = Run(attack=FSHA(**TINY)).insider.learn(z, y)
    _, louder = Run(attack=FSHA(**TINY, gradient_scale=10.0)).insider.learn(z, y)
    assert torch.allclose(louder, 10 * once)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_attribute_that_the_client_does_not_train_for_is_inferred(seed: int) -> None:
    odd = knowing(labels=PARTS.auxiliary.y % 2)
    run = Run(attack=FSHAProperty(classes=2, seed=seed), seed=seed, view=odd).train(500)
    z, y = run.client.predict(PARTS.private.x[:200]), PARTS.private.y[:200] % 2
    found = run.insider.infer(run.seen(z))
    assert accuracy(found.scores, y) > 0.85
    assert found.evidence["auxiliary_accuracy"] > 0.9
    assert accuracy(run.insider.infer(run.seen(z.roll(1, 0))).scores, y) < 0.65


def test_the_property_attack_scores_every_class_and_rebuilds_too() -> None:
    run = Run(attack=FSHAProperty(classes=10, **TINY)).train(2)
    view = run.seen(run.client.predict(PARTS.private.x[:4]))
    assert run.insider.infer(view).scores.shape == (4, 10)
    assert run.insider(view).x_hat.shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="set classes"):
        Run(attack=FSHAProperty(classes=2)).train(1)


@pytest.mark.parametrize(
    ("attack", "missing"),
    [
        (FSHA(), "auxiliary"),
        (FSHA(), Kind.ACTIVATION),
        (FSHAProperty(classes=10), "auxiliary_labels"),
        (SplitSpy(), "auxiliary"),
        (SplitSpy(), Kind.LABEL),
        (URVFL(classes=10), "auxiliary_labels"),
        (URVFL(classes=10), Kind.LABEL),
    ],
)
def test_what_is_not_granted_is_not_there(attack: Any, missing: str) -> None:
    if isinstance(missing, Kind):
        lacking = replace(EVERYTHING, sees=frozenset(Kind) - {missing})
    else:
        lacking = replace(EVERYTHING, auxiliary_labels=False, auxiliary=missing != "auxiliary")
    with pytest.raises(LookupError, match="grant"):
        attack.insider(Run().server, knowing(lacking))


def test_predictions_must_be_seen_and_follow_a_training() -> None:
    run = Run(attack=FSHA(**TINY))
    z = run.client.predict(PARTS.private.x[:4])
    with pytest.raises(LookupError, match="train with it first"):
        run.insider(run.seen(z))
    run.train(1)
    with pytest.raises(LookupError, match="grant"):
        run.insider(run.seen(z, replace(EVERYTHING, sees=frozenset({Kind.LABEL}))))
    with pytest.raises(ValueError, match="record the same wire"):
        run.insider(_view_of(torch.zeros(2, 5)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_seed_decides_and_the_global_generator_stays(attack: Any) -> None:
    def lie(one: Any) -> Tensor:
        insider = one.insider(Run().server, knowing())
        z = torch.rand(8, 32, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2):
            insider.learn(z, torch.arange(8))
        return insider.hijacked(z.detach(), torch.arange(8))

    hijack = getattr(attack, "hijack", attack)
    other = replace(attack, hijack=replace(hijack, seed=1)) if hijack is not attack else replace(attack, seed=1)
    before = torch.get_rng_state()
    first, again = lie(attack), lie(attack)
    assert torch.equal(first, again)
    assert not torch.equal(first, lie(other))
    torch.manual_seed(0)
    here = torch.get_rng_state()
    insider = attack.insider(Learner("server", torch.nn.Identity(), loss=_mean), knowing())
    insider.hijacked(torch.rand(8, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    assert torch.equal(torch.get_rng_state(), here)
    torch.set_rng_state(before)


def test_splitspy_answers_honestly_until_its_shadow_can_judge_and_wherever_labels_look_false() -> None:
    run, honest = Run(attack=SplitSpy(FSHA(**TINY))), Run()
    spy: Spy = run.insider
    x, y = PARTS.private.x[:64], PARTS.private.y[:64]
    z = run.client.forward(x)
    _, g = spy.learn(z, y)
    assert torch.equal(g, honest.server.learn(z, y)[1])
    for _ in range(60):  # the shadow learns
        _, g = spy.learn(z, y)
        _, expected = honest.server.learn(z, y)
    assert spy.lies > 0
    assert not torch.equal(g, expected)
    assert g.norm().item() == pytest.approx(expected.norm().item(), rel=1e-4)
    lies, suspected = spy.lies, spy.suspected
    _, g = spy.learn(z, (y + 1) % 10)
    _, expected = honest.server.learn(z, (y + 1) % 10)
    assert torch.equal(g, expected)
    assert (spy.lies, spy.suspected) == (lies, suspected + 1)
    with pytest.raises(ValueError, match="class labels"):
        spy.answer(z, torch.rand(64), expected, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FSHA(bounds=(1.0, 1.0)), "expected bounds"),
        (lambda: Run("1", FSHA(), parts=TABLE, model=table_mlp), "pass bounds=None"),
        (lambda: FSHA()(knowing()), "put insider"),
        (lambda: SplitSpy()(knowing()), "put insider"),
        (lambda: FSHA(lr=0.0), "learning rates"),
        (lambda: FSHA(penalty=-1.0), "a penalty of 0 or more"),
        (lambda: FSHA(batch_size=0), "at least one sample"),
        (lambda: SplitSpy(suspicion=0.0), "suspicion above 0"),
        (lambda: URVFL(classes=1), "at least two classes"),
        (lambda: URVFL(classes=10, pretraining=0), "a step of pretraining"),
        (lambda: Run(attack=URVFL(classes=5)), "labels from 0 to 4"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def _mean(output: Tensor, y: Tensor) -> Tensor:
    return output.mean()


def _view_of(z: Tensor) -> View:
    carried = wire(Learner("server", torch.nn.Identity()))
    carried.party.predict(z)
    return observe(carried.record, threat=EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_of_fsha(seed: int) -> None:
    run = Run(attack=FSHA(seed=seed), seed=seed, false_labels=0.1).train(400)
    assert splitguard_score(run.piles, start=20) < 0.9  # honest: 1.000
    assert sum(run.gaps[:50]) / 50 < 0.01  # honest: .55
    assert sum(run.gaps[-100:]) / 100 < 0.2  # honest: .45; the better the critic, the more samples differ by class
    run.false_labels = 0.0
    assert run.train(600).score().metrics["mse"] < 0.014


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "attack", "mse"),
    [
        ("relu1", FSHA(pilot=lambda: cut(digits_cnn(), "relu1")[0], spread=1.0), 0.005),
        ("relu3", FSHA(), 0.025),
    ],
)
def test_the_figures_of_fsha_at_other_cuts(place: str, attack: FSHA, mse: float) -> None:
    assert Run(place, attack).train(1000).score().metrics["mse"] < mse


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splitspy_passes_splitguard_and_rebuilds(seed: int) -> None:
    run = Run(attack=SplitSpy(FSHA(seed=seed)), seed=seed, false_labels=0.1).train(600)
    assert run.score().metrics["mse"] < 0.025
    assert splitguard_score(run.piles, start=20) > 0.8
    assert run.insider.suspected > 0.7 * len(run.piles[True])
    assert sum(run.gaps[-200:]) / 200 < 0.2  # which the Scrutinizer still sees


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_urvfl_passes_both_detectors_and_rebuilds(seed: int) -> None:
    run = Run(attack=URVFL(classes=10, seed=seed), seed=seed, false_labels=0.1).train(600)
    assert run.score().metrics["mse"] < 0.02
    assert splitguard_score(run.piles, start=20) > 0.95
    assert sum(run.gaps) / len(run.gaps) > 0.2


@pytest.mark.slow
def test_a_louder_lie_outweighs_nopeek() -> None:
    quiet, loud = (
        Run(attack=FSHA(gradient_scale=scale), guard=NoPeek(30.0)).train(400).score().metrics["mse"]
        for scale in (1.0, 100.0)
    )
    assert loud < 0.03
    assert quiet > 0.05
