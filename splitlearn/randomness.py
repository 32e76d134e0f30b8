"""Randomness of one party's own, so that local, framed and remote runs draw the same numbers."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Randomness"]


class Randomness:
    """A generator state of one party's own, swapped in for torch's global one while that party works.

    It starts from ``words``, such as a seed and a name: other words, another stream. It covers the CPU and, for
    work on a CUDA device, that device's generator. The global generators serve one party of this process at a time;
    threads that wait for a network do not hold them.
    """

    _working = threading.RLock()

    def __init__(self, *words: object):
        text = "/".join(str(word) for word in words)
        self._seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        self._cpu = torch.Generator().manual_seed(self._seed).get_state()
        self._cuda: Tensor | None = None

    @contextmanager
    def own(self, device: torch.device) -> Iterator[None]:
        """Let everything inside draw from this randomness, on the CPU and on ``device``."""
        with self._working:
            generator = torch.default_generator
            outside = generator.get_state()
            generator.set_state(self._cpu)
            try:
                if device.type == "cuda":
                    with self._own_cuda(device):
                        yield
                else:
                    yield
            finally:
                self._cpu = generator.get_state()
                generator.set_state(outside)

    @contextmanager
    def _own_cuda(self, device: torch.device) -> Iterator[None]:
        outside = torch.cuda.get_rng_state(device)
        if self._cuda is None:
            self._cuda = torch.Generator(device).manual_seed(self._seed).get_state()
        torch.cuda.set_rng_state(self._cuda, device)
        try:
            yield
        finally:
            self._cuda = torch.cuda.get_rng_state(device)
            torch.cuda.set_rng_state(outside, device)

    def fork(self, name: str) -> "Randomness":
        """Return a stream of its own that follows from this one's state and ``name``; this one does not move."""
        states = [self._cpu] if self._cuda is None else [self._cpu, self._cuda]
        return Randomness(*(hashlib.sha256(state.numpy().tobytes()).hexdigest() for state in states), name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, from which the same numbers follow."""
        state: dict[str, Any] = {"cpu": self._cpu.clone(), "seed": self._seed}
        return state if self._cuda is None else {**state, "cuda": self._cuda.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        cuda = state.get("cuda")
        self._cpu, self._seed = state["cpu"].clone(), state["seed"]
        self._cuda = None if cuda is None else cuda.clone()
