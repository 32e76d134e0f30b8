import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from splitlearn import models
from splitlearn.codecs import Int8, through
from splitlearn.cut import cut, layer_names
from splitlearn.models import MODELS, model_for


def tokens(*shape, vocab_size=20):
    x = torch.randint(1, vocab_size, shape)
    x[0, 3:] = 0
    x[-1] = 0  # a text of nothing but padding
    return x


# name: (builder's arguments, a batch)
ZOO = {
    "digits_cnn": ((10, 1), lambda: torch.rand(3, 1, 8, 8)),
    "cnn28": ((10, 1), lambda: torch.rand(3, 1, 28, 28)),
    "resnet18": ((10, 3), lambda: torch.rand(2, 3, 32, 32)),
    "vgg11": ((7, 3), lambda: torch.rand(2, 3, 32, 32)),
    "ecg_cnn": ((5, 128), lambda: torch.randn(3, 1, 128)),
    "mlp": ((30, 2), lambda: torch.randn(4, 30)),
    "token_transformer": ((20, 3, 7), lambda: tokens(4, 7)),
}
SMALL = sorted(ZOO.keys() - {"resnet18", "vgg11"})
DEEP = ["resnet18", "vgg11"]


def build(name):
    torch.manual_seed(0)
    arguments, batch = ZOO[name]
    model = MODELS[name][1](*arguments).double()
    x = batch()
    return model, x if x.dtype == torch.int64 else x.double()


def boundaries(name):
    return range(1, len(build(name)[0]))


def run(stages, x, seed=3):
    """Run the stages in turn, each on a fresh leaf as parties do, then the gradient back through them."""
    torch.manual_seed(seed)
    pairs = []
    for stage in stages:
        leaf = x.detach()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        x = stage(leaf)
        pairs.append((leaf, x))
    loss = cross_entropy(x, torch.arange(len(x)) % x.shape[1])
    loss.backward()
    for (leaf, _), (_, below) in zip(reversed(pairs[1:]), reversed(pairs[:-1]), strict=True):
        below.backward(leaf.grad)
    return x.detach()


def check_parity(model, x, at):
    """Output, gradients and batch-norm statistics of the stages are those of the whole, bit for bit."""
    whole, split = model, copy.deepcopy(model)
    for mode in (True, False):
        whole.train(mode), split.train(mode)
        whole.zero_grad(), split.zero_grad()
        assert torch.equal(run(cut(split, *at), x), run([whole], x))
        for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
            assert one.grad is not None, name
            assert torch.equal(one.grad, other.grad), name
        for (name, one), other in zip(whole.named_buffers(), split.buffers(), strict=True):
            assert torch.equal(one, other), name


def test_the_zoo_is_complete():
    assert set(ZOO) == set(MODELS)
    assert all(builder.__name__ == name and summary for name, (summary, builder) in MODELS.items())


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in SMALL for k in boundaries(name)])
def test_a_cut_at_every_boundary_changes_nothing(name, k):
    model, x = build(name)
    check_parity(model, x, [k])
    check_parity(model, x, [layer_names(model)[k - 1]])


@pytest.mark.parametrize("name", sorted(ZOO))
def test_cuts_at_all_boundaries_at_once_change_nothing(name):
    model, x = build(name)
    check_parity(model, x, range(1, len(model)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "k"), [(name, k) for name in DEEP for k in boundaries(name)])
def test_a_cut_at_every_boundary_of_a_deep_model_changes_nothing(name, k):
    model, x = build(name)
    check_parity(model, x, [k])


@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_layer_works_in_place_and_weights_follow_the_seed(name):
    model, _ = build(name)
    again, _ = build(name)
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


SHAPES = {  # name: shape after some layers, batch left out
    "digits_cnn": {
        "relu1": (16, 8, 8),
        "relu2": (32, 8, 8),
        "relu3": (64, 4, 4),
        "relu4": (64,),
        "fc2": (10,),
    },
    "cnn28": {"block1": (16, 14, 14), "block2": (32, 7, 7), "relu": (128,), "fc2": (10,)},
    "resnet18": {
        "relu": (64, 32, 32),
        "block2": (64, 32, 32),
        "block4": (128, 16, 16),
        "block6": (256, 8, 8),
        "block8": (512, 4, 4),
        "flatten": (512,),
        "fc": (10,),
    },
    "vgg11": {
        "pool1": (64, 16, 16),
        "pool4": (256, 4, 4),
        "pool8": (512, 1, 1),
        "flatten": (512,),
        "fc3": (7,),
    },
    "ecg_cnn": {"pool1": (16, 64), "pool2": (8, 32), "flatten": (256,), "fc": (5,)},
    "mlp": {"relu1": (64,), "relu2": (32,), "fc3": (2,)},
    "token_transformer": {"embed": (7, 64), "block2": (7, 64), "pool": (64,), "fc": (3,)},
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes(name):
    model, x = build(name)
    shapes = {}
    for layer_name, layer in model.named_children():
        x = layer(x)
        shapes[layer_name] = tuple(x.shape[1:])
    assert {key: shapes[key] for key in SHAPES[name]} == SHAPES[name]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_digits_cnn_is_the_one_of_the_text():
    model = models.digits_cnn()
    layers = "conv1 relu1 conv2 relu2 pool conv3 relu3 flatten fc1 relu4 fc2"
    assert [name for name, _ in model.named_children()] == layers.split()
    convolutions = (9 * 1 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 64 + 64)
    assert count(model) == convolutions + (1024 * 64 + 64) + (64 * 10 + 10)


def test_parameter_counts_of_the_papers():
    assert count(models.resnet18()) == 11_173_962  # ResNet-18 with a 3×3 stem and ten classes, as widely reported
    convolutions = [layer for layer in models.vgg11().modules() if isinstance(layer, nn.Conv2d)]
    assert sum(layer.weight.numel() for layer in convolutions) == 9_217_728  # VGG-11's eight
    assert count(models.ecg_cnn()) == (7 * 16 + 16) + (5 * 16 * 8 + 8) + (256 * 5 + 5)


def test_vgg_without_batch_norm_has_none():
    model = models.vgg11(10, 1, batch_norm=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("length", [4, 130, 256])
def test_ecg_cnn_takes_other_lengths(length):
    assert models.ecg_cnn(5, length)(torch.randn(2, 1, length)).shape == (2, 5)


def test_resnet18_takes_larger_images():
    assert models.resnet18(40, 1)(torch.rand(1, 1, 56, 46)).shape == (1, 40)


class TestTokens:
    def model(self):
        torch.manual_seed(1)
        return models.token_transformer(20, 3, 9, width=16, heads=2).double()

    def test_padding_changes_nothing(self):
        model, x = self.model(), torch.randint(1, 20, (5, 6))
        padded = torch.cat([x, torch.zeros(5, 3, dtype=torch.int64)], 1)
        # Sums over 6 and over 9 terms (three of them zero) may differ in their last bits.
        torch.testing.assert_close(model(padded), model(x), rtol=0, atol=1e-12)

    def test_order_and_words_matter(self):
        model, x = self.model(), torch.tensor([[1, 2, 3, 4]])
        assert (model(x) - model(x.flip(1))).abs().max() > 1e-3
        assert (model(x) - model(torch.tensor([[1, 2, 3, 5]]))).abs().max() > 1e-3

    def test_padding_crosses_as_zeros_at_every_cut(self):
        model, x = self.model(), tokens(4, 9)
        for place in ("embed", "block1", "block2"):
            z = cut(model, place)[0](x)
            assert torch.equal((z != 0).any(-1), x != 0)

    def test_the_padding_survives_an_int8_code(self):
        model, x = self.model(), tokens(64, 9)
        for place in ("embed", "block1", "block2"):
            bottom, top = cut(model, place)
            z = bottom(x)
            coded = through(Int8(), z)
            assert not torch.equal(coded[0, 3:], z[0, 3:])  # zeros do not come through exactly
            assert torch.equal(models._tokens(coded), x != 0)
            # Codes of activations within ±8 err by .03 at most, and layer norms keep that small.
            assert (top(coded) - top(z)).abs().max() < 0.1

    def test_nothing_but_padding_is_finite_and_moves_no_word(self):
        model = self.model()
        out = model(torch.zeros(2, 9, dtype=torch.int64))
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert not model.embed.words.weight.grad.any()

    def test_it_learns_a_rule(self):
        torch.manual_seed(0)
        model = models.token_transformer(20, 2, 8, width=16, heads=2)
        x = torch.randint(2, 20, (256, 8))
        x[::2, 3] = 1  # the label is whether word 1 occurs
        x[:, 6:] = 0
        y = (x == 1).any(1).long()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        assert (model(x).argmax(1) == y).float().mean() == 1

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at most 9 tokens a text, got 10"):
            self.model()(torch.ones(1, 10, dtype=torch.int64))
        with pytest.raises(ValueError, match="5 heads divide, got 64"):
            models.token_transformer(20, 3, 9, heads=5)


@pytest.mark.parametrize(
    ("shape", "kind", "first"),
    [
        ((1, 8, 8), "image", "conv1"),
        ((3, 28, 28), "image", "block1"),
        ((3, 32, 32), "image", "stem"),
        ((1, 112, 92), "image", "stem"),
        ((1, 128), "signal", "conv1"),
        ((30,), "table", "fc1"),
        ((12,), "tokens", "embed"),
    ],
)
def test_model_for_fits_its_data(shape, kind, first):
    model = model_for(shape, 4, kind, vocab_size=9 if kind == "tokens" else None)
    assert next(model.named_children())[0] == first
    if max(shape) <= 32 or kind != "image":
        x = torch.ones(2, *shape, dtype=torch.int64 if kind == "tokens" else torch.float32)
        assert model(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 16, 16), 4, "image"), r"'image' of shape \(1, 16, 16\); resize"),
        (((2, 128), 4, "signal"), r"'signal' of shape \(2, 128\)"),
        (((30, 2), 4, "table"), "'table'"),
        (((8,), 4, "sound"), "'sound'"),
        (((8,), 4, "tokens"), "vocab_size"),
        (((30,), 1, "table"), "two classes, got 1"),
        (((1, 3), 4, "signal"), "at least 4 samples, got 3"),
    ],
)
def test_no_model_fits(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_for(*arguments)


def test_an_mlp_without_hidden_layers_is_refused():
    with pytest.raises(ValueError, match="cannot be cut"):
        models.mlp(3, hidden=())
