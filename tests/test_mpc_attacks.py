"""Who can read shares: the first party that deals, two servers that collude, and whoever searches 32 bits of a seed."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from attacks import FirstParty
from privacy.mpc import SECURITY, Servers, SharedStage
from privacy.mpc.randomness import SEED_NBYTES, Stream
from privacy.mpc.sharing import encoded, held
from splitlearn import Kind, Recorded, Service, Threat, observe
from splitlearn.metrics import score_reconstruction

ROWS, WIDTH, CLASSES = 40, 32, 10
HALF_UNIT = 2**-17  # what rounding to fixed point takes off
UNIT = 2**-16  # what cutting shares of weights to 16 bits does, each share by itself
SEEDS = range(3)


@pytest.fixture(scope="module")
def insecure() -> Iterator[Servers]:
    with Servers(timeout=60, remember=True, insecure_trust_first_party=True) as running:
        yield running


def drained(servers: Servers) -> dict[str, Recorded]:
    return {role: servers.observed(role) for role in servers.roles}


def predicted(servers: Servers, stage: nn.Module, x: Tensor) -> dict[str, Recorded]:
    """What each party has seen of one prediction, the stage being there before."""
    shared = SharedStage(servers, stage)
    drained(servers)
    shared.predict(x)
    seen = drained(servers)
    shared.close()
    return seen


def correlation(x: Tensor, found: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.double().flatten(), found.double().flatten()]))[0, 1])


def chance(values: int) -> float:
    """Five standard deviations of the correlation with something unrelated."""
    return 5 / values**0.5


# The first party


@pytest.mark.parametrize("seed", SEEDS)
def test_a_first_party_that_deals_reads_activations_and_weights_exactly(insecure: Servers, seed: int) -> None:
    torch.manual_seed(seed)
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    view = observe(predicted(insecure, stage, x)["server 0"], threat=Threat())
    activations, weights = FirstParty((ROWS, WIDTH))(view), FirstParty((WIDTH, CLASSES), factor=1)(view)
    assert (activations - x).abs().max() <= HALF_UNIT
    assert (weights.T - stage.weight).abs().max() <= UNIT
    assert score_reconstruction(x, activations, auxiliary_x=torch.randn(100, WIDTH)).advantage > 0.999


def test_a_first_party_reads_the_kernel_of_a_convolution_and_a_deeper_layer(insecure: Servers) -> None:
    stage = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, CLASSES))
    x = torch.randn(5, 2, 6, 6)
    view = observe(predicted(insecure, stage, x)["server 0"], threat=Threat())
    convolved = stage[0](x).detach().flatten(1)
    assert (FirstParty((5, 2, 6, 6))(view) - x).abs().max() <= HALF_UNIT
    assert (FirstParty((3, 2, 3, 3), factor=1)(view) - stage[0].weight).abs().max() <= UNIT
    assert (FirstParty((5, 48))(view) - convolved).abs().max() < 1e-3  # sums of 18 products, each of them rounded


def test_a_first_party_reads_activations_while_it_trains(insecure: Servers) -> None:
    shared, x = SharedStage(insecure, nn.Linear(WIDTH, CLASSES), lr=0.1), torch.randn(ROWS, WIDTH)
    drained(insecure)
    shared.learn(x, torch.randint(CLASSES, (ROWS,)))
    view = observe(drained(insecure)["server 0"], threat=Threat())
    assert (FirstParty((ROWS, WIDTH))(view) - x).abs().max() <= HALF_UNIT


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("role", ["server 0", "server 1"])
def test_with_a_dealer_a_server_gets_noise(remembering: Servers, seed: int, role: str) -> None:
    torch.manual_seed(seed)
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    view = observe(predicted(remembering, stage, x)[role], threat=Threat())
    activations, weights = FirstParty((ROWS, WIDTH))(view), FirstParty((WIDTH, CLASSES), factor=1)(view)
    assert abs(correlation(x, activations)) < chance(x.numel())
    assert abs(correlation(stage.weight.detach().T, weights)) < chance(weights.numel())
    assert score_reconstruction(x, activations, auxiliary_x=torch.randn(100, WIDTH)).advantage == 0
    assert activations.abs().median() > 2**40  # anywhere in the ring


def test_the_other_party_gets_noise_of_the_masks_that_it_does_not_know(insecure: Servers) -> None:
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    found = FirstParty((ROWS, WIDTH))(observe(predicted(insecure, stage, x)["server 1"], threat=Threat()))
    assert abs(correlation(x, found)) < chance(x.numel())


def test_noise_is_drawn_anew_for_the_same_activation(remembering: Servers) -> None:
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    views = [observe(predicted(remembering, stage, x)["server 0"], threat=Threat()) for _ in range(2)]
    first, second = (FirstParty((ROWS, WIDTH))(view) for view in views)
    assert abs(correlation(first, second)) < chance(x.numel())


def nothing() -> Recorded:
    return Recorded(Service({}))


def test_the_attack_says_what_it_needs(insecure: Servers, remembering: Servers) -> None:
    seen = predicted(insecure, nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH))
    dealt = predicted(remembering, nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH))["dealer"]
    all_but_gloo = Threat(sees=frozenset(Kind) - {Kind.GLOO})
    for view in (
        observe(nothing(), threat=Threat()),
        observe(dealt, threat=Threat()),  # sees nothing opened
        observe(seen["server 0"], threat=all_but_gloo),
    ):
        with pytest.raises(LookupError, match=r"reads an opened factor of shape \(40, 32\).*Servers\(remember=True\)"):
            FirstParty((ROWS, WIDTH))(view)
    with pytest.raises(LookupError, match=r"opened factor of shape \(41, 32\)"):
        FirstParty((ROWS + 1, WIDTH))(observe(seen["server 0"], threat=Threat()))


# Two who collude


def shares(record: Recorded, verb: str) -> dict[str, Tensor]:
    """A server's shares of what was sent with this verb, drawn from the seed where it was sent one."""
    (found,) = [held(exchange.request.tensors) for exchange in record.exchanges if exchange.request.verb == verb]
    return found


def triple(record: Recorded, at: int) -> tuple[Tensor, ...]:
    """A server's shares (a, b, c) of the first product's masks: the last is sent to server 0, and drawn by server 1."""
    dealt = [
        tensor for exchange in record.exchanges for key, tensor in exchange.reply.tensors.items()
        if key in ({f"{Kind.GLOO}/dealt", f"{Kind.GLOO}/0"} if at == 0 else {f"{Kind.GLOO}/dealt"})
        and exchange.request.verb in ("drew", "received")
    ]  # fmt: skip
    return tuple(dealt[:3])


def opened(record: Recorded) -> tuple[Tensor, Tensor]:
    """What both servers know of the first product: ε = x − a and δ = y − b."""
    first = next(e.reply.tensors for e in record.exchanges if e.request.verb == "opened")
    return first[f"{Kind.GLOO}/0"], first[f"{Kind.GLOO}/1"]


def test_two_servers_that_collude_read_everything_as_the_security_says(remembering: Servers) -> None:
    assert "the two servers do not collude, and neither does the dealer with one of them" in SECURITY
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    seen = predicted(remembering, stage, x)
    mine, other = (shares(seen[role], "predict")["x"] for role in ("server 0", "server 1"))
    assert ((mine + other).double() / 2**16 - x).abs().max() <= HALF_UNIT
    (a0, b0, c0), (a1, b1, c1) = triple(seen["server 0"], 0), triple(seen["server 1"], 1)
    assert torch.equal(c0 + c1, (a0 + a1) @ (b0 + b1))
    epsilon, delta = opened(seen["server 0"])
    assert torch.equal(epsilon + a0 + a1, encoded(x, "x"))
    assert ((delta + b0 + b1).double() / 2**16 - stage.weight.T).abs().max() <= UNIT


def test_a_dealer_that_colludes_with_one_server_reads_everything_too(remembering: Servers) -> None:
    stage, x = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    seen = predicted(remembering, stage, x)
    drawn = [
        [
            e.reply.tensors[key]
            for e in seen["dealer"].exchanges
            if (key := f"{Kind.GLOO}/dealt{rank}") in e.reply.tensors
        ]
        for rank in (0, 1)
    ]
    assert torch.equal(opened(seen["server 1"])[0] + drawn[0][0] + drawn[1][0], encoded(x, "x"))


# Seeds that can be searched

UNKNOWN = 12  # bits of a seed that the test searches; the other 20 that count take 2^20 times as long
LIMIT = 2**63
Draw = Callable[[tuple[int, ...]], Tensor]


def as_crypten_draws(seed: int) -> Draw:
    """CrypTen's own ring elements, of a stream that a seed of 64 bits starts."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randint(-LIMIT, LIMIT - 1, shape, generator=generator, dtype=torch.int64)


def as_we_draw() -> Draw:
    return Stream(Stream.seed()).elements


class Product:
    """One product of two secrets by CrypTen's dealer, and what server 0 knows of it: its shares, and what was opened.

    Server 1's shares of the masks all come from one stream, whose seed the dealer has sent it and nobody else.
    """

    def __init__(self, x: Tensor, y: Tensor, other: Draw):
        a1, b1, c1 = (other(shape) for shape in self.shapes(x, y))
        self.a0, self.b0, _ = (as_we_draw()(shape) for shape in self.shapes(x, y))
        self.c0 = (self.a0 + a1) @ (self.b0 + b1) - c1
        self.epsilon, self.delta = x - self.a0 - a1, y - self.b0 - b1

    @staticmethod
    def shapes(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], ...]:
        return tuple(x.shape), tuple(y.shape), (len(x), y.shape[1])

    def searched(self, seeds: Iterator[int]) -> Tensor | None:
        """Return x as server 0 reads it: the stream under which the triple is one is server 1's.

        This is why ``Stream`` stands where CrypTen has generators. Torch's start from the low 32 bits of a seed, so
        that the whole search is 2^32 streams of a few draws each, a day's work for a desktop; nothing else is guessed.
        """
        for seed in seeds:
            draw = as_crypten_draws(seed)
            a1, b1, c1 = (draw(shape) for shape in self.shapes(self.epsilon, self.delta))
            if torch.equal(self.c0 + c1, (self.a0 + a1) @ (self.b0 + b1)):
                return self.epsilon + self.a0 + a1
        return None


def candidates(seed: int) -> Iterator[int]:
    """Every completion of the low 32 bits but for the lowest 12; the upper half is not even guessed."""
    known = seed % 2**32 >> UNKNOWN << UNKNOWN
    return (known + low for low in range(2**UNKNOWN))


def secret_factors() -> tuple[Tensor, Tensor]:
    return encoded(torch.randn(3, 4), "x"), encoded(torch.randn(4, 2), "y")


@pytest.mark.parametrize("seed", [0x0123456789ABCDEF, 2**62 + 4095, -(2**61) + 77])
def test_masks_of_torch_generators_fall_to_a_search_of_a_part_of_their_seed(seed: int) -> None:
    x, y = secret_factors()
    found = Product(x, y, as_crypten_draws(seed)).searched(candidates(seed))
    assert found is not None
    assert torch.equal(found, x)


def test_a_generator_reads_but_32_bits_of_its_seed() -> None:
    draws = [as_crypten_draws(seed)((100,)) for seed in (5, 5 + 2**32, 5 + 2**63 - 2**40)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], as_crypten_draws(6)((100,)))


def test_the_same_search_finds_nothing_in_our_streams() -> None:
    x, y = secret_factors()
    assert Product(x, y, as_we_draw()).searched(candidates(0)) is None
    known = Stream((77).to_bytes(SEED_NBYTES, "little"))  # even of a seed that lies among the candidates
    assert Product(x, y, known.elements).searched(candidates(77)) is None


def test_every_byte_of_a_streams_seed_counts() -> None:
    seed = bytes(range(SEED_NBYTES))
    drawn = Stream(seed).elements((100,))
    assert torch.equal(drawn, Stream(seed).elements((100,)))
    for place in range(SEED_NBYTES):
        other = seed[:place] + bytes([seed[place] ^ 128]) + seed[place + 1 :]
        assert not (Stream(other).elements((100,)) == drawn).any()


def test_the_search_finds_nothing_in_what_the_servers_really_draw(remembering: Servers) -> None:
    stage, x = nn.Linear(4, 2, bias=False), torch.randn(3, 4)
    seen = predicted(remembering, stage, x)
    product = Product(encoded(x, "x"), encoded(stage.weight.T, "y"), as_we_draw())
    product.a0, product.b0, product.c0 = triple(seen["server 0"], 0)
    product.epsilon, product.delta = opened(seen["server 0"])
    assert product.searched(candidates(0)) is None
    a1, b1, c1 = triple(seen["server 1"], 1)  # though the check by which it would know is right
    assert torch.equal(product.c0 + c1, (product.a0 + a1) @ (product.b0 + b1))
