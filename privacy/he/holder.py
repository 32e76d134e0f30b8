"""The server's half of an encrypted layer: it multiplies ciphertexts by weights in the clear or encrypted.

It holds no key, takes none, and learns of its inputs what ciphertexts tell: how many there are, and when.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.geometry import Geometry
from privacy.he.layout import Layout, Real
from privacy.he.opening import Opening, Update, as_object, as_tensor
from privacy.he.parameters import Parameters
from privacy.he.product import Weights, halvings_for, plan, received, replied, sums
from privacy.he.seal import Ring
from splitlearn.frames import Kind
from splitlearn.service import Answer, named, need

__all__ = ["GRADIENT_BOUND", "CipherHolder", "LayerHolder", "layouts", "shared_layouts"]

GRADIENT_BOUND = 1.0  # each row of a gradient is scaled to it before it is encrypted, and back after decryption
MOST_ROWS = 1 << 24
PATIENCE = 1  # layouts of weights that a session keeps beside the one in use


@cache
def layouts(parameters: Parameters, rows: int, geometry: Geometry, truncated: bool) -> tuple[Layout, Layout]:
    """Return the layouts of X·Wᵀ and of G·W, both sides the same; of one packing of W where that is the cheapest."""
    forward = plan(parameters, rows, geometry.inner, geometry.outer, truncated=truncated)
    backward = plan(parameters, rows, geometry.outer, geometry.inner, truncated=truncated)
    if forward.fold == "up" and forward.replicas == 1:
        shared = forward.transposed()
        if replace(shared, conjugate=False) == backward:
            return forward, shared
    return forward, backward


@cache
def shared_layouts(parameters: Parameters, rows: int, geometry: Geometry) -> tuple[Layout, Layout]:
    """Return layouts of X·Wᵀ and of G·W under which one set of encrypted weights serves both."""
    height = -(-rows // -(-rows // parameters.slots))
    half = -(-geometry.inner // 2)
    tile = min(1 << (parameters.slots // height).bit_length() - 1, half)
    forward = Layout(rows, geometry.inner, geometry.outer, parameters.slots, tile, 1, "up")
    return forward, forward.transposed()


class _Holder:
    """What both holders share: one client's session, opened by its public parameters."""

    update: frozenset[Update]

    def __init__(self, name: str, geometry: Geometry):
        self.name, self.geometry = name, geometry
        self.seconds: defaultdict[str, float] = defaultdict(float)  # spent on products
        self._opening: Opening | None = None
        self._ring: Ring | None = None

    @property
    def answers(self) -> Mapping[str, Answer]:
        """What answers each verb; see ``splitlearn.service``."""
        return {
            "open": self._open,
            "product": self._product,
            "product_back": self._product_back,
            "answer": self._answer,
            **self._own(),
        }

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Answer in this process, as ``Remote.ask`` does across a wire."""
        return self.answers[verb](tensors)

    def session(self, name: str) -> Self:
        """Return a holder of the same weights for another client, under that client's key."""
        raise NotImplementedError

    def _own(self) -> Mapping[str, Answer]:
        raise NotImplementedError

    def _open(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        opening = Opening.of(need(tensors, Kind.PARAMETERS))
        if opening.update not in self.update:
            raise ValueError(
                f"{self.name}: expected a client with update={' or '.join(sorted(self.update))}, got "
                f"{opening.update}; say the same on both ends"
            )
        self._opening, self._ring = opening, Ring(opening.parameters)
        self._opened()
        return {Kind.PARAMETERS: as_tensor(self.geometry.told())}

    def _opened(self) -> None:
        """Begin anew, under another key."""

    @property
    def _session(self) -> tuple[Opening, Ring]:
        if self._opening is None or self._ring is None:
            raise ValueError(f"{self.name}: expected a session that a client has opened, got none; open it first")
        return self._opening, self._ring

    def _inputs(self, tensors: Mapping[str, Tensor], layout: Callable[[int], Layout]) -> tuple[list[Any], Layout, int]:
        """Return the ciphertexts that came up, checked, and the layout that they are in."""
        opening, ring = self._session
        rows = _count(need(tensors, Kind.COUNT), self.name)
        chosen = layout(rows)
        fresh = Ciphertexts.of(
            need(tensors, Kind.CIPHERTEXT), ring, key=opening.key, form="seeded", polynomials=2,
            count=chosen.chunks * chosen.up,
            scale=ring.weight_scale if Update.ENCRYPTED in self.update else ring.scale,
        )  # fmt: skip
        return received(ring, fresh), chosen, rows

    def _reply(self, products: list[Any], rows: int) -> dict[str, Tensor]:
        opening, ring = self._session
        reply = replied(ring, products, opening.key, rows, truncated=opening.truncated)
        return {Kind.CIPHERTEXT: reply.tensor(ring)}

    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer with a product whose gradient goes back next."""
        raise NotImplementedError

    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer with a product alone; what goes back next is another's."""
        raise NotImplementedError

    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class LayerHolder(_Holder):
    """Holds a linear layer or a convolution in the clear, and applies it, and its transpose, to ciphertexts.

    ``layer`` is the server's own ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``, trained or fresh. ``update=frozen``
    leaves it as it is; with ``private`` it takes the noised steps of clients that train by DP-SGD, and nothing else.
    One holder serves one client; ``session(name)`` is for the next one, under a key of its own.

    - Learns: ciphertexts, how many and when; with ``private`` the noised steps, of which DP bounds what they tell.
    - Its weights are not hidden from clients: a product is linear, and as many inputs as outputs' inputs reveal them.
    - A holder that cheats (returns another product) is not caught.
    """

    def __init__(self, name: str, layer: nn.Module, *, update: Update | str = Update.FROZEN):
        super().__init__(name, Geometry.of(layer))
        if Update(update) is Update.ENCRYPTED:
            raise ValueError(f"{name}: expected a CipherHolder for update='encrypted': this one holds plain weights")
        self.layer, self.update = layer, frozenset({Update(update)})
        self._lock = threading.Lock()
        self._used: tuple[Real, Real | None] | None = None  # of the last product: its gradient goes back through them
        self._packed: dict[Layout, tuple[Real, Real | None, Weights]] = {}
        self._changes = 0  # that this session has made

    def _opened(self) -> None:
        self._used, self._changes = None, 0
        self.forget()

    def session(self, name: str) -> Self:
        """Return a holder of the same weights for another client, under that client's key."""
        other = type(self)(name, self.layer, update=next(iter(self.update)))
        other._lock = self._lock
        return other

    def forget(self) -> None:
        """Drop the plaintexts of weights that are kept for the next product; they are made again."""
        self._packed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights; sessions and ciphertexts are of one run."""
        return {name: tensor.detach().clone() for name, tensor in self.layer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights."""
        try:
            self.layer.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"{self.name}: expected the state of {self.layer}; {error}") from error

    def _own(self) -> Mapping[str, Answer]:
        return {"change": self._change} if Update.PRIVATE in self.update else {}

    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ + b) for Enc(X)."""
        self._session  # noqa: B018 - opened, or an error
        with self._lock:
            self._used = self.geometry.matrix(self.layer)
        return self._times(tensors, self._used)

    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ + b) for Enc(X), of which nothing goes back."""
        with self._lock:
            own = self.geometry.matrix(self.layer)
        return self._times(tensors, own)

    def _times(self, tensors: Mapping[str, Tensor], own: tuple[Real, Real | None]) -> dict[str, Tensor]:
        opening, ring = self._session
        inputs, layout, rows = self._inputs(tensors, lambda rows: self._layouts(rows)[0])
        begun = time.perf_counter()
        weights = self._weights(layout, own, opening.bound)
        products = sums(ring, layout, inputs, weights.plain, weights.bias)
        reply = self._reply(products, rows)
        self.seconds["product"] += time.perf_counter() - begun
        return reply

    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(G·W) for Enc(G), through the weights of the last product."""
        opening, ring = self._session
        if self._used is None:
            raise ValueError(f"{self.name}: expected a product before its gradient goes back, got none")
        inputs, layout, rows = self._inputs(tensors, lambda rows: self._layouts(rows)[1])
        begun = time.perf_counter()
        forward, _ = self._layouts(rows)
        m, _ = self._used
        if layout.conjugate and halvings_for(ring, layout, m.T, None, GRADIENT_BOUND) <= halvings_for(
            ring, forward, *self._used, opening.bound
        ):  # the same plaintexts as the product's, in another order
            plain = self._weights(forward, self._used, opening.bound).transposed()
        else:
            plain = self._weights(layout, (m.T, None), GRADIENT_BOUND).plain
        reply = self._reply(sums(ring, layout, inputs, plain), rows)
        self.seconds["product"] += time.perf_counter() - begun
        return reply

    def _change(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add a client's noised step to the weights; one that comes again, since its answer was lost, once."""
        opening, _ = self._session
        asked = as_object(need(tensors, Kind.PARAMETERS)).get("key")
        if asked != opening.key.hex():
            raise ValueError(
                f"{self.name}: expected a change of the client with key {opening.key.hex()}, got one of {asked}; give "
                "each client a session of its own"
            )
        number = _count(need(tensors, Kind.COUNT), self.name)
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
        return {}

    def _layouts(self, rows: int) -> tuple[Layout, Layout]:
        opening, _ = self._session
        return layouts(opening.parameters, rows, self.geometry, opening.truncated)

    def _weights(self, layout: Layout, own: tuple[Real, Real | None], bound: float) -> Weights:
        """Return the plaintexts of these weights; those that were used last are kept."""
        m, b = own
        kept = self._packed.get(layout)
        if kept is None or not (np.array_equal(kept[0], m) and _equal(kept[1], b)):
            if len(self._packed) > PATIENCE and layout not in self._packed:
                self._packed.pop(next(iter(self._packed)))
            kept = m, b, Weights(self._session[1], layout, m, b, bound)
            self._packed[layout] = kept
        return kept[2]


class CipherHolder(_Holder):
    """Holds the weights encrypted under the client's key: it sees ciphertexts only. One client, who owns the weights.

    - Learns: ciphertexts, how many and when; the layer's shape.
    - A product of two ciphertexts has three polynomials; there is no relinearisation, and no key for it.
    - Weights have the greater of the two scales: their error counts once for every input, that of inputs less.
    """

    def __init__(self, name: str, layer: nn.Module):
        super().__init__(name, Geometry.of(layer))  # of its shape alone
        self.update = frozenset({Update.ENCRYPTED})
        self._held: list[list[Any]] = []  # [down][up] of the forward layout
        self._used: list[list[Any]] = []  # those of the last product: its gradient goes back through them

    def _opened(self) -> None:
        self._held, self._used = [], []

    def session(self, name: str) -> Self:
        """Refuse: weights under one client's key are of no use to another."""
        raise ValueError(f"{self.name}: expected one client, whose key the weights are under, got another, {name}")

    def _own(self) -> Mapping[str, Answer]:
        return {"weights_encrypted": self._take}

    def _take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over encrypted weights."""
        opening, ring = self._session
        forward, _ = shared_layouts(opening.parameters, opening.rows, self.geometry)
        fresh = Ciphertexts.of(
            need(tensors, Kind.CIPHERTEXT), ring, key=opening.key, form="seeded", polynomials=2,
            count=forward.down * forward.up, scale=ring.scale,
        )  # fmt: skip
        flat = received(ring, fresh)
        self._held = [flat[at : at + forward.up] for at in range(0, len(flat), forward.up)]
        return {}

    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ) for Enc(X) and Enc(W)."""
        self._used = self._held
        return self._by(tensors, 0, self._held)

    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ) for Enc(X) and Enc(W), of which nothing goes back."""
        return self._by(tensors, 0, self._held)

    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(G·W) for Enc(G) and Enc(W)."""
        return self._by(tensors, 1, [list(column) for column in zip(*self._used, strict=True)])

    def _by(self, tensors: Mapping[str, Tensor], way: int, grid: list[list[Any]]) -> dict[str, Tensor]:
        opening, ring = self._session
        if not grid:
            raise ValueError(f"{self.name}: expected encrypted weights and a product first, got none")
        inputs, layout, rows = self._inputs(
            tensors, lambda rows: shared_layouts(opening.parameters, opening.rows, self.geometry)[way]
        )
        begun = time.perf_counter()
        reply = self._reply(sums(ring, layout, inputs, grid), rows)
        self.seconds["product"] += time.perf_counter() - begun
        return reply


def _equal(one: Real | None, other: Real | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _count(tensor: Tensor, name: str) -> int:
    """Return the number that came, a whole one from 1 on."""
    if tensor.numel() != 1 or tensor.is_floating_point() or not 1 <= int(tensor) <= MOST_ROWS:
        raise ValueError(f"{name}: expected a whole number from 1 to {MOST_ROWS}, got {tensor.flatten()[:8].tolist()}")
    return int(tensor)
