"""Parties on other machines: the same frames over gRPC, with mutual TLS."""

from splitlearn.transport.certs import Credentials, issue, make_authority
from splitlearn.transport.client import Connection
from splitlearn.transport.gate import Gate, GatedMember
from splitlearn.transport.host import Host, Line
from splitlearn.transport.journal import Journal, Journaled, held, private_folder
from splitlearn.transport.lasting import LastingMember

__all__ = [
    "Connection", "Credentials", "Gate", "GatedMember", "Host", "Journal", "Journaled", "LastingMember", "Line", "held",
    "issue", "make_authority", "private_folder",
]  # fmt: skip
