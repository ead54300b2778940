"""Generates the stubs in apollo_grpc from the contract, into a folder of the caller's choice.

Run by `make protos` and `make check` with an interpreter that has grpcio-tools 1.71.2, from
`protos/requirements.txt`: stubs of that version import with protobuf 5.29.6 to 7.x, while newer
ones refuse the protobuf that many vLLM environments hold.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
PACKAGES = ("v1", "sidecar/v1")
# What server reflection tells: the public package, with its comments.
CONTRACT = "contract.binpb"
HEADER = '"""Generated from protos/apollo/{} by `make protos`."""\n'


def well_known_types() -> Path:
    """Folder of the google/protobuf includes that grpcio-tools ships."""
    import grpc_tools

    return Path(grpc_tools.__file__).parent / "_proto"


def run_protoc(out: Path) -> None:
    """Writes messages, services and their type stubs under `out`/apollo."""
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    protoc([f"--{kind}_out={out}" for kind in kinds], "apollo/**/*.proto")


def write_contract(path: Path) -> None:
    """Writes the descriptors of apollo.v1 and of what it imports, comments included."""
    protoc(
        [f"--descriptor_set_out={path}", "--include_imports", "--include_source_info"],
        "apollo/v1/*.proto",
    )


def protoc(options: list[str], sources: str) -> None:
    """Runs protoc on some of the contract's files."""
    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob(sources))
    includes = [f"-I{PROTOS}", f"-I{well_known_types()}"]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *includes, *options, *names],
        check=True,
        # protoc looks for protoc-gen-mypy on PATH, which a virtual environment need not be on.
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"},
    )


def rewrite_imports(text: str) -> str:
    """Points imports at apollo_grpc; the descriptor keeps its name, apollo/v1/..., on the wire."""
    text = re.sub(r"\bfrom apollo\.(\S+) import", r"from apollo_grpc.\1 import", text)
    text = re.sub(r"\bimport apollo\.", "import apollo_grpc.", text)
    return re.sub(r"(?<![\w./'\"])apollo\.((?:\w+\.)+\w+_pb2)", r"apollo_grpc.\1", text)


def main(target: Path) -> None:
    """Fills the packages under `target`, replacing what is there."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as build:
        run_protoc(Path(build))
        for package in PACKAGES:
            fill(target / package, Path(build, "apollo", package), HEADER.format(package))
    (target / "sidecar" / "__init__.py").write_text(HEADER.format("sidecar"))
    write_contract(target / CONTRACT)


def fill(target: Path, built: Path, header: str) -> None:
    """Replaces the modules of one package by those that protoc built."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.py*"):
        old.unlink()
    for source in sorted(path for path in built.iterdir() if path.is_file()):
        (target / source.name).write_text(rewrite_imports(source.read_text()))
    (target / "__init__.py").write_text(header)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
