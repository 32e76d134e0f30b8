"""Partition rows, or columns, among clients: every one of them goes to exactly one client.

Each function returns one int64 tensor of row (or column) numbers a client, sorted, and is fixed by its seed.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = ["attributes", "by_group", "dirichlet", "iid", "shards", "vertical"]


def iid(n: int, clients: int, seed: int) -> list[Tensor]:
    """Return ``n`` rows dealt at random, the clients' numbers of rows within one of each other."""
    _check_clients(n, clients, "rows")
    return [_rows(part) for part in np.array_split(np.random.default_rng(seed).permutation(n), clients)]


def dirichlet(y: Tensor, clients: int, alpha: float, seed: int, min_rows: int = 1, retries: int = 100) -> list[Tensor]:
    """Return rows with skewed labels: each class is dealt in proportions drawn from a Dirichlet (alpha, …, alpha).

    Yurochkin et al. 2019 (arXiv:1905.12022), as in Li et al. 2021 (arXiv:2102.02079). A small ``alpha`` gives each
    client few classes, a large one comes near to IID. A draw that leaves a client below ``min_rows`` is drawn
    again, at most ``retries`` times; then it is a ``ValueError``.
    """
    _check_clients(len(y), clients, "rows")
    if alpha <= 0:
        raise ValueError(f"expected alpha above 0, got {alpha}; for example 0.5")
    if min_rows * clients > len(y):
        raise ValueError(f"expected at most {len(y) // clients} rows a client, got min_rows={min_rows}; ask for fewer")
    rng = np.random.default_rng(seed)
    labels = y.cpu().numpy()
    for _ in range(1 + retries):
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            edges = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
            owner[rows] = np.searchsorted(edges, np.arange(len(rows)), side="right")
        if np.bincount(owner, minlength=clients).min() >= min_rows:
            return [_rows(np.flatnonzero(owner == client)) for client in range(clients)]
    raise ValueError(
        f"expected every client to get at least {min_rows} of {len(y)} rows, {1 + retries} draws with alpha={alpha} "
        f"for {clients} clients left one below; raise alpha, or lower clients or min_rows"
    )


def shards(y: Tensor, clients: int, shards_per_client: int, seed: int) -> list[Tensor]:
    """Return rows with few labels a client: sorted by label, cut into equal shards, dealt at random.

    McMahan et al. 2017 (arXiv:1602.05629), section 3, there with 200 shards of 300 rows, two a client.
    """
    _check_clients(len(y), clients, "rows")
    total = clients * shards_per_client
    if not 1 <= shards_per_client <= len(y) // clients:
        raise ValueError(
            f"expected 1 to {len(y) // clients} shards for each of {clients} clients of {len(y)} rows, "
            f"got {shards_per_client}"
        )
    pieces = np.array_split(np.argsort(y.cpu().numpy(), kind="stable"), total)
    dealt = np.random.default_rng(seed).permutation(total).reshape(clients, shards_per_client)
    return [_rows(np.concatenate([pieces[piece] for piece in hand])) for hand in dealt]


def by_group(groups: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Return rows such that each group (patient, person) is with one client.

    Groups are dealt in seeded order, each to the client with the fewest rows so far.
    """
    values, counts = np.unique(groups.cpu().numpy(), return_counts=True)
    _check_clients(len(values), clients, "groups")
    owner, load = np.empty(len(values), dtype=np.int64), np.zeros(clients, dtype=np.int64)
    for place in np.random.default_rng(seed).permutation(len(values)):
        owner[place] = load.argmin()
        load[owner[place]] += counts[place]
    owners = owner[np.searchsorted(values, groups.cpu().numpy())]
    return [_rows(np.flatnonzero(owners == client)) for client in range(clients)]


def vertical(num_features: int, clients: int) -> list[Tensor]:
    """Return the columns of a table, ``x[:, columns]``, or an image, ``x[..., columns]``, neighbours together."""
    _check_clients(num_features, clients, "columns")
    return [_rows(part) for part in np.array_split(np.arange(num_features), clients)]


def attributes(names: Sequence[str], clients: int) -> list[Tensor]:
    """Return the columns of each client, neighbours together, and none with part of an attribute.

    Cuts into equal parts move to the nearest start of an attribute: its one-hot columns are called ATTRIBUTE=VALUE.
    Raises ``ValueError`` where one would be left without columns.
    """
    found = [name.partition("=")[0] for name in names]
    starts = [at for at, name in enumerate(found) if at == 0 or name != found[at - 1]]
    even = [int(part[0]) for part in vertical(len(names), clients)]
    edges = [*(min(starts, key=lambda start: abs(start - at)) for at in even), len(names)]
    sizes = [after - before for before, after in pairwise(edges)]
    if min(sizes) < 1:
        raise ValueError(
            f"expected clients that hold whole attributes each, got {clients}, which {len(starts)} attributes of "
            f"{len(names)} columns do not fill evenly; use --clients 2"
        )
    return list(torch.arange(len(names)).split(sizes))


def _check_clients(there: int, clients: int, what: str) -> None:
    if not 1 <= clients <= there:
        raise ValueError(f"expected 1 to {there} clients for {there} {what}, got {clients}; each needs at least one")


def _rows(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(rows).astype(np.int64))
