"""The client's half of an encrypted layer: a torch layer like any other, whose weights a server holds."""

import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.function import TINIEST, EncryptedProduct
from privacy.he.geometry import Geometry
from privacy.he.holder import LayerHolder
from privacy.he.holding import GRADIENT_BOUND, TICKET, layouts, shared_layouts
from privacy.he.keys import Keys, OutOfRange, within
from privacy.he.layout import Layout, Real
from privacy.he.opening import Opening, Update, as_object
from privacy.he.product import MOST_HALVINGS, halvings_for
from privacy.he.samplers import teach_opacus
from splitlearn.frames import Kind
from splitlearn.misfit import Refused
from splitlearn.service import keyed, need
from splitlearn.settings import settings_tensor

__all__ = ["EncryptedLayer", "Holding"]


class Holding(Protocol):
    """Whoever holds the weights: a ``LayerHolder`` or ``CipherHolder``, here or across a wire (``Remote``)."""

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the reply's tensors."""


@dataclass(frozen=True)
class WayBack:
    """What the gradient of a product needs: which product it was, and what its weights had been multiplied by."""

    ticket: Mapping[str, Tensor]
    shrunk: float


@dataclass(frozen=True)
class _Packing:
    """How one product crosses: the layout, the scale of what goes up, and the polynomials of what comes back."""

    layout: Layout
    scale: float
    polynomials: int


class EncryptedLayer(nn.Module):
    """An ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` that is computed on ciphertexts by whoever holds its weights.

    ``y = layer(x)`` sends Enc(x) and decrypts Enc(xWᵀ + b); autograd through it sends Enc(g) and decrypts Enc(gW). It
    stands in any model and any loop. On the CPU in double precision, whatever the model's device and type.

    ``update`` says how the weights may change, the same on both ends:

    - ``frozen``: they do not. The layer has no parameters here.
    - ``private``: the party that trains this layer is a ``PrivateLearner``. ``weight`` and ``bias`` are then what its
      optimizer has changed since the holder last heard of it, 0 in between: they get per-sample gradients, are clipped
      together with all others of the stage, noised in the one draw, and the noised step is sent. A change that comes
      any other way is refused before anything is sent. Weight decay does nothing to them.
    - ``encrypted``: the client owns ``layer``, whose own parameters these are. They go up encrypted whenever they have
      changed. ``rows`` is the batch size that they are packed for (of a convolution: samples times output positions);
      smaller batches are padded, greater ones go in parts. b stays here.

    A weight gradient in the clear is the leak of the published protocols, and no mode of this layer.

    - Protects: inputs and gradients at this layer from the holder, who sees ciphertexts (ring-LWE); with ``encrypted``
      the weights too.
    - Does not protect: how many rows there are and when; the holder's weights from this client; against a holder that
      returns another product than it should, or several clients that share a key.
    - Inputs are within ±``bound`` (public), or refused (``out_of_range="raise"``), or clipped (``"clip"``, counted in
      ``clipped``; usual with ``private``, since an end of the training would tell the server of a sample). Gradients
      are scaled row by row to fit, and back, which no one sees.
    - Deviation from exact arithmetic: an rms error, for inputs of order 1, of 3e-5 (64 rows of 256 inputs, ``fast``)
      to 1e-3 (one row of 4,096: it grows with the root of how many inputs share a ciphertext), a thirtieth of it with
      ``precise``, ten times with ``encrypted``. Like rounding, it depends faintly on all rows of a batch; DP's proof
      does not know of it.
    - An input that is nan or infinite ends the training before it crosses, which tells that there was one.

    ``seconds`` holds what encryption, the holder and decryption took.
    """

    def __init__(
        self,
        keys: Keys,
        holder: Holding,
        *,
        update: Update | str = Update.FROZEN,
        layer: nn.Module | None = None,
        rows: int = 0,
        bound: float = 32.0,
        out_of_range: OutOfRange | None = None,
        truncated: bool = True,
    ):
        super().__init__()
        if not isinstance(keys, Keys) or not hasattr(holder, "ask"):
            raise Refused(
                f"expected Keys() and a holder, or wire(holder).party across a wire, got {type(keys).__name__} and "
                f"{type(holder).__name__}"
            )
        self.update = Update(update)
        out_of_range = out_of_range or ("clip" if self.update is Update.PRIVATE else "raise")
        if out_of_range not in ("raise", "clip"):
            raise Refused(f"expected out_of_range to be raise or clip, got {out_of_range!r}")
        low, high = keys.parameters.bounds
        if not low <= bound <= high:
            raise Refused(
                f"expected a bound from {low:.3g} to {high:.3g}, within which {keys.parameters.name} has digits left, "
                f"got {bound}; scale the activations, or take parameters with greater scales (DEPTH2)"
            )
        if (self.update is Update.ENCRYPTED) != (layer is not None and rows > 0):
            raise Refused(
                "expected layer=… and rows=… with update='encrypted', where the weights are this client's, and with no "
                f"other; got update={str(self.update)!r}, {type(layer).__name__} and {rows}"
            )
        self.bound, self.truncated, self.batch = bound, truncated, rows
        self.out_of_range: OutOfRange = out_of_range
        self.clipped = 0  # entries that were out of range
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._keys, self._holder = keys, holder
        opening = Opening(keys.parameters, keys.id, bound, truncated, self.update, rows)
        reply = self._holder.ask("open", {Kind.PARAMETERS: opening.tensor()})
        self.geometry = Geometry.from_told(as_object(need(reply, Kind.PARAMETERS)))
        if layer is not None and Geometry.of(layer) != self.geometry:
            raise Refused(f"expected a holder of the shape of {layer}, got one of {self.geometry}")
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if self.update is not Update.FROZEN:
            self.weight, self.bias = self.geometry.parameters(layer)
        self._plain = (layer,)  # not a part of this module: its parameters are, already
        self._released = False  # whether what the weights hold has come out of a step of DP-SGD
        self._changes = 0  # that the holder has taken in this session
        self._made = 0  # in all, since the first session that this layer's state comes from
        self._sent: Tensor | None = None  # weights that the holder has ciphertexts of
        self._shrunk = 1.0  # what they were multiplied by, lest a product wraps around: the holder need not know
        if self.update is Update.PRIVATE:
            teach_opacus(EncryptedLayer)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x``, as the plain layer would."""
        self._bring_up_to_date()
        if not x.is_floating_point():
            raise Refused(f"expected floating-point inputs, as torch's own layer does, got {x.dtype}")
        if self.out_of_range == "clip":  # which would hide infinities
            within(x.detach().cpu().double().numpy(), float("inf"), "activations")
            self.clipped += int((x.detach().abs() > self.bound).sum())
        rows = self.rows(x)
        returns = torch.is_grad_enabled() and x.requires_grad  # whether a gradient will go back through these weights
        out = EncryptedProduct.apply(rows.flatten(0, 1), self.weight, self.bias, self, returns)
        return self.geometry.output(out.unflatten(0, rows.shape[:2]), x)

    def rows(self, x: Tensor) -> Tensor:
        """Return the input's rows [N, positions, inner], within the bound where they are to be clipped."""
        rows = self.geometry.rows(x)
        return rows.clamp(-self.bound, self.bound) if self.out_of_range == "clip" else rows

    def pass_on(self) -> None:
        """Send the step that DP-SGD has just made on this layer's weights; called by ``PrivateLearner``."""
        self._released = True
        self._bring_up_to_date()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With ``private``, keep how many changes were sent: the weights are the holder's, and not the zeros here."""
        if self.update is Update.PRIVATE:
            destination[f"{prefix}changes"] = torch.tensor(self._made)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if self.update is Update.PRIVATE:
            _, _, missing, unexpected, _ = rest
            if f"{prefix}changes" in state_dict:
                self._made = int(state_dict[f"{prefix}changes"])
            else:
                missing.append(f"{prefix}changes")
            unexpected += [key for key in state_dict if key.startswith(prefix) and key != f"{prefix}changes"]
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return shape, parameters and how the weights may change."""
        one = self.geometry
        return f"{one.kind}, {one.inner} → {one.outer}, {self._keys.parameters.name}, update={str(self.update)!r}"

    def _bring_up_to_date(self) -> None:
        """Let the holder have the weights as they are, in the way that ``update`` allows."""
        if self.update is Update.PRIVATE:
            assert self.weight is not None
            own = {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}
            if not any(bool(parameter.detach().any()) for parameter in own.values()):
                self._released = False  # a step of nothing: what comes next has no leave
                return
            if not self._released:
                raise Refused(
                    "expected weights that change by DP-SGD alone (put this layer into the stage of a PrivateLearner), "
                    "got a step of another optimizer: sent in the clear it would give labels and activations away; use "
                    "update='encrypted', or freeze it"
                )
            changes = keyed({name: one.detach().clone() for name, one in own.items()}, Kind.UPDATE)
            # Numbered: where the answer is lost, the same change may be sent again, and counts once.
            numbered: dict[str, Tensor] = {
                Kind.COUNT: torch.tensor(self._changes + 1),
                Kind.PARAMETERS: settings_tensor({"key": self._keys.id.hex(), "made": self._made}),
            }
            self._holder.ask("change", {**changes, **numbered})
            self._changes += 1
            self._made += 1
            with torch.no_grad():
                for parameter in own.values():
                    parameter.zero_()
            self._released = False
        elif self.update is Update.ENCRYPTED:
            assert self.weight is not None
            if self._sent is None or not torch.equal(self._sent, self.weight):
                self._send_weights(self.weight)

    def _send_weights(self, weight: Tensor) -> None:
        ring = self._keys.ring
        forward, back = shared_layouts(ring.parameters, self.batch, self.geometry)
        m = within(self.geometry.as_matrix(weight), float("inf"), "weights")
        halvings = max(
            halvings_for(ring, forward, m, None, self.bound), halvings_for(ring, back, m.T, None, GRADIENT_BOUND)
        )
        self._shrunk = 0.5**halvings
        slots = np.tile(forward.periods(m * self._shrunk).reshape(-1, forward.period), forward.slots // forward.period)
        begun = time.perf_counter()
        packed = self._keys.encrypt(slots, self.batch, scale=ring.scale).tensor(ring)
        self.seconds["encrypt"] += time.perf_counter() - begun
        self._holder.ask("weights_encrypted", {Kind.CIPHERTEXT: packed})
        self._sent = weight.detach().clone()

    def _packings(self, rows: int) -> tuple[_Packing, _Packing]:
        """Return how the product, and its gradient's, cross for so many rows."""
        ring = self._keys.ring
        if self.update is Update.ENCRYPTED:
            there, back = shared_layouts(ring.parameters, self.batch, self.geometry)
            return _Packing(there, ring.weight_scale, 3), _Packing(back, ring.weight_scale, 3)
        there, back = layouts(ring.parameters, rows, self.geometry, self.truncated)
        return _Packing(there, ring.scale, 2), _Packing(back, ring.scale, 2)

    def _through(
        self, verb: str, x: Real, packing: _Packing, more: Mapping[str, Tensor]
    ) -> tuple[Real, Mapping[str, Tensor]]:
        """Return X·M as the holder computes it on ciphertexts, and the ticket that came with it."""
        keys, ring, layout = self._keys, self._keys.ring, packing.layout
        clock = [time.perf_counter()]
        sent = keys.encrypt(layout.pack_rows(x), layout.rows, scale=packing.scale).tensor(ring)
        clock.append(time.perf_counter())
        reply = self._holder.ask(verb, {Kind.COUNT: torch.tensor(layout.rows), Kind.CIPHERTEXT: sent, **more})
        clock.append(time.perf_counter())
        got = Ciphertexts.of(
            need(reply, Kind.CIPHERTEXT), ring, key=keys.id, form="truncated" if self.truncated else "whole",
            polynomials=packing.polynomials, count=layout.chunks * layout.down, scale=ring.reply_scale,
            halvings=0 if self.update is Update.ENCRYPTED else MOST_HALVINGS,
        )  # fmt: skip
        out = layout.unpack(keys.decrypt(got))
        clock.append(time.perf_counter())
        for name, start, end in zip(("encrypt", "holder", "decrypt"), clock, clock[1:], strict=False):
            self.seconds[name] += end - start
        return out, {TICKET: reply[TICKET]} if TICKET in reply else {}

    def _in_parts(self, verb: str, x: Real, more: Mapping[str, Tensor]) -> tuple[Real, Mapping[str, Tensor]]:
        """Return X·M and the last ticket; encrypted weights are packed for so many rows, others go as they come."""
        way = int(verb == "product_back")
        if self.update is not Update.ENCRYPTED:
            return self._through(verb, x, self._packings(len(x))[way], more)
        packing, parts, ticket = self._packings(self.batch)[way], [], more
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            padded = np.zeros((self.batch, x.shape[1]))
            padded[: len(part)] = part
            # One ticket for all parts: they go through the same weights.
            last = start + self.batch >= len(x)
            out, ticket = self._through(verb if last or way else "answer", padded, packing, more)
            parts.append(out[: len(part)])
        return np.concatenate(parts), ticket

    def product(self, rows: Tensor, *, returns: bool = False) -> tuple[Tensor, WayBack]:
        """Return rows [n, inner] times the weights, plus the bias, in the clear here alone; and the way back.

        ``returns``: a gradient is to go back through the same weights.
        """
        values = rows.detach().cpu().double().numpy()
        if self.out_of_range == "clip":  # as before, in the precision in which it is looked at next
            values = values.clip(-self.bound, self.bound)
        values = within(values, self.bound, "activations")
        found, ticket = self._in_parts("product" if returns else "answer", values, {})
        out = torch.from_numpy(found / self._shrunk).to(rows)
        if self.update is Update.ENCRYPTED and self.bias is not None:
            out = out + self.bias.detach()
        return out, WayBack(ticket, self._shrunk)

    def product_back(self, g: Tensor, way_back: WayBack) -> Tensor:
        """Return gradients [n, outer] times the transposed weights of a product; a row of zeros has exactly none."""
        values = within(g.detach().cpu().double().numpy(), float("inf"), "gradients")
        # Each row to its own scale, which nobody sees: a small gradient then loses no digits beside a great one.
        greatest = abs(values).max(axis=1, keepdims=True)
        greatest[greatest < TINIEST] = 0
        scale = GRADIENT_BOUND / (greatest + (greatest == 0))
        found, _ = self._in_parts("product_back", values * scale, way_back.ticket)
        return torch.from_numpy(found / way_back.shrunk / scale * (greatest > 0)).to(g)

    def plain(self, holder: LayerHolder | None = None) -> nn.Module:
        """Return the layer as torch's own, weights included: with the holder's leave, or this client's encrypted ones.

        For ``nn.Sequential(bottom, encrypted.plain(holder), head)``, which runs where this toolkit is not installed.
        ``holder`` is the ``LayerHolder`` itself; with ``update="encrypted"`` none is needed.
        """
        own = self._plain[0] if self.update is Update.ENCRYPTED else holder.layer if holder is not None else None
        if own is None:
            raise Refused("expected the holder, which has the weights, got none; plain(holder) with its leave")
        return copy.deepcopy(own)
