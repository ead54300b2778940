"""Writes docs/settings.md: every setting of the training server, vLLM's sidecar and the client.

Run by `make protos`, and by `make check` with `--check`. Reads `apollo_trainer.config` and the
options of the command `apollo`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.main
from pydantic.fields import FieldInfo

from apollo_client.command.app import app
from apollo_trainer.config import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
HEADER = """# Settings

Generated from the code by `make protos`. A flag comes before its variable, a variable before the
default; a variable that is set to nothing is as if it were not set. A misspelt one ends the server
with exit status 2 and the name that was meant. There is no file of settings; the units and the
compose file in [deploy/](../deploy/) set variables.

## The training server

`apollo-training-server` logs each setting at the start, with its value and where that came from;
`apollo info` tells the limits that callers meet. `--check-values` is `True`, `--no-check-values`
`False`, and so with each flag that is one or the other. `apollo up` gives its environment to the
training server, and no flags.

| flag | variable | default | unit, values | what it is |
|---|---|---|---|---|"""
SIDECAR = """
## The sidecar in vLLM

A plugin of vLLM without flags. Of vLLM's own flags two matter to it: `--gpu-memory-utilization`
([sizing](sizing.md)), and `--disable-log-stats`, with which no step waits for serving.

| variable | default | what it is |
|---|---|---|
| `VLLM_PLUGINS` | none | plugins that vLLM loads, `apollo,another`; without `apollo` no sidecar |
| `APOLLO_SIDECAR` | `sidecar.sock` in the state folder | `unix:PATH`, as the server's `--sidecar` |
| `APOLLO_STATE_DIR` | [below](#the-state-folder) | as the training server's `--state-dir` |

Where vLLM and the training server run as one user with one state folder, `VLLM_PLUGINS` is enough.

## The client and the command

`ApolloClient()` and `apollo` read the same variables; an argument or an option comes first.
`apollo config` tells which server is meant, and why.

| option of `apollo` | variable | what it is |
|---|---|---|"""
LAST = """| | `APOLLO_TOKEN` | The token itself, for TCP; a file comes before it. |
| | `APOLLO_STATE_DIR` | The state folder, where socket and token of this machine are looked for. |

An option stands before the command: `apollo --address HOST:PORT status`. The training server reads
`APOLLO_ADDRESS`, `APOLLO_TOKEN_FILE` and `APOLLO_STATE_DIR` as well; the others are the client's.

## The state folder

`APOLLO_STATE_DIR`, else `$XDG_STATE_HOME/apollo`, else `~/.local/state/apollo`. It is made with
mode 0700 and must belong to the user alone. What lies in it: [Backup](backup.md#what-lies-where).
"""
# By the end of a setting's name.
_UNITS = {
    "seconds": "seconds",
    "days": "days",
    "mebibytes": "MiB",
    "budget": "tokens",
    "steps": "steps",
    "samples": "samples",
}
_KINDS = {bool: "`True`, `False`", str: "text", Path: "path", int: "number", float: "number"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def text() -> str:
    """All of the page, as Markdown."""
    rows = map(_row, Settings.model_fields, Settings.model_fields.values())
    return "\n".join((HEADER, *rows, SIDECAR, *_options(), LAST))


def _row(name: str, field: FieldInfo) -> str:
    flag, variable = f"--{name.replace('_', '-')}", f"{PREFIX}{name}".upper()
    says = field.description or ""
    # What is found out at the start is told in words.
    told = re.search(r"(^|; )default: (.*?)(?=\. [A-Z]|$)", says)
    default = told[2] if told else _default(field)
    if told:
        says = says.replace(told[0], "")
    return f"| `{flag}` | `{variable}` | {default} | {_values(name, field)} | {says} |"


def _default(field: FieldInfo) -> str:
    if field.default_factory:
        return "[below](#the-state-folder)"
    if field.default is None:
        return "none"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _values(name: str, field: FieldInfo) -> str:
    """The unit, or else the kind, and the bounds."""
    kind: Any = field.annotation
    while type(None) in get_args(kind) or get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(kind))
    units = [unit for end, unit in _UNITS.items() if f"_{name}".endswith(f"_{end}")]
    return ", ".join([*(units or [_KINDS[kind]]), *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    for each in field.metadata:
        for name, words in _BOUNDS.items():
            bound = getattr(each, name, None)
            # Nobody meets what the contract's integers hold; no setting is below 0.
            if bound is not None and bound < 1e9 and (name, bound) != ("ge", 0):
                yield f"{words} {bound:,}"


def _options() -> Iterator[str]:
    for option in typer.main.get_command(app).params:
        if variable := getattr(option, "envvar", None):
            yield f"| `{option.opts[0]}` | `{variable}` | {getattr(option, 'help', '')} |"


def main(arguments: Sequence[str]) -> None:
    """Writes the page, or fails where it is another one."""
    made = text()
    if "--check" not in arguments:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        sys.exit("check: docs/settings.md is not what the code generates; run 'make protos'")


if __name__ == "__main__":
    main(sys.argv[1:])
