"""Passive attacks after the training: each reaches a stated score, and its baseline where the signal is destroyed."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks.inversion.decoder import Decoder
from attacks.inversion.fora import FORA, _of_training, discrepancy
from attacks.inversion.grn import GRN
from attacks.inversion.latent import LatentSearch
from attacks.inversion.networks import Dense
from attacks.inversion.reconstruction import Inversion, Reconstruction
from attacks.inversion.shadow import Shadow, imagined
from attacks.inversion.unsplit import UnSplit
from defenses import TopKActivations
from splitlearn import (
    Batches,
    Encoder,
    Features,
    Grants,
    Joined,
    Learner,
    Threat,
    View,
    cut,
    epochs_of,
    fit,
    observe,
    summed,
    vanilla,
    vertical,
    wire,
)  # fmt: skip
from splitlearn.data import load, split, standardise
from splitlearn.metrics import LeakageScore, score_reconstruction
from splitlearn.models import digits_cnn

NOTHING = Threat()
UNLABELLED = Threat(auxiliary=True)
LABELLED = Threat(auxiliary=True, auxiliary_labels=True)
WHITE_BOX = Threat(white_box=True)


class Victim:
    """A digits CNN trained across a wire, whose record is kept, and what its server sees of some private samples."""

    def __init__(self, place: str, *, epochs: int = 2, seed: int = 0):
        self.parts = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)
        torch.manual_seed(seed)
        self.place = place
        self.bottom, self.top = cut(digits_cnn(), place)
        adam = torch.optim.Adam
        self.client = Learner("client", self.bottom, adam(self.bottom.parameters(), 1e-3), seed=seed)
        self.wire = wire(Learner("server", self.top, adam(self.top.parameters(), 1e-3), seed=seed))
        batches = Batches(self.parts.private.x, self.parts.private.y, batch_size=32, seed=seed)
        fit(epochs_of(partial(vanilla, self.client, self.wire.party), batches), epochs=epochs)
        self.trained = list(self.wire.record.exchanges)

    def view(self, z: Tensor, threat: Threat, *, num_auxiliary: int = 600) -> View:
        self.wire.record.exchanges.clear()
        self.wire.record.exchanges.extend(self.trained)
        self.wire.party.predict(z)
        auxiliary = self.parts.auxiliary
        grants = Grants(Encoder(self.bottom), auxiliary.x[:num_auxiliary], auxiliary.y[:num_auxiliary])
        return observe(self.wire.record, threat=threat, grants=grants)

    def stage(self) -> nn.Module:
        """Return a fresh bottom, as who knows the architecture builds it."""
        return cut(digits_cnn(), self.place)[0]

    def activations(self, num: int = 32) -> Tensor:
        return self.client.predict(self.parts.private.x[:num])

    def score(self, found: Reconstruction) -> LeakageScore:
        x = self.parts.private.x[: len(found.x_hat)]
        return score_reconstruction(x, found.x_hat, auxiliary_x=self.parts.auxiliary.x)


@pytest.fixture(scope="module")
def victim() -> Victim:
    return Victim("relu1", epochs=6)


class Table:
    """Vertical learning on a table: an active party with the labels and some columns, a passive one with the others."""

    def __init__(self, *, seed: int = 0):
        parts = standardise(split(load("breast_cancer"), private=400, auxiliary=100, test=69, seed=0))
        self.x, self.auxiliary_x = parts.private.x, parts.auxiliary.x
        self.columns, self.others = tuple(range(0, 30, 2)), tuple(range(1, 30, 2))
        torch.manual_seed(seed)
        self.path = BySide(self.columns, self.others)
        self.top = nn.Sequential(nn.ReLU(), nn.Linear(24, 2))
        clients = [
            Features(Learner(name, stage, torch.optim.Adam(stage.parameters(), 1e-2)), self.x[:, list(columns)])
            for name, stage, columns in (("own", self.path.own, self.columns), ("other", self.path.other, self.others))
        ]
        self.joined = Joined(clients, summed)
        owner = Learner("owner", self.top, torch.optim.Adam(self.top.parameters(), 1e-2))
        batches = Batches(torch.arange(400), parts.private.y, batch_size=32, seed=seed)
        fit(epochs_of(partial(vertical, owner, clients, join=summed), batches), epochs=5)
        self.wire, self.z = wire(owner), self.joined.predict(torch.arange(400))

    def view(self, z: Tensor, threat: Threat = WHITE_BOX) -> View:
        self.wire.record.clear()
        self.wire.party.predict(z)
        return observe(self.wire.record, threat=threat, grants=Grants(Encoder(self.path)))

    def attack(self, **settings) -> GRN:
        return GRN(self.x[:, list(self.columns)], self.columns, 30, **settings)

    def score(self, found: Reconstruction) -> LeakageScore:
        others = list(self.others)
        return score_reconstruction(self.x[:, others], found.x_hat, auxiliary_x=self.auxiliary_x[:, others])


class BySide(nn.Module):
    """What two parties make of their columns, added up."""

    def __init__(self, columns: tuple[int, ...], others: tuple[int, ...]):
        super().__init__()
        self.columns, self.others = list(columns), list(others)
        self.own, self.other = nn.Linear(len(columns), 24), nn.Linear(len(others), 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x[:, self.columns]) + self.other(x[:, self.others])


class Decoded(nn.Module):
    """The decoder of an autoencoder of auxiliary digits, whose latents have mean 0 and spread 1."""

    def __init__(self, x: Tensor, *, width: int = 24, steps: int = 600):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.Unflatten(1, (1, 8, 8)))
        encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, width))
        scale = nn.BatchNorm1d(width, affine=False)
        optimizer = torch.optim.Adam([*self.net.parameters(), *encode.parameters()], 3e-3)
        for _ in range(steps):
            batch = x[torch.randint(len(x), (64,))]
            loss = (self.net(scale(encode(batch))) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def forward(self, w: Tensor) -> Tensor:
        found: Tensor = self.net(w)
        return found


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


@pytest.fixture(scope="module")
def generator(victim: Victim) -> Decoded:
    torch.manual_seed(0)
    return Decoded(victim.parts.auxiliary.x)


def small_shadow(victim: Victim) -> Shadow:
    return Shadow(victim.top, shadows=1, epochs=2, inversions=(Decoder(Dense(depth=0), epochs=8, lr=2e-3),))


def small_unsplit(victim: Victim) -> UnSplit:
    return UnSplit(victim.stage, (1, 8, 8), rounds=20, clones=1)


def small_fora() -> FORA:
    return FORA(Decoder(Dense(depth=0), epochs=8, lr=2e-3), steps=30)


def destroyed(z: Tensor) -> dict[str, Tensor]:
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return {"permuted": z.roll(1, 0), "noise": z.mean() + z.std() * noise, "zero": torch.zeros_like(z)}


def search(generator: nn.Module) -> LatentSearch:
    return LatentSearch(generator, (24,), iterations=120, starts=1)


DESTROYED = pytest.mark.parametrize("how", ["permuted", "noise", "zero"])


def test_a_shadow_is_inverted_in_the_place_of_the_bottom(victim: Victim) -> None:
    attack = Shadow(victim.top, shadows=2, inversions=(Decoder(Dense(256, 1), epochs=10, lr=2e-3),))
    found = attack(victim.view(victim.activations(), LABELLED))
    assert victim.score(found).metrics["mse"] < 0.05
    assert float(found.evidence["auxiliary_mse"]) < float(found.evidence["auxiliary_mse_mean_image"])
    assert float(found.evidence["shadow_accuracy"]) > 0.7
    assert found.evidence["converged"] in (0.0, 1.0)


def test_unsplit_needs_the_architecture_alone(victim: Victim) -> None:
    found = UnSplit(victim.stage, (1, 8, 8), clones=1)(victim.view(victim.activations(16), NOTHING))
    assert victim.score(found).metrics["mse"] < 0.01
    assert found.evidence["converged"] in (0.0, 1.0)


@pytest.mark.slow
def test_fora_needs_activations_and_samples_alone(victim: Victim) -> None:
    found = FORA(steps=300)(victim.view(victim.activations(), UNLABELLED))
    assert victim.score(found).metrics["mse"] < 0.03
    assert float(found.evidence["discrepancy_last"]) < 0.2 * float(found.evidence["discrepancy_first"])


def test_a_generator_guesses_the_other_partys_columns(table: Table) -> None:
    found = table.attack(epochs=100)(table.view(table.z))
    own, others = list(table.columns), list(table.others)
    design = torch.cat([table.auxiliary_x[:, own], torch.ones(100, 1)], 1)
    weights = torch.linalg.lstsq(design, table.auxiliary_x[:, others]).solution
    guessed = torch.cat([table.x[:, own], torch.ones(400, 1)], 1) @ weights
    regression = (guessed - table.x[:, others]).square().mean().item()  # which the own columns tell without an attack
    score = table.score(found)
    assert score.metrics["mse"] < 0.8 * regression < 0.4 * score.baselines["mse_mean_image"]
    assert found.evidence["converged"] in (0.0, 1.0)
    told_less = table.score(table.attack(epochs=100, top=table.top)(table.view(table.z)))
    assert told_less.advantage < 0.5 * score.advantage  # two outputs tell less than 24 activations


def test_a_learned_prior_is_searched(victim: Victim, generator: Decoded) -> None:
    found = search(generator)(victim.view(victim.activations(), WHITE_BOX))
    assert victim.score(found).metrics["mse"] < 0.009
    assert found.evidence["converged"] == 1
    again = replace(search(generator), starts=2)(victim.view(victim.activations(), WHITE_BOX))
    assert float(again.evidence["objective_best"]) <= float(found.evidence["objective_best"])


@DESTROYED
@pytest.mark.parametrize("name", ["shadow", "unsplit", "fora", "latent"])
def test_without_a_signal_it_falls_to_the_baseline(victim: Victim, generator: Decoded, name: str, how: str) -> None:
    attacks: dict[str, Inversion] = {
        "shadow": small_shadow(victim), "unsplit": small_unsplit(victim), "fora": small_fora(),
        "latent": search(generator),
    }  # fmt: skip
    view = victim.view(destroyed(victim.activations())[how], replace(LABELLED, white_box=True))
    assert victim.score(attacks[name](view)).advantage <= 0.1


@DESTROYED
def test_without_a_signal_the_other_columns_are_not_guessed(table: Table, how: str) -> None:
    assert table.score(table.attack(epochs=20)(table.view(destroyed(table.z)[how]))).advantage <= 0.1


@pytest.mark.parametrize(
    ("name", "lacking", "names"),
    [
        ("shadow", NOTHING, "auxiliary_labels=True"),
        ("shadow", UNLABELLED, "auxiliary_labels=True"),
        ("unsplit", Threat(sees=frozenset()), "Kind.ACTIVATION"),
        ("fora", NOTHING, "auxiliary=True"),
        ("fora", Threat(sees=frozenset(), auxiliary=True), "Kind.ACTIVATION"),
        ("latent", UNLABELLED, "white_box=True"),
    ],
)
def test_what_is_not_granted_is_not_there(
    victim: Victim, generator: Decoded, name: str, lacking: Threat, names: str
) -> None:
    attacks: dict[str, Inversion] = {
        "shadow": small_shadow(victim), "unsplit": small_unsplit(victim), "fora": small_fora(),
        "latent": search(generator),
    }  # fmt: skip
    with pytest.raises(LookupError, match=names):
        attacks[name](victim.view(victim.activations(4), lacking))


def test_a_generator_without_its_grants(table: Table) -> None:
    with pytest.raises(LookupError, match="white_box=True"):
        table.attack()(table.view(table.z, NOTHING))
    with pytest.raises(LookupError, match=r"Kind\.PREDICTION"):
        table.attack(top=table.top)(table.view(table.z, Threat(sees=frozenset(), white_box=True)))


def test_the_seed_decides_and_the_global_generator_stays(victim: Victim, table: Table) -> None:
    z = victim.activations(4)
    view = victim.view(z, LABELLED, num_auxiliary=60)
    small: list[tuple[Shadow | UnSplit | FORA | GRN | LatentSearch, View]] = [
        (replace(small_shadow(victim), epochs=1), view),
        (replace(small_unsplit(victim), rounds=2), view),
        (FORA(Decoder(Dense(depth=0), epochs=4), steps=3), view),
        (table.attack(epochs=2), table.view(table.z)),
    ]
    for attack, seen in small:
        before = torch.get_rng_state()
        first, again = attack(seen).x_hat, attack(seen).x_hat
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again)
        assert not torch.equal(first, replace(attack, seed=1)(seen).x_hat)


def test_the_victims_models_stay_as_they_are(victim: Victim, generator: Decoded) -> None:
    before = copy.deepcopy([victim.top.state_dict(), victim.bottom.state_dict(), generator.state_dict()])
    view = victim.view(victim.activations(4), replace(LABELLED, white_box=True), num_auxiliary=60)
    small_shadow(victim)(view)
    search(generator)(view)
    for old, module in zip(before, (victim.top, victim.bottom, generator), strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in [*victim.top.parameters(), *generator.parameters()])


def test_a_shadow_that_nothing_inverts_is_the_mean_image(victim: Victim) -> None:
    nonsense = LatentSearch(nn.Sequential(nn.Linear(1, 64), nn.Unflatten(1, (1, 8, 8))), (1,), iterations=1)
    view = victim.view(victim.activations(4), LABELLED, num_auxiliary=60)
    found = Shadow(victim.top, epochs=1, inversions=(nonsense,))(view)
    assert found.evidence["attack"] == "mean image"
    assert torch.equal(found.x_hat, found.x_hat[:1].expand(4, -1, -1, -1))


def test_an_imagined_view_holds_what_it_is_given(victim: Victim) -> None:
    z, x = victim.activations(3), victim.parts.auxiliary.x[:5]
    view = imagined(z, victim.bottom, x)
    assert torch.equal(view.activations(), z)
    assert torch.equal(view.auxiliary_x, x)
    assert torch.allclose(view.query(victim.parts.private.x[:3]), z, atol=1e-6)


def test_discrepancy_by_hand_and_between_distributions() -> None:
    a, b = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]])
    kernels = sum(torch.exp(torch.tensor(-1 / (2 * width * 0.5))) for width in (0.125, 0.25, 0.5, 1.0, 2.0))
    assert discrepancy(a, b).item() == pytest.approx(5 + 5 - 2 * float(kernels), rel=1e-5)
    same = torch.stack([discrepancy(torch.randn(32, 4), torch.randn(32, 4)) for _ in range(50)])
    other = discrepancy(torch.randn(32, 4), 1 + torch.randn(32, 4))
    assert abs(same.mean()) < 0.05 < other  # unbiased: of either sign


def test_what_has_another_shape_is_refused(victim: Victim, table: Table) -> None:
    view = victim.view(victim.activations(4), LABELLED, num_auxiliary=60)
    with pytest.raises(ValueError, match="expected a shadow"):
        Shadow(victim.top, lambda: nn.Conv2d(1, 16, 3))(view)
    with pytest.raises(ValueError, match="have the shape"):
        UnSplit(victim.stage, (1, 6, 6))(view)
    with pytest.raises(ValueError, match="400 samples"):
        GRN(torch.zeros(3, 15), table.columns, 30)(table.view(table.z))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Shadow(nn.Identity(), inversions=()), "sample a batch and inversion"),
        (lambda: UnSplit(nn.Identity, (1,), clones=0), "at least one round"),
        (lambda: UnSplit(nn.Identity, (1,), bounds=(1.0, 0.0)), "expected bounds"),
        (lambda: FORA(bounds=(1.0, 0.0)), "expected bounds"),
        (lambda: FORA(share=2.0), "share"),
        (lambda: GRN(torch.zeros(2, 2), (0, 0), 3), "numbered once"),
        (lambda: GRN(torch.zeros(2, 2), (0, 1), 3, draws=0), "one draw"),
        (lambda: LatentSearch(nn.Identity(), (1,), starts=0), "one start"),
    ],
)
def test_settings_that_make_no_sense(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_clone_of_unsplit_needs_weights_and_its_estimates_may_be_many(victim: Victim) -> None:
    with pytest.raises(ValueError, match="a stage with weights"):
        UnSplit(nn.Identity, (16, 8, 8))(victim.view(victim.activations(2), NOTHING))
    many = torch.linspace(0, 0.5, 2**24 + 64)  # more than quantile() takes
    scaled = UnSplit(victim.stage, (1,))._scaled(many)
    assert scaled.min() == 0
    assert scaled[int(0.985 * len(many))] < 1 == scaled[int(0.995 * len(many))]


def test_fora_reads_the_training_of_a_u_shape_and_does_not_mix_releases(victim: Victim) -> None:
    z, x = victim.activations(8), victim.parts.auxiliary
    line = wire(Learner("middle", nn.Identity()))
    sent = torch.rand(16, 16, 8, 8, requires_grad=True)
    line.party.forward(sent)
    line.party.backward(torch.zeros(16, 16, 8, 8))
    line.party.predict(z)
    (found,) = _of_training(observe(line.record, threat=UNLABELLED, grants=Grants(None, x.x)))
    assert torch.equal(found, sent.detach())
    line.party.predict(z)
    twice = observe(line.record, threat=replace(UNLABELLED, releases=2), grants=Grants(None, x.x))
    alone = wire(Learner("middle", nn.Identity()))
    alone.party.predict(z)
    once = observe(alone.record, threat=UNLABELLED, grants=Grants(None, x.x))
    assert torch.equal(small_fora()(twice).x_hat, small_fora()(once).x_hat)  # training is left out, means are what is


@pytest.mark.parametrize("name", ["shadow", "fora"])
def test_a_guard_that_is_known_is_simulated(victim: Victim, name: str) -> None:
    seen: list[View] = []

    @dataclass(frozen=True)
    class Looks:
        bounds: None = None

        def __call__(self, view: View) -> Reconstruction:
            seen.append(view)
            z = view.activations()
            return Reconstruction(torch.zeros(len(z), 1, 8, 8), {"converged": 1.0})

    quick: dict[str, Inversion] = {
        "shadow": Shadow(victim.top, shadows=1, epochs=1, inversions=(Looks(),), guard=TopKActivations(0.1)),
        "fora": FORA(Looks(), steps=2, guard=TopKActivations(0.1)),
    }
    quick[name](victim.view(victim.activations(4), LABELLED, num_auxiliary=60))
    made = seen[0].query(victim.parts.auxiliary.x[:3])
    assert (made != 0).flatten(1).sum(1).max() <= 0.1 * made[0].numel() + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "shadow", "unsplit", "fora", "latent"),
    [("relu1", 0.03, 0.005, 0.03, 0.006), ("relu2", 0.04, 0.02, 0.05, 0.008)],
)
def test_the_figures_at_each_depth(place: str, shadow: float, unsplit: float, fora: float, latent: float) -> None:
    victim = Victim(place, epochs=15)
    z = victim.activations()
    torch.manual_seed(0)
    generator = Decoded(victim.parts.auxiliary.x)

    def mse(attack: Inversion, threat: Threat) -> float:
        return victim.score(attack(victim.view(z, threat))).metrics["mse"]

    assert mse(Shadow(victim.top), LABELLED) < shadow
    assert mse(UnSplit(victim.stage, (1, 8, 8)), NOTHING) < unsplit
    assert mse(FORA(), UNLABELLED) < fora
    assert mse(LatentSearch(generator, (24,)), WHITE_BOX) < latent
