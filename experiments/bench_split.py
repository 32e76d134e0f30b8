"""What splitting costs in time: a vanilla step over real frames against the same step unsplit, paired in one run."""

import copy
import statistics
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.timing import Step, median_ratio, paired_seconds
from splitlearn.cut import cut
from splitlearn.frames import Message, encode
from splitlearn.models import digits_cnn, resnet18
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.wire import Framed, serve

__all__ = ["split_overhead"]


def split_overhead(*, digits_rounds: int = 400, resnet_rounds: int = 8) -> dict[str, Any]:
    """Return time ratios of one training step, and the bytes that a frame adds to a 64 KB activation.

    ``ratio_resnet18_b32``: split over unsplit. ``ratio_digits_b64``: split over a bare loop of the same stages
    with safetensors frames; ``ratio_digits_bare``: that bare loop over unsplit. Each is the median over rounds
    of the ratio of neighbouring steps; frames are encoded and decoded in all of them.
    """
    digits = _ratios(digits_cnn(), "relu2", torch.rand(64, 1, 8, 8), digits_rounds)
    resnet = _ratios(resnet18(), "block2", torch.rand(32, 3, 32, 32), resnet_rounds)
    activation = torch.rand(64, 256)
    frame = encode(Message("forward", {"activation": activation}, "server", 1))
    return {
        "ratio_resnet18_b32": resnet["split_over_unsplit"],
        "ratio_digits_b64": digits["split_over_bare"],
        "ratio_digits_bare": digits["bare_over_unsplit"],
        "frame_overhead_64k": len(frame) / (activation.numel() * activation.element_size()) - 1,
        "digits_split_over_unsplit": digits["split_over_unsplit"],
        "resnet18_split_over_bare": resnet["split_over_bare"],
        "digits_unsplit_ms": digits["unsplit_ms"],
        "resnet18_unsplit_ms": resnet["unsplit_ms"],
        "threads": torch.get_num_threads(),
    }


def _ratios(model: nn.Sequential, at: str, x: Tensor, rounds: int) -> dict[str, float]:
    y = torch.randint(0, 10, (len(x),))
    steps = {
        "unsplit": _unsplit(copy.deepcopy(model), x, y),
        "bare": _bare(copy.deepcopy(model), at, x, y),
        "split": _split(copy.deepcopy(model), at, x, y),
    }
    seconds = paired_seconds(steps, rounds)
    return {
        "split_over_unsplit": median_ratio(seconds["split"], seconds["unsplit"]),
        "split_over_bare": median_ratio(seconds["split"], seconds["bare"]),
        "bare_over_unsplit": median_ratio(seconds["bare"], seconds["unsplit"]),
        "unsplit_ms": 1000 * statistics.median(seconds["unsplit"]),
    }


def _optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=0.01, momentum=0.9)


def _unsplit(model: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _bare(model: nn.Sequential, at: str, x: Tensor, y: Tensor) -> Step:
    """What a careful user would write by hand: two stages, two optimizers, safetensors in between."""
    bottom, top = cut(model, at)
    below, above = _optimizer(bottom), _optimizer(top)

    def step() -> None:
        sent = bottom(x)
        request = safetensors.torch.load(safetensors.torch.save({"activation": sent.detach(), "label": y}))
        z = request["activation"].requires_grad_()
        above.zero_grad()
        loss = cross_entropy(top(z), request["label"])
        loss.backward()
        above.step()
        assert z.grad is not None
        reply = safetensors.torch.load(safetensors.torch.save({"gradient": z.grad, "loss": loss.detach()}))
        below.zero_grad()
        sent.backward(reply["gradient"])
        below.step()

    return step


def _split(model: nn.Sequential, at: str, x: Tensor, y: Tensor) -> Step:
    bottom, top = cut(model, at)
    client = Learner("client", bottom, _optimizer(bottom))
    service = Service({"server": Learner("server", top, _optimizer(top))})
    server = Remote("server", Framed(serve(service)), "server")
    return lambda: vanilla(client, server, x, y)
