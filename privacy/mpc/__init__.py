"""Secure multi-party computation: computing on values that no single server sees (CrypTen)."""

from privacy.mpc.aggregation import SecureMean, SecureMember
from privacy.mpc.compat import load_crypten
from privacy.mpc.costs import LAN, WAN, Costs, Network
from privacy.mpc.layers import described as described_layers
from privacy.mpc.party import MOST_LR, SharedStage, SharedTop, StageClient
from privacy.mpc.protocols import (
    LEARNS,
    JoinedOnShares,
    mpc_2pc,
    mpc_inference,
    mpc_u_shaped,
    mpc_vertical,
)
from privacy.mpc.servers import SECURITY, Servers

__all__ = [
    "LAN",
    "LEARNS",
    "MOST_LR",
    "SECURITY",
    "WAN",
    "Costs",
    "JoinedOnShares",
    "Network",
    "SecureMean",
    "SecureMember",
    "Servers",
    "SharedStage",
    "SharedTop",
    "StageClient",
    "described_layers",
    "load_crypten",
    "mpc_2pc",
    "mpc_inference",
    "mpc_u_shaped",
    "mpc_vertical",
]
