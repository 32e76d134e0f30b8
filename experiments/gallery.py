"""Private samples beside what each attack made of them: the rows of the pictures in plot and report."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from torch import Tensor

from experiments.record import Leakage, Record
from experiments.store import Store
from experiments.summary import Setting, summarise

__all__ = ["Row", "gallery", "strip"]


@dataclass(frozen=True)
class Row:
    """A row of samples: the originals (``attack`` is empty), or what one attack reconstructed of them."""

    setting: Setting
    seed: int
    title: str
    attack: str
    scores: str
    images: Tensor  # [n, 1 or 3, H, W] in [0, 1]
    worst: bool  # the originals, and each configuration's best reconstruction


def gallery(records: Iterable[Record], store: Store, *, samples: int = 8) -> list[Row]:
    """Return originals, each followed by every attack on every configuration, from its first seed with images.

    Where configurations attacked different samples, each keeps its own originals.
    """
    rows: list[Row] = []
    shown: tuple[Setting, bytes] | None = None
    for point in summarise(records):
        kept = ((record, store.images(record.trial)) for record in point.records)
        record, images = next(((record, images) for record, images in kept if images), (None, {}))
        if record is None:
            continue
        original = images["original"][:samples]
        if (block := (point.setting, original.numpy().tobytes())) != shown:
            shown = block
            rows.append(Row(point.setting, record.seed, "private samples", "", "", original, True))
        leaks = {leak.attack: leak for leak in sorted(record.leakage, key=lambda leak: -leak.advantage)}
        attacks = [name for name in leaks if name in images]
        attacks += sorted(name for name in images if name != "original" and name not in leaks)
        for attack in attacks:
            scores = _scores(leaks[attack]) if attack in leaks else ""
            made = images[attack][:samples]
            rows.append(Row(point.setting, record.seed, point.name, attack, scores, made, attack == attacks[0]))
    return rows


def strip(images: Tensor) -> NDArray[numpy.uint8]:
    """Return the samples side by side as one RGBA picture, [H, width, 4], with transparent gaps between them."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    n, _, height, width = pixels.shape
    gap = max(1, width // 8)
    picture = numpy.zeros((height, n * (width + gap) - gap, 4), dtype=numpy.uint8)
    for number, sample in enumerate(pixels.expand(n, 3, height, width).permute(0, 2, 3, 1).numpy()):
        left = number * (width + gap)
        picture[:, left : left + width, :3] = sample
        picture[:, left : left + width, 3] = 255
    return picture


def _scores(leak: Leakage) -> str:
    median = "ssim_q50" in leak.metrics
    named = {"mse": "MSE", "ssim_q50" if median else "ssim": "median SSIM" if median else "SSIM"}
    return " · ".join(f"{told} {leak.metrics[name]:.3g}" for name, told in named.items() if name in leak.metrics)
