"""What people write for a sample or a probe, and lists of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from apollo_client.placing import Place, Placed, Violations
from apollo_client.probes import PROBE_FORMS, to_probe
from apollo_client.samples import FORMS, to_samples
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True)
class Form(Generic[T]):
    """How one kind of thing is written.

    Attributes:
        name: what several are called.
        words: the forms that one may have.
        read: what one value holds; raises InvalidArgument.
    """

    name: str
    words: str
    read: Callable[[Any], list[T]]

    def all_of(self, field: str, items: Any) -> tuple[list[T], list[Place]]:
        """What a list holds, and where each of it comes from.

        Raises InvalidArgument with each wrong item, as one of `field`.
        """
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            makes = f"'read_{self.name}' makes one of a file"
            raise InvalidArgument.at(field, f"is no list of {self.name}; {makes}")
        found, places, wrong = list[T](), list[Place](), Violations()
        for index, item in enumerate(items):
            try:
                found += self.read(item)
            except InvalidArgument as error:
                wrong.add(f"{field}[{index}]", error.message)
                if wrong.is_full():
                    break
            place = item.place if isinstance(item, Placed) else index
            places += [place] * (len(found) - len(places))
        wrong.raise_any(self.name)
        return found, places


SAMPLES = Form[pb.Sample]("samples", FORMS, to_samples)
PROBES = Form[pb.Probe]("probes", PROBE_FORMS, lambda value: [to_probe(value)])
