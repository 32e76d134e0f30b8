"""Message and frame: what parties say to each other, and its bytes.

A frame is a prelude of 24 bytes and a file in the safetensors layout, so that any safetensors reader can open
``frame[24:]``. The prelude holds magic, version, a CRC-32 of everything before the payload, and the payload's
length. Nothing in a frame is code; every size, type and shape is checked before memory is taken.
"""

import json
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Codec", "Kind", "Message", "decode", "encode", "frame_nbytes"]

MAGIC = b"SPLT"
VERSION = 1
PRELUDE = struct.Struct("<4sHHIIQ")  # magic, version, reserved, CRC-32, reserved, payload length
LENGTH = struct.Struct("<Q")  # of the JSON header, as safetensors has it
MAX_HEADER_NBYTES = 1 << 20
MAX_NBYTES = 1 << 30
MAX_DIMS = 8
STEP_DIGITS = 12  # fixed width, or byte counts drift with the step
PART = "#"  # a codec's parts of a tensor cross as key#part
STEP, NO_STEP = b'"step":"', b"0" * STEP_DIGITS  # what stands before the step in a header, and step 0
KEPT = 128  # headers, less their steps, of messages that come again and again: written, or checked, once
KEPT_TENSORS, KEPT_NBYTES = 16, 2048  # the greatest that are kept, to write and to read

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kind(StrEnum):
    """What a tensor is. A message's keys are ``kind`` or ``kind/name``; threats and byte counts go by kind."""

    INPUT = "input"  # sample numbers or tokens that name the inputs; has no gradient
    ACTIVATION = "activation"  # what a stage put out; asks for a gradient
    GRADIENT = "gradient"  # of the loss in an activation
    LABEL = "label"
    LOSS = "loss"
    PREDICTION = "prediction"
    WEIGHTS = "weights"
    UPDATE = "update"  # weights less the weights they started from
    COUNT = "count"  # how many samples stand behind weights
    CIPHERTEXT = "ciphertext"  # whatever it is of; nobody without the key can tell
    SHARE = "share"  # one of two additive shares of whatever it is; nobody can tell from one
    SEED = "seed"  # of a share that its receiver draws itself
    GLOO = "gloo"  # what CrypTen's parties tell each other, and draw, on sockets of their own
    PARAMETERS = "parameters"  # public settings of a protection, JSON in UTF-8
    ERROR = "error"  # one line of text, UTF-8
    FRAMING = "framing"  # bytes that carry no tensor; never a key

    @classmethod
    def of(cls, key: str) -> "Kind":
        """Return the kind of a message's key; raises ``ValueError`` for one outside the closed set."""
        kind = KINDS.get(key.partition("/")[0])
        if kind is None:
            raise ValueError(f"expected a key that starts with one of {', '.join(KINDS)}; got {_short(key)}")
        return kind


KINDS = {kind.value: kind for kind in Kind if kind is not Kind.FRAMING}


@dataclass(frozen=True, slots=True)
class Message:
    """A verb and its tensors. ``session`` names the party addressed; ``step`` counts its requests from 1."""

    verb: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    session: str = ""
    step: int = 0


class Codec(Protocol):
    """A compression of tensors on the wire. Both ends hold the same one; frames name it."""

    @property
    def name(self) -> str:
        """The name, parameters included, that both ends must agree on."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of tensor that it packs; all others cross as they are."""

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parts that cross in place of a floating-point tensor, by part name."""

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of this type and shape; raises ``ValueError`` where the parts do not fit it."""


def encode(message: Message, codec: Codec | None = None) -> bytes:
    """Return the message as one frame; ``codec`` packs the floating-point tensors of its kinds.

    Raises ``ValueError`` for what no frame can hold: a key of no ``Kind``, a type not in ``DTYPES``, more than eight
    dimensions, a step that is negative or of more than twelve digits, a header of more than 1 MiB.
    """
    if not 0 <= message.step < 10**STEP_DIGITS:
        raise ValueError(f"expected a step from 0 to 10^{STEP_DIGITS} - 1, got {message.step}; count requests from 1")
    places = tuple((key, tensor.dtype, tensor.shape) for key, tensor in message.tensors.items())
    if codec is None:
        head = (_kept_head if len(places) <= KEPT_TENSORS else _plain_head)(message.verb, message.session, places)
        return _frame(head, message.step, message.tensors)
    _check(places)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, list[Any]] = {}
    for key, tensor in message.tensors.items():
        if Kind.of(key) in codec.kinds and tensor.is_floating_point():
            packed[key] = [DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
            tensors.update({f"{key}{PART}{part}": t for part, t in codec.pack(key, tensor.detach()).items()})
        else:
            tensors[key] = tensor
    places = tuple((key, tensor.dtype, tensor.shape) for key, tensor in tensors.items())
    head = _head({"verb": message.verb, "session": message.session}, places, codec.name, _write(packed))
    return _frame(head, message.step, tensors)


def decode(
    frame: bytes | bytearray | memoryview, codec: Codec | None = None, *, max_nbytes: int = MAX_NBYTES
) -> Message:
    """Return the message in ``frame``, its tensors in fresh memory.

    Every malformed frame is one ``ValueError``. At most ``max_nbytes`` are taken for its tensors, as they cross
    and as they are unpacked. The payload is not checked here: files check theirs by checksum, sockets by TLS.
    """
    view = memoryview(frame)
    text, start = _header(view)
    metadata, places, step = _described(text, len(view) - start, max_nbytes)
    tensors = {key: _tensor(view[start + low : start + high], dtype, shape) for key, dtype, shape, low, high in places}
    if metadata["codec"] is not None:
        tensors = _unpacked(tensors, metadata, codec, max_nbytes)
    for key in tensors:
        if PART in key:
            raise ValueError(f"malformed frame: {_short(key)} is a part of no packed tensor")
    return Message(metadata["verb"], tensors, metadata["session"], step)


def frame_nbytes(frame: bytes | bytearray | memoryview) -> Counter[str]:
    """Return the frame's bytes by kind of tensor; what is left, header and padding, counts as ``framing``.

    The counts add up to ``len(frame)``; a malformed header is a ``ValueError``.
    """
    text, start = _header(memoryview(frame))
    at, nbytes = _step_at(text), len(frame) - start
    counts = Counter(_counts(text, nbytes) if at is None else _kept_counts(_without_step(text, at), nbytes))
    counts[Kind.FRAMING.value] = start
    return counts


Place = tuple[str, torch.dtype, tuple[int, ...]]  # key, type and shape of a tensor


class _Head(NamedTuple):
    """A header about its step: the text before and after, the payload's length, and the checksum as far as the step."""

    before: bytes
    after: bytes
    payload: int
    crc: int


def _check(places: Sequence[Place]) -> None:
    for key, dtype, shape in places:
        Kind.of(key)
        if dtype not in DTYPE_NAMES or len(shape) > MAX_DIMS or PART in key:
            raise ValueError(
                f"expected a tensor of type {', '.join(DTYPES)}, of at most {MAX_DIMS} dimensions, under a key without "
                f"{PART!r}; got {dtype} of {len(shape)} dimensions under {_short(key)}; cast, reshape or rename"
            )


def _plain_head(verb: str, session: str, places: tuple[Place, ...]) -> _Head:
    """Return the header of tensors that no codec packs."""
    _check(places)
    return _head({"verb": verb, "session": session}, places)


_kept_head = lru_cache(KEPT)(_plain_head)


def _head(metadata: dict[str, str], places: Sequence[Place], codec: str | None = None, packed: str = "") -> _Head:
    also = {} if codec is None else {"codec": codec, "packed": packed}
    header: dict[str, Any] = {"__metadata__": {**metadata, "step": NO_STEP.decode(), **also}}
    at = 0
    for key, dtype, shape in places:
        end = at + prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = _write(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise ValueError(f"expected a header of at most {MAX_HEADER_NBYTES} bytes, got {len(text)}; send fewer tensors")
    body, step = LENGTH.pack(len(text)) + text, LENGTH.size + text.index(STEP) + len(STEP)
    before = body[:step]
    crc = zlib.crc32(before, zlib.crc32(PRELUDE.pack(MAGIC, VERSION, 0, 0, 0, at)))
    return _Head(before, body[step + STEP_DIGITS :], at, crc)


def _frame(head: _Head, step: int, tensors: Mapping[str, Tensor]) -> bytes:
    rest = b"%0*d%b" % (STEP_DIGITS, step, head.after)
    prelude = PRELUDE.pack(MAGIC, VERSION, 0, zlib.crc32(rest, head.crc), 0, head.payload)
    return b"".join([prelude, head.before, rest, *map(_memory, tensors.values())])


def _memory(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes; torch is asked only for what is needed, as each call lets other threads go first."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not (tensor.is_cpu and tensor.is_contiguous()):
        tensor = tensor.cpu().contiguous()
    return memoryview(_numpy(tensor))


def _header(view: memoryview) -> tuple[bytes, int]:
    """Return the text of the header, as its checksum says, and the offset at which the payload starts."""
    least = PRELUDE.size + LENGTH.size
    if len(view) < least:
        raise ValueError(f"malformed frame: expected at least {least} bytes, got {len(view)}")
    magic, version, zero, crc, zero2, payload = PRELUDE.unpack_from(view)
    if magic != MAGIC or zero or zero2:
        raise ValueError(f"malformed frame: expected it to start with {MAGIC!r}, reserved bytes zero; got {magic!r}")
    if version != VERSION:
        raise ValueError(f"malformed frame: expected version {VERSION}, got {version}; run one release on both ends")
    (length,) = LENGTH.unpack_from(view, PRELUDE.size)
    start = least + length
    if length > MAX_HEADER_NBYTES or start + payload != len(view):
        raise ValueError(
            f"malformed frame: its header of {length} and payload of {payload} bytes do not make up the {len(view)} "
            "bytes that came; it was cut short, or its lengths are wrong"
        )
    body = bytes(view[PRELUDE.size : start])
    found = zlib.crc32(body, zlib.crc32(PRELUDE.pack(magic, version, 0, 0, 0, payload)))
    if found != crc:
        raise ValueError(f"malformed frame: expected header checksum {crc:08x}, got {found:08x}; send it again")
    return body[LENGTH.size :], start


def _described(
    text: bytes, nbytes: int, max_nbytes: int
) -> tuple[dict[str, Any], list[tuple[str, torch.dtype, tuple[int, ...], int, int]], int]:
    """Return the checked metadata and layout, which nobody may change, and the step.

    A header that differs from one that was checked in the digits of its step alone is not checked again. In a header
    that is well-formed ``"step":"`` stands nowhere but before the step, as keys elsewhere are checked, and quotes
    within strings are escaped.
    """
    at = _step_at(text)
    if at is None:
        metadata, places = _parsed(text, nbytes, max_nbytes)
        return metadata, places, metadata["step"]
    metadata, places = _kept(_without_step(text, at), nbytes, max_nbytes)
    return metadata, places, int(text[at : at + STEP_DIGITS])


def _step_at(text: bytes) -> int | None:
    """Return where the digits of the step begin in a header that is short enough to be kept."""
    at = text.find(STEP) + len(STEP)
    end = at + STEP_DIGITS
    kept = at >= len(STEP) and len(text) <= KEPT_NBYTES and text[at:end].isdigit() and text[end : end + 1] == b'"'
    return at if kept else None


def _without_step(text: bytes, at: int) -> bytes:
    return text[:at] + NO_STEP + text[at + STEP_DIGITS :]


def _parsed(
    text: bytes, nbytes: int, max_nbytes: int
) -> tuple[dict[str, Any], list[tuple[str, torch.dtype, tuple[int, ...], int, int]]]:
    header = _object(text, "header")
    return _metadata(header), _layout(header, nbytes, max_nbytes)


def _counts(text: bytes, nbytes: int) -> dict[str, int]:
    """Return the payload's bytes by kind."""
    header = _object(text, "header")
    header.pop("__metadata__", None)
    counts: Counter[str] = Counter()
    for key, _, _, low, high in _layout(header, nbytes, 1 << 60):
        counts[Kind.of(key.partition(PART)[0]).value] += high - low
    return counts


_kept, _kept_counts = lru_cache(KEPT)(_parsed), lru_cache(KEPT)(_counts)


def _object(text: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, no key of which stands twice."""
    try:
        found = _read(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed frame: its {what} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"malformed frame: expected a JSON object as {what}, got {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


_read = json.JSONDecoder(object_pairs_hook=_unique).decode  # built once: json.loads builds one a call
_write = json.JSONEncoder(separators=(",", ":")).encode


def _metadata(header: dict[str, Any]) -> dict[str, Any]:
    """Take the metadata out of the header and return its checked fields."""
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("malformed frame: expected metadata that maps strings to strings")
    if metadata.keys() - {"codec", "packed"} != {"verb", "session", "step"} or len(metadata) not in (3, 5):
        raise ValueError("malformed frame: expected metadata verb, session and step, and with a codec its packed list")
    step = metadata["step"]
    if len(step) != STEP_DIGITS or not (step.isascii() and step.isdigit()):
        raise ValueError(f"malformed frame: expected a step of {STEP_DIGITS} digits, got {_short(step)}")
    return {"codec": None, **metadata, "step": int(step)}


def _layout(
    header: dict[str, Any], nbytes: int, max_nbytes: int
) -> list[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """Return key, type, shape, start and end of each tensor, after a check that they fill the payload in order."""
    if nbytes > max_nbytes:
        raise ValueError(f"expected a payload of at most {max_nbytes} bytes, got {nbytes}; raise max_nbytes=…")
    places, at = [], 0
    for key, entry in header.items():
        Kind.of(key.partition(PART)[0])
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"malformed frame: expected dtype, shape and data_offsets for {_short(key)}")
        dtype, shape = _type_and_shape(key, entry["dtype"], entry["shape"], max_nbytes)
        end = at + prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [at, end] or end > nbytes:
            raise ValueError(
                f"malformed frame: expected {_short(key)} at bytes {at} to {end} of a payload of {nbytes}; its place, "
                "its shape or its type is wrong"
            )
        places.append((key, dtype, shape, at, end))
        at = end
    if at != nbytes:
        raise ValueError(f"malformed frame: expected a payload of {at} bytes, got {nbytes}")
    return places


def _type_and_shape(key: str, name: Any, shape: Any, max_nbytes: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the checked type and shape. Sizes of zero count as one: torch multiplies the others all the same."""
    if type(name) is not str or name not in DTYPES:
        raise ValueError(f"malformed frame: expected a type among {', '.join(DTYPES)} for {_short(key)}")
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise ValueError(f"malformed frame: expected a list of at most {MAX_DIMS} sizes as shape of {_short(key)}")
    dtype, extent = DTYPES[name], 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 40:
            raise ValueError(f"malformed frame: expected sizes from 0 to 2^40 as shape of {_short(key)}")
        extent *= size or 1
    if extent * dtype.itemsize > max_nbytes:
        raise ValueError(f"malformed frame: {_short(key)} of shape {shape} is over the limit of {max_nbytes} bytes")
    return dtype, tuple(shape)


def _tensor(raw: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)  # fresh and aligned: alignment changes float64 matrix products
    if len(raw):
        _numpy(tensor).data.cast("B")[:] = raw
    if dtype is torch.bool and len(raw) and int(tensor.view(torch.uint8).max()) > 1:
        raise ValueError("malformed frame: a truth value is neither 0 nor 1")
    return tensor


def _numpy(tensor: Tensor) -> Any:
    """Return the tensor's memory as an array; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _unpacked(
    tensors: dict[str, Tensor], metadata: dict[str, Any], codec: Codec | None, max_nbytes: int
) -> dict[str, Tensor]:
    """Return the tensors with each packed one put back in its place."""
    if codec is None or codec.name != metadata["codec"]:
        raise ValueError(
            f"expected a frame packed by codec {'none' if codec is None else codec.name}, got "
            f"{_short(metadata['codec'])}; give both ends the same codec"
        )
    packed = _object(metadata["packed"].encode(errors="replace"), "list of packed tensors")
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in packed}
    result = {}
    for key, tensor in tensors.items():
        owner, mark, part = key.partition(PART)
        if mark and owner in parts:
            parts[owner][part] = tensor
        else:
            result[key] = tensor
    left = max_nbytes
    for key, entry in packed.items():
        if type(entry) is not list or len(entry) != 2:
            raise ValueError(f"malformed frame: expected a type and a shape for {_short(key)}")
        dtype, shape = _type_and_shape(key, entry[0], entry[1], left)
        if Kind.of(key) not in codec.kinds or key in result or not dtype.is_floating_point:
            raise ValueError(f"malformed frame: {_short(key)} is not packed by {codec.name}, or stands twice")
        result[key] = codec.unpack(parts[key], dtype, shape)
        left -= result[key].nbytes
    return result


def _short(text: str) -> str:
    """Return what came from outside, quoted and fit for one line."""
    return repr(text[:80])
