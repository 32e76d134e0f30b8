"""Split training and inference on ciphertexts: one function a protocol, and what each party learns from it.

The client's half of each figure is the layer (``layer.py``), the server's half the holder (``holder.py``); what crosses
between them rides on any transport. None of these protocols is secure against a server that deviates from it.
"""

from collections.abc import Mapping

from torch import Tensor

from privacy.dp.sgd import PrivateLearner
from privacy.he.layer import EncryptedLayer
from privacy.he.opening import Update
from splitlearn.party import Learner

__all__ = ["LEARNS", "he_encw", "he_inference", "he_u_dp"]

CIPHERTEXTS = "ciphertexts, which tell nothing without the key (ring-LWE); how many samples cross, and when"
# Protocol -> observer -> what it learns, for the records.
LEARNS: Mapping[str, Mapping[str, list[str]]] = {
    "he_u_dp": {
        "server": [CIPHERTEXTS, "the noised steps of its layer, bounded by (ε, δ)-DP for each sample"],
        "client": ["the outputs, and so in effect the server's weights"],
    },
    "he_encw": {
        "server": [CIPHERTEXTS, "the layer's shape; after which batches its weights had changed"],
        "client": ["everything: it owns the weights"],
    },
    "he_inference": {"server": [CIPHERTEXTS], "client": ["the outputs, and so in effect the server's weights"]},
}


def he_u_dp(client: PrivateLearner, x: Tensor, y: Tensor) -> Tensor:
    """U-shaped training on ciphertexts, whose only words in the clear are one differentially private step.

    ::

        client: bottom, head, labels, key                     server: W, b
        a = bottom(x)                        ── Enc(a) ──▶
        h                                  ◀─ Enc(aWᵀ+b) ─     multiplies slot by slot
        g = ∂loss(head(h), y)/∂h             ── Enc(g) ──▶
        ∂loss/∂a                             ◀─ Enc(gW) ──
        ΔW = step(clip(all of a sample's
             gradients together), one noise) ── ΔW, Δb ──▶     W += ΔW, b += Δb

    ``client`` trains one stage, bottom, ``EncryptedLayer(update="private")`` and head, on ``PoissonBatches``: their
    gradients are clipped together, and get one draw of noise. Returns the mean loss.

    - The server learns: ciphertexts, batch capacities and timing, and a sequence of (ε, δ)-DP steps (observer "server"
      of a central account to "add or remove one sample"). It never sees a decryption, a gradient or a label. Of a batch
      as a whole the steps do tell: at ε = 8 their bias follows its label counts, which DP allows.
    - The client learns: W in effect, from what it decrypts.
    - Not protected: against a server that returns other products; W from the client.
    """
    _need(client, Update.PRIVATE)
    return client.learn(x, y)[0]


def he_encw(client: Learner, x: Tensor, y: Tensor) -> Tensor:
    """Training on ciphertexts of inputs and weights both: the server computes for the key's one holder, blind.

    ::

        client: bottom, head, labels, key, W                  server
                                             ── Enc(W) ──▶     whenever W has changed
        a = bottom(x)                        ── Enc(a) ──▶
        h = … + b                            ◀─ Enc(aWᵀ) ──    ciphertext × ciphertext, not relinearised
        g                                    ── Enc(g) ──▶
        ∂loss/∂a                             ◀─ Enc(gW) ──
        W −= lr · gᵀa

    ``client`` trains bottom, ``EncryptedLayer(update="encrypted")`` and head by any optimizer. Returns the mean loss.

    - The server learns: ciphertexts, the layer's shape, timing, and so which batches changed the weights. One key
      holder: the client, who owns W.
    - Deviation from CURE (Kanpak et al. 2024, arXiv:2407.08977) and others that send Enc(−lr·dW): changed weights go up
      afresh, in as many bytes, so that the error of ciphertexts does not add up over the steps.
    """
    _need(client, Update.ENCRYPTED)
    return client.learn(x, y)[0]


def he_inference(client: Learner, x: Tensor) -> Tensor:
    """Return the model's output for ``x``, one layer of it computed on ciphertexts; nothing is trained.

    The server learns ciphertexts, sizes and timing; the client the output, and so in effect the layer. What the client
    decrypts stays with it: sent back in full precision it would give the key away (``Keys``).
    """
    return client.predict(x)


def _need(client: Learner, update: Update) -> None:
    layers = [layer for layer in client.stage.modules() if isinstance(layer, EncryptedLayer)]
    if not layers or any(layer.update is not update for layer in layers):
        raise ValueError(
            f"{client.name}: expected a stage with an EncryptedLayer(update={str(update)!r}), got "
            f"{', '.join(map(repr, layers)) or 'none'}"
        )
