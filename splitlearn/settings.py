"""Public settings as they cross: JSON in a tensor of ``Kind.PARAMETERS``."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["settings_of", "settings_tensor"]


def settings_tensor(told: Mapping[str, Any]) -> Tensor:
    """Return public settings as what crosses: JSON in UTF-8, uint8 [bytes]."""
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


def settings_of(tensor: Tensor) -> dict[str, Any]:
    """Return the public settings that crossed; ``ValueError`` for anything but a JSON object."""
    raw = tensor.numpy().tobytes() if tensor.dtype is torch.uint8 else b""
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected public parameters as JSON, got {len(raw)} bytes of something else") from error
    if not isinstance(told, dict):
        raise ValueError(f"expected public parameters as a JSON object, got {type(told).__name__}")
    return told
