"""Secure aggregation: members' weights are added up on shares, and only the sum is ever put together.

Additive shares of two servers that do not collude (as in Prio, Corrigan-Gibbs and Boneh 2017, arXiv:1703.06255, without
its proofs of well-formed inputs): sums need no dealer and no round between the servers.
"""

import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from privacy.mpc.servers import Servers
from privacy.mpc.sharing import decoded, encoded, joined, shared
from splitlearn.federation import mean
from splitlearn.members import TICKET, FedMember, Weights

__all__ = ["SecureMean", "SecureMember"]

BITS = 24  # of the fraction: nothing is multiplied here, so that there is room for more
LIMIT = float(1 << 30)  # of one member's weights times its samples; the ring has room for 256 such
TICKET_NBYTES = 16


class SecureMember:
    """A member of a federation whose new weights leave it in shares; the fed server gets a ticket for them.

    ``SecureMember(member, servers)`` takes the member's place in ``splitfed_v2_round`` and ``fedavg_round`` with
    ``aggregate=SecureMean(servers)``. Integer entries, such as batch norm's counters, cross in the clear.

    | | the fed server | each of the two servers | other members |
    | --- | --- | --- | --- |
    | of a member | how many samples, integer entries | shapes, and uniformly random shares | nothing |
    | of all | the mean | nothing | the mean, as the next round's start |

    - Protects: one member's weights from the fed server and from either server. Not: what the mean itself tells of
      one member (two members know each other's by it), for which see ``PrivateMean``; the number of samples; against
      a member that contributes nonsense, or a server that adds up something else.
    - A fed server that follows the protocol learns the mean alone. One that contributes weights of its own, which it
      knows, takes them off the sum again and has another's: nothing here tells who a contribution comes from.
    - Each contribution is added up once, with at least one other, so that no two sums differ by one member.
    """

    def __init__(self, member: FedMember, servers: Servers):
        self.name, self.member, self._servers = member.name, member, servers

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Have the member train, share its weights times its samples, and return a ticket for them."""
        new, count = self.member.round(weights)
        ticket = secrets.token_bytes(TICKET_NBYTES)
        own = {
            name: encoded(count * w.double(), f"{name!r} times the samples", bits=BITS, limit=LIMIT)
            for name, w in new.items()
            if w.is_floating_point()
        }
        self._servers.desk("give", {"ticket": ticket.hex()}, shared(own))
        whole = {name: w for name, w in new.items() if name not in own}
        return {**whole, TICKET: torch.frombuffer(bytearray(ticket), dtype=torch.uint8)}, count


class SecureMean:
    """The aggregator that asks two servers for the sum of what secure members have shared; see ``SecureMember``.

    It is as exact as ``mean`` to 2^-24 a sample. With ``or_mean`` it is ``mean`` where no weights come with a ticket,
    as SplitFed V1 needs, whose main server has copies of its own stage averaged too; else that is an error.
    """

    def __init__(self, servers: Servers, *, or_mean: bool = False):
        self._servers, self._or_mean = servers, or_mean

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return Σ (n/N)·w, entry by entry; integer entries are those of the first member with samples."""
        ticketed = [TICKET in own for own in weights]
        if self._or_mean and not any(ticketed):
            return mean(weights, counts, start)
        if not all(ticketed) or len(weights) != len(counts) or sum(counts) == 0:
            raise ValueError(
                f"expected contributions of SecureMembers, some with samples; got {sum(ticketed)} tickets from "
                f"{len(weights)} members with {sum(counts)} samples; wrap every member: SecureMember(member, servers)"
            )
        tickets = [own[TICKET].numpy().tobytes().hex() for own in weights]
        sums = joined(self._servers.desk("sum", {"tickets": tickets}))
        first = next(own for own, count in zip(weights, counts, strict=True) if count)
        whole = {name: own.clone() for name, own in first.items() if name != TICKET}
        means = {
            name: (decoded(ring, f"the sum of {name!r}", bits=BITS, limit=2 * LIMIT * len(counts)) / sum(counts))
            for name, ring in sums.items()
        }
        return {**whole, **{name: one.to(start[name].device, start[name].dtype) for name, one in means.items()}}
