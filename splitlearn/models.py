"""The model zoo: each model is an ``nn.Sequential`` of named layers that can be cut at every boundary.

Nothing works in place, one tensor crosses each boundary, and weights start as torch's defaults (seed it first).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

__all__ = [
    "MODELS",
    "cnn28",
    "digits_cnn",
    "ecg_cnn",
    "mlp",
    "model_for",
    "resnet18",
    "token_transformer",
    "vgg11",
]

PADDING = 0  # the token that fills sequences up to a common length
PADDING_FRACTION = 1 / 128  # int8 moves a zero by at most 1/255 of the sample's greatest magnitude
VGG11_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)  # configuration A of the paper's table 1
VGG11_POOLED = frozenset({1, 2, 4, 6, 8})  # convolutions that max pooling follows


def digits_cnn(num_classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Return the CNN for 8×8 images, [N, channels, 8, 8] to logits [N, num_classes].

    Three 3×3 convolutions of 16, 32 and 64 channels, pooling after the second, two fully connected layers.
    """
    return _named(
        conv1=_conv(channels, 16),
        relu1=nn.ReLU(),
        conv2=_conv(16, 32),
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        conv3=_conv(32, 64),
        relu3=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * 4 * 4, 64),
        relu4=nn.ReLU(),
        fc2=nn.Linear(64, num_classes),
    )


def cnn28(num_classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Return the CNN for 28×28 images, [N, channels, 28, 28] to logits [N, num_classes].

    Two blocks (3×3 convolution, ReLU, pooling) of 16 and 32 channels and two fully connected layers.
    """
    return _named(
        block1=_named(conv=_conv(channels, 16), relu=nn.ReLU(), pool=nn.MaxPool2d(2)),
        block2=_named(conv=_conv(16, 32), relu=nn.ReLU(), pool=nn.MaxPool2d(2)),
        flatten=nn.Flatten(),
        fc1=nn.Linear(32 * 7 * 7, 128),
        relu=nn.ReLU(),
        fc2=nn.Linear(128, num_classes),
    )


def resnet18(num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Return ResNet-18 for 32×32 images and larger, [N, channels, H, W] to logits [N, num_classes].

    He, Zhang, Ren and Sun 2015 (arXiv:1512.03385). Deviation, usual at 32×32: the stem is a 3×3 convolution
    of stride 1 without max pooling. Shortcuts that change the shape are projections (the paper's option B).
    """
    layers: dict[str, nn.Module] = {
        "stem": nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        "bn": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
    }
    shapes = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
    ]
    for number, (width_in, width, stride) in enumerate([*shapes, (512, 512, 1)], start=1):
        layers[f"block{number}"] = _BasicBlock(width_in, width, stride)
    return _named(**layers, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(512, num_classes))


def vgg11(num_classes: int = 10, channels: int = 3, *, batch_norm: bool = True) -> nn.Sequential:
    """Return VGG-11 for 32×32 images, [N, channels, 32, 32] to logits [N, num_classes].

    Simonyan and Zisserman 2014 (arXiv:1409.1556), configuration A. Deviations: batch norm after each
    convolution unless ``batch_norm=False`` (which trains slowly from torch's default weights), and fully
    connected layers of 512 units in place of 4096, since a 32×32 image leaves 512 features.
    """
    layers: dict[str, nn.Module] = {}
    for number, (width_in, width) in enumerate(zip((channels, *VGG11_WIDTHS), VGG11_WIDTHS, strict=False), start=1):
        layers[f"conv{number}"] = _conv(width_in, width)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        if number in VGG11_POOLED:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    for number in (1, 2):
        layers[f"fc{number}"] = nn.Linear(512, 512)
        layers[f"relu{8 + number}"] = nn.ReLU()
        layers[f"dropout{number}"] = nn.Dropout(0.5)
    return _named(**layers, fc3=nn.Linear(512, num_classes))


def ecg_cnn(num_classes: int = 5, length: int = 128) -> nn.Sequential:
    """Return the 1-D CNN of the split-learning ECG papers, [N, 1, length] to logits [N, num_classes].

    Abuadbba et al. 2020 (arXiv:2003.12365), in the two-convolution form of Khan et al. 2023, "Split Ways"
    (arXiv:2301.08778): cut after ``flatten``, where a beat of 128 samples is 256 features (8 · ⌊length / 4⌋
    for others) and one linear layer remains.
    """
    if length < 4:
        raise ValueError(f"expected signals of at least 4 samples, got {length}; two poolings halve the length")
    return _named(
        conv1=nn.Conv1d(1, 16, 7, padding=3),
        relu1=nn.LeakyReLU(),
        pool1=nn.MaxPool1d(2),
        conv2=nn.Conv1d(16, 8, 5, padding=2),
        relu2=nn.LeakyReLU(),
        pool2=nn.MaxPool1d(2),
        flatten=nn.Flatten(),
        fc=nn.Linear(8 * (length // 4), num_classes),
    )


def mlp(num_features: int, num_classes: int = 2, hidden: Sequence[int] = (64, 32)) -> nn.Sequential:
    """Return a multilayer perceptron for tables, [N, num_features] to logits [N, num_classes]."""
    if not hidden:
        raise ValueError("expected at least one hidden width, got none; a single layer cannot be cut: hidden=(64,)")
    layers: dict[str, nn.Module] = {}
    widths = (num_features, *hidden)
    for number, width in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(widths[number - 1], width)
        layers[f"relu{number}"] = nn.ReLU()
    layers[f"fc{len(widths)}"] = nn.Linear(widths[-1], num_classes)
    return _named(**layers)


def token_transformer(
    vocab_size: int, num_classes: int, length: int, width: int = 64, depth: int = 2, heads: int = 4
) -> nn.Sequential:
    """Return a small transformer, tokens [N, ≤ length] (int64, 0 is padding) to logits [N, num_classes].

    Vaswani et al. 2017 (arXiv:1706.03762), the encoder, with layer norm before each part (Xiong et al. 2020,
    arXiv:2002.04745), learned positions, and the mean over the tokens that are not padding.

    One tensor [N, L, width] crosses each cut, without a mask beside it: padding is a row of zeros, and each
    layer reads it off its input again, with room for the error of an int8 code. So whoever sees the activation
    sees how long each text is, and noise at the cut makes padding look like tokens.
    """
    if width % heads:
        raise ValueError(f"expected a width that {heads} heads divide, got {width}; for example {heads * 16}")
    blocks = {f"block{number}": _TransformerBlock(width, heads) for number in range(1, depth + 1)}
    return _named(
        embed=_TokenEmbedding(vocab_size, length, width),
        **blocks,
        pool=_TokenMean(),
        norm=nn.LayerNorm(width),
        fc=nn.Linear(width, num_classes),
    )


MODELS: dict[str, tuple[str, Callable[..., nn.Sequential]]] = {
    "digits_cnn": ("three convolutions and two linear layers for 8×8 images", digits_cnn),
    "cnn28": ("two convolutions and two linear layers for 28×28 images", cnn28),
    "resnet18": ("ResNet-18 for images of 32×32 and larger (He et al. 2015)", resnet18),
    "vgg11": ("VGG-11 with batch norm for 32×32 images (Simonyan and Zisserman 2014)", vgg11),
    "ecg_cnn": ("the 1-D CNN of the split-learning ECG papers (Abuadbba et al. 2020)", ecg_cnn),
    "mlp": ("multilayer perceptron for tables", mlp),
    "token_transformer": ("small transformer encoder over tokens, 0 being padding", token_transformer),
}


def model_for(shape: tuple[int, ...], num_classes: int, kind: str, vocab_size: int | None = None) -> nn.Sequential:
    """Return the zoo's model for samples of ``shape`` (batch left out); ``ValueError`` where none fits.

    ``kind`` is "image" for [C, H, W], "signal" for [1, L], "table" for [F], or "tokens" for [L], which needs
    ``vocab_size``, padding included.
    """
    if num_classes < 2:
        raise ValueError(f"expected at least two classes, got {num_classes}; a classifier needs a choice")
    match kind, shape:
        case "image", (channels, 8, 8):
            return digits_cnn(num_classes, channels)
        case "image", (channels, 28, 28):
            return cnn28(num_classes, channels)
        case "image", (channels, height, width) if min(height, width) >= 32:
            return resnet18(num_classes, channels)
        case "signal", (1, length):
            return ecg_cnn(num_classes, length)
        case "table", (num_features,):
            return mlp(num_features, num_classes)
        case "tokens", (length,):
            if vocab_size is None:
                raise ValueError("expected vocab_size for tokens, got none; give the number of the tokenizer's words")
            return token_transformer(vocab_size, num_classes, length)
    raise ValueError(
        "expected an image [C, 8, 8], [C, 28, 28] or at least [C, 32, 32], a signal [1, L], a table [F] or "
        f"tokens [L]; got kind {kind!r} of shape {tuple(shape)}; resize, or pass an nn.Sequential of your own"
    )


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the input (projected where the shape changes)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = _named(conv=nn.Conv2d(width_in, width, 1, stride, bias=False), bn=nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        h = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(h)) + self.shortcut(x))


class _TokenEmbedding(nn.Module):
    """Tokens [N, L] to rows [N, L, width]: word plus position, and zeros for padding."""

    def __init__(self, vocab_size: int, length: int, width: int):
        super().__init__()
        self.words = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.positions = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows; a text longer than the positions is a ``ValueError``."""
        length, longest = x.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"expected at most {longest} tokens a text, got {length}; cut the texts, or raise length")
        places = torch.arange(length, device=x.device).expand_as(x)
        return (self.words(x) + self.positions(places)) * (x != PADDING).unsqueeze(-1)


class _TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each on normed rows and added to them; padding stays zero.

    Built from linear layers, so that tools which hook into layers (per-sample gradients) know every part.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, L, width] for [N, L, width]."""
        real = _tokens(x)
        x = x + self._attend(self.norm1(x), real)
        x = x + self.down(gelu(self.up(self.norm2(x))))
        return x * real.unsqueeze(-1)

    def _attend(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, L, d]
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        # Not -inf but the least finite number: a text of nothing but padding then gives zeros, not nan.
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class _TokenMean(nn.Module):
    """The mean over the rows that are not padding, [N, L, width] to [N, width]; zeros where all are."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        real = _tokens(x).unsqueeze(-1)
        return (x * real).sum(1) / real.sum(1).clamp(min=1)


def _tokens(x: Tensor) -> Tensor:
    """Return which rows of [N, L, width] are tokens, [N, L]: those that are not (nearly) zero."""
    rows = x.detach().abs().amax(-1)
    return rows > rows.amax(1, keepdim=True) * PADDING_FRACTION


def _conv(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
