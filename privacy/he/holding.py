"""Holding: what every holder of an encrypted layer's weights does, and the layouts that both sides agree on."""

import time
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.geometry import Geometry
from privacy.he.layout import Layout, room_for
from privacy.he.opening import MOST_ROWS, Opening, Update
from privacy.he.parameters import Parameters
from privacy.he.product import plan, received, replied, sums
from privacy.he.seal import Ring
from splitlearn.frames import Kind
from splitlearn.service import Answer, need
from splitlearn.settings import settings_tensor

__all__ = ["GRADIENT_BOUND", "TICKET", "Holder", "count_of", "layouts", "shared_layouts"]

GRADIENT_BOUND = 1.0  # each row of a gradient is scaled to it before it is encrypted, and back after decryption
OPEN_PRODUCTS = 4  # whose gradients have not come yet: for a layer that is used several times in one graph
TICKET = f"{Kind.COUNT}/ticket"  # which product a gradient goes back through


@lru_cache(maxsize=256)
def layouts(parameters: Parameters, rows: int, geometry: Geometry, truncated: bool) -> tuple[Layout, Layout]:
    """Return the layouts of X·Wᵀ and of G·W, both sides the same; of one packing of W where that is the cheapest."""
    forward = plan(parameters, rows, geometry.inner, geometry.outer, truncated=truncated)
    backward = plan(parameters, rows, geometry.outer, geometry.inner, truncated=truncated)
    if forward.fold == "up" and forward.replicas == 1:
        shared = forward.transposed()
        if replace(shared, conjugate=False) == backward:
            return forward, shared
    return forward, backward


@lru_cache(maxsize=256)
def shared_layouts(parameters: Parameters, rows: int, geometry: Geometry) -> tuple[Layout, Layout]:
    """Return layouts of X·Wᵀ and of G·W under which one set of encrypted weights serves both."""
    tile = min(room_for(rows, parameters.slots), -(-geometry.inner // 2))
    forward = Layout(rows, geometry.inner, geometry.outer, parameters.slots, tile, 1, "up")
    return forward, forward.transposed()


class Holder(ABC):
    """What both holders share: one client's session, opened by its public parameters."""

    def __init__(self, name: str, geometry: Geometry, update: Update):
        self.name, self.geometry, self.update = name, geometry, update
        self.seconds: defaultdict[str, float] = defaultdict(float)  # spent on products
        self._opening: Opening | None = None
        self._ring: Ring | None = None
        self._kept: OrderedDict[int, Any] = OrderedDict()  # weights of the last products, by ticket
        self._tickets = 0

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

    @abstractmethod
    def session(self, name: str) -> Self:
        """Return a holder of the same weights for another client, under that client's key."""

    @abstractmethod
    def _own(self) -> Mapping[str, Answer]:
        """Return what answers verbs that only this holder has."""

    def _open(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        opening = Opening.of(need(tensors, Kind.PARAMETERS))
        if opening.update is not self.update:
            raise ValueError(
                f"{self.name}: expected a client with update={self.update}, got {opening.update}; say the same on both "
                "ends"
            )
        self._opening, self._ring = opening, Ring(opening.parameters)
        self._kept.clear()
        self._opened()
        return {Kind.PARAMETERS: settings_tensor(self.geometry.told())}

    @abstractmethod
    def _opened(self) -> None:
        """Begin anew, under another key."""

    def _session(self) -> tuple[Opening, Ring]:
        if self._opening is None or self._ring is None:
            raise ValueError(f"{self.name}: expected a session that a client has opened, got none; open it first")
        return self._opening, self._ring

    @abstractmethod
    def _layouts(self, rows: int) -> tuple[Layout, Layout]:
        """Return the layouts of a product and of its gradient's, for so many rows."""

    def _multiplied(
        self,
        tensors: Mapping[str, Tensor],
        way: int,
        weights: Callable[[Layout, Layout], tuple[Sequence[Sequence[Any]], Sequence[Any] | None]],
    ) -> dict[str, Tensor]:
        """Return the reply to ciphertexts of rows: their product with ``weights(there, back)``, a grid and a bias.

        ``way`` is 0 for a product, 1 for a gradient's.
        """
        opening, ring = self._session()
        rows = count_of(need(tensors, Kind.COUNT), self.name)
        both = self._layouts(rows)
        layout = both[way]
        fresh = Ciphertexts.of(
            need(tensors, Kind.CIPHERTEXT), ring, key=opening.key, form="seeded", polynomials=2,
            count=layout.chunks * layout.up,
            scale=ring.weight_scale if self.update is Update.ENCRYPTED else ring.scale,
        )  # fmt: skip
        inputs = received(ring, fresh)
        begun = time.perf_counter()
        grid, bias = weights(*both)
        products = sums(ring, layout, inputs, grid, bias)
        reply = replied(ring, products, opening.key, rows, truncated=opening.truncated).tensor(ring)
        self.seconds["product"] += time.perf_counter() - begun
        return {Kind.CIPHERTEXT: reply}

    def _remember(self, weights: Any) -> dict[str, Tensor]:
        """Keep the weights of a product, and return the ticket by which its gradient finds them."""
        self._tickets += 1
        self._kept[self._tickets] = weights
        while len(self._kept) > OPEN_PRODUCTS:
            self._kept.popitem(last=False)
        return {TICKET: torch.tensor(self._tickets)}

    def _recalled(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the weights of the product that a gradient belongs to."""
        ticket = count_of(tensors[TICKET], self.name, most=1 << 60) if TICKET in tensors else 0
        if ticket not in self._kept:
            raise ValueError(
                f"{self.name}: expected the gradient of one of this session's last {OPEN_PRODUCTS} products, got "
                f"that of product {ticket} of {self._tickets}"
            )
        return self._kept[ticket]

    @abstractmethod
    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer with a product whose gradient will come, and the ticket for it."""

    @abstractmethod
    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer with a product alone."""

    @abstractmethod
    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer with the product of a gradient, through the weights that its ticket names."""


def count_of(tensor: Tensor, name: str, *, most: int = MOST_ROWS) -> int:
    """Return the number that came, a whole one from 1 on."""
    if tensor.numel() != 1 or tensor.is_floating_point() or not 1 <= int(tensor) <= most:
        raise ValueError(f"{name}: expected a whole number from 1 to {most}, got {tensor.flatten()[:8].tolist()}")
    return int(tensor)
