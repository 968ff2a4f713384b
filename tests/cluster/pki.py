"""Certificates and kubeconfigs of a test cluster. Keys are valid for a month and guard nothing."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 30


class Authority:
    """Signs certificates and keeps them in a folder: NAME.crt and NAME.key; its own is ca.crt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("srccore-test-ca", None)
        builder = _certificate(self._name, self._name, self._key.public_key())
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self._seal("ca", builder.add_extension(basic, critical=True))

    def sign(
        self,
        name: str,
        common_name: str,
        *,
        organization: str | None = None,
        hosts: tuple[str, ...] = ("localhost",),
    ) -> None:
        """Creates a key, and a certificate for servers and clients.

        Args:
            name: The name of the files.
            common_name: The user, for Kubernetes.
            organization: The group, for Kubernetes.
            hosts: Names and addresses that the certificate is valid for.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _certificate(_name(common_name, organization), self._name, key.public_key())
        alternatives = x509.SubjectAlternativeName([_general(host) for host in hosts])
        self._seal(name, builder.add_extension(alternatives, critical=False))
        self._write(f"{name}.key", _private(key))

    def key_pair(self, name: str) -> None:
        """Creates a key without a certificate: NAME.key and NAME.pub."""
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(f"{name}.key", _private(key))
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._write(f"{name}.pub", public)

    def _seal(self, name: str, builder: x509.CertificateBuilder) -> None:
        # Newer Pythons require an authority key identifier.
        mine = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = builder.add_extension(mine, critical=False).sign(self._key, hashes.SHA256())
        self._write(f"{name}.crt", signed.public_bytes(serialization.Encoding.PEM))

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)


def write_kubeconfig(path: Path, server: str, ca: Path, token: str) -> None:
    """Writes a self-contained kubeconfig."""
    authority = base64.b64encode(ca.read_bytes()).decode()
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": server, "certificate-authority-data": authority},
            }
        ],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(own, critical=False)
    )


def _name(common_name: str, organization: str | None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization is not None:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
