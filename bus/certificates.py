"""Certificates for TLS: an authority of our own, and a server's certificate signed by it.

ca.pem       for clients: Endpoint.ca
ca.key       signs; needed here only
server.pem, server.key    for the server
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bus.errors import BusError
from bus.server_config import Certificates

AUTHORITY = "ca.pem"
_AUTHORITY_DAYS = 3650
_SKEW = timedelta(minutes=5)
"""Clocks may differ by so much."""


def certificates(folder: Path, seen_as: str = "") -> Certificates:
    """A server's files in a folder. Raises BusError when one is missing.

    `seen_as`: the folder as the server sees it, if it does otherwise.
    """
    names = ("server.pem", "server.key", AUTHORITY)
    for name in names:
        if not (folder / name).is_file():
            raise BusError(f"there is no {folder / name}: `actors nats-certs {folder}` makes it")
    return Certificates(*(str(Path(seen_as or folder.resolve(), name)) for name in names))


def make_certificates(folder: Path, hosts: Sequence[str], days: int) -> None:
    """Make what is not there yet of an authority, and always a new server certificate for those names and addresses."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _name("agentic-actors authority")
    if (folder / AUTHORITY).exists():
        signer = _read_key(folder / "ca.key")
        authority = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
    else:
        signer = ec.generate_private_key(ec.SECP256R1())
        authority = (
            _begin(name, name, signer.public_key(), _AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False
            )
            .sign(signer, hashes.SHA256())
        )
        _write_key(folder / "ca.key", signer)
        _write(folder / AUTHORITY, authority)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begin(_name(hosts[0]), authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        # both: the members of a cluster are each other's clients
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    _write_key(folder / "server.key", key)
    _write(folder / "server.pem", certificate)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def _write(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
