"""Fixed point, shares, streams and the public half of a stage: no server is needed for any of it."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy.mpc.aggregation import SecureMean
from privacy.mpc.costs import LAN, Costs, Network
from privacy.mpc.layers import KINDS, Layer, described, plain_stage
from privacy.mpc.randomness import Stream
from privacy.mpc.sharing import BITS, LIMIT, REVEALED_LIMIT, WEIGHT_BITS, decoded, encoded, held, joined, shared
from splitlearn.federation import mean
from splitlearn.frames import Kind
from splitlearn.members import TICKET
from splitlearn.misfit import Refused
from splitlearn.service import keyed


def test_fixed_point_rounds_to_the_nearest() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0**-17 * 0.9, 2.0**-17 * 1.1, -3.141592, 8192.0], dtype=torch.float64)
    assert encoded(x, "x").tolist() == [0, 65536, -65536, 0, 1, -205887, 8192 << 16]
    assert float((decoded(encoded(x, "x"), "x") - x).abs().max()) <= 2**-17


@pytest.mark.parametrize("bits", [BITS, 24, WEIGHT_BITS])
@pytest.mark.parametrize("size", [1e-3, 1.0, LIMIT])
def test_a_round_trip_is_off_by_half_a_step_at_most(size: float, bits: int) -> None:
    x = (2 * torch.rand(5000, dtype=torch.float64) - 1) * size
    x[0], x[1] = size, -size
    assert (decoded(encoded(x, "x", bits=bits), "x", bits=bits) - x).abs().max() <= 2.0 ** -(bits + 1)


@pytest.mark.parametrize(
    ("value", "told"), [(8192.1, "8192"), (-1e6, "1e\\+06"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_what_the_range_does_not_hold_is_refused_with_its_value(value: float, told: str) -> None:
    with pytest.raises(Refused, match=f"activations within ±8192.*got {told}"):
        encoded(torch.tensor([1.0, value]), "activations")


def test_a_wrapped_value_is_no_result() -> None:
    assert decoded(torch.tensor([1 << 36, -(1 << 36)]), "outputs").tolist() == [REVEALED_LIMIT, -REVEALED_LIMIT]
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


def test_neither_two_sharings_of_a_value_nor_two_values_of_a_sharing_have_anything_in_common() -> None:
    values = {name: encoded(torch.ones(20_000), name) for name in "xy"}
    drawn = [held(message)[name] for _ in range(2) for message in shared(values) for name in values]
    assert len(torch.cat(drawn).unique()) == 8 * 20_000  # of 2^64: two meet once in 10^9 runs
    for one, other in [(0, 4), (2, 6), (0, 1), (2, 3)]:  # the same half of another sharing; another value of one
        bits = torch.stack([(drawn[one] - drawn[other]) >> place & 1 for place in range(64)]).double()
        assert float((bits.mean(1) - 0.5).abs().max()) < 6 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (7,), (2, 3, 4)])
def test_shares_keep_their_shape(shape: tuple[int, ...]) -> None:
    value = torch.randint(-(2**63), 2**63 - 1, shape)
    first, second = (held(message)["x"] for message in shared({"x": value}))
    assert (first.shape, second.shape) == (value.shape, value.shape)
    assert torch.equal(first + second, value)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({f"{Kind.SHARE}/x": torch.zeros(2)}, "shares of int64"),
        ({Kind.SEED: torch.zeros(31, dtype=torch.uint8)}, "a seed of 32 bytes"),
        ({Kind.SEED: torch.zeros(32)}, "a seed of 32 bytes"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([-1])}, "a shape of at most"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([1 << 40])}, "a shape of at"),
        ({Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([2.0])}, "a shape of at most"),
        (
            {Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([1 << 32, 1 << 32])},
            "a shape of at most",  # torch's own product of the sizes wraps around to zero
        ),
        (
            {Kind.SEED: torch.zeros(32, dtype=torch.uint8), f"{Kind.COUNT}/x": torch.tensor([True])},
            "a shape of at most",
        ),
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


@pytest.mark.parametrize("bits", [1, 8, 63, 64])
def test_a_stream_draws_so_many_bits_each_half_of_the_time(bits: int) -> None:
    drawn = Stream(bytes(32)).elements((20_000,), bits)
    assert bits == 64 or not (drawn >> bits).any()
    ones = torch.stack([drawn >> place & 1 for place in range(bits)]).double()
    assert float((ones.mean(1) - 0.5).abs().max()) < 6 * 0.5 / 20_000**0.5
    assert bits < 63 or len(drawn.unique()) == len(drawn)


def every_kind() -> nn.Sequential:
    body = nn.Sequential(
        nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.AvgPool2d((2, 1)),
    )  # fmt: skip
    head = nn.Sequential()
    head.add_module("flat", nn.Flatten())
    head.add_module("out", nn.Sequential(nn.Linear(40, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)))
    return nn.Sequential(body, nn.Identity(), head)


def test_layers_go_by_the_names_of_the_state_dict_and_cross_as_json() -> None:
    stage, line = every_kind(), nn.Sequential(nn.Conv1d(1, 2, 3), nn.MaxPool1d(2))
    for one in (stage, line, nn.Linear(3, 2), nn.Conv1d(1, 2, 3, bias=False)):
        layers = described(one)
        parameters = {
            f"{layer.name}.{name}".lstrip("."): tuple(each.shape)
            for layer in layers
            for name, each in layer.plain().named_parameters()
        }
        assert parameters == {name: tuple(each.shape) for name, each in one.state_dict().items()}
        assert [Layer.of(json.loads(json.dumps(layer.told()))) for layer in layers] == layers
    assert {layer.kind for one in (stage, line) for layer in described(one)} == set(KINDS)


def test_the_plain_stage_of_what_was_told_of_does_the_same_without_memory() -> None:
    stage = every_kind()
    plain = plain_stage(described(stage))
    assert all(parameter.is_meta for parameter in plain.parameters())
    x = torch.zeros(2, 1, 12, 10)
    assert plain(x.to("meta")).shape == stage(x).shape
    assert list(map(str, plain)) == [str(one) for one in stage.modules() if not isinstance(one, nn.Sequential)]


def test_a_layer_that_stands_twice_is_applied_twice() -> None:
    relu = nn.ReLU()  # it has no weights, by which it would be missed
    layers = described(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu))
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("0", "Linear"), ("1", "ReLU"), ("2", "Linear"), ("3", "ReLU"),
    ]  # fmt: skip


def test_weights_that_stand_twice_are_refused() -> None:
    tied = nn.Linear(2, 2)  # a step of SGD would pull the two apart
    with pytest.raises(Refused, match=" at 2"):
        described(nn.Sequential(tied, nn.ReLU(), tied))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_in_groups_of_several_channels_is_refused(kind: Any) -> None:
    described(kind(4, 8, 3, groups=4))  # a channel each
    with pytest.raises(Refused, match="groups"):  # CrypTen has no gradient of it
        described(nn.Sequential(kind(4, 6, 3, groups=2)))


class Doubled(nn.Linear):
    """A layer of somebody's own."""


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
        nn.Conv1d(1, 1, 3, padding="same"), nn.AvgPool2d(3, padding=1), nn.Conv2d(1, 1, 3, padding="valid"),
        nn.MaxPool1d(2, dilation=2), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d(2, count_include_pad=False), nn.LeakyReLU(inplace=True), nn.Flatten(1, 2), nn.Tanh(),
        nn.AvgPool1d(2), Doubled(2, 2),
    ],
    ids=lambda layer: str(layer).partition("\n")[0],
)  # fmt: skip
def test_a_layer_that_has_no_form_on_shares_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(Refused, match=f"evaluated on shares.*got {type(layer).__name__}"):
        described(nn.Sequential(layer))
    with pytest.raises(Refused, match=r" at 1\.1;"):
        described(nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), layer)))
    with pytest.raises(Refused, match=" at the top;"):
        described(layer)


@pytest.mark.parametrize("stage", [nn.Sequential(), nn.Sequential(nn.Sequential())], ids=["no", "nested"])
def test_a_stage_without_layers_is_refused(stage: nn.Module) -> None:
    with pytest.raises(Refused, match="a stage with layers, got none; cut lower"):
        described(stage)


@pytest.mark.parametrize("told", [None, 5, "Linear", [], {}])
def test_what_is_no_layer_at_all_is_refused(told: Any) -> None:
    with pytest.raises(ValueError, match="a layer that can be evaluated on shares"):
        Layer.of(told)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Dropout"}, {"settings": {}}, {"name": 3}, {"kind": []}, {"settings": None},
        {"settings": {"in_features": 2, "out_features": 3, "dilation": 1}},
        {"settings": {"in_features": "2", "out_features": 3}}, {"settings": {"in_features": -2, "out_features": 3}},
    ],
    ids=str,
)  # fmt: skip
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


def test_where_a_party_knows_nothing_of_its_sockets_cryptens_count_stands() -> None:
    told = {
        role: {"crypten": {"nbytes": 60, "rounds": 5}, "sockets": sockets, "seconds": {}}
        for role, sockets in {"server 0": [40, 50], "server 1": None, "dealer": [3, 4]}.items()
    }
    costs = Costs.of(told)
    assert (costs.socket_nbytes, costs.crossed) == (None, 90)
    assert costs.over(Network("slow", 0.1, 720.0)) == pytest.approx(0.5 + 1.0)
    assert LAN.seconds(4, 1e6) == pytest.approx(4 * 0.0005 + 8e6 / 1e9)


def test_a_secure_mean_of_plain_weights_is_the_mean_and_of_some_tickets_an_error() -> None:
    weights, counts = [{"w": torch.rand(3)} for _ in range(3)], [1, 2, 3]
    aggregate = SecureMean(None, or_mean=True)  # type: ignore[arg-type]
    assert torch.equal(aggregate(weights, counts, weights[0])["w"], mean(weights, counts)["w"])
    with pytest.raises(ValueError, match="got 0 tickets from 3 members"):
        SecureMean(None)(weights, counts, weights[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrap every member"):
        aggregate([{TICKET: torch.zeros(16)}, *weights[1:]], counts, weights[0])
