"""Certificates for tests of TLS, made here."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._subject, self._key.public_key(), authority=True)
        self.ca = self._write("ca", self._certificate)

    def issue(
        self, name: str, password: bytes | None = None, *, expired: bool = False
    ) -> tuple[Path, Path]:
        """Certificate and key files of a holder at 127.0.0.1."""
        secret = serialization.NoEncryption()
        if password:
            secret = serialization.BestAvailableEncryption(password)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._write(name, self._sign(subject, key.public_key(), expired=expired))
        key_file = certificate.with_suffix(".key")
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                secret,
            )
        )
        return certificate, key_file

    def _sign(self, subject: x509.Name, public_key, *, authority=False, expired=False):
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(minutes=-30 if expired else 60)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder(issuer_name=self._subject, subject_name=subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._folder / f"{self._name}-{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path
