"""Other ways in which devices and a cloud learn together: federated, distilled, peer to peer, one task after the other.

Members, parties, wires and aggregators are those of split training, so that protections, attacks and records are too.
"""

from splitlearn.paradigms.absent import Absent
from splitlearn.paradigms.buffered import Buffered, fedbuff, polynomial
from splitlearn.paradigms.continual import Elastic, Forgetting, Replay, Replayed, fisher, forgetting
from splitlearn.paradigms.distillation import (
    UNLABELLED,
    Consensus,
    Distilled,
    DistillingMember,
    distil,
    distillation_loss,
    distillation_round,
    mutual,
    taught,
)
from splitlearn.paradigms.gossip import (
    GossipRound,
    circulant,
    complete,
    consensus_distance,
    gossip_round,
    metropolis,
    ring,
    spectral_gap,
)
from splitlearn.paradigms.local_loss import LocalLossMember, local_loss
from splitlearn.paradigms.personal import entries_above, fine_tuned
from splitlearn.paradigms.proximal import ProximalMember
from splitlearn.paradigms.scaffold import ScaffoldMember, no_control, scaffold_round
from splitlearn.paradigms.unlike_cuts import unlike_cuts_round

__all__ = [
    "UNLABELLED", "Absent", "Buffered", "Consensus", "Distilled", "DistillingMember", "Elastic", "Forgetting",
    "GossipRound", "LocalLossMember", "ProximalMember", "Replay", "Replayed", "ScaffoldMember", "circulant", "complete",
    "consensus_distance", "distil",
    "distillation_loss", "distillation_round", "entries_above", "fedbuff", "fine_tuned", "fisher", "forgetting",
    "gossip_round", "local_loss", "metropolis", "mutual", "no_control", "polynomial", "ring",
    "scaffold_round", "spectral_gap", "taught", "unlike_cuts_round",
]  # fmt: skip
