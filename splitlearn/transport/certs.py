"""Certificates for mutual TLS: what a party shows and believes, checked, and a small authority of one's own.

The authority is for trials and tests, and for a handful of parties that trust whoever holds ``authority.key``. An
organisation that has an authority of its own uses that one: servers and clients take any PEM files.
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
REFUSED = "refused"  # a file of serial numbers, one a line, in hex as openssl x509 -serial prints them
THEIRS = "the authority's certificate (.crt)"
OWN = "this party's certificate (.crt)"
DAYS = 365


@dataclass(frozen=True)
class Credentials:
    """What a party shows and whom it believes, PEM: the authority's certificate, its own, and its own private key.

    ``refused`` are the serial numbers of certificates that it does not believe any longer, whose keys were lost. Raises
    ``ValueError`` for what no connection can be made with: what is not PEM, a key of another certificate, a certificate
    that is not valid today.
    """

    authority: bytes
    certificate: bytes
    key: bytes
    refused: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check them here, as gRPC says no more than that a connection failed, and tries again."""
        self.check_dates()
        if _public(self.key) != _plain(_certificates(self.certificate, OWN)[0].public_key()):
            raise ValueError(
                f"expected the private key (.key) of {OWN}, got that of another; keep the two files that were made "
                "together, or make both anew"
            )

    def check_dates(self) -> None:
        """Raise ``ValueError`` where a certificate is not valid now, or not any longer."""
        _check_dates(_certificates(self.authority, THEIRS), THEIRS)
        _check_dates(_certificates(self.certificate, OWN)[:1], OWN)

    def refuses(self, certificate: bytes) -> bool:
        """Return whether this certificate of another party, PEM, is a refused one."""
        return bool(self.refused) and _certificates(certificate, "a certificate")[0].serial_number in self.refused

    def __repr__(self) -> str:
        """Keys are for nobody's log."""
        return "Credentials(…)"

    @classmethod
    def read(cls, folder: Path, name: str) -> "Credentials":
        """Return those of ``name`` in ``folder``: authority.crt, name.crt, name.key, and the serial numbers in refused.

        Raises ``LookupError`` without them, ``ValueError`` where they cannot be read or are of no use.
        """
        found: list[bytes] = []
        for path in (folder / f"{AUTHORITY}.crt", folder / f"{name}.crt", folder / f"{name}.key"):
            try:
                found.append(path.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                raise LookupError(
                    f"expected a file {path}, found none; make one: splitlearn certs {folder} {name}"
                ) from None
            except OSError as error:
                raise ValueError(
                    f"expected a file {path} that this user can read, got {error.strerror}; give the file to this user"
                ) from error
        try:
            authority, certificate, key = found
            return cls(authority, certificate, key, _refused(folder))
        except ValueError as error:
            raise ValueError(f"{name} in {folder}: {error}") from error


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


def issue(folder: Path, name: str, *, hosts: Sequence[str] = (), asks: bool = False) -> None:
    """Sign a certificate for ``name``, in ``folder`` beside the authority: name.crt and name.key, for that party alone.

    A server's covers ``hosts``, names or addresses by which clients reach it; a client's needs none. With ``asks`` a
    server may connect to others, too, as a fed server does to the main server. The name is who
    the party is: a server lets a client into the session of that name, and no other. One that is there is replaced, and
    its serial number goes to the file ``refused``: a server that reads its credentials here afterwards lets it in no
    longer.
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
    before = folder / f"{name}.crt"
    if before.is_file():
        with (folder / REFUSED).open("a") as file:
            file.write(f"{_certificates(before.read_bytes(), OWN)[0].serial_number:X}\n")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), root.subject, key.public_key(), days=DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    roles = [ExtendedKeyUsageOID.SERVER_AUTH] if hosts else []
    roles += [ExtendedKeyUsageOID.CLIENT_AUTH] if asks or not hosts else []
    builder = builder.add_extension(x509.ExtendedKeyUsage(roles), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    _write(folder, name, key, builder, signer)


def _certificates(pem: bytes, what: str) -> list[Any]:
    """Return the certificates in the text, of a party its own first; at least one."""
    x509 = _x509()
    try:
        return list(x509.load_pem_x509_certificates(pem))
    except ValueError as error:
        raise ValueError(
            f"expected {what} in PEM, which begins with -----BEGIN CERTIFICATE-----, got {len(pem)} bytes of something "
            "else; copy the file again, or make one: splitlearn certs"
        ) from error


def _refused(folder: Path) -> frozenset[int]:
    """Return the serial numbers in the folder's file of refused certificates; none where there is no file."""
    path = folder / REFUSED
    try:
        return frozenset(int(line.removeprefix("serial="), 16) for line in path.read_text().split())
    except FileNotFoundError:
        return frozenset()
    except (ValueError, OSError) as error:
        raise ValueError(f"expected serial numbers in hex, one a line, in {path} ({error}); mend that file") from error


def _check_dates(certificates: Sequence[Any], what: str) -> None:
    """Refuse certificates none of which is valid now."""
    now, first = datetime.now(UTC), certificates[0]
    if not any(one.not_valid_before_utc <= now <= one.not_valid_after_utc for one in certificates):
        raise ValueError(
            f"expected {what} to be valid now, {now:%Y-%m-%d %H:%M} UTC, got one from "
            f"{first.not_valid_before_utc:%Y-%m-%d %H:%M} to {first.not_valid_after_utc:%Y-%m-%d %H:%M}; make a new "
            "one, or set this machine's clock"
        )


def _public(pem: bytes) -> bytes:
    """Return the public half of a private key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return _plain(load_pem_private_key(pem, None).public_key())
    except TypeError as error:
        raise ValueError(
            "expected a private key (.key) without a password, got one with; write it without: openssl pkey"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"expected a private key (.key) in PEM, got {len(pem)} bytes of something else; copy the file again, or "
            "make one: splitlearn certs"
        ) from error


def _plain(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _x509() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise ImportError(
            "expected the package cryptography for certificates; pip install 'splitlearn[net]'"
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
