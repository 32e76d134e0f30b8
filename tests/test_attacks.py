"""Each attack reaches a stated score where nothing protects, and its baseline where the signal is destroyed."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks import Convolutional, Decoder, Dense, Inversion, MaximumLikelihood, decoder_family
from attacks.inversion.priors import GaussianPrior, total_variation
from privacy import ClippedGaussian
from splitlearn import (
    Batches,
    Encoder,
    Grants,
    Guard,
    Learner,
    Threat,
    TopK,
    View,
    cut,
    epochs_of,
    fit,
    observe,
    vanilla,
    wire,
)  # fmt: skip
from splitlearn.data import load, split
from splitlearn.metrics import score_reconstruction
from splitlearn.models import digits_cnn

EVERYTHING = Threat(white_box=True, queries=True, auxiliary=True)

# One row an attack, at toy size: name, attack, the MSE it stays below at the first cut, the grants it needs.
ATTACKS = [
    ("maximum likelihood", MaximumLikelihood(iterations=100), 0.0005, ["white_box"]),
    ("affine decoder", Decoder(Dense(depth=0), epochs=15), 0.006, ["queries", "auxiliary"]),
    ("dense decoder", Decoder(Dense(128, 1), epochs=25), 0.008, ["queries", "auxiliary"]),
    ("convolutional decoder", Decoder(Convolutional(16, 1), epochs=10, lr=1e-2), 0.006, ["queries", "auxiliary"]),
]
BY_NAME = [pytest.param(*row[1:], id=row[0]) for row in ATTACKS]


class Victim:
    """A digits CNN trained across a wire, and what its server sees of some private samples."""

    def __init__(self, place: str, *, guard: Guard | None = None, codec=None, seed: int = 0, epochs: int = 2):
        self.parts = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)
        private = self.parts.private
        torch.manual_seed(seed)
        self.bottom, top = cut(digits_cnn(), place)
        self.guard, self.codec = guard, codec
        adam = torch.optim.Adam
        self.client = Learner("client", self.bottom, adam(self.bottom.parameters(), 1e-3), guard, seed=seed)
        self.wire = wire(Learner("server", top, adam(top.parameters(), 1e-3), seed=seed), codec)
        batches = Batches(private.x, private.y, batch_size=32, seed=seed)
        fit(epochs_of(partial(vanilla, self.client, self.wire.party), batches), epochs=epochs)

    def view(
        self, z: Tensor, *, threat: Threat = EVERYTHING, num_auxiliary: int = 300, encoder: Encoder | None = None
    ) -> View:
        self.wire.record.clear()
        self.wire.party.predict(z)
        encoder = encoder or Encoder(self.bottom, self.guard, self.codec)
        grants = Grants(encoder, self.parts.auxiliary.x[:num_auxiliary])
        return observe(self.wire.record, threat=threat, grants=grants)

    def score(self, attack: Inversion, *, num: int = 32, **settings):
        x = self.parts.private.x[:num]
        found = attack(self.view(self.client.predict(x), **settings))
        return score_reconstruction(x, found.x_hat, auxiliary_x=self.parts.auxiliary.x), found


@pytest.fixture(scope="module")
def victim() -> Victim:
    return Victim("relu1")


@pytest.fixture(scope="module")
def noisy() -> Victim:
    return Victim("relu1", guard=ClippedGaussian(10.0, 0.02))


@pytest.fixture(scope="module")
def sparse() -> Victim:
    return Victim("relu1", codec=TopK(0.02))


@pytest.mark.parametrize(("attack", "mse", "needs"), BY_NAME)
def test_unprotected_inputs_are_rebuilt(victim, attack, mse, needs):
    score, found = victim.score(attack)
    assert score.metrics["mse"] < mse
    assert score.baselines["mse_mean_image"] == pytest.approx(0.073, abs=0.006)  # of 32 samples
    assert found.x_hat.shape == (32, 1, 8, 8)
    assert 0 <= found.x_hat.min() <= found.x_hat.max() <= 1
    assert found.evidence["converged"] in (0.0, 1.0)


@pytest.mark.parametrize("destroyed", ["permuted", "noise", "zero"])
@pytest.mark.parametrize(("attack", "mse", "needs"), BY_NAME)
def test_without_a_signal_it_falls_to_the_baseline(victim, attack, mse, needs, destroyed):
    x = victim.parts.private.x[:32]
    z = victim.client.predict(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    z = {"permuted": z.roll(1, 0), "noise": z.mean() + z.std() * noise, "zero": torch.zeros_like(z)}[destroyed]
    score = score_reconstruction(x, attack(victim.view(z)).x_hat, auxiliary_x=victim.parts.auxiliary.x)
    assert score.advantage <= 0.1


@pytest.mark.parametrize(
    ("attack", "missing"),
    [
        pytest.param(attack, missing, id=f"{name}, no {missing}")
        for name, attack, _, needs in ATTACKS
        for missing in needs
    ],
)
def test_what_is_not_granted_is_not_there(victim, attack, missing):
    lacking = replace(EVERYTHING, **{missing: False})
    if missing == "queries":
        lacking = replace(lacking, white_box=False)  # who has the weights can query them
    with pytest.raises(LookupError, match="grant"):
        attack(victim.view(victim.client.predict(victim.parts.private.x[:4]), threat=lacking))


@pytest.mark.parametrize(("attack", "mse", "needs"), BY_NAME)
def test_the_seed_decides_and_the_global_generator_stays(noisy, attack, mse, needs):
    small = replace(attack, iterations=3) if isinstance(attack, MaximumLikelihood) else replace(attack, epochs=1)
    view = noisy.view(noisy.client.predict(noisy.parts.private.x[:4]), num_auxiliary=40)
    before = torch.get_rng_state()
    first, again = small(view).x_hat, small(view).x_hat
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, replace(small, seed=1)(view).x_hat)


def test_maximum_likelihood_without_auxiliary_samples(victim):
    alone = replace(EVERYTHING, auxiliary=False)
    score, found = victim.score(MaximumLikelihood(input_shape=(1, 8, 8)), threat=alone)
    assert score.metrics["mse"] < 0.001
    assert found.evidence["prior"] == "total variation"
    with pytest.raises(ValueError, match="pass input_shape"):
        victim.score(MaximumLikelihood(iterations=1), threat=alone)
    with pytest.raises(ValueError, match="have the shape"):
        victim.score(MaximumLikelihood(iterations=1, input_shape=(1, 6, 6)), threat=alone)


def test_maximum_likelihood_trusts_the_prior_more_under_noise(victim, noisy):
    _, clear = victim.score(MaximumLikelihood(iterations=100))
    score, blurred = noisy.score(MaximumLikelihood(iterations=100))
    assert blurred.evidence["prior"] == "gaussian"
    assert blurred.evidence["weight"] > 10 * clear.evidence["weight"]
    assert score.advantage > 0.6


@pytest.mark.parametrize("attack", [MaximumLikelihood(iterations=60), Decoder(Dense(128), epochs=10)])
@pytest.mark.parametrize("protected", ["noisy", "sparse"])
def test_knowing_the_protection_makes_the_attack_stronger(request, attack, protected):
    victim = request.getfixturevalue(protected)
    adaptive, _ = victim.score(attack)
    unaware, _ = victim.score(attack, encoder=Encoder(victim.bottom))
    assert adaptive.metrics["mse"] < 0.9 * unaware.metrics["mse"]


def test_the_decoder_reports_its_held_out_error_beside_the_mean_image(victim):
    score, found = victim.score(Decoder(Dense(128), epochs=15))
    assert found.evidence["auxiliary_mse"] == pytest.approx(score.metrics["mse"], rel=0.5)
    assert found.evidence["auxiliary_mse_mean_image"] == pytest.approx(0.073, abs=0.01)


def test_a_decoder_that_learned_nothing_is_the_mean_image(victim):
    view = victim.view(torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    found = Decoder(Dense(64), epochs=1, lr=1e3)(view)  # diverges at once
    assert found.evidence["best_epoch"] == 0
    assert torch.equal(found.x_hat, found.x_hat[:1].expand(4, -1, -1, -1))


@pytest.mark.parametrize(
    ("z_shape", "x_shape"),
    [
        ((4, 8, 8), (1, 8, 8)),
        ((4, 4, 4), (3, 8, 8)),
        ((4, 3, 3), (1, 8, 7)),
        ((4, 9, 9), (1, 8, 8)),
        ((20,), (1, 8, 8)),
        ((4, 16), (1, 64)),
        ((20,), (1, 50)),
    ],
)
@pytest.mark.parametrize("network", [Dense(8, 2), Dense(depth=0), Convolutional(8, 2)])
def test_networks_fit_any_shapes_and_start_at_zero(network, z_shape, x_shape):
    built = network.build(z_shape, x_shape)
    assert torch.equal(built(torch.randn(3, *z_shape)), torch.zeros(3, *x_shape))


def _linear_view(x: Tensor, stage: nn.Module) -> View:
    """Return the view of a server that is sent ``stage(x)`` for the first 16 rows; the rest are its own."""
    client = Learner("client", stage)
    seen = wire(Learner("server", nn.Identity()))
    seen.party.predict(client.predict(x[:16]))
    return observe(seen.record, threat=EVERYTHING, grants=Grants(Encoder(stage), x[16:]))


@pytest.mark.parametrize(
    ("shape", "make_stage"),
    [
        pytest.param((6,), lambda: nn.Linear(6, 12), id="table"),
        pytest.param((1, 16), lambda: nn.Conv1d(1, 4, 3, padding=1), id="signal"),
        pytest.param((1, 8, 8), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128)), id="flat activations"),
    ],
)
def test_other_inputs_are_rebuilt_too_and_without_bounds(shape, make_stage):
    torch.manual_seed(0)
    x = 3 * torch.randn(216, *shape, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    view = _linear_view(x, make_stage())
    decoders = {name: replace(decoder, epochs=20) for name, decoder in decoder_family(shape).items()}
    for name, attack in {"likelihood": MaximumLikelihood(lr=0.5, iterations=100), **decoders}.items():
        found = replace(attack, bounds=None)(view)
        score = score_reconstruction(x[:16].flatten(1), found.x_hat.flatten(1), auxiliary_x=x[16:].flatten(1))
        assert score.advantage > 0.7, name


def test_a_family_has_members_of_several_sizes_for_every_input():
    assert all(len(decoder_family(shape)) == 3 for shape in [(30,), (1, 128), (3, 32, 32), (1, 4, 4, 4)])
    volumes = decoder_family((1, 4, 4, 4)).values()
    assert all(one.network.build((5,), (1, 4, 4, 4))(torch.rand(2, 5)).shape == (2, 1, 4, 4, 4) for one in volumes)
    assert all(attack.seed == 5 for attack in decoder_family((30,), seed=5).values())


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert total_variation(x).item() == pytest.approx(1 + 0 + 0.5 + 0.5)
    assert total_variation(x.flatten(2)).item() == pytest.approx(1 + 0.5 + 0)
    assert total_variation(x.flatten(1)).item() == pytest.approx(1 + 0.25 + 0.25)


def test_gaussian_prior_against_the_inverse_covariance():
    torch.manual_seed(0)
    samples, x = (
        torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64),
        torch.randn(3, 4).double(),
    )
    covariance = samples.T.cov(correction=0)
    covariance += 0.05 * covariance.trace() / 4 * torch.eye(4)
    away = x - samples.mean(0)
    expected = (away @ covariance.inverse() * away).sum(1)
    assert torch.allclose(GaussianPrior(samples)(x), expected)
    few = GaussianPrior(samples[:3])  # more dimensions than samples: the rest is unlikely, not impossible
    assert torch.isfinite(few(x)).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaximumLikelihood(iterations=0), "at least one iteration"),
        (lambda: MaximumLikelihood(gaussian_weights=(-1.0,)), "weights of 0 or more"),
        (lambda: Decoder(Dense(), epochs=0), "at least one epoch"),
        (lambda: Decoder(Dense(), lr=float("nan")), "lr > 0"),
        (lambda: Convolutional().build((5,), (30,)), "use Dense"),
        (lambda: Decoder(Dense(), bounds=(1.0, 0.0)), "expected bounds"),
        (lambda: MaximumLikelihood(bounds=(0.0, float("nan"))), "expected bounds"),
        (lambda: Dense(width=0), "width"),
        (lambda: Convolutional(depth=-1), "depth"),
    ],
)
def test_settings_that_make_no_sense(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_too_few_auxiliary_samples(victim):
    view = victim.view(victim.client.predict(victim.parts.private.x[:4]), num_auxiliary=3)
    for attack in (MaximumLikelihood(), Decoder(Dense())):
        with pytest.raises(ValueError, match="at least 8 auxiliary samples"):
            attack(view)


def test_auxiliary_samples_that_cannot_be_right_are_told_of(victim):
    z, good = victim.client.predict(victim.parts.private.x[:4]), victim.parts.auxiliary.x
    for x, says in [
        (3 * good - 1, r"within the bounds \(0.0, 1.0\), got values from -1 to 2; pass bounds=None"),
        (good / 0, "finite"),
        (good[:, 0, 0, 0], "got \\(600,\\)"),
        (good.long(), "floating-point"),
        (good.numpy(), "got ndarray"),
    ]:
        victim.wire.record.clear()
        victim.wire.party.predict(z)
        view = observe(victim.wire.record, threat=EVERYTHING, grants=Grants(Encoder(victim.bottom), x))
        for attack in (MaximumLikelihood(), Decoder(Dense())):
            with pytest.raises(ValueError, match=says):
                attack(view)


def test_inputs_far_from_the_bounds_are_rebuilt_once_the_bounds_are_said():
    torch.manual_seed(0)
    x = torch.randn(216, 6, generator=torch.Generator().manual_seed(0))
    view = _linear_view(x, nn.Linear(6, 12))
    for attack in (MaximumLikelihood(), Decoder(Dense())):
        with pytest.raises(ValueError, match="bounds"):
            attack(view)
        found = replace(attack, bounds=(-5.0, 5.0))(view)
        assert score_reconstruction(x[:16], found.x_hat, auxiliary_x=x[16:]).advantage > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("place", "likelihood", "decoder"), [("relu1", 1e-4, 0.002), ("relu2", 1e-3, 0.008), ("relu3", 0.005, 0.02)]
)
def test_the_figures_at_each_depth(place, likelihood, decoder, seed):
    victim = Victim(place, seed=seed, epochs=15)
    score, _ = victim.score(MaximumLikelihood(seed=seed), num=128, num_auxiliary=600)
    assert score.metrics["mse"] < likelihood
    family = decoder_family((1, 8, 8), seed=seed).values()
    errors = [victim.score(attack, num=128, num_auxiliary=600)[0].metrics["mse"] for attack in family]
    assert min(errors) < decoder
