"""Case study: a client's sentences, classified by a server's half of a small transformer: which words cross the cut?

Split learning on text (sst2, trec). The server reads an activation row a word, and the labels. ``nearest`` knows the
client's bottom, as one that is public; ``learned`` sends texts of its own through the client's path, as any user can.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from defenses import PatchShuffle
from experiments import case_study, setups
from experiments.case_study import READ_LABELS, Study, Trial
from experiments.experiment import Experiment, Options
from experiments.ingredients import PROTECTIONS
from experiments.parts import Shield, told
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked
from experiments.training import Trained, Training
from splitlearn.data import Splits
from splitlearn.data.text import PADDING, UNKNOWN
from splitlearn.metrics import accuracy_advantage
from splitlearn.threat import Grants, Threat, View, observe
from splitlearn.train import predict

__all__ = ["TEXT_CLASSIFICATION", "Config", "LearnedWords", "NearestWords"]

SPECIAL = 2  # tokens before the first word: padding and unknown
CHUNK = 64  # texts asked for at once
HELD_OUT = 0.1  # share of the attacker's texts on which the best epoch is chosen


@dataclass(frozen=True)
class Config(case_study.Config):
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("unsplit", "vanilla"), metadata={"help": "of unsplit, vanilla, u_shaped (labels stay with the client)"}
    )
    protections: tuple[str, ...] = field(
        default=("none", "noise:0.005", "noise:0.02", "patch_shuffle"),
        metadata={"help": "of those of `splitlearn list protections` that work on tokens; NAME or NAME:STRENGTH"},
    )
    attacks: tuple[str, ...] = field(
        default=("nearest", "learned", READ_LABELS),
        metadata={"help": f"of nearest, learned (words from activations), {READ_LABELS}; '' for none"},
    )
    cut: str = field(default="block1", metadata={"help": "last layer below the cut: embed, block1, block2"})
    targets: int = field(default=50, metadata={"help": "private texts whose words are attacked"})
    private: int = field(default=3000, metadata={"help": "private texts, on which the model trains"})
    auxiliary: int = field(default=1000, metadata={"help": "texts of the attacker's own"})
    test: int = field(default=500, metadata={"help": "test texts"})
    epochs: int = field(default=6, metadata={"help": "epochs of training"})


@dataclass(frozen=True)
class NearestWords:
    """Each row's word: the one whose row, in a text of that word alone, has the greatest cosine at the same place.

    Needs the client's bottom (``Threat(white_box=True)``), as where that is public or handed on, and asks it without
    what protects. Exact below attention, where a row is its word and place; above, context is missed. ``words`` is the
    size of the vocabulary, padding and unknown included. Where rows are ``shuffled``, every row is held against every
    place, and the places are dealt by the Hungarian method: one row each, those of zeros, which are padding, last.
    """

    words: int
    shuffled: bool = False

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        """Return tokens [N, L]; never padding, nor unknown, but where ``shuffled`` leaves padding."""
        z, stage = normalize(view.activations(), dim=-1), view.encoder.stage
        num, length, _ = z.shape
        shape = (num, length, length) if self.shuffled else (num, length)  # of text, row (and place)
        best, found = z.new_full(shape, -2.0), torch.zeros(shape, dtype=torch.int64, device=z.device)
        for word in torch.arange(SPECIAL, self.words, device=z.device).split(CHUNK):
            rows = normalize(stage(word[:, None].expand(-1, length).contiguous()), dim=-1)  # [chunk, L, width]
            pairs = "nrw,cpw->nrpc" if self.shuffled else "npw,cpw->npc"
            cosine, at = torch.einsum(pairs, z, rows).max(-1)
            better = cosine > best
            best, found = torch.where(better, cosine, best), torch.where(better, word[at], found)
        return _dealt(z, best, found) if self.shuffled else found


@dataclass(frozen=True)
class LearnedWords:
    """Each row's word, by a linear classifier of rows that learns from what crosses for the attacker's own texts.

    Queries and auxiliary texts (``Threat(queries=True, auxiliary=True)``), asked for anew in each epoch. Each place's
    mean row is taken off, since positions are added below the cut. It knows the words of its own texts alone. Of its
    epochs the one counts that does best on texts held out. ``lr`` is Adam's.
    """

    epochs: int = 8
    lr: float = 0.01
    batch_size: int = 256
    seed: int = 0

    def __call__(self, view: View) -> Tensor:
        """Return tokens [N, L]; never padding, nor unknown."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._learned(view)

    def _learned(self, view: View) -> Tensor:
        x = view.auxiliary_x
        held, rest = torch.randperm(len(x)).tensor_split([max(1, int(HELD_OUT * len(x)))])
        known = x[rest][x[rest] > UNKNOWN].unique()
        means, scale = _places(view, x[rest])
        classify = nn.Linear(len(means[0]), len(known)).to(x.device)
        optimizer = torch.optim.Adam(classify.parameters(), self.lr)
        best, kept = -1.0, classify.state_dict()
        for _ in range(self.epochs):
            rows, words = _rows(view, x[rest], means, scale)
            target = torch.searchsorted(known, words)
            for some in torch.randperm(len(rows)).split(self.batch_size):
                optimizer.zero_grad()
                cross_entropy(classify(rows[some]), target[some]).backward()
                optimizer.step()
            with torch.no_grad():
                rows, words = _rows(view, x[held], means, scale)
                right = (known[classify(rows).argmax(1)] == words).double().mean().item()
            if right > best:
                best, kept = right, {name: one.clone() for name, one in classify.state_dict().items()}
        classify.load_state_dict(kept)
        with torch.no_grad():
            z = (view.activations() - means) / scale
            return torch.cat([known[classify(part).argmax(-1)] for part in z.split(CHUNK)])


def _dealt(z: Tensor, best: Tensor, found: Tensor) -> Tensor:
    """Return the words [N, L] at their places: of each text, the rows' assignment with the greatest sum of cosines."""
    tokens = torch.full(z.shape[:2], PADDING, dtype=torch.int64)
    for text, (rows, scores, words) in enumerate(zip(z.cpu(), best.cpu(), found.cpu(), strict=True)):
        real = rows.any(-1).nonzero()[:, 0]
        row, place = linear_sum_assignment(scores[real, : len(real)].numpy(), maximize=True)
        tokens[text, torch.from_numpy(place)] = words[real[torch.from_numpy(row)], torch.from_numpy(place)]
    return tokens


@torch.no_grad()
def _asked(view: View, x: Tensor) -> Tensor:
    return torch.cat([view.query(part) for part in x.split(CHUNK)])


def _places(view: View, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean row at each place [L, width] over the words there, and the standard deviation about it."""
    z, words = _asked(view, x), (x > UNKNOWN).unsqueeze(-1)
    means = (z * words).sum(0) / words.sum(0).clamp(min=1)
    return means, ((z - means) * words).square().sum().div(words.sum() * z.shape[-1]).sqrt().clamp(min=1e-6)


def _rows(view: View, x: Tensor, means: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return what crosses for each word of the texts, a row each, and the words."""
    return ((_asked(view, x) - means) / scale)[x > UNKNOWN], x[x > UNKNOWN]


THREATS = {"nearest": Threat(white_box=True), "learned": Threat(queries=True, auxiliary=True)}


def built(name: str, words: int, trial: Trial, seed: int) -> NearestWords | LearnedWords:
    """Return one of the attacks on words; the nearest words' attacker knows whether rows are shuffled."""
    if name == "learned":
        return LearnedWords(seed=seed)
    guard = PROTECTIONS[trial.protection].build(trial.strength).guard
    return NearestWords(words, shuffled=isinstance(guard, PatchShuffle))


def train(trial: Trial, splits: Splits) -> tuple[Trained, Callable[[], Attacked]]:
    """Train one arm, and return it with what attacks the client's texts and labels."""
    shield = PROTECTIONS[trial.protection].build(trial.strength)
    own: dict[str, Callable[[Training, Splits, Shield], Trained]] = {
        "unsplit": setups.train_unsplit,
        "vanilla": setups.train_vanilla,
        "u_shaped": setups.train_u_shaped,
    }
    trained = own[trial.training.protocol](trial.training, splits, shield)
    return trained, partial(attack, trial, trained, splits)


def attack(trial: Trial, trained: Trained, splits: Splits) -> Attacked:
    """Return what the server gets of labels and words."""
    if trained.record is None:
        return Attacked()
    training, private = trial.training, splits.private
    found = Attacked()
    if READ_LABELS in trial.attacks:
        found = case_study.labels_read(trained.record, trained.victim_y, training, classes=private.num_classes)
    trained.record.clear()
    x = trained.victim_x[: trial.targets]
    predict(trained.chain, x)
    grants = Grants(trained.encoder, splits.auxiliary.x.to(training.device))
    for name in trial.attacks:
        if name not in THREATS:
            continue
        begun = time.perf_counter()
        view = observe(trained.record, threat=THREATS[name], grants=grants, device=training.device)
        tokens = built(name, len(private.names or ()), trial, training.seed)(view).cpu()
        found.leakage.append(scored(name, tokens, x, splits.auxiliary.x))
        found.seconds[f"attack_{name}"] = time.perf_counter() - begun
        found.visible[f"attacker ({name})"] = THREATS[name].in_words()
    return found


def scored(name: str, tokens: Tensor, x: Tensor, auxiliary_x: Tensor) -> Leakage:
    """Return the share of words [N, L] that are right at their place, beside the attacker's commonest word.

    Padding and unknown words do not count. ``any_place`` is the share of words that stand anywhere in the guess at
    their text, which the order does not matter for. ``nameable`` is the share of words that occur in the attacker's
    own texts: who learns from these alone can name no others.
    """
    real = x > UNKNOWN
    commonest = int(auxiliary_x[auxiliary_x > UNKNOWN].bincount().argmax())
    right = (tokens == x)[real].double().mean().item()
    blind = (x == commonest)[real].double().mean().item()
    guessed = tokens.masked_fill(x == PADDING, PADDING)
    anywhere = (x.unsqueeze(2) == guessed.unsqueeze(1)).any(2)[real].double().mean().item()
    nameable = torch.isin(x[real], auxiliary_x).double().mean().item()
    return Leakage(
        attack=name, family="reconstruction", advantage=accuracy_advantage(right, blind),
        metrics={"accuracy": right, "any_place": anywhere, "nameable": nameable},
        baselines={"accuracy_commonest_word": blind},
        details={"best": name, "words": int(real.sum())},
    )  # fmt: skip


def described(trial: Trial, splits: Splits) -> dict[str, Any]:
    """Return the attacks' settings."""
    words = len(splits.private.names or ())
    return {name: told(built(name, words, trial, 0)) if name in THREATS else "" for name in trial.attacks}


def check(trial: Trial, splits: Splits) -> None:
    """Refuse more targets than texts, more clients than one, and too few texts of the attacker's own."""
    if trial.training.clients != 1:
        raise ValueError(
            f"expected one client, whose texts are attacked, got {trial.training.clients}; use --clients 1"
        )
    if not 1 <= trial.targets <= len(splits.private):
        raise ValueError(f"expected --targets between 1 and {len(splits.private)}, got {trial.targets}")
    if STUDY.protocols[trial.training.protocol]:
        case_study.check_own([name for name in trial.attacks if name == "learned"], splits)


def notes(trial: Trial, splits: Splits) -> list[str]:
    """Return how many words there are, how many the attacker has in its own texts, and which test texts are private."""
    mine, own = (part.x[part.x > UNKNOWN].unique() for part in (splits.private, splits.auxiliary))
    shared = torch.isin(mine, own).double().mean().item()
    private = set(map(tuple, splits.private.x.tolist()))
    repeated = sum(tuple(row) in private for row in splits.test.x.tolist())
    told = [f"{repeated} of {len(splits.test)} test texts are private ones too, token for token"] if repeated else []
    return [f"{len(mine)} words in private texts, of which {shared:.3f} are in the attacker's own; random start, no "
            "pretraining", *told]  # fmt: skip


STUDY = Study(
    name="text_classification",
    data=("sst2", "trec"),
    protocols={"unsplit": False, "vanilla": True, "u_shaped": True},
    alone=(),
    protections={name: one for name, one in PROTECTIONS.items() if "tokens" in one.inputs},
    attacks={**THREATS, READ_LABELS: None},
    deal=case_study.dealt,
    train=train,
    described=described,
    check=check,
    notes=notes,
)


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task an arm and seed; every name is checked first."""
    return case_study.tasks(STUDY, config, options, run_trial)


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Run one trial."""
    return case_study.run_trial(STUDY, trial, data_dir)


TEXT_CLASSIFICATION = Experiment(
    "text_classification",
    "Case study: sentences and a split transformer (sst2, trec): which words leak, what protects, at what cost",
    Config,
    tasks,
    STUDY.data[0],
)
