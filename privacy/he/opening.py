"""Opening: what a client tells a holder before anything else, all of it public; and how weights may change."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from privacy.he.ciphertexts import refuse_key_material
from privacy.he.parameters import Parameters
from splitlearn.settings import settings_of, settings_tensor

__all__ = ["MOST_ROWS", "Opening", "Update", "as_object"]

MOST_ROWS = 1 << 24  # of one request


class Update(StrEnum):
    """How the weights of an encrypted layer may change. In the clear they may not."""

    FROZEN = "frozen"  # not at all
    PRIVATE = "private"  # by DP-SGD on the client, whose noised step the server is sent
    ENCRYPTED = "encrypted"  # by the client, who owns them; the server holds ciphertexts of them

    @classmethod
    def _missing_(cls, value: object) -> "Update | None":
        told = f"expected update=frozen, private or encrypted, got {value!r}"
        if isinstance(value, str) and value.lower() in list(cls):
            raise ValueError(f"{told}; did you mean {value.lower()!r}?")
        raise ValueError(
            f"{told}: a weight gradient in the clear is the leak of the published protocols. It is Σ gᵢᵀaᵢ: beside the "
            "gradients, which give the labels away, it gives the activations away too, exactly, where a batch has "
            "fewer samples than outputs"
        )


@dataclass(frozen=True)
class Opening:
    """What a client tells a holder first, in the clear: parameters, whose key, bounds, and how the weights change."""

    parameters: Parameters
    key: bytes
    bound: float
    truncated: bool
    update: Update
    rows: int = 0  # that encrypted weights are packed for

    def __post_init__(self) -> None:
        least = 1 if self.update is Update.ENCRYPTED else 0
        if len(self.key) != 8 or not 0 < self.bound < float("inf") or not least <= self.rows <= MOST_ROWS:
            raise ValueError(
                f"expected a key id of 8 bytes, a finite bound above 0 and at least {least} rows, got "
                f"{len(self.key)} bytes, {self.bound} and {self.rows}"
            )

    def tensor(self) -> Tensor:
        """Return what crosses."""
        one = self.parameters
        told = {
            "name": one.name, "degree": one.degree, "prime_bits": one.prime_bits, "scale_bits": one.scale_bits,
            "weight_scale_bits": one.weight_scale_bits, "key": self.key.hex(), "bound": self.bound,
            "truncated": self.truncated, "update": self.update, "rows": self.rows,
        }  # fmt: skip
        return settings_tensor(told)

    @classmethod
    def of(cls, tensor: Tensor) -> "Opening":
        """Return what a client told; ``ValueError`` for anything else, and for parameters below 128 bits."""
        told = as_object(tensor)
        try:
            if type(told["truncated"]) is not bool or type(told["rows"]) is not int:
                raise TypeError("a truth value and a whole number were expected")
            parameters = Parameters(
                " ".join(str(told["name"]).split())[:40], told["degree"], tuple(told["prime_bits"]),
                told["scale_bits"], told["weight_scale_bits"],
            )  # fmt: skip
            return cls(
                parameters, bytes.fromhex(told["key"]), float(told["bound"]), told["truncated"], Update(told["update"]),
                told["rows"],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"expected parameters, key id and bounds of a client, got {sorted(told)}") from error


def as_object(tensor: Tensor) -> dict[str, Any]:
    """Return the public settings that crossed; key material among them is refused."""
    refuse_key_material(tensor.numpy().tobytes() if tensor.dtype is torch.uint8 else b"")
    try:
        return settings_of(tensor)
    except ValueError as error:
        raise ValueError(f"{error}; keys and TenSEAL contexts stay with the client") from error
