"""Members that are not always there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from splitlearn.members import FedMember, Weights

__all__ = ["Absent"]


class Absent:
    """A member that cannot be reached in some rounds, drawn by its seed: round functions leave it out of these.

    It does nothing in such a round. ``share`` in [0, 1) of all rounds. Members of one seed are away together.
    """

    def __init__(self, member: FedMember, share: float, seed: int):
        if not 0 <= share < 1:
            raise ValueError(f"expected a share of rounds from 0 to below 1, got {share}")
        self.name, self._member, self._share = member.name, member, share
        self.elsewhere = getattr(member, "elsewhere", False)  # asked at once with others, as it would be itself
        self._draws = torch.Generator().manual_seed(seed)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Return what the member does; ``ConnectionError`` in a round that it is away from."""
        if torch.rand((), generator=self._draws, dtype=torch.float64).item() < self._share:
            raise ConnectionError(f"{self.name} is away in this round")
        return self._member.round(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return where its draws are, and the member's state where it has one."""
        state: dict[str, Any] = getattr(self._member, "state_dict", dict)()
        return {"draws": self._draws.get_state(), "member": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._draws.set_state(state["draws"])
        if hasattr(self._member, "load_state_dict"):
            self._member.load_state_dict(state["member"])
