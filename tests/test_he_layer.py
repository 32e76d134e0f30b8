"""An encrypted layer against the plain one: values, gradients, bounds, and what is refused before it crosses."""

import copy
import io
import json
import multiprocessing
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privacy.he import FAST, PRECISE, CipherHolder, EncryptedLayer, Keys, LayerHolder, Parameters, tight
from privacy.he.function import again
from privacy.he.geometry import Geometry
from privacy.he.holding import OPEN_PRODUCTS, TICKET
from privacy.he.layer import WayBack
from privacy.he.opening import Opening, Update
from splitlearn import Kind, wire
from splitlearn.misfit import Refused
from splitlearn.service import keyed
from splitlearn.settings import settings_tensor

MODES = ["frozen", "private", "encrypted"]


Holder = LayerHolder | CipherHolder


@cache
def keys(parameters: Parameters = FAST) -> Keys:
    return Keys(parameters)


def holder_of(layer: nn.Module, update: str) -> Holder:
    return CipherHolder("server", layer) if update == "encrypted" else LayerHolder("server", layer, update=update)


def encrypted(layer: nn.Module, update: str, holder: Any, *, rows: int = 4, **options: Any) -> EncryptedLayer:
    own = {"layer": layer, "rows": rows} if update == "encrypted" else {}
    return EncryptedLayer(options.pop("keys", keys()), holder, update=update, **own, **options)


class Noted:
    """A holder in this process that notes which verbs it was asked."""

    def __init__(self, holder: Holder):
        self.holder, self.verbs = holder, list[str]()

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.verbs.append(verb)
        return self.holder.ask(verb, tensors)


def tolerance(x: Tensor, weight: Tensor, parameters: Parameters = FAST) -> float:
    """Eight standard deviations of an output's error, from first principles.

    A fresh ciphertext's error meets the weights, a weight's rounding (each coefficient by 1/√12, of which a slot adds
    up N) meets the inputs, and the reply loses as much as rounding of the weights for each entry that is folded. A
    convolution's window counts as one row of its inputs, no greater than all of a sample.
    """
    flat = weight.detach().flatten(1).double()
    rounding = sqrt(parameters.degree / 12) / 2.0**parameters.weight_scale_bits
    fresh = sqrt(2) * parameters.fresh_std * float(flat.norm(dim=1).max())
    return 8 * (fresh + rounding * (float(x.detach().flatten(1).double().norm(dim=1).max()) + 2 * sqrt(flat.shape[1])))


def assert_close(found: Tensor | None, expected: Tensor | None, atol: float) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert (found - expected).abs().max() <= atol


def assert_same_layer(plain: nn.Module, layer: EncryptedLayer, x: Tensor, parameters: Parameters = FAST) -> None:
    """Values, gradients in the input, and, where the layer has weights here, gradients in them."""
    near, far = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain(near), layer(far)
    assert_close(found, expected, tolerance(x, plain.weight, parameters))
    g = torch.randn_like(expected)
    plain.zero_grad()
    layer.zero_grad()
    expected.backward(g)
    found.backward(g)
    # A row of g is scaled to 1 and back; an input of a convolution adds up as many rows as windows hold it.
    windows = plain.weight[0, 0].numel() if plain.weight.ndim > 2 else 1
    width = sqrt(len(plain.weight))
    back = tolerance(torch.full((1, len(plain.weight)), width), plain.weight.transpose(0, 1), parameters)
    assert_close(far.grad, near.grad, windows * back * float(g.abs().max()))
    rounding = 100 * torch.finfo(x.dtype).eps * x.numel() * float(x.abs().max() * g.abs().max())
    for name in ("weight", "bias"):
        own = getattr(layer, name)
        if own is not None:
            assert_close(own.grad, getattr(plain, name).grad, rounding)


# The plain layer


@st.composite
def linear(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    width, out = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    return nn.Linear(width, out, bias=draw(st.booleans())), (draw(st.integers(1, 9)), width)


@st.composite
def convolution(draw: st.DrawFn, dims: int) -> tuple[nn.Module, tuple[int, ...]]:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    channels, kernel, dilation = draw(st.integers(1, 3)), sizes(1, 3), sizes(1, 2)
    room = [gap * (k - 1) + 1 + draw(st.integers(0, 4)) for k, gap in zip(kernel, dilation, strict=True)]
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    layer = kind(
        channels, draw(st.integers(1, 4)), kernel, stride=sizes(1, 2), padding=sizes(0, 2), dilation=dilation,
        bias=draw(st.booleans()),
    )  # fmt: skip
    return layer, (draw(st.integers(1, 3)), channels, *room)


SHAPES = {"linear": linear(), "conv1d": convolution(1), "conv2d": convolution(2)}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data(), rows=st.integers(1, 20))
@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("kind", SHAPES)
def test_values_and_gradients_are_those_of_the_plain_layer(
    kind: str, update: str, data: st.DataObject, rows: int
) -> None:
    plain, shape = data.draw(SHAPES[kind])
    layer = encrypted(plain, update, holder_of(plain, update), rows=rows)
    assert_same_layer(plain, layer, torch.randn(shape).clamp(-4, 4))


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (nn.Linear(7, 3), (5, 7)),
        (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 9)),
        (nn.Conv2d(2, 3, (3, 2), padding=(1, 0), bias=False), (2, 2, 5, 4)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_across_a_wire_it_is_the_same(plain: nn.Module, shape: tuple[int, ...], update: str) -> None:
    line = wire(holder_of(plain, update))
    layer = encrypted(plain, update, line.party)
    assert_same_layer(plain, layer, torch.randn(shape).clamp(-4, 4))
    crossed = {
        Kind.of(key) for one in line.record.exchanges for part in (one.request, one.reply) for key in part.tensors
    }
    assert crossed == {Kind.CIPHERTEXT, Kind.COUNT, Kind.PARAMETERS}


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", [FAST, PRECISE], ids=["fast", "precise"])
def test_either_type_at_either_precision(
    parameters: Parameters, dtype: torch.dtype, truncated: bool, update: str
) -> None:
    plain = nn.Linear(9, 4).to(dtype)
    layer = encrypted(
        plain, update, holder_of(plain, update), keys=keys(parameters), truncated=truncated
    )  # fmt: skip
    if update == "private":
        layer = layer.to(dtype)
    assert_same_layer(plain, layer, torch.randn(6, 9, dtype=dtype).clamp(-4, 4), parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_and_no_worse(dtype: torch.dtype) -> None:
    plain = nn.Linear(9, 4)
    layer = EncryptedLayer(keys(), LayerHolder("server", plain))
    x = torch.randn(6, 9).clamp(-4, 4).to(dtype).requires_grad_()
    y = layer(x)
    expected = plain(x.detach().float())
    assert (y - expected).abs().max() <= tolerance(x, plain.weight) + torch.finfo(dtype).eps * expected.abs().max()
    g = torch.randn(6, 4).to(dtype)
    (found,) = torch.autograd.grad(y, x, g)
    back = g.float() @ plain.weight.detach()
    bound = tolerance(torch.full((1, 4), 2.0), plain.weight.T) * float(g.abs().max())
    assert (found - back).abs().max() <= bound + torch.finfo(dtype).eps * back.abs().max()


def test_precise_is_ten_times_as_precise_as_fast() -> None:
    plain, x = nn.Linear(30, 8).double(), torch.rand(16, 30, dtype=torch.float64)
    error = {}
    for parameters in (FAST, PRECISE):
        layer = EncryptedLayer(keys(parameters), LayerHolder("server", plain))
        error[parameters.name] = float((layer(x) - plain(x)).detach().abs().max())
    assert error["precise"] < error["fast"] / 10


def test_several_hundred_inputs_and_more_rows_than_slots() -> None:
    plain = nn.Linear(3, 2)
    layer = EncryptedLayer(keys(), LayerHolder("server", plain))
    x = torch.randn(FAST.slots + 5, 3).clamp(-4, 4)
    assert_same_layer(plain, layer, x)
    wide = nn.Linear(700, 5)
    assert_same_layer(wide, EncryptedLayer(keys(), LayerHolder("server", wide)), torch.randn(3, 700).clamp(-4, 4))


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (4, 1), (5, 2), (11, 3)])
def test_encrypted_weights_take_smaller_batches_padded_and_greater_ones_in_parts(batch: int, parts: int) -> None:
    plain = nn.Linear(5, 3)
    noted = Noted(CipherHolder("server", plain))
    assert_same_layer(plain, encrypted(plain, "encrypted", noted, rows=4), torch.randn(batch, 5).clamp(-4, 4))
    assert noted.verbs == [
        "open", "weights_encrypted", *["answer"] * (parts - 1), "product", *["product_back"] * parts,
    ]  # fmt: skip


@pytest.mark.parametrize("update", MODES)
def test_without_gradients_one_product_crosses_and_evaluation_changes_nothing(update: str) -> None:
    plain = nn.Linear(5, 3)
    noted = Noted(holder_of(plain, update))
    layer = encrypted(plain, update, noted)
    x = torch.rand(3, 5, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert_close(layer.eval()(x), plain(x), tolerance(x, plain.weight))
    assert [verb for verb in noted.verbs if verb != "weights_encrypted"] == ["open", "answer", "product"]


@pytest.mark.parametrize("update", MODES)
def test_no_gradient_goes_up_for_an_input_that_asks_for_none(update: str) -> None:
    plain = nn.Linear(5, 3)
    noted = Noted(holder_of(plain, update))
    layer, x = encrypted(plain, update, noted), torch.rand(3, 5)
    y = layer(x)
    assert y.requires_grad == (update != "frozen")
    if y.requires_grad:
        y.sum().backward()
        plain(x).sum().backward()
        assert layer.weight is not None
        assert_close(layer.weight.grad, plain.weight.grad, 1e-5)  # float32's rounding of sums of three
    assert not {"product", "product_back"} & set(noted.verbs)


@pytest.mark.parametrize("update", MODES)
def test_a_row_without_a_gradient_gets_exactly_none_and_small_rows_keep_their_digits(update: str) -> None:
    plain = nn.Linear(5, 4).double()
    layer = encrypted(plain, update, holder_of(plain, update), rows=6)
    x = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 0.0, 1e-7, 1e5, 0.0, 1e-30], dtype=torch.float64)
    g = torch.randn(6, 4, dtype=torch.float64) * scale[:, None]
    (found,) = torch.autograd.grad(layer(x), x, g)
    expected = g @ plain.weight.detach()
    assert not found[scale == 0].any()
    error = (found - expected).abs().amax(1)
    back = tolerance(torch.full((1, 4), 2.0), plain.weight.T)
    assert (error <= back * g.abs().amax(1)).all()


# What is out of range, or no number


def test_what_is_out_of_range_is_refused_with_what_to_do() -> None:
    noted = Noted(LayerHolder("server", nn.Linear(3, 2)))
    layer = EncryptedLayer(keys(), noted, bound=2.0)
    with pytest.raises(
        ValueError, match=r"activations within ±2, got 3.5 \(1 of 6 out of range\).*out_of_range='clip'"
    ):
        layer(torch.tensor([[0.0, 1.0, 2.0], [-2.0, -3.5, 0.0]]))
    assert noted.verbs == ["open"]
    assert layer.clipped == 0


def test_what_is_out_of_range_is_clipped_and_counted() -> None:
    plain = nn.Linear(3, 2)
    layer = EncryptedLayer(keys(), LayerHolder("server", plain), bound=2.0, out_of_range="clip")
    x = torch.tensor([[0.0, 1.0, 2.0], [-2.0, -3.5, 9.0]])
    for times in (1, 2):
        assert_close(layer(x), plain(x.clamp(-2, 2)), tolerance(x, plain.weight))
        assert layer.clipped == 2 * times


@pytest.mark.parametrize("update", MODES)
def test_it_is_clipped_by_default_where_an_end_of_training_would_tell_of_a_sample(update: str) -> None:
    plain, x = nn.Linear(3, 2), torch.full((2, 3), 33.0)
    layer = encrypted(plain, update, holder_of(plain, update))
    assert layer.bound == 32
    if update == "private":
        assert_close(layer(x), plain(x.clamp(-32, 32)), 2 * tolerance(x, plain.weight))  # where scales are halved
        assert layer.clipped == 6
        return
    with pytest.raises(ValueError, match=r"activations within ±32, got 33 \(6 of 6 out of range\)"):
        layer(x)


@pytest.mark.parametrize("bound", [0.1, 0.3, 1 / 3])
def test_it_is_clipped_to_bounds_that_float32_lacks(bound: float) -> None:
    plain, x = nn.Linear(3, 2), torch.full((2, 3), 33.0)
    layer = EncryptedLayer(keys(), LayerHolder("server", plain), bound=bound, out_of_range="clip")
    assert_close(layer(x), plain(x.clamp(-bound, bound)), tolerance(x.clamp(-bound, bound), plain.weight))


@pytest.mark.parametrize("update", ["private", "encrypted"])
@pytest.mark.parametrize("plain", [nn.Linear(4, 3), nn.Conv1d(2, 3, 2, padding=1)], ids=["linear", "conv1d"])
def test_gradients_under_clipping_are_those_of_the_clipped_input(plain: nn.Module, update: str) -> None:
    layer = encrypted(plain, update, holder_of(plain, update), bound=1.0, out_of_range="clip")
    x = 2 * torch.randn(4, 4) if isinstance(plain, nn.Linear) else 2 * torch.randn(4, 2, 5)
    near, far = (x.clone().requires_grad_() for _ in range(2))
    expected, found = plain(near.clamp(-1, 1)), layer(far)
    g = torch.randn_like(expected)
    plain.zero_grad()
    expected.backward(g)
    found.backward(g)
    assert layer.weight is not None
    assert_close(layer.weight.grad, plain.weight.grad, 1e-4)  # float32's rounding of sums of at most 24
    out = x.abs() > 1
    assert out.any()
    assert far.grad is not None
    assert near.grad is not None
    assert not far.grad[out].any()
    assert far.grad[~out].all()
    # A row of g is scaled to 1 and back, and an input of a convolution is in two windows.
    back = 2 * tolerance(torch.ones(1, 3), plain.weight.transpose(0, 1))
    assert_close(far.grad, near.grad, back * float(g.abs().max()))


@pytest.mark.parametrize("out_of_range", ["raise", "clip"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_before_it_crosses(value: float, out_of_range: Any) -> None:
    noted = Noted(LayerHolder("server", nn.Linear(3, 2)))
    layer = EncryptedLayer(keys(), noted, out_of_range=out_of_range)
    x = torch.rand(2, 3, requires_grad=True)
    y, g = layer(x), torch.ones(2, 2)
    g[1, 0] = value
    with pytest.raises(ValueError, match="expected finite gradients to encrypt, got nan or inf; the training has"):
        y.backward(g)
    with pytest.raises(ValueError, match="expected finite activations to encrypt"):
        layer(torch.full((1, 3), value))
    assert noted.verbs == ["open", "product"]


@pytest.mark.parametrize("update", MODES)
def test_weights_that_are_no_numbers_are_refused(update: str) -> None:
    plain = nn.Linear(3, 2)
    with torch.no_grad():
        plain.weight[0, 1] = torch.nan
    layer = encrypted(plain, update, holder_of(plain, update))
    with pytest.raises(ValueError, match="expected finite weights"):
        layer(torch.rand(2, 3))


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("times", [40.0, 80.0])
def test_great_weights_cost_digits_and_nothing_else(times: float, update: str) -> None:
    plain = nn.Linear(6, 4)
    with torch.no_grad():
        plain.weight.mul_(times)
    layer = encrypted(plain, update, holder_of(plain, update))
    x = torch.rand(4, 6, requires_grad=True)
    y = layer(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    slack = 2**6  # the most that the weights' scale is halved by, or encrypted weights are shrunk
    assert_close(y, plain(x), slack * tolerance(x, plain.weight))
    assert_close(g, plain.weight.sum(0).expand(4, 6), slack * tolerance(torch.ones(1, 4), plain.weight.T))


@pytest.mark.parametrize("update", MODES)
def test_weights_too_great_for_the_range_are_refused(update: str) -> None:
    plain = nn.Linear(6, 4)
    with torch.no_grad():
        plain.weight.fill_(1e4)
    layer = encrypted(plain, update, holder_of(plain, update))
    with pytest.raises(ValueError, match="which would wrap around; give a smaller bound"):
        layer(torch.rand(4, 6))


def test_a_gradient_near_the_least_double_is_no_error() -> None:
    plain = nn.Linear(3, 2).double()
    layer = EncryptedLayer(keys(), LayerHolder("server", plain))
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x), x, torch.tensor([[1e-310, 0.0], [1.0, 1.0]], dtype=torch.float64))
    assert_close(g[1], plain.weight.sum(0), tolerance(torch.ones(1, 2), plain.weight.T))
    assert g[0].abs().max() < 1e-300


# What is refused


@pytest.mark.parametrize("make", [LayerHolder, CipherHolder])
@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv1d(4, 4, 3, groups=2), "a convolution of one group, padded with zeros by a number"),
        (nn.Conv2d(4, 4, 3, groups=4), "one group"),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), "padded with zeros"),
        (nn.Conv1d(1, 2, 3, padding="same"), "by a number"),
        (nn.Conv2d(1, 2, 3, padding="valid"), "by a number"),
        (nn.LSTM(3, 3), "an nn.Linear, nn.Conv1d or nn.Conv2d to encrypt, got LSTM; leave other layers"),
        (nn.Conv3d(1, 1, 1), "got Conv3d"),
        (nn.ConvTranspose1d(1, 1, 1), "got ConvTranspose1d"),
        (nn.Sequential(nn.Linear(2, 2)), "got Sequential"),
        (nn.LazyLinear(3), "expected a layer with shapes, got LazyLinear.*; pass a batch through it once"),
        (nn.LazyConv2d(3, 2), "expected a layer with shapes, got LazyConv2d"),
    ],
)
def test_layers_that_are_no_plain_product_are_refused(make: Any, layer: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make("server", layer)


@pytest.mark.parametrize("across", [False, True], ids=["here", "across a wire"])
@pytest.mark.parametrize(("here", "there"), [(a, b) for a in MODES for b in MODES if a != b])
def test_both_ends_say_the_same_of_the_weights(here: str, there: str, across: bool) -> None:
    plain = nn.Linear(3, 2)
    holder: Any = holder_of(plain, there)
    with pytest.raises(ValueError, match=rf"server: expected a client with update={there}, got {here}; say the same"):
        encrypted(plain, here, wire(holder).party if across else holder)


@pytest.mark.parametrize("make", [
    lambda: EncryptedLayer(keys(), LayerHolder("server", nn.Linear(3, 2)), update="clear"),
    lambda: LayerHolder("server", nn.Linear(3, 2), update="clear"),
])  # fmt: skip
def test_weight_gradients_in_the_clear_are_refused_and_the_reason_given(make: Callable[[], object]) -> None:
    with pytest.raises(
        ValueError, match=r"got 'clear': a weight gradient in the clear is the leak.*fewer samples than"
    ):
        make()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"update": "encrypted"},
            r"layer=… and rows=… with update='encrypted'.*got update='encrypted', NoneType and 0",
        ),
        ({"update": "encrypted", "rows": 4}, "NoneType and 4"),
        ({"update": "encrypted", "layer": nn.Linear(3, 2)}, "Linear and 0"),
        ({"update": "encrypted", "layer": nn.Linear(3, 2), "rows": -1}, "Linear and -1"),
        ({"update": "frozen", "layer": nn.Linear(3, 2), "rows": 4}, "with no other; got update='frozen'"),
        ({"update": "private", "layer": nn.Linear(3, 2), "rows": 4}, "got update='private'"),
        *(
            (
                {"bound": bound},
                rf"a bound from 0.00345 to 3.28e\+03, within which fast has digits left, got {bound}; sc",
            )
            for bound in (0.0, 0.003, 3300.0, float("inf"), float("nan"), -1.0)
        ),
        ({"bound": 0.0, "out_of_range": "wrap"}, "expected out_of_range to be raise or clip, got 'wrap'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_crosses(options: dict[str, Any], says: str) -> None:
    noted = Noted(LayerHolder("server", nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=says):
        EncryptedLayer(keys(), noted, **options)
    assert not noted.verbs


@pytest.mark.parametrize("end", [0, 1], ids=["least", "greatest"])
@pytest.mark.parametrize("parameters", [FAST, PRECISE], ids=["fast", "precise"])
def test_the_bounds_at_either_end_are_of_use(parameters: Parameters, end: int) -> None:
    plain, bound = nn.Linear(16, 4, bias=False), parameters.bounds[end]
    with torch.no_grad():
        plain.weight.div_(max(1.0, bound))  # or great products would cost digits too
    layer = EncryptedLayer(keys(parameters), LayerHolder("server", plain), bound=bound)
    x = bound * (2 * torch.rand(8, 16) - 1)
    assert_close(layer(x), plain(x), tolerance(x, plain.weight, parameters))


@pytest.mark.parametrize(
    ("own", "holder", "got"),
    [
        ("fast", LayerHolder("server", nn.Linear(3, 2)), "got str and LayerHolder"),
        (None, LayerHolder("server", nn.Linear(3, 2)), "got NoneType and LayerHolder"),
        (Keys(), nn.Linear(3, 2), "got Keys and Linear"),
        (LayerHolder("server", nn.Linear(3, 2)), Keys(), "got LayerHolder and Keys"),
    ],
)
def test_what_is_no_key_or_no_holder_is_refused(own: Any, holder: Any, got: str) -> None:
    with pytest.raises(
        Refused, match=rf"expected Keys\(\) and a holder, or wire\(holder\).party across a wire, {got}$"
    ):
        EncryptedLayer(own, holder)


@pytest.mark.parametrize("value", ["Private", "FROZEN", "Encrypted"])
def test_an_update_by_another_case_is_asked_back_about(value: str) -> None:
    for make in (
        lambda: EncryptedLayer(keys(), LayerHolder("server", nn.Linear(3, 2)), update=value),
        lambda: LayerHolder("server", nn.Linear(3, 2), update=value),
    ):
        with pytest.raises(ValueError, match=rf"got '{value}'; did you mean '{value.lower()}'\?$"):
            make()


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.Conv1d(3, 2, 1)])
def test_a_holder_of_another_shape_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected a holder of the shape of"):
        EncryptedLayer(keys(), CipherHolder("server", nn.Linear(3, 2)), update="encrypted", layer=layer, rows=2)


@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (nn.Linear(3, 2), (4, 5)),
        (nn.Linear(3, 2), (3,)),
        (nn.Linear(3, 2), (2, 4, 3)),
        (nn.Linear(3, 2), (0, 3)),
        (nn.Conv1d(3, 2, 1), (3, 4)),
        (nn.Conv2d(3, 2, 1), (2, 1, 4, 4)),
    ],
)
def test_inputs_of_another_shape_are_refused_before_they_cross(plain: nn.Module, shape: tuple[int, ...]) -> None:
    noted = Noted(LayerHolder("server", plain))
    layer = EncryptedLayer(keys(), noted)
    with pytest.raises(ValueError, match=r"expected inputs of \d dimensions, at least one, with \d in the second, got"):
        layer(torch.rand(shape))
    assert noted.verbs == ["open"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_inputs_of_whole_numbers_are_refused_as_the_plain_layer_does(dtype: torch.dtype) -> None:
    plain, x = nn.Linear(3, 2), torch.ones(4, 3).to(dtype)
    noted = Noted(LayerHolder("server", plain))
    layer = EncryptedLayer(keys(), noted)
    with pytest.raises(RuntimeError):
        plain(x)
    with pytest.raises(Refused, match=f"expected floating-point inputs, as torch's own layer does, got {dtype}"):
        layer(x)
    assert noted.verbs == ["open"]


@pytest.mark.parametrize(
    ("plain", "shape", "got"),
    [
        (nn.Conv1d(1, 2, 5), (2, 1, 4), r"\[1, 5\] to convolve, got \[1, 4\]"),
        (nn.Conv1d(1, 2, 3, dilation=3, padding=1), (2, 1, 4), r"\[1, 7\] to convolve, got \[1, 6\]"),
        (nn.Conv2d(1, 2, (2, 6), padding=1), (2, 1, 4, 3), r"\[2, 6\] to convolve, got \[6, 5\]"),
    ],
)
def test_a_kernel_greater_than_its_input_is_refused_before_it_crosses(
    plain: nn.Module, shape: tuple[int, ...], got: str
) -> None:
    noted = Noted(LayerHolder("server", plain))
    layer = EncryptedLayer(keys(), noted)
    with pytest.raises(ValueError, match=f"expected inputs, padding included, of at least {got}"):
        layer(torch.rand(shape))
    assert noted.verbs == ["open"]


@pytest.mark.parametrize(
    ("plain", "shape"), [(nn.Conv1d(2, 3, 2), (4, 2, 5)), (nn.Conv2d(2, 3, 2), (4, 2, 5, 4))], ids=["conv1d", "conv2d"]
)
def test_outputs_lie_in_memory_as_the_plain_layers_do(plain: nn.Module, shape: tuple[int, ...]) -> None:
    y, expected = EncryptedLayer(keys(), LayerHolder("server", plain))(torch.rand(shape)), plain(torch.rand(shape))
    assert y.is_contiguous()
    assert y.stride() == expected.stride()


def test_a_layer_and_with_it_a_party_is_not_copied() -> None:
    layer = EncryptedLayer(keys(), LayerHolder("server", nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="expected keys to stay with the client that made them, got a copy"):
        copy.deepcopy(layer)
    assert "_secret" not in repr(layer)
    assert not any("key" in name for name in layer.state_dict())


# The weights, and who changes them


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("across", [False, True], ids=["here", "across a wire"])
def test_a_step_that_is_not_noised_is_refused_and_nothing_crosses(which: str, across: bool) -> None:
    plain = nn.Linear(3, 2)
    before = copy.deepcopy(plain.state_dict())
    line = wire(LayerHolder("server", plain, update="private"))
    noted = Noted(LayerHolder("server", plain, update="private"))
    layer = EncryptedLayer(keys(), line.party if across else noted, update="private")
    optimizer = torch.optim.SGD([getattr(layer, which)], lr=0.1)
    layer(torch.rand(4, 3)).square().sum().backward()
    crossed, verbs = (line.meter.frames, line.meter.total_nbytes, len(line.record.exchanges)), list(noted.verbs)
    optimizer.step()
    for _ in range(2):  # and it stays refused
        with pytest.raises(
            ValueError, match=r"expected weights that change by DP-SGD alone.*got a step of another opt"
        ):
            layer(torch.rand(4, 3))
    assert (line.meter.frames, line.meter.total_nbytes, len(line.record.exchanges)) == crossed
    assert noted.verbs == verbs
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_step_that_changed_nothing_does_not_let_the_next_one_pass() -> None:
    plain = nn.Linear(3, 2)
    noted = Noted(LayerHolder("server", plain, update="private"))
    layer = EncryptedLayer(keys(), noted, update="private")
    layer.pass_on()  # a noised step at a learning rate of 0
    assert layer.weight is not None
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(ValueError, match="expected weights that change by DP-SGD alone"):
        layer(torch.rand(4, 3))
    assert "change" not in noted.verbs


@pytest.mark.parametrize("steps", [2, 3])
def test_a_step_of_nothing_takes_the_leave_of_the_one_before_it(steps: int) -> None:
    plain = nn.Linear(3, 2)
    noted = Noted(LayerHolder("server", plain, update="private"))
    layer = EncryptedLayer(keys(), noted, update="private")
    assert layer.weight is not None
    for number in range(steps):
        if number == 0:
            with torch.no_grad():
                layer.weight += 1
        layer.pass_on()
        assert not layer._released
    assert noted.verbs == ["open", "change"]
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(ValueError, match="expected weights that change by DP-SGD alone"):
        layer(torch.rand(4, 3))


class Losing:
    """A holder whose answers to changes are lost, so many of them, after it has heard what it was asked."""

    def __init__(self, holder: Any, lost: int):
        self.holder, self.lost = holder, lost
        self.counts = list[int]()

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        reply = self.holder.ask(verb, tensors)
        if verb == "change":
            self.counts.append(int(tensors[Kind.COUNT]))
            self.lost -= 1
            if self.lost >= 0:
                raise ConnectionError("lost")
        return reply


@pytest.mark.parametrize("across", [False, True], ids=["here", "across a wire"])
def test_a_change_whose_answer_was_lost_is_sent_again_and_counts_once(across: bool) -> None:
    plain = nn.Linear(3, 2)
    before = copy.deepcopy(plain)
    holder = LayerHolder("server", plain, update="private")
    losing = Losing(wire(holder).party if across else holder, lost=2)
    layer = EncryptedLayer(keys(), losing, update="private")
    assert layer.weight is not None
    with torch.no_grad():
        layer.weight += 0.5
    for _ in range(2):
        with pytest.raises(ConnectionError, match="lost"):
            layer.pass_on()
    assert layer.weight.any()  # not yet known to be there
    x = torch.rand(4, 3)
    assert_close(layer(x), plain(x), tolerance(x, plain.weight))  # what comes next brings it too
    assert not layer.weight.any()
    assert torch.equal(plain.weight, before.weight + 0.5)
    with torch.no_grad():
        layer.weight += 0.25
    layer.pass_on()
    assert torch.equal(plain.weight, before.weight + 0.5 + 0.25)
    assert losing.counts == [1, 1, 1, 2]


def numbered(number: int, own: Keys, made: Any = 0) -> dict[str, Tensor]:
    return {Kind.COUNT: torch.tensor(number), Kind.PARAMETERS: settings_tensor({"key": own.id.hex(), "made": made})}


def test_changes_are_numbered_from_1_in_each_session_and_others_refused() -> None:
    plain = nn.Linear(3, 2)
    holder = LayerHolder("server", plain, update="private")
    start = plain.weight.detach().clone()
    changes = keyed({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, Kind.UPDATE)

    def change(number: int) -> None:
        assert holder.ask("change", numbered(number, own) | changes) == {}

    for _ in range(2):  # opened again, it counts anew
        own = Keys()
        EncryptedLayer(own, holder, update="private")
        for number in (1, 1, 2, 2, 2):
            change(number)
        for number in (1, 4):
            with pytest.raises(ValueError, match=f"server: expected change 3 of this session, got {number}"):
                change(number)
        for count in (torch.tensor(0), torch.tensor(3.0), torch.tensor([3, 3])):
            with pytest.raises(ValueError, match="server: expected a whole number from 1 to"):
                holder.ask("change", {**numbered(1, own), Kind.COUNT: count, **changes})
        with pytest.raises(
            ValueError, match=f"server: expected a change of the client with key {own.id.hex()}, got one"
        ):
            holder.ask("change", numbered(3, Keys()) | changes)
    assert torch.allclose(plain.weight, start + 4)  # float32's rounding


@pytest.mark.parametrize("made", [1, 3, None, "0", 0.0, True])
def test_a_client_that_has_sent_more_changes_than_the_holder_has_seen_is_refused(made: Any) -> None:
    plain = nn.Linear(3, 2)
    holder = LayerHolder("server", plain, update="private")
    EncryptedLayer(keys(), holder, update="private")
    before = plain.weight.detach().clone()
    changes = keyed({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, Kind.UPDATE)
    with pytest.raises(
        ValueError, match=f"server: expected a client that has sent at most 0 changes, got one that has sent {made}; re"
    ):
        holder.ask("change", numbered(1, keys(), made) | changes)
    assert torch.equal(plain.weight, before)


def test_a_client_goes_on_with_the_holder_that_has_its_changes_and_with_no_fresh_one() -> None:
    plain = nn.Linear(3, 2)
    start, holder = copy.deepcopy(plain), LayerHolder("server", plain, update="private")

    def step(layer: EncryptedLayer) -> None:
        assert layer.weight is not None
        with torch.no_grad():
            layer.weight += 0.5
        layer.pass_on()

    layer = EncryptedLayer(keys(), holder, update="private")
    for _ in range(2):
        step(layer)
    client, server = layer.state_dict(), holder.state_dict()
    fresh = LayerHolder("server", copy.deepcopy(start), update="private")
    alone = EncryptedLayer(Keys(), fresh, update="private")
    alone.load_state_dict(client)
    with pytest.raises(ValueError, match="at most 0 changes, got one that has sent 2; resume the holder too"):
        step(alone)
    assert torch.equal(fresh.layer.weight, start.weight)
    fresh.load_state_dict(server)
    both = EncryptedLayer(Keys(), fresh, update="private")
    both.load_state_dict(client)
    step(both)
    assert torch.equal(fresh.layer.weight, start.weight + 0.5 + 0.5 + 0.5)
    assert (int(both.state_dict()["changes"]), fresh.state_dict()["made"]) == (3, 3)


def test_a_private_layers_state_is_how_many_changes_it_has_sent() -> None:
    plain = nn.Linear(3, 2)
    layer = EncryptedLayer(keys(), LayerHolder("server", plain, update="private"), update="private")
    stage = nn.Sequential(nn.Linear(3, 3), layer)
    state = stage.state_dict()
    assert state.keys() == {"0.weight", "0.bias", "1.changes"}
    assert (state["1.changes"].dtype, int(state["1.changes"])) == (torch.int64, 0)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"1.weight", "1.bias".*Unexpected key.*"1.changes"'):
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).load_state_dict(state)


def test_a_change_that_was_refused_does_not_count() -> None:
    plain = nn.Linear(3, 2)
    holder = LayerHolder("server", plain, update="private")
    EncryptedLayer(keys(), holder, update="private")
    before, number = plain.weight.detach().clone(), numbered(1, keys())
    with pytest.raises(ValueError, match="server: expected finite changes"):
        holder.ask("change", {**number, "update/weight": torch.full((2, 3), torch.nan), "update/bias": torch.ones(2)})
    holder.ask("change", {**number, "update/weight": torch.ones(2, 3), "update/bias": torch.ones(2)})
    assert torch.equal(plain.weight, before + 1)


def test_a_step_that_is_passed_on_is_added_once_and_is_then_zero_here() -> None:
    plain = nn.Linear(3, 2)
    before = copy.deepcopy(plain)
    noted = Noted(LayerHolder("server", plain, update="private"))
    layer = EncryptedLayer(keys(), noted, update="private")
    assert layer.weight is not None
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight += 0.5
        layer.bias -= 0.25
    layer.pass_on()
    assert not layer.weight.any()
    assert not layer.bias.any()
    assert torch.equal(plain.weight, before.weight + 0.5)
    assert torch.equal(plain.bias, before.bias - 0.25)
    assert_same_layer(plain, layer, torch.rand(4, 3))
    assert noted.verbs == ["open", "change", "product", "product_back"]


@pytest.mark.parametrize("update", ["frozen", "private"])
def test_weights_that_the_server_has_changed_are_seen(update: str) -> None:
    plain = nn.Linear(4, 3)
    layer, x = encrypted(plain, update, LayerHolder("server", plain, update=update)), torch.rand(5, 4)
    for _ in range(3):
        assert_same_layer(plain, layer, x)
        with torch.no_grad():
            plain.weight.add_(torch.randn_like(plain.weight))
            plain.bias.add_(torch.randn_like(plain.bias))


def test_encrypted_weights_go_up_when_they_have_changed_and_no_oftener() -> None:
    plain = nn.Linear(4, 3)
    noted = Noted(CipherHolder("server", plain))
    layer, x = encrypted(plain, "encrypted", noted), torch.rand(3, 4)
    assert layer.weight is not None
    assert layer.bias is not None
    for _ in range(2):
        layer(x)
        layer(x)
        with torch.no_grad():
            layer.bias += 1  # stays here
        layer(x)
        with torch.no_grad():
            layer.weight += 0.1
    assert noted.verbs == ["open", *["weights_encrypted", *["answer"] * 3] * 2]
    with torch.no_grad():
        assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), 1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_over_the_given_layer_trains_encrypted_weights(make: Any) -> None:
    plain, x = nn.Linear(4, 3), torch.rand(4, 4)
    before, optimizer = copy.deepcopy(plain), make(plain.parameters(), lr=0.1)
    layer = encrypted(plain, "encrypted", CipherHolder("server", plain))
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    layer(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(plain.weight, before.weight)
    assert_same_layer(plain, layer, x)  # with the weights as they are now


@pytest.mark.parametrize("update", ["frozen", "private"])
@pytest.mark.parametrize("rows", [4, 32])
def test_evaluations_of_other_sizes_change_no_gradient_and_no_later_product(rows: int, update: str) -> None:
    # Weights that are their own transpose, in one layout both ways: plaintexts for gradients are none for inputs, whose
    # sums take three halvings of the weights' scale. Each size has a layout of its own, which drives others out.
    plain = nn.Linear(8, 8, bias=False)
    nn.init.ones_(plain.weight)
    layer = encrypted(plain, update, LayerHolder("server", plain, update=update), bound=32.0)
    x, slack = torch.full((rows, 8), 30.0, requires_grad=True), 2**3
    y = layer(x)
    assert_close(y, plain(x), slack * tolerance(x, plain.weight))
    for size in (5, 7, 9):
        other = torch.full((size, 8), 30.0)
        with torch.no_grad():
            assert_close(layer(other), plain(other), slack * tolerance(other, plain.weight))
    g = torch.randn(rows, 8)
    y.backward(g)
    back = tolerance(torch.ones(1, 8), plain.weight.T)
    assert_close(x.grad, g @ plain.weight.detach(), slack * back * float(g.abs().max()))
    assert_close(layer(x), plain(x), slack * tolerance(x, plain.weight))


def opened_products(
    update: str, count: int, across: bool = False
) -> tuple[EncryptedLayer, list[tuple[Tensor, Tensor, Tensor]]]:
    """A layer and several products of it whose gradients have not gone back: inputs, outputs, and weights of then."""
    plain = nn.Linear(6, 3)
    holder = holder_of(plain, update)
    layer = encrypted(plain, update, wire(holder).party if across else holder, rows=5)
    found = []
    for _ in range(count):
        # Small, so that none are shrunk. Encrypted, they are this client's, and torch would refuse a gradient past a
        # change that it knows of.
        plain.weight.data = 0.1 * torch.randn(3, 6)
        x = torch.rand(5, 6, requires_grad=True)
        found.append((x, layer(x), plain.weight.detach().clone()))
    plain.weight.data = 0.1 * torch.randn(3, 6)
    return layer, found


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_each_gradient_goes_back_through_the_weights_of_its_own_product(order: tuple[int, ...], update: str) -> None:
    _, products = opened_products(update, len(order))
    for at in order:
        x, y, then = products[at]
        g = torch.randn(5, 3)
        (found,) = torch.autograd.grad(y, x, g)
        assert_close(found, g @ then, tolerance(torch.ones(1, 3), then.T) * float(g.abs().max()))


@pytest.mark.parametrize("across", [False, True], ids=["here", "across a wire"])
@pytest.mark.parametrize("update", MODES)
def test_more_open_products_than_a_session_keeps_are_refused(update: str, across: bool) -> None:
    _, products = opened_products(update, OPEN_PRODUCTS + 1, across)
    (x, y, _), *kept = products
    with pytest.raises(
        ValueError,
        match="server: expected the gradient of one of this session's last 4 products, got that of product 1",
    ) as refused:
        torch.autograd.grad(y.sum(), x)
    assert isinstance(refused.value, Refused) == across  # whatever comes in a frame says itself what it is
    for x, y, then in kept:
        (found,) = torch.autograd.grad(y.sum(), x)
        assert_close(found, then.sum(0).expand(5, 6), tolerance(torch.ones(1, 3), then.T))


@pytest.mark.parametrize("update", MODES)
def test_a_layer_used_several_times_in_one_graph(update: str) -> None:
    plain = nn.Linear(4, 4)
    layer = encrypted(plain, update, holder_of(plain, update))
    x = torch.rand(4, 4)
    near, far = (x.clone().requires_grad_() for _ in range(2))
    (expected, found) = (one(one(one(start).tanh()).tanh()) for one, start in ((plain, near), (layer, far)))
    small = 4 * tolerance(x, plain.weight) * max(1.0, float(torch.linalg.matrix_norm(plain.weight.detach(), 2))) ** 2
    assert_close(found, expected, small)  # errors of three products, each through at most two more
    (g,), (back,) = (torch.autograd.grad(y.sum(), start) for y, start in ((expected, near), (found, far)))
    assert_close(back, g, 4 * small)  # and tanh's slope errs by twice its argument's error


def test_a_gradient_goes_back_through_the_weights_of_its_own_forward_pass() -> None:
    plain = nn.Linear(4, 3)
    layer, x = EncryptedLayer(keys(), LayerHolder("server", plain)), torch.rand(5, 4, requires_grad=True)
    y, then = layer(x), plain.weight.detach().clone()
    with torch.no_grad():
        plain.weight += 1
    (g,) = torch.autograd.grad(y.sum(), x)
    assert_close(g, then.sum(0).expand(5, 4), tolerance(torch.ones(1, 3), then.T))


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("times", [1, 40])  # by which weights are shrunk before they are encrypted
def test_a_prediction_in_between_does_not_move_a_gradient_to_other_weights(times: float, update: str) -> None:
    plain = nn.Linear(6, 3)
    noted = Noted(holder_of(plain, update))
    layer, x = encrypted(plain, update, noted, rows=5), torch.rand(5, 6, requires_grad=True)
    own = layer.weight if update == "encrypted" else plain.weight
    assert own is not None
    y, then = layer(x), own.detach().clone()
    own.data.mul_(times).add_(1)
    with torch.no_grad():
        assert_close(layer(x[:2]), nn.functional.linear(x[:2], own, plain.bias), 2**6 * tolerance(x, own))
    layer(x.detach()[:2])
    (g,) = torch.autograd.grad(y.sum(), x)
    assert_close(g, then.sum(0).expand(5, 6), tolerance(torch.ones(1, 3), then.T))
    assert [one for one in noted.verbs[1:] if "weights" not in one] == ["product", "answer", "answer", "product_back"]


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("pruned", ["all", "last columns", "one row"])
@pytest.mark.parametrize(("rows", "width"), [(4, 6), (32, 128)], ids=["one tile", "tiles that serve both ways"])
def test_weights_of_zero_are_weights_too(rows: int, width: int, pruned: str, update: str) -> None:
    plain = nn.Linear(width, 2)
    with torch.no_grad():
        plain.weight[{"all": ..., "last columns": (slice(None), slice(2, None)), "one row": 1}[pruned]] = 0
    layer = encrypted(plain, update, holder_of(plain, update), rows=rows)
    assert_same_layer(plain, layer, torch.randn(rows, width).clamp(-4, 4))


# What crosses a second time


def test_a_second_gradient_that_is_a_multiple_row_by_row_crosses_no_more() -> None:
    plain = nn.Linear(4, 3).double()
    noted = Noted(LayerHolder("server", plain))
    layer, x = EncryptedLayer(keys(), noted), torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    y, g = layer(x), torch.randn(5, 3, dtype=torch.float64)
    g[4] = 0
    (first,) = torch.autograd.grad(y, x, g, retain_graph=True)
    factors = torch.tensor([1.0, 0.0, -2.5, 1e-3, 7.0], dtype=torch.float64)[:, None]
    for second in (g, factors * g, torch.zeros_like(g)):
        (found,) = torch.autograd.grad(y, x, second, retain_graph=True)
        scale = (second[:, :1] / g[:, :1]).nan_to_num()
        assert torch.allclose(found, scale * first, rtol=1e-12, atol=0)
    assert noted.verbs == ["open", "product", "product_back"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e-25, 1e-29])
def test_tiny_gradients_cross_but_once_too(size: float, dtype: torch.dtype) -> None:
    plain = nn.Linear(4, 3).to(dtype)
    noted = Noted(LayerHolder("server", plain))
    layer, x = EncryptedLayer(keys(), noted), torch.rand(5, 4, dtype=dtype, requires_grad=True)
    y, g = layer(x), size * torch.randn(5, 3, dtype=dtype)
    (first,) = torch.autograd.grad(y, x, g, retain_graph=True)
    expected = (g.double() @ plain.weight.detach().double()) / size
    assert_close(
        first.double() / size, expected, tolerance(torch.ones(1, 3), plain.weight.T) * float(g.abs().max()) / size
    )
    for factor in (0.5, 0.3, 0.0):
        (found,) = torch.autograd.grad(y, x, factor * g, retain_graph=True)
        near = float(first.abs().max()) * 100 * torch.finfo(dtype).eps
        assert_close(found, factor * first, near)
    assert noted.verbs == ["open", "product", "product_back"]


def test_a_row_below_the_tiniest_counts_as_none() -> None:
    known = torch.tensor([[1e-25, -2e-25], [1e-31, 0.0], [1.0, 3.0]])
    back = torch.tensor([[5e-25], [0.0], [7.0]])
    found = again(torch.tensor([[2e-25, -4e-25], [0.0, 1e-31], [-1.0, -3.0]]), known, back)
    assert found is not None
    assert torch.allclose(found, torch.tensor([[1e-24], [0.0], [-7.0]]), rtol=1e-5, atol=0)  # float32's rounding
    assert again(torch.tensor([[2e-25, -4e-25], [0.0, 1e-29], [1.0, 3.0]]), known, back) is None  # now it has one
    assert again(torch.tensor([[2e-25, 4e-25], [0.0, 0.0], [1.0, 3.0]]), known, back) is None  # no multiple


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("change", ["another row", "a row that had none", "one entry"])
def test_a_second_gradient_that_is_no_multiple_crosses_again(change: str, dtype: torch.dtype) -> None:
    plain = nn.Linear(4, 3)
    noted = Noted(LayerHolder("server", plain))
    layer, x = EncryptedLayer(keys(), noted), torch.rand(5, 4).to(dtype).requires_grad_()
    y, g = layer(x), torch.randn(5, 3).to(dtype)
    g[4] = 0
    torch.autograd.grad(y, x, g, retain_graph=True)
    other = g.clone()
    if change == "another row":
        other[1] = g[1].roll(1)
    elif change == "a row that had none":
        other[4] = 1
    else:
        other[2, 0] += 0.05 * g[2].abs().max()  # fifty times what float16 rounds by
    (found,) = torch.autograd.grad(y, x, other, retain_graph=True)
    assert noted.verbs == ["open", "product", "product_back", "product_back"]
    expected = other.float() @ plain.weight.detach()
    back = tolerance(torch.ones(1, 3), plain.weight.T) + 4 * torch.finfo(dtype).eps
    assert_close(found.float(), expected, back * float(other.abs().max()))
    torch.autograd.grad(y, x, other)  # which is now what is known
    assert noted.verbs == ["open", "product", "product_back", "product_back"]


def test_a_holders_state_is_its_weights_and_comes_back() -> None:
    plain, other = nn.Linear(4, 3), nn.Linear(4, 3)
    holder = LayerHolder("server", plain)
    layer, x = EncryptedLayer(keys(), holder), torch.rand(5, 4)
    layer(x)
    state = holder.state_dict()
    assert state.keys() == {"layer", "made"}
    assert state["layer"].keys() == {"weight", "bias"}
    assert state["made"] == 0
    with torch.no_grad():
        plain.weight.zero_()
    assert state["layer"]["weight"].any()  # a copy
    another = LayerHolder("another", other)
    for one in (holder, another):
        one.load_state_dict(state)
        assert torch.equal(one.layer.weight, state["layer"]["weight"])
    assert_same_layer(other, layer, x)
    for wrong in (state["layer"], LayerHolder("wide", nn.Linear(5, 3)).state_dict(), {}):
        with pytest.raises(ValueError, match="server: expected the state of a holder of Linear"):
            holder.load_state_dict(wrong)


# The plain layer again


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize(
    ("plain", "shape"),
    [(nn.Linear(6, 4), (4, 6)), (nn.Conv1d(2, 3, 2, bias=False), (2, 2, 5)), (nn.Conv2d(1, 2, 2), (2, 1, 4, 3))],
    ids=["linear", "conv1d", "conv2d"],
)
def test_the_plain_layer_computes_what_the_encrypted_one_does_and_is_a_copy(
    plain: nn.Module, shape: tuple[int, ...], update: str
) -> None:
    holder, before = holder_of(plain, update), copy.deepcopy(plain.state_dict())
    layer, x = encrypted(plain, update, holder), torch.randn(shape).clamp(-4, 4)
    for _ in range(2):  # as they are now, not as they were when the layer was made
        own = layer.plain() if update == "encrypted" else layer.plain(holder)  # type: ignore[arg-type]
        assert type(own) is type(plain)
        assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in own.state_dict().items())
        assert_close(own(x), layer(x), tolerance(x, plain.weight))
        with torch.no_grad():
            own.weight.zero_()
            plain.weight.mul_(-1)
    assert all(torch.equal(one.abs(), before[name].abs()) for name, one in plain.state_dict().items())


@pytest.mark.parametrize("update", ["frozen", "private"])
def test_weights_that_are_the_holders_take_the_holders_leave(update: str) -> None:
    layer = encrypted(nn.Linear(3, 2), update, LayerHolder("server", nn.Linear(3, 2), update=update))
    with pytest.raises(
        Refused, match=r"expected the holder, which has the weights, got none; plain\(holder\) with its"
    ):
        layer.plain()


@pytest.mark.parametrize("update", MODES)
def test_a_model_with_the_plain_layer_is_saved_and_loaded_as_torch_does(update: str) -> None:
    plain, bottom, head = nn.Linear(5, 4), nn.Linear(6, 5), nn.Linear(4, 3)
    holder = holder_of(plain, update)
    layer, x = encrypted(plain, update, holder), torch.randn(4, 6).clamp(-4, 4)
    own = nn.Sequential(bottom, layer.plain() if update == "encrypted" else layer.plain(holder), head)  # type: ignore[arg-type]
    with io.BytesIO() as file:
        torch.save(own, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    with io.BytesIO() as file:
        torch.save(own.state_dict(), file)
        file.seek(0)
        blank = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
        blank.load_state_dict(torch.load(file))
    expected = head(plain(bottom(x)))
    assert torch.equal(loaded(x), expected)
    assert torch.equal(blank(x), expected)
    assert_close(head(layer(bottom(x))), expected, 10 * tolerance(bottom(x), plain.weight))  # the head adds up four


@pytest.mark.parametrize("update", ["frozen", "private"])
def test_a_session_shares_the_weights_and_no_key(update: str) -> None:
    plain = nn.Linear(4, 3)
    holder = LayerHolder("server", plain, update=update)
    sessions = [holder.session(name) for name in ("a", "b")]
    layers = [EncryptedLayer(Keys(), one, update=update) for one in sessions]
    for layer in layers:
        assert_same_layer(plain, layer, torch.rand(3, 4))
    if update == "private":
        assert layers[0].weight is not None
        with torch.no_grad():
            layers[0].weight += 1
        layers[0].pass_on()
        assert_same_layer(plain, layers[1], torch.rand(3, 4))


def test_encrypted_weights_serve_one_client() -> None:
    with pytest.raises(
        ValueError, match="server: expected one client, whose key the weights are under, got another, b"
    ):
        CipherHolder("server", nn.Linear(3, 2)).session("b")


AGAIN: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    # How great the weights are, and what the first and the second client open it with.
    "another key": (1, {}, {"keys": Keys}),
    "a greater bound": (10, {"bound": 1.0}, {"bound": 60.0}),
    "another parameter set": (1, {}, {"keys": lambda: Keys(PRECISE)}),
    "other scales": (1, {}, {"keys": lambda: Keys(tight())}),
    "whole replies": (1, {}, {"truncated": False}),
}


@pytest.mark.filterwarnings("ignore:tight. 54 bits of modulus")
@pytest.mark.parametrize("update", ["frozen", "encrypted"])
@pytest.mark.parametrize("how", AGAIN)
def test_a_holder_may_be_opened_again(how: str, update: str) -> None:
    times, *openings = AGAIN[how]
    plain = nn.Linear(6, 4)
    with torch.no_grad():
        plain.weight.mul_(times)
    holder = holder_of(plain, update)
    for options in openings:
        own = {name: make() if callable(make) else make for name, make in options.items()}
        layer = encrypted(plain, update, holder, rows=150, **own)
        x = layer.bound * plain.weight[:1].detach().sign().expand(150, 6)  # all slots as great as they come
        slack = 2**5  # what the scale of weights is halved by at the greater bound
        assert_close(layer(x), plain(x), slack * tolerance(x, plain.weight))


def test_a_holder_that_is_opened_again_forgets_the_session_before() -> None:
    plain, x = nn.Linear(3, 2), torch.rand(4, 3)
    holder = LayerHolder("server", plain)
    layer = EncryptedLayer(keys(), holder)
    y = layer(x.requires_grad_())
    EncryptedLayer(keys(PRECISE), holder)
    with pytest.raises(ValueError, match=r"server: expected the gradient of one of .*, got that of product 1 of 1"):
        y.sum().backward()
    with pytest.raises(ValueError, match="expected ciphertexts of parameter set"):
        layer(x)
    blind = CipherHolder("server", plain)
    y = encrypted(plain, "encrypted", blind)(x)
    anew = encrypted(plain, "encrypted", blind, keys=keys(PRECISE))
    with pytest.raises(ValueError, match="server: expected encrypted weights first, got none"):
        anew.product(torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"server: expected the gradient of one of .*, got that of product 1 of 1"):
        y.sum().backward()
    assert_same_layer(plain, anew, x.detach(), PRECISE)


def test_an_opening_that_is_refused_leaves_the_session_as_it_was() -> None:
    plain, x = nn.Linear(3, 2), torch.rand(4, 3)
    holder = LayerHolder("server", plain)
    layer = EncryptedLayer(keys(), holder)
    with pytest.raises(ValueError, match="expected"):
        holder.ask("open", {Kind.PARAMETERS: told(bound=-1.0)})
    assert_same_layer(plain, layer, x)


# What a holder is sent


@pytest.mark.parametrize("across", [False, True], ids=["here", "across a wire"])
@pytest.mark.parametrize("verb", ["product", "product_back", "answer", "change", "weights_encrypted"])
def test_a_holder_that_no_client_has_opened_says_so(verb: str, across: bool) -> None:
    plain = nn.Linear(3, 2)
    holder = holder_of(plain, "encrypted" if verb == "weights_encrypted" else "private")
    before = plain.weight.detach().clone()
    message = {
        Kind.COUNT: torch.tensor(1), Kind.CIPHERTEXT: torch.zeros(9, dtype=torch.uint8),
        "update/weight": torch.ones(2, 3), "update/bias": torch.ones(2),
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="server: expected a session that a client has opened, got none; open it first"
    ):
        (wire(holder).party if across else holder).ask(verb, message)
    assert torch.equal(plain.weight, before)


NO_TICKET = "server: expected the gradient of one of this session's last 4 products, got that of product"


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize(("ticket", "got"), [({}, "0 of 0"), ({TICKET: torch.tensor(1)}, "1 of 0")], ids=["none", "1"])
def test_a_gradient_before_any_product_is_refused(ticket: dict[str, Tensor], got: str, update: str) -> None:
    plain = nn.Linear(3, 2)
    layer = encrypted(plain, update, holder_of(plain, update))
    with pytest.raises(ValueError, match=f"{NO_TICKET} {got}$"):
        layer.product_back(torch.rand(4, 2), WayBack(ticket, 1.0))


@pytest.mark.parametrize("update", ["frozen", "encrypted"])
def test_a_ticket_is_looked_at_before_the_ciphertext(update: str) -> None:
    line, messages = sent(update)
    message = messages["product_back"]
    for ciphertext in (message[Kind.CIPHERTEXT], torch.zeros(3)):
        for ticket in (1 << 20, None):
            asked = {TICKET: torch.tensor(ticket)} if ticket else {}
            rest = {kind: tensor for kind, tensor in message.items() if kind != TICKET}
            with pytest.raises(ValueError, match=f"{NO_TICKET} {ticket or 0} of"):
                line.party.ask("product_back", {**rest, Kind.CIPHERTEXT: ciphertext, **asked})
    for wrong in (torch.tensor(0), torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(-1)):
        with pytest.raises(ValueError, match="server: expected a whole number from 1 to"):
            line.party.ask("product_back", {**message, TICKET: wrong})


@pytest.mark.parametrize("returns", [False, True], ids=["answer", "product"])
def test_a_product_before_the_encrypted_weights_is_refused(returns: bool) -> None:
    plain = nn.Linear(3, 2)
    layer = encrypted(plain, "encrypted", CipherHolder("server", plain))
    with pytest.raises(ValueError, match="server: expected encrypted weights first, got none"):
        layer.product(torch.rand(4, 3), returns=returns)


def told(**changes: Any) -> Tensor:
    """An opening with some of its settings replaced."""
    opening = Opening(FAST, keys().id, 8.0, True, Update.FROZEN)
    return settings_tensor({**json.loads(opening.tensor().numpy().tobytes()), **changes})


def raw(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def without(name: str) -> Tensor:
    opening = json.loads(told().numpy().tobytes())
    opening.pop(name)
    return settings_tensor(opening)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (torch.zeros(4), "expected public parameters as JSON, got 0 bytes of something else"),
        (torch.zeros(0, dtype=torch.uint8), "got 0 bytes"),
        (raw(b"{"), "got 1 bytes of something else; keys and TenSEAL contexts stay with the client"),
        (raw(b"\xff\xfe"), "got 2 bytes of something else"),
        (raw(b"[1, 2]"), "expected public parameters as a JSON object, got list"),
        (raw(b"{}"), r"expected parameters, key id and bounds of a client, got \[\]"),
        (without("key"), "expected parameters, key id and bounds"),
        (without("bound"), "expected parameters, key id and bounds"),
        (told(prime_bits=48), "expected parameters, key id and bounds"),
        (told(degree=[2048]), r"expected whole numbers as parameters of encryption, got \[2048\]"),
        (told(degree=2048.0), "expected whole numbers as parameters of encryption, got 2048.0"),
        (told(scale_bits="22"), "expected whole numbers as parameters of encryption, got '22'"),
        (told(prime_bits=[48.0]), "expected whole numbers as parameters of encryption, got 48.0"),
        (told(weight_scale_bits=None), "expected whole numbers as parameters of encryption, got None"),
        (told(truncated=1), "expected parameters, key id and bounds"),
        (told(truncated="false"), "expected parameters, key id and bounds"),
        (told(rows=4.0), "expected parameters, key id and bounds"),
        (told(rows=True), "expected parameters, key id and bounds"),
        (told(key=7), "expected parameters, key id and bounds"),
        (told(update="Frozen"), "did you mean 'frozen'"),
        (told(degree=1000), "expected a degree among 1024"),
        (told(prime_bits=[60]), "expected at most 54 bits of modulus at degree 2048"),
        (told(prime_bits=[]), "expected primes of 20 to 60 bits"),
        (told(scale_bits=40), "whose product leaves room"),
        (told(scale_bits=10**7), "whose product leaves room"),
        (told(weight_scale_bits=-5), "whose product leaves room"),
        (told(update="clear"), "the leak of the published protocols"),
        (told(update="private"), "expected a client with update=frozen, got private; say the same on both ends"),
        (told(key="xyz"), "hexadecimal|expected parameters"),
        (told(rows=float("inf")), "expected parameters, key id and bounds"),
        (told(rows="many"), "expected|invalid"),
        (told(rows=-1), "at least 0 rows, got 8 bytes, 8.0 and -1"),
        (told(rows=(1 << 24) + 1), "at least 0 rows"),
        (told(bound=float("nan")), "expected a key id of 8 bytes, a finite bound above 0"),
        (told(bound=-1.0), "expected a key id of 8 bytes, a finite bound above 0"),
        (told(bound=float("inf")), "expected a key id of 8 bytes, a finite bound above 0"),
        (told(key="00"), "at least 0 rows, got 1 bytes"),
        (raw(b"[" * 100_000), "expected public parameters as JSON, got 100000 bytes"),
    ],
)  # fmt: skip
def test_openings_that_say_nothing_of_use_are_refused_in_words(parameters: Tensor, says: str) -> None:
    line = wire(LayerHolder("server", nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=says):
        line.party.ask("open", {Kind.PARAMETERS: parameters})


def test_a_name_that_crosses_is_short_and_on_one_line() -> None:
    assert Opening.of(told(name="one\n\ttwo  " + 100 * "x")).parameters.name == "one two " + 32 * "x"


@pytest.mark.parametrize("rows", [0, -3, (1 << 24) + 1, 1 << 70])
def test_an_opening_for_no_rows_or_countless_ones_is_refused(rows: int) -> None:
    line = wire(CipherHolder("server", nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=rf"at least 1 rows, got 8 bytes, 8.0 and {rows}"):
        line.party.ask("open", {Kind.PARAMETERS: told(update="encrypted", rows=rows)})


@cache
def sent(update: str = "frozen") -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """A wire to a holder that has answered each verb once, and what it was sent."""
    plain = nn.Linear(3, 2)
    line = wire(holder_of(plain, update))
    layer = encrypted(plain, update, line.party)
    x = torch.rand(4, 3, requires_grad=True)
    layer(x).sum().backward()
    layer(x.detach())
    return line, {one.request.verb: dict(one.request.tensors) for one in line.record.exchanges}


def asking(update: str, verb: str) -> tuple[Any, dict[str, Tensor]]:
    """The same wire, and what to ask: a gradient of a product that has just been made."""
    line, messages = sent(update)
    if verb != "product_back":
        return line, messages[verb]
    return line, {**messages[verb], TICKET: line.party.ask("product", messages["product"])[TICKET]}


def flipped(data: Tensor, at: int, value: int | None = None) -> Tensor:
    other = data.clone()
    other[at] = int(other[at]) ^ 1 if value is None else value
    return other


CIPHERTEXTS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("floats", lambda c: c.float(), r"in bytes, got something else: torch.float32 \(\d+,\)"),
    ("none", lambda c: c[:0], r"in bytes, got something else: torch.uint8 \(0,\)"),
    ("less than a header", lambda c: c[:43], r"in bytes, got something else: torch.uint8 \(43,\)"),
    ("a header alone", lambda c: c[:44], "they were cut short"),
    ("cut short", lambda c: c[:-1], "they were cut short"),
    ("too long", lambda c: torch.cat([c, c[:1]]), "they were cut short"),
    ("another magic", lambda c: flipped(c, 0), "in bytes, got something else"),
    ("another version", lambda c: flipped(c, 4), "expected ciphertexts of version 1, got 0; run one release"),
    ("another form", lambda c: flipped(c, 5, 1), "expected ciphertexts in form seeded, got whole"),
    ("no form", lambda c: flipped(c, 5, 9), "in form seeded, got form 9"),
    ("more polynomials", lambda c: flipped(c, 6, 2), "expected ciphertexts of polynomials each 1, got 2"),
    ("another padding", lambda c: flipped(c, 7), "they changed on the way"),
    ("other parameters", lambda c: flipped(c, 8), "expected ciphertexts of parameter set"),
    ("another key", lambda c: flipped(c, 16), "expected ciphertexts under key"),
    ("another count", lambda c: flipped(c, 24, int(c[24]) + 1), r"expected ciphertexts in number \d, got \d"),
    ("other rows", lambda c: flipped(c, 28), "they changed on the way"),
    ("another scale", lambda c: flipped(c, 38), "the scale has drifted"),
    ("a changed body", lambda c: flipped(c, -1), "they changed on the way"),
]  # fmt: skip
NAMED = [pytest.param(change, says, id=name) for name, change, says in CIPHERTEXTS]


@pytest.mark.parametrize(
    ("update", "verb"),
    [
        ("frozen", "product"),
        ("frozen", "product_back"),
        ("frozen", "answer"),
        ("encrypted", "product"),
        ("encrypted", "product_back"),
        ("encrypted", "answer"),
        ("encrypted", "weights_encrypted"),
    ],
)
@pytest.mark.parametrize(("change", "says"), NAMED)
def test_ciphertexts_that_are_none_are_refused_and_the_next_request_goes_through(
    change: Callable[[Tensor], Tensor], says: str, update: str, verb: str
) -> None:
    line, message = asking(update, verb)
    with pytest.raises(ValueError, match=says):
        line.party.ask(verb, {**message, Kind.CIPHERTEXT: change(message[Kind.CIPHERTEXT])})
    for missing in message:
        with pytest.raises(ValueError, match=NO_TICKET if missing == TICKET else f"a message with {missing}, got"):
            line.party.ask(verb, {kind: tensor for kind, tensor in message.items() if kind != missing})
    line.party.ask(verb, message)


def test_integers_beyond_the_modulus_are_refused() -> None:
    # With a checksum that fits, as whoever means to would send it.
    line, messages = sent("frozen")
    data = bytearray(messages["product"][Kind.CIPHERTEXT].numpy().tobytes())
    header = 44
    data[header : header + 6] = b"\xff" * 6
    data[header - 4 : header] = struct.pack("<I", zlib.crc32(bytes(data[: header - 4] + bytes(4) + data[header:])))
    with pytest.raises(ValueError, match="SEAL refuses it"):
        line.party.ask("product", {**messages["product"], Kind.CIPHERTEXT: raw(bytes(data))})


WHOLE = r"server: expected a whole number from 1 to 16777216, got \["
COUNTS: list[tuple[Tensor, str]] = [
    (torch.tensor(0), WHOLE),
    (torch.tensor(-1), WHOLE),
    (torch.tensor((1 << 24) + 1), WHOLE),
    (torch.tensor([4, 4]), WHOLE),
    (torch.zeros(0, dtype=torch.int64), WHOLE),
    (torch.tensor(4.0), WHOLE),
    (torch.tensor(float("nan")), WHOLE),
    (torch.tensor(float("inf")), WHOLE),
    (torch.tensor(1 << 24), "expected ciphertexts in number"),  # more than came
]


@pytest.mark.parametrize("verb", ["product", "product_back", "answer"])
@pytest.mark.parametrize(("count", "says"), COUNTS, ids=str)
def test_counts_that_make_no_sense_are_refused(verb: str, count: Tensor, says: str) -> None:
    line, message = asking("frozen", verb)
    with pytest.raises(ValueError, match=says):
        line.party.ask(verb, {**message, Kind.COUNT: count})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight": torch.ones(2, 3)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
        {"weight": torch.ones(3, 2), "bias": torch.ones(2)},
        {"weight": torch.ones(1, 3), "bias": torch.ones(2)},
        {"weight": torch.full((2, 3), torch.nan), "bias": torch.ones(2)},
        {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, torch.inf])},
        {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)},
    ],
    ids=lambda changes: " ".join(f"{name} {tuple(one.shape)}" for name, one in changes.items()) or "nothing",
)
def test_changes_that_do_not_fit_are_refused_whole(changes: dict[str, Tensor]) -> None:
    plain = nn.Linear(3, 2)
    line = wire(LayerHolder("server", plain, update="private"))
    EncryptedLayer(keys(), line.party, update="private")
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="server: expected finite changes of weight, bias in their shapes, got"):
        line.party.ask("change", numbered(1, keys()) | keyed(changes, Kind.UPDATE))
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("make", [LayerHolder, CipherHolder])
@pytest.mark.parametrize("verb", ["change", "backward", "learn", "weights", "load_weights", "forward", "nothing"])
def test_a_holder_whose_weights_stay_answers_no_other_verb(make: Any, verb: str) -> None:
    with pytest.raises(ValueError, match=r"server is a .*Holder, which does not answer|expected a verb among"):
        wire(make("server", nn.Linear(3, 2))).party.ask(verb, {})


def test_a_reply_that_is_another_or_none_is_refused_by_the_client() -> None:
    plain = nn.Linear(3, 2)
    holder = LayerHolder("server", plain)

    class Lying:
        def __init__(self) -> None:
            self.reply: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda reply: reply

        def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self.reply(holder.ask(verb, tensors))

    lying = Lying()
    layer = EncryptedLayer(keys(), lying)
    lying.reply = lambda reply: {}
    with pytest.raises(ValueError, match="expected a message with ciphertext, got an empty one"):
        layer(torch.rand(4, 3))
    lying.reply = lambda reply: {Kind.CIPHERTEXT: flipped(reply[Kind.CIPHERTEXT], -1)}
    with pytest.raises(ValueError, match="they changed on the way"):
        layer(torch.rand(4, 3))
    lying.reply = lambda reply: {Kind.CIPHERTEXT: flipped(reply[Kind.CIPHERTEXT], 16)}
    with pytest.raises(ValueError, match="expected ciphertexts under key"):
        layer(torch.rand(4, 3))
    sound = Geometry.of(plain).told()
    for told in (
        {"kind": "linear"}, {"inner": 3, "outer": 2, "what": 1}, sound | {"kind": "conv3d"}, sound | {"inner": 0},
        sound | {"outer": (1 << 24) + 1}, sound | {"inner": 3.0}, sound | {"inner": True}, sound | {"bias": 1},
        sound | {"stride": [0, 1]}, sound | {"padding": [-1, 0]}, sound | {"kernel": 3}, sound | {"channels": -1},
    ):  # fmt: skip
        lying.reply = lambda reply, told=told: {Kind.PARAMETERS: settings_tensor(told)}
        with pytest.raises(ValueError, match="expected the geometry of a layer, got"):
            EncryptedLayer(keys(), lying)


def test_what_a_product_took_is_noted_on_both_ends() -> None:
    holder = LayerHolder("server", nn.Linear(3, 2))
    layer = EncryptedLayer(keys(), holder)
    layer(torch.rand(4, 3))
    assert layer.seconds.keys() == {"encrypt", "holder", "decrypt"}
    assert all(spent > 0 for spent in layer.seconds.values())
    assert 0 < holder.seconds["product"] <= layer.seconds["holder"]


# More than one process


def multiply(layer: EncryptedLayer, plain: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        x = torch.rand(4, 16, generator=generator)
        with torch.no_grad():
            assert_close(layer(x), plain(x), tolerance(x, plain.weight))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from 3.12 on, where there are threads: there are none
def test_forked_processes_do_not_write_to_each_others_scratch_file() -> None:
    plain = nn.Linear(16, 8)
    layer = EncryptedLayer(Keys(), LayerHolder("server", plain))
    multiply(layer, plain, 0)  # so that all are made of the same keys, ring and file
    forked = multiprocessing.get_context("fork")
    children = [forked.Process(target=multiply, args=(layer, plain, seed), daemon=True) for seed in (1, 2)]
    for child in children:
        child.start()
    try:
        multiply(layer, plain, 3)
        for child in children:
            child.join(60)
    finally:
        for child in children:
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]


def test_a_layer_in_parts_takes_one_ticket_a_product() -> None:
    plain = nn.Linear(4, 4)
    layer = encrypted(plain, "encrypted", CipherHolder("server", plain), rows=4)
    x = torch.rand(16, 4, requires_grad=True)
    layer(layer(x)).sum().backward()
    again = x.detach().clone().requires_grad_()
    plain(plain(again)).sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert torch.allclose(x.grad, again.grad, atol=5e-3)


def test_a_holder_is_resumed_for_the_sessions_that_it_gives() -> None:
    def stepped(layer: EncryptedLayer) -> None:
        with torch.no_grad():
            layer.weight += 1.0
        layer.pass_on()

    holder = LayerHolder("server", nn.Linear(3, 2), update="private")
    layer = EncryptedLayer(Keys(), holder.session("a"), update="private")
    stepped(layer)
    fresh = LayerHolder("server", nn.Linear(3, 2), update="private")
    fresh.load_state_dict(holder.state_dict())
    resumed = EncryptedLayer(Keys(), fresh.session("a"), update="private")
    resumed.load_state_dict(layer.state_dict())
    stepped(resumed)
    assert torch.allclose(fresh.layer.weight, holder.layer.weight + 1.0)


def test_plain_weights_are_not_swallowed_by_a_private_layer() -> None:
    layer = EncryptedLayer(keys(), LayerHolder("server", nn.Linear(3, 2), update="private"), update="private")
    with pytest.raises(RuntimeError, match=r"Missing key.*changes[\s\S]*Unexpected key.*weight"):
        nn.Sequential(layer).load_state_dict(nn.Sequential(nn.Linear(3, 2)).state_dict())
