"""What a caller with a token may do: the one table of RPCs and the scopes that they ask for.

A scope includes those below it. `read` looks at what is kept; `train` puts the model, the device or
the disk to work, and adds; `admin` takes away, goes back, or writes where the caller says.
"""

from __future__ import annotations

from enum import IntEnum


class Scope(IntEnum):
    """Of a token; a larger one includes the smaller ones."""

    READ = 1
    TRAIN = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """As files, commands and errors have it."""
        return self.name.lower()


WORDS = {scope.word: scope for scope in Scope}
_READ, _TRAIN, _ADMIN = Scope
_BY_SERVICE = {
    "apollo.v1.TrainingService": {
        _READ: "WatchRun WatchRuns GetRun ListRuns ListRegressionProbes",
        _TRAIN: "Train CreateRun CancelRun ValidateRun CountTokens ScoreSamples",
        _ADMIN: "DeleteRun DeleteRegressionProbes",
    },
    "apollo.v1.CheckpointService": {
        _READ: "GetSnapshot ListSnapshots GetOperation ListOperations WatchOperation",
        _TRAIN: "Sync Verify CreateSnapshot CancelOperation",
        _ADMIN: "Adopt Export RestoreSnapshot Undo DeleteSnapshot",
    },
    "apollo.v1.DatasetService": {
        _READ: "GetDataset ListDatasets",
        _TRAIN: "CreateDataset",
        _ADMIN: "DeleteDataset",
    },
    "apollo.v1.StatusService": {_READ: "GetStatus GetServerInfo WatchStatus"},
    "grpc.health.v1.Health": {_READ: "Check Watch List"},
    "grpc.reflection.v1.ServerReflection": {_READ: "ServerReflectionInfo"},
    "grpc.reflection.v1alpha.ServerReflection": {_READ: "ServerReflectionInfo"},
}
SCOPES: dict[str, Scope] = {
    f"/{service}/{method}": scope
    for service, scopes in _BY_SERVICE.items()
    for scope, methods in scopes.items()
    for method in methods.split()
}


def scope_of(method: str) -> Scope:
    """What `/package.Service/Method` asks for; all there is, where the table lacks it."""
    return SCOPES.get(method, Scope.ADMIN)
