"""An attribute of private samples from their activations: a classifier trained on what crosses for own samples.

Song and Shmatikov 2020, "Overlearning reveals sensitive attributes" (arXiv:1905.11742): what is learned for one task
tells of others. Deviations: the activations of own samples are asked for anew in every epoch, so that a guard's noise
is never the same twice; they are standardised, and those of large images averaged over patches; of a linear classifier
and one with a hidden layer, and of their epochs, those are kept that do best on own samples held out.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.inversion.fsha import Inference
from attacks.inversion.reconstruction import seeded
from splitlearn import View

__all__ = ["AttributeInference"]

HELD_OUT = 0.2  # share of the own samples on which network and epoch are chosen
LEAST = 16  # own samples without which nothing can be learned
LARGE = 16_384  # entries of an image's activation above which it is averaged over patches, to learn from few samples
TAIL = 0.1  # share of the epochs at the end over which convergence is judged


@dataclass(frozen=True)
class AttributeInference:
    """Honest but curious server that reads activations, and knows the attribute of samples of its own.

    It asks for the activations of those (``Threat(queries=True)``, or white box). The attribute, 0 to ``classes`` − 1,
    stands where their labels do (``auxiliary_y``), and need not be what the model is trained for. ``widths`` are the
    hidden units of the classifiers that are tried, 0 for a linear one; ``lr`` is the greatest learning rate of the
    cycle.
    """

    classes: int
    widths: tuple[int, ...] = (0, 128)
    epochs: int = 30
    lr: float = 3e-3
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2 or not self.widths or min(self.widths) < 0:
            raise ValueError(
                f"expected an attribute of 2 values or more, and widths of 0 or more, got {self.classes} and "
                f"{self.widths}; what has one value is known"
            )
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"expected at least one epoch, one sample a batch and lr > 0, got {self.epochs}, {self.batch_size} "
                f"and {self.lr}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Inference:
        """Return scores [N, classes] of the samples in predict requests; ``evidence`` holds the held-out accuracy."""
        z = view.activations()
        x, attribute = view.auxiliary_x.to(z.device), view.auxiliary_y.to(z.device)
        if len(x) < LEAST or len(x) != len(attribute):
            raise ValueError(
                f"expected at least {LEAST} own samples, each with its attribute, got {len(x)} and {len(attribute)}; "
                "grant more of them"
            )
        if not 0 <= int(attribute.min()) <= int(attribute.max()) < self.classes:
            raise ValueError(
                f"expected attributes from 0 to {self.classes - 1}, got {int(attribute.min())} to "
                f"{int(attribute.max())}; raise classes"
            )
        with seeded(self.seed, z.device):
            held_out, rest = torch.randperm(len(x)).tensor_split([int(HELD_OUT * len(x))])
            tried = {width: self._train(width, view, x, attribute, held_out, rest) for width in self.widths}
        width = min(tried, key=lambda one: min(tried[one][1]))
        classify, losses, right = tried[width]
        with torch.no_grad():
            scores = torch.cat([classify(part) for part in z.split(256)])
        tail = max(1, int(TAIL * len(losses)))
        return Inference(scores, {
            "width": float(width),
            "held_out_accuracy": right,
            "best_epoch": float(losses.index(min(losses))),
            "converged": float(min(losses[:-tail]) - min(losses) < 0.01 * losses[0]),
        })  # fmt: skip

    def _train(
        self, width: int, view: View, x: Tensor, attribute: Tensor, held_out: Tensor, rest: Tensor
    ) -> tuple[nn.Module, list[float], float]:
        """Return the best epoch's classifier, the held-out loss before and after each epoch, and its accuracy there."""
        classify = _Classify(_asked(view, x[rest]), width, self.classes).to(x.device)
        optimizer = torch.optim.Adam(classify.parameters(), self.lr, weight_decay=1e-4)
        steps = self.epochs * -(-len(rest) // self.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        losses, best, right = [], copy.deepcopy(classify.state_dict()), 0.0
        for epoch in range(self.epochs + 1):
            for rows in rest[torch.randperm(len(rest))].split(self.batch_size) if epoch else ():
                optimizer.zero_grad()
                cross_entropy(classify(view.query(x[rows])), attribute[rows]).backward()
                optimizer.step()
                cycle.step()
            with torch.no_grad():
                scores = classify(_asked(view, x[held_out]))
            losses.append(cross_entropy(scores, attribute[held_out]).item())
            if losses[-1] == min(losses):
                best = copy.deepcopy(classify.state_dict())
                right = (scores.argmax(1) == attribute[held_out]).double().mean().item()
        classify.load_state_dict(best)
        return classify, losses, right


class _Classify(nn.Module):
    """From an activation to scores: patches of a large image, each entry standardised, one hidden layer at most."""

    def __init__(self, z: Tensor, width: int, classes: int):
        super().__init__()
        large = z.ndim == 4 and z[0].numel() > LARGE
        side = max(1, int((LARGE / z.shape[1]) ** 0.5))
        pool: nn.Module = nn.AdaptiveAvgPool2d(side) if large else nn.Identity()
        self.patches = nn.Sequential(pool, nn.Flatten())
        rows = self.patches(z)
        self.center, self.scale = rows.mean(0), rows.std(0) + 0.1 * rows.std() + torch.finfo(rows.dtype).tiny
        hidden = [nn.Linear(rows.shape[1], width), nn.ReLU()] if width else []
        self.layers = nn.Sequential(*hidden, nn.Linear(width or rows.shape[1], classes)).to(rows.dtype)

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.layers((self.patches(z) - self.center) / self.scale)
        return scores


def _asked(view: View, x: Tensor) -> Tensor:
    return torch.cat([view.query(part) for part in x.split(256)])
