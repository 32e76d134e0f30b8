"""The README's examples run as they stand, and what the docs name is there."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.catalogue import BENCHES, EXPERIMENTS
from experiments.cli import main
from splitlearn.data import DATASETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    done = subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "model.pt" in EXAMPLES[number]:
        assert len(EXAMPLES[number].splitlines()) < 40 + 5  # imports apart, an experiment is under 40 lines
        assert len(re.findall(r"advantage 0\.\d\d MSE 0\.\d{4}", done.stdout)) == 3
        assert (tmp_path / "model.pt").is_file()
    elif "score_reconstruction" in EXAMPLES[number]:
        lines = [line for line in EXAMPLES[number].splitlines() if line and not line.startswith(("from", "import"))]
        assert len(lines) <= 10  # a user attacks a model of their own in ten
        assert float(done.stdout.split()[0]) > 0.9


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_the_page_on_deployment_works_as_operators_would_type_it_and_counts_what_the_kernel_counts(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    certs, server, *clients = (block.strip() for block in blocks)
    assert len(clients) == 2
    port = free_port()
    bin_ = Path(sys.executable).parent
    *others, last = clients
    script = "\n".join(
        [
            "set -eu", f"export PATH={bin_}:$PATH",
            "ip link set lo up", "carried() { awk '/lo:/ {print $2}' /proc/self/net/dev; }", "before=$(carried)",
            certs, f"{server} & one=$!", *(f"{client} &" for client in others), last, "wait $one",
            "echo carried $(($(carried) - before))",
        ]
    ).replace("localhost:50051", f"localhost:{port}").replace("--rounds 15", "--rounds 3")  # fmt: skip
    alone = subprocess.run(["unshare", "-n", "true"], capture_output=True) if shutil.which("unshare") else None
    if alone is None or alone.returncode:
        pytest.skip("needs a network namespace of its own, for the kernel to count in")
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "runs" / "server"
    assert "splitfed_v2" in (out / "report.html").read_text()
    assert (out / "model.safetensors").is_file()
    (record,) = out.glob("trials/*/record.json")
    nbytes = json.loads(record.read_text())["nbytes"]
    counted = sum(sum(kinds.values()) for kinds in nbytes.values())
    found = re.search(r"carried (\d+)", done.stdout)
    assert found is not None
    assert counted < int(found[1]) < 1.05 * counted  # TLS, HTTP/2, TCP and IP come on top


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


def test_commands_in_the_readme_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"`(splitlearn [^`]*)`", README)
    assert len(commands) >= 7
    for command in commands:
        _, verb, *words = command.split()
        monkeypatch.setattr(sys, "argv", ["splitlearn", verb, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, command
        known = {"run": EXPERIMENTS, "bench": BENCHES, "data": DATASETS}.get(verb)
        assert known is None or words[0] in known or words[0] == "NAME", command
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_in_the_annotated_tree_exist() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    for name in re.findall(r"^\s*([a-z_]+(?:\.py|/))", tree, re.MULTILINE):
        places = [ROOT / name, ROOT / "splitlearn" / name, ROOT / "privacy" / name]
        assert any(place.exists() for place in places), name
    for name in re.findall(r"([a-z_]+\.py)", tree):
        assert (ROOT / "splitlearn" / name).exists(), name
