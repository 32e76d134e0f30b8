"""Message and frame: what parties say to each other, and its bytes.

A frame is a prelude of 24 bytes and a file in the safetensors layout, so that any safetensors reader can open
``frame[24:]``. The prelude holds magic, version, a CRC-32 of everything before the payload, and the payload's
length. Nothing in a frame is code; every size, type and shape is checked before memory is taken.
"""

import json
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, Protocol

import numpy as np
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
    ERROR = "error"  # one line of text, UTF-8
    FRAMING = "framing"  # bytes that carry no tensor; never a key

    @classmethod
    def of(cls, key: str) -> "Kind":
        """Return the kind of a message's key; raises ``ValueError`` for one outside the closed set."""
        try:
            kind = cls(key.partition("/")[0])
        except ValueError:
            kind = cls.FRAMING
        if kind is cls.FRAMING:
            raise ValueError(
                f"expected a key that starts with one of {', '.join(k for k in cls if k != 'framing')}; got {key!r}"
            )
        return kind


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
    """Return the message as one frame; ``codec`` packs the floating-point tensors of its kinds."""
    metadata = {"verb": message.verb, "session": message.session, "step": f"{message.step:0{STEP_DIGITS}d}"}
    tensors, packed = message.tensors, {}
    if codec is not None:
        tensors = {}
        for key, tensor in message.tensors.items():
            if Kind.of(key) in codec.kinds and tensor.is_floating_point():
                packed[key] = [DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
                tensors.update({f"{key}#{part}": t for part, t in codec.pack(key, tensor.detach()).items()})
            else:
                tensors[key] = tensor
        metadata |= {"codec": codec.name, "packed": json.dumps(packed, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    chunks, offset = [], 0
    for key, tensor in tensors.items():
        Kind.of(key)
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"expected a tensor of type {', '.join(DTYPES)}; got {tensor.dtype} for {key!r}; cast it")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        end = offset + flat.nbytes
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        chunks.append(flat.data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise ValueError(f"expected a header of at most {MAX_HEADER_NBYTES} bytes, got {len(text)}; send fewer tensors")
    body = LENGTH.pack(len(text)) + text
    crc = zlib.crc32(body, zlib.crc32(PRELUDE.pack(MAGIC, VERSION, 0, 0, 0, offset)))
    return b"".join([PRELUDE.pack(MAGIC, VERSION, 0, crc, 0, offset), body, *chunks])


def decode(
    frame: bytes | bytearray | memoryview, codec: Codec | None = None, *, max_nbytes: int = MAX_NBYTES
) -> Message:
    """Return the message in ``frame``, its tensors in fresh memory.

    Every malformed frame is one ``ValueError``. At most ``max_nbytes`` are taken for a tensor, packed or not.
    The payload is not checked here: files check theirs by checksum, sockets by TLS.
    """
    header, start = _header(frame)
    metadata = _metadata(header)
    end = len(frame) - start
    tensors: dict[str, Tensor] = {}
    at = 0
    for key, entry in header.items():
        dtype, shape, (low, high) = _entry(key, entry, max_nbytes)
        if low != at:
            raise ValueError(f"malformed frame: expected {key!r} at byte {at} of the payload, got {low}")
        if high > end:
            raise ValueError(f"malformed frame: {key!r} ends at byte {high} of a payload of {end}")
        tensors[key] = _tensor(frame, start + low, high - low, dtype, shape)
        at = high
    if at != end:
        raise ValueError(f"malformed frame: expected a payload of {at} bytes, got {end}")
    if metadata["codec"] is not None:
        tensors = _unpacked(tensors, metadata, codec, max_nbytes)
    for key in tensors:
        if "#" in key:
            raise ValueError(f"malformed frame: {key!r} is a part of no packed tensor")
    return Message(metadata["verb"], tensors, metadata["session"], metadata["step"])


def frame_nbytes(frame: bytes | bytearray | memoryview) -> Counter[str]:
    """Return the frame's bytes by kind of tensor; what is left, header and padding, counts as ``framing``."""
    header, _ = _header(frame)
    header.pop("__metadata__", None)
    counts: Counter[str] = Counter()
    for key, entry in header.items():
        _, _, (low, high) = _entry(key, entry, MAX_NBYTES)
        counts[Kind.of(key).value] += high - low
    counts[Kind.FRAMING.value] = len(frame) - sum(counts.values())
    return counts


def _header(frame: bytes | bytearray | memoryview) -> tuple[dict[str, Any], int]:
    """Return the checked JSON header and the offset at which the payload starts."""
    least = PRELUDE.size + LENGTH.size
    if len(frame) < least:
        raise ValueError(f"malformed frame: expected at least {least} bytes, got {len(frame)}")
    magic, version, zero, crc, zero2, payload = PRELUDE.unpack_from(frame)
    if magic != MAGIC:
        raise ValueError(f"malformed frame: expected it to start with {MAGIC!r}, got {bytes(magic)!r}")
    if version != VERSION:
        raise ValueError(f"malformed frame: expected version {VERSION}, got {version}; run one release on both ends")
    (length,) = LENGTH.unpack_from(frame, PRELUDE.size)
    start = least + length
    if length > MAX_HEADER_NBYTES or start + payload != len(frame):
        raise ValueError(
            f"malformed frame: its header of {length} and payload of {payload} bytes do not make up the {len(frame)} "
            "bytes that came; it was cut short, or its lengths are wrong"
        )
    with memoryview(frame) as view:
        found = zlib.crc32(
            view[PRELUDE.size : start], zlib.crc32(PRELUDE.pack(magic, version, zero, 0, zero2, payload))
        )
        text = bytes(view[least:start])
    if found != crc:
        raise ValueError(f"malformed frame: expected header checksum {crc:08x}, got {found:08x}; send it again")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed frame: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"malformed frame: expected a JSON object as header, got {type(header).__name__}")
    return header, start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _metadata(header: dict[str, Any]) -> dict[str, Any]:
    """Take the metadata out of the header and return its checked fields."""
    metadata = header.pop("__metadata__", None)
    names = ("verb", "session", "step")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("malformed frame: expected metadata that maps strings to strings")
    if not set(names) <= set(metadata) <= {*names, "codec", "packed"} or ("codec" in metadata) != (
        "packed" in metadata
    ):
        raise ValueError(f"malformed frame: expected metadata {', '.join(names)}; got {', '.join(metadata)}")
    step = metadata["step"]
    if len(step) != STEP_DIGITS or not (step.isascii() and step.isdigit()):
        raise ValueError(f"malformed frame: expected a step of {STEP_DIGITS} digits, got {step[:40]!r}")
    return {"codec": None, **metadata, "step": int(step)}


def _entry(key: str, entry: Any, max_nbytes: int) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """Return the checked type, shape and place of one tensor."""
    Kind.of(key)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"malformed frame: expected dtype, shape and data_offsets for {key!r}")
    dtype, shape = _type_and_shape(key, entry["dtype"], entry["shape"])
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise ValueError(f"malformed frame: expected two byte offsets for {key!r}")
    nbytes = prod(shape) * dtype.itemsize
    if nbytes > max_nbytes or offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"malformed frame: {key!r} of shape {shape} takes {nbytes} bytes, its place has {offsets[1] - offsets[0]}, "
            f"the limit is {max_nbytes}"
        )
    return dtype, shape, (offsets[0], offsets[1])


def _type_and_shape(key: str, name: Any, shape: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"malformed frame: expected a type among {', '.join(DTYPES)} for {key!r}, got {name!r}")
    if not (
        isinstance(shape, list) and len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    ):
        raise ValueError(f"malformed frame: expected at most {MAX_DIMS} sizes below 2^40 as shape of {key!r}")
    return DTYPES[name], tuple(shape)


def _tensor(
    frame: bytes | bytearray | memoryview, at: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    flat = torch.empty(nbytes, dtype=torch.uint8)  # fresh and aligned: alignment changes float64 matrix products
    if nbytes:
        flat.numpy()[:] = np.frombuffer(frame, np.uint8, nbytes, at)
    if dtype is torch.bool and nbytes and int(flat.max()) > 1:
        raise ValueError("malformed frame: a truth value is neither 0 nor 1")
    return flat.view(dtype).reshape(shape)


def _unpacked(
    tensors: dict[str, Tensor], metadata: dict[str, Any], codec: Codec | None, max_nbytes: int
) -> dict[str, Tensor]:
    """Return the tensors with each packed one put back in its place."""
    if codec is None or codec.name != metadata["codec"]:
        ours = "none" if codec is None else codec.name
        raise ValueError(
            f"expected a frame packed by codec {ours}, got {metadata['codec'][:80]}; give both ends the same codec"
        )
    try:
        packed = json.loads(metadata["packed"], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed frame: its list of packed tensors is not JSON ({error})") from error
    if not isinstance(packed, dict) or not all(
        isinstance(entry, list) and len(entry) == 2 for entry in packed.values()
    ):
        raise ValueError("malformed frame: expected a type and a shape for each packed tensor")
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in packed}
    result = {}
    for key, tensor in tensors.items():
        owner, mark, part = key.rpartition("#")
        if mark and owner in parts:
            parts[owner][part] = tensor
        else:
            result[key] = tensor
    for key, (name, shape) in packed.items():
        dtype, sizes = _type_and_shape(key, name, shape)
        if Kind.of(key) not in codec.kinds or key in result:
            raise ValueError(f"malformed frame: {key!r} is not packed by codec {codec.name}, or stands twice")
        if prod(sizes) * dtype.itemsize > max_nbytes:
            raise ValueError(
                f"malformed frame: {key!r} of shape {sizes} unpacks to more than the limit of {max_nbytes} bytes"
            )
        result[key] = codec.unpack(parts[key], dtype, sizes)
    return result
