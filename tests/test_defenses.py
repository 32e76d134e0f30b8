"""Heuristic defenses: each does what its formula says, trains, resumes, and meets the attacker who knows it."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import inf, nan, sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from attacks import Decoder, Dense
from defenses import (
    MID,
    AdversarialRepresentation,
    Binarised,
    Bottleneck,
    Disco,
    Dropout,
    GaussianNoise,
    LaplaceNoise,
    LearnedNoise,
    PatchShuffle,
    Quantised,
    ResSFL,
    TopKActivations,
    learn_noise,
    narrowed,
    pretrain_resistant,
    proxy_decoder,
)
from splitlearn import (
    Batches,
    Encoder,
    Grants,
    Guard,
    Guards,
    Learner,
    Threat,
    TopK,
    cut,
    epochs_of,
    fit,
    load_checkpoint,
    observe,
    save_checkpoint,
    vanilla,
    wire,
)
from splitlearn.codecs import Int8, through
from splitlearn.data import load, split
from splitlearn.metrics import accuracy, score_reconstruction, ssim_per_sample
from splitlearn.models import digits_cnn, token_transformer

Last = Callable[[], nn.Module]

# One row a defense: name, what makes the guard, what ends the stage of a toy bottom of 4 channels.
DEFENSES: list[tuple[str, Callable[[], Guard], Last]] = [
    ("gaussian noise", lambda: GaussianNoise(0.1), nn.Identity),
    ("laplace noise", lambda: LaplaceNoise(0.1), nn.Identity),
    ("dropout", lambda: Dropout(0.3), nn.Identity),
    ("quantised", lambda: Quantised(3), nn.Identity),
    ("binarised", Binarised, nn.Identity),
    ("top-k", lambda: TopKActivations(0.3), nn.Identity),
    ("mid", lambda: MID(1e-4), lambda: Bottleneck(4)),
    ("adversarial", lambda: AdversarialRepresentation(0.1), nn.Identity),
    ("ressfl", lambda: ResSFL(0.1), nn.Identity),
    ("disco", lambda: AdversarialRepresentation(0.1), lambda: Disco(4, ratio=0.5)),
    ("learned noise", lambda: LearnedNoise(0.1 * torch.randn(3, 4, 8, 8)), nn.Identity),
    ("everything", lambda: Guards(AdversarialRepresentation(0.1), Dropout(0.1), GaussianNoise(0.1)), nn.Identity),
]
BY_NAME = [pytest.param(*row[1:], id=row[0]) for row in DEFENSES]


def toy(
    guard: Guard | None, last: Last = nn.Identity, *, dropout: float = 0.0, seed: int = 0, server_seed: int = 0
) -> tuple[Learner, Learner]:
    """Return a client and a server that learn which half of an image is brighter."""
    torch.manual_seed(seed)
    bottom = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), last())
    top = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    adam = torch.optim.Adam
    client = Learner("client", bottom, adam(bottom.parameters(), 1e-2), guard, seed=seed)
    return client, Learner("server", top, adam(top.parameters(), 1e-2), seed=server_seed)


def halves(num: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.rand(num, 1, 8, 8)
    y = torch.arange(num) % 2
    x[y == 1, :, 4:] *= 0.3
    x[y == 0, :, :4] *= 0.3
    return x, y


@pytest.mark.parametrize(("guard", "last"), BY_NAME)
def test_a_client_trains_with_it(guard: Callable[[], Guard], last: Last) -> None:
    client, server = toy(guard(), last)
    before = client.weights()
    losses = []
    for _ in range(50):
        losses.append(vanilla(client, server, *halves()).item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(not torch.equal(before[name], now) for name, now in client.weights().items())


@pytest.mark.parametrize(("guard", "last"), BY_NAME)
def test_it_resumes_bit_for_bit(guard: Callable[[], Guard], last: Last, tmp_path: Path) -> None:
    batches = [halves() for _ in range(6)]
    whole = toy(guard(), last)
    for x, y in batches[:3]:
        vanilla(*whole, x, y)
    save_checkpoint(tmp_path / "half", [party.state_dict() for party in whole])
    resumed = toy(guard(), last, seed=1, server_seed=1)
    for party, state in zip(resumed, load_checkpoint(tmp_path / "half"), strict=True):
        party.load_state_dict(state)
    for x, y in batches[3:]:
        losses = [vanilla(*parties, x, y) for parties in (whole, resumed)]
        assert torch.equal(*losses)
    for one, other in zip(whole, resumed, strict=True):
        assert all(map(torch.equal, one.weights().values(), other.weights().values()))
    assert torch.equal(whole[0].predict(batches[0][0]), resumed[0].predict(batches[0][0]))


@pytest.mark.parametrize(("guard", "last"), BY_NAME)
def test_who_attacks_gets_it_and_a_replica_has_its_own(guard: Callable[[], Guard], last: Last) -> None:
    client, server = toy(guard(), last)
    x, y = halves()
    vanilla(client, server, x, y)
    encoder = Encoder(client.stage, client.guard)
    asked = x.clone().requires_grad_()
    encoder(asked).sum().backward()
    assert asked.grad is not None
    assert asked.grad.abs().sum() > 0
    replica, state = client.replica("other"), client.guard.state_dict()
    vanilla(replica, server, x, y)
    assert _same(state, client.guard.state_dict())
    prediction, state = client.predict(x), client.guard.state_dict()
    assert len(prediction) == len(x)
    assert _same(state, client.guard.state_dict())  # a prediction moves nothing
    assert "0x" not in repr(client.guard)  # a record keeps it


@pytest.mark.parametrize(
    "guard",
    [
        pytest.param(guard, id=repr(guard))
        for guard in (
            GaussianNoise(0.0), LaplaceNoise(0.0), Dropout(0.0), TopKActivations(1.0), PatchShuffle(0.0),
            AdversarialRepresentation(0.0), ResSFL(0.0), LearnedNoise(torch.zeros(2, 4, 8, 8)),
        )
    ],
)  # fmt: skip
def test_at_strength_0_it_changes_nothing(guard: Guard) -> None:
    last = partial(nn.Flatten, 2) if isinstance(guard, PatchShuffle) else nn.Identity
    drawing = 0.0 if isinstance(guard, LearnedNoise) else 0.2  # whose choice of a noise moves the generator
    plain, guarded = toy(None, last, dropout=drawing), toy(guard, last, dropout=drawing)
    for x, y in [halves() for _ in range(3)]:
        assert torch.equal(vanilla(*plain, x, y), vanilla(*guarded, x, y))
    assert all(map(torch.equal, plain[0].weights().values(), guarded[0].weights().values()))


def test_noise_has_the_stated_spread() -> None:
    z = torch.full((1000, 100), 5.0)
    for guard, std in ((GaussianNoise(0.7), 0.7), (LaplaceNoise(0.7), sqrt(2) * 0.7)):
        noise = guard.activation(z) - z
        assert noise.mean().abs() < 4 * std / sqrt(1e5)
        # The variance of a Laplace sample's variance is 5/n of its square; four standard errors.
        assert noise.std().item() == pytest.approx(std, rel=4 * sqrt(5 / 4e5))
        assert guard.secret
        assert not torch.equal(guard.activation(z), guard.activation(z))
    laplace = (LaplaceNoise(0.7).activation(z) - z).abs()
    assert laplace.mean().item() == pytest.approx(0.7, rel=4 / sqrt(1e5))  # E|n| = scale
    assert not any("epsilon" in name for name in dir(GaussianNoise(1.0)))


def test_dropout_scales_what_it_sends() -> None:
    z = torch.ones(100, 1000)
    sent = Dropout(0.75).activation(z)
    assert set(sent.unique().tolist()) == {0.0, 4.0}
    assert sent.mean().item() == pytest.approx(1, abs=4 * sqrt(3 / 1e5))  # the variance of an entry is .75 / .25
    assert (Dropout(0.75).prediction(z) == 0).any()
    trained_only = Dropout(0.75, predictions=False)
    assert torch.equal(trained_only.prediction(z), z)
    assert (trained_only.activation(z) == 0).any()
    assert torch.equal(Encoder(nn.Identity(), trained_only)(z), z)  # what an attacker reads are predictions


def test_quantised_by_hand() -> None:
    z = torch.tensor([[0.0, 0.2, 0.6, 1.5], [2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    sent = Quantised(2).activation(z)
    assert torch.allclose(sent, torch.tensor([[0.0, 0.0, 0.5, 1.5], [2.0, 2.0, 2.0, 2.0]]))
    sent.square().sum().backward()
    assert torch.allclose(z.grad, 2 * sent.detach())  # straight through
    assert torch.equal(Quantised(1).activation(z[:1].detach()), torch.tensor([[0.0, 0.0, 0.0, 1.5]]))
    many = torch.randn(5, 3, 4, 4)
    eight = Quantised(8).activation(many)
    assert torch.allclose(eight, through(Int8(), many), atol=1e-6)  # the codec's rounding, at 8 bits
    assert torch.equal(eight[2:3], Quantised(8).activation(many[2:3]))  # each sample by itself


def test_binarised_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0, 1.0, 3.0]], requires_grad=True)  # mean 1, mean deviation 1; 1 counts as above
    sent = Binarised().activation(z)
    assert torch.equal(sent.detach(), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    sent.sum().backward()
    assert torch.equal(z.grad, torch.ones(1, 4))
    assert torch.equal(Binarised().activation(torch.full((2, 3), 4.0)), torch.full((2, 3), 4.0))


def test_top_k_keeps_the_largest_and_their_gradient_alone() -> None:
    z = torch.tensor([[1.0, -3.0, 2.0, 0.5]], requires_grad=True)
    sent = TopKActivations(0.5).activation(z)
    assert torch.equal(sent.detach(), torch.tensor([[0.0, -3.0, 2.0, 0.0]]))
    sent.sum().backward()
    assert torch.equal(z.grad, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))  # where the codec has ones
    many = torch.randn(6, 3, 10)
    for fraction in (0.01, 0.1, 0.5, 1.0):
        assert torch.equal(TopKActivations(fraction).activation(many), through(TopK(fraction), many))


def test_shuffling_moves_whole_rows() -> None:
    z = torch.randn(50, 6, 3, requires_grad=True)
    sent = PatchShuffle().activation(z)
    assert torch.allclose(sent.sum(1), z.sum(1), atol=1e-6)
    found = (sent[:, :, None] == z[:, None]).all(-1)  # which row stands where: one in each row and column
    assert torch.equal(found.sum(1), torch.ones(50, 6, dtype=torch.int64))
    assert torch.equal(found.sum(2), torch.ones(50, 6, dtype=torch.int64))
    assert len({tuple(order.tolist()) for order in found.int().argmax(2)}) > 30  # of 720: a permutation a sample
    (g,) = torch.autograd.grad((sent * sent.detach()).sum(), z)
    assert torch.equal(g, z.detach())  # gradients come back to the row that was sent
    half = PatchShuffle(0.5).activation(z)
    stay = (half == z).all(-1).sum(1)
    assert stay.min() >= 3  # of 6; the other three may come back to where they were
    assert stay.float().mean() < 5


def test_shuffling_leaves_a_token_model_as_it_is() -> None:
    bottom, top = cut(token_transformer(20, 3, 8).eval(), 1)
    tokens = torch.randint(1, 20, (5, 8))
    tokens[0, 5:] = 0
    with torch.no_grad():
        z = bottom(tokens)
        assert torch.allclose(top(PatchShuffle().activation(z)), top(z), atol=1e-5)
    client = Learner("client", bottom, torch.optim.Adam(bottom.parameters(), 1e-2), PatchShuffle(), seed=0)
    server = Learner("server", top, torch.optim.Adam(top.parameters(), 1e-2))
    y = tokens[:, 0] % 3
    losses = [vanilla(client, server, tokens, y).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_mid_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0, 2.0]])  # means 1 and 0, log-variances 0 and 2
    kl = 0.5 * (1 + 1 - 1 - 0) + 0.5 * (0 + torch.tensor(2.0).exp() - 1 - 2)
    assert MID(0.3).penalty(z, z).item() == pytest.approx(0.3 * kl.item())
    sent = MID(0.3).activation(z.expand(20000, 4))
    assert sent.shape == (20000, 2)
    assert torch.allclose(sent.mean(0), torch.tensor([1.0, 0.0]), atol=4 * torch.e / sqrt(2e4))
    assert sent.std(0).tolist() == pytest.approx([1, torch.e], rel=4 / sqrt(4e4))
    normal = torch.zeros(3, 8)
    assert MID(1.0).penalty(normal, normal) == 0
    assert Bottleneck(4, 2)(torch.randn(5, 4, 3, 3)).shape == (5, 4, 3, 3)
    assert MID(1.0, dim=-1).activation(Bottleneck(4, dim=-1)(torch.randn(5, 7, 4))).shape == (5, 7, 4)
    with pytest.raises(ValueError, match="end the stage with Bottleneck"):
        MID(1.0).activation(torch.ones(2, 3))


def test_mid_narrows_what_is_sent() -> None:
    """The penalty alone drives means to 0 and variances to 1: what is sent is noise."""
    client, _ = toy(MID(1.0), lambda: Bottleneck(4))
    for _ in range(200):
        client.backward(torch.zeros_like(client.forward(halves()[0])))
    x = halves(64)[0]
    z = client.predict(x)
    assert client.guard.penalty(x, client.stage(x)) < 1  # of 256 entries; it began above 300
    assert z.std().item() == pytest.approx(1, abs=0.1)


def test_the_adversary_is_trained_and_the_penalty_is_its_error() -> None:
    x, z = torch.rand(8, 3), torch.randn(8, 4, requires_grad=True)
    guard = AdversarialRepresentation(2.0, ceiling=100.0, build=lambda z_shape, x_shape: nn.Linear(4, 3))
    first = guard.penalty(x, z)
    for _ in range(50):
        last = guard.penalty(x, z)
    assert first < last < 0  # its error falls
    assert last.item() == pytest.approx(-2 * mse_loss(guard.proxy(x, z), x).item())
    last.backward()
    weights = guard.state_dict()["decoder"]
    residual = z.detach() @ weights["weight"].T + weights["bias"] - x
    assert torch.allclose(z.grad, -2 * 2 * residual @ weights["weight"] / 24, atol=1e-6)
    with torch.no_grad():
        before = guard.state_dict()
        guard.penalty(x, z)
        assert _same(before, guard.state_dict())
    varied = AdversarialRepresentation(2.0, lr=1e-9)  # as at the start: its error is above the variance
    assert varied.penalty(10 * x, z).item() == pytest.approx(
        -2 * (10 * (x - x.mean(0))).square().mean().item(), rel=1e-5
    )
    assert torch.autograd.grad(varied.penalty(10 * x, z), z)[0].abs().sum() == 0  # beyond the ceiling nothing is gained


def test_ressfl_penalises_likeness_above_its_threshold() -> None:
    x, z = torch.rand(8, 1, 8, 8), torch.randn(8, 4, 8, 8)

    def copy(z_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> nn.Module:
        return _Scaled()

    guard = ResSFL(0.3, threshold=0.5, lr=1e-9, build=copy)
    likeness = ssim_per_sample(x, 0.9 * x).mean().item()
    assert guard.penalty(x, x).item() == pytest.approx(0.3 * (likeness - 0.5), rel=1e-4)
    assert ResSFL().penalty(x, z) == 0  # an untrained decoder is below .5


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.9))

    def forward(self, z: Tensor) -> Tensor:
        return self.by * z


def test_disco_prunes_channels_sample_by_sample() -> None:
    disco = Disco(8, ratio=0.75)
    z = (1 + torch.rand(32, 8, 5, 5)).requires_grad_()
    sent = disco(z)
    kept = (sent != 0).flatten(2).all(2)
    assert torch.equal(kept.sum(1), torch.full((32,), 2))
    assert torch.equal(sent[kept], z[kept])
    sent.square().sum().backward()
    assert disco.score[0].weight.grad.abs().sum() > 0  # straight through the choice
    with torch.no_grad():
        disco.score[2].bias.copy_(torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 90.0]))
        assert (disco(z) != 0).flatten(2).all(2).nonzero()[:, 1].unique().tolist() == [0, 7]
    assert torch.equal(Disco(8, ratio=0.0)(z), z)
    assert (Disco(3, ratio=0.9)(torch.ones(4, 3)) != 0).sum(1).tolist() == [1] * 4


def test_learned_noise_is_one_of_its_tensors() -> None:
    noise = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    guard = LearnedNoise(noise)
    sent = guard.activation(torch.zeros(100, 2))
    assert {tuple(row) for row in sent.tolist()} == {(1.0, 2.0), (10.0, 20.0)}
    assert guard.secret
    with pytest.raises(ValueError, match="expected activations of shape"):
        guard.activation(torch.zeros(3, 5))


def test_noise_is_learned_where_the_model_does_not_mind() -> None:
    """The top reads the first of two entries: noise goes to the second."""
    x = torch.randn(400, 2)
    y = (x[:, 0] > 0).long()
    top = nn.Linear(2, 2)
    with torch.no_grad():
        top.weight.copy_(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]))
        top.bias.zero_()
    before, kept = torch.get_rng_state(), deepcopy(top.state_dict())
    guard = learn_noise(nn.Identity(), top, x, y, power=4.0, weight=0.1, num=4, lr=5e-2)
    again = learn_noise(nn.Identity(), top, x, y, power=4.0, weight=0.1, num=4, lr=5e-2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(guard.noise, again.noise)
    assert _same(kept, top.state_dict())
    power = guard.noise.square().mean(1) / x.square().mean()
    assert power.min() > 3.5
    assert guard.noise[:, 0].abs().max() < 0.2 * guard.noise[:, 1].abs().min()
    assert accuracy(top(guard.activation(x)), y) > 0.9
    assert not learn_noise(nn.Identity(), top, x, y, power=0.0).noise.any()


def test_a_resistant_bottom_is_a_copy_that_was_trained() -> None:
    x, y = halves(32)
    bottom = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    narrow, wide = narrowed(bottom, nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), 4, narrow=2)
    assert narrow(x).shape == (32, 2, 8, 8)
    assert wide(narrow(x)).shape == (32, 2)
    assert list(narrow.state_dict())[:2] == list(bottom.state_dict())
    before = deepcopy(narrow.state_dict())
    trained = pretrain_resistant(narrow, wide, x, y, epochs=2)
    assert _same(before, narrow.state_dict())
    assert not _same(before, trained.state_dict())
    assert _same(trained.state_dict(), pretrain_resistant(narrow, wide, x, y, epochs=2).state_dict())


@pytest.mark.parametrize(
    ("z_shape", "x_shape"),
    [((16, 8, 8), (1, 8, 8)), ((16, 4, 4), (3, 9, 9)), ((8, 32), (1, 128)), ((64,), (1, 8, 8)), ((5,), (7,))],
)
def test_a_decoder_fits_its_shapes(z_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> None:
    assert proxy_decoder(z_shape, x_shape)(torch.randn(3, *z_shape)).shape == (3, *x_shape)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: GaussianNoise(-1.0), "finite std of 0 or more, got -1.0"),
        (lambda: GaussianNoise(nan), "finite std"),
        (lambda: LaplaceNoise(inf), "finite scale"),
        (lambda: Dropout(1.0), "rate of at least 0 and below 1, got 1.0"),
        (lambda: Dropout(nan), "rate of at least 0"),
        (lambda: Quantised(0), "whole bits from 1 to 16, got 0"),
        (lambda: Quantised(2.5), "whole bits"),  # type: ignore[arg-type]
        (lambda: Quantised(True), "whole bits from 1 to 16, got True"),
        (lambda: TopKActivations(0.0), r"in \(0, 1\], got 0.0"),
        (lambda: PatchShuffle(1.5), r"in \[0, 1\], got 1.5"),
        (lambda: PatchShuffle().activation(torch.ones(2, 3, 4, 4)), "cut a token model"),
        (lambda: MID(-1.0), "finite weight of 0 or more"),
        (lambda: Bottleneck(0), "at least one channel"),
        (lambda: AdversarialRepresentation(nan), "finite weight of 0 or more"),
        (lambda: AdversarialRepresentation(1.0, ceiling=0.0), "above 0, got 0.0"),
        (lambda: AdversarialRepresentation(1.0, steps=0), "at least one step of the decoder"),
        (lambda: AdversarialRepresentation(1.0).penalty(torch.ones(2, 3).long(), torch.ones(2, 3)), "embed tokens"),
        (lambda: ResSFL(threshold=1.0), "below 1"),
        (lambda: ResSFL(lr=0.0), "lr above 0"),
        (lambda: ResSFL().penalty(torch.rand(4, 3), torch.rand(4, 2)), "expected images"),
        (lambda: Disco(8, ratio=1.0), "below 1"),
        (lambda: LearnedNoise(torch.ones(3)), "see learn_noise"),
        (lambda: learn_noise(nn.Identity(), nn.Identity(), torch.ones(2, 2), torch.ones(2), num=0), "one tensor"),
        (lambda: narrowed(nn.Sequential(), nn.Sequential(), 4, 0), "at least one channel at the cut"),
        (lambda: narrowed(nn.Sequential(nn.Linear(30, 64), nn.ReLU()), nn.Sequential(), 64), "that ends in Linear"),
        (lambda: narrowed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), nn.Sequential(), 4), "ends in Flatten"),
        (lambda: narrowed(nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Sequential(), 8), "images of 8 channels, got one"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_line(wrong: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        wrong()
    assert "\n" not in str(caught.value)


EVERYTHING = Threat(white_box=True, queries=True, auxiliary=True)
PARTS = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    """The bottom of a digits CNN trained for two epochs without a guard, cut at relu1."""
    torch.manual_seed(0)
    bottom, top = cut(digits_cnn(), "relu1")
    adam = torch.optim.Adam
    client, server = (
        Learner("client", bottom, adam(bottom.parameters())),
        Learner("server", top, adam(top.parameters())),
    )
    fit(epochs_of(partial(vanilla, client, server), Batches(PARTS.private.x, PARTS.private.y, batch_size=32)), epochs=2)
    return bottom


def leaked(bottom: nn.Module, guard: Guard, known: Guard, *, releases: int = 1, epochs: int = 15) -> float:
    """Return the advantage of a decoder that is trained on what ``known`` sends, where ``guard`` is what protects."""
    client = Learner("client", bottom, guard=guard, seed=0)
    server = wire(Learner("server", nn.Identity()))
    x = PARTS.private.x[:64]
    for _ in range(releases):
        server.party.predict(client.predict(x))
    threat = Threat(white_box=True, queries=True, auxiliary=True, releases=releases)
    view = observe(server.record, threat=threat, grants=Grants(Encoder(bottom, known), PARTS.auxiliary.x[:300]))
    found = Decoder(Dense(128, 1), epochs=epochs)(view)
    return score_reconstruction(x, found.x_hat, auxiliary_x=PARTS.auxiliary.x).advantage


# One row a guard: at strength 0 and as a protection,.
STRENGTHS = [
    ("gaussian noise", GaussianNoise(0.0), GaussianNoise(0.3)),
    ("laplace noise", LaplaceNoise(0.0), LaplaceNoise(0.3)),
    ("quantised", Quantised(16), Quantised(1)),
    ("top-k", TopKActivations(1.0), TopKActivations(0.02)),
]


@pytest.mark.parametrize(("weak", "strong"), [pytest.param(*row[1:], id=row[0]) for row in STRENGTHS])
def test_it_stops_who_does_not_know_it_and_not_who_does(victim: nn.Module, weak: Guard, strong: Guard) -> None:
    plain = leaked(victim, Guard(), Guard())
    assert plain > 0.85  # the attack works where nothing protects
    assert leaked(victim, weak, Guard()) == pytest.approx(plain, abs=0.01)  # 16 bits move entries by 1e-5
    unaware, aware = leaked(victim, strong, Guard()), leaked(victim, strong, strong)
    assert unaware < plain - 0.2
    assert aware > unaware + 0.2


def test_averaging_takes_noise_off(victim: nn.Module) -> None:
    noise = GaussianNoise(0.3)
    assert leaked(victim, noise, noise, releases=16) > leaked(victim, noise, noise) + 0.08


def test_who_knows_the_bottom_puts_shuffled_rows_back() -> None:
    """Rows of a position's own are told apart by it: one cost a row and place, then the Hungarian method."""
    from scipy.optimize import linear_sum_assignment

    x = PARTS.private.x[:8].unfold(2, 2, 2).unfold(3, 2, 2).reshape(8, 16, 4)  # 2×2 patches
    embed, position = nn.Linear(4, 12, bias=False), 0.3 * torch.randn(16, 12)
    with torch.no_grad():
        sent = PatchShuffle().activation(embed(x) + position)
        back = torch.linalg.pinv(embed.weight.T)  # [12, 4]
        patches = (sent[:, :, None] - position) @ back  # of each row, were it at each place
        cost = (patches @ embed.weight.T + position - sent[:, :, None]).square().sum(-1)
    unaware = torch.stack([patches[:, place, place] for place in range(16)], 1)  # rows taken as they come
    rebuilt = torch.zeros_like(x)
    for number, table in enumerate(cost):
        rows, places = linear_sum_assignment(table.numpy())
        rebuilt[number, places] = patches[number, rows, places]
    assert mse_loss(rebuilt, x) < 1e-6
    assert mse_loss(unaware, x) > 0.05


@pytest.mark.slow
def test_mid_trades_utility_for_leakage() -> None:
    def trained(weight: float) -> tuple[float, float]:
        torch.manual_seed(0)
        bottom, top = cut(digits_cnn(), "relu2")
        bottom, guard, adam = nn.Sequential(*bottom, Bottleneck(32)), MID(weight), torch.optim.Adam
        client = Learner("client", bottom, adam(bottom.parameters(), 1e-3), guard, seed=0)
        server = Learner("server", top, adam(top.parameters(), 1e-3))
        batches = Batches(PARTS.private.x, PARTS.private.y, batch_size=32)
        fit(epochs_of(partial(vanilla, client, server), batches), epochs=8)
        right = accuracy(server.predict(client.predict(PARTS.test.x)), PARTS.test.y)
        return right, leaked(bottom, guard, guard)

    (plain_right, plain), (right, less) = trained(0.0), trained(1e-3)
    assert plain > 0.8
    assert less < plain - 0.1
    assert 0.6 < right < plain_right


@pytest.mark.slow
def test_learned_noise_costs_less_than_its_power_and_stops_the_unaware() -> None:
    torch.manual_seed(0)
    bottom, top = cut(digits_cnn(), "relu2")
    adam = torch.optim.Adam
    client = Learner("client", bottom, adam(bottom.parameters(), 1e-3), seed=0)
    server = Learner("server", top, adam(top.parameters(), 1e-3))
    x, y = PARTS.private.x, PARTS.private.y
    fit(epochs_of(partial(vanilla, client, server), Batches(x, y, batch_size=32)), epochs=6)
    learned = learn_noise(bottom, top, x, y, power=2.0)
    with torch.no_grad():
        z = bottom(PARTS.test.x)
        drawn = LearnedNoise(learned.noise.std() * torch.randn_like(learned.noise))
        right, at_random = (accuracy(top(guard.activation(z)), PARTS.test.y) for guard in (learned, drawn))
        assert learned.noise.square().mean() > 1.8 * bottom(x).square().mean()
        assert right > accuracy(top(z), PARTS.test.y) - 0.03
        assert at_random < right - 0.05
    assert leaked(bottom, learned, Guard()) < 0.1
    assert leaked(bottom, learned, learned) > 0.6


def _same(one: dict, other: dict) -> bool:
    """Whether two trees of tensors and plain values are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
