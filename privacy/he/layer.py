"""The client's half of an encrypted layer: a torch layer like any other, whose weights a server holds."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from privacy.extra import load
from privacy.he.ciphertexts import Ciphertexts
from privacy.he.geometry import Geometry
from privacy.he.holder import GRADIENT_BOUND, layouts, shared_layouts
from privacy.he.keys import Keys, OutOfRange, within
from privacy.he.layout import Layout, Real
from privacy.he.opening import Opening, Update, as_object, as_tensor
from privacy.he.product import MOST_HALVINGS, halvings_for
from splitlearn.frames import Kind
from splitlearn.service import keyed, need

__all__ = ["EncryptedLayer", "Holding"]

TINIEST = 1e-200  # a row of a gradient that is nowhere greater is none


class Holding(Protocol):
    """Whoever holds the weights: a ``LayerHolder`` or ``CipherHolder``, here or across a wire (``Remote``)."""

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the reply's tensors."""


@dataclass(frozen=True)
class _Packing:
    """How one product crosses: the layout, the scale of what goes up, and the polynomials of what comes back."""

    verb: str
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
    - ``encrypted``: the client owns ``layer``, whose weights go up encrypted whenever they have changed. ``rows`` is
      the batch size that they are packed for (of a convolution: samples times output positions); smaller batches are
      padded, greater ones go in parts. b stays here.

    A weight gradient in the clear is the leak of the published protocols, and no mode of this layer.

    - Protects: inputs and gradients at this layer from the holder, who sees ciphertexts (ring-LWE); with ``encrypted``
      the weights too.
    - Does not protect: how many rows there are and when; the holder's weights from this client; against a holder that
      returns another product than it should, or several clients that share a key.
    - Inputs are within ±``bound`` (public), or refused (``out_of_range="raise"``), or clipped (``"clip"``, counted in
      ``clipped``; usual with ``private``, since an end of the training would tell the server of a sample). Gradients
      are scaled row by row to fit, and back, which no one sees.
    - Deviation from exact arithmetic: an error of about 1e-4 (``fast``) or 5e-6 (``precise``) in outputs of order 1.
      Like rounding, it depends faintly on all rows of a batch; DP's proof does not know of it.

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
        self.update = Update(update)
        out_of_range = out_of_range or ("clip" if self.update is Update.PRIVATE else "raise")
        if not 0 < bound < float("inf") or out_of_range not in ("raise", "clip"):
            raise ValueError(
                f"expected a finite bound above 0, and raise or clip beyond it, got {bound} and {out_of_range!r}"
            )
        if (self.update is Update.ENCRYPTED) != (layer is not None and rows > 0):
            raise ValueError(
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
            raise ValueError(f"expected a holder of the shape of {layer}, got one of {self.geometry}")
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if self.update is not Update.FROZEN:
            weight, bias = self.geometry.parameters(layer)
            self.weight, self.bias = weight, bias
        self._released = False  # whether what the weights hold has come out of a step of DP-SGD
        self._changes = 0  # that the holder has taken
        self._sent: Tensor | None = None  # weights that the holder has ciphertexts of
        self._shrunk = self._shrunk_there = (
            1.0  # what they were multiplied by, lest a product wraps around; the holder need not know
        )
        if self.update is Update.PRIVATE:
            _teach_opacus()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x``, as the plain layer would."""
        self._bring_up_to_date()
        rows = self._rows(x)
        self.clipped += int((x.detach().abs() > self.bound).sum()) if self.out_of_range == "clip" else 0
        returns = torch.is_grad_enabled() and x.requires_grad  # whether a gradient will go back through these weights
        out = _Product.apply(rows.flatten(0, 1), self.weight, self.bias, self, returns)
        return self.geometry.output(out.unflatten(0, rows.shape[:2]), x)

    def _rows(self, x: Tensor) -> Tensor:
        """Return the input's rows, within the bound where they are to be clipped."""
        rows = self.geometry.rows(x)
        within(rows.detach().cpu().double().numpy(), float("inf"), "activations")  # clipping would hide infinities
        return rows.clamp(-self.bound, self.bound) if self.out_of_range == "clip" else rows

    def pass_on(self) -> None:
        """Send the step that DP-SGD has just made on this layer's weights; called by ``PrivateLearner``."""
        self._released = True
        self._bring_up_to_date()

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
                raise ValueError(
                    "expected weights that change by DP-SGD alone (put this layer into the stage of a PrivateLearner), "
                    "got a step of another optimizer: sent in the clear it would give labels and activations away; use "
                    "update='encrypted', or freeze it"
                )
            changes = keyed({name: one.detach().clone() for name, one in own.items()}, Kind.UPDATE)
            # Numbered: where the answer is lost, the same change may be sent again, and counts once.
            numbered: dict[str, Tensor] = {
                Kind.COUNT: torch.tensor(self._changes + 1),
                Kind.PARAMETERS: as_tensor({"key": self._keys.id.hex()}),
            }
            self._holder.ask("change", {**changes, **numbered})
            self._changes += 1
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
        m = weight.detach().cpu().double().reshape(self.geometry.outer, self.geometry.inner).numpy().T
        within(m, float("inf"), "weights")
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

    def _packings(self, rows: int) -> tuple[_Packing, _Packing, _Packing]:
        """Return how the product, its gradient's, and a product without a gradient cross for so many rows."""
        ring = self._keys.ring
        if self.update is Update.ENCRYPTED:
            there, back = shared_layouts(ring.parameters, self.batch, self.geometry)
            return _three(there, back, ring.weight_scale, 3)
        there, back = layouts(ring.parameters, rows, self.geometry, self.truncated)
        return _three(there, back, ring.scale, 2)

    def _through(self, x: Real, packing: _Packing) -> Real:
        """Return X·M as the holder computes it on ciphertexts."""
        keys, ring, layout = self._keys, self._keys.ring, packing.layout
        clock = [time.perf_counter()]
        sent = keys.encrypt(layout.pack_rows(x), layout.rows, scale=packing.scale).tensor(ring)
        clock.append(time.perf_counter())
        reply = self._holder.ask(packing.verb, {Kind.COUNT: torch.tensor(layout.rows), Kind.CIPHERTEXT: sent})
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
        return out

    def _in_parts(self, x: Real, way: int) -> Real:
        """Return X·M; encrypted weights are packed for so many rows, and others go as they come."""
        if self.update is not Update.ENCRYPTED:
            return self._through(x, self._packings(len(x))[way])
        packing = self._packings(self.batch)[way]
        if way == 0:
            self._shrunk_there = self._shrunk
        shrunk = self._shrunk_there if way == 1 else self._shrunk  # a gradient goes back through the product's weights
        parts = []
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            padded = np.zeros((self.batch, x.shape[1]))
            padded[: len(part)] = part
            parts.append(self._through(padded, packing)[: len(part)] / shrunk)
        return np.concatenate(parts)

    def product(self, rows: Tensor, *, returns: bool = False) -> Tensor:
        """Return rows [n, inner] times the weights, plus the bias, in the clear here and nowhere else.

        ``returns``: a gradient is to go back through the same weights.
        """
        values = rows.detach().cpu().double().numpy()
        if self.out_of_range == "clip":  # as before, in the precision in which it is looked at next
            values = values.clip(-self.bound, self.bound)
        values = within(values, self.bound, "activations")
        out = torch.from_numpy(self._in_parts(values, 0 if returns else 2)).to(rows)
        return out + self.bias.detach() if self.update is Update.ENCRYPTED and self.bias is not None else out

    def product_back(self, g: Tensor) -> Tensor:
        """Return gradients [n, outer] times the transposed weights; a row of zeros has exactly none."""
        values = within(g.detach().cpu().double().numpy(), float("inf"), "gradients")
        # Each row to its own scale, which nobody sees: a small gradient then loses no digits beside a great one.
        greatest = abs(values).max(axis=1, keepdims=True)
        greatest[greatest < TINIEST] = 0
        scale = GRADIENT_BOUND / (greatest + (greatest == 0))
        return torch.from_numpy(self._in_parts(values * scale, 1) / scale * (greatest > 0)).to(g)


def _three(there: Layout, back: Layout, scale: float, polynomials: int) -> tuple[_Packing, _Packing, _Packing]:
    verbs = (("product", there), ("product_back", back), ("answer", there))
    first, second, third = (_Packing(verb, layout, scale, polynomials) for verb, layout in verbs)
    return first, second, third


class _Product(torch.autograd.Function):
    """rows · Wᵀ + b on ciphertexts, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, layer: EncryptedLayer, returns: bool
    ) -> Tensor:
        """Client: Enc(x) up. Server: Enc(xWᵀ + b) down."""
        ctx.layer, ctx.known = layer, None
        ctx.save_for_backward(*(() if weight is None else (rows, weight)))
        return layer.product(rows, returns=returns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Client: Enc(g) up. Server: Enc(gW) down. Client: gᵀx and Σg, which it knows without anyone's help."""
        (g,) = gradients
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        back = None
        if needs_rows:
            back = _again(g, *ctx.known) if ctx.known is not None else None
            if back is None:
                back = ctx.layer.product_back(g)
                ctx.known = g, back
        weight = None
        if needs_weight:
            rows, own = ctx.saved_tensors
            weight = (g.T @ rows).reshape(own.shape)
        return back, weight, g.sum(0) if needs_bias else None, None, None


def _again(g: Tensor, known: Tensor, back: Tensor) -> Tensor | None:
    """Return gW from what an earlier pass brought, where each row of g is a multiple of that pass's; None elsewhere.

    So are the rows of ghost clipping's second pass, and of the one that follows a single sample: nothing crosses again,
    and how often something crosses tells nothing.
    """
    squares = known.square().sum(1, keepdim=True)
    factors = (g * known).sum(1, keepdim=True) / torch.where(squares > 0, squares, torch.ones_like(squares))
    eps = torch.finfo(g.dtype).eps
    tolerance = (100 if eps < 1e-6 else 4) * eps * g.abs().amax(1, keepdim=True)
    return factors * back if bool(((g - factors * known).abs() <= tolerance).all()) else None


def _teach_opacus() -> None:
    """Tell Opacus the per-sample gradients of this layer: those of the plain one, since x and g are known here."""
    samples = load("opacus.grad_sample.utils")

    def parts(layer: EncryptedLayer, activations: list[Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
        x = activations[0]
        out = g.unsqueeze(1) if layer.geometry.kind == "linear" else g.flatten(2).transpose(1, 2)
        return layer._rows(x), out  # [n, positions, inner], [n, positions, outer]

    @samples.register_grad_sampler(EncryptedLayer)
    def gradients(layer: EncryptedLayer, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        x, out = parts(layer, activations, g)
        found: dict[nn.Parameter, Tensor] = {}
        if layer.weight is not None and layer.weight.requires_grad:
            found[layer.weight] = torch.einsum("npi,npo->noi", x, out).reshape(len(x), *layer.geometry.weight_shape)
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = out.sum(1)
        return found

    @samples.register_norm_sampler(EncryptedLayer)
    def norms(layer: EncryptedLayer, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        return {own: one.flatten(1).norm(dim=1) for own, one in gradients(layer, activations, g).items()}
