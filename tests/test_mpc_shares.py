"""Fixed point, shares, streams and the public half of a stage: no server is needed for any of it."""

import pytest
import torch
from torch import Tensor, nn

from privacy.mpc.aggregation import SecureMean
from privacy.mpc.costs import Costs, Network
from privacy.mpc.layers import Layer, described
from privacy.mpc.randomness import Stream
from privacy.mpc.sharing import decoded, encoded, held, joined, shared
from splitlearn.federation import mean
from splitlearn.frames import Kind
from splitlearn.members import TICKET
from splitlearn.misfit import Refused
from splitlearn.service import keyed


def test_fixed_point_rounds_to_the_nearest() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0**-17 * 0.9, 2.0**-17 * 1.1, -3.141592, 8192.0], dtype=torch.float64)
    assert encoded(x, "x").tolist() == [0, 65536, -65536, 0, 1, -205887, 8192 << 16]
    assert float((decoded(encoded(x, "x"), "x") - x).abs().max()) <= 2**-17


@pytest.mark.parametrize(
    ("value", "told"), [(8192.1, "8192"), (-1e6, "1e\\+06"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_what_the_range_does_not_hold_is_refused_with_its_value(value: float, told: str) -> None:
    with pytest.raises(Refused, match=f"activations within ±8192.*got {told}"):
        encoded(torch.tensor([1.0, value]), "activations")


def test_a_wrapped_value_is_no_result() -> None:
    with pytest.raises(Refused, match=r"within ±1\.04858e\+06.*wrapped"):
        decoded(torch.tensor([1 << 47]), "outputs")


def test_shares_add_up_and_say_nothing_alone() -> None:
    values = {"x": encoded(torch.full((100, 100), 3.25), "x"), "y": torch.tensor(7)}
    first, second = (held(message) for message in shared(values))
    for name, value in values.items():
        assert torch.equal(first[name] + second[name], value)
    for own in (first["x"], second["x"]):
        bits = torch.stack([(own >> place) & 1 for place in range(64)]).double()
        assert float((bits.mean((1, 2)) - 0.5).abs().max()) < 0.03  # six standard deviations of 10,000 bits
    assert not torch.equal(held(shared(values)[0])["x"], first["x"])
    replies = (keyed(first, Kind.SHARE), keyed(second, Kind.SHARE))
    assert torch.equal(joined(replies)["x"], values["x"])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({f"{Kind.SHARE}/x": torch.zeros(2)}, "shares of int64"),
        ({Kind.SEED: torch.zeros(31, dtype=torch.uint8)}, "a seed of 32 bytes"),
        ({Kind.SEED: torch.zeros(32)}, "a seed of 32 bytes"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([-1])}, "a shape of at most"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([1 << 40])}, "a shape of at"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([2.0])}, "a shape of at most"),
    ],
)
def test_malformed_shares_are_one_clear_error(message: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        held(message)


def test_servers_that_disagree_are_told_of() -> None:
    with pytest.raises(ValueError, match="the same shares from both servers"):
        joined(({f"{Kind.SHARE}/x": torch.tensor(1)}, {f"{Kind.SHARE}/y": torch.tensor(1)}))


def test_torch_starts_a_stream_from_32_bits_of_a_seed_and_ours_from_all() -> None:
    one, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + (77 << 32))
    draw = [torch.randint(-(2**63), 2**63 - 1, (8,), generator=generator) for generator in (one, other)]
    assert torch.equal(*draw)
    seed = bytearray(32)
    first = Stream(bytes(seed)).elements((8,))
    for place in range(32):
        changed = bytearray(seed)
        changed[place] ^= 128
        assert not torch.equal(Stream(bytes(changed)).elements((8,)), first)


def test_a_stream_repeats_only_from_its_seed() -> None:
    seed = Stream.seed()
    one, other = Stream(seed), Stream(seed)
    first = one.elements((3, 4))
    assert torch.equal(first, other.elements((3, 4)))
    assert not torch.equal(first, one.elements((3, 4)))
    assert set(one.elements((1000,), bits=1).tolist()) == {0, 1}
    assert one.elements(()).shape == ()
    assert one.elements((0, 5)).shape == (0, 5)
    with pytest.raises(ValueError, match="seed of 32 bytes, got 5"):
        Stream(b"short")


def test_a_stage_is_described_by_what_is_public() -> None:
    stage = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU()), nn.MaxPool2d(2), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4, 3, bias=False), nn.LeakyReLU(0.1), nn.Identity(),
    )  # fmt: skip
    layers = described(stage)
    assert [layer.kind for layer in layers] == [
        "Conv2d", "ReLU", "MaxPool2d", "AvgPool2d", "Flatten", "Linear", "LeakyReLU", "Identity",
    ]  # fmt: skip
    assert [layer.name for layer in layers][:2] == ["0.0", "0.1"]
    assert [Layer.of(layer.told()) for layer in layers] == layers
    assert (layers[0].bias, layers[5].bias) == (True, False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3), nn.Dropout(), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True), nn.Flatten(0),
        nn.Conv1d(1, 1, 3, padding="same"), nn.AvgPool2d(3, padding=1),
    ],
)  # fmt: skip
def test_a_layer_that_has_no_form_on_shares_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(Refused, match=f"evaluated on shares.*got {type(layer).__name__}"):
        described(nn.Sequential(layer))


@pytest.mark.parametrize("change", [{"kind": "Dropout"}, {"settings": {}}, {"name": 3}])
def test_a_layer_that_was_told_of_wrongly_is_refused(change: dict[str, object]) -> None:
    told = described(nn.Linear(2, 3))[0].told()
    with pytest.raises(ValueError, match="a layer that can be evaluated on shares"):
        Layer.of({**told, **change})


def test_costs_by_hand() -> None:
    told = {
        "server 0": {"crypten": {"nbytes": 60, "rounds": 5}, "sockets": [40, 50], "seconds": {"linear": 1.5}},
        "server 1": {"crypten": {"nbytes": 30, "rounds": 2}, "sockets": [20, 30], "seconds": {"linear": 1.4}},
        "dealer": {"crypten": {"nbytes": 30, "rounds": 3}, "sockets": [30, 10], "seconds": {}},
    }
    costs = Costs.of(told)
    assert (costs.nbytes, costs.socket_nbytes, costs.crossed, costs.rounds) == (60, 90, 90, 5)
    assert costs.seconds["linear"] == 1.5
    assert costs.over(Network("slow", 0.1, 720.0)) == pytest.approx(0.5 + 1.0)


def test_a_secure_mean_of_plain_weights_is_the_mean_and_of_some_tickets_an_error() -> None:
    weights, counts = [{"w": torch.rand(3)} for _ in range(3)], [1, 2, 3]
    aggregate = SecureMean(None)  # type: ignore[arg-type]
    assert torch.equal(aggregate(weights, counts, weights[0])["w"], mean(weights, counts)["w"])
    with pytest.raises(ValueError, match="wrap every member"):
        aggregate([{TICKET: torch.zeros(16)}, *weights[1:]], counts, weights[0])
