"""What one server answers on its half of the shares. Only the servers' processes import this.

Each request comes to both servers; they answer it together, over CrypTen's own sockets where it takes a product.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from privacy.mpc.evaluation import Clock, Evaluated, fresh, of_share, softmax
from privacy.mpc.layers import Layer, plain_stage
from privacy.mpc.seat import crypten, exact_truncation
from privacy.mpc.sharing import held
from splitlearn.frames import Kind
from splitlearn.misfit import MISFITS, why_no_output
from splitlearn.service import Answer, keyed, need
from splitlearn.settings import settings_of

__all__ = ["Desk", "Stage"]

Tensors = Mapping[str, Tensor]


class Stage:
    """One stage on shares, and the sessions of those who share activations into it."""

    def __init__(self, name: str, evaluated: Evaluated, clock: Clock):
        self.name, self._evaluated, self._clock = name, evaluated, clock
        self._plain = plain_stage(evaluated.layers)
        self._fits: torch.Size | None = None  # the last shape that did
        self.offered: dict[str, Tensor] = {}  # activations that wait for a joint step, by session
        self.owed: dict[str, Tensor] = {}  # gradients of them
        self.answers: Mapping[str, Answer] = {
            "forward": self._forward, "backward": self._backward, "learn": self._learn, "predict": self._predict,
            "weights": self._weights, "load_weights": self._load, "learn_joined": self._learn_joined,
            "predict_joined": self._predict_joined, "abandon": self._abandon,
        }  # fmt: skip

    def _forward(self, tensors: Tensors) -> dict[str, Tensor]:
        out = self._evaluated.forward(self._fitting(held(tensors)["x"]), keep=True)
        return {f"{Kind.SHARE}/out": fresh(out)}

    def _backward(self, tensors: Tensors) -> dict[str, Tensor]:
        if not self._evaluated.open:
            raise ValueError(f"{self.name}: expected an open step, begun by forward")
        told, g = settings_of(need(tensors, Kind.PARAMETERS)), held(tensors)["g"]
        if g.shape != self._evaluated.out_shape:
            raise ValueError(
                f"{self.name}: expected a gradient of shape {tuple(self._evaluated.out_shape)}, got {tuple(g.shape)}"
            )
        g = self._evaluated.backward(of_share(g))
        self._step(told)
        return {f"{Kind.SHARE}/g": fresh(g)} if told["wanted"] else {}

    def _learn(self, tensors: Tensors) -> dict[str, Tensor]:
        own, told = held(tensors), settings_of(need(tensors, Kind.PARAMETERS))
        g, loss = self._learned(self._fitting(own["x"]), own["y"], told)
        return {**({f"{Kind.SHARE}/g": fresh(g)} if told["wanted"] else {}), **loss}

    def _learn_joined(self, tensors: Tensors) -> dict[str, Tensor]:
        own, told = held(tensors), settings_of(need(tensors, Kind.PARAMETERS))
        parts = self._taken(told["sessions"])
        g, loss = self._learned(self._fitting(self._side_by_side(parts)), own["y"], told)
        sizes = [part.shape[-1] for part in parts.values()]
        self.owed = {name: share.contiguous() for name, share in zip(parts, fresh(g).split(sizes, -1), strict=True)}
        return loss

    def _predict_joined(self, tensors: Tensors) -> dict[str, Tensor]:
        parts = self._taken(settings_of(need(tensors, Kind.PARAMETERS))["sessions"])
        x = self._fitting(self._side_by_side(parts))
        return {f"{Kind.SHARE}/out": fresh(self._evaluated.forward(x, keep=False))}

    def _predict(self, tensors: Tensors) -> dict[str, Tensor]:
        return {f"{Kind.SHARE}/out": fresh(self._evaluated.forward(self._fitting(held(tensors)["x"]), keep=False))}

    def _weights(self, _: Tensors) -> dict[str, Tensor]:
        """Answer whoever opened this stage: its weights, and what momentum they have, are his."""
        own = {f"weights/{name}": fresh(of_share(share)) for name, share in self._evaluated.masters.items()}
        moving = {f"momentum/{n}": fresh(of_share(share)) for n, share in self._evaluated.momentum.items()}
        return keyed({**own, **moving}, Kind.SHARE)

    def _load(self, tensors: Tensors) -> dict[str, Tensor]:
        own = held(tensors)
        weights = {name.partition("/")[2]: share for name, share in own.items() if name.startswith("weights/")}
        _check_weights(self._evaluated.layers, weights)
        momentum = {n.partition("/")[2]: s for n, s in own.items() if n.startswith("momentum/")}
        if any(n not in weights or s.shape != weights[n].shape for n, s in momentum.items()):
            raise ValueError(f"{self.name}: expected momentum of its own weights")
        self._evaluated.load(weights)
        self._evaluated.momentum = momentum
        self._evaluated.abandon()
        return {}

    def _abandon(self, _: Tensors) -> dict[str, Tensor]:
        self._evaluated.abandon()
        self.offered, self.owed = {}, {}
        return {}

    def _learned(self, x: Tensor, y: Tensor, told: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Return the gradient of the loss summed over the batch, and that sum where it is to be revealed."""
        out = self._evaluated.forward(x, keep=True)
        if y.shape != out.size():
            self._evaluated.abandon()
            raise ValueError(f"{self.name}: expected one label a sample of {out.size(1)} classes, got {tuple(y.shape)}")
        target = of_share(y)
        with self._clock.on("softmax"), exact_truncation(), crypten.no_grad():
            answers = softmax(out)
            g = answers.sub(target)
        loss: dict[str, Tensor] = {}
        if told["loss"]:
            with self._clock.on("loss"), exact_truncation(), crypten.no_grad():
                right = answers.mul(target).sum(1)
                loss = {f"{Kind.SHARE}/loss": fresh(right.log(input_in_01=True).neg().sum())}
        g = self._evaluated.backward(g)
        self._step(told)
        return g, loss

    def _step(self, told: Mapping[str, Any]) -> None:
        if told["rate"]:
            self._evaluated.step(told["rate"], told["momentum"])

    def _taken(self, sessions: list[str]) -> dict[str, Tensor]:
        if missing := [name for name in sessions if name not in self.offered]:
            raise ValueError(f"{self.name}: expected activations of {', '.join(missing)}, got none; offer them first")
        taken, self.offered, self.owed = {name: self.offered[name] for name in sessions}, {}, {}
        return taken

    def _side_by_side(self, parts: Mapping[str, Tensor]) -> Tensor:
        try:
            return torch.cat(list(parts.values()), -1)
        except MISFITS as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts.values())
            raise ValueError(f"{self.name}: expected activations of the same samples, got {shapes}") from error

    def _fitting(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or not x.numel():
            raise ValueError(f"{self.name}: expected at least one sample, got shape {tuple(x.shape)}")
        if x.shape != self._fits:
            try:
                self._plain(torch.empty(x.shape, device="meta"))
            except MISFITS as error:
                raise ValueError(f"{self.name}: {why_no_output(x.float(), error)}") from error
            self._fits = x.shape
        return x


class Client:
    """The session of one who did not open the stage: his activations in, his gradients and predictions out."""

    def __init__(self, name: str, stage: Stage):
        self.name, self._stage = name, stage
        self.answers: Mapping[str, Answer] = {
            "offer": self._offer, "collect": self._collect, "predict": stage.answers["predict"],
        }  # fmt: skip

    def _offer(self, tensors: Tensors) -> dict[str, Tensor]:
        self._stage.offered[self.name] = held(tensors)["x"]
        return {}

    def _collect(self, _: Tensors) -> dict[str, Tensor]:
        if self.name not in self._stage.owed:
            raise ValueError(f"{self.name}: expected a joint step with these activations first, got none")
        return {f"{Kind.SHARE}/g": self._stage.owed.pop(self.name)}


class Desk:
    """The server itself: it opens stages, and adds up contributions."""

    def __init__(self, clock: Clock, sessions: dict[str, Any]):
        self.name, self._clock, self._sessions = "desk", clock, sessions
        self._given: dict[str, dict[str, Tensor]] = {}  # contributions, by ticket, each to be added up once
        self.answers: Mapping[str, Answer] = {
            "open": self._open, "admit": self._admit, "close": self._close, "give": self._give, "sum": self._sum,
        }  # fmt: skip

    def _open(self, tensors: Tensors) -> dict[str, Tensor]:
        told, weights = settings_of(need(tensors, Kind.PARAMETERS)), held(tensors)
        layers = [Layer.of(one) for one in told["layers"]]
        _check_weights(layers, weights)
        evaluated = Evaluated(layers, weights, self._clock)
        self._check_new(told["session"])
        self._sessions[told["session"]] = Stage(told["session"], evaluated, self._clock)
        return {}

    def _admit(self, tensors: Tensors) -> dict[str, Tensor]:
        told = settings_of(need(tensors, Kind.PARAMETERS))
        self._check_new(told["session"])
        self._sessions[told["session"]] = Client(told["session"], self._sessions[told["stage"]])
        return {}

    def _check_new(self, name: str) -> None:
        if name in self._sessions:
            raise ValueError(f"expected a session of a new name, got {name!r} again")

    def _close(self, tensors: Tensors) -> dict[str, Tensor]:
        self._sessions.pop(settings_of(need(tensors, Kind.PARAMETERS))["session"], None)
        return {}

    def _give(self, tensors: Tensors) -> dict[str, Tensor]:
        told = settings_of(need(tensors, Kind.PARAMETERS))
        if told["ticket"] in self._given:
            raise ValueError(f"expected a ticket of its own for every contribution, got {told['ticket']} again")
        self._given[told["ticket"]] = held(tensors)
        return {}

    def _sum(self, tensors: Tensors) -> dict[str, Tensor]:
        told = settings_of(need(tensors, Kind.PARAMETERS))
        tickets, least = list(dict.fromkeys(told["tickets"])), 2
        if missing := [one for one in tickets if one not in self._given]:
            raise ValueError(
                f"expected contributions that wait to be added up, got no {', '.join(missing)}; each counts once, so "
                "that no two sums tell of one member"
            )
        if len(tickets) < least:
            raise ValueError(f"expected at least {least} contributions, whose sum tells of none, got {len(tickets)}")
        parts = [self._given.pop(one) for one in tickets]
        if any({n: s.shape for n, s in part.items()} != {n: s.shape for n, s in parts[0].items()} for part in parts):
            raise ValueError("expected the same entries of the same shapes from every member; train one model in all")
        sums = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}
        return keyed({name: fresh(of_share(share)) for name, share in sums.items()}, Kind.SHARE)


def _check_weights(layers: list[Layer], weights: Mapping[str, Tensor]) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for layer, plain in zip(layers, plain_stage(layers), strict=True):
        prefix = f"{layer.name}." if layer.name else ""
        wanted |= {f"{prefix}{name}": tuple(one.shape) for name, one in plain.named_parameters()}
    got = {name: tuple(share.shape) for name, share in weights.items()}
    if got != wanted:
        raise ValueError(f"expected shares of weights of the shapes {wanted}, got {got}; open the stage with its own")
