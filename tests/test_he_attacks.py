"""Attacks on the published ways to train on ciphertexts: all where they leak, chance or nothing where none does."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks import DirectLabels, KeyRecovery, WeightGradientActivations
from privacy.dp import Budget, PoissonBatches, PrivateLearner
from privacy.he import (
    CipherHolder,
    Ciphertexts,
    EncryptedLayer,
    Keys,
    LayerHolder,
    SplitWaysHolder,
    he_encw,
    he_inference,
    he_u_dp,
    split_ways,
)
from privacy.he.product import MOST_HALVINGS, received
from splitlearn import Kind, Learner, Recorded, Remote, Threat, View, observe, wire
from splitlearn.frames import Message
from splitlearn.service import Service
from splitlearn.wire import Exchange

WIDTH, CUT, CLASSES = 6, 8, 10


def data(samples: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(samples, WIDTH, generator=generator), torch.randint(CLASSES, (samples,), generator=generator)


def stages() -> tuple[nn.Module, nn.Linear, nn.Module]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, CUT), nn.Tanh()), nn.Linear(CUT, CLASSES), nn.Linear(CLASSES, CLASSES)


# What a server saw of each protocol


@cache
def published(
    batch_size: int = 6, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Recorded, Tensor, Tensor]:
    """The record of split_ways, the labels and the activations that it hides; the client's bottom stays as it is."""
    x, y = data()
    x = x.to(dtype)
    bottom, middle, _ = stages()
    bottom, middle = bottom.to(dtype), (middle if bias else nn.Linear(CUT, CLASSES, bias=False)).to(dtype)
    with pytest.warns(UserWarning, match="split-ways is LEAKY"):
        line = wire(SplitWaysHolder("server", middle, torch.optim.SGD(middle.parameters(), lr=0.1)))
    layer, client = EncryptedLayer(Keys(), line.party), Learner("client", bottom)
    for rows in torch.arange(len(x)).split(batch_size):
        split_ways(client, layer, line.party, Learner("head", nn.Identity()), x[rows], y[rows])
    return line.record, y, client.predict(x)


def private() -> Recorded:
    bottom, middle, head = stages()
    line = wire(LayerHolder("server", middle, update="private"))
    stage = nn.Sequential(bottom, EncryptedLayer(Keys(), line.party, update="private"), head)
    client = PrivateLearner(
        "client", stage, torch.optim.SGD(stage.parameters(), lr=0.1), clip=1.0, noise_multiplier=1.0,
        expected_batch_size=4, seed=0,
    )  # fmt: skip
    account = Budget().account("server", "client", "add or remove one sample", model="central", shaped_by=[client])
    for x, y in PoissonBatches(*data(), rate=0.1, account=account, parties=[client], steps=3, capacity=12, seed=0):
        he_u_dp(client, x, y)
    return line.record


def blind() -> Recorded:
    bottom, middle, head = stages()
    line = wire(CipherHolder("server", middle))
    stage = nn.Sequential(
        bottom, EncryptedLayer(Keys(), line.party, update="encrypted", layer=middle, rows=6), head
    )  # fmt: skip
    client = Learner("client", stage, torch.optim.SGD(stage.parameters(), lr=0.1))
    x, y = data()
    for rows in torch.arange(18).split(6):
        he_encw(client, x[rows], y[rows])
    return line.record


def inferred() -> Recorded:
    bottom, middle, head = stages()
    line = wire(LayerHolder("server", middle))
    he_inference(Learner("client", nn.Sequential(bottom, EncryptedLayer(Keys(), line.party), head)), data()[0])
    return line.record


RECOMMENDED: dict[str, Callable[[], Recorded]] = {"he_u_dp": private, "he_encw": blind, "he_inference": inferred}


def seen(record: Recorded, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda sent: sent) -> View:
    """The server's view, with the tensors of each backward request changed, as a negative control needs it."""
    other = Recorded(Service({}))
    for one in record.exchanges:
        request = one.request
        if request.verb == "backward":
            request = replace(request, tensors=change(dict(request.tensors)))
        other.exchanges.append(Exchange(request, one.reply))
    return observe(other, threat=Threat())


def chance(samples: int) -> float:
    """One in ten, and four standard errors of a share of so many."""
    return 1 / CLASSES + 4 * (1 / CLASSES * (1 - 1 / CLASSES) / samples) ** 0.5


# Labels


def told(view: View) -> Tensor:
    found = DirectLabels()(view).labels
    assert found is not None
    return found


@pytest.mark.parametrize("batch_size", [1, 6, 40])
def test_every_label_is_read_off_a_gradient_in_the_clear(batch_size: int) -> None:
    record, y, _ = published(batch_size)
    assert torch.equal(told(seen(record)), y)


def permuted(sent: dict[str, Tensor]) -> dict[str, Tensor]:
    g = sent[Kind.GRADIENT]
    return {**sent, Kind.GRADIENT: g[:, torch.randperm(g.shape[1])]}


def noise(sent: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**sent, Kind.GRADIENT: torch.randn_like(sent[Kind.GRADIENT])}


@pytest.mark.parametrize("destroy", [permuted, noise])
def test_labels_fall_to_chance_where_the_gradient_is_another(
    destroy: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    record, y, _ = published(1)  # permuted by chance for each sample
    found = told(seen(record, destroy))
    assert (found == y).double().mean() < chance(len(y))


def test_gradients_of_other_samples_tell_other_labels() -> None:
    record, y, _ = published(40)
    found = told(seen(record, lambda sent: {**sent, Kind.GRADIENT: sent[Kind.GRADIENT].roll(1, 0)}))
    assert torch.equal(found, y.roll(1))
    assert (found == y).double().mean() < chance(len(y))


# Activations


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("batch_size", "dtype"),
    [(1, torch.float32), (2, torch.float32), (6, torch.float32), (CLASSES - 1, torch.float64)],
)
def test_activations_are_solved_for_below_as_many_samples_as_outputs(
    batch_size: int, dtype: torch.dtype, bias: bool
) -> None:
    record, _, z = published(batch_size, bias, dtype)
    found = WeightGradientActivations()(seen(record))
    assert found.shape == z.shape
    # The rounding of gradients, times how nearly alike the rows of a batch are, which at nine samples is 1e3.
    assert (found - z).abs().max() < 1e-5


@pytest.mark.parametrize("batch_size", [20, 40])
def test_activations_of_more_samples_than_outputs_are_not(batch_size: int) -> None:
    record, _, z = published(batch_size)
    found = WeightGradientActivations()(seen(record))
    assert found.shape == z.shape
    assert (found - z).square().mean() > 0.25 * z.square().mean()


def test_ten_samples_at_ten_outputs_are_one_too_many() -> None:
    record, _, z = published(CLASSES)
    errors = (WeightGradientActivations()(seen(record)) - z).abs().amax(1)
    assert errors.median() > 0.01


def other_weights(sent: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**sent, f"{Kind.GRADIENT}/weight": torch.randn_like(sent[f"{Kind.GRADIENT}/weight"])}


def other_rows(sent: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**sent, Kind.GRADIENT: sent[Kind.GRADIENT].roll(1, 0)}


@pytest.mark.parametrize("destroy", [noise, other_weights, other_rows])
def test_activations_are_not_found_where_the_gradients_are_others(
    destroy: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    record, _, z = published(6)
    found = WeightGradientActivations()(seen(record, destroy))
    mean = z.mean(0)  # what knows nothing but the average would say
    assert (found - z).square().mean() > 0.9 * (mean - z).square().mean()


# The key


class Returned:
    """A server whose client sends back what one of its replies decrypts to, as it is or changed."""

    def __init__(self, *, truncated: bool, change: Callable[[NDArray[np.complex128]], Any] = lambda slots: slots):
        torch.manual_seed(2)
        self.keys, self.middle = Keys(), nn.Linear(CUT, CLASSES)
        self.ring = self.keys.ring
        self.recorded = Recorded(Service({"server": LayerHolder("server", self.middle)}))
        layer = EncryptedLayer(self.keys, Remote("server", self.recorded, "server"), truncated=truncated)
        layer(torch.rand(4, CUT))
        self.layout = layer._packings(4)[0].layout
        self.form: Any = "truncated" if truncated else "whole"
        reply = self.recorded.exchanges[-1].reply.tensors[Kind.CIPHERTEXT]
        cipher = self.read(reply)
        assert len(cipher.integers) == 1
        self.scale = cipher.scale
        slots = torch.tensor(change(self.keys.decrypt(cipher)[0]), dtype=torch.complex128)
        sent = Message("predict", {Kind.PREDICTION: torch.view_as_real(slots)})
        self.recorded.exchanges.append(Exchange(sent, Message("predict", {})))
        self.secret = torch.rand(4, CUT)  # another upload, whose decryption stays with the client
        layer(self.secret)

    def read(self, reply: Tensor) -> Ciphertexts:
        return Ciphertexts.of(
            reply, self.ring, key=self.keys.id, form=self.form, polynomials=2, count=self.layout.down,
            scale=self.ring.reply_scale, halvings=MOST_HALVINGS,
        )  # fmt: skip

    def found(self) -> Tensor:
        attack = KeyRecovery(self.ring.primes[0], self.scale, lambda reply: self.read(reply).coefficients(self.ring)[0])
        return attack(observe(self.recorded, threat=Threat()))

    def uploaded(self) -> tuple[NDArray[np.uint64], float]:
        """The polynomials [2, N] of the last upload, by their coefficients, as the server reads them."""
        upload = self.recorded.exchanges[-1].request.tensors[Kind.CIPHERTEXT]
        fresh = Ciphertexts.of(
            upload, self.ring, key=self.keys.id, form="seeded", polynomials=2, count=self.layout.up,
            scale=self.ring.scale,
        )  # fmt: skip
        (cipher,) = received(self.ring, fresh)
        self.ring.evaluator.transform_from_ntt_inplace(cipher)
        return self.ring.integers(cipher)[:, 0], fresh.scale


def decrypted(polynomials: NDArray[np.uint64], key: Tensor, modulus: int, scale: float) -> NDArray[np.complex128]:
    """c₀ + c₁·s and its slots, by the definitions: a negacyclic product, and values at ζ^(3^i)."""
    c0, c1 = polynomials.astype(np.int64)
    degree, total = len(c0), c0.copy()
    for power, sign in enumerate(key.tolist()):
        if sign:  # times X^power, where X^N = −1; sums of 2048 numbers below 2^48 fit 63 bits
            turned = np.roll(c1, power)
            turned[:power] *= -1
            total += sign * turned
    message = (total + modulus // 2) % modulus - modulus // 2
    powers = np.array([pow(3, i, 2 * degree) for i in range(degree // 2)])
    return np.exp(1j * np.pi * (np.outer(powers, np.arange(degree)) % (2 * degree)) / degree) @ message / scale


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
def test_a_decryption_that_is_sent_back_gives_the_key_which_decrypts_everything_else(truncated: bool) -> None:
    returned = Returned(truncated=truncated)
    key = returned.found()
    assert set(key.tolist()) == {-1, 0, 1}
    assert abs(int((key == 0).sum()) - 2048 / 3) < 4 * (2048 * 2 / 9) ** 0.5  # drawn evenly from the three
    polynomials, scale = returned.uploaded()
    slots = decrypted(polynomials, key, returned.ring.primes[0], scale)
    (expected,) = returned.layout.pack_rows(returned.secret.double().numpy()).reshape(-1, len(slots))
    assert np.abs(slots - expected).max() < 6 * returned.keys.parameters.fresh_std


def rounded(slots: NDArray[np.complex128]) -> NDArray[np.complex64]:
    return slots.astype(np.complex64)


def noised(slots: NDArray[np.complex128]) -> NDArray[np.complex128]:
    return slots + np.random.default_rng(0).normal(0, 1e-6, len(slots))


def in_one_slot(slots: NDArray[np.complex128]) -> NDArray[np.complex128]:
    return np.concatenate([slots[:1] + 1e-6, slots[1:]])


@pytest.mark.parametrize("change", [rounded, noised, in_one_slot])
@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
def test_no_key_is_found_where_less_than_the_whole_decryption_came_back(
    truncated: bool, change: Callable[[NDArray[np.complex128]], Any]
) -> None:
    key = Returned(truncated=truncated, change=change).found()
    assert ((key >= -1) & (key <= 1)).double().mean() < 0.01  # of integers spread over the whole modulus


def test_another_modulus_or_scale_gives_no_key() -> None:
    returned = Returned(truncated=False)
    returned.scale *= 1.001
    key = returned.found()
    assert ((key >= -1) & (key <= 1)).double().mean() < 0.01


# What the recommended protocols leave to read


def attacks() -> Iterable[tuple[str, Callable[[View], object], str]]:
    def never(_: Tensor) -> NDArray[np.uint64]:
        raise AssertionError("there is nothing to read")

    yield "labels", DirectLabels(), "reads gradients of outputs in backward requests, and none crossed"
    yield "activations", WeightGradientActivations(), "reads weight gradients beside gradients, and none crossed"
    yield "key", KeyRecovery(Keys().ring.primes[0], 2.0**42, never), "reads a decryption that went back to the server"


@pytest.mark.parametrize("protocol", RECOMMENDED)
def test_there_is_nothing_to_read_in_the_recommended_protocols(protocol: str) -> None:
    view = observe(RECOMMENDED[protocol](), threat=Threat())
    assert len(view.exchanges) > 1
    for _, attack, says in attacks():
        with pytest.raises(LookupError, match=says):
            attack(view)


def test_the_key_is_not_to_be_read_even_off_the_published_protocol() -> None:
    record, _, _ = published()
    with pytest.raises(LookupError, match="none crossed; record a protocol that hands decryptions on"):
        list(attacks())[2][1](observe(record, threat=Threat()))


@pytest.mark.parametrize("attack", [DirectLabels(), WeightGradientActivations()])
def test_what_a_threat_does_not_see_is_not_read(attack: Callable[[View], object]) -> None:
    record, _, _ = published()
    with pytest.raises(LookupError, match="none crossed in the clear"):
        attack(observe(record, threat=Threat(sees=frozenset(Kind) - {Kind.GRADIENT})))
