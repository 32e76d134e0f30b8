"""The case studies end to end at toy size, on small files made here: who holds what, what leaks, what it says."""

import gzip
import pickle
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from experiments import arrhythmia, case_study, credit_scoring, setups, text_classification
from experiments.case_study import READ_LABELS, Config
from experiments.catalogue import ATTACKS
from experiments.experiment import Options
from experiments.parts import Aim, Shield
from experiments.report import build
from experiments.runner import Outcome, Task, run
from experiments.store import Store
from experiments.training import Training
from splitlearn.data import Splits, load, partition
from splitlearn.data.schemas import CREDIT

STUDIES = {"arrhythmia": arrhythmia, "credit_scoring": credit_scoring, "text_classification": text_classification}
PATIENTS, BEATS, PERSONS, SENTENCES = 12, 40, 600, 160
SMALL: dict[str, Config] = {
    "arrhythmia": arrhythmia.Config(private=192, auxiliary=64, test=96, targets=16, clients=2, epochs=2),
    "credit_scoring": credit_scoring.Config(private=256, auxiliary=200, test=96, targets=16, epochs=2),
    "text_classification": text_classification.Config(private=64, auxiliary=64, test=20, targets=16, epochs=1),
}


def write_beats(folder: Path) -> None:
    draws = np.random.default_rng(0)
    record = np.repeat(np.arange(PATIENTS) + 100, BEATS)
    y = np.where(draws.random(len(record)) < 0.3, 4, record % 4)
    width = np.where(y == 4, 30.0, 6.0)[:, None]
    beat = 200 * np.exp(-(((np.arange(256) - 128) / width) ** 2)) + draws.normal(0, 4, (len(record), 256)) + 1024
    path = folder / "ecg" / "mitbih_beats.npz"
    path.parent.mkdir()
    np.savez(path, x=beat.astype(np.int16), y=y.astype(np.uint8), record=record, adc_zero=1024, adc_gain=200.0)


def write_persons(folder: Path) -> None:
    draws = np.random.default_rng(0)
    columns = [*CREDIT.numeric, *CREDIT.categorical, CREDIT.target]
    lines = [",".join(columns)]
    for _ in range(PERSONS):
        numbers = draws.normal(size=len(CREDIT.numeric)).round(3)
        kinds = draws.integers(1, 3, len(CREDIT.categorical))
        lines.append(",".join(map(str, [*numbers, *kinds, int(numbers[0] + numbers[-1] > 1)])))
    path = folder / "tabular" / "credit_default.csv.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def write_sentences(folder: Path) -> None:
    draws = np.random.default_rng(0)
    (folder / "text").mkdir()
    for part, count in (("train", SENTENCES), ("test", 20)):
        labels = draws.integers(0, 6, count)
        words = [draws.integers(0, 20, draws.integers(3, 8)) for _ in range(count)]
        lines = [
            f"{label} asks{label} {' '.join(f'word{one}' for one in some)}"
            for label, some in zip(labels, words, strict=True)
        ]
        (folder / "text" / f"trec_{part}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode("latin-1")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for write in (write_beats, write_persons, write_sentences):
        write(path)
    return path


@pytest.fixture
def _quick_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ATTACKS["decoder"]

    def build_one(aim: Aim) -> dict[str, Any]:
        return {"decoder-affine": replace(real.build(aim)["decoder-affine"], epochs=25)}

    monkeypatch.setitem(ATTACKS, "decoder", replace(real, build=build_one))


def options(folder: Path, name: str, **change: Any) -> Options:
    data = {"text_classification": "trec"}.get(name, STUDIES[name].STUDY.data[0])
    return replace(Options(data=data, data_dir=folder, seeds=(0,)), **change)


def found(folder: Path, name: str, **change: Any) -> list[Task]:
    return STUDIES[name].tasks(replace(SMALL[name], **change), options(folder, name))


def outcome_of(folder: Path, name: str, protocol: str, protection: str, **change: Any) -> Outcome:
    (task,) = found(folder, name, protocols=(protocol,), protections=(protection,), **change)
    return task.call()


@pytest.mark.parametrize("name", STUDIES)
def test_each_arm_and_seed_is_a_task_that_its_command_repeats(name: str, folder: Path) -> None:
    tasks = STUDIES[name].tasks(SMALL[name], options(folder, name, seeds=(0, 1)))
    arms = [(task.labels["protocol"], task.labels["protection"], task.labels["strength"]) for task in tasks]
    assert len(arms) == 2 * len(set(arms))
    assert ("unsplit", "none", "") in arms
    assert not any(protocol in ("unsplit", "fedavg") and protection != "none" for protocol, protection, _ in arms)
    for task in tasks:
        words = shlex.split(task.command)
        assert words[:5] == ["splitlearn", "run", name, "--data", task.labels["data"]]
        assert words[words.index("--protocols") + 1] == task.labels["protocol"]
        assert "0x" not in str(task.config)
        assert pickle.dumps(task.call)  # a worker process takes it
    assert len({task.trial for task in tasks}) == len(tasks)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arrhythmia", {"protocols": ("splitfed",)}, "did you mean splitfed_v2"),
        ("arrhythmia", {"protections": ("ressfl",)}, "no protection is named 'ressfl'"),
        ("arrhythmia", {"attacks": ("nearest",)}, "no attack is named 'nearest'"),
        ("arrhythmia", {"clients": 40}, "clients for . groups"),
        ("arrhythmia", {"batch_size": 100}, "expected --batch-size of at most"),
        ("arrhythmia", {"targets": 190}, "the beats of the first hospital under seed 0"),
        ("arrhythmia", {"private": 5000}, "beats fill under seed 0, got 5000, 64, 96; ask for fewer"),
        ("arrhythmia", {"private": 5000, "test": 1}, "got 5000, 64, 1; ask for fewer"),
        ("arrhythmia", {"private": 195}, "4 samples or more for nopeek under u_shaped, the last one too, got 3"),
        ("arrhythmia", {"batch_size": 3, "protocols": ("vanilla",)}, "nopeek under vanilla, the last one too, got 3"),
        ("arrhythmia", {"auxiliary": 4}, "expected --auxiliary of 16 or more for decoder, got 4"),
        ("arrhythmia", {"test": 0}, "expected --private, --auxiliary and --test of 1 or more"),
        ("arrhythmia", {"protocols": ()}, "at least one of --protocols"),
        ("arrhythmia", {"cut": "pool9"}, "pool9"),
        ("credit_scoring", {"clients": 1}, "expected --clients of 2 or more"),
        ("credit_scoring", {"clients": 3}, "use --clients 2"),
        ("credit_scoring", {"clients": 16}, "hold whole attributes each, got 16, which 23 attributes"),
        ("credit_scoring", {"auxiliary": 1}, "expected --auxiliary of 16 or more for decoder, got 1; ask for more"),
        (
            "credit_scoring",
            {"private": 4, "targets": 3},
            "expected a batch with both labels for norm, beside 0 of each",
        ),
        ("credit_scoring", {"targets": 0}, "expected --targets between 1 and 256"),
        ("credit_scoring", {"protections": ("marvell:x",)}, "expected a strength"),
        ("text_classification", {"clients": 3}, "expected one client, whose texts are attacked, got 3"),
        ("text_classification", {"attacks": ("decoder",)}, "no attack is named 'decoder'"),
        ("text_classification", {"auxiliary": 4}, "expected --auxiliary of 16 or more"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(name: str, change: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        found(folder, name, **change)


def test_only_batches_that_train_under_nopeek_must_be_large_enough(folder: Path) -> None:
    assert found(folder, "arrhythmia", private=195, protocols=("vanilla", "splitfed_v2"))  # the last one is left out
    assert found(folder, "arrhythmia", private=195, protocols=("unsplit", "fedavg"))  # where nothing protects


def test_labels_that_can_be_scored_pass_the_check_and_others_do_not() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 0])
    case_study.check_guessed(["norm", "cosine"], y, Training(batch_size=6, epochs=2))
    with pytest.raises(ValueError, match=r"for cosine, beside 1 of each .* got \[5, 1\] private samples"):
        case_study.check_guessed(["norm", "cosine"], torch.tensor([0, 0, 0, 1, 0, 0]), Training(batch_size=6))
    with pytest.raises(ValueError, match="in batches of 1; raise --private or --batch-size"):
        case_study.check_guessed(["norm"], y, Training(batch_size=1))


@pytest.mark.parametrize("name", STUDIES)
def test_data_that_is_absent_or_of_another_study_is_one_clear_line(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPLITLEARN_DATA", raising=False)
    study: ModuleType = STUDIES[name]
    with pytest.raises(LookupError, match=r"got none; name its folder by --data-dir or SPLITLEARN_DATA"):
        study.tasks(study.Config(), Options(data=study.STUDY.data[0]))
    with pytest.raises(LookupError, match=r"got no such file; name its folder by --data-dir"):
        study.tasks(study.Config(), Options(data=study.STUDY.data[0], data_dir=tmp_path))
    with pytest.raises(LookupError, match=f"which {name} is about, got 'mnist'"):
        study.tasks(study.Config(), Options(data="mnist", data_dir=folder))


def test_no_patient_is_in_two_parts_nor_with_two_hospitals(folder: Path) -> None:
    dataset = load("mitbih", data_dir=folder)
    for seed in range(3):
        splits = arrhythmia.deal(dataset, (192, 64, 96), seed)
        groups = [part.groups for part in (splits.private, splits.auxiliary, splits.test)]
        known = arrhythmia.known_patients(dataset, (192, 64, 96), seed)["known_patients"]
        patients = [set(some.tolist()) for some in groups if some is not None]
        assert sum(map(len, patients)) == len(set().union(*patients))
        assert known.groups is not None
        assert set(known.groups.tolist()) <= patients[0]
        assert not torch.isin(known.ids, splits.private.ids).any()
        held = arrhythmia.hospitals(Training(clients=3, seed=seed), splits)
        assert groups[0] is not None
        whose = [set(groups[0][rows].tolist()) for rows in held]
        assert sum(map(len, whose)) == len(patients[0])
        assert float(splits.private.x.mean(-1).abs().max()) < 1e-5


def test_one_hospital_learns_what_unsplit_training_learns(folder: Path) -> None:
    splits = arrhythmia.deal(load("mitbih", data_dir=folder), (192, 64, 96), 0)
    training = Training(protocol="splitfed_v2", cut="pool1", epochs=2, clients=1)
    ours = arrhythmia.train_by_patient(training, splits, Shield()).model.parameters()
    theirs = setups.train_unsplit(training, splits, Shield()).model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("_quick_decoder")
def test_heart_beats_and_labels_cross_where_the_server_learns_from_them(folder: Path) -> None:
    bare = outcome_of(folder, "arrhythmia", "splitfed_v2", "none")
    leaks = {leak.attack: leak.advantage for leak in bare.leakage}
    assert leaks[READ_LABELS] == 1
    assert leaks["decoder"] > 0.5
    assert bare.utility["accuracy_known_patients"] > 0.5
    assert bare.nbytes["up"]["weights"] > 0
    assert any("none is in two parts" in note for note in bare.notes)
    noisy = outcome_of(folder, "arrhythmia", "splitfed_v2", "noise:0.5")
    assert {leak.attack: leak.advantage for leak in noisy.leakage}["decoder"] < leaks["decoder"]
    turns = outcome_of(folder, "arrhythmia", "vanilla", "none", attacks=(READ_LABELS,))
    assert turns.leakage[0].advantage == 1
    assert "every bottom handed on" in turns.visible["server"]


@pytest.mark.usefixtures("_quick_decoder")
def test_the_u_shape_sends_no_labels_and_its_gradients_tell_them(folder: Path) -> None:
    outcome = outcome_of(folder, "arrhythmia", "u_shaped", "none")
    assert [leak.attack for leak in outcome.leakage] == ["similarity", "decoder"]
    assert outcome.leakage[0].advantage > 0.5
    assert "label" not in outcome.nbytes["up"]


@pytest.mark.parametrize("protocol", ["unsplit", "fedavg"])
def test_where_no_activation_crosses_these_attacks_read_nothing(protocol: str, folder: Path) -> None:
    outcome = outcome_of(folder, "arrhythmia", protocol, "none")
    assert outcome.leakage == []
    assert "nothing crosses here that these attacks could read" in outcome.notes
    assert 0 <= outcome.utility["auc"] <= 1
    assert bool(outcome.nbytes) is (protocol == "fedavg")


@pytest.mark.usefixtures("_quick_decoder")
def test_institutions_read_labels_off_gradients_and_the_owner_columns_off_activations(folder: Path) -> None:
    bare = outcome_of(folder, "credit_scoring", "vertical", "none")
    leaks = {leak.attack: leak.advantage for leak in bare.leakage}
    assert leaks["cosine"] > 0.9
    assert leaks["decoder"] > 0.3
    assert bare.nbytes["up"]["activation"] > 2 * 256 * 32 * 4 - 1
    assert "label" not in bare.nbytes["up"] | bare.nbytes["down"]
    assert bare.epsilon is None
    marvell = outcome_of(folder, "credit_scoring", "vertical", "marvell:4")
    hidden = {leak.attack: leak.advantage for leak in marvell.leakage}
    assert hidden["cosine"] < leaks["cosine"] - 0.2
    assert hidden["decoder"] > 0.3  # what hides labels hides no columns
    answered = outcome_of(folder, "credit_scoring", "vertical", "label_dp:1", attacks=("norm",))
    assert (answered.epsilon, answered.delta) == (1, 0)
    assert any("each is answered once" in note for note in answered.notes)


def test_no_attribute_is_parted_between_institutions(folder: Path) -> None:
    names = ("age", "sex=F", "sex=M", "job=a", "job=b=c", "job=d", "job=e", "city=x")
    assert [len(own) for own in partition.attributes(names, 2)] == [3, 5]  # the equal cut is in the midst of job
    assert [len(own) for own in partition.attributes(names, 4)] == [1, 2, 4, 1]
    assert torch.equal(torch.cat(partition.attributes(names, 4)), torch.arange(8))
    with pytest.raises(ValueError, match="got 8, which 4 attributes of 8 columns"):
        partition.attributes(names, 8)
    for clients, of in ((2, "2 institutions hold"), (4, "4 institutions hold")):
        outcome = outcome_of(folder, "credit_scoring", "vertical", "none", clients=clients, attacks=(), epochs=1)
        assert any(note.startswith(of) for note in outcome.notes)
    alone = outcome_of(folder, "credit_scoring", "unsplit", "none", epochs=1)
    assert not any("institutions" in note for note in alone.notes)


def test_where_cuts_fall_between_attributes_training_is_that_of_vertical_split_learning(folder: Path) -> None:
    splits = case_study.dealt(load("credit", data_dir=folder), (256, 200, 96), 0)
    splits = Splits(*(replace(part, names=None) for part in (splits.private, splits.auxiliary, splits.test)))
    names = tuple(f"column{number}" for number in range(splits.private.x.shape[1]))  # each an attribute of its own
    named = replace(splits, private=replace(splits.private, names=names))
    training = Training(protocol="vertical", cut="relu1", epochs=1, clients=2)
    trial = case_study.Trial("credit", (256, 200, 96), training, "none", "", (), 16)
    ours = credit_scoring.train(trial, named)[0].model.parameters()
    theirs = setups.train_vertical(training, splits, Shield()).model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_vertical_chain_is_what_the_owner_reads(folder: Path) -> None:
    splits = case_study.dealt(load("credit", data_dir=folder), (256, 200, 96), 0)
    trial = case_study.Trial(
        "credit", (256, 200, 96), Training(protocol="vertical", cut="relu1", epochs=1, clients=2), "none", "", (), 16
    )
    trained, _ = credit_scoring.train(trial, splits)
    x = splits.test.x[:8]
    assert trained.encoder is not None
    assert torch.equal(trained.chain[0].predict(x), trained.encoder(x))


@pytest.mark.parametrize("cut", ["embed", "block1"])
def test_words_cross_and_shuffling_them_hides_nothing_from_who_knows(cut: str, folder: Path) -> None:
    bare = outcome_of(folder, "text_classification", "vanilla", "none", cut=cut)
    leaks = {leak.attack: leak for leak in bare.leakage}
    assert set(leaks) == {"nearest", "learned", READ_LABELS}
    assert leaks["nearest"].metrics["accuracy"] > 0.95
    assert leaks["learned"].advantage > 0.5
    assert leaks["nearest"].baselines["accuracy_commonest_word"] < 0.2
    shuffled = outcome_of(folder, "text_classification", "vanilla", "patch_shuffle", cut=cut)
    hidden = {leak.attack: leak for leak in shuffled.leakage}
    assert hidden["nearest"].metrics["accuracy"] > 0.9
    assert hidden["learned"].advantage < 0.5  # who does not know it loses the places
    noisy = outcome_of(folder, "text_classification", "vanilla", "noise:5", cut=cut)
    assert max(leak.advantage for leak in noisy.leakage if leak.attack != READ_LABELS) < 0.5


def test_who_guesses_the_commonest_word_has_no_advantage() -> None:
    x = torch.tensor([[2, 3, 2, 0], [2, 4, 1, 0]])
    leak = text_classification.scored("nearest", torch.full((2, 4), 2), x, x)
    # Of five words: padding and unknown do not count.
    assert leak.metrics == {"accuracy": 0.6, "any_place": 0.6, "nameable": 1}
    assert leak.advantage == 0
    right = text_classification.scored("nearest", x.flip(0).flip(0), x, x)
    assert right.advantage == 1
    few = text_classification.scored("learned", x, x, torch.tensor([[4, 1, 0, 0]]))
    assert few.metrics["nameable"] == 0.2  # of five words, one is in the attacker's own texts


def test_test_texts_that_are_private_too_are_counted(folder: Path) -> None:
    splits = case_study.dealt(load("trec", data_dir=folder), (64, 64, 20), 0)
    trial = case_study.Trial("trec", (64, 64, 20), Training(), "none", "", (), 16)
    assert len(text_classification.notes(trial, splits)) == 1
    x = splits.test.x.clone()
    x[3], x[7] = splits.private.x[5], splits.private.x[5]
    notes = text_classification.notes(trial, replace(splits, test=replace(splits.test, x=x)))
    assert notes[1] == "2 of 20 test texts are private ones too, token for token"


def test_labels_stay_with_the_client_in_the_u_shape_and_words_do_not(folder: Path) -> None:
    outcome = outcome_of(folder, "text_classification", "u_shaped", "none", attacks=("nearest", READ_LABELS))
    assert [leak.attack for leak in outcome.leakage] == ["nearest"]


def test_the_report_draws_the_arms(folder: Path, tmp_path: Path) -> None:
    tasks = found(folder, "text_classification", protections=("none", "noise:0.02"), attacks=("nearest",))
    assert run(tasks, Store(tmp_path), jobs=1, progress=False).failed == 0
    assert "text_classification" in build(tmp_path).read_text()
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
