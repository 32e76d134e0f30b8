"""The server's half of an encrypted layer whose weights are encrypted too: it sees ciphertexts only."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.geometry import Geometry
from privacy.he.holding import Holder, shared_layouts
from privacy.he.layout import Layout
from privacy.he.opening import Update
from privacy.he.product import received
from splitlearn.frames import Kind
from splitlearn.service import Answer, need

__all__ = ["CipherHolder"]


class CipherHolder(Holder):
    """Holds the weights encrypted under the client's key: it sees ciphertexts only. One client, who owns the weights.

    - Learns: ciphertexts, how many and when, and so after which batches the weights had changed; the layer's shape.
    - A product of two ciphertexts has three polynomials; there is no relinearisation, and no key for it.
    - Weights have the greater of the two scales: their error counts once for every input, that of inputs less.
    """

    def __init__(self, name: str, layer: nn.Module):
        super().__init__(name, Geometry.of(layer), Update.ENCRYPTED)  # of its shape alone
        self._held: list[list[Any]] = []  # [down][up] of the forward layout

    def _opened(self) -> None:
        self._held = []

    def session(self, name: str) -> Self:
        """Refuse: weights under one client's key are of no use to another."""
        raise ValueError(f"{self.name}: expected one client, whose key the weights are under, got another, {name}")

    def _own(self) -> Mapping[str, Answer]:
        return {"weights_encrypted": self._take}

    def _take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over encrypted weights."""
        opening, ring = self._session()
        forward, _ = shared_layouts(opening.parameters, opening.rows, self.geometry)
        fresh = Ciphertexts.of(
            need(tensors, Kind.CIPHERTEXT), ring, key=opening.key, form="seeded", polynomials=2,
            count=forward.down * forward.up, scale=ring.scale,
        )  # fmt: skip
        flat = received(ring, fresh)
        self._held = [flat[at : at + forward.up] for at in range(0, len(flat), forward.up)]
        return {}

    def _product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ) for Enc(X) and Enc(W), and a ticket for its gradient."""
        return self._answer(tensors) | self._remember(self._held)

    def _answer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(X·Wᵀ) for Enc(X) and Enc(W), of which nothing goes back."""
        self._session()
        if not self._held:
            raise ValueError(f"{self.name}: expected encrypted weights first, got none")
        return self._multiplied(tensors, 0, lambda there, back: (self._held, None))

    def _product_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Enc(G·W) for Enc(G) and the Enc(W) of the product that the ticket names."""
        self._session()
        columns = [list(column) for column in zip(*self._recalled(tensors), strict=True)]
        return self._multiplied(tensors, 1, lambda there, back: (columns, None))

    def _layouts(self, rows: int) -> tuple[Layout, Layout]:
        opening, _ = self._session()
        if rows != opening.rows:
            raise ValueError(f"{self.name}: expected the {opening.rows} rows that weights are packed for, got {rows}")
        return shared_layouts(opening.parameters, opening.rows, self.geometry)
