"""The cost model: counted work and formulas against hand-computed cases, and where each cut is the cheapest."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from splitlearn import cut
from splitlearn.cost import Layer, compute_seconds, count, split_cost, units
from splitlearn.cut import layer_names
from splitlearn.devices import DEVICES, RADIOS, Device, Radio
from splitlearn.models import cnn28, digits_cnn, ecg_cnn, mlp, resnet18, token_transformer, vgg11
from splitlearn.network import PROFILES, Profile

TOKENS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
ZOO: list[tuple[nn.Sequential, Tensor]] = [
    (digits_cnn(), torch.rand(2, 1, 8, 8)),
    (cnn28(), torch.rand(2, 1, 28, 28)),
    (resnet18(), torch.rand(2, 3, 32, 32)),
    (vgg11(), torch.rand(2, 3, 32, 32)),
    (ecg_cnn(), torch.rand(2, 1, 128)),
    (mlp(30), torch.rand(2, 30)),
    (token_transformer(50, 4, 8), TOKENS),
    (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Dropout(0.5))), torch.rand(5, 2, 2)),
]
PLAIN = Device(
    name="plain",
    convolution=1e9,
    linear=2e9,
    moved=1e8,
    overhead=1e-3,
    watts=10.0,
    idle_watts=1.0,
    memory=2**30,
    source="made up",
)
FAST = replace(PLAIN, name="fast", convolution=1e12, linear=2e12, moved=1e11, overhead=1e-6)
LINK = Profile(up=1e6, down=4e6, latency=0.1)
RADIO = Radio(up=1e-6, down=0.5e-6, base=2.0, source="made up")


def by_hand(name: str = "layer", **changes: Any) -> Layer:
    layer = Layer(name, {"convolution": 0.0, "linear": 4e9}, 3, 5e8, 1000, (10,), 400)
    return replace(layer, **changes)


# What is counted


def test_a_convolution_counts_as_by_hand() -> None:
    (layer,) = count(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)), torch.rand(2, 3, 8, 8))
    assert layer.flops == {"convolution": 2 * 2 * 16 * 8 * 8 * 3 * 3 * 3, "linear": 0}
    weights = 4 * (16 * 3 * 3 * 3 + 16)
    assert layer.weights_nbytes == weights
    assert layer.moved == weights + 4 * 2 * 3 * 8 * 8 + 4 * 2 * 16 * 8 * 8
    assert (layer.operations, layer.output, layer.output_nbytes) == (1, (16, 8, 8), 4 * 2 * 16 * 8 * 8)
    assert layer.input_nbytes == 4 * 2 * 3 * 8 * 8


def test_a_linear_layer_and_what_has_no_flops_count_as_by_hand() -> None:
    flatten, linear, relu = count(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU()), torch.rand(4, 3, 2, 2))
    assert linear.flops == {"convolution": 0, "linear": 2 * 4 * 12 * 5}
    assert linear.moved == 4 * (12 * 5 + 5) + 4 * 4 * 12 + 4 * 4 * 5
    assert relu.flops == {"convolution": 0, "linear": 0}
    assert (relu.operations, relu.moved) == (1, 2 * 4 * 4 * 5)
    assert (flatten.operations, flatten.moved, flatten.output) == (1, 0, (12,))  # a view, which moves nothing


def test_attention_counts_as_by_hand() -> None:
    batch, length, width = TOKENS.shape[0], TOKENS.shape[1], 64
    layers = {layer.name: layer for layer in count(token_transformer(50, 4, 8, width), TOKENS)}
    rows = batch * length
    projections = 2 * rows * width * (3 * width + width)  # queries, keys, values; the result
    attention = 2 * (2 * batch * length * length * width)  # scores; weighted values
    perceptron = 2 * (2 * rows * width * 4 * width)
    assert layers["block1"].flops == {"convolution": 0, "linear": projections + attention + perceptron}
    assert layers["embed"].flops == {"convolution": 0, "linear": 0}
    table = 4 * 50 * width
    assert layers["embed"].moved < table + 4 * 8 * width + 12 * 4 * rows * width  # reads rows, not the table
    assert layers["embed"].weights_nbytes == table + 4 * 8 * width


@pytest.mark.parametrize(("model", "x"), ZOO, ids=lambda value: type(value).__name__)
def test_flops_are_those_that_torch_counts_and_training_counts_the_backward_pass(
    model: nn.Sequential, x: Tensor
) -> None:
    layers = count(model, x)
    with FlopCounterMode(display=False) as forward:
        z = copy.deepcopy(model)(x)
    assert sum(sum(layer.flops.values()) for layer in layers) == forward.get_total_flops()
    with FlopCounterMode(display=False) as step:
        copy.deepcopy(model)(x).sum().backward()
    work = units(layers, training=True)
    assert sum(amount for unit, amount in work.items() if unit.endswith("flops")) == step.get_total_flops()
    assert [layer.name for layer in layers[:-1]] == layer_names(model)
    assert layers[-1].output == tuple(z.shape[1:])


def test_the_backward_pass_of_the_upper_stage_counts_the_gradient_of_its_input() -> None:
    model, x = digits_cnn(), torch.rand(2, 1, 8, 8)
    layers = count(model, x)[2:]
    bottom, top = cut(model, 2)
    with torch.no_grad():
        z = bottom(x)
    with FlopCounterMode(display=False) as step:
        top(z.requires_grad_()).sum().backward()
    flops = sum(amount for unit, amount in units(layers, training=True).items() if unit.endswith("flops"))
    assert flops == step.get_total_flops() == 3 * sum(sum(layer.flops.values()) for layer in layers)


@pytest.mark.parametrize(("model", "x"), ZOO, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_and_the_random_numbers_as_they_are(
    model: nn.Sequential, x: Tensor, training: bool
) -> None:
    model = copy.deepcopy(model).train(training)
    before, seed, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    layers = count(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(x, given)
    assert model.training == training
    assert all(layer.training == training for layer in model)
    assert all(weight.grad is None for weight in model.parameters())
    assert count(model, x) == layers


@pytest.mark.parametrize("training", [True, False])
def test_a_users_transformer_layer_counts_in_both_modes(training: bool) -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    (layer,) = count(nn.Sequential(block).train(training), torch.rand(2, 5, 16))
    rows = 2 * 5
    flops = 2 * rows * 16 * (3 * 16 + 16) + 2 * (2 * 2 * 5 * 5 * 16) + 2 * (2 * rows * 16 * 32)
    assert layer.flops == {"convolution": 0, "linear": flops}
    assert torch.backends.mha.get_fastpath_enabled()


class First(nn.Module):
    """A layer's first output alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.layer(x)[0]
        return first


def test_an_lstm_counts_as_by_hand() -> None:
    (layer,) = count(nn.Sequential(First(nn.LSTM(3, 4, batch_first=True))), torch.rand(2, 5, 3))
    assert layer.flops == {"convolution": 0, "linear": 2 * 2 * 5 * (4 * 4) * (3 + 4)}  # four gates
    assert torch.backends.mkldnn.enabled  # type: ignore[attr-defined]


def test_kernels_whose_work_cannot_be_told_are_refused() -> None:
    class Own(nn.Bilinear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x)

    with pytest.raises(ValueError, match=r"expected layers whose work can be counted, got nn.Bilinear; write it as"):
        count(nn.Sequential(Own(3, 3, 4)), torch.rand(2, 3))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_embeddings_reads_rows_and_not_the_table(mode: str) -> None:
    (layer,) = count(nn.Sequential(nn.EmbeddingBag(1000, 64, mode=mode)), TOKENS)
    rows = 4 * 64 * TOKENS.numel()
    assert rows + 4 * 64 * len(TOKENS) < layer.moved < 3 * rows < layer.weights_nbytes == 4 * 64 * 1000


def test_a_first_layer_that_works_in_place_leaves_the_callers_batch() -> None:
    x = torch.tensor([[-1.0, 2.0]])
    count(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)), x)
    assert x.tolist() == [[-1.0, 2.0]]


def test_weights_that_layers_share_count_once() -> None:
    shared = nn.Linear(4, 4)
    layers = count(nn.Sequential(shared, nn.Tanh(), shared), torch.rand(2, 4))
    assert [layer.weights_nbytes for layer in layers] == [4 * (4 * 4 + 4), 0, 0]


def test_frozen_weights_are_not_trained() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.rand(2, 4)
    flops = 2 * 2 * 4 * 4
    assert units(count(model, x), training=True)["training narrow linear flops"] == (2 + 3) * flops
    model[0].requires_grad_(False)
    assert units(count(model, x), training=True)["training narrow linear flops"] == (1 + 2) * flops


def test_what_is_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an nn.Sequential, got Linear; wrap"):
        count(nn.Linear(2, 2), torch.rand(1, 2))  # type: ignore[arg-type]


def test_a_layer_with_more_than_one_output_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one tensor out of layer 0, got tuple; wrap the layer"):
        count(nn.Sequential(nn.LSTM(3, 4)), torch.rand(2, 3))


# Seconds


def test_seconds_are_flops_bytes_and_operations_over_their_rates() -> None:
    layers = count(digits_cnn(), torch.rand(4, 1, 8, 8))
    expected = sum(
        layer.flops["convolution"] / 1e9 + layer.flops["linear"] / 2e9 + layer.moved / 1e8 + layer.operations * 1e-3
        for layer in layers
    )
    assert compute_seconds(layers, PLAIN) == pytest.approx(expected)
    assert compute_seconds([by_hand()], PLAIN) == pytest.approx(4e9 / 2e9 + 5e8 / 1e8 + 3e-3)
    assert compute_seconds([], PLAIN) == compute_seconds([], PLAIN, training=True) == 0


def test_a_training_step_is_three_forward_passes_less_what_the_first_layers_save() -> None:
    layers = count(mlp(30), torch.rand(4, 30))
    upper = [layer for layer in layers[1:] if layer.weights_nbytes]
    assert compute_seconds(upper, PLAIN, training=True) == pytest.approx(3 * compute_seconds(upper, PLAIN))
    first = layers[:1]
    assert compute_seconds(first, PLAIN, training=True) < 3 * compute_seconds(first, PLAIN)
    assert compute_seconds([by_hand()], PLAIN, training=True) == pytest.approx(3 * compute_seconds([by_hand()], PLAIN))
    bare = by_hand(weights_nbytes=0)
    assert compute_seconds([bare], PLAIN, training=True) == pytest.approx(2 * compute_seconds([bare], PLAIN))


def test_factors_price_one_kind_of_work_and_a_replaced_rate_still_counts() -> None:
    layers = count(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.rand(4, 8))
    work = units(layers)
    dear = replace(PLAIN, factors={"linear flops": 5.0, "call": 2.0})
    more = 4 * work["linear flops"] / 2e9 + 2 * 1e-3
    assert compute_seconds(layers, dear) == pytest.approx(compute_seconds(layers, PLAIN) + more)
    assert compute_seconds(layers, dear, training=True) == compute_seconds(layers, PLAIN, training=True)
    assert compute_seconds(layers, replace(dear, linear=1e9)) > compute_seconds(layers, dear)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [{"convolution": 5e8}, {"linear": 1e9}, {"moved": 5e7}, {"overhead": 2e-3}])
def test_a_slower_device_takes_longer_and_more_layers_do(change: dict[str, Any], training: bool) -> None:
    layers = count(digits_cnn(), torch.rand(4, 1, 8, 8))
    base = [compute_seconds(layers[:at], PLAIN, training=training) for at in range(len(layers) + 1)]
    slow = [compute_seconds(layers[:at], replace(PLAIN, **change), training=training) for at in range(len(layers) + 1)]
    assert base == sorted(base)
    assert slow[-1] > base[-1]
    assert all(a >= b for a, b in zip(slow, base, strict=True))


# One cut


@pytest.mark.parametrize("training", [False, True])
def test_a_cut_costs_as_by_hand(training: bool) -> None:
    layers = [by_hand("a"), by_hand("b"), by_hand("c")]
    times = 3 if training else 1
    cost = split_cost(
        layers,
        1,
        edge=PLAIN,
        cloud=FAST,
        network=LINK,
        up_nbytes=250_000,
        down_nbytes=1000,
        training=training,
        radio=RADIO,
    )
    assert cost.edge_seconds == pytest.approx(times * (2 + 5 + 3e-3))
    assert cost.cloud_seconds == pytest.approx(times * 2 * (2e-3 + 5e-3 + 3e-6))
    assert cost.up_seconds == pytest.approx(2.0 + 0.1)
    assert cost.down_seconds == pytest.approx(0.002 + 0.1)
    assert cost.seconds == pytest.approx(cost.edge_seconds + cost.cloud_seconds + cost.up_seconds + cost.down_seconds)
    active = cost.up_seconds + cost.down_seconds
    radio = 2.0 * active + (1e-6 * 1e6) * 2.0 + (0.5e-6 * 4e6) * 0.002
    assert cost.joules == pytest.approx(10 * cost.edge_seconds + 1.0 * (cost.cloud_seconds + active) + radio)
    assert cost.edge_memory == (2 * 1000 + 400 if training else 1000 + 400)
    assert cost.modelled


def test_nothing_crosses_where_there_is_nothing_to_send() -> None:
    layers = count(digits_cnn(), torch.rand(4, 1, 8, 8))
    for at in (0, len(layers)):
        cost = split_cost(layers, at, edge=PLAIN, cloud=FAST, network="wifi", up_nbytes=0, down_nbytes=0)
        assert cost.up_seconds == cost.down_seconds == 0
        assert (cost.edge_seconds == 0) == (at == 0)
        assert (cost.cloud_seconds == 0) == (at == len(layers))
        assert (cost.edge_memory == 0) == (at == 0)


def test_memory_is_weights_and_activations_and_training_keeps_all() -> None:
    layers = count(mlp(30, 2, (64, 32)), torch.rand(4, 30))
    weights = 4 * (30 * 64 + 64)
    at_two: dict[str, Any] = {"edge": PLAIN, "cloud": FAST, "network": "lan", "up_nbytes": 1, "down_nbytes": 1}
    assert split_cost(layers, 2, **at_two).edge_memory == weights + 4 * 4 * (64 + 64)
    assert split_cost(layers, 2, **at_two, training=True).edge_memory == 2 * weights + 4 * 4 * (30 + 64 + 64)


@pytest.mark.parametrize(("model", "x"), ZOO, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("mode", [True, False])
def test_training_memory_is_that_of_what_autograd_keeps_or_up_to_twice(
    model: nn.Sequential, x: Tensor, mode: bool
) -> None:
    """What autograd saves was written by some kernel, or is the input; it needs about half, such as a ReLU's output."""
    model = copy.deepcopy(model).train(mode)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # as autograd does, so that no address is used again
        return tensor

    layers = count(model, x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    saved = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    memory = split_cost(
        layers, len(layers), edge=PLAIN, cloud=FAST, network="lan", up_nbytes=0, down_nbytes=0, training=True
    ).edge_memory
    assert 0.5 <= saved / (memory - 2 * sum(layer.weights_nbytes for layer in layers)) <= 1


def test_inference_needs_the_memory_of_the_largest_kernel_within_a_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 4))
    layers = count(nn.Sequential(block, nn.Linear(4, 2)), torch.rand(3, 4))
    at: dict[str, Any] = {"edge": PLAIN, "cloud": FAST, "network": "lan", "up_nbytes": 0, "down_nbytes": 0}
    weights = sum(weight.nbytes for weight in block.parameters())
    assert split_cost(layers, 1, **at).edge_memory == weights + 4 * 3 * (100 + 100)


def test_the_cheapest_cut_follows_the_network() -> None:
    """A slow device with a fast cloud cuts low over a fast network, and high over one that hardly carries anything."""
    x = torch.rand(32, 1, 28, 28)
    layers = count(cnn28(), x)
    crossing = [4.0 * x.numel(), *(layer.output_nbytes for layer in layers[:-1]), 0.0]

    def cheapest(network: Profile) -> int:
        costs = [
            split_cost(layers, at, edge=PLAIN, cloud=FAST, network=network, up_nbytes=up, down_nbytes=0, radio=RADIO)
            for at, up in enumerate(crossing)
        ]
        return min(range(len(costs)), key=lambda at: costs[at].seconds)

    assert cheapest(Profile(up=1e12, down=1e12, latency=0)) == 0
    assert cheapest(Profile(up=1e3, down=1e3, latency=10)) == len(layers)


def test_a_network_goes_by_name_profile_or_with_a_radio() -> None:
    def cost(network: str | Profile, radio: Radio | None = None) -> float:
        layers = [by_hand()]
        return split_cost(
            layers, 1, edge=PLAIN, cloud=FAST, network=network, up_nbytes=9, down_nbytes=9, radio=radio
        ).joules

    assert cost("4g") == cost(PROFILES["4g"]) == cost(PROFILES["4g"], RADIOS["4g"])
    assert cost("4g", RADIO) != cost("4g")
    with pytest.raises(ValueError, match="expected one of lan, wifi, 4g, 5g, satellite, got '6g'"):
        cost("6g")
    with pytest.raises(ValueError, match="expected a radio for a network of your own, got none; give radio="):
        cost(LINK)


@pytest.mark.parametrize("at", [-1, 2, True, 0.5])
def test_places_out_of_range_are_refused(at: Any) -> None:
    with pytest.raises(ValueError, match="expected a cut between 0 and 1 layers, got"):
        split_cost([by_hand()], at, edge=PLAIN, cloud=FAST, network="lan", up_nbytes=0, down_nbytes=0)


@pytest.mark.parametrize("nbytes", [-1, math.nan])
def test_negative_bytes_are_refused(nbytes: float) -> None:
    with pytest.raises(ValueError, match="expected bytes ≥ 0 each way, got"):
        split_cost([by_hand()], 0, edge=PLAIN, cloud=FAST, network="lan", up_nbytes=nbytes, down_nbytes=0)


def test_measured_only_where_both_ends_are() -> None:
    here = replace(PLAIN, modelled=False)

    def modelled(edge: Device, cloud: Device) -> bool:
        return split_cost([by_hand()], 1, edge=edge, cloud=cloud, network="lan", up_nbytes=0, down_nbytes=0).modelled

    assert not modelled(here, here)
    assert modelled(here, PLAIN)
    assert modelled(PLAIN, here)


# Devices and radios


def test_devices_say_where_their_constants_are_from_and_are_models() -> None:
    assert list(DEVICES) == ["microcontroller", "raspberry_pi", "phone", "laptop", "server_gpu"]
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.modelled
        assert "assumed" in device.source
        assert device.watts > device.idle_watts
        assert not device.factors
    layers = count(cnn28(), torch.rand(8, 1, 28, 28))
    seconds = [compute_seconds(layers, device) for device in DEVICES.values()]
    assert seconds == sorted(seconds, reverse=True)


def test_every_network_has_a_radio() -> None:
    assert list(RADIOS) == list(PROFILES)
    assert all("assumed" in radio.source or "Huang" in radio.source for radio in RADIOS.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"convolution": 0}, "expected a finite rate convolution > 0 a second, got 0"),
        ({"moved": math.inf}, "expected a finite rate moved > 0 a second, got inf"),
        ({"overhead": -1}, "expected a finite overhead ≥ 0, got -1"),
        ({"watts": math.nan}, "expected a finite watts ≥ 0, got nan"),
    ],
)
def test_what_is_no_device_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **change)


def test_what_is_no_radio_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a finite base ≥ 0, got -1"):
        replace(RADIO, base=-1)
