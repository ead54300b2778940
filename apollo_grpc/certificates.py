"""PEM files of TLS, read and tried: what is wrong with one grpc tells in a log, or not at all."""

from __future__ import annotations

import ssl
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition

# In place of a file of authorities: those that this system trusts.
SYSTEM = Path("system")
# Where distributions keep them, beside what OpenSSL itself says and SSL_CERT_FILE.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
MAX_BYTES = 4 * 2**20


def roots(path: Path) -> bytes:
    """The authorities in a PEM file, or the system's for `SYSTEM`.

    Raises FailedPrecondition where there are none.
    """
    pem = _read(_system_roots() if path == SYSTEM else path)
    try:
        # Names in other letters stand beside certificates, as comments.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=pem.decode("ascii", errors="ignore")
        )
    except (ssl.SSLError, ValueError) as error:
        raise _no_pem(path, "certificates", error) from error
    return pem


def certificate_chain(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Key and chain, in grpc's order.

    Raises FailedPrecondition where they cannot be read, or do not belong together.
    """
    pair = _read(key), _read(certificate)
    try:
        # An encrypted key would otherwise be asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise _no_pem(
            f"{certificate} and {key}", "a chain and its unencrypted key", error
        ) from error
    return pair


def _system_roots() -> Path:
    found = ssl.get_default_verify_paths().cafile
    for bundle in (found, *_BUNDLES):
        if bundle and Path(bundle).is_file():
            return Path(bundle)
    raise FailedPrecondition(
        "This system has no file of authorities where one is looked for. Install its "
        "ca-certificates, set SSL_CERT_FILE, or name a PEM file instead of 'system'.",
        reason="TLS_FILE_UNREADABLE",
    )


def _no_pem(what: object, meant: str, error: Exception) -> FailedPrecondition:
    why = getattr(error, "reason", None) or type(error).__name__
    return FailedPrecondition(
        f"{what} hold no {meant} in PEM ({why}).", reason="TLS_FILE_UNREADABLE"
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FailedPrecondition(
            f"The TLS file {path} cannot be read: {error.strerror}.", reason="TLS_FILE_UNREADABLE"
        ) from error
    if len(data) > MAX_BYTES:
        raise FailedPrecondition(
            f"The TLS file {path} is larger than {MAX_BYTES} bytes.", reason="TLS_FILE_UNREADABLE"
        )
    return data
