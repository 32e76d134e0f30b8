"""Summary, plots and report: hand cases for the figures, a parser and a real browser for the page."""

import csv
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread

from experiments.closing import closing_tables
from experiments.figures import count, number, ratio, seconds, spread
from experiments.gallery import gallery, strip
from experiments.interactive import interactive_tradeoff
from experiments.plots import leakage_note, styles
from experiments.record import Leakage, Record, trial_hash
from experiments.report import build
from experiments.store import Store
from experiments.summary import Setting, Spread, marks, pareto_front, summarise, utility_metric
from experiments.tables import (
    bytes_table,
    leakage_tables,
    results_tables,
    seconds_table,
    strength_notes,
    visible_table,
)

GRID = (("none", "", 0.95, 0.9), ("noise", "0.5", 0.94, 0.7), ("noise", "2", 0.85, 0.4), ("nopeek", "1", 0.93, 0.8))
HOSTILE = "<script>alert(1)</script>$x_{$"


def record(protection="none", strength="", seed=0, utility=0.9, leakage=0.5, **fields):
    config = {"protection": protection, "strength": strength, "seed": seed, **fields.pop("extra", {})}
    config |= {name: fields[name] for name in ("data", "protocol", "cut") if name in fields}
    leaks = [
        Leakage(
            attack=attack,
            family="reconstruction",
            advantage=leakage * share,
            metrics={"mse": 0.08 * (1 - leakage * share), "ssim": 0.5, "mse_q90": 0.1},
            baselines={"mse_mean_image": 0.09, "mse_class_mean_image": 0.08, "ssim_mean_image": 0.2},
        )
        for attack, share in (("decoder", 1.0), ("rmle", 0.5))
    ]
    plain = {
        "experiment": "tiny",
        "trial": trial_hash(config),
        "config": config,
        "command": f"splitlearn run tiny --protection {protection}:{strength} --seeds {seed}",
        "status": "done",
        "seed": seed,
        "data": "digits",
        "protocol": "vanilla",
        "cut": "relu1",
        "protection": protection,
        "strength": strength,
        "utility": {"accuracy": utility},
        "leakage": leaks,
        "nbytes": {"up": {"activation": 4000, "frame": 96}, "down": {"gradient": 4000}},
        "seconds": {"train": 2.0, "total": 3.0},
        "peak_memory_bytes": 300_000_000,
        "visible": {"server": ["activations at relu1", "labels"]},
        "started": "2026-01-02T03:04:05+00:00",
    }
    return Record(**{**plain, **fields})


def filled(root, **fields):
    """Return a store of the grid over three seeds, the first of each with images, and one failure."""
    store = Store(root)
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(9, 1, 8, 8, generator=generator)
    for protection, strength, utility, leakage in GRID:
        for seed in range(3):
            kept = record(protection, strength, seed, utility + 0.01 * (seed - 1), leakage, **fields)
            images = {"original": original, "decoder": 0.5 * original, "rmle": 0.1 * original}
            store.save(kept, images if seed == 0 else None)
    store.save(
        record("noise", "9", 0, status="failed", error="ValueError: too loud", utility=0, leakage=0, **fields),
        traceback="Traceback (most recent call last):\nValueError: too loud",
    )
    return store


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.images = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href", "action", "data", "poster", "srcset") if name in found]
        if tag == "img":
            self.images.append(found)

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(0.9, 0.5)], [0]),
        ([(0.9, 0.5), (0.8, 0.6)], [0]),
        ([(0.9, 0.5), (0.8, 0.4)], [1, 0]),
        ([(0.9, 0.5), (0.9, 0.5)], [0, 1]),
        ([(0.9, 0.5), (0.9, 0.4), (0.8, 0.4)], [1]),
        ([(0.95, 0.9), (0.94, 0.7), (0.85, 0.4), (0.93, 0.8)], [2, 1, 0]),
        ([(math.nan, 0.1), (0.5, 0.5), (0.9, math.nan)], [1]),
    ],
)
def test_the_pareto_front_by_hand(points, front):
    assert pareto_front(points) == front


def test_a_spread_by_hand():
    assert Spread.of([]) is None
    assert Spread.of([1, 2, 3]) == Spread(mean=2, std=1, low=1, high=3, n=3)
    one = Spread.of([5.0])
    assert (one.mean, one.low, one.high, one.n) == (5, 5, 5, 1)
    assert math.isnan(one.std)
    infinite = Spread.of([1.0, math.inf])
    assert infinite.mean == infinite.high == math.inf
    assert math.isnan(infinite.std)


def test_points_are_means_over_seeds_and_leave_failures_out():
    records = [record("noise", "1", seed, 0.9 + 0.01 * seed, 0.4 + 0.1 * seed) for seed in (2, 0, 1)]
    records += [record("noise", "1", 3, status="failed", error="no", utility=0, leakage=1)]
    (point,) = summarise(records)
    assert point.seeds == (0, 1, 2)
    assert point.setting == Setting("digits", "vanilla", "relu1")
    assert (point.name, point.variant) == ("noise 1", "")
    assert point.utility("accuracy").mean == pytest.approx(0.91)
    assert point.worst == Spread(pytest.approx(0.5), pytest.approx(0.1), 0.4, pytest.approx(0.6), 3)
    assert point.attacks == ["decoder", "rmle"]
    assert point.nbytes().mean == 8096
    assert point.nbytes("up", "frame").mean == 96


def test_the_worst_attack_is_taken_in_each_trial():
    leaks = [
        Leakage(attack=attack, family="label", advantage=advantage, metrics={}, baselines={})
        for attack, advantage in (("a", 0.2), ("b", 0.6))
    ]
    turned = [leaks[0].model_copy(update={"advantage": 0.8}), leaks[1].model_copy(update={"advantage": 0.1})]
    (point,) = summarise(
        [record(seed=0).model_copy(update={"leakage": leaks}), record(seed=1).model_copy(update={"leakage": turned})]
    )
    assert point.worst.mean == pytest.approx(0.7)


def test_configurations_that_differ_in_more_than_the_seed_are_never_averaged():
    records = [record("noise", "1", seed, extra={"epochs": epochs}) for seed in (0, 1) for epochs in (5, 20)]
    points = summarise(records)
    assert sorted(point.name for point in points) == ["noise 1 (epochs=20)", "noise 1 (epochs=5)"]
    assert all(point.seeds == (0, 1) for point in points)


def test_variants_are_told_apart_by_the_fewest_settings_however_deep():
    deep = [
        record("noise", "1", extra={"training": {"epochs": epochs, "lr": 0.1}, "attack": f"Decoder({epochs})"})
        for epochs in (5, 20)
    ]
    long = [record("nopeek", "1", extra={"attacks": attacks}) for attacks in ({"a": "A" * 99}, {})]
    assert sorted(point.variant for point in summarise(deep)) == ["epochs=20", "epochs=5"]
    assert sorted(point.variant for point in summarise(long)) == [f"a={'A' * 23}…", "a=—"]


def test_experiments_in_one_folder_are_told_apart():
    compared = record(experiment="parity", leakage=0).model_copy(update={"leakage": [], "utility": {"gap": 0.0}})
    points = summarise([record(), compared])
    assert [point.setting.title for point in points] == [
        "parity · digits · vanilla · cut relu1",
        "tiny · digits · vanilla · cut relu1",
    ]
    assert [point.variant for point in points] == ["", ""]
    parity, tiny = results_tables(points)
    assert parity.columns == ("protection", "seeds", "gap")
    assert tiny.columns == ("protection", "seeds", "accuracy", "worst leakage", "by")


def test_the_caption_names_attacks_and_baselines():
    assert leakage_note(summarise([record()])) == (
        "Leakage: the worst of decoder, rmle; 0 is an attacker who saw nothing (baselines: class mean image, "
        "mean image), 1 is everything."
    )
    assert leakage_note(summarise([record().model_copy(update={"leakage": []})])) == ""


def test_a_run_without_attacks_ends_in_one_table_of_all_that_was_measured():
    plain = {"leakage": [], "utility": {"accuracy": 0.9, "weights_difference": 1e-16}}
    records = [record(protocol=name).model_copy(update=plain) for name in ("vanilla", "fedavg")]
    (table,) = closing_tables(records)
    assert [column.header for column in table.columns] == [
        "setting", "seeds", "accuracy", "weights difference", "bytes", "train time",
    ]  # fmt: skip
    assert list(table.columns[0].cells) == ["fedavg", "vanilla"]
    assert table.title == "digits · cut relu1 · unprotected"
    assert list(table.columns[3].cells) == ["1.0e-16", "1.0e-16"]


def test_marks_need_both_figures_and_stay_within_their_setting():
    records = [record(cut="relu1"), record(cut="relu2"), record("noise", "1").model_copy(update={"leakage": []})]
    panels = marks(summarise(records), "accuracy")
    assert [(setting.cut, len(members)) for setting, members in panels.items()] == [("relu1", 1), ("relu2", 1)]
    assert marks(summarise(records), None) == {}
    assert utility_metric(summarise([record().model_copy(update={"utility": {"parity": 0.0}})])) == "parity"
    assert utility_metric([]) is None


def test_figures_read_well():
    assert [number(x) for x in (0.9534, 0.00245, 25.21, 1234.5, 0.0, 1e-5)] == [
        "0.953", "0.00245", "25.2", "1,234", "0", "1e-05",
    ]  # fmt: skip
    assert (number(math.inf), number(math.nan)) == ("∞", "not a number")
    assert spread(Spread.of([0.5, 0.7])) == "0.600 (0.500 to 0.700)"
    assert (spread(None), spread(Spread.of([0.5]))) == ("—", "0.500")
    assert [count(x) for x in (12, 52_428_800, 1500, 2e9)] == ["12 B", "52.4 MB", "1.5 kB", "2 GB"]
    assert [seconds(x) for x in (0.0204, 4.1, 600)] == ["20.4 ms", "4.1 s", "10 min"]
    assert (ratio(Spread.of([3]), Spread.of([2])), ratio(None, Spread.of([2]))) == ("1.50×", "—")


def test_tables_put_figures_beside_their_baselines_and_ratios():
    records = [record(), record("noise", "1", nbytes={"up": {"activation": 16192}}, seconds={"train": 3.0})]
    points = summarise(records)
    (results,) = results_tables(points)
    assert results.columns == ("protection", "seeds", "accuracy", "worst leakage", "by")
    assert results.rows[0] == ("unprotected", "1", "0.900", "0.500", "decoder")
    (leakage,) = leakage_tables(points)
    assert leakage.columns[-4:] == ("mse", "baseline", "ssim", "baseline")
    assert leakage.rows[0] == ("unprotected", "decoder", "0.500", "0.04", "0.08", "0.500", "0.200")
    assert [row[-1] for row in bytes_table(points).rows] == ["1.00×", "2.00×"]
    assert [row[-2:] for row in seconds_table(points).rows] == [("1.00×", "300 MB"), ("1.50×", "300 MB")]
    assert visible_table(points).rows == (("server", "activations at relu1; labels", "unprotected, noise 1"),)
    (proved,) = results_tables(summarise([record(epsilon=2.0)]))
    assert proved.rows[0][proved.columns.index("ε")] == "2.000"


def test_psnr_and_ssim_are_told_by_their_medians_where_these_were_kept():
    leak = record().leakage[0]
    kept = leak.model_copy(update={"metrics": {"mse": 0.04, "psnr": 20.0, "psnr_q50": 17.0, "ssim": 0.5}})
    (table,) = leakage_tables(summarise([record().model_copy(update={"leakage": [kept]})]))
    assert table.columns[-6:] == ("mse", "baseline", "psnr median", "baseline", "ssim", "baseline")
    assert table.rows[0][-6:] == ("0.04", "0.08", "17.0", "—", "0.500", "0.200")


def test_what_a_strength_means_is_told_once_a_protection(tmp_path):
    note = "strength: noise multiplier"
    records = [record("noise", strength, seed, notes=[note, "other"]) for strength in "12" for seed in (0, 1)]
    assert strength_notes(summarise([*records, record()])) == [("noise", ["noise multiplier"])]
    Store(tmp_path).save(records[0])
    assert "<strong>noise</strong>: noise multiplier" in build(tmp_path).read_text()


def test_the_front_is_a_step(tmp_path):
    store = filled(tmp_path)
    assert '"shape":"vh"' in interactive_tradeoff(store.records())


def test_every_protection_has_its_own_look():
    names = ["none", *(f"p{i}" for i in range(8))]
    look = styles(summarise([record(name, "1") for name in names]))
    assert next(iter(look.values())).label == "unprotected"
    assert len({(style.colour, style.marker) for style in look.values()}) == len(names)


def test_the_gallery_puts_the_worst_attack_first_and_repeats_no_originals(tmp_path):
    store = filled(tmp_path)
    rows = gallery(store.records(), store)
    assert [row.attack for row in rows] == ["", *["decoder", "rmle"] * len(GRID)]
    assert [row.worst for row in rows[:3]] == [True, True, False]
    assert all(row.images.shape == (8, 1, 8, 8) for row in rows)
    assert rows[1].scores == "MSE 0.008 · SSIM 0.5"


def test_a_strip_is_the_samples_themselves():
    grey, colour = strip(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)), strip(torch.rand(2, 3, 4, 4))
    assert grey.shape == (2, 5, 4)
    assert grey[0, :, 0].tolist() == [0, 0, 0, 255, 255]
    assert grey[0, :, 3].tolist() == [255, 255, 0, 255, 255]
    assert colour.shape == (4, 9, 4)


def test_the_report_is_one_file_that_tells_of_every_trial(tmp_path):
    store = filled(tmp_path, notes=[HOSTILE], visible={HOSTILE: [HOSTILE]}, data=HOSTILE)
    path = build(tmp_path)
    text = path.read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in text
    assert HOSTILE not in text
    assert HOSTILE in "".join(page.text)
    for kept in store.records():
        assert f'id="trial-{kept.trial}"' in text
        assert kept.command in "".join(page.text)
    assert "Traceback (most recent call last):\nValueError: too loud" in "".join(page.text)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 1 + 2 * len(GRID)
    assert page.tags.count("table") == page.tags.count("caption")
    targets = [link[1:] for link in page.links if link.startswith("#")]
    assert all(f'id="{target}"' in text for target in targets)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {row["trial"] for row in csv.DictReader(file)} == {kept.trial for kept in store.records()}
    for name in ("tradeoff.png", "reconstructions.png"):
        assert imread(tmp_path / name).std() > 0.01


def test_the_summary_says_in_words_what_came_out(tmp_path):
    filled(tmp_path)
    words = " ".join("".join(Page(build(tmp_path).read_text()).text).split())
    assert "12 trials done: 4 configurations, seeds 0, 1, 2. 1 failed" in words
    assert "Unprotected, the model reaches accuracy 0.950 (0.940 to 0.960); the worst attack, decoder" in words
    assert (
        "safe: noise 2 (accuracy 0.850, leakage 0.400); noise 0.5 (accuracy 0.940, leakage 0.700); "
        "unprotected (accuracy 0.950, leakage 0.900, which is no protection)."
    ) in words
    assert "For at most 0.02 of accuracy, least leaks under noise 0.5" in words
    assert "The worst leak in one trial: 0.900, by decoder, unprotected." in words


def undertrained(kept):
    return kept.model_copy(
        update={"leakage": [leak.model_copy(update={"details": {"undertrained": True}}) for leak in kept.leakage]}
    )


def test_leakage_of_untrained_attacks_is_marked_where_it_is_told(tmp_path):
    store = Store(tmp_path)
    for kept in (record(), undertrained(record("noise", "1", leakage=0.0)), record("noise", "2", leakage=0.0)):
        store.save(kept)
    points = summarise(store.records())
    assert [point.undertrained() for point in points] == [False, True, False]
    (results,) = results_tables(points)
    assert [row[3] for row in results.rows] == ["0.500", "0 (UNDERTRAINED)", "0"]
    (table,) = closing_tables(store.records())
    assert [str(cell) for cell in table.columns[3].cells] == ["0.500", "0 †", "0"]
    assert "† UNDERTRAINED attacks: worse than who saw nothing" in str(table.caption)
    words = " ".join("".join(Page(build(tmp_path).read_text()).text).split())
    assert "noise 1 (accuracy 0.900, leakage 0, by attacks UNDERTRAINED: not shown to protect)" in words
    assert "noise 2 (accuracy 0.900, leakage 0)" in words


def test_a_detector_is_no_protection(tmp_path):
    store = Store(tmp_path)
    for kept in (
        record("splitout", "honest", utility=0.9).model_copy(update={"leakage": [], "experiment": "detection"}),
        record("splitout", "fsha", utility=0.2, leakage=0.0, experiment="detection"),
    ):
        store.save(kept)
    assert marks(summarise(store.records()), "accuracy") == {}
    assert interactive_tradeoff(store.records()) is None
    (results,) = results_tables(summarise(store.records()))
    assert results.strong == frozenset()
    (table,) = closing_tables(store.records())
    assert not any("*" in str(cell) for cell in table.columns[0].cells)
    words = " ".join("".join(Page(build(tmp_path).read_text()).text).split())
    assert "A detector keeps nothing secret" in words
    assert "Pareto" not in words
    store.save(record())
    panels = marks(summarise(store.records()), "accuracy")
    assert [mark.point.name for members in panels.values() for mark in members] == ["unprotected"]
    build(tmp_path)
    assert (tmp_path / "tradeoff.png").exists()


def test_settings_are_told_apart(tmp_path):
    for cut in ("relu1", "relu2"):
        filled(tmp_path, cut=cut)
    for cut, protocol in (("relu1", "u_shaped"), ("relu2", "u_shaped"), ("relu3", "u_shaped")):
        Store(tmp_path).save(record(cut=cut, protocol=protocol))
    words = "".join(Page(build(tmp_path).read_text()).text)
    for title in ("digits · vanilla · cut relu1", "digits · vanilla · cut relu2", "digits · u_shaped · cut relu3"):
        assert title in words


def test_records_without_leakage_or_images_make_a_report_without_them(tmp_path):
    filled(tmp_path)
    build(tmp_path)
    shutil.rmtree(tmp_path / "trials")
    plain = {"leakage": [], "nbytes": {}, "seconds": {}, "visible": {}, "utility": {"largest_difference": 0.0}}
    Store(tmp_path).save(record().model_copy(update=plain))
    text = build(tmp_path).read_text()
    assert "Nothing was attacked" in text
    assert "largest difference" in text
    assert "<script" not in text
    assert not (tmp_path / "tradeoff.png").exists()
    assert not (tmp_path / "reconstructions.png").exists()


def test_a_folder_of_failures_alone_still_has_its_report(tmp_path):
    Store(tmp_path).save(record(status="failed", error="ValueError: no"), traceback="ValueError: no")
    assert "ValueError: no" in build(tmp_path).read_text()


def test_no_records_is_an_error_and_a_corrupt_one_is_told_of(tmp_path):
    with pytest.raises(ValueError, match=r"expected records in .*got none; write some first"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = filled(tmp_path)
    broken = store.records()[0].trial
    (tmp_path / "trials" / broken / "record.json").write_text("{")
    words = "".join(Page(build(tmp_path).read_text()).text)
    assert re.search(rf"Left out: expected a record in .*{broken}.*delete the folder", words)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to open the page in")
def test_a_real_browser_draws_the_page_without_complaint(tmp_path):
    filled(tmp_path, cut="relu1", notes=[HOSTILE])
    filled(tmp_path, cut=HOSTILE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, build(tmp_path).as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr  # no script error, nothing that the page's own policy had to refuse
    dom = done.stdout
    assert 'class="main-svg"' in dom
    traces = re.findall(r'<g class="trace scatter [^"]*"', dom)
    assert len(traces) == 2 * (1 + 3)  # in each of two panels the front, unprotected, noise and nopeek
    assert len(re.findall(r'<path class="point"', dom)) == 2 * len(GRID)
    assert dom.count("attacker who saw nothing</text>") == 1
    assert len(re.findall(r'class="[xy]title"', dom)) >= 2
