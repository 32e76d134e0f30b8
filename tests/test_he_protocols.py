"""Protocols on ciphertexts against their plaintext twins; what crosses, under whose key, and what ε it costs."""

import copy
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy.dp import Budget, BudgetExceeded, GaussianRelease, PaddedCrossEntropy, PoissonBatches, PrivateLearner
from privacy.dp.poisson import PADDING
from privacy.he import (
    LEAKS,
    LEARNS,
    CipherHolder,
    EncryptedLayer,
    Keys,
    LayerHolder,
    SplitWaysHolder,
    he_encw,
    he_inference,
    he_u_dp,
    split_ways,
)
from privacy.he.holding import TICKET
from splitlearn import Batches, Kind, Learner, Remote, epochs_of, evaluate, fit, predict
from splitlearn.frames import Message, encode
from splitlearn.service import Service
from splitlearn.wire import Framed, Metered, Recorded, serve

Weights = dict[str, Tensor]
SAMPLES, WIDTH, CUT, OUT, CLASSES = 40, 6, 5, 4, 3
HEADER = slice(0, 16), slice(24, 40)  # of ciphertexts: all but the key's id and the checksum
SAME = 1e-3  # of a step: the error of ciphertexts, about 1e-4 in outputs of order 1, is all that tells the two apart


class Tapped:
    """A carrier that keeps every frame, both ways."""

    def __init__(self, carrier: Callable[[bytes], bytes]):
        self.carrier, self.frames = carrier, list[bytes]()

    def __call__(self, frame: bytes) -> bytes:
        self.frames.append(frame)
        self.frames.append(self.carrier(frame))
        return self.frames[-1]


class Line:
    """A holder across real frames, all of which are kept."""

    def __init__(self, **sessions: Any):
        self.record = Recorded(Service(sessions))
        self.tap = Tapped(serve(self.record))
        self.meter = Metered(self.tap)

    def to(self, session: str) -> Remote:
        return Remote("server", Framed(self.meter), session)

    @property
    def messages(self) -> Iterator[Message]:
        for exchange in self.record.exchanges:
            yield exchange.request
            yield exchange.reply

    def sent(self, kind: Kind, verb: str | None = None) -> list[Tensor]:
        return [
            tensor for message in self.messages if verb in (None, message.verb)
            for key, tensor in message.tensors.items() if Kind.of(key) is kind
        ]  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(CLASSES, (SAMPLES,), generator=generator)


def stages() -> tuple[nn.Module, nn.Linear, nn.Module]:
    torch.manual_seed(1)
    bottom = nn.Sequential(nn.Linear(WIDTH, CUT), nn.Tanh())
    return bottom, nn.Linear(CUT, OUT), nn.Sequential(nn.Tanh(), nn.Linear(OUT, CLASSES))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def known(client: Learner) -> Weights:
    """A party's weights; of a private layer it has none, and how many changes it has sent is no weight."""
    return {name: tensor for name, tensor in client.weights().items() if not name.endswith(".changes")}


class Private:
    """A client that trains by DP-SGD through a layer: the server's, on ciphertexts, or in the clear its own twin."""

    def __init__(
        self,
        *,
        clear: bool = False,
        ghost: bool = False,
        optimizer: str = "sgd",
        physical: int | None = None,
        steps: int = 3,
        rate: float = 0.25,
        capacity: int | None = None,
        budget: Budget | None = None,
    ):
        bottom, self.middle, head = stages()
        self.holder, self.keys = LayerHolder("server", self.middle, update="private"), Keys()
        self.line = Line(server=self.holder)
        self.layer = None if clear else EncryptedLayer(self.keys, self.line.to("server"), update="private")
        stage = nn.Sequential(bottom, self.middle if self.layer is None else self.layer, head)
        self.client = PrivateLearner(
            "client", stage, OPTIMIZERS[optimizer](stage.parameters()), clip=1.0, noise_multiplier=1.0,
            expected_batch_size=rate * SAMPLES, ghost=ghost, seed=4,
        )  # fmt: skip
        self.budget = budget or Budget()
        self.account = self.budget.account(
            "server", "client", "add or remove one sample", model="central", shaped_by=[self.client]
        )
        self.batches = PoissonBatches(
            *data(), rate=rate, account=self.account, parties=[self.client], steps=steps, capacity=capacity,
            physical=physical, seed=5,
        )  # fmt: skip

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return self.client.learn(x, y)[0] if self.layer is None else he_u_dp(self.client, x, y)

    def run(self) -> list[float]:
        return [self.step(x, y).item() for x, y in self.batches]

    def weights(self) -> Weights:
        """Those of the whole model, whoever holds them."""
        held = {f"1.{name}": tensor.detach().clone() for name, tensor in self.middle.state_dict().items()}
        return {**known(self.client), **held}


def assert_same_training(found: Weights, expected: Weights, start: Weights, *, of: float = SAME) -> None:
    """What training has changed, not what it has left as it was, is the same in each tensor."""
    assert found.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        moved = tensor - start[name]
        assert moved.any(), name
        assert (found[name] - tensor).norm() <= of * moved.norm(), name


# Training by DP-SGD, the layer at the server


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("physical", [None, 7], ids=["whole", "virtual"])
@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_private_training_on_ciphertexts_is_that_in_the_clear_step_by_step(
    ghost: bool, physical: int | None, optimizer: str
) -> None:
    twin, own = (
        Private(clear=clear, ghost=ghost, physical=physical, optimizer=optimizer, capacity=20)
        for clear in (True, False)
    )
    start = twin.weights()
    assert all(torch.equal(tensor, twin.weights()[name]) for name, tensor in own.weights().items() if "1." not in name)
    for (x, y), (same_x, same_y) in zip(twin.batches, own.batches, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        expected, found = twin.step(x, y), own.step(x, y)
        assert found.item() == pytest.approx(expected.item(), abs=1e-3)
        assert own.client.steps == twin.client.steps
        if own.client.steps:
            assert_same_training(own.weights(), twin.weights(), start)
    assert own.client.steps == 3
    assert (int(own.client.weights()["1.changes"]), own.holder.state_dict()["made"]) == (3, 3)


@pytest.mark.parametrize("physical", [None, 7], ids=["whole", "virtual"])
def test_what_crosses_in_the_clear_is_the_noised_step_and_nothing_else(physical: int | None) -> None:
    twin, own = Private(clear=True, physical=physical, capacity=20), Private(physical=physical, capacity=20)
    before, steps = twin.weights(), list[Weights]()
    for x, y in twin.batches:
        made = twin.client.steps
        twin.step(x, y)
        if twin.client.steps > made:
            steps.append({name: tensor - before[name] for name, tensor in twin.weights().items()})
            before = twin.weights()
    start = own.middle.weight.detach().clone()
    own.run()
    changes = [message for message in own.line.messages if message.verb == "change" and message.tensors]
    assert len(changes) == len(steps) == 3
    for message, step in zip(changes, steps, strict=True):
        assert message.tensors.keys() == {"update/weight", "update/bias", "count", "parameters"}
        for name in ("weight", "bias"):
            assert (message.tensors[f"update/{name}"] - step[f"1.{name}"]).norm() <= SAME * step[f"1.{name}"].norm()
    assert [int(message.tensors[Kind.COUNT]) for message in changes] == [1, 2, 3]
    total = sum(message.tensors["update/weight"] for message in changes)
    assert torch.allclose(own.middle.weight.detach() - start, total, atol=1e-6)  # float32 sums of three
    assert_only(own.line, {Kind.CIPHERTEXT, Kind.COUNT, Kind.PARAMETERS, Kind.UPDATE})


def assert_only(line: Line, kinds: set[Kind]) -> None:
    """These kinds alone crossed; of them only updates are of real numbers, and counts are single ones."""
    assert {Kind.of(key) for message in line.messages for key in message.tensors} == kinds
    counted = line.meter.nbytes["up"] + line.meter.nbytes["down"]
    assert {kind for kind, nbytes in counted.items() if nbytes} == {*map(str, kinds), "framing"}
    for kind, dtype in ((Kind.CIPHERTEXT, torch.uint8), (Kind.PARAMETERS, torch.uint8), (Kind.COUNT, torch.int64)):
        assert {tensor.dtype for tensor in line.sent(kind)} == {dtype}
    assert all(tensor.numel() == 1 for tensor in line.sent(Kind.COUNT))


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("physical", [None, 7], ids=["whole", "virtual"])
def test_no_frame_tells_how_many_samples_are_in_a_batch(physical: int | None, ghost: bool) -> None:
    own = Private(physical=physical, ghost=ghost, rate=0.1, steps=10, capacity=14)
    sizes, told, counts = set[int](), list[tuple[Any, ...]](), set[int]()
    for x, y in own.batches:
        sizes.add(int((y != PADDING).sum()))
        seen = len(own.line.record.exchanges)
        own.step(x, y)
        new = list(own.line.record.exchanges)[seen:]
        products = [one for one in new if one.request.verb != "change"]
        counts |= {int(one.request.tensors[Kind.COUNT]) for one in products}
        told.append(tuple((one.request.verb, _sizes(one.request), _sizes(one.reply)) for one in products))
    assert len(sizes) > 3
    assert counts == {physical or 14}
    assert len(set(told)) == 1


def _sizes(message: Message) -> tuple[tuple[str, int], ...]:
    return tuple((key, tensor.nbytes) for key, tensor in message.tensors.items())


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_requests_are_as_many_for_an_empty_batch_as_for_a_full_one(ghost: bool) -> None:
    x, y = data()
    asked = []
    for samples in (0, 1, 4):
        own = Private(ghost=ghost)
        labels = y[:4].clone()
        labels[samples:] = PADDING
        for _ in range(2):
            own.client.allow(last=True)
            own.step(x[:4], labels)
        asked.append([one.request.verb for one in own.line.record.exchanges])
    one = ["product", "product_back", "change"]  # with ghost too: its second pass is answered from the first
    assert asked == [["open", *one, *one]] * 3


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_a_sample_that_is_all_but_certain_asks_for_nothing_more(ghost: bool) -> None:
    # At a bias of 60 its gradient is 1e-26 of what others are, whose square single precision takes for none.
    x, asked = data()[0][:4], []
    for bias in (0.0, 60.0):
        for samples in (0, 1, 4):
            bottom, _, _ = stages()
            middle = nn.Linear(CUT, CLASSES)
            with torch.no_grad():
                middle.bias[0] = bias
            line = Line(server=LayerHolder("server", middle, update="private"))
            stage = nn.Sequential(bottom, EncryptedLayer(Keys(), line.to("server"), update="private"))
            client = PrivateLearner(
                "client", stage, torch.optim.SGD(stage.parameters(), lr=0.05), clip=1.0, noise_multiplier=1.0,
                expected_batch_size=4, ghost=ghost, seed=4,
            )  # fmt: skip
            labels = torch.full((4,), PADDING)
            labels[:samples] = 0
            for _ in range(3):
                client.allow(last=True)
                he_u_dp(client, x, labels)
            asked.append([one.request.verb for one in line.record.exchanges])
    assert asked == [["open", *["product", "product_back", "change"] * 3]] * 6


def test_the_account_is_that_of_a_server_that_sees_noised_steps() -> None:
    own = Private(budget=Budget(100.0, 1e-5, by="rdp"), capacity=40)
    own.run()
    (claim,) = own.budget.claims()
    assert (claim.observer, claim.client, claim.adjacency, claim.model) == (
        "server", "client", "add or remove one sample", "central",
    )  # fmt: skip
    assert own.account.releases == Counter({GaussianRelease(1.0, 0.25): 3})
    assert 0 < claim.epsilon < 100
    with pytest.raises(BudgetExceeded):
        Private(budget=Budget(0.1, 1e-5, by="rdp"), capacity=40).run()


def test_a_batch_that_poisson_did_not_draw_trains_nothing_and_sends_no_step() -> None:
    own, (x, y) = Private(), data()
    with pytest.raises(ValueError, match="expected a batch of PoissonBatches"):
        he_u_dp(own.client, x[:4], y[:4])
    assert not own.line.sent(Kind.UPDATE)


def test_private_training_goes_on_from_a_checkpoint_under_new_keys(tmp_path: Path) -> None:
    def run(epochs: list[int], path: Path) -> tuple[Weights, str, list[float]]:
        for upto in epochs:
            own = Private(steps=6, rate=0.5, optimizer="momentum", budget=Budget(500.0, 1e-5, by="rdp"), capacity=40)
            state = {"client": own.client, "server": own.holder, "batches": own.batches, "budget": own.budget}
            history = fit(epochs_of(own.step, own.batches), epochs=upto, state=state, checkpoint=path)
            assert not key_material(own.keys, [path.read_bytes()])
        return own.weights(), str(own.budget), history.losses

    whole, resumed = run([3], tmp_path / "whole"), run([1, 2, 3], tmp_path / "resumed")
    assert_same_training(resumed[0], whole[0], Private().weights())
    assert whole[1] == resumed[1]
    assert "6 ×" in whole[1]
    assert resumed[2] == pytest.approx(whole[2], abs=1e-3)


def test_a_client_that_goes_on_without_its_server_is_told_so(tmp_path: Path) -> None:
    def run(epochs: int, keep: Callable[[Private], dict[str, Any]]) -> None:
        own = Private(steps=4, rate=0.5, capacity=40)
        state = {"client": own.client, "batches": own.batches, "budget": own.budget, **keep(own)}
        fit(epochs_of(own.step, own.batches), epochs=epochs, state=state, checkpoint=tmp_path / "run")

    run(1, lambda own: {})
    with pytest.raises(
        ValueError, match="server: expected a client that has sent at most 0 changes, got one that has sen"
    ):
        run(2, lambda own: {})


CONVOLUTIONS: dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    # The server's layer, what follows it, and the shape of a sample.
    "a convolution without bias": lambda: (
        nn.Conv1d(1, 3, 3, stride=2, bias=False), nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)), (1, 8)
    ),
    "one before a plain one": lambda: (
        nn.Conv2d(1, 2, 2), nn.Sequential(nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(18, 3)), (1, 5, 4)
    ),
    "one right before a plain one": lambda: (
        nn.Conv2d(1, 2, 2), nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(18, 3)), (1, 5, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("which", CONVOLUTIONS)
def test_private_training_through_a_convolution(which: str, ghost: bool) -> None:
    y, found, starts = torch.tensor([0, 1, 2, 0, 1, PADDING]), list[Weights](), list[Weights]()
    for clear in (True, False):
        torch.manual_seed(2)
        conv, rest, shape = CONVOLUTIONS[which]()
        x = torch.randn(6, *shape)
        holder = LayerHolder("server", conv, update="private")
        stage = nn.Sequential(conv if clear else EncryptedLayer(Keys(), holder, update="private"), rest)
        client = PrivateLearner(
            "client", stage, torch.optim.SGD(stage.parameters(), lr=0.05), clip=1.0, noise_multiplier=1.0,
            expected_batch_size=5, ghost=ghost, seed=0,
        )  # fmt: skip
        for trained in (False, True, True):
            if trained:
                client.allow(last=True)
                client.learn(x, y)
            held = {f"0.{name}": tensor.detach().clone() for name, tensor in conv.state_dict().items()}
            (found if trained else starts).append({**known(client), **held})
    for step in (0, 1):
        assert_same_training(found[2 + step], found[step], starts[0])


# Training under encrypted weights


class Owner:
    """A client who owns the weights, and a server that holds them encrypted; or, in the clear, the client alone."""

    def __init__(self, *, clear: bool = False, optimizer: str = "sgd", rows: int = 8):
        bottom, middle, head = stages()
        self.keys = Keys()
        self.line = Line(server=CipherHolder("server", middle))
        self.server = self.line.to("server")
        layer: nn.Module = middle
        if not clear:
            layer = EncryptedLayer(self.keys, self.server, update="encrypted", layer=middle, rows=rows)
        stage = nn.Sequential(bottom, layer, head)
        self.client = Learner("client", stage, OPTIMIZERS[optimizer](stage.parameters()))
        self.batches = Batches(*data(), batch_size=13, seed=1)  # in two parts of 8, and one of 1

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        encrypted = isinstance(self.client.stage[1], EncryptedLayer)  # type: ignore[index]
        return he_encw(self.client, x, y) if encrypted else self.client.learn(x, y)[0]

    def run(self) -> None:
        for x, y in self.batches:
            self.step(x, y)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_under_encrypted_weights_is_that_in_the_clear(optimizer: str) -> None:
    twin, own = Owner(clear=True, optimizer=optimizer), Owner(optimizer=optimizer)
    start = twin.client.weights()
    assert all(torch.equal(start[name], tensor) for name, tensor in own.client.weights().items())
    twin.run()
    own.run()
    assert_same_training(own.client.weights(), twin.client.weights(), start, of=5e-3 if optimizer == "adam" else SAME)
    assert_only(own.line, {Kind.CIPHERTEXT, Kind.COUNT, Kind.PARAMETERS})
    assert Counter(one.request.verb for one in own.line.record.exchanges) == {
        "open": 1, "weights_encrypted": 4, "answer": 3, "product": 4, "product_back": 7,
    }  # fmt: skip


def test_no_header_tells_how_great_encrypted_weights_are() -> None:
    told = []
    for times in (1, 40):
        own, x = Owner(), data()[0][:8]
        layer: Any = own.client.stage[1]  # type: ignore[index]
        with torch.no_grad():
            layer.weight.mul_(times)
        assert (layer._shrunk, he_inference(own.client, x).shape) == (1.0, (8, CLASSES))
        assert (layer._shrunk < 1) == (times > 1)  # which stays here
        own.step(x, data()[1][:8])
        sent = [one for one in own.line.messages if Kind.CIPHERTEXT in one.tensors]
        # All that is told: form, polynomials, parameters; count, rows and scale.
        told.append([[one.verb, *(one.tensors[Kind.CIPHERTEXT][at].tolist() for at in HEADER)] for one in sent])
    assert told[0] == told[1]
    assert {one[0] for one in told[0]} == {"weights_encrypted", "answer", "product", "product_back"}


def test_encrypted_training_goes_on_from_a_checkpoint_under_new_keys(tmp_path: Path) -> None:
    def run(epochs: list[int], path: Path) -> Weights:
        for upto in epochs:
            own = Owner(optimizer="momentum")
            state = {"client": own.client, "batches": own.batches}
            fit(epochs_of(own.step, own.batches), epochs=upto, state=state, checkpoint=path)
        return own.client.weights()

    assert_same_training(run([1, 2], tmp_path / "a"), run([2], tmp_path / "b"), Owner().client.weights())


# Inference


def test_inference_is_that_of_the_plain_model_and_sends_ciphertexts_alone() -> None:
    bottom, middle, head = stages()
    line = Line(server=LayerHolder("server", middle))
    client = Learner("client", nn.Sequential(bottom, EncryptedLayer(Keys(), line.to("server")), head))
    x, y = data()
    plain = Learner("plain", nn.Sequential(bottom, middle, head)).predict(x)
    assert torch.allclose(he_inference(client, x), plain, atol=1e-3)  # 1e-4 at the layer, and no more past it
    assert torch.allclose(predict([client], x, batch_size=16), plain, atol=1e-3)
    assert evaluate([client], x, y)["accuracy"] == (plain.argmax(1) == y).double().mean().item()
    assert_only(line, {Kind.CIPHERTEXT, Kind.COUNT, Kind.PARAMETERS})
    assert {one.request.verb for one in line.record.exchanges} == {"open", "answer"}


def test_what_a_layer_refuses_is_said_in_its_own_words_after_the_partys_name() -> None:
    bottom, middle, head = stages()
    layer = EncryptedLayer(Keys(), LayerHolder("server", middle, update="private"), update="private")
    stage = nn.Sequential(bottom, layer, head)
    client: Any = Learner("client", stage, torch.optim.SGD(stage.parameters(), lr=0.05))  # no PrivateLearner
    x, y = data()
    he_u_dp(client, x, y)
    with pytest.raises(ValueError, match=r"^client: expected weights that change by DP-SGD alone.*freeze it$"):
        he_u_dp(client, x, y)
    small = nn.Sequential(EncryptedLayer(Keys(), LayerHolder("server", middle), bound=1.0), head)
    with pytest.raises(ValueError, match=r"^client: expected activations within ±1, got .*out_of_range='clip'$"):
        he_inference(Learner("client", small), 2 * torch.ones(4, CUT))
    remote = Line(server=LayerHolder("server", middle)).to("server")
    far = EncryptedLayer(Keys(), remote)
    EncryptedLayer(Keys(), remote)  # ends the session of the one before it
    with pytest.raises(ValueError, match=r"^client: expected ciphertexts under key .*session of its own"):
        he_inference(Learner("client", nn.Sequential(far, head)), torch.ones(4, CUT))


@pytest.mark.parametrize(("protocol", "wanted"), [(he_u_dp, "private"), (he_encw, "encrypted")])
def test_a_protocol_asks_for_its_own_layer(protocol: Callable[..., Tensor], wanted: str) -> None:
    bottom, middle, head = stages()
    x, y = data()
    for layer, got in ((middle, "none"), (EncryptedLayer(Keys(), LayerHolder("server", middle)), "EncryptedLayer")):
        client: Any = Learner("client", nn.Sequential(bottom, layer, head))
        with pytest.raises(ValueError, match=rf"client: expected .*EncryptedLayer\(update='{wanted}'\), got {got}"):
            protocol(client, x, y)


def test_each_protocol_says_who_learns_what() -> None:
    assert LEARNS.keys() == {"he_u_dp", "he_encw", "he_inference"}
    assert all(said.keys() == {"server", "client"} and all(said.values()) for said in LEARNS.values())
    assert any("LEAKY" in one for one in LEAKS["server"])
    assert not any("LEAKY" in one for said in LEARNS.values() for told in said.values() for one in told)


# No key material


class Published:
    """LEAKY: training as published, its gradients in the clear."""

    def __init__(self) -> None:
        bottom, middle, _ = stages()
        with pytest.warns(UserWarning, match="split-ways is LEAKY, and a baseline: its server reads every label"):
            holder = SplitWaysHolder("server", middle, torch.optim.SGD(middle.parameters(), lr=0.05))
        self.line, self.keys, self.middle = Line(server=holder), Keys(), middle
        self.server = self.line.to("server")
        self.layer = EncryptedLayer(self.keys, self.server)
        self.bottom = Learner("bottom", bottom, torch.optim.SGD(bottom.parameters(), lr=0.05))
        self.head = Learner("head", nn.Identity())
        self.batches = Batches(*data(), batch_size=10, seed=2)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return split_ways(self.bottom, self.layer, self.server, self.head, x, y)

    def run(self) -> None:
        for x, y in self.batches:
            self.step(x, y)


def test_training_as_published_is_that_in_the_clear() -> None:
    own = Published()
    bottom, middle, _ = stages()
    start = copy.deepcopy(middle.state_dict())
    stage = nn.Sequential(bottom, middle)
    twin = Learner("twin", stage, torch.optim.SGD(stage.parameters(), lr=0.05))
    for (x, y), _ in zip(own.batches, range(4), strict=True):
        assert own.step(x, y).item() == pytest.approx(twin.learn(x, y)[0].item(), abs=1e-3)
    assert_same_training(own.middle.state_dict(), middle.state_dict(), start)
    assert Kind.GRADIENT in {Kind.of(key) for message in own.line.messages for key in message.tensors}


def test_the_published_server_serves_a_second_client_too() -> None:
    layer, x = nn.Linear(3, 2), torch.rand(4, 3)
    with pytest.warns(UserWarning, match="LEAKY"):
        holder = SplitWaysHolder("server", layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="b: split-ways is LEAKY"):
        other = holder.session("b")
    encrypted, before = EncryptedLayer(Keys(), other), layer.weight.detach().clone()
    assert torch.allclose(encrypted(x), layer(x), atol=1e-3)  # the error of ciphertexts is a tenth of it
    gradients = {Kind.GRADIENT: torch.ones(4, 2), "gradient/weight": torch.ones(2, 3), "gradient/bias": torch.zeros(2)}
    for one, times in ((holder, 1), (other, 2)):  # both step the same weights
        one.ask("backward", gradients)
        assert torch.allclose(layer.weight, before - 0.1 * times)  # float32's rounding
    assert torch.allclose(encrypted(x), layer(x), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({Kind.GRADIENT: torch.zeros(2, 3)}, r"\[n, 2\] and those of Linear\(.*got gradient \(2, 3\), gradient/weight"),
        ({Kind.GRADIENT: torch.zeros(2)}, r"got gradient \(2,\), gradient/weight \(2, 3\)"),
        ({Kind.GRADIENT: torch.full((2, 2), torch.nan)}, "server: expected a finite gradient"),
        ({"gradient/weight": torch.zeros(5, 5)}, r"gradient/weight \(5, 5\), gradient/bias \(2,\)"),
        ({"gradient/weight": torch.full((2, 3), torch.nan)}, "server: expected a finite gradient"),
        ({"gradient/bias": torch.zeros(3)}, r"gradient/bias \(3,\)"),
        ({"gradient/bias": torch.tensor([0.0, torch.inf])}, "server: expected a finite gradient"),
    ],
)
def test_the_published_server_refuses_gradients_that_do_not_fit(changes: dict[str, Tensor], says: str) -> None:
    layer = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="LEAKY"):
        line = Line(server=SplitWaysHolder("server", layer, torch.optim.SGD(layer.parameters(), lr=0.1)))
    sent = {Kind.GRADIENT: torch.ones(2, 2), "gradient/weight": torch.ones(2, 3), "gradient/bias": torch.ones(2)}
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=says):
        line.to("server").ask("backward", {**sent, **changes})
    for missing in sent:
        with pytest.raises(ValueError, match="expected a "):
            line.to("server").ask("backward", {kind: tensor for kind, tensor in sent.items() if kind != missing})
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def ternary(keys: Keys) -> NDArray[np.int64]:
    """The secret key's coefficients, in −1, 0, 1, by SEAL's own transform back."""
    secret, ring = keys._secret.data(), keys.ring
    values = np.array([secret.data(i) for i in range(ring.parameters.degree)], np.uint64)
    both = ring.from_integers(np.stack([values, values])[:, None], 1.0, ntt=True)
    ring.evaluator.transform_from_ntt_inplace(both)
    found = ring.integers(both)[0, 0].astype(np.int64)
    found[found > ring.primes[0] // 2] -= ring.primes[0]
    assert set(found.tolist()) == {-1, 0, 1}
    return found


def encodings(keys: Keys) -> dict[str, bytes]:
    """The whole key, in each way in which it might be stored."""
    secret = keys._secret.data()
    values = np.array([secret.data(i) for i in range(keys.parameters.degree)], "<u8")
    s = ternary(keys)
    digits = (s % 3).astype(np.uint8).reshape(-1, 4)
    twos = (s & 3).astype(np.uint8).reshape(-1, 4)
    return {
        "integers of 8 bytes": values.tobytes(),
        "integers of 6 bytes": values.view(np.uint8).reshape(-1, 8)[:, :6].tobytes(),
        "integers, greatest byte first": values.byteswap().tobytes(),
        "hexadecimal": "".join(f"{value:x}" for value in values.tolist()).encode(),
        "int8": s.astype(np.int8).tobytes(),
        "int64": s.astype("<i8").tobytes(),
        "float32": s.astype("<f4").tobytes(),
        "two bits, 0 1 2": (digits << [0, 2, 4, 6]).sum(1).astype(np.uint8).tobytes(),
        "two bits, two's complement": (twos << [0, 2, 4, 6]).sum(1).astype(np.uint8).tobytes(),
    }


def key_material(keys: Keys, frames: list[bytes]) -> list[str]:
    """The encodings of which any sixty-fourth part of the key, wherever it lies, is in a frame."""
    blob, found = b"\0".join(frames), []
    for name, whole in encodings(keys).items():
        size = len(whole) // 64
        if any(whole[at : at + size] in blob for at in range(0, len(whole) - size + 1, size)):
            found.append(name)
    return found


RUNS: dict[str, Callable[[], Any]] = {
    "he_u_dp": lambda: Private(capacity=20),
    "he_encw": Owner,
    "split_ways": Published,
}


@pytest.mark.parametrize("protocol", RUNS)
def test_no_frame_of_a_whole_run_holds_any_of_the_key(protocol: str) -> None:
    run = RUNS[protocol]()
    run.run()
    assert len(run.line.tap.frames) > 10
    assert not key_material(run.keys, run.line.tap.frames)


def test_a_key_that_was_sent_would_be_found() -> None:
    keys = Keys()
    frames = [encode(Message("open", {"parameters": torch.zeros(9, dtype=torch.uint8)}))]
    assert not key_material(keys, frames)
    for name, whole in encodings(keys).items():
        half = whole[len(whole) // 3 : -len(whole) // 3]  # a part of it
        data = torch.frombuffer(bytearray(b"some" + half + b"more"), dtype=torch.uint8)
        assert name in key_material(keys, [*frames, encode(Message("open", {"ciphertext": data}))])
    assert not key_material(Keys(), [encode(Message("open", {"ciphertext": data}))])  # another's


def stored(thing: Any) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        thing.save(file.name)
        return Path(file.name).read_bytes()


def context() -> bytes:
    own = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    return own.serialize(save_secret_key=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: stored(Keys()._secret),
            "an object stored by SEAL, which may be a key; secret keys and TenSEAL contexts",
        ),
        (context, "of something else|in bytes, got something else"),
    ],
    ids=["a key that SEAL has stored", "a TenSEAL context with its key"],
)
@pytest.mark.parametrize("verb", ["open", "product", "product_back", "answer", "weights_encrypted"])
def test_a_server_refuses_keys_wherever_they_come(verb: str, make: Callable[[], bytes], says: str) -> None:
    own = Owner()
    own.step(*(part[:8] for part in data()))
    key = torch.frombuffer(bytearray(make()), dtype=torch.uint8)
    kind = Kind.PARAMETERS if verb == "open" else Kind.CIPHERTEXT
    with pytest.raises(ValueError, match=says):
        own.server.ask(verb, {kind: key, Kind.COUNT: torch.tensor(8), TICKET: torch.tensor(1)})


# Two clients, a key each


class Pair:
    """Two clients of one server, each with a session and a key of its own."""

    def __init__(self, update: str = "frozen"):
        self.bottom, self.middle, self.head = stages()
        holder = LayerHolder("server", self.middle, update=update)
        self.line = Line(a=holder.session("a"), b=holder.session("b"))
        self.keys = {name: Keys() for name in "ab"}
        self.remotes = {name: self.line.to(name) for name in "ab"}
        self.layers = {name: EncryptedLayer(self.keys[name], self.remotes[name], update=update) for name in "ab"}


def test_two_clients_infer_through_the_same_weights_under_keys_of_their_own() -> None:
    pair, x = Pair(), data()[0]
    clients = {name: Learner(name, nn.Sequential(pair.bottom, layer, pair.head)) for name, layer in pair.layers.items()}
    with torch.no_grad():
        plain = pair.head(pair.middle(pair.bottom(x)))
    for part in (slice(0, 10), slice(10, 20)):
        for client in clients.values():
            assert torch.allclose(he_inference(client, x[part]), plain[part], atol=1e-3)
    assert pair.keys["a"].id != pair.keys["b"].id


def test_two_clients_train_one_layer_of_the_server() -> None:
    pair, (x, y) = Pair("private"), data()
    before = pair.middle.weight.detach().clone()
    for name, layer in pair.layers.items():
        bottom, _, head = stages()
        stage = nn.Sequential(bottom, layer, head)
        client = PrivateLearner(
            name, stage, torch.optim.SGD(stage.parameters(), lr=0.05), clip=1.0, noise_multiplier=1.0,
            expected_batch_size=8, seed=0, loss=PaddedCrossEntropy(8),
        )  # fmt: skip
        client.allow(last=True)
        assert he_u_dp(client, x[:8], y[:8]).isfinite()
    changes = [message.tensors["update/weight"] for message in pair.line.messages if "update/weight" in message.tensors]
    assert len(changes) == 2
    assert torch.allclose(pair.middle.weight, before + sum(changes), atol=1e-6)


def test_one_clients_ciphertext_is_refused_under_anothers_session() -> None:
    pair, x = Pair(), torch.rand(4, CUT)
    for layer in pair.layers.values():
        layer(x)
    (request,) = [
        one.request for one in pair.line.record.exchanges if (one.request.session, one.request.verb) == ("a", "answer")
    ]
    with pytest.raises(ValueError, match=f"expected ciphertexts under key {pair.keys['b'].id.hex()}, got"):
        pair.remotes["b"].ask("answer", request.tensors)
    with pytest.raises(ValueError, match="expected ciphertexts under key"):  # the frame itself, readdressed
        Framed(pair.line.tap).request(replace(request, session="b", step=99))


def test_a_ciphertext_whose_key_is_forged_decrypts_to_nothing() -> None:
    pair, x = Pair(), torch.rand(4, CUT)
    pair.layers["a"](x)
    sent, _ = pair.line.sent(Kind.CIPHERTEXT, "answer")  # a request and its reply
    forged = sent.clone()
    forged[16:24] = torch.tensor(list(pair.keys["b"].id), dtype=torch.uint8)
    ask, own = pair.remotes["b"].ask, pair.layers["b"]
    with pytest.raises(ValueError, match="they changed on the way"):  # the key's id is under the checksum too
        ask("answer", {Kind.COUNT: torch.tensor(4), Kind.CIPHERTEXT: forged})
    forged[40:44] = 0
    checksum = zlib.crc32(forged.numpy().tobytes())
    forged[40:44] = torch.tensor(list(checksum.to_bytes(4, "little")), dtype=torch.uint8)
    reply = ask("answer", {Kind.COUNT: torch.tensor(4), Kind.CIPHERTEXT: forged})

    class Replay:
        def ask(self, verb: str, tensors: Any) -> Any:
            return reply

    own._holder = Replay()
    with pytest.raises(
        ValueError, match=r"expected a decryption within .* the ciphertext was changed, or is of another"
    ):
        own(x)


def test_a_wire_for_two_clients_keeps_their_steps_apart() -> None:
    # The same layers asked in turn, as often as they like.
    pair, x = Pair(), torch.rand(4, CUT, requires_grad=True)
    plain = pair.middle(x)
    outputs = {name: layer(x) for name, layer in pair.layers.items()}
    for name in "ba":
        (g,) = torch.autograd.grad(outputs[name].sum(), x)
        assert torch.allclose(outputs[name], plain, atol=1e-3)
        assert torch.allclose(g, pair.middle.weight.sum(0).expand(4, CUT), atol=1e-3)
