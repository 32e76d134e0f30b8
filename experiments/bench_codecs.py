"""How near the entropy coder comes to the entropy, on what a trained bottom really sends."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.training import build_model, load_splits
from splitlearn.codecs import Ans, Uniform, Zstd
from splitlearn.cut import cut
from splitlearn.frames import Codec, Kind
from splitlearn.train import Batches

__all__ = ["entropy_figures", "entropy_nbytes"]

KEY = Kind.ACTIVATION.value
EPOCHS, REPEATS = 5, 9


def entropy_figures() -> dict[str, float]:
    """Return sizes over the empirical entropy, all that crosses but each row's range included, and speed.

    The activation after the first ReLU of a trained digits CNN, for all test images: ``nbytes`` of 8-bit levels.
    ``ansN_over_entropy`` and ``zstdN_over_entropy`` are of N bits, ``exact`` is 1 where all came back as they were;
    ``ans8_over_zstd8_time`` is the time to pack and unpack, medians of one run.
    """
    z = _activation()
    found = {"nbytes": float(z.numel()), "exact": 1.0}
    for bits in (8, 4):
        plain = Uniform(bits)
        least = entropy_nbytes(plain.to_levels(KEY, z)["levels"])
        for name, codec in ((f"ans{bits}", Ans(plain)), (f"zstd{bits}", Zstd(plain))):
            parts = codec.pack(KEY, z)
            ranges = sum(part.nbytes for key, part in parts.items() if key.startswith(("low", "step")))
            found[f"{name}_over_entropy"] = (sum(part.nbytes for part in parts.values()) - ranges) / least
            same = torch.equal(_back(codec, z), _back(plain, z))
            found["exact"] = min(found["exact"], float(same))
    found["ans8_over_zstd8_time"] = _ratio(lambda: _back(Ans(Uniform(8)), z), lambda: _back(Zstd(Uniform(8)), z))
    return found


def entropy_nbytes(levels: Tensor) -> float:
    """Return the empirical entropy of the levels (uint8), all together, in bytes; no code of single levels beats it."""
    shares = levels.flatten().bincount().double() / levels.numel()
    shares = shares[shares > 0]
    return -(shares * shares.log2()).sum().item() * levels.numel() / 8


def _activation() -> Tensor:
    splits = load_splits("digits", None)
    model = build_model(splits, seed=0)
    optimizer = torch.optim.Adam(model.parameters())
    batches = Batches(splits.private.x, splits.private.y, batch_size=32)
    for _ in range(EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        return cut(model, "relu1")[0](splits.test.x)


def _back(codec: Codec, z: Tensor) -> Tensor:
    return codec.unpack(codec.pack(KEY, z), z.dtype, tuple(z.shape))


def _ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for call, seconds in zip((first, second), taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(taken[0]) / median(taken[1])
