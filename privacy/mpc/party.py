"""The client's side of a stage on shares: a party like any other to every protocol, and a torch layer to any loop."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from privacy.mpc.layers import described
from privacy.mpc.servers import Servers
from privacy.mpc.sharing import BITS, WEIGHT_BITS, decoded, encoded, joined, shared
from splitlearn.misfit import Refused
from splitlearn.wire import Metered

__all__ = ["MOST_LR", "SharedStage", "SharedTop", "StageClient"]

MOST_LR = 1e3
MOST_CLASSES = 1000  # whose mean has a reciprocal that is reached in ten iterations, and digits enough
LEAST_JOINED = 2
LossTo = Literal["client", "nobody"]
Replies = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


class SharedStage:
    """A stage whose weights and activations two servers hold in shares: nobody sees any of them. A ``Party``.

    It stands wherever a protocol takes a server: ``vanilla(client, stage, x, y)`` computes the loss on shares too, and
    ``u_shaped(bottom, stage, head, x, y)`` reveals the outputs to the client. ``stage`` is the model owner's, who is
    the client here: its weights go up in shares, train there by SGD, and come back by ``weights()``.

    | | the client, who owns the stage | each server | the dealer |
    | --- | --- | --- | --- |
    | ``learn`` | the gradient at the cut, and the loss if ``loss_to="client"`` | masked values, shapes | shapes, bits |
    | ``forward``, ``backward`` | the outputs, the gradient at the cut | masked values, shapes | shapes, bits |
    | ``predict`` | the outputs | masked values, shapes | shapes |
    | ``weights`` | the weights | shapes | nothing |

    Shapes are those of products, with the kinds of operations; bits are how many a truncation cuts off, which gives the
    dealer the magnitudes of momentum and of the learning rate over the batch, too.

    - Protects: activations, labels, gradients and weights from each server and from the dealer.
    - Does not protect: what the client is told (above) from the client; what an output tells of the weights; see
      ``Servers`` for what must hold.
    - Values are in fixed point with 16 bits of fraction (weights with 32 between steps): what is shared must lie within
      ±8192, and what is revealed within ±2^20, or the step ends with an error. Gradients are shared as sums over the
      batch, not as means, so that they have as many digits as activations.
    - Deviations: of CrypTen's approximations, which ``learn`` takes, exp is (1 + x/256)^256 and log is good to 2 %, so
      that the loss it reveals differs from the plain one by some hundredths, and gradients by about a hundredth; its
      reciprocal holds for up to 1000 classes, and more are refused. ``forward`` and ``backward`` are exact to fixed
      point, and so are steps of SGD: every product of a training is cut back exactly (``truncation``), as long as it is
      below 2^30. Past that it is wrong, which nobody checks inside a stage: keep activations and gradients scaled.
    - Products of ``predict`` are cut back by each server alone, which saves a round each and wraps around, rarely (for
      values of order 1 once in 4·10^9): what comes of it is mostly out of range, and told of; a ReLU or a very small
      weight above can hide it. No weight depends on it.
    - Whoever opened the stage can read its weights between steps, and a step of few samples tells of their activations:
      in ``mpc_vertical``, of those of other clients. A joint step of one sample is refused for that.
    - Every weight of the stage trains, those with ``requires_grad=False`` too; ``lr=0`` freezes all.
    """

    def __init__(
        self,
        servers: Servers,
        stage: nn.Module,
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
        loss_to: LossTo = "client",
        name: str = "servers",
    ):
        if not isinstance(servers, Servers):
            raise Refused(f"expected Servers() to hold the stage, got {servers!r}")
        rates = isinstance(lr, int | float) and isinstance(momentum, int | float)
        if not (rates and 0 <= lr < MOST_LR and 0 <= momentum < 1):
            raise Refused(f"expected lr from 0 (frozen) to 1000 and momentum from 0 to 1, got {lr!r} and {momentum!r}")
        if loss_to not in ("client", "nobody"):
            raise Refused(f"expected loss_to to be client or nobody, got {loss_to!r}")
        self.name, self.lr, self.momentum, self.loss_to, self.steps = name, lr, momentum, loss_to, 0
        self.seconds: defaultdict[str, float] = defaultdict(float)  # what sharing, the servers and revealing took
        self.turn = 0  # how many batches have gone forward
        self._servers = servers
        self._layers = described(stage)
        self._dtypes = {key: one.dtype for key, one in stage.named_parameters()}
        self.session = servers.new_session("stage")
        told = {"session": self.session, "layers": [layer.told() for layer in self._layers]}
        servers.desk("open", told, shared(_encoded_weights(dict(stage.named_parameters()))))
        self._pair = servers.pair(self.session)
        self._forwarded: tuple[int, bool, Tensor] | None = None  # rows, whether x asks for a gradient, and its like

    @property
    def security(self) -> list[str]:
        """What has to hold for the shares to protect anything; see ``Servers.security``."""
        return self._servers.security

    @property
    def meters(self) -> list[Metered]:
        """The wires to both servers."""
        return self._pair.meters

    def forward(self, x: Tensor) -> Tensor:
        """Share the activation, and return the output that the servers' shares add up to, as a fresh leaf."""
        replies = self._asked("forward", None, {"x": lambda: _activation(x)})
        self._forwarded = (len(x), x.requires_grad, x.detach())
        self.turn += 1
        return self._revealed(replies, "out", "outputs", like=x).requires_grad_()

    def backward(self, g: Tensor) -> Tensor | None:
        """Share the gradient of the output, have the servers step, and return the gradient of the input."""
        if self._forwarded is None:
            raise ValueError(f"{self.name}: expected an open step, begun by forward; call forward(x) first")
        rows, wanted, like = self._forwarded
        self._forwarded = None
        told = self._told(rows, wanted=wanted)
        replies = self._asked("backward", told, {"g": lambda: encoded(g * rows, "gradients times the batch")})
        self.steps += 1
        return self._revealed(replies, "g", "gradients", like=like) / rows if wanted else None

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Share activation and labels; return the mean loss (nan if it is revealed to nobody) and the gradient.

        ``y`` int64 [batch] numbers the classes. The loss is cross-entropy, computed on shares.
        """
        self._forwarded = None
        told = self._told(len(z), wanted=z.requires_grad) | {"loss": self.loss_to == "client"}
        replies = self._asked("learn", told, {"x": lambda: _activation(z), "y": lambda: self._one_hot(y)})
        self.steps += 1
        g = self._revealed(replies, "g", "gradients", like=z) / len(z) if z.requires_grad else None
        return self._loss(replies, len(z), z), g

    def label(self, y: Tensor) -> Tensor:
        """Labels are a local matter; raises ``ValueError``."""
        raise ValueError(f"{self.name}: expected labels from a party in this process; ask the one who holds them")

    def predict(self, x: Tensor) -> Tensor:
        """Return the output for ``x``, revealed to this client."""
        return self._revealed(self._asked("predict", None, {"x": lambda: _activation(x)}), "out", "outputs", like=x)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, put together from both servers' shares: they are this client's."""
        return {name: one for kind, name, one in self._state() if kind == "weights"}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Share these weights in place of those that the servers hold; momentum starts anew."""
        self._load(weights, {})

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, put together from shares; for ``checkpoint=…``."""
        state = list(self._state())
        return {
            "stage": {name: one for kind, name, one in state if kind == "weights"},
            "momentum": {name: one for kind, name, one in state if kind == "momentum"},
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; steps then go on as they would have, to fixed point."""
        if not {"stage", "momentum", "steps"} <= set(state):
            raise ValueError(
                f"{self.name}: expected what state_dict() returned, got {', '.join(map(str, state)) or 'nothing'}; for "
                "weights alone there is load_weights"
            )
        self._load(state["stage"], state["momentum"])
        self.steps = state["steps"]

    put_back = load_state_dict

    def abandon(self) -> None:
        """Give up the open step: its backward will not come."""
        self._forwarded = None
        self._pair.ask("abandon")

    def client(self, name: str) -> "StageClient":
        """Return the wires of another one, who shares activations of his own: for ``mpc_vertical``, or to predict."""
        return StageClient(self._servers, self.session, name)

    def learn_joined(self, clients: Sequence["StageClient"], y: Tensor) -> Tensor:
        """Learn from the activations that these have offered, side by side; each then collects his gradient."""
        self._forwarded = None
        if len(y) < LEAST_JOINED:
            raise ValueError(
                f"{self.name}: expected a joint step of at least {LEAST_JOINED} samples, got {len(y)}, whose "
                "activation its weights would tell; use larger batches, or leave out a short last one by drop_last=True"
            )
        told = self._told(len(y), wanted=True)
        told |= {"loss": self.loss_to == "client", "sessions": [client.session for client in clients]}
        replies = self._pair.ask("learn_joined", told, shared({"y": self._one_hot(y)}))
        self.steps += 1
        return self._loss(replies, len(y), torch.zeros(0))

    def predict_joined(self, clients: Sequence["StageClient"]) -> Tensor:
        """Return the output for the activations that these have offered, side by side."""
        told = {"sessions": [client.session for client in clients]}
        return self._revealed(self._pair.ask("predict_joined", told), "out", "outputs", like=torch.zeros(0))

    def close(self) -> None:
        """Have the servers forget this stage."""
        self._servers.desk("close", {"session": self.session})

    def _asked(self, verb: str, told: Mapping[str, Any] | None, values: Mapping[str, Callable[[], Tensor]]) -> Replies:
        clock = [time.perf_counter()]
        messages = shared({name: value() for name, value in values.items()})
        clock.append(time.perf_counter())
        replies = self._pair.ask(verb, told, messages)
        clock.append(time.perf_counter())
        self.seconds["share"] += clock[1] - clock[0]
        self.seconds["servers"] += clock[2] - clock[1]
        return replies

    def _revealed(self, replies: Replies, name: str, what: str, *, like: Tensor) -> Tensor:
        begun = time.perf_counter()
        try:
            return _revealed(replies, name, what, like=like)
        finally:
            self.seconds["reveal"] += time.perf_counter() - begun

    def _told(self, rows: int, *, wanted: bool) -> dict[str, Any]:
        if not rows:
            raise ValueError(f"{self.name}: expected a batch of at least one sample, got none; skip empty batches")
        return {"rate": self.lr / rows, "momentum": self.momentum, "wanted": wanted}

    def _one_hot(self, y: Tensor) -> Tensor:
        outputs = self.classes
        self._check_classes(outputs)
        if y.dtype is not torch.int64 or y.ndim != 1 or not bool(((y >= 0) & (y < outputs)).all()):
            raise ValueError(
                f"{self.name}: expected labels from 0 to {outputs - 1}, int64 [batch], got {y.dtype} of shape "
                f"{tuple(y.shape)}{f', {y.min().item():g} to {y.max().item():g}' if y.numel() else ''}"
            )
        return encoded(nn.functional.one_hot(y, outputs).double(), "labels")

    def _check_classes(self, outputs: int) -> None:
        if outputs > MOST_CLASSES:
            raise ValueError(
                f"{self.name}: expected at most {MOST_CLASSES} classes, for which the softmax on shares holds, got "
                f"{outputs}; keep the loss with the client: mpc_u_shaped"
            )

    @property
    def classes(self) -> int:
        """How many outputs the last layer with weights has."""
        sizes = [layer.settings.get("out_features", layer.settings.get("out_channels")) for layer in self._layers]
        if not any(sizes):
            raise ValueError(f"{self.name}: expected a stage that ends in classes, got none")
        return int([size for size in sizes if size is not None][-1])

    def _loss(self, replies: Replies, rows: int, like: Tensor) -> Tensor:
        if self.loss_to == "nobody":
            return torch.tensor(float("nan"))
        return self._revealed(replies, "loss", "a loss", like=like) / rows

    def _state(self) -> Iterator[tuple[str, str, Tensor]]:
        for key, ring in joined(self._pair.ask("weights")).items():
            kind, _, name = key.partition("/")
            bits = WEIGHT_BITS if kind == "weights" else BITS
            yield kind, name, decoded(ring, f"weights of {name}", bits=bits).to(self._dtypes[name])

    def _load(self, weights: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> None:
        own = _encoded_weights(weights, "weights/") | _encoded_weights(momentum, "momentum/", bits=BITS)
        self._pair.ask("load_weights", None, shared(own))
        self._forwarded = None


class StageClient:
    """One who shares activations into a stage that somebody else has opened: all of them, or some features of each.

    Only shares ever leave him; he learns what is revealed to him alone, gradients of his own part and predictions.
    """

    def __init__(self, servers: Servers, stage: str, name: str):
        self.name, self.session = name, servers.new_session(f"{stage}/{name}")
        servers.desk("admit", {"session": self.session, "stage": stage})
        self._pair = servers.pair(self.session)

    @property
    def meters(self) -> list[Metered]:
        """His wires to both servers."""
        return self._pair.meters

    def predict(self, x: Tensor) -> Tensor:
        """Return the output for ``x``, which whoever opened the stage does not learn."""
        return _revealed(self._pair.ask("predict", None, shared({"x": _activation(x)})), "out", "outputs", like=x)

    def offer(self, z: Tensor) -> None:
        """Share an activation [batch, …, features] for the next joint step; features are laid side by side."""
        self._pair.ask("offer", None, shared({"x": _activation(z)}))

    def collect(self, like: Tensor) -> Tensor:
        """Return the gradient of what was offered to the last joint step, of the mean loss over the batch."""
        return _revealed(self._pair.ask("collect"), "g", "gradients", like=like) / len(like)


class SharedTop(nn.Module):
    """A user's own layers on shares, as one layer of any model and any loop; see ``SharedStage`` for who sees what.

    ``y = top(x)`` shares x and reveals the output to this process; autograd through it shares the gradient, and the
    servers take a step of SGD (``lr``, ``momentum``) with it. It has no parameters here: give the optimizer the rest of
    the model. Its weights stand in the model's ``state_dict()``, put together, and are shared anew when that is loaded;
    ``lr=0``, the default, freezes them. In evaluation, under ``torch.no_grad()``, nothing is kept for a gradient.
    """

    def __init__(self, servers: Servers, stage: nn.Module, *, lr: float = 0.0, momentum: float = 0.0):
        super().__init__()
        self.shared = SharedStage(servers, stage, lr=lr, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layers' output for ``x``, as they would themselves."""
        if not torch.is_grad_enabled():
            return self.shared.predict(x)
        return _Through.apply(x, self.shared, torch.zeros(0, requires_grad=True))

    def get_extra_state(self) -> dict[str, Any]:
        """Return weights and momentum, put together from shares: they stand in the model's ``state_dict()``."""
        return self.shared.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what stood in a model's ``state_dict()``: shared anew."""
        self.shared.load_state_dict(state)

    def extra_repr(self) -> str:
        """Return the layers that are held in shares."""
        return ", ".join(layer.kind for layer in self.shared._layers)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SharedStage, anchor: Tensor) -> Tensor:
        out = stage.forward(x.detach().requires_grad_(ctx.needs_input_grad[0])).detach()
        ctx.stage, ctx.turn = stage, stage.turn
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.stage.turn != ctx.turn:
            raise Refused(
                "expected the gradient of the last batch that went forward, got that of one before: servers keep one "
                "open step; call backward() before the next batch"
            )
        return ctx.stage.backward(gradients[0]), None, None


def _activation(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise Refused(f"expected activations as a tensor, got {type(x).__name__}; torch.as_tensor makes one")
    if not x.ndim or not len(x):
        raise Refused(f"expected a batch of at least one sample, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise Refused(f"expected floating-point activations to share, got {x.dtype}")
    return encoded(x, "activations")


def _revealed(replies: Replies, name: str, what: str, *, like: Tensor) -> Tensor:
    return decoded(joined(replies)[name], what).to(like.device, like.dtype)


def _encoded_weights(weights: Mapping[str, Tensor], prefix: str = "", *, bits: int = WEIGHT_BITS) -> dict[str, Tensor]:
    return {f"{prefix}{name}": encoded(one, f"weights of {name}", bits=bits) for name, one in weights.items()}
