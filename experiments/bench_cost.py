"""How well the cost model tells seconds on this machine: models and cuts that it was not fitted on, beside measured."""

import copy
import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from splitlearn.calibration import Stage, fitted, stages, timed
from splitlearn.cost import compute_seconds, count
from splitlearn.cut import cut
from splitlearn.devices import DEVICES
from splitlearn.models import cnn28, digits_cnn, ecg_cnn, mlp, resnet18, token_transformer, vgg11

__all__ = ["cost_model_figures"]

WITHIN = 1.2  # within 20 %, either way
CUTS_A_MODEL = 4


def cost_model_figures(*, seed: int = 0) -> dict[str, float]:
    """Return predicted over measured seconds of stages below and above several cuts, forward and for a training step.

    ``within_20`` is the share between 1/1.2 and 1.2, over all and by the model (``MODEL_within_20``); ``median``,
    ``lowest`` and ``highest`` ratios alike; ``digits_cnn_b32_conv2_above_step`` and so on are single ratios. All stages
    are timed in the same rounds as those of the calibration, on one thread, in seconds of the processor.
    ``fitted_within_20`` is the share among the stages that the constants were fitted to; ``reference_drift`` the ratio
    of the times of one of them, early and late in the list of each round: how steady the machine was.
    """
    fitting, checks = stages(seed), dict(_checks(seed))
    ends = [fitting[0], *fitting, *checks.values(), fitting[0]]
    seconds = timed(ends)
    first, last = seconds[0], seconds[-1]
    fits, measured = seconds[1 : 1 + len(fitting)], seconds[1 + len(fitting) : -1]
    device = fitted(fitting, fits, like=DEVICES["laptop"])
    ratios: dict[str, float] = {}
    for (name, stage), pair in zip(checks.items(), measured, strict=True):
        for kind, training, value in (("forward", False, pair[0]), ("step", True, pair[1])):
            ratios[f"{name}_{kind}"] = compute_seconds(stage.layers, device, training=training) / value
    figures = _summary("", list(ratios.values()))
    for model in _models():
        figures |= _summary(f"{model}_", [ratio for name, ratio in ratios.items() if name.startswith(f"{model}_")])
    inside = [
        compute_seconds(stage.layers, device, training=training) / value
        for stage, pair in zip(fitting, fits, strict=True)
        for training, value in ((False, pair[0]), (True, pair[1]))
    ]
    figures["fitted_within_20"] = _share(inside)
    figures["reference_drift"] = math.sqrt(last[0] * last[1] / first[0] / first[1])
    return figures | ratios


def _models() -> dict[str, tuple[nn.Sequential, Tensor]]:
    """Return models that no constant is fitted on.

    The kinds of work that the model tells apart were chosen with all but the last two at hand, which were first timed
    when it was settled.
    """
    tokens = torch.randint(1, 1000, (32, 32))
    return {
        "digits_cnn_b32": (digits_cnn(), torch.rand(32, 1, 8, 8)),
        "cnn28_b64": (cnn28(), torch.rand(64, 1, 28, 28)),
        "ecg_cnn_b32": (ecg_cnn(), torch.rand(32, 1, 128)),
        "mlp_b64": (mlp(30), torch.rand(64, 30)),
        "token_transformer_b32": (token_transformer(1000, 4, 32), tokens),
        "vgg11_b4": (vgg11(), torch.rand(4, 3, 32, 32)),
        "resnet18_b4": (resnet18(), torch.rand(4, 3, 32, 32)),
        "lenet5_b32": (_lenet5(), torch.rand(32, 1, 28, 28)),
        "mlp_wide_b128": (mlp(784, 10, (1000, 300)), torch.rand(128, 784)),
        "all_cnn_b16": (_all_cnn(), torch.rand(16, 3, 32, 32)),
        "encoder_b16": (_encoder(), torch.rand(16, 40, 96)),
    }


def _lenet5() -> nn.Sequential:
    """LeCun et al. 1998, with max pooling and ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _all_cnn() -> nn.Sequential:
    """Springenberg et al. 2015 (arXiv:1412.6806), at half the width: strides in place of pooling."""
    shapes = ((3, 48, 1), (48, 48, 1), (48, 48, 2), (48, 96, 1), (96, 96, 1), (96, 96, 2))
    layers = [layer for a, b, stride in shapes for layer in (nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(96, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _encoder() -> nn.Sequential:
    """Two of torch's own transformer layers over rows of features, and a linear layer over what they put out."""
    blocks = [nn.TransformerEncoderLayer(96, 3, 192, batch_first=True) for _ in range(2)]
    return nn.Sequential(nn.Linear(96, 96), *blocks, nn.Flatten(), nn.Linear(40 * 96, 5))


def _checks(seed: int) -> Iterator[tuple[str, Stage]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = _models()
    for name, (model, x) in models.items():
        layers = count(model, x)
        places = sorted({max(1, round(share * len(model) / CUTS_A_MODEL)) for share in range(1, CUTS_A_MODEL)})
        for at in places:
            bottom, top = cut(copy.deepcopy(model), at)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                z = bottom(x)
            place = f"{name}_{layers[at - 1].name}"
            yield f"{place}_below", Stage(bottom, x, tuple(layers[:at]))
            yield f"{place}_above", Stage(top, z, tuple(layers[at:]), below=True)


def _summary(prefix: str, ratios: Sequence[float]) -> dict[str, float]:
    return {
        f"{prefix}within_20": _share(ratios),
        f"{prefix}median": statistics.median(ratios),
        f"{prefix}lowest": min(ratios),
        f"{prefix}highest": max(ratios),
    }


def _share(ratios: Sequence[float]) -> float:
    return sum(1 / WITHIN <= ratio <= WITHIN for ratio in ratios) / len(ratios)
