"""The comparison of mechanisms end to end at toy size: what each claims, what it sends, what is written and drawn."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from experiments import mechanisms, privacy_utility, scoring
from experiments.catalogue import ATTACKS, EXPERIMENTS, MECHANISMS
from experiments.experiment import Options
from experiments.parts import Aim, Attack
from experiments.privacy_plot import privacy
from experiments.privacy_utility import Config, Trial, public_model, tasks
from experiments.public_start import PrivateSGD, Start
from experiments.record import Leakage, Record, trial_hash
from experiments.report import build
from experiments.runner import Outcome, Task, run
from experiments.store import Store
from experiments.summary import summarise
from experiments.tables import accounts_table
from experiments.training import Training, load_splits
from splitlearn.data import Splits
from splitlearn.threat import Threat

PROTECTING = tuple(name for name in MECHANISMS if name != "none")
TOY = Config(
    epsilons=(4.0,), public=20, epochs=2, steps=4, rounds=2, clients=4, attacks=(), targets=8, audit_draws=1000,
    canaries=20,
)  # fmt: skip
ONCE = Options(seeds=(0,))
TABLE = Options(data="breast_cancer", seeds=(0,))
DELTA = 1e-5


def quick() -> Attack:
    """The smallest decoder, for three epochs: what is tested is the path."""
    real = ATTACKS["decoder"]

    def build_(aim: Aim) -> dict[str, Any]:
        return {"decoder-affine": replace(real.build(aim)["decoder-affine"], epochs=3)}

    return replace(real, build=build_)


def only(config: Config, options: Options = ONCE, **change: Any) -> Task:
    (task,) = tasks(replace(config, **change), options)
    return task


@cache
def reached(name: str, data: str = "breast_cancer") -> Outcome:
    """One trial of a mechanism on a table, under both kinds of attack; run once for all tests that look at it."""
    with patch.dict(ATTACKS, decoder=quick()):
        torch.manual_seed(0)
        # DP-SGD in whole batches: that of samples drawn by lot is the slow one to account for.
        change = {"rate": 1.0} if data == "breast_cancer" else {}
        options = Options(data=data, seeds=(0,))
        return only(TOY, options, mechanisms=(name,), attacks=("decoder",), **change).call()


def start(name: str = "digits", *, epsilon: float = 4.0, passes: int = 1, seed: int = 0, epochs: int = 2) -> Start:
    splits = load_splits(name, None)
    training = Training(cut="relu2", epochs=epochs, seed=seed, clients=4)
    model = public_model(splits, 20, training)
    public = splits.auxiliary
    return Start(
        splits=splits, model=model, public=public.x[:20], public_y=public.y[:20], training=training, epsilon=epsilon,
        delta=DELTA, passes=passes, sgd=PrivateSGD(steps=4), rounds=2, audit_draws=1000, canaries=20,
    )  # fmt: skip


# ---- what is asked for


def test_a_task_for_each_mechanism_epsilon_and_seed() -> None:
    config = replace(TOY, mechanisms=tuple(MECHANISMS), epsilons=(1.0, 2.5, 16.0))
    found = tasks(config, Options(seeds=(3, 1)))
    labels = [(task.labels["protection"], task.labels["strength"], task.labels["seed"]) for task in found]
    expected = [
        (name, strength, seed)
        for name in MECHANISMS
        for strength in ([""] if name == "none" else ["1", "2.5", "16"])
        for seed in (3, 1)
    ]
    assert labels == expected
    assert len({task.trial for task in found}) == len(found)
    # One setting, or no picture could hold them side by side.
    assert len({(task.labels["data"], task.labels["protocol"], task.labels["cut"]) for task in found}) == 1
    assert all(task.labels["cut"] == "relu4" for task in found)


def test_the_defaults_are_tasks_too() -> None:
    config = Config()
    assert set(config.mechanisms) == set(MECHANISMS)
    expected = 3 * (1 + len(config.epsilons) * (len(MECHANISMS) - 1))
    assert len(tasks(config, Options())) == expected
    assert all(task.labels["data"] == "breast_cancer" for task in tasks(config, TABLE))
    assert EXPERIMENTS["privacy_utility"].config is Config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mechanisms": ("gausian",)}, "did you mean gaussian"),
        ({"mechanisms": ("gaussian", "dp_sgd")}, "did you mean dpsgd"),
        ({"attacks": ("decodr",)}, "did you mean decoder"),
        ({"attacks": ("sent_labels",)}, "attack"),
        ({"epsilons": ()}, "expected --epsilons above 0, got none"),
        ({"epsilons": (1.0, 0.0)}, "expected --epsilons above 0, got 1.0,0.0"),
        ({"epsilons": (-1.0,)}, "expected --epsilons above 0"),
        ({"epsilons": (inf,)}, "expected --epsilons above 0"),
        ({"epsilons": (float("nan"),)}, "expected --epsilons above 0"),
        ({"delta": 0.0}, "expected --delta above 0 and below one over the 800"),
        ({"delta": 1 / 800}, "expected --delta above 0 and below one over the 800"),
        ({"public": 9}, "expected --public between 10 and 600, got 9"),
        ({"public": 601}, "expected --public between 10 and 600, got 601"),
        ({"cut": "conv9"}, "expected the name of a layer below the cut"),
        ({"cut": "fc2"}, "expected the name of a layer below the cut"),
        ({"attacks": ("decoder",), "targets": 0}, "expected --targets between 1 and 800"),
        ({"attacks": ("decoder",), "targets": 801}, "expected --targets between 1 and 800"),
        ({"passes": 0}, "expected --passes of 1 or more"),
        ({"passes": 3, "epochs": 2}, "expected --passes of at most the 2 --epochs, got 3"),
        ({"rounds": 0}, "expected --rounds of 1 or more"),
        ({"steps": 0}, "expected --steps of 1 or more"),
        ({"canaries": 1}, "expected --canaries of 2 or more, got 1"),
        ({"canaries": 90, "private": 100, "mechanisms": ("dpsgd",)}, "expected --canaries of at most 80, got 90"),
        ({"private": -1}, "expected --private and --auxiliary of 0 or more"),
        ({"audit_draws": 99}, "expected --audit-draws of 100 or more, got 99"),
        ({"rate": 0.0}, "expected --rate above 0 and of at most 1"),
        ({"rate": 2.5}, "expected --rate above 0 and of at most 1"),
        ({"clip": 0.0}, "expected --clip above 0"),
        ({"clip": inf}, "expected --clip above 0"),
        ({"sgd_lr": 0.0}, "expected --sgd-lr above 0"),
        ({"epochs": 0, "passes": 0}, "of 1 or more"),
        ({"lr": -1.0}, "expected --lr greater than 0"),
        ({"batch_size": 0}, "expected --batch-size of 1 or more"),
        ({"clients": 0}, "expected --clients between 1 and 800"),
        ({"clients": 801}, "expected --clients between 1 and 800"),
    ],
)
def test_bad_options_end_before_any_work(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(privacy_utility, "public_model", worked)
    with pytest.raises((ValueError, LookupError), match=message):
        tasks(replace(TOY, **change), ONCE)


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises((ValueError, LookupError), match="did you mean digits"):
        tasks(TOY, Options(data="digit", seeds=(0,)))


def test_tokens_are_refused(tokens: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_utility, "load_splits", lambda *_, **__: tokens)
    with pytest.raises(ValueError, match="got words, which holds tokens; use images, signals or a table"):
        tasks(TOY, ONCE)


def test_each_command_names_the_trial_that_it_reproduces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from experiments import runner
    from experiments.cli import main

    seen: list[str] = []

    def watched(found: list[Task], store: Store, **_: Any) -> None:
        seen.extend(task.trial for task in found)
        raise KeyboardInterrupt("enough was seen")

    monkeypatch.setattr(runner, "run", watched)
    config = replace(TOY, mechanisms=("none", "gaussian", "dpsgd"), epsilons=(0.5, 3.3), delta=2e-6, passes=2)
    for task in [*tasks(config, Options(seeds=(0, 7))), *tasks(replace(TOY, mechanisms=("laplace",)), TABLE)]:
        monkeypatch.setattr(sys, "argv", [*shlex.split(task.command), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit):
            main()
        assert seen == [task.trial], task.command
        seen.clear()


CHANGES: dict[str, Any] = {
    "epsilons": (5.0,), "delta": 1e-6, "cut": "relu2", "public": 30, "private": 700, "auxiliary": 500, "epochs": 3,
    "batch_size": 16, "lr": 1e-2, "attacks": ("decoder",), "targets": 9, "passes": 2, "rate": 0.5, "steps": 5,
    "clip": 1.0, "sgd_lr": 0.1, "clients": 5, "rounds": 3, "audit_draws": 500, "canaries": 30,
}  # fmt: skip
OWN = {  # what one mechanism depends on and another does not
    "none": {"passes"},
    "gaussian": {"passes", "audit_draws"},
    "laplace": {"passes", "audit_draws"},
    "gradient": {"audit_draws"},
    "response": {"audit_draws"},
    "dpsgd": {"rate", "steps", "clip", "sgd_lr", "canaries"},
    "user_level": {"clients", "rounds", "clip", "audit_draws"},
}


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_every_setting_that_matters_is_part_of_the_trial(name: str) -> None:
    """A result is never taken for that of other settings; nor is one made anew for settings that it does not read."""
    assert set(CHANGES) | {"mechanisms"} == set(Config.__dataclass_fields__)
    base = only(TOY, mechanisms=(name,))
    trials = {one: only(TOY, mechanisms=(name,), **{one: value}).trial for one, value in CHANGES.items()}
    alike = {one for one, trial in trials.items() if trial == base.trial}
    assert alike == set.union(*OWN.values()) - OWN[name] | ({"epsilons"} if name == "none" else set())
    assert len(set(trials.values()) - {base.trial}) == len(CHANGES) - len(alike)


# ---- what each mechanism comes to


@pytest.mark.parametrize("name", PROTECTING)
def test_a_mechanism_claims_what_it_was_asked_for_and_the_audit_stays_below(name: str) -> None:
    outcome = reached(name)
    assert outcome.epsilon is not None
    assert outcome.epsilon_lower is not None
    # Calibrated to be met from below, and to waste no more than a hundredth.
    assert 3.96 < outcome.epsilon <= 4.0 + 1e-9
    assert 0 <= outcome.epsilon_lower <= outcome.epsilon
    assert outcome.delta == DELTA
    first, *others = outcome.accounts
    assert "∞" not in first
    assert others  # no mechanism covers all that crosses
    assert all("ε = ∞" in account and "in the clear" in account for account in others)
    assert str(MECHANISMS[name].adjacency) in first
    assert any(note.startswith("strength: ε at δ = 1e-05, to") for note in outcome.notes)
    assert any(note.startswith("audit: ") for note in outcome.notes)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_a_mechanism_is_trained_attacked_and_timed(name: str) -> None:
    outcome = reached(name)
    assert 0 <= outcome.utility["accuracy"] <= 1
    # 20 public samples of a table that is nearly linear in its columns.
    assert outcome.utility["accuracy_public"] > 0.8
    assert outcome.images == {}
    leaks = {leak.family: leak for leak in outcome.leakage}
    inverted = name != "gradient"  # whose cut is another one than the others'
    assert [leak.attack for leak in outcome.leakage if leak.family == "reconstruction"] == ["decoder"] * inverted
    assert ("label" in leaks) is (name in ("response", "gradient"))
    assert set(outcome.seconds) == {"public", "train", "evaluate"} | ({"attack_decoder"} if inverted else set())
    assert outcome.visible["server"]
    assert ("attacker (decoder)" in outcome.visible) is inverted
    assert not inverted or any("one release of each" in line for line in outcome.visible["attacker (decoder)"])
    assert (outcome.mse_bound is not None) is (name in ("gaussian", "laplace"))
    assert outcome.mse_bound is None or outcome.mse_bound > 0


def test_no_mechanism_claims_nothing() -> None:
    outcome = reached("none")
    assert (outcome.epsilon, outcome.delta, outcome.epsilon_lower, outcome.mse_bound) == (None,) * 4
    assert outcome.accounts == []
    assert outcome.leakage[0].advantage > 0.04  # three epochs of a decoder are few; the noisy ones get nothing
    assert reached("gaussian").leakage[0].advantage < 0.04


def test_labels_are_scored_beside_what_the_public_model_says() -> None:
    for name in ("response", "gradient"):
        (leak,) = [leak for leak in reached(name).leakage if leak.family == "label"]
        assert set(leak.baselines) == {"accuracy_majority", "accuracy_public_model"}
        assert leak.metrics["accuracy"] == max(leak.details["accuracy_by_member"].values())
        best, blind = leak.metrics["accuracy"], max(leak.baselines.values())
        assert leak.advantage == pytest.approx(max(0.0, (best - blind) / (1 - blind)))
    # At ε = 4 one answer of two is the true one with a probability of 0.982.
    (leak,) = [leak for leak in reached("response").leakage if leak.family == "label"]
    assert leak.details["accuracy_by_member"]["answers"] == pytest.approx(0.982, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MECHANISMS))
def test_images_too(name: str) -> None:
    outcome = reached(name, "digits")
    assert set(outcome.images) == (set() if name == "gradient" else {"original", "decoder"})
    assert outcome.epsilon is None or 0 <= outcome.epsilon_lower <= outcome.epsilon <= 4  # type: ignore[operator]


@pytest.mark.parametrize("passes", [1, 3])
def test_bytes_are_those_of_the_passes(passes: int) -> None:
    outcome = only(TOY, TABLE, mechanisms=("gaussian",), passes=passes, epochs=4).call()
    width = load_width("breast_cancer")
    assert outcome.nbytes["up"]["activation"] == passes * 300 * width * 4
    assert outcome.nbytes["up"]["label"] == passes * 300 * 8
    assert f"{passes} × Gaussian" in outcome.accounts[0]


def load_width(name: str) -> int:
    begin = start(name)
    bottom, _ = replace(
        begin, training=replace(begin.training, cut=only(TOY, TABLE, mechanisms=("none",)).labels["cut"])
    ).halves()
    with torch.no_grad():
        return bottom(begin.splits.private.x[:1]).flatten(1).shape[1]


def test_three_passes_take_three_times_the_variance() -> None:
    once, thrice = (mechanisms.gaussian(start("breast_cancer", passes=passes, epochs=3)) for passes in (1, 3))
    assert once.guard is not None
    assert thrice.guard is not None
    # The Gaussian composes exactly; calibration stops within a thousandth of ε.
    assert thrice.guard.noise_multiplier == pytest.approx(sqrt(3) * once.guard.noise_multiplier, rel=5e-3)
    assert (once.releases, thrice.releases) == (1, 3)
    assert once.guard.clip == thrice.guard.clip
    assert thrice.claims[0].epsilon <= 4


def test_attackers_average_as_many_releases_as_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Tensor]] = []
    real = scoring.observe

    def watched(record: Any, *, threat: Threat, **more: Any) -> Any:
        seen.append((threat.releases, sum(one.request.verb == "predict" for one in record.exchanges)))
        return real(record, threat=threat, **more)

    monkeypatch.setattr(scoring, "observe", watched)
    monkeypatch.setitem(ATTACKS, "decoder", quick())
    outcome = only(TOY, TABLE, mechanisms=("gaussian",), passes=3, epochs=3, attacks=("decoder",)).call()
    assert seen == [(3, 3)]  # eight targets are one frame a release
    assert "the mean of 3 releases" in outcome.visible["attacker (decoder)"]


@pytest.mark.parametrize("name", ["none", "gaussian", "laplace", "response", "gradient"])
def test_the_bottom_is_the_public_one_to_the_last_bit(name: str) -> None:
    begin = start()
    public, _ = begin.halves()
    trained = MECHANISMS[name].run(begin).trained
    assert trained.encoder is not None
    client = trained.chain[0]
    for stage in (client.stage, trained.encoder.stage):  # type: ignore[attr-defined]
        found = [value for key, value in stage.state_dict().items() if "offset" not in key]
        expected = list(public.state_dict().values())
        assert len(found) == (2 if name == "gradient" else len(expected))  # the U shape has its cut further down
        assert all(map(torch.equal, found, expected))
        assert not any(parameter.requires_grad for parameter in stage.parameters())


def test_the_public_model_and_the_clip_do_not_depend_on_private_samples() -> None:
    begin = start("breast_cancer")
    private = begin.splits.private
    other = replace(begin.splits, private=replace(private, x=1 - private.x, y=private.y.roll(7)))
    model = public_model(other, 20, begin.training)
    assert all(map(torch.equal, model.state_dict().values(), begin.model.state_dict().values()))
    for name in ("gaussian", "laplace"):
        guards = [MECHANISMS[name].run(replace(begin, splits=splits)).guard for splits in (begin.splits, other)]
        assert guards[0] == guards[1]


def test_noise_is_drawn_anew_for_each_seed_and_again_for_one() -> None:
    def crossed(seed: int) -> Tensor:
        trained = mechanisms.gaussian(start("breast_cancer", seed=seed)).trained
        assert trained.record is not None
        return torch.cat([exchange.request.tensors["activation"] for exchange in trained.record.exchanges])  # type: ignore[index]

    assert torch.equal(crossed(0), crossed(0))
    assert not torch.equal(crossed(0), crossed(1))


def test_answers_are_drawn_anew_for_each_seed_and_again_for_one() -> None:
    def lies(seed: int) -> list[int]:
        """How often each label is answered by each, whatever the order in which they crossed."""
        found = mechanisms.response(start("breast_cancer", epsilon=0.5, seed=seed))
        assert found.trained.record is not None
        assert found.true_y is not None
        sent = torch.cat([exchange.request.tensors["label"] for exchange in found.trained.record.exchanges])  # type: ignore[index]
        return (2 * found.true_y + sent).bincount(minlength=4).tolist()

    assert lies(0) == lies(0)
    assert len({tuple(lies(seed)) for seed in range(4)}) == 4


def test_what_crosses_is_clipped_and_noised_as_claimed() -> None:
    """On the wire: residuals around the clipped activations have the standard deviation of the guard."""
    begin = start()
    found = mechanisms.gaussian(begin)
    assert found.guard is not None
    assert found.trained.record is not None
    sent = torch.cat([exchange.request.tensors["activation"] for exchange in found.trained.record.exchanges])  # type: ignore[index]
    clean = found.trained.encoder.stage(begin.splits.private.x).flatten(1)  # type: ignore[union-attr]
    norms = clean.norm(dim=1, keepdim=True).clamp(min=found.guard.clip)
    clipped = clean * found.guard.clip / norms
    # Samples cross in a shuffled order: variances add up, the more so as noise is independent of activations.
    variance = sent.flatten(1).var(0).mean() - clipped.var(0).mean()
    assert len(sent) == len(begin.splits.private)
    # 800 rows of thousands of entries: the spread of this estimate is below a hundredth.
    assert variance.sqrt().item() == pytest.approx(found.guard.std, rel=0.02)  # type: ignore[union-attr]


# ---- records, report and picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two mechanisms, at two ε each, beside none, and their report."""
    root = tmp_path_factory.mktemp("privacy")
    torch.set_num_threads(1)
    config = replace(TOY, mechanisms=("none", "gaussian", "response"), epsilons=(1.0, 4.0), attacks=("decoder",))
    with patch.dict(ATTACKS, decoder=quick()):
        summary = run(tasks(config, TABLE), Store(root), jobs=1, progress=False)
    assert (summary.done, summary.failed) == (5, 0)
    build(root)
    return root


def test_records_reload_as_they_were_written(folder: Path) -> None:
    records = Store(folder).records()
    assert len(records) == 5
    for record in records:
        again = Record.model_validate_json(record.model_dump_json())
        assert again == record
        assert record.trial == trial_hash({"experiment": "privacy_utility", "config": record.config})
        if record.protection != "none":
            assert record.epsilon is not None
            assert record.epsilon_lower is not None
            assert isfinite(record.epsilon)
            assert record.epsilon <= float(record.strength) + 1e-9
            assert record.epsilon_lower <= record.epsilon
            assert any("ε = ∞" in account for account in record.accounts)


def test_the_report_holds_picture_and_accounts(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert imread(folder / "privacy.png").std() > 0.01
    for record in Store(folder).records():
        for account in record.accounts:
            assert account in page
    assert "Accounts are never added up" in page
    import base64

    assert base64.b64encode((folder / "privacy.png").read_bytes()).decode() in page
    table = accounts_table(summarise(Store(folder).records()))
    assert table is not None
    assert [row[0] for row in table.rows] == [
        name for name in ("gaussian 1", "gaussian 4", "response 1", "response 4") for _ in range(2)
    ]


def test_the_picture_goes_with_the_last_epsilon(folder: Path, tmp_path: Path) -> None:
    bare = [record for record in Store(folder).records() if record.protection == "none"]
    for record in bare:
        Store(tmp_path).save(record)
    (tmp_path / "privacy.png").write_bytes((folder / "privacy.png").read_bytes())
    page = build(tmp_path).read_text()
    assert not (tmp_path / "privacy.png").exists()
    assert "Accounts are never added up" not in page


def drawn(protection: str = "gaussian", strength: str = "1", seed: int = 0, **change: Any) -> Record:
    claims = protection != "none"
    config = {"protection": protection, "strength": strength, "seed": seed, **change.pop("config", {})}
    plain: dict[str, Any] = {
        "experiment": "privacy_utility", "trial": trial_hash(config), "config": config, "command": "splitlearn",
        "status": "done", "seed": seed, "data": "digits", "protocol": "vanilla", "cut": "relu4",
        "protection": protection, "strength": strength,
        "utility": {"accuracy": 0.5 + 0.01 * seed, "accuracy_public": 0.4},
        "leakage": [
            Leakage(
                attack="decoder", family="reconstruction", advantage=0.4, metrics={"mse": 0.05},
                baselines={"mse_mean_image": 0.08},
            )
        ],
        "epsilon": float(strength) if claims else None, "delta": DELTA if claims else None,
        "epsilon_lower": 0.3 * float(strength) if claims else None,
    }  # fmt: skip
    return Record(**{**plain, **change})


SEVERAL = [drawn(name, strength) for name in ("gaussian", "laplace") for strength in ("1", "8")]


@pytest.mark.parametrize(
    "records",
    [
        [drawn()],
        [drawn(), drawn("none", "")],
        [drawn(seed=seed) for seed in range(3)],
        SEVERAL,
        [*SEVERAL, *(record.model_copy(update={"cut": "relu2"}) for record in SEVERAL)],
        [*SEVERAL, drawn("none", "").model_copy(update={"data": "breast_cancer"})],
        [*SEVERAL, drawn(config={"public": 99})],
        [drawn().model_copy(update={"leakage": []})],
        [drawn().model_copy(update={"epsilon_lower": 0.0, "mse_bound": 3.0})],
        [drawn(), drawn("response", "8").model_copy(update={"status": "failed"})],
        [drawn(), drawn("none", "").model_copy(update={"experiment": "tradeoff"})],
        [drawn(data="$x_{$", cut="<b>")],
    ],
    ids=[
        "one", "one beside none", "three seeds", "several", "two cuts", "two data sets", "a variant", "no attack",
        "audit of nothing", "a failure", "another experiment", "hostile names",
    ],
)  # fmt: skip
def test_the_picture_is_drawn_of(records: list[Record], tmp_path: Path) -> None:
    path = privacy(records, tmp_path / "privacy.png")
    assert path == tmp_path / "privacy.png"
    assert imread(path).std() > 0.01
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [drawn("none", "")],
        [drawn().model_copy(update={"status": "failed"})],
        [drawn().model_copy(update={"epsilon": inf})],
        [drawn().model_copy(update={"experiment": "tradeoff"})],
    ],
    ids=["nothing", "only none", "only failures", "no finite ε", "another experiment"],
)
def test_no_picture_and_none_left_over_of(records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "privacy.png"
    path.write_bytes(b"of an earlier report")
    assert privacy(records, path) is None
    assert not path.exists()


def test_a_trial_is_described_whole() -> None:
    task = only(TOY, mechanisms=("none",))
    trial = task.call.args[0]  # type: ignore[attr-defined]
    assert isinstance(trial, Trial)
    assert task.config["epsilon"] == "none"
    assert task.config == trial.described()


def test_a_mechanism_of_ones_own_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run_: Callable[[Start], Any] = mechanisms.gaussian
    own = replace(MECHANISMS["gaussian"], summary="another", run=run_)
    monkeypatch.setitem(MECHANISMS, "own", own)
    assert only(TOY, TABLE, mechanisms=("own",)).call().epsilon == pytest.approx(4, abs=0.04)
