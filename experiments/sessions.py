"""A main server's sessions: each behind a gate, with a journal of what was asked since the last checkpoint."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.deployment import Deployment
from experiments.greeting import Nobody
from splitlearn.checkpoint import load_checkpoint, save_checkpoint
from splitlearn.party import Learner
from splitlearn.service import Service
from splitlearn.transport import Gate, Journal, Journaled

__all__ = ["Sessions", "found_state"]

MEMORY = 4  # exchanges of a client that are answered again; it keeps a checkpoint after every one


def found_state(path: Path, deployment: Deployment | None) -> dict[str, Any] | None:
    """Return the checkpoint at ``path``, if there is one; ``ValueError`` where it is of another training."""
    if not path.is_file():
        return None
    state: dict[str, Any] = load_checkpoint(path)
    if deployment is not None and state["deployment"] != deployment.told():
        raise ValueError(
            f"expected a folder of this training, got {path.parent.parent}, which holds another one; give another --out"
        )
    return state


class Sessions:
    """The sessions of ``learners``, in which clients train; ``gates`` are before them, by client.

    ``path`` is the checkpoint. Made anew over one, top and learners are as it says, ``state`` is what else it says,
    and journals hold what was asked since, for ``replay``. ``run`` names this run of the training.
    """

    def __init__(self, deployment: Deployment, top: Learner | None, learners: Mapping[str, Learner], path: Path):
        self.deployment, self.path, self.run = deployment, path, secrets.token_hex(8)
        copies = deployment.protocol == "splitfed_v1"  # else sessions share the top, and have no state of their own
        self._parts = [part for part in (top, *(learners.values() if copies else ())) if part is not None]
        groups = [{name: learner} for name, learner in learners.items()] if copies else [dict(learners)]
        groups = [group for group in groups if group]
        self._services = [Service(group, memory=MEMORY) for group in groups]
        self._generation, self.over = 0, False  # over: the checkpoint says that all rounds are done
        self._journals: list[Journal] = []
        self.state = found_state(path, deployment)
        if self.state is not None:
            self._take(self.state)
        self._journaled = [Journaled(service, self.journal(str(n))) for n, service in enumerate(self._services)]
        self._of = {name: one for one, group in zip(self._journaled, groups, strict=True) for name in group}
        nobody = Nobody("clients of this protocol train whole models")
        self.gates = {name: Gate(name, self._of.get(name, nobody)) for name in deployment.clients}
        self._up_to_date: set[int] = set()

    def journal(self, name: str) -> Journal:
        """Return a journal of what is asked until the next checkpoint."""
        journal = Journal(self.path.parent / f"journal-{self._generation}-{name}")
        self._journals.append(journal)
        return journal

    def replay(self, name: str) -> int:
        """Ask this client's session again what its journal holds, if that was not done; return how much that was."""
        one = self._of.get(name)
        if one is None or id(one) in self._up_to_date:
            return 0
        self._up_to_date.add(id(one))
        return one.replay()

    def busy(self) -> list[str]:
        """Return the clients with a request that is being answered: until it is, no checkpoint can be kept."""
        return [name for name, gate in self.gates.items() if gate.busy]

    def keep(self, more: Mapping[str, Any], *, over: bool = False) -> None:
        """Write a checkpoint with ``more`` in it, and begin new journals: what the old ones hold is in it."""
        self._generation += 1
        if over:
            for service in self._services:
                service.load_state_dict({})  # nobody asks again: no sample's activation stays on the disk
        state = {
            "deployment": self.deployment.told(), "run": self.run, "generation": self._generation,
            "parts": [part.state_dict() for part in self._parts],
            "services": [service.state_dict() for service in self._services], **more,
        }  # fmt: skip
        save_checkpoint(self.path, state)
        self.over = over
        old, self._journals = self._journals, []
        for number, journaled in enumerate(self._journaled):
            journaled.renew(self.journal(str(number)))
        for journal in old:
            journal.close()
            journal.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the journals; they go where all is over."""
        for journal in self._journals:
            journal.close()
            if self.over:
                journal.path.unlink(missing_ok=True)

    def _take(self, state: Mapping[str, Any]) -> None:
        self._generation, self.run = state["generation"], state["run"]
        self.over = state["served"]["rounds"] >= self.deployment.rounds
        for path in self.path.parent.iterdir():
            if path.name not in (self.path.name, "lock") and not path.name.startswith(f"journal-{self._generation}-"):
                path.unlink()  # a kill came before it was
        for part, own in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(own)
        for service, own in zip(self._services, state["services"], strict=True):
            service.load_state_dict(own)
