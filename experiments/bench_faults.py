"""Bench of faults: a server and its clients are killed again and again, and the model must not show it."""

import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from splitlearn.transport import issue, make_authority

__all__ = ["Killed", "bench_faults", "killed_training"]

KILLS, ROUNDS, CLIENTS = 50, 60, ("a", "b")
SETTLED = 60.0  # seconds within which what was restarted must get on
GENTLE = 0.2  # of the kills are by SIGTERM, which a process may see to
PAUSE = 1.0  # a kill comes within so many seconds of work after the last restart


class Killed(dict[str, Any]):
    """Figures of one run: ``kills``, by whom, ``equal`` to the bit, ``seconds``."""


def bench_faults() -> dict[str, Any]:
    """Kill server or clients 50 times in all, at random moments, most by SIGKILL; compare with undisturbed runs."""
    found: dict[str, Any] = {}
    for protocol, kills in (("splitfed_v1", KILLS // 2), ("splitfed_v2", KILLS - KILLS // 2)):
        one = killed_training(protocol, kills=kills, rounds=ROUNDS, seed=0)
        found |= {f"{protocol}_{name}": value for name, value in one.items()}
    return found


def killed_training(protocol: str, *, kills: int, rounds: int, seed: int) -> Killed:
    """Train over sockets twice, once with so many kills; return whether the models are equal to the bit, and more.

    Raises ``RuntimeError`` where the training ended before all kills were done, or nobody got on after one.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_authority(root / "certs")
        issue(root / "certs", "server", hosts=["localhost"])
        for name in CLIENTS:
            issue(root / "certs", name)
        port = _free_port()
        calm = _Training(root, "calm", protocol, rounds, port)
        calm.finish()
        rough = _Training(root, "rough", protocol, rounds, port)
        begun, hit = time.monotonic(), dict.fromkeys(("server", *CLIENTS), 0)
        try:
            for _ in range(kills):
                rough.get_on()
                time.sleep(draw.uniform(0, PAUSE))
                victim = draw.choice(sorted(hit))
                rough.kill(victim, gently=draw.random() < GENTLE)
                hit[victim] += 1
            rough.finish()
        finally:
            rough.end()
        before, after = (load_file(one.folder / "server" / "model.safetensors") for one in (calm, rough))
        equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        return Killed(
            kills=kills, **{f"kills_{name}": count for name, count in hit.items()}, equal=equal,
            seconds=round(time.monotonic() - begun, 1),
        )  # fmt: skip


class _Training:
    """A server and two clients as processes of the command line."""

    def __init__(self, root: Path, name: str, protocol: str, rounds: int, port: int):
        self.folder, self._root, self._mark = root / name, root, 0.0
        self.folder.mkdir()
        self._words = {
            "server": [
                "server", "--clients", ",".join(CLIENTS), "--certs", str(root / "certs"), "--protocol", protocol,
                "--rounds", str(rounds), "--address", f"localhost:{port}", "--out", str(self.folder / "server"),
            ],
            **{
                client: [
                    "client", client, "--certs", str(root / "certs"), "--server", f"localhost:{port}",
                    "--out", str(self.folder / client),
                ]
                for client in CLIENTS
            },
        }  # fmt: skip
        self._processes = {name: self._start(name) for name in self._words}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.cli", *self._words[name]], stdout=log, stderr=log,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip

    def get_on(self) -> None:
        """Wait until a client has made a step since the last kill."""
        end = time.monotonic() + SETTLED
        while self._last_step() <= self._mark:
            if any(process.poll() == 0 for process in self._processes.values()):
                raise RuntimeError("expected the training to outlast the kills, but it is over; raise rounds")
            if time.monotonic() > end or any(process.poll() for process in self._processes.values()):
                raise RuntimeError(f"nobody got on within {SETTLED:g} s, or somebody failed:\n{self._logs()}")
            time.sleep(0.02)

    def kill(self, name: str, *, gently: bool) -> None:
        """End one, by SIGTERM or by SIGKILL, and start it again at once."""
        if gently:
            self._processes[name].terminate()
        else:
            self._processes[name].kill()
        self._processes[name].wait()
        self._mark = max(self._last_step(), time.time())
        self._processes[name] = self._start(name)

    def finish(self) -> None:
        """Wait until all have ended well."""
        for name, process in self._processes.items():
            if process.wait(600):
                raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{self._logs()}")

    def end(self) -> None:
        """Leave no process behind."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _last_step(self) -> float:
        found = [0.0]
        for client in CLIENTS:
            with suppress(OSError):  # it is being replaced
                found.append((self.folder / client / "state" / f"{client}.safetensors").stat().st_mtime)
        return max(found)

    def _logs(self) -> str:
        return "\n".join(f"{name}: {(self.folder / f'{name}.log').read_text()[-2000:]}" for name in self._words)


def _free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])
