"""A secret factor of a product on shares, read by a server that knows the mask (CrypTen 0.4.1's first-party provider).

Beaver (CRYPTO 1991) multiplies [x] and [y] by opening ε = x − a and δ = y − b. Whoever has drawn a has x = ε + a.
Where server 0 deals the triples itself, it has; where a dealer does, server 0 knows a share of a, and gets noise.
"""

from dataclasses import dataclass

from torch import Tensor

from splitlearn import Kind, View

__all__ = ["FirstParty"]


@dataclass(frozen=True)
class FirstParty:
    """Honest but curious server 0. Returns the secret of this shape, as float64, that first entered a product.

    It reads what the server drew and what was opened: ``observe(servers.observed("server 0"), threat=…)``. ``bits`` is
    how many bits of fraction the fixed point has, which is public; ``factor`` which of a product's two operands.
    """

    shape: tuple[int, ...]
    bits: int = 16
    factor: int = 0

    def __call__(self, view: View) -> Tensor:
        """Return what is opened of the factor plus what this server itself drew for its mask."""
        drawn: list[Tensor] = []
        for exchange in view.exchanges:
            if exchange.request.verb == "drew":
                drawn += [t for key, t in exchange.reply.tensors.items() if not key.startswith(f"{Kind.GLOO}/common")]
            if exchange.request.verb != "opened":
                continue
            opened = exchange.reply.tensors.get(f"{Kind.GLOO}/{self.factor}")
            mask = next((one for one in drawn[self.factor :] if one.shape == self.shape), None)
            if opened is not None and mask is not None and opened.shape == self.shape:
                return (opened + mask).double() / (1 << self.bits)
            drawn = []
        raise LookupError(
            f"this attack reads an opened factor of shape {self.shape} and what the server drew for its mask, and saw "
            "none; have the parties remember, and record a product: Servers(remember=True)"
        )
