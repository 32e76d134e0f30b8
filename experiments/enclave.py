"""What does an enclave leave its host to see? Samples cross sealed, one by one, and the host guesses by their sizes.

The server's stage is in an enclave, which is modelled; the frames are really sealed. The host knows labelled samples of
its own and sends them as a client may, codec and padding included, and learns from the sizes and times of their frames
what the class of a client's sample is: of the test set, which is private at inference, and was not trained on. Seconds
are modelled, from counted work and the factors of ``ENCLAVES``; so is the host's clock, by which the enclave takes as
long for every sample.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks import SizeGuess
from attacks.properties.sizes import LEAST
from experiments.compressed import COMPRESSIONS, compressed
from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import PROTOCOLS
from experiments.names import find
from experiments.parts import Shield, whole
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.setups import ATTESTED
from experiments.training import Trained, Training, described, device_of, load_splits, places, sizes_of, warm_up
from splitlearn.codecs import Padded
from splitlearn.cost import Layer, compute_seconds, count, memory, split_cost
from splitlearn.data import DATASETS, Splits
from splitlearn.devices import DEVICES
from splitlearn.enclave import ENCLAVES, LEFT_OUT, Host, enclosed, in_enclave
from splitlearn.exits import Confidence, exit_head, train_exit
from splitlearn.frames import Codec
from splitlearn.inference import Inference
from splitlearn.metrics import accuracy, accuracy_advantage
from splitlearn.network import PROFILES, VirtualClock
from splitlearn.party import Learner
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.threat import Grants, Threat, View, observe_host
from splitlearn.train import Predictor, evaluate
from splitlearn.wire import Carrier, Framed, serve

__all__ = ["ENCLAVE", "EXIT", "THREAT", "Config", "Trial", "run_trial", "size_leakage", "tasks"]

EXIT = "+exit"  # of a codec's name: samples may leave at the edge
EDGE, NETWORK, PACED = "phone", "wifi", "sgx"  # of the modelled seconds; the last, of the host's clock
GPU = "confidential_gpu"
HOSTS = {
    "plain": "laptop",
    "sgx": "laptop",
    "tdx": "laptop",
    "sev": "laptop",
    "plain_gpu": "server_gpu",
    GPU: "server_gpu",
}
CONFIDENCE = 0.9  # from which on a sample leaves at an exit
EXIT_EPOCHS = 10
THREAT = Threat("host of the enclave", sees=frozenset(), queries=True, auxiliary=True, auxiliary_labels=True)
KNOWS = "sends its own samples as a client does, codec and padding included, and sees the sizes of their frames"


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    codecs: tuple[str, ...] = field(
        default=("none", "int8", "ans8", "ans4", "zstd8", "ans4:1", "ans4:64", "ans4:256", "ans4:1024", f"int8{EXIT}"),
        metadata={
            "help": f"none or codecs of compression's ({COMPRESSIONS}); NAME:BYTES is padded to a multiple of so many, "
            f"NAME{EXIT} lets samples leave at an early exit, and those send nothing"
        },
    )
    cuts: tuple[str, ...] = field(
        default=("default",),
        metadata={"help": "last layer below the cut, by name; default: the model's usual one; depths: one to three"},
    )
    targets: int = field(default=0, metadata={"help": "test samples whose class is guessed, one exchange each; 0: all"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "samples of the host; 0: the data set's usual number"})
    epochs: int = field(default=15, metadata={"help": "epochs of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch of the training"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of Adam"})


@dataclass(frozen=True)
class Way:
    """How samples cross: a codec, padded to a multiple of so many bytes, 0 for none, with an exit or without."""

    codec: str
    multiple: int = 0
    leaves: bool = False

    @classmethod
    def of(cls, spec: str) -> "Way":
        """Return the way of ``NAME``, ``NAME:BYTES`` and either with ``+exit``; ``ValueError`` for anything else."""
        name, padded, multiple = spec.removesuffix(EXIT).partition(":")
        way = cls(name, whole(multiple, "bytes to pad to a multiple of") if padded else 0, spec.endswith(EXIT))
        if padded and (name == "none" or way.multiple < 1):
            raise ValueError(f"expected a codec and bytes of 1 or more to pad to, got {spec!r}; for example ans4:256")
        way.shield()
        return way

    @property
    def name(self) -> str:
        """Codec and exit, without the padding."""
        return self.codec + EXIT * self.leaves

    def shield(self) -> Shield:
        """Return what packs a client's frames."""
        if self.codec == "none":
            return Shield()
        shield = compressed(self.codec)
        if self.multiple and shield.codec is None:
            raise ValueError(f"expected a codec to pad, got {self.codec!r}, which packs nothing; for example ans4:256")
        return replace(shield, codec=Padded(shield.codec, self.multiple)) if self.multiple else shield  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trial:
    """One training, and the samples that cross sealed after it."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    way: Way
    targets: int

    def described(self, classes: int) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        setting = described(self.data, self.sizes, self.training)
        codec = self.way.shield().codec
        return {
            **setting,
            "sizes": {**setting["sizes"], "targets": self.targets},
            "codec": self.way.codec if codec is None else codec.name, "padded": self.way.multiple,
            "exit": {"confidence": CONFIDENCE, "epochs": EXIT_EPOCHS} if self.way.leaves else {},
            "attack": repr(SizeGuess(classes)), "attested": repr(ATTESTED),
            "modelled": {"edge": EDGE, "network": NETWORK, "hosts": HOSTS, "paced": PACED},
        }  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each cut, codec and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for option in ("codecs", "cuts"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none; leave the option out for the default")
    ways = {spec: Way.of(spec) for spec in config.codecs}
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    targets = config.targets or sizes[2]
    if not 1 <= targets <= sizes[2]:
        raise ValueError(f"expected --targets between 1 and {sizes[2]}, the test samples, got {config.targets}")
    if sizes[1] < LEAST:
        raise ValueError(f"expected --auxiliary of {LEAST} or more, which the host learns from, got {sizes[1]}")
    if splits.private.kind == "tokens" and any(way.leaves for way in ways.values()):
        raise ValueError(f"expected inputs whose activations an exit head can pool, got tokens; leave out NAME{EXIT}")
    device = device_of(options.device)
    base = Training(
        protocol="enclave", epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device=device
    )  # fmt: skip
    found = []
    for place in places(config.cuts, splits):
        for spec, way in ways.items():
            for seed in options.seeds:
                training = replace(base, cut=place, seed=seed)
                trial = Trial(options.data, sizes, training, way, targets)
                alone = replace(config, cuts=(place,), codecs=(spec,))
                command = reproduction("enclave", alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": "enclave", "cut": place, "protection": way.name,
                    "strength": str(way.multiple or ""),
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("enclave", trial.described(splits.private.num_classes), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train in the enclave, let private samples cross sealed, and return what the host makes of their sizes."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    seconds, start = {}, time.perf_counter()
    trained = PROTOCOLS["enclave"].train(trial.training, splits, trial.way.shield())
    seconds["train"], start = time.perf_counter() - start, time.perf_counter()
    bottom, top = _layers(trained, splits)
    crossing = _Crossing(trained, splits, trial, compute_seconds(top, _inside(top, PACED)))
    utility = evaluate(crossing.chain(trained), splits.test.x, splits.test.y)
    host = crossing.host(splits.test.x[: trial.targets])
    seconds["cross"], start = time.perf_counter() - start, time.perf_counter()
    auxiliary = splits.auxiliary
    grants = Grants(auxiliary_x=auxiliary.x, auxiliary_y=auxiliary.y, sizes_of=lambda x: crossing.host(x).sizes)
    view = observe_host(host, threat=THREAT, grants=grants)
    leak = size_leakage(view, splits.test.y[: trial.targets], auxiliary.y, splits.private.num_classes)
    seconds["attack_sizes"] = time.perf_counter() - start
    crossed = host.sizes[:, 0] > 0
    utility |= {
        "sample_bytes": host.sizes[:, :2].sum(1).mean().item(),
        "sizes_seen": float(len(host.sizes.unique(dim=0))),
        "share_left": 1 - crossed.double().mean().item(),
        **_modelled(bottom, top, host.sizes),
    }
    return Outcome(
        utility=utility, leakage=[leak], nbytes=trained.nbytes, seconds=seconds,
        visible={**trained.visible, "attacker (sizes)": [*THREAT.in_words(), KNOWS]}, notes=_notes(trial),
    )  # fmt: skip


def size_leakage(view: View, y: Tensor, auxiliary_y: Tensor, classes: int) -> Leakage:
    """Return what sizes and times tell of the labels ``y`` of what crossed, beside the host's most frequent class."""
    guess = SizeGuess(classes)(view)
    right, blind = accuracy(guess.scores, y.cpu()), auxiliary_y.bincount().argmax()
    baseline = (y.cpu() == blind).double().mean().item()
    return Leakage(
        attack="sizes", family="label", advantage=accuracy_advantage(right, baseline), metrics={"accuracy": right},
        baselines={"accuracy_majority": baseline}, details=dict(guess.evidence),
    )  # fmt: skip


class _Crossing:
    """The trained parties, over a fresh sealed line each time that samples cross one by one."""

    def __init__(self, trained: Trained, splits: Splits, trial: Trial, pace: float):
        client = trained.chain[0]
        assert isinstance(client, Learner)  # in vanilla, and so in an enclave
        self._client, self._pace, self._device = client, pace, trial.training.device
        self._server = Learner("server", trained.model[1])  # type: ignore[index]
        self._codec: Codec | None = trial.way.shield().codec
        self._exit: Learner | None = None
        self._rule: Confidence | None = None
        if trial.way.leaves:
            self._exit, self._rule = _exit(client, trained, splits, trial)

    def chain(self, trained: Trained) -> list[Predictor]:
        """Return who answers, over the line of the training."""
        if self._exit is None:
            return list(trained.chain)
        return [Inference(self._client, trained.chain[1], self._exit, self._rule)]

    def host(self, x: Tensor) -> Host:
        """Return the host after the samples x [N, …] have crossed, or left at the edge: a row each."""
        clock = VirtualClock()
        inside = _paced(serve(Service({"server": self._server}), self._codec), clock, self._pace)
        carrier, host = enclosed(inside, ATTESTED, clock=clock)
        server = Remote("server", Framed(carrier, self._codec), "server")
        mode: Any = "split" if self._exit is None else "cascade"
        answering = Inference(self._client, server, self._exit, self._rule, mode)
        for number, sample in enumerate(x.to(self._device).split(1), 1):
            answering.answer(sample)
            if len(host.rows) < number:
                host.silent()
        return host


def _exit(client: Learner, trained: Trained, splits: Splits, trial: Trial) -> tuple[Learner, Confidence]:
    """Return an exit that is trained on the private samples, and its rule."""
    training, x = trial.training, trained.victim_x.to(trial.training.device)
    head = exit_head(tuple(client.predict(x[:1]).shape[1:]), splits.private.num_classes, seed=training.seed)
    exit_ = train_exit(
        head, client, x, trained.victim_y, epochs=EXIT_EPOCHS, batch_size=training.batch_size, lr=training.lr,
        seed=training.seed,
    )  # fmt: skip
    return exit_, Confidence(CONFIDENCE)


def _paced(carrier: Carrier, clock: VirtualClock, seconds: float) -> Carrier:
    """Return the carrier, taking so long by the clock."""

    def carry(frame: bytes) -> bytes:
        reply = carrier(frame)
        clock.sleep(seconds)
        return reply

    return carry


@torch.no_grad()
def _layers(trained: Trained, splits: Splits) -> tuple[list[Layer], list[Layer]]:
    """Return what both stages do to one sample."""
    assert isinstance(trained.model, nn.Sequential)  # of both stages
    below, above = (_sequential(copy.deepcopy(stage)).cpu().eval() for stage in trained.model)
    x = splits.private.x[:1]
    return count(below, x), count(above, below(x))


def _sequential(stage: nn.Module) -> nn.Sequential:
    return stage if isinstance(stage, nn.Sequential) else nn.Sequential(stage)


def _inside(top: list[Layer], way: str) -> Any:
    """Return the device that computes the upper layers: in an enclave, or of the name of a plain one, as it is."""
    device = DEVICES[HOSTS[way]]
    return in_enclave(device, ENCLAVES[way], memory(top)) if way in ENCLAVES else device


def _modelled(bottom: list[Layer], top: list[Layer], sizes: Tensor) -> dict[str, float]:
    """Return the seconds of a sample on average, in each enclave and, without what sealing adds, outside."""
    crossed = sizes[sizes[:, 0] > 0, :2]
    share = len(crossed) / len(sizes)
    up, down = crossed.mean(0).tolist() if len(crossed) else (0.0, 0.0)
    found = {}
    for way in HOSTS:
        less = 0 if way in ENCLAVES or not len(crossed) else ENCLAVES[PACED].sealing
        cost = split_cost(
            [*bottom, *top], len(bottom), edge=DEVICES[EDGE], cloud=_inside(top, way), network=PROFILES[NETWORK],
            up_nbytes=up - less, down_nbytes=down - less,
        )  # fmt: skip
        found[f"seconds_{way}"] = cost.edge_seconds + share * (cost.seconds - cost.edge_seconds)
        found[f"server_seconds_{way}"] = share * cost.cloud_seconds
    return found


def _notes(trial: Trial) -> list[str]:
    kept = [
        "strength: bytes to a multiple of which the packed activation is padded",
        "modelled: the enclave; its frames are really sealed (AES-256-GCM), 28 bytes more each",
        f"modelled: seconds of a sample alone, from a {EDGE} over {NETWORK} to "
        + ", ".join(f"{DEVICES[host].name} ({way})" for way, host in HOSTS.items())
        + "; the work of an exit's head is left out",
        *(f"modelled: {name}: {ENCLAVES[name].source}" for name in HOSTS if name in ENCLAVES),
        f"modelled: by the host's clock the enclave takes the same for every sample; {LEFT_OUT}",
    ]
    if trial.way.leaves:
        kept.append(
            f"a sample that leaves at the exit (at a confidence of {CONFIDENCE:g}) sends nothing, and the host knows "
            "that one was due"
        )
    return kept


ENCLAVE = Experiment(
    "enclave",
    "What does an enclave (modelled) leave its host to see? Classes by sizes of sealed frames; padding; overhead",
    Config,
    tasks,
)
