"""Adjacency: what two neighbouring data sets differ in, and which kinds of message tell of it."""

from enum import StrEnum
from typing import Literal

from splitlearn.frames import Kind

__all__ = ["BEARS_ON", "Adjacency"]


class Adjacency(StrEnum):
    """What one neighbour differs in. ε bounds how well the two can be told apart."""

    REPLACE_INPUT = "replace one input"  # its label is public, or crosses nowhere
    REPLACE_LABEL = "replace one label"  # its input is public
    REPLACE_SAMPLE = "replace one sample"  # input and label
    ADD_REMOVE_SAMPLE = "add or remove one sample"
    REPLACE_CLIENT = "replace one client's data"
    ADD_REMOVE_CLIENT = "add or remove one client"

    @classmethod
    def _missing_(cls, value: object) -> "Adjacency | None":
        raise ValueError(f"expected an adjacency among {', '.join(map(repr, map(str, cls)))}, got {value!r}")

    @property
    def unit(self) -> Literal["sample", "client"]:
        """Whose change is hidden: one sample's, or that of all samples of a client."""
        return "client" if self in (Adjacency.REPLACE_CLIENT, Adjacency.ADD_REMOVE_CLIENT) else "sample"


BEARS_ON = {
    Adjacency.REPLACE_INPUT: {Kind.ACTIVATION, Kind.GRADIENT},
    Adjacency.REPLACE_LABEL: {Kind.LABEL, Kind.GRADIENT, Kind.LOSS},
    Adjacency.REPLACE_SAMPLE: {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL, Kind.LOSS},
    Adjacency.REPLACE_CLIENT: {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL, Kind.LOSS},
    Adjacency.ADD_REMOVE_SAMPLE: {Kind.WEIGHTS},
    Adjacency.ADD_REMOVE_CLIENT: {Kind.WEIGHTS},
}
