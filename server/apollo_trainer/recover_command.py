"""`apollo-training-server recover DIRECTORY`: settles a sync that was cut off, without a server.

vLLM cannot start from a directory whose config.json is aside, and a server settles it only once it
has found vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.checkpoints.directory import Place, place_under, recover_directory

NAME = "recover"


def command(program: str, arguments: list[str]) -> int:
    """Settles the directory and says what it is; the exit status is 1 where it cannot."""
    asked = _parser(program).parse_args(arguments)
    place = place_under(asked.directory, asked.checkpoint_dir)
    try:
        print(_settled(place))
    except ApolloError as error:
        print(f"{program}: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{program}: the disk refused ({error}); try again.", file=sys.stderr)
        return 1
    return 0


def _settled(place: Place) -> str:
    """Settles the directory; returns what it is now, in a sentence.

    Raises as `recover_directory`, and FailedPrecondition where the state folder is missing.
    """
    if not place.directory.is_dir():
        raise FailedPrecondition(f"{place.directory} is no folder; nothing was written.")
    manifest = recover_directory(place)
    if place.ops.found(place.state) is None:
        if place.ops.found(place.aside):
            raise FailedPrecondition(
                f"{place.directory} waits for a sync to be finished, and there is no "
                f"{place.state}; nothing was written. Name the folder that it lies in with "
                "--checkpoint-dir."
            )
        return f"{place.directory} was never synced; there is nothing to settle."
    generation = manifest.generation if manifest else 0
    return f"{place.directory} is whole, of generation {generation}; vLLM can start from it."


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program} {NAME}",
        description="Finish, or take back, a sync of a model directory that was cut off: needed "
        "where vLLM says that it has no config.json. No server and no vLLM need run.",
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="of the model")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=os.environ.get("APOLLO_CHECKPOINT_DIR") or None,
        help="as the server's own, where it had one",
    )
    return parser
