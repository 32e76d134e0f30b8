"""Shapers: trained parameters that shape what is released, which decide whether an ε for one sample holds at all.

A stage that trains on the data without privacy carries every sample into every other sample's later releases.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privacy.dp.adjacency import Adjacency

__all__ = ["Shaper", "check_shaper", "mixes", "status_of"]


@dataclass(frozen=True)
class Shaper:
    """A trained parameter set that shapes what is released, where it cannot be looked at (across a wire, say).

    ``frozen``: never trained, or on public data alone. ``private``: trained by DP-SGD in the same account.
    ``trained``: trained on the data without privacy.
    """

    name: str
    status: Literal["frozen", "private", "trained"]


def status_of(shaper: Any) -> tuple[str, str]:
    """Return the name of what shapes a release, and whether it is frozen, private or trained."""
    if isinstance(shaper, Shaper):
        return shaper.name, shaper.status
    stage = shaper if isinstance(shaper, nn.Module) else getattr(shaper, "stage", None)
    if not isinstance(stage, nn.Module):
        raise ValueError(
            f"expected a party of this process, a module or a Shaper, got {shaper!r}; of a party across a wire say "
            "what is known: Shaper(name, 'frozen'), 'private' or 'trained'"
        )
    name = getattr(shaper, "name", type(stage).__name__)
    if getattr(shaper, "trains_privately", False):
        return name, "private"
    still = all(not parameter.requires_grad for parameter in stage.parameters())
    held = not isinstance(shaper, nn.Module) and shaper.optimizer is None
    return name, "frozen" if still or held else "trained"


def check_shaper(shaper: Any, adjacency: Adjacency) -> None:
    """Raise ``ValueError`` where an ε per sample would not hold for what this party shapes."""
    name, status = status_of(shaper)
    private = "in DP-SGD's own account" if adjacency is Adjacency.ADD_REMOVE_SAMPLE else "public"
    if status == "trained" or (status == "private" and adjacency is not Adjacency.ADD_REMOVE_SAMPLE):
        how = "without privacy" if status == "trained" else "by DP-SGD, whose account is another one,"
        raise ValueError(
            f"expected every trained parameter that shapes a release to be frozen or {private}, got {name}, trained "
            f"{how} on the same data: one changed sample moves it, and with it every other sample's release, so that "
            f"no ε to {adjacency} holds. Freeze it (no optimizer, or requires_grad_(False)), train it by DP-SGD "
            "(PrivateLearner), or open the account to 'replace one client's data', where all frames compose"
        )
    stage = shaper if isinstance(shaper, nn.Module) else getattr(shaper, "stage", None)
    if isinstance(stage, nn.Module):
        mixing = [title for title, layer in stage.named_modules() if mixes(layer)]
        if mixing:
            raise ValueError(
                f"expected no layer that mixes samples in what shapes a release, got batch norm {mixing[0]!r} of "
                f"{name}: one sample moves every row of its batch, so that no ε to {adjacency} holds; use group norm, "
                "or put that layer, with running statistics, into evaluation mode"
            )


def mixes(layer: nn.Module) -> bool:
    """Whether it is batch norm that goes by the batch: in training, or where it keeps no statistics of its own."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
