"""Certificates for a deployment on this machine; ``cryptography`` makes them."""

import datetime
import ipaddress
import os
import pathlib
from typing import Any

from fed.errors import need

HOST = "127.0.0.1"


def make_certificates(folder: pathlib.Path, days: int = 7) -> dict[str, pathlib.Path]:
    """A new authority and a certificate of it for this machine's loopback: paths by "ca", "certificate" and "key".

    Files of keys can be read by this user only.
    """
    x509 = need("cryptography.x509", "fed")
    ec = need("cryptography.hazmat.primitives.asymmetric.ec", "fed")
    folder.mkdir(parents=True, exist_ok=True)
    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name("jaxmoe test authority")
    ca = _certificate(issuer, issuer, authority.public_key(), authority, days, authority=True)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    )
    mine = _certificate(_name("localhost"), issuer, own.public_key(), authority, days, names=names)
    serialization = need("cryptography.hazmat.primitives.serialization", "fed")
    pem = serialization.Encoding.PEM
    key = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = {name: folder / f"{name}.pem" for name in ("ca", "certificate", "key")}
    paths["ca"].write_bytes(ca.public_bytes(pem))
    paths["certificate"].write_bytes(mine.public_bytes(pem))
    with open(os.open(paths["key"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(key)
    return paths


def _name(text: str) -> Any:
    x509 = need("cryptography.x509", "fed")
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _certificate(
    subject: Any,
    issuer: Any,
    public: Any,
    signer: Any,
    days: int,
    *,
    authority: bool = False,
    names: Any = None,
) -> Any:
    x509 = need("cryptography.x509", "fed")
    hashes = need("cryptography.hazmat.primitives.hashes", "fed")
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if authority:
        usage = x509.KeyUsage(*[i in (5, 6) for i in range(9)])  # signs certificates and lists
        builder = builder.add_extension(usage, critical=True)
    else:
        usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())
