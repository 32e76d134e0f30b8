"""Canaries for DP-SGD: mislabelled samples that are in or out by the toss of a coin, looked for in every update."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from privacy.dp import PoissonBatches, PrivateLearner
from privacy.dp.one_run import OneRun, one_run_bound
from splitlearn.data import Splits
from splitlearn.protocols import vanilla

__all__ = ["audited_in_one_run"]

KNOWN = 1000  # private samples at most that the attacker takes into account
Build = Callable[[Tensor, Tensor], tuple[PrivateLearner, PrivateLearner, PoissonBatches]]


def audited_in_one_run(
    build: Build,
    model: nn.Sequential,
    splits: Splits,
    steps: int,
    *,
    canaries: int,
    delta: float,
    seed: int,
    device: str,
    confidence: float = 0.95,
) -> OneRun:
    """Return a lower bound on the ε of DP-SGD on both stages, from one training of its own.

    ``build(x, y)`` makes the parties and batches over private samples and the canaries that are in. Canaries are
    auxiliary inputs under wrong labels. The attacker sees the weights after every step, which the proof of DP-SGD
    allows, knows all samples but not which of the canaries are in, and adds up over the steps how surely each took
    part. ``model`` is both stages as one sequence of two, any weights, with a linear layer at least. Both are trained
    by plain SGD under the same clip and noise.
    """
    generator = torch.Generator().manual_seed(seed + 31)
    auxiliary, private = splits.auxiliary, splits.private
    canaries = min(canaries, len(auxiliary))
    rows = torch.randperm(len(auxiliary), generator=generator)[:canaries]
    shift = torch.randint(1, auxiliary.num_classes, (canaries,), generator=generator)
    x, y = auxiliary.x[rows], (auxiliary.y[rows] + shift) % auxiliary.num_classes
    included = torch.rand(canaries, generator=generator) < 0.5
    client, server, batches = build(torch.cat([private.x, x[included]]), torch.cat([private.y, y[included]]))
    known = torch.randperm(len(private), generator=generator)[:KNOWN]
    all_x, all_y = torch.cat([x, private.x[known]]).to(device), torch.cat([y, private.y[known]]).to(device)
    # A canary takes part where it is in and then is drawn.
    rates = torch.tensor([batches.rate / 2] * canaries + [batches.rate] * len(known), dtype=torch.float64)
    scores, made, start = torch.zeros(canaries, dtype=torch.float64), 0, _joined(client, server)
    assert client.optimizer is not None
    lr = client.optimizer.param_groups[0]["lr"]
    while made < steps:
        for part, labels in batches:
            vanilla(client, server, part, labels)
            if client.steps == made:
                continue  # a part of a batch that goes on
            made, after = client.steps, _joined(client, server)
            summed = {name: (start[name] - after[name]) * (client.expected_batch_size / lr) for name in start}
            scores += _participation(
                model, start, summed, all_x, all_y, clip=client.clip, noise=client.noise_multiplier * client.clip,
                rates=rates,
            )[:canaries]  # fmt: skip
            start = after
            if made == steps:
                break
    return one_run_bound(scores, included, delta=delta, confidence=confidence)


def _joined(client: PrivateLearner, server: PrivateLearner) -> dict[str, Tensor]:
    stages = nn.Sequential(client.stage, server.stage)
    return {name: parameter.detach().clone() for name, parameter in stages.named_parameters()}


def _participation(
    model: nn.Module,
    start: dict[str, Tensor],
    summed: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    clip: float,
    noise: float,
    rates: Tensor,
) -> Tensor:
    """Return, [n], the best linear estimate of whether each sample took part in a noised sum of clipped gradients.

    Of the sum it reads the weights of linear layers, where the inner product of two samples' gradients is that of their
    inputs times that of their output gradients. Each stage of ``model``, a sequence of them, is clipped on its own.
    ``noise`` is the standard deviation of each entry. Samples take part with probabilities ``rates``;
    who did is estimated for all at once, so that those with similar gradients explain each other.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = given[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        model.load_state_dict(start, strict=False)
        loss = cross_entropy(model(x), y, reduction="sum")
    finally:
        for hook in hooks:
            hook.remove()
    gradients = dict(zip(layers, torch.autograd.grad(loss, [outputs[name] for name in layers]), strict=True))
    gram, along = torch.zeros(len(x), len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    stages: dict[str, list[str]] = {}
    for name in layers:
        stages.setdefault(name.partition(".")[0], []).append(name)
    for names in stages.values():  # each party clips its own part of a sample's gradient
        inner, toward = torch.zeros_like(gram), torch.zeros_like(along)
        for name in names:
            a, g = (part.double().cpu().reshape(len(x), -1) for part in (inputs[name], gradients[name]))
            bias = layers[name].bias is not None  # the weight of a constant 1
            inner += (a @ a.T + bias) * (g @ g.T)
            toward += ((g @ summed[f"{name}.weight"].double().cpu()) * a).sum(1)
            if bias:
                toward += g @ summed[f"{name}.bias"].double().cpu()
        factor = (clip / inner.diagonal().sqrt()).clamp(max=1.0)  # as if these layers were all of its stage
        gram += inner * factor[:, None] * factor
        along += toward * factor
    spread = (rates * (1 - rates)).sqrt()  # 0 where nobody doubts who took part
    known = spread[:, None] * gram * spread + noise**2 * torch.eye(len(x), dtype=torch.float64)
    return rates + spread * torch.linalg.solve(known, spread * (along - gram @ rates))
