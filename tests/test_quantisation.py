"""Learned quantisation, quantisation-aware training and bottlenecks: by hand, against autograd, and in training."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from splitlearn import Learner, cut, vanilla, wire
from splitlearn.codecs import Ans, Int8, Palette, PerKind
from splitlearn.federation import mean
from splitlearn.models import digits_cnn, ecg_cnn, mlp, token_transformer
from splitlearn.quantisation import LearnedQuantiser, baked, narrowed, quantisation_aware


def started(bits: int, step: float, *, signed: bool = False) -> LearnedQuantiser:
    layer = LearnedQuantiser(bits).double()
    layer.load_state_dict({"step": torch.tensor(step), "low": torch.tensor(-(2 ** (bits - 1)) if signed else 0)})
    return layer


def test_learned_quantiser_by_hand():
    z = torch.tensor([[-1.0, 0.2, 0.3, 0.74, 5.0]], dtype=torch.float64)
    assert started(2, 0.5)(z).tolist() == [[0, 0, 0.5, 0.5, 1.5]]
    assert started(2, 0.5, signed=True)(z).tolist() == [[-1, 0, 0.5, 0.5, 0.5]]


def test_learned_quantiser_has_the_gradients_of_the_paper():
    layer = started(2, 0.5)
    z = torch.tensor([[-1.0, 0.2, 0.3, 0.74, 5.0]], dtype=torch.float64, requires_grad=True)
    layer(z).sum().backward()
    assert z.grad.tolist() == [[0, 1, 1, 1, 0]]
    # Equation 3: round(z/s) - z/s within the ends, the end itself beyond them; scaled by 1/sqrt(5 * 3).
    within = sum(round(v / 0.5) - v / 0.5 for v in (0.2, 0.3, 0.74))
    assert layer.step.grad.item() == pytest.approx((0 + within + 3) / 15**0.5)


def test_learned_quantiser_starts_with_the_first_batch_it_trains_on():
    layer, z = LearnedQuantiser(4), torch.rand(8, 20)
    with pytest.raises(ValueError, match="expected a quantiser that was trained"):
        copy.deepcopy(layer).eval()(z)
    layer(z)
    assert layer.step.item() == pytest.approx(2 * z.mean().item() / 15**0.5)
    assert layer(z).min() >= 0
    signed = LearnedQuantiser(4)
    assert signed(z - 0.5).min() < 0
    assert signed.low.item() == -8
    assert LearnedQuantiser(4)(torch.zeros(2, 3)).tolist() == torch.zeros(2, 3).tolist()
    with pytest.raises(ValueError, match="expected whole bits from 1 to 8, got 9"):
        LearnedQuantiser(9)


def test_learned_quantiser_starts_with_no_batch_of_zeros():
    layer, zeros = LearnedQuantiser(4), torch.zeros(2, 3, requires_grad=True)
    layer(zeros).sum().backward()
    assert torch.equal(zeros.grad, torch.ones(2, 3))
    assert layer.step.item() == 0
    with pytest.raises(ValueError, match="expected a quantiser that was trained"):
        copy.deepcopy(layer).eval()(torch.zeros(2, 3))
    layer(torch.rand(2, 3) - 0.5).sum().backward()  # the first batch that tells a step, and a sign
    assert layer.step.item() > 0.01
    assert layer.low.item() == -8
    assert layer.step.grad.isfinite()


@pytest.mark.parametrize("seen", [(0.0, -0.5), (-0.5, 0.0)])
def test_one_member_with_negative_entries_makes_the_mean_signed(seen):
    members = [LearnedQuantiser(4) for _ in seen]
    for member, shift in zip(members, seen, strict=True):
        member(torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) + shift)
    merged = LearnedQuantiser(4)
    merged.load_state_dict(mean([member.state_dict() for member in members], [99, 1]))
    z = torch.tensor([[-9.0, -0.3, 9.0]])
    levels = (merged(z) / merged.step).round()
    assert levels[0, ::2].tolist() == [-8, 7]
    assert levels[0, 1] < 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_learned_quantiser_predicts_to_the_bit_what_it_puts_out_in_training(bits, signed, dtype):
    layer = started(bits, 0.037, signed=signed).to(dtype)
    z = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).to(dtype) * 2
    z[0, :3] = torch.tensor([0.0, -0.0, -0.001])
    trained = layer(z).detach()
    assert same_bits(trained, layer(z[:7]).detach(), rows=7)  # whatever the size of the batch
    with torch.no_grad():
        assert same_bits(layer(z), trained)
    frozen = layer.eval().requires_grad_(False)
    assert same_bits(frozen(z), trained)
    assert same_bits(frozen(z.clone().requires_grad_()).detach(), trained)


def same_bits(one: Tensor, other: Tensor, rows: int = 64) -> bool:
    return torch.equal(one[:rows], other[:rows]) and torch.equal(one[:rows].signbit(), other[:rows].signbit())


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # forward rules are compiled on first use
def test_a_frozen_quantiser_has_the_rounding_s_identity_as_gradient_both_ways():
    layer = started(2, 0.5).eval().requires_grad_(False)
    z = torch.tensor([[-1.0, 0.2, 5.0]], dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(z, torch.ones_like(z)))).tangent
    assert tangent.tolist() == [[0, 1, 0]]
    layer(z.requires_grad_()).sum().backward()
    assert z.grad.tolist() == [[0, 1, 0]]


def test_what_it_puts_out_crosses_exactly_in_its_bits_and_training_lowers_the_loss():
    torch.manual_seed(0)
    bottom, top = cut(digits_cnn(), "relu2")
    bottom = nn.Sequential(*bottom, LearnedQuantiser(3))
    client = Learner("client", bottom, torch.optim.Adam(bottom.parameters(), lr=2e-3))
    server = wire(Learner("server", top, torch.optim.Adam(top.parameters(), lr=2e-3)), PerKind(Ans(Palette(3)), Int8()))
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 4
    step = None
    losses = []
    for _ in range(30):
        losses.append(vanilla(client, server.party, x, y).item())
        step = step or bottom[-1].step.item()
    assert losses[-1] < 0.8 * losses[0]
    assert bottom[-1].step.item() != step
    crossed = server.record.exchanges[-1].request.tensors["activation"]
    assert crossed.unique().numel() <= 8
    assert server.meter.nbytes["up"]["activation"] < 30 * (crossed.numel() * 3 / 8 + 500)


@pytest.mark.parametrize("bits", [8, 2])
def test_quantisation_aware_training_computes_with_rounded_weights_that_baking_keeps(bits):
    torch.manual_seed(0)
    stage = cut(digits_cnn(), "relu2")[0]
    before = copy.deepcopy(stage.state_dict())
    aware = quantisation_aware(stage, bits)
    optimizer, x = torch.optim.SGD(aware.parameters(), lr=0.05), torch.rand(8, 1, 8, 8)
    for _ in range(3):
        optimizer.zero_grad()
        aware(x).square().mean().backward()
        optimizer.step()
    plain = baked(aware)
    assert torch.equal(plain(x), aware(x))
    assert plain.state_dict().keys() == before.keys()
    for name, weight in plain.state_dict().items():
        assert not torch.equal(weight, before[name])
        if name.endswith("weight"):
            for channel in weight.flatten(1):
                assert channel.abs().unique().numel() <= 2 ** (bits - 1)
    assert all(torch.equal(stage.state_dict()[name], before[name]) for name in before)  # the stage itself stays


def test_quantisation_aware_refuses_what_it_cannot_round():
    with pytest.raises(ValueError, match="expected a stage with weights"):
        quantisation_aware(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="from 2 to 8 for weights, got 1"):
        quantisation_aware(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="rounds them already"):
        quantisation_aware(quantisation_aware(nn.Linear(2, 2)))
    for layer in (nn.ConvTranspose2d(2, 3, 2), nn.MultiheadAttention(4, 2), nn.LSTM(2, 3)):
        with pytest.raises(ValueError, match=f"got layer '1', {type(layer).__name__}; cut"):
            quantisation_aware(nn.Sequential(nn.Linear(2, 2), layer))


@pytest.mark.parametrize(
    ("model", "x", "at", "crosses"),
    [
        (digits_cnn(), torch.rand(2, 1, 8, 8), "relu2", (2, 4, 8, 8)),
        (ecg_cnn(), torch.rand(2, 1, 128), "pool1", (2, 4, 64)),
        (ecg_cnn(), torch.rand(2, 1, 128), "flatten", (2, 4)),
        (mlp(7), torch.rand(2, 7), "relu1", (2, 4)),
        (token_transformer(20, 2, 5), torch.ones(2, 5, dtype=torch.int64), "block1", (2, 5, 4)),
    ],
)
def test_a_bottleneck_narrows_what_crosses_and_shares_the_rest(model, x, at, crosses):
    bottom, top = narrowed(model, at, 4, x)
    assert bottom(x).shape == crosses
    assert top(bottom(x)).shape == model(x).shape
    shared = {id(parameter) for parameter in model.parameters()}
    new = [
        name for name, parameter in [*bottom.named_parameters(), *top.named_parameters()] if id(parameter) not in shared
    ]
    assert {name.partition(".")[0] for name in new} == {"narrow", "widen"}
    with pytest.raises(ValueError, match="expected fewer features than the"):
        narrowed(model, at, 10_000, x)
