"""Frames: round trips over all types and shapes, and every malformed one a ValueError within bounded memory."""

import json
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_memory import little_memory
from torch import Tensor

from splitlearn.codecs import Int8
from splitlearn.frames import (
    DTYPES,
    LENGTH,
    MAGIC,
    PRELUDE,
    VERSION,
    Kind,
    Message,
    decode,
    encode,
    frame_nbytes,
)

KEYS = ["activation", "label", "weights/0.weight", "weights/0.bias", "loss"]
steady = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def bits(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert bits(one) == bits(other)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any type in up to eight dimensions, contiguous or not."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 3), max_size=8))
    count = torch.Size(shape).numel()
    raw = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if layout == "strided" and tensor.ndim:
        return tensor[..., ::2]
    if layout == "expanded" and tensor.ndim < 8:
        return tensor[None].expand(2, *tensor.shape)
    return tensor


def forge(header: bytes | object, payload: bytes = b"") -> bytes:
    """A frame with any header and a checksum that fits it: what a forger, who can compute CRCs, would send."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = LENGTH.pack(len(text)) + text
    crc = zlib.crc32(body, zlib.crc32(PRELUDE.pack(MAGIC, VERSION, 0, 0, 0, len(payload))))
    return PRELUDE.pack(MAGIC, VERSION, 0, crc, 0, len(payload)) + body + payload


METADATA = {"verb": "learn", "session": "server", "step": "000000000001"}
PLACE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def sample() -> Message:
    return Message("learn", {"activation": torch.arange(6.0).reshape(2, 3), "label": torch.tensor([0, 1])}, "server", 7)


@steady
@given(st.lists(tensors(), max_size=len(KEYS)), st.text(max_size=20), st.integers(0, 10**12 - 1))
def test_a_round_trip_keeps_every_bit(values, text, step):
    message = Message("learn", dict(zip(KEYS, values, strict=False)), text, step)
    frame = encode(message)
    back = decode(frame)
    assert (back.verb, back.session, back.step) == ("learn", text, step)
    assert list(back.tensors) == list(message.tensors)
    for key, tensor in message.tensors.items():
        assert_same(back.tensors[key], tensor)
        assert back.tensors[key].is_contiguous()
        assert back.tensors[key].data_ptr() % 64 == 0


@steady
@given(st.lists(tensors(), max_size=len(KEYS)))
def test_behind_the_prelude_stands_a_safetensors_file_and_the_bytes_add_up(values):
    named = dict(zip(KEYS, values, strict=False))
    frame = encode(Message("learn", named))
    opened = safetensors.torch.load(frame[24:])
    assert opened.keys() == named.keys()
    for key, tensor in named.items():
        assert_same(opened[key], tensor)
    counts = frame_nbytes(frame)
    assert counts.total() == len(frame)
    for kind in Kind:
        if kind is not Kind.FRAMING:
            nbytes = sum(t.numel() * t.element_size() for key, t in named.items() if key.split("/")[0] == kind)
            assert counts[kind] == nbytes


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_any_buffer_decodes_into_memory_of_its_own(buffer):
    raw = bytearray(encode(sample()))
    back = decode(buffer(raw))
    assert frame_nbytes(buffer(raw)).total() == len(raw)
    raw[:] = bytes(len(raw))
    assert_same(back.tensors["activation"], torch.arange(6.0).reshape(2, 3))


def test_parameters_and_activations_with_a_graph_are_encoded_as_they_are():
    weight = torch.nn.Parameter(torch.ones(3))
    back = decode(encode(Message("x", {Kind.WEIGHTS + "/w": weight, Kind.ACTIVATION: weight * 2}))).tensors
    assert back["weights/w"].tolist() == [1, 1, 1]
    assert back[Kind.ACTIVATION].tolist() == [2, 2, 2]
    assert not back["weights/w"].requires_grad


def test_a_frame_is_as_long_at_every_step_and_adds_at_most_a_hundredth_to_64_kilobytes():
    z, y = torch.randn(64, 256), torch.arange(64)
    lengths = {len(encode(Message("learn", {"activation": z, "label": y}, "server", n))) for n in (1, 999, 10**12 - 1)}
    assert len(lengths) == 1
    counts = frame_nbytes(encode(Message("learn", {"activation": z}, "server", 1)))
    assert counts["activation"] == 1 << 16
    assert counts["framing"] <= 0.01 * (1 << 16)


@pytest.mark.parametrize("read", [decode, frame_nbytes])
def test_every_truncation_and_every_surplus_is_refused(read):
    frame = encode(sample())
    for length in range(len(frame)):
        with pytest.raises(ValueError, match="malformed frame"):
            read(frame[:length])
    with pytest.raises(ValueError, match="cut short"):
        read(frame + b"\0")


@pytest.mark.parametrize("read", [decode, frame_nbytes])
def test_every_flipped_bit_before_the_payload_is_refused(read):
    frame = bytearray(encode(sample()))
    for bit in range(8 * (len(frame) - 40)):  # 24 bytes of activation and 16 of labels
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="malformed frame"):
            read(frame)
        frame[bit // 8] ^= 1 << bit % 8
    assert frame == encode(sample())
    read(frame)


def test_the_payload_is_left_to_files_and_tls():
    frame = bytearray(encode(sample()))
    frame[-1] ^= 1
    assert decode(frame).tensors["label"].tolist() != [0, 1]


def header(**places: object) -> dict[str, object]:
    return {"__metadata__": METADATA, **places}


def place(**changes: object) -> dict[str, object]:
    return header(activation={**PLACE, **changes})


def metadata(**changes: object) -> dict[str, object]:
    return {"__metadata__": {**METADATA, **changes}, "activation": PLACE}


FORGED = {
    "no object": [],
    "no metadata": {"activation": PLACE},
    "metadata of numbers": metadata(verb=1),
    "metadata without verb": {"__metadata__": {"session": "", "step": "0" * 12, "codec": ""}},
    "metadata beyond ours": metadata(extra=""),
    "codec without its list": metadata(codec="int8"),
    "short step": metadata(step="1"),
    "negative step": metadata(step="-00000000001"),
    "step in other digits": metadata(step="00000000000²"),
    "kind unknown": header(secret=PLACE),
    "kind framing": header(framing=PLACE),
    "kind empty": header(**{"": PLACE}),
    "part of nothing": header(**{"activation#levels": PLACE}),
    "place no object": header(activation=[0, 24]),
    "place lacks shape": header(activation={"dtype": "F32", "data_offsets": [0, 24]}),
    "place has more": place(order="C"),
    "dtype unknown": place(dtype="F31"),
    "dtype a list": place(dtype=["F32"]),
    "dtype a deep list": place(dtype=json.loads("[" * 500 + "]" * 500)),
    "shape a number": place(shape=6),
    "shape negative": place(shape=[-2, -3]),
    "shape of fractions": place(shape=[2.0, 3.0]),
    "shape of truths": place(shape=[True, 6]),
    "shape too small": place(shape=[2, 2]),
    "shape too large": place(shape=[2, 4]),
    "shape of 2^60 bytes": place(shape=[1 << 29, 1 << 29]),
    "shape and place of 2^60 bytes": place(shape=[1 << 29, 1 << 29], data_offsets=[0, 1 << 60]),
    "shape of 512 MB": place(shape=[1 << 27], data_offsets=[0, 1 << 29]),
    "shape that overflows": place(shape=[1 << 32, 1 << 32]),
    "shape of a huge number": place(shape=[10**4000]),
    "nine dimensions": place(shape=[1, 1, 1, 1, 1, 1, 1, 2, 3]),
    "many dimensions": place(shape=[1] * 10_000),
    "offsets negative": place(data_offsets=[-24, 0]),
    "offsets turned round": place(data_offsets=[24, 0]),
    "offsets past the end": place(data_offsets=[8, 32]),
    "offsets huge": place(data_offsets=[10**4000, 10**4000 + 24]),
    "offsets of text": place(data_offsets=["0", "24"]),
    "one offset": place(data_offsets=[24]),
    "overlap": header(activation=PLACE, gradient=PLACE),
    "gap": header(activation={**PLACE, "shape": [2], "data_offsets": [0, 8]}),
    "no tensor for the payload": header(),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_forged_header_is_refused_before_memory_is_taken(forged):
    with little_memory(), pytest.raises(ValueError, match=r"^(malformed frame|expected).{1,400}$") as caught:
        decode(forge(forged, bytes(24)))
    assert caught.type is ValueError


def test_little_memory_is_too_little_for_what_the_forgers_claim():
    with little_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(1 << 27)


LEVELS = {"activation#levels": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
PACKED = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no object": "[]",
    "twice": '{"activation": ["F32", [4]], "activation": ["F32", [4]]}',
    "no pair": '{"activation": "F3"}',
    "three": '{"activation": ["F32", [4], 1]}',
    "type unknown": '{"activation": ["F31", [4]]}',
    "type no float": '{"activation": ["I64", [4]]}',
    "shape negative": '{"activation": ["F32", [-4]]}',
    "shape of 2^60 bytes": '{"activation": ["F32", [536870912, 536870912]]}',
    "shape over the limit": '{"activation": ["F32", [268435457]]}',
    "shape that overflows, empty": '{"activation": ["F32", [549755813888, 0, 549755813888, 549755813888]]}',
    "kind unknown": '{"secret": ["F32", [4]]}',
    "kind not packed": '{"weights/w": ["F32", [4]]}',
    "lone surrogate": '{"\ud800": ["F32", [4]]}',
    "part of another": '{"gradient": ["F32", [4]]}',
    "empty": "{}",
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED.keys())
def test_a_forged_list_of_packed_tensors_is_refused_before_memory_is_taken(packed):
    forged = {"__metadata__": {**METADATA, "codec": "int8", "packed": packed}, **LEVELS}
    with little_memory(), pytest.raises(ValueError, match=r"^(malformed frame|expected).{1,400}$") as caught:
        decode(forge(forged, bytes(4)), Int8())
    assert caught.type is ValueError


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        json.dumps(header(activation=PLACE)).encode("utf-16"),
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"__metadata__":' + b"9" * 100_000 + b"}",
        b"{" + b'"activation":{},' * 2 + b'"label":{}}',
        json.dumps(place()).replace('"shape"', '"dtype": "F32", "shape"').encode(),
        json.dumps(place()).encode() + b"{}",
    ],
    ids=["empty", "open", "no text", "utf-16", "lists", "objects", "number", "twice", "twice inside", "two"],
)
def test_a_header_that_is_not_one_plain_json_object_is_refused(text):
    with little_memory(), pytest.raises(ValueError, match="malformed frame: its header is not JSON"):
        decode(forge(text, bytes(24)))


def test_an_empty_tensor_whose_other_sizes_overflow_is_refused():
    with little_memory(), pytest.raises(ValueError, match="over the limit"):
        decode(forge(place(shape=[0, 1 << 39, 1 << 39, 1 << 39], data_offsets=[0, 0])))


def test_lengths_beyond_the_frame_are_refused_before_memory_is_taken():
    for length, payload in [(1 << 60, 0), (0, 1 << 60), ((1 << 64) - 1, (1 << 64) - 1), (1 << 21, 0), (8, 1 << 30)]:
        crc = zlib.crc32(LENGTH.pack(length), zlib.crc32(PRELUDE.pack(MAGIC, VERSION, 0, 0, 0, payload)))
        frame = PRELUDE.pack(MAGIC, VERSION, 0, crc, 0, payload) + LENGTH.pack(length) + bytes(64)
        with little_memory(), pytest.raises(ValueError, match="cut short"):
            decode(frame)


def test_another_version_is_refused_with_the_fix():
    frame = bytearray(encode(sample()))
    frame[4] = 2
    with pytest.raises(ValueError, match="expected version 1, got 2; run one release on both ends"):
        decode(frame)


def test_a_truth_value_is_zero_or_one():
    truth = {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}
    assert decode(forge(header(label=truth), b"\0\1\1")).tensors["label"].tolist() == [False, True, True]
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        decode(forge(header(label=truth), b"\0\1\2"))


def test_the_limit_holds_for_each_tensor_and_all_together():
    message = Message("x", {"weights/a": torch.zeros(10), "weights/b": torch.zeros(10)})
    assert decode(encode(message), max_nbytes=80).tensors.keys() == message.tensors.keys()
    with pytest.raises(ValueError, match="expected a payload of at most 79 bytes, got 80"):
        decode(encode(message), max_nbytes=79)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@steady
@given(
    st.sampled_from([("__metadata__",), ("__metadata__", "step"), ("activation",), ("activation", "dtype")])
    | st.sampled_from([("activation", "shape"), ("activation", "data_offsets"), ("new",), ("label",)]),
    json_values,
    st.binary(max_size=32),
)
def test_any_json_anywhere_in_the_header_is_a_message_or_a_value_error(path, value, payload):
    forged = json.loads(json.dumps(place()))
    *way, last = path
    node = forged[way[0]] if way else forged
    node[last] = value
    refused = None
    try:
        message = decode(forge(forged, payload))
    except ValueError as error:
        refused = error
    if refused is None:
        assert sum(tensor.nbytes for tensor in message.tensors.values()) == len(payload)
    else:
        assert type(refused) is ValueError


@steady
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_error(raw):
    for frame in (raw, MAGIC + raw, forge(raw)):
        for read in (decode, frame_nbytes):
            with pytest.raises(ValueError) as caught:
                read(frame)
            assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("secret", torch.zeros(1), "expected a key that starts with one of input, activation"),
        ("framing", torch.zeros(1), "expected a key that starts with"),
        ("activations", torch.zeros(1), "expected a key that starts with"),
        ("weights/a#b", torch.zeros(1), "under a key without '#'"),
        ("activation", torch.zeros([1] * 9), "at most 8 dimensions"),
        ("activation", torch.zeros(1, dtype=torch.complex64), "got torch.complex64"),
        ("activation", torch.zeros(1).to(torch.float8_e5m2), "got torch.float8_e5m2"),
    ],
)
def test_what_no_frame_can_hold_is_refused_when_encoding(key, tensor, said):
    with pytest.raises(ValueError, match=said):
        encode(Message("learn", {key: tensor}))


@pytest.mark.parametrize("step", [-1, 10**12])
def test_a_step_out_of_range_is_refused_when_encoding(step):
    with pytest.raises(ValueError, match="expected a step from 0"):
        encode(Message("learn", step=step))


def test_too_many_names_are_refused_when_encoding():
    with pytest.raises(ValueError, match="send fewer tensors"):
        encode(Message("learn", {f"weights/{'n' * 1000}{i}": torch.zeros(0) for i in range(1100)}))
