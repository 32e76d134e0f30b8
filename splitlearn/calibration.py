"""Calibration: the constants of the cost model for the present machine, fitted to timed stages of random shapes."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from splitlearn.cost import Layer, constant, count, units
from splitlearn.devices import DEVICES, Device

__all__ = ["Stage", "calibrate", "fit", "fitted", "stages", "timed"]

NUM_STAGES = 250
MAX_FLOPS, MAX_MOVED = 6e8, 4e7  # of a stage's forward pass, so that all take seconds, not minutes
ROUNDS, REPEATS = 4, 3
IMAGES = (  # channels and size: of data sets, and of activations inside common networks
    *((1, 8), (1, 28), (1, 28), (3, 32), (3, 32), (16, 8), (16, 14), (32, 14), (32, 8), (32, 16), (64, 16), (64, 32)),
    *((64, 8), (128, 8), (128, 4)),
)
PASSES = 20  # of reweighting
NEAR = 0.05  # relative errors below this are as good as none: the timing is no better
SETTLING_NBYTES = 31 * 2**20  # just below where glibc always asks the kernel for memory


@dataclass(frozen=True)
class Stage:
    """A stage to time: counted ``layers`` of ``model`` on ``x``; ``below`` where there are layers below that learn."""

    model: nn.Sequential
    x: Tensor
    layers: tuple[Layer, ...]
    below: bool = False

    def units(self, *, training: bool) -> dict[str, float]:
        """Return its units of work, of the forward pass or of a training step."""
        return units(self.layers, training=training)


def calibrate(*, seed: int = 0, threads: int = 1, like: Device = DEVICES["laptop"]) -> Device:
    """Return the present machine as a device: rates, and factors for the kinds of work, fitted to timed stages.

    Takes about a minute of one processor. Times are of forward passes without gradient, and of forward and
    backward without the optimizer, at batches of 2 to 128; torch takes other ways for convolutions of one sample.
    Power cannot be measured here and is that of ``like``. One thread is timed in seconds of the processor, so that
    what else runs on the machine counts little; several in seconds that pass, which wants an idle machine.
    """
    trials = stages(seed)
    seconds = timed(trials, threads=threads)
    return fitted(trials, seconds, like=like, threads=threads)


def stages(seed: int, num: int = NUM_STAGES) -> list[Stage]:
    """Return random small stages: convolutions of images and signals, linear stacks, attention, chains of functions."""
    random, made = Random(seed), list[Stage]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(made) < num:
            make = MAKERS[len(made) % len(MAKERS)]
            model, x = make(random)
            learns = any(True for _ in model.parameters())
            below = x.is_floating_point() and (
                random.random() < 0.6 or not learns
            )  # else nothing would take a gradient
            layers = count(model, x)
            if sum(sum(layer.flops.values()) for layer in layers) > MAX_FLOPS:
                continue
            if sum(layer.moved for layer in layers) > MAX_MOVED:
                continue
            if below:
                layers = above(layers)
            made.append(Stage(model, x, tuple(layers), below))
    return made


def above(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers as they count above layers that learn: a gradient goes on to the input of each kernel."""
    return [replace(layer, kernels=tuple(replace(kernel, passes=True) for kernel in layer.kernels)) for layer in layers]


def timed(
    trials: Sequence[Stage], *, threads: int = 1, rounds: int = ROUNDS, repeats: int = REPEATS
) -> list[tuple[float, float]]:
    """Return each stage's seconds, forward and of a training step: the least of all repeats, rounds interleaved."""
    jobs = [job for stage in trials for job in (_forward(stage), _step(stage))]
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = [float("inf")] * len(jobs)
    with _threads(threads), torch.random.fork_rng(devices=[]):
        _settle_memory()
        for job in jobs:
            job()
        for _ in range(rounds):
            for number, job in enumerate(jobs):
                for _ in range(repeats):
                    start = clock()
                    job()
                    best[number] = min(best[number], clock() - start)
    return list(zip(best[::2], best[1::2], strict=True))


def fit(features: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Return seconds a unit ≥ 0 of each feature, so that Σ units · seconds a unit is near each of ``seconds``.

    Non-negative least squares on relative errors, reweighted so that it is their sizes, not squares, that add up:
    some shapes are far from what any sum of rates gives, and should not draw all others along.
    """
    if len(features) != len(seconds) or not len(seconds):
        raise ValueError(f"expected a time for each set of features, got {len(features)} and {len(seconds)}")
    if not min(seconds) > 0:
        raise ValueError(f"expected seconds > 0, got {min(seconds)}; time what takes longer than the clock's tick")
    names = sorted({name for row in features for name in row})
    work = np.array([[row.get(name, 0.0) for name in names] for row in features]) / np.array(seconds)[:, None]
    size = np.linalg.norm(work, axis=0)
    work = work / size
    weights = np.ones(len(seconds))
    for _ in range(PASSES):
        solution, _ = nnls(work * weights[:, None], weights)
        predicted = np.maximum(work @ solution, 1e-3)
        weights = 1 / np.sqrt(np.maximum(np.abs(np.log(predicted)), NEAR) * predicted)
    return dict(zip(names, (solution / size).tolist(), strict=True))


def fitted(
    trials: Sequence[Stage], seconds: Sequence[tuple[float, float]], *, like: Device, threads: int = 1
) -> Device:
    """Return the device whose constants fit the stages' seconds best: plain ones over all, factors a kind of work."""
    features = [stage.units(training=training) for stage in trials for training in (False, True)]
    times = [value for pair in seconds for value in pair]
    plain = fit([_plain(row) for row in features], times)
    missing = [name for name, value in plain.items() if not value]
    if missing:
        raise RuntimeError(f"could not tell the cost of {', '.join(missing)} from these times; measure again, idle")
    rates = {name: 1 / plain[name] for name in ("convolution", "linear", "moved")}
    fine = {
        **fit(features[::2], times[::2]),
        **fit(features[1::2], times[1::2]),
    }
    return replace(
        like,
        name="this machine",
        **rates,
        overhead=plain["overhead"],
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        source=f"measured: {len(trials)} random stages on {threads} thread(s) of the present machine; watts not "
        f"measured but those of {like.name}",
        modelled=False,
        factors={unit: value / plain[constant(unit)] for unit, value in fine.items()},
    )


def _plain(row: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for unit, amount in row.items():
        total[constant(unit)] = total.get(constant(unit), 0.0) + amount
    return total


def _forward(stage: Stage) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            stage.model(stage.x)

    return run


def _step(stage: Stage) -> Callable[[], None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        g = torch.ones_like(stage.model(stage.x))

    def run() -> None:
        stage.model.zero_grad()
        x = stage.x.detach().requires_grad_() if stage.below else stage.x
        stage.model(x).backward(g)

    return run


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settle_memory() -> None:
    """Bring glibc's allocator to where it ends up in any process that has run a while: it then keeps large blocks.

    Before, every large tensor is asked of the kernel and given back, which takes longer than what is computed on it.
    """
    for _ in range(2):
        torch.empty(SETTLING_NBYTES, dtype=torch.uint8).fill_(0)


def _batch(random: Random) -> int:
    return random.choice((2, 4, 8, 16, 32, 64, 128))


def _images(random: Random) -> tuple[nn.Sequential, Tensor]:
    batch = _batch(random)
    channels, size = random.choice(IMAGES)
    x = torch.rand(batch, channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(random.choice((1, 1, 2))):
        width, kernel = random.choice((16, 32, 64, 128)), random.choice((3, 3, 3, 3, 5, 1))
        stride = random.choice((1, 1, 1, 2))
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=random.random() < 0.7))
        channels, size = width, (size + stride - 1) // stride
        if random.random() < 0.4:
            layers.append(nn.BatchNorm2d(channels))
        if random.random() < 0.8:
            layers.append(nn.ReLU())
            if random.random() < 0.5 and size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
    return nn.Sequential(*layers), x


def _wide_images(random: Random) -> tuple[nn.Sequential, Tensor]:
    """Convolutions whose weights are large beside their images, as they are late in a network."""
    channels, size = random.choice(((128, 8), (256, 8), (256, 4), (512, 4), (512, 2)))
    x = torch.rand(random.choice((2, 4, 4, 8, 16)), channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(random.choice((1, 2, 4))):  # four are more than a processor's cache
        width = random.choice((256, 512, 512))
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers), x


def _signals(random: Random) -> tuple[nn.Sequential, Tensor]:
    batch, channels, length = _batch(random), random.choice((1, 1, 16, 32, 64)), random.choice((32, 64, 128, 256))
    x = torch.rand(batch, channels, length)
    layers: list[nn.Module] = []
    for _ in range(random.choice((1, 2))):
        width, kernel = random.choice((8, 16, 32, 64)), random.choice((3, 5, 7))
        layers.append(nn.Conv1d(channels, width, kernel, padding=kernel // 2))
        channels = width
        if random.random() < 0.8:
            layers.append(random.choice((nn.ReLU, nn.LeakyReLU))())
            if random.random() < 0.6:
                layers.append(nn.MaxPool1d(2))
    return nn.Sequential(*layers), x


def _pools(random: Random) -> tuple[nn.Sequential, Tensor]:
    channels, length = random.choice((8, 16, 32)), random.choice((64, 128, 256))
    if random.random() < 0.5:
        return nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)), torch.randn(_batch(random), channels, length)
    return nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), torch.randn(_batch(random), channels, length // 8, length // 8)


def _linears(random: Random) -> tuple[nn.Sequential, Tensor]:
    batch, width = _batch(random), random.choice((16, 32, 64, 128, 256, 512, 1024, 2048))
    x = torch.rand(batch, width)
    layers: list[nn.Module] = []
    for _ in range(random.choice((0, 1, 2))):
        after = random.choice((16, 32, 64, 128, 256, 512, 1024))
        layers += [nn.Linear(width, after), nn.ReLU()]
        width = after
        if random.random() < 0.2:
            layers.append(nn.Dropout(0.5))
    layers.append(nn.Linear(width, random.choice((2, 4, 10, 16, 64, 128))))
    return nn.Sequential(*layers), x


class _Attention(nn.Module):
    """Self-attention over those rows of [N, L, width] that are not zero, added to them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, L, width]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        empty = x.detach().abs().amax(-1) == 0
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(empty[:, None, None, :], -1e9)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _attention(random: Random) -> tuple[nn.Sequential, Tensor]:
    width, heads = random.choice(((32, 2), (64, 2), (64, 4), (96, 4), (128, 4), (128, 8)))
    x = torch.rand(_batch(random), random.choice((16, 24, 32, 48, 64)), width)
    layers: list[nn.Module] = [nn.LayerNorm(width), _Attention(width, heads)]
    if random.random() < 0.7:
        layers += [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers), x


def _functions(random: Random) -> tuple[nn.Sequential, Tensor]:
    width = random.choice((32, 64, 128, 256, 512))
    x = torch.randn(_batch(random), random.choice((1, 8, 32, 64)), width)
    makes: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.ReLU, nn.GELU, nn.LeakyReLU, nn.Dropout)
    layers = [random.choice(makes)() for _ in range(random.choice((1, 2, 4)))]
    layers.insert(0, nn.LayerNorm(width) if random.random() < 0.6 else nn.Linear(width, width))
    return nn.Sequential(*layers), x


def _words(random: Random) -> tuple[nn.Sequential, Tensor]:
    words, width = random.choice((200, 1000, 4000)), random.choice((32, 64, 128))
    x = torch.randint(0, words, (_batch(random), random.choice((16, 32, 64))))
    layers: list[nn.Module] = [nn.Embedding(words, width)]
    if random.random() < 0.5:
        layers += [nn.Flatten(), nn.ReLU()]
    return nn.Sequential(*layers), x


MAKERS = (_images, _linears, _wide_images, _images, _signals, _attention, _linears, _functions, _images, _words, _pools)
