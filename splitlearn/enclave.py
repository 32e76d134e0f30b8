"""A stage inside an enclave on an untrusted host, as a threat model: sealed frames, what the host sees, the cost.

    client ── Remote ── Framed ── Sealed ══ Host ══ opened ── serve ── Service ── Learner
                                  └──── ciphertext alone ────┘        └─ in the enclave ─┘

The frames are really sealed; that the far end is an enclave (SGX, TDX, SEV, a confidential GPU) is modelled: it runs in
this process, its attestation and the key exchange are assumed (``Attested``), and its speed is a factor with a source.
The host is left with sizes, directions and times. No side channel other than these is modelled: caches, page faults,
power and the rest of what enclaves were broken by are left out.
"""

import secrets
import struct
import threading
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from splitlearn.devices import Device
from splitlearn.frames import Kind
from splitlearn.network import DIRECTIONS, Clock, RealClock
from splitlearn.wire import Carrier

__all__ = [
    "ENCLAVES", "LEFT_OUT", "MODELLED", "SEALING_NBYTES", "Attested", "Enclave", "Host", "Sealed", "Session",
    "enclosed", "in_enclave", "opened",
]  # fmt: skip

NONCE = struct.Struct(">IQ")  # which end sealed it, and which request of the session it is (or answers)
ASKS, ANSWERS = 1, 2
TAG_NBYTES = 16
SEALING_NBYTES = NONCE.size + TAG_NBYTES  # that a frame grows by
KEY_NBYTES = 32
RESOLUTION = 9  # digits of a host's seconds: to the nanosecond, below which a sum of times is rounding
LEFT_OUT = "no side channels other than sizes and timing are modelled: caches, page faults, power are left out"
MODELLED = "modelled: the stage runs in this process; no enclave, no attestation and no host stand behind it"


@dataclass(frozen=True)
class Attested:
    """What is taken for granted of an enclave, in words: what it runs, who vouches for that, and who holds the key.

    Nothing here checks it. Whoever models an enclave has to write it down, and records show it.
    """

    runs: str  # the code that is measured, such as "the stage above the cut and its optimizer"
    vouched: str  # who says so, such as "the processor's maker, by remote attestation before the first frame"
    key: str = "a fresh session key, exchanged with the attested enclave, which client and enclave alone hold"

    def __post_init__(self) -> None:
        for name in ("runs", "vouched", "key"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"expected in words what is assumed, got no {name!r}; nothing is attested here by itself"
                )

    def in_words(self) -> list[str]:
        """Return the assumptions, and what is left out, a line each."""
        return [
            MODELLED,
            f"assumed: the enclave runs {self.runs}; vouched for by {self.vouched}",
            f"assumed: {self.key}",
            LEFT_OUT,
        ]


class Session:
    """A key for both ends of one line, drawn afresh, and the numbers that it has sealed under: none twice.

    AES-256-GCM (NIST SP 800-38D), nonces built by its deterministic construction: the end that seals, and the number of
    the request. A reply bears the number of its request, so that no other can be taken for it; a request that comes
    again, or after a later one, is refused. One exchange at a time. It cannot be copied, since a copy would seal under
    the same nonces.
    """

    def __init__(self, attested: Attested):
        if not isinstance(attested, Attested):
            raise ValueError(
                f"expected what is assumed of the enclave in words, got {attested!r}; pass Attested(runs=…, vouched=…)"
            )
        self.attested = attested
        self._cipher, self._invalid = _cipher(secrets.token_bytes(KEY_NBYTES))
        self._asked = self._received = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        raise ValueError(
            "expected one session a line, got a copy, which would seal under the same nonces; make another"
        )

    def ask(self, frame: bytes) -> tuple[int, bytes]:
        """Return the number of a new request, and it sealed."""
        with self._lock:
            self._asked += 1
            number = self._asked
        return number, self._seal(ASKS, number, frame)

    def receive(self, sealed: bytes) -> tuple[int, bytes]:
        """Return a request's number and its frame; ``ValueError`` where it was changed, or comes again."""
        number, frame = self._open(ASKS, sealed)
        with self._lock:
            if number <= self._received:
                raise ValueError(
                    f"expected a request after number {self._received}, got {number} again or too late; the host "
                    "replays or reorders frames"
                )
            self._received = number
        return number, frame

    def answer(self, number: int, frame: bytes) -> bytes:
        """Return the reply to request ``number`` sealed. Once a request: ``receive`` lets none through twice."""
        return self._seal(ANSWERS, number, frame)

    def read(self, number: int, sealed: bytes) -> bytes:
        """Return the reply to request ``number``; ``ValueError`` where it was changed, or answers another."""
        found, frame = self._open(ANSWERS, sealed)
        if found != number:
            raise ValueError(f"expected the reply to request {number}, got that to {found}; the host replays frames")
        return frame

    def _seal(self, end: int, number: int, frame: bytes) -> bytes:
        nonce = NONCE.pack(end, number)
        return bytes(nonce + self._cipher.encrypt(nonce, frame, None))

    def _open(self, end: int, sealed: bytes) -> tuple[int, bytes]:
        nonce, wrong = bytes(sealed[: NONCE.size]), "a frame that was changed, cut short, or sealed for another session"
        try:
            found, number = NONCE.unpack(nonce)
            frame = bytes(self._cipher.decrypt(nonce, bytes(sealed[NONCE.size :]), None))
        except (struct.error, self._invalid, ValueError) as error:
            raise ValueError(f"expected a frame as the other end sealed it, got {wrong}; end the session") from error
        if found != end:
            raise ValueError(
                "expected a frame of the other end, got one of this end's own back; the host reflects frames"
            )
        return number, frame


class Sealed:
    """A carrier that seals frames for the other end of its session, where ``opened`` is, and opens the replies."""

    def __init__(self, carrier: Carrier, session: Session):
        self._carrier, self._session = carrier, session

    def __call__(self, frame: bytes) -> bytes:
        """Send the frame sealed and return the reply's, opened; ``ValueError`` where somebody has tampered."""
        number, sealed = self._session.ask(frame)
        return self._session.read(number, self._carrier(sealed))


def opened(carrier: Carrier, session: Session) -> Carrier:
    """Return the enclave's end: a carrier of sealed frames that opens them for ``carrier`` and seals its replies."""

    def carry(sealed: bytes) -> bytes:
        number, frame = session.receive(sealed)
        return session.answer(number, carrier(frame))

    return carry


class Host:
    """A carrier that passes sealed frames on, and all that it can write down of them: a row ``sizes`` an exchange.

    A row holds bytes up, bytes down, and the seconds between them by the host's own ``clock``; ``requests`` is the
    direction of the requests, as in ``Metered``. Where none comes back, no bytes are written down for it.
    """

    def __init__(self, carrier: Carrier, *, clock: Clock | None = None, requests: str = "up"):
        if requests not in DIRECTIONS:
            raise ValueError(f"expected requests to go 'up' or 'down', got {requests!r}")
        self.rows: list[tuple[float, float, float]] = []
        self._carrier, self._requests = carrier, requests
        self._clock: Clock = RealClock() if clock is None else clock

    def __call__(self, sealed: bytes) -> bytes:
        """Pass the frame on, and write down how long it and its reply are, and when they passed."""
        began, reply = self._clock.now(), b""
        try:
            reply = self._carrier(sealed)
            return reply
        finally:
            there_and_back = (float(len(sealed)), float(len(reply)))
            up, down = there_and_back if self._requests == "up" else there_and_back[::-1]
            self.rows.append((up, down, round(self._clock.now() - began, RESOLUTION)))

    def silent(self) -> None:
        """Write down that nothing crossed where something was due: a host may know how often a client has a sample."""
        self.rows.append((0.0, 0.0, 0.0))

    @property
    def sizes(self) -> Tensor:
        """Bytes up, bytes down and seconds of each exchange so far, [exchanges, 3] in float64."""
        return torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 3)

    @property
    def nbytes(self) -> dict[str, dict[str, int]]:
        """The bytes so far, by direction; their one kind is what is sealed."""
        totals = self.sizes.sum(0).long().tolist()
        return {direction: {Kind.CIPHERTEXT.value: total} for direction, total in zip(DIRECTIONS, totals, strict=False)}


def enclosed(
    carrier: Carrier, attested: Attested, *, clock: Clock | None = None, requests: str = "up"
) -> tuple[Carrier, Host]:
    """Put ``carrier`` into an enclave: return the client's end, which seals, and the host between; a fresh key."""
    session = Session(attested)
    host = Host(opened(carrier, session), clock=clock, requests=requests)
    return Sealed(host, session), host


@dataclass(frozen=True, kw_only=True)
class Enclave:
    """What running in an enclave costs, as factors on the time outside of it. All of it is a model.

    ``slowdown`` is of everything computed, ``memory`` the bytes that fit without paging, and ``paging`` how many times
    as long as inside memory what does not fit takes. ``sealing`` are bytes that each frame grows by. ``source`` says
    where each is from, and what is assumed.
    """

    name: str
    slowdown: float
    source: str
    memory: float = inf
    paging: float = 1.0
    sealing: int = SEALING_NBYTES

    def __post_init__(self) -> None:
        for name in ("slowdown", "paging"):
            if not (getattr(self, name) >= 1 and isfinite(getattr(self, name))):
                raise ValueError(f"expected a finite {name} of 1 or more, got {getattr(self, name)}; 1 is as outside")
        if not (self.memory > 0 and self.sealing >= 0):
            raise ValueError(f"expected memory > 0 and sealing ≥ 0 bytes, got {self.memory} and {self.sealing}")

    def factor(self, nbytes: float) -> float:
        """Return how many times as long as outside it takes to compute over ``nbytes`` of weights and activations.

        slowdown · (1 + (paging − 1) · share), where the share of ``nbytes`` that does not fit is met as often as the
        rest: assumed.
        """
        if not nbytes >= 0:
            raise ValueError(f"expected bytes ≥ 0 of weights and activations, got {nbytes}")
        share = max(0.0, 1 - self.memory / nbytes) if nbytes else 0.0
        return self.slowdown * (1 + (self.paging - 1) * share)


def in_enclave(device: Device, enclave: Enclave, nbytes: float) -> Device:
    """Return the device as it is inside of the enclave, modelled, for work over ``nbytes`` of weights and activations.

    Every rate is divided, and the overhead of an operation multiplied, by ``Enclave.factor``; powers stay.
    """
    factor = enclave.factor(nbytes)
    return replace(
        device,
        name=f"{device.name} in {enclave.name}",
        convolution=device.convolution / factor,
        linear=device.linear / factor,
        moved=device.moved / factor,
        overhead=device.overhead * factor,
        memory=int(min(device.memory, enclave.memory)) if isfinite(enclave.memory) else device.memory,
        source=f"{device.source}. In the enclave, modelled: {enclave.source}",
        modelled=True,
    )


CHRAPEK = 'Chrapek et al. 2025, "Confidential LLM Inference" (arXiv:2509.18886)'
AKRAM = 'Akram et al. 2020, "Performance Analysis of Scientific Computing Workloads on Trusted Execution Environments"'

# Other models than those measured, on other machines than a user's: orders of magnitude. All of them grow by 28 bytes a
# frame, which is what is sealed here; the seconds that encrypting takes are left out, assumed small beside any network.
ENCLAVES = {
    one.name: one
    for one in (
        Enclave(
            name="sgx",
            slowdown=1.2,
            memory=93 * 2**20,
            paging=5.0,
            source="SGX of the first generation: 128 MiB, of which such processors report 93 MiB for enclaves. "
            f"Slowdown: the least of 1.2 to 126 times in {AKRAM}. Paging: a program's 5 times on average in Taassori "
            "et al. 2018 (ASPLOS, VAULT), here assumed of the part that does not fit. Slalom (Tramèr & Boneh 2019, "
            "arXiv:1806.03287) expects an order of magnitude against the best untrusted hardware, which is more",
        ),
        Enclave(
            name="tdx",
            slowdown=1.2,
            source=f"Slowdown: latency within 20 % (throughput within 10 %) for Llama 2 in TDX and in SGX of servers, "
            f"{CHRAPEK}. A virtual machine's memory, so no paging: assumed",
        ),
        Enclave(
            name="sev",
            slowdown=1.15,
            source=f"Slowdown: 1 to 1.15 times with pages placed near their processor (to 3.4 without), {AKRAM}. A "
            "virtual machine's memory, so no paging: assumed",
        ),
        Enclave(
            name="confidential_gpu",
            slowdown=1.07,
            source="Slowdown: below 7 % for most queries of language models on an H100, nearly all of it transfers to "
            'the GPU: Zhu et al. 2024, "Confidential Computing on NVIDIA Hopper GPUs" (arXiv:2409.03992); 4 to 8 % in '
            f"{CHRAPEK}. Small batches, which move more than they compute, may fare worse; no paging: assumed",
        ),
    )
}


def _cipher(key: bytes) -> tuple[Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ImportError(
            "expected the package cryptography for sealed frames; pip install 'splitlearn[net]'"
        ) from error
    return AESGCM(key), InvalidTag
