"""Certificates for mutual TLS: a small authority of one's own, and what it signs for servers and clients.

For trials and tests, and for a handful of parties that trust whoever holds ``authority.key``. An organisation that has
an authority of its own uses that one: servers and clients take any PEM files.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

__all__ = ["Credentials", "issue", "make_authority"]

AUTHORITY = "authority"
DAYS = 365


@dataclass(frozen=True)
class Credentials:
    """What a party shows and whom it believes, PEM: the authority's certificate, its own, and its own private key."""

    authority: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        """Keys are for nobody's log."""
        return "Credentials(…)"

    @classmethod
    def read(cls, folder: Path, name: str) -> "Credentials":
        """Return those of ``name`` in ``folder``: authority.crt, name.crt, name.key; ``LookupError`` without them."""
        paths = [folder / f"{AUTHORITY}.crt", folder / f"{name}.crt", folder / f"{name}.key"]
        for path in paths:
            if not path.is_file():
                raise LookupError(f"expected a file {path}, found none; make one: splitlearn certs {folder} {name}")
        return cls(*(path.read_bytes() for path in paths))


def make_authority(folder: Path) -> None:
    """Make an authority in ``folder``: authority.crt for everybody, authority.key for whoever signs. Kept if there."""
    x509 = _x509()
    if (folder / f"{AUTHORITY}.key").is_file() and (folder / f"{AUTHORITY}.crt").is_file():
        return
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("splitlearn authority")
    builder = _builder(name, name, key.public_key(), days=10 * DAYS).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    _write(folder, AUTHORITY, key, builder, key)


def issue(folder: Path, name: str, *, hosts: Sequence[str] = ()) -> None:
    """Sign a certificate for ``name``, in ``folder`` beside the authority: name.crt and name.key, for that party alone.

    A server's covers ``hosts``, names or addresses by which clients reach it; a client's needs none. The name is who
    the party is: a server lets a client into the session of that name, and no other. One that is there is replaced.
    """
    x509 = _x509()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not name or name == AUTHORITY or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise ValueError(f"expected a name of letters, digits, - _ and ., other than {AUTHORITY}, got {name!r}")
    authority = Credentials.read(folder, AUTHORITY)
    signer: Any = load_pem_private_key(authority.key, None)
    root = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), root.subject, key.public_key(), days=DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    role = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([role]), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    _write(folder, name, key, builder, signer)


def _x509() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise ImportError(
            "expected the package cryptography to make certificates; pip install 'splitlearn[net]'"
        ) from error
    return x509


def _name(text: str) -> Any:
    from cryptography.x509.oid import NameOID

    x509 = _x509()
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> Any:
    x509 = _x509()
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _builder(subject: Any, issuer: Any, public: Any, *, days: int) -> Any:
    x509, now = _x509(), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))


def _usage(*, signs_certificates: bool) -> Any:
    x509 = _x509()
    nothing = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        **nothing,
    )  # fmt: skip


def _write(folder: Path, name: str, key: Any, builder: Any, signer: Any) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    folder.mkdir(parents=True, exist_ok=True)
    secret = folder / f"{name}.key"
    secret.unlink(missing_ok=True)
    with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # nobody else's
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    certificate = builder.sign(signer, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
