"""The server's half of an encrypted layer: it multiplies ciphertexts by weights that it holds in the clear.

It holds no key, takes none, and learns of its inputs what ciphertexts tell: how many there are, and when.
"""

import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from privacy.he.geometry import Geometry
from privacy.he.holding import GRADIENT_BOUND, Holder, count_of, layouts
from privacy.he.layout import Layout, Real
from privacy.he.opening import Update, as_object
from privacy.he.product import Weights, halvings_for
from splitlearn.frames import Kind
from splitlearn.service import Answer, named, need

__all__ = ["LayerHolder"]

PATIENCE = 1  # layouts of weights that a session keeps beside the one in use


class LayerHolder(Holder):
    """Holds a linear layer or a convolution in the clear, and applies it, and its transpose, to ciphertexts.

    ``layer`` is the server's own ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``, trained or fresh. ``update=frozen``
    leaves it as it is; with ``private`` it takes the noised steps of clients that train by DP-SGD, and nothing else.
    One holder serves one client; ``session(name)`` is for the next one, under a key of its own.

    - Learns: ciphertexts, how many and when; with ``private`` the noised steps, of which DP bounds what they tell.
    - Its weights are not hidden from clients: a product is linear, and as many products as it has inputs, and
      one more, reveal them.
    - A holder that cheats (returns another product) is not caught.
    """

    def __init__(self, name: str, layer: nn.Module, *, update: Update | str = Update.FROZEN):
        super().__init__(name, Geometry.of(layer), Update(update))
        if self.update is Update.ENCRYPTED:
            raise ValueError(f"{name}: expected a CipherHolder for update='encrypted': this one holds plain weights")
        self.layer = layer
        self._lock = threading.Lock()
        self._packed: dict[tuple[Layout, float], tuple[Real, Real | None, Weights]] = {}
        self._changes = 0  # that this session has made
        self._made = [0]  # in all sessions, and before them, where its state comes from; they share the list

    def _opened(self) -> None:
        self._changes = 0
        self.forget()

    def session(self, name: str) -> Self:
        """Return a holder of the same weights for another client, under that client's key."""
        other = type(self)(name, self.layer, update=self.update)
        other._lock, other._made = self._lock, self._made
        return other

    def forget(self) -> None:
        """Drop the plaintexts of weights that are kept for the next product; they are made again."""
        self._packed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, and how many changes made them; sessions and ciphertexts are of one run."""
        weights = {name: tensor.detach().clone() for name, tensor in self.layer.state_dict().items()}
        return {"layer": weights, "made": self._made[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        try:
            self.layer.load_state_dict(dict(state["layer"]))
            self._made[0] = int(state["made"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{self.name}: expected the state of a holder of {self.layer}; {error}") from error

    def _own(self) -> Mapping[str, Answer]:
        return {"change": self._change} if self.update is Update.PRIVATE else {}

    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ + b) for Enc(X), and a ticket for its gradient."""
        own = self._matrix()
        return self._times(tensors, own) | self._remember(own)

    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ + b) for Enc(X), of which nothing goes back."""
        return self._times(tensors, self._matrix())

    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(G·W) for Enc(G), through the weights of the product that the ticket names."""
        opening, ring = self._session()
        m, b = self._recalled(tensors)

        def plain(there: Layout, back: Layout) -> tuple[list[list[Any]], None]:
            if back.conjugate:  # the plaintexts of the product serve, in another order, if nothing wraps
                product = self._weights(there, (m, b), opening.bound)
                if halvings_for(ring, back, m.T, None, GRADIENT_BOUND) <= product.halvings:
                    return product.transposed(), None
            return self._weights(back, (m.T, None), GRADIENT_BOUND).plain, None

        return self._multiplied(tensors, 1, plain)

    def _times(self, tensors: Mapping[str, Tensor], own: tuple[Real, Real | None]) -> dict[str, Tensor]:
        opening, _ = self._session()

        def plain(there: Layout, back: Layout) -> tuple[list[list[Any]], list[Any] | None]:
            weights = self._weights(there, own, opening.bound)
            return weights.plain, weights.bias

        return self._multiplied(tensors, 0, plain)

    def _matrix(self) -> tuple[Real, Real | None]:
        with self._lock:
            return self.geometry.matrix(self.layer)

    def _change(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add a client's noised step to the weights; one that comes again, since its answer was lost, once."""
        opening, _ = self._session()
        told = as_object(need(tensors, Kind.PARAMETERS))
        if told.get("key") != opening.key.hex():
            raise ValueError(
                f"{self.name}: expected a change of the client with key {opening.key.hex()}, got one of "
                f"{told.get('key')}; give each client a session of its own"
            )
        made = told.get("made")
        if type(made) is not int or made > self._made[0]:
            raise ValueError(
                f"{self.name}: expected a client that has sent at most {self._made[0]} changes, got one that has sent "
                f"{made}; resume the holder too: state={{'server': holder, …}}"
            )
        number = count_of(need(tensors, Kind.COUNT), self.name)
        if number == self._changes:
            return {}
        if number != self._changes + 1:
            raise ValueError(f"{self.name}: expected change {self._changes + 1} of this session, got {number}")
        changes = named(tensors, Kind.UPDATE)
        own = dict(self.layer.named_parameters())
        wrong = [
            name for name in {*own, *changes}
            if name not in own or name not in changes or changes[name].shape != own[name].shape
            or not torch.isfinite(changes[name]).all()
        ]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{self.name}: expected finite changes of {', '.join(own)} in their shapes, got {', '.join(changes)}"
            )
        with self._lock, torch.no_grad():
            for name, change in changes.items():
                own[name].add_(change.to(own[name]))
            self._changes = number
            self._made[0] += 1
        return {}

    def _layouts(self, rows: int) -> tuple[Layout, Layout]:
        opening, _ = self._session()
        return layouts(opening.parameters, rows, self.geometry, opening.truncated)

    def _weights(self, layout: Layout, own: tuple[Real, Real | None], bound: float) -> Weights:
        """Return the plaintexts of these weights for inputs within ±``bound``; those that were used last are kept."""
        (m, b), key = own, (layout, bound)
        kept = self._packed.get(key)
        if kept is None or not (np.array_equal(kept[0], m) and _equal(kept[1], b)):
            if len(self._packed) > PATIENCE and key not in self._packed:
                self._packed.pop(next(iter(self._packed)))
            kept = m, b, Weights(self._session()[1], layout, m, b, bound)
            self._packed[key] = kept
        return kept[2]


def _equal(one: Real | None, other: Real | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
