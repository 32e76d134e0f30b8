"""Codecs: error bounds, independence of the rows, losslessness, error feedback, and forged parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from little_memory import little_memory
from torch import Tensor, nn

from splitlearn.codecs import (
    Ans,
    ErrorFeedback,
    Float16,
    Int8,
    Palette,
    PerKind,
    RandomK,
    TopK,
    Uniform,
    Zstd,
    sparse,
    through,
)
from splitlearn.frames import Codec, Kind, Message, decode, encode
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import wire

CODECS: list[Codec] = [
    Int8(), Float16(), TopK(0.3), Zstd(), Zstd(Int8()), Zstd(TopK(0.3)), Zstd(Zstd(Float16())), Uniform(1), Uniform(3),
    Uniform(4), Ans(Int8()), Ans(Uniform(3)), Zstd(Uniform(4)), PerKind(Ans(Uniform(2)), TopK(0.3)),
]  # fmt: skip
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
steady = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def crossed(codec: Codec, tensor: Tensor, key: str = "activation") -> Tensor:
    """The tensor as the other end of a wire gets it, through a real frame."""
    return decode(encode(Message("learn", {key: tensor}), codec), codec).tensors[key]


def unpack(
    codec: Codec, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    return codec.unpack(parts, dtype, shape)


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-10, 10, width=32) | st.just(0.0)
matrices = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4)
)


@steady
@given(matrices)
def test_int8_is_within_half_a_level(rows):
    x = torch.tensor(rows, dtype=torch.float64)
    for given_as in (torch.float64, torch.float32):
        error = (crossed(Int8(), x.to(given_as)).double() - x).abs()
        reach = (x.amax(1) - x.amin(1))[:, None]
        # Reckoning adds a few roundings of the greatest magnitude, and underflow of the step its smallest number.
        roundings = 8 * torch.finfo(given_as).eps * x.abs().amax(1)[:, None] + 256 * torch.finfo(given_as).tiny
        assert (error <= reach / 510 + roundings).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_returns_constant_rows_and_the_ends_of_all_others(dtype):
    constant = torch.tensor([[0.1] * 5, [-3.7] * 5, [0.0] * 5, [6e4] * 5], dtype=torch.float64).to(dtype)
    assert torch.equal(crossed(Int8(), constant), constant)
    wide = torch.tensor([[-1.0, 0.0, 254.0]], dtype=dtype)
    assert torch.equal(crossed(Int8(), wide), wide)


@pytest.mark.parametrize("dtype", FLOATS)
@each_codec
def test_type_and_shape_survive(codec, dtype):
    for shape in [(), (0,), (1,), (7,), (0, 5), (5, 0), (4, 3), (2, 3, 2, 2), (100, 0, 3), (1, 1, 1, 1, 1, 1, 1, 2)]:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        back = crossed(codec, x)
        assert back.dtype == dtype
        assert back.shape == x.shape
        assert torch.isfinite(back).all()


@each_codec
def test_views_are_packed_as_their_copies(codec):
    x = torch.randn(6, 8)
    for view in (x.T, x[:, ::2], x[::3], x[:0, ::2], x[0, 0].expand(3, 3)):
        assert torch.equal(crossed(codec, view), crossed(codec, view.clone(memory_format=torch.contiguous_format)))


@each_codec
def test_no_row_depends_on_another(codec):
    x = torch.randn(5, 3, 4)
    y = x.clone()
    y[2] = torch.randn(3, 4) * 1e6
    before, after = crossed(codec, x), crossed(codec, y)
    for row in (0, 1, 3, 4):
        assert torch.equal(before[row], after[row])
    if codec.name in (
        "int8",
        "int1",
        "int3",
        "int4",
        "float16",
        "top0.3",
    ):  # compressed parts are one stream for all rows
        for name, part in codec.pack("activation", x).items():
            changed = codec.pack("activation", y)[name]
            assert torch.equal(part[[0, 1, 3, 4]], changed[[0, 1, 3, 4]])


@each_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_lossless_codecs_carry_what_is_not_finite(codec, bad):
    x = torch.zeros(3, 4)
    x[1, 2] = bad
    if codec.name == "zstd3()":
        assert crossed(codec, x).view(torch.int32).equal(x.view(torch.int32))
    else:
        with pytest.raises(ValueError, match="expected finite values in 'activation'"):
            crossed(codec, x)


def test_float16_neither_overflows_nor_vanishes():
    for size, dtype in [(1e30, torch.float32), (1e-30, torch.float32), (1e300, torch.float64)]:
        x = torch.tensor([[1.0, -0.5, 0.125, 0.0]], dtype=dtype) * size
        assert torch.equal(crossed(Float16(), x), x)
    x = torch.randn(4, 50)
    error = (crossed(Float16(), x) - x).abs()
    assert (error <= x.abs() * 2**-11 * (1 + 1e-3) + x.abs().amax(1, keepdim=True) * 2**-25).all()


def test_int8_refuses_a_range_that_its_type_cannot_hold():
    x = torch.tensor([[-3e38, 3e38]])
    with pytest.raises(ValueError, match="too wide a range"):
        crossed(Int8(), x)
    assert torch.allclose(crossed(Int8(), x.double()), x.double(), rtol=1e-12)


def test_topk_keeps_the_largest_of_each_row():
    x = torch.tensor([[1.0, -5.0, 2.0, 4.0], [0.0, 0.5, -0.25, 0.125]])
    assert crossed(TopK(0.5), x).tolist() == [[0, -5, 0, 4], [0, 0.5, -0.25, 0]]
    assert torch.equal(crossed(TopK(1), x), x)
    assert (crossed(TopK(1e-9), x) != 0).sum(1).tolist() == [1, 1]
    assert (crossed(TopK(0.1), torch.randn(2, 30)) != 0).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(("width", "dtype"), [(1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)])
def test_topk_reaches_the_last_place_of_a_wide_row(width, dtype):
    x = torch.zeros(1, width)
    x[0, -1] = 1
    assert TopK(1e-5).pack("activation", x)["places"].dtype == dtype
    assert torch.equal(crossed(TopK(1e-5), x), x)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_topk_needs_a_fraction(fraction):
    with pytest.raises(ValueError, match=r"expected a fraction of entries in \(0, 1\]"):
        TopK(fraction)


@steady
@given(st.integers(0, 2**31), st.sampled_from(FLOATS))
def test_zstd_keeps_every_bit(seed, dtype):
    raw = torch.randint(256, (3, 4 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x = raw.view(dtype)
    assert crossed(Zstd(), x).view(torch.uint8).equal(raw)


def test_compression_saves_bytes():
    x = torch.randn(64, 256).relu()
    plain = len(encode(Message("learn", {"activation": x})))
    lengths = {codec.name: len(encode(Message("learn", {"activation": x}), codec)) for codec in CODECS}
    assert lengths["int8"] < 0.28 * plain
    assert lengths["float16"] < 0.52 * plain
    assert lengths["top0.3"] < 0.47 * plain
    assert lengths["zstd3()"] < 0.9 * plain  # half of the entries are zero
    assert lengths["zstd3(int8)"] < lengths["int8"]


@each_codec
def test_only_floats_of_its_kinds_are_packed(codec):
    y, w = torch.arange(4), torch.randn(4, 2)
    message = Message("learn", {"activation": torch.randn(4, 3), "label": y, "weights/w": w, "gradient/n": y})
    back = decode(encode(message, codec), codec).tensors
    assert list(back.keys() - message.tensors.keys()) == []
    assert torch.equal(back["label"], y)
    assert torch.equal(back["weights/w"], w)
    assert torch.equal(back["gradient/n"], y)


def test_both_ends_must_hold_the_same_codec():
    message = Message("learn", {"activation": torch.randn(4, 3)})
    for sender, receiver in [(Int8(), None), (Int8(), Float16()), (TopK(0.1), TopK(0.2)), (Zstd(), Zstd(level=9))]:
        with pytest.raises(ValueError, match="give both ends the same codec"):
            decode(encode(message, sender), receiver)
    assert decode(encode(message), Int8()).tensors.keys() == {"activation"}  # a plain frame says that it is plain
    with pytest.raises(ValueError, match="is not packed by int8"):
        decode(encode(message, Int8()), Int8(kinds=frozenset({Kind.GRADIENT})))


def test_codecs_differ_in_name_if_they_differ_in_effect():
    codecs = [*CODECS, TopK(0.3000001), Zstd(level=9), Zstd(Int8(), level=9), ErrorFeedback(Int8())]
    assert len({codec.name for codec in codecs}) == len(codecs)


@dataclass(frozen=True)
class Forger:
    """Sends what it likes under another codec's name."""

    name: str
    parts: dict[str, Tensor]
    kinds: frozenset[Kind] = Int8.kinds

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        return self.parts

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError("a forger only sends")


def squeezed(raw: bytes, dtype: int, *shape: int, **settings: bool) -> dict[str, Tensor]:
    """The two parts of a compressed tensor; ``dtype`` is a place in DTYPES (8 is uint8, 9 is bool)."""
    data = bytearray(zstandard.ZstdCompressor(**settings).compress(raw))
    return {"tensor.zst": torch.frombuffer(data, dtype=torch.uint8), "tensor.as": torch.tensor([dtype, *shape])}


def bomb() -> dict[str, Tensor]:
    """256 MB of zeros in about 8 KB."""
    compressor = zstandard.ZstdCompressor().compressobj(size=1 << 28)
    data = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(1 << 8)) + compressor.flush()
    return {"tensor.zst": torch.frombuffer(bytearray(data), dtype=torch.uint8), "tensor.as": torch.tensor([8, 1 << 28])}


HUGE = torch.zeros(1).expand(1 << 19, 1 << 19)  # 2^40 bytes on the wire, four here
TINY = torch.zeros(4, 3)
ROWS = {"low": torch.zeros(4), "step": torch.zeros(4)}
LEVELS = torch.zeros(4, 3, dtype=torch.uint8)
COIN = torch.ones(2, dtype=torch.int16)
FORGED: dict[str, tuple[Codec, Tensor, dict[str, Tensor]]] = {
    "int8 without parts": (Int8(), TINY, {}),
    "int8 without low": (Int8(), TINY, {"levels": LEVELS, "step": torch.zeros(4)}),
    "int8 of another shape": (Int8(), TINY, {"levels": LEVELS[:, :2], **ROWS}),
    "int8 of another type": (Int8(), TINY, {"levels": LEVELS.float(), **ROWS}),
    "int8 with one low": (Int8(), TINY, {"levels": LEVELS, **ROWS, "low": torch.zeros(1)}),
    "int8 huge": (Int8(), HUGE, {"levels": LEVELS, **ROWS}),
    "float16 huge": (Float16(), HUGE, {"scaled": TINY.half(), "scale": torch.zeros(4)}),
    "topk huge": (TopK(1e-9), HUGE, {"values": TINY, "places": torch.zeros(4, 3, dtype=torch.int32)}),
    "zstd huge": (Zstd(), HUGE, squeezed(bytes(12), 1, 4, 3)),
    "zstd bomb": (Zstd(), TINY, bomb()),
    "zstd bomb in disguise": (Zstd(), TINY, {**bomb(), "tensor.as": torch.tensor([1, 4, 3])}),
    "zstd bomb within": (Zstd(Int8()), TINY, {f"levels{name[6:]}": part for name, part in bomb().items()}),
    "zstd promises too little": (Zstd(), TINY, squeezed(bytes(47), 1, 4, 3)),
    "zstd promises nothing": (Zstd(), TINY, squeezed(bytes(48), 1, 4, 3, write_content_size=False)),
    "zstd of another shape": (Zstd(), TINY, squeezed(bytes(48), 1, 3, 4)),
    "zstd of another type": (Zstd(), TINY, squeezed(bytes(48), 5, 4, 3)),
    "zstd of no type": (Zstd(), TINY, squeezed(bytes(48), 10, 4, 3)),
    "zstd of negative type": (Zstd(), TINY, squeezed(bytes(48), -1, 4, 3)),
    "zstd of negative shape": (Zstd(), TINY, squeezed(bytes(48), 1, -4, -3)),
    "zstd shape overflows": (Zstd(), TINY, squeezed(b"", 1, 0, 1 << 62, 1 << 62)),
    "zstd of many dimensions": (Zstd(), TINY, squeezed(bytes(48), 1, *[1] * 100, 4, 3)),
    "zstd without data": (Zstd(), TINY, {"tensor.as": torch.tensor([1, 4, 3])}),
    "zstd with empty data": (Zstd(), TINY, {**squeezed(b"", 1), "tensor.zst": torch.zeros(0, dtype=torch.uint8)}),
    "zstd with other data": (Zstd(), TINY, {**squeezed(b"", 1, 4, 3), "tensor.zst": LEVELS.flatten()}),
    "zstd description empty": (Zstd(), TINY, {**squeezed(b"", 1), "tensor.as": torch.zeros(0, dtype=torch.int64)}),
    "zstd description of floats": (Zstd(), TINY, {**squeezed(b"", 1), "tensor.as": torch.tensor([1.0, 4, 3])}),
    "int3 of another width": (Uniform(3), TINY, {"levels": LEVELS, **ROWS}),
    "int3 with more than its levels": (
        Uniform(3),
        TINY,
        {"levels": torch.full((4, 2), 255, dtype=torch.uint8), **ROWS},
    ),
    "int4 huge": (Uniform(4), HUGE, {"levels": LEVELS, **ROWS}),
    "ans without words": (Ans(Uniform(1)), TINY, {"frequencies": COIN, **ROWS}),
    "ans huge": (Ans(Uniform(1)), HUGE, {"frequencies": COIN, "words": LEVELS[:, 0], **ROWS}),
    "ans of half a word": (Ans(Uniform(1)), TINY, {"frequencies": COIN, "words": LEVELS[0], **ROWS}),
    "ans of words that end in 0": (Ans(Uniform(1)), TINY, {"frequencies": COIN, "words": LEVELS[:, 0], **ROWS}),
    "ans of too many words": (Ans(Uniform(1)), TINY, {"frequencies": COIN, "words": LEVELS.flatten() + 1, **ROWS}),
    "ans of another table": (Ans(Uniform(2)), TINY, {"frequencies": COIN, "words": LEVELS[:, 0] + 1, **ROWS}),
    "ans of no frequency": (Ans(Uniform(1)), TINY, {"frequencies": COIN * 0, "words": LEVELS[:, 0] + 1, **ROWS}),
    "ans of negative frequencies": (Ans(Uniform(1)), TINY, {"frequencies": -COIN, "words": LEVELS[:, 0] + 1, **ROWS}),
    "palette without values": (Palette(1), TINY, {"levels": LEVELS[:, :1]}),
    "palette of too few values": (Palette(1), TINY, {"levels": LEVELS[:, :1] + 1, "values": torch.zeros(1)}),
    "palette of another type": (Palette(1), TINY, {"levels": LEVELS[:, :1], "values": torch.zeros(2).double()}),
    "random k of another width": (RandomK(0.5), TINY, {"values": torch.zeros(4, 1), "count": torch.tensor([0])}),
    "random k without count": (RandomK(0.5), TINY, {"values": torch.zeros(4, 2)}),
    "random k huge": (RandomK(1e-9), HUGE, {"values": torch.zeros(4, 2), "count": torch.tensor([0])}),
    "per kind of no codec": (PerKind(Int8()), TINY, {"1.levels": LEVELS}),
    "per kind of two codecs": (PerKind(Int8(), Float16()), TINY, {"0.levels": LEVELS, "1.levels": LEVELS}),
    "per kind of no number": (PerKind(Int8()), TINY, {"levels": LEVELS}),
    "per kind without parts": (PerKind(Int8()), TINY, {}),
    "zstd truth": (Zstd(), TINY, squeezed(b"\2" * 12, 9, 4, 3)),
}


@pytest.mark.parametrize(("codec", "claimed", "parts"), FORGED.values(), ids=FORGED.keys())
def test_forged_parts_are_refused_before_memory_is_taken(codec, claimed, parts):
    frame = encode(Message("learn", {"activation": claimed}), Forger(codec.name, parts))
    assert len(frame) < 1 << 16
    with little_memory(), pytest.raises(ValueError, match=r"^malformed frame: .{1,300}$") as caught:
        decode(frame, codec)
    assert caught.type is ValueError


@pytest.mark.parametrize("places", [[[0, 3]], [[-1, 1]], [[1, 1]], [[1, 0]], [[2**15 - 1, -(2**15)]]])
def test_topk_refuses_forged_places(places):
    parts = {"values": torch.ones(1, 2), "places": torch.tensor(places, dtype=torch.int16)}
    frame = encode(Message("learn", {"activation": torch.zeros(1, 3)}), Forger("top0.6", parts))
    with pytest.raises(ValueError, match="expected rising places from 0 to 2 in each row"):
        decode(frame, TopK(0.6))


def test_many_bombs_share_one_limit():
    codec = Zstd()
    message = Message("learn", {f"activation/{n}": torch.zeros(1 << 20) for n in range(20)})  # 80 MB in a few KB
    frame = encode(message, codec)
    assert len(frame) < 1 << 16
    assert len(decode(frame, codec).tensors) == 20
    with little_memory(), pytest.raises(ValueError, match="over the limit"):
        decode(frame, codec, max_nbytes=10 << 20)
    bombs = {f"{n}{name[6:]}": part for n in range(9) for name, part in squeezed(bytes(900), 8, 900).items()}
    with pytest.raises(ValueError, match="its shape takes 900 of 140 allowed"):  # 1040 for a single float
        decode(encode(Message("learn", {"activation": torch.zeros(1)}), Forger("zstd3()", bombs)), codec)


def test_error_feedback_by_hand():
    codec = ErrorFeedback(TopK(0.5))
    assert crossed(codec, torch.tensor([3.0, 1.0]), "update/w").tolist() == [3, 0]
    assert codec.state_dict()["update/w"].tolist() == [0, 1]
    assert crossed(codec, torch.tensor([1.0, 1.0]), "update/w").tolist() == [0, 2]
    assert codec.state_dict()["update/w"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "inner",
    [TopK(0.1), RandomK(0.1), Int8(), Uniform(2), Float16(), Zstd(Int8()), Ans(Int8())],
    ids=lambda codec: codec.name,
)
def test_what_was_sent_and_what_is_left_make_up_what_was_wanted(inner):
    codec = ErrorFeedback(inner)
    wanted = [{"a": torch.randn(4, 5).double(), "b": torch.randn(7).double()} for _ in range(20)]
    sent = [{name: crossed(codec, change, f"update/{name}") for name, change in step.items()} for step in wanted]
    for name in ("a", "b"):
        total = sum(step[name] for step in sent) + codec.state_dict()[f"update/{name}"]
        assert torch.allclose(total, sum(step[name] for step in wanted), rtol=0, atol=1e-12)


def test_error_feedback_resumes_from_its_state():
    codec, resumed = ErrorFeedback(TopK(0.5)), ErrorFeedback(TopK(0.5))
    crossed(codec, torch.tensor([3.0, 1.0]), "update/w")
    resumed.load_state_dict(codec.state_dict())
    change = torch.tensor([1.0, 1.0])
    assert torch.equal(crossed(codec, change, "update/w"), crossed(resumed, change, "update/w"))


def test_error_feedback_is_for_updates_alone():
    codec = ErrorFeedback(Int8())
    with pytest.raises(ValueError, match="expected a model update, got 'activation'"):
        codec.pack("activation", torch.zeros(2, 2))
    z = torch.randn(2, 2)
    assert torch.equal(crossed(codec, z), z)  # in a frame, activations pass it by
    assert codec.state_dict() == {}
    crossed(codec, z, "update/w")
    with pytest.raises(ValueError, match="use one ErrorFeedback a sender and model"):
        crossed(codec, torch.zeros(3, 2), "update/w")


@each_codec
def test_through_is_what_crosses_with_the_identity_as_gradient(codec):
    z = torch.randn(4, 6, requires_grad=True)
    sent = through(codec, z)
    assert torch.allclose(sent, crossed(codec, z), rtol=1e-6, atol=1e-7)  # z + (sent - z) rounds
    assert torch.equal(through(codec, z.detach()), crossed(codec, z))
    g = torch.randn(4, 6)
    sent.backward(g)
    assert torch.equal(z.grad, g)


@pytest.mark.parametrize("codec", [Int8(), Float16(), TopK(0.25), Zstd(Int8())], ids=lambda codec: codec.name)
def test_a_view_holds_what_the_server_computed_on_and_no_more(codec):
    seen = []
    stage = nn.Linear(8, 3)
    stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    client = Learner("client", nn.Linear(5, 8))
    server = wire(Learner("server", stage), codec)
    held = client.forward(x := torch.randn(6, 5)).detach()
    client = Learner("client", client.stage)
    vanilla(client, server.party, x, torch.arange(6) % 3)
    (exchange,) = server.record.exchanges
    recorded = exchange.request.tensors["activation"]
    assert torch.equal(recorded, seen[0])
    assert torch.equal(recorded, crossed(codec, held))
    assert not torch.equal(recorded, held)


@steady
@given(matrices, st.integers(1, 8))
def test_uniform_is_within_half_a_level_of_its_bits(rows, bits):
    x = torch.tensor(rows, dtype=torch.float64)
    error = (crossed(Uniform(bits), x) - x).abs()
    reach = (x.amax(1) - x.amin(1))[:, None]
    roundings = 8 * torch.finfo(x.dtype).eps * x.abs().amax(1)[:, None] + 256 * torch.finfo(x.dtype).tiny
    assert (error <= reach / (2 * (2**bits - 1)) + roundings).all()


def test_uniform_by_hand():
    x = torch.tensor([[0.0, 1.0, 1.6, 3.0, 3.0]])
    parts = Uniform(2).pack("activation", x)
    assert parts["levels"].tolist() == [[0b11_10_01_00, 0b11]]  # 0, 1, 2, 3 and 3, the first in the lowest bits
    assert crossed(Uniform(2), x).tolist() == [[0, 1, 2, 3, 3]]
    assert crossed(Uniform(1), x).tolist() == [[0, 0, 3, 3, 3]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_take_their_bits_and_no_more(bits):
    x = torch.randn(16, 1000)
    parts = Uniform(bits).pack("activation", x)
    assert parts["levels"].nbytes == 16 * 125 * bits
    assert crossed(Uniform(bits), x).unique().numel() <= 16 * 2**bits


@pytest.mark.parametrize("bits", [0, 9, 2.0, True])
def test_bits_are_from_1_to_8(bits):
    for make in (Uniform, Palette):
        with pytest.raises(ValueError, match="expected whole bits from 1 to 8, got"):
            make(bits)


def entropy_nbytes(levels: Tensor) -> float:
    """The empirical entropy of the levels, all together, in bytes."""
    shares = levels.flatten().bincount().double() / levels.numel()
    return -(shares[shares > 0] * shares[shares > 0].log2()).sum().item() * levels.numel() / 8


@pytest.mark.parametrize("bits", [8, 4])
def test_ans_reaches_the_empirical_entropy_within_a_hundredth(bits):
    torch.manual_seed(0)
    z = torch.relu(nn.Conv2d(3, 32, 3)(torch.rand(16, 3, 24, 24))).detach()  # 247,808 entries
    codec = Ans(Uniform(bits))
    levels = Uniform(bits).to_levels("activation", z)["levels"]
    parts = codec.pack("activation", z)
    nbytes = parts["words"].nbytes + parts["frequencies"].nbytes
    assert entropy_nbytes(levels) <= nbytes <= 1.01 * entropy_nbytes(levels)
    assert torch.equal(crossed(codec, z), crossed(Uniform(bits), z))  # lossless


@steady
@given(st.lists(st.integers(0, 255), min_size=1, max_size=300))
def test_ans_returns_whatever_it_is_given(values):
    z = torch.tensor([[0.0, 255.0, *values]])
    assert torch.equal(crossed(Ans(Int8()), z), z)


def test_ans_of_rare_levels_among_very_many():
    z = torch.zeros(1, 1_000_000)
    z[0, :255] = torch.arange(1, 256)
    codec = Ans(Int8())
    assert torch.equal(crossed(codec, z), z)
    assert codec.pack("activation", z)["words"].nbytes < 1000


def test_ans_takes_levels_alone():
    for inner in (TopK(0.1), Zstd(Int8()), None):
        with pytest.raises(ValueError, match="expected a codec of levels"):
            Ans(inner)


def test_palette_carries_few_values_exactly_and_refuses_more():
    x = torch.tensor([[0.1, -0.7, 1e30], [0.1, 0.1, 2.5]])
    for codec in (Palette(2), Palette(8), Ans(Palette(2))):
        assert torch.equal(crossed(codec, x), x)
    assert Palette(2).pack("activation", x)["levels"].nbytes == 2
    with pytest.raises(ValueError, match="expected 'activation' of at most 2 distinct values, got 4; quantise first"):
        crossed(Palette(1), x)
    g = torch.randn(4, 100)
    assert torch.equal(crossed(Palette(1), g, "gradient"), g)  # of which it packs none


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_k_keeps_as_many_as_it_says_anew_each_time(dtype):
    codec, x = RandomK(0.25), torch.rand(6, 40).to(dtype) + 1
    first, second = crossed(codec, x), crossed(codec, x)
    for back in (first, second):
        assert ((back != 0).sum(1) == 10).all()
        assert torch.equal(back[back != 0], x[back != 0])
    assert not torch.equal(first, second)
    assert len({tuple(row) for row in (first != 0).tolist()}) == 6  # each row has places of its own


def test_random_k_is_unbiased_where_asked_and_draws_all_places_alike():
    x = torch.rand(2, 20) + 1
    codec = RandomK(0.2, unbiased=True)
    mean = torch.stack([crossed(codec, x) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, x, rtol=0.15)  # the standard error is 2 % of the value · sqrt(.8/.2)
    plain = RandomK(0.2)
    kept = torch.stack([crossed(plain, x) != 0 for _ in range(4000)]).double().mean(0)
    assert (kept - 0.2).abs().max() < 0.03  # five standard errors


def test_random_k_refuses_what_its_scale_makes_infinite_whatever_is_drawn():
    x = torch.ones(1, 100)
    x[0, 50] = 1e38  # times 10 is over the greatest float32
    codec = RandomK(0.1, unbiased=True)
    for _ in range(3):
        with pytest.raises(ValueError, match="expected finite values in 'activation'"):
            codec.pack("activation", x)
    assert codec.state_dict() == {"packed": {}}
    assert crossed(RandomK(0.1), x).isfinite().all()
    assert crossed(codec, x / 100).isfinite().all()


def test_random_k_draws_in_parts_what_it_draws_at_once_and_takes_little_memory(monkeypatch):
    x = torch.rand(7, 33)
    whole = crossed(RandomK(0.2, seed=3), x)
    for hashes in (1, 70):
        monkeypatch.setattr(sparse, "DRAWN", hashes)
        assert torch.equal(crossed(RandomK(0.2, seed=3), x), whole)
    monkeypatch.undo()
    wide = torch.ones(2048, 4096)  # of whose entries one hash each takes 64 MiB
    codec = RandomK(0.001)
    parts = codec.pack("activation", wide)
    with little_memory():
        back = unpack(codec, parts, (2048, 4096))
    assert ((back != 0).sum(1) == 5).all()


def test_random_k_depends_on_its_seed_and_resumes_from_its_state():
    x = torch.rand(3, 50)
    codec, other, resumed = RandomK(0.1), RandomK(0.1, seed=1), RandomK(0.1)
    assert not torch.equal(crossed(codec, x), crossed(other, x))
    resumed.load_state_dict(codec.state_dict())
    assert torch.equal(crossed(codec, x), crossed(resumed, x))
    crossed(codec, x, "gradient")  # of another kind, which the other end packs
    assert torch.equal(crossed(codec, x), crossed(resumed, x))
    feedback, again = ErrorFeedback(RandomK(0.1)), ErrorFeedback(RandomK(0.1))
    crossed(feedback, x, "update/w")
    again.load_state_dict(feedback.state_dict())
    assert torch.equal(crossed(feedback, x, "update/w"), crossed(again, x, "update/w"))


def test_each_kind_by_its_own_codec():
    codec = PerKind(Palette(1), Int8())
    z, g = torch.tensor([[0.0, 3.0, 3.0]]), torch.randn(4, 100)
    message = Message("learn", {"activation": z, "gradient": g, "label": torch.tensor([1])})
    back = decode(encode(message, codec), codec).tensors
    assert torch.equal(back["activation"], z)
    assert torch.equal(back["gradient"], crossed(Int8(), g, "gradient"))
    assert back["label"].tolist() == [1]
    with pytest.raises(ValueError, match="expected at least one codec"):
        PerKind()
    inner = RandomK(0.1)
    stateful, resumed = PerKind(Int8(frozenset({Kind.ACTIVATION})), inner), PerKind(Int8(), RandomK(0.1))
    crossed(stateful, g, "gradient")
    resumed.load_state_dict(stateful.state_dict())
    assert resumed.state_dict() == stateful.state_dict() == {"1": {"packed": {"gradient": 1}}}
