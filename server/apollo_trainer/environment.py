"""The environment that the server was started in: misspelt settings, and where each came from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from apollo_trainer.config import PREFIX, Settings

# Read by the client, its command and the benchmarks, which share an environment with the server.
OTHERS = frozenset(
    {"APOLLO_TOKEN", "APOLLO_CA", "APOLLO_CERTIFICATE", "APOLLO_KEY", "APOLLO_COMMIT"}
)
# What Kubernetes and Docker's links set beside a service whose name begins with "apollo".
_OF_SERVICES = re.compile(
    r"APOLLO(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?|NAME)|"
    r"APOLLO(_\w+)?_ENV_\w+"
)
_ALIKE = 0.8


def unknown_names(environment: Iterable[str]) -> dict[str, str]:
    """Names of environment variables that look like settings and are none, those of services aside.

    Each with the setting that it may be meant for, or none: a misspelt one would otherwise leave
    its setting at the default in silence.
    """
    settings = [f"{PREFIX}{name}".upper() for name in Settings.model_fields]
    known = OTHERS | set(settings)
    found = {name: name.upper() for name in sorted(environment) if name.upper() not in known}
    return {
        name: _meant(upper, settings)
        for name, upper in found.items()
        if upper.startswith(PREFIX) and not _OF_SERVICES.fullmatch(upper)
    }


def _meant(name: str, settings: list[str]) -> str:
    # Without the prefix, which alone would make all of them alike.
    names = {each.removeprefix(PREFIX): each for each in settings}
    alike = difflib.get_close_matches(name.removeprefix(PREFIX), names, 1, _ALIKE)
    return names[alike[0]] if alike else ""


def described(
    settings: Settings, environment: Mapping[str, str], arguments: Iterable[str]
) -> Iterator[str]:
    """Each setting with its value and where that came from, a line each."""
    flags = {a.removeprefix("--").partition("=")[0].replace("-", "_") for a in arguments}
    names = {name.upper() for name in environment}
    for name in Settings.model_fields:
        source = "default"
        if name in flags or f"no_{name}" in flags:
            source = "flag"
        elif f"{PREFIX}{name}".upper() in names:
            source = "environment"
        yield f"{name} = {getattr(settings, name)} ({source})"
