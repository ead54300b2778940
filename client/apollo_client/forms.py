"""What people write for a sample or a probe, and lists of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from apollo_client.placing import Place, Placed, Violations
from apollo_client.probes import PROBE_FORMS, to_probe
from apollo_client.records import told_as
from apollo_client.sample_values import shown
from apollo_client.samples import FORMS, KEYS, to_samples
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

    def of_columns(self, columns: Mapping[str, str] | None) -> Form[T]:
        """The form of records whose keys have other names; what is not named is left out.

        Args:
            columns: their name of each key, as `{"prompt": "question"}`; None: this form itself.

        Raises InvalidArgument for what is no key of a sample.
        """
        if columns is None:
            return self
        if not isinstance(columns, Mapping) or not columns:
            raise InvalidArgument.at("columns", "names nothing: it is keys and their names")
        for key in columns:
            if key not in KEYS:
                says = f"is no key of a sample; they are {', '.join(sorted(KEYS))}"
                raise InvalidArgument.at(f"columns.{shown(key)}", says)
        return replace(self, read=partial(self._picked, columns))

    def _picked(self, columns: Mapping[str, str], value: Any) -> list[T]:
        """What one record holds in these columns; what is no record is as it was."""
        if not isinstance(value, Mapping):
            return self.read(value)
        found = {key: value[name] for key, name in columns.items() if name in value}
        if not found:
            name, has = shown(next(iter(columns.values()))), shown(", ".join(map(str, value)))
            raise InvalidArgument.at(name, f"is missing; the record has {has or 'nothing'}")
        try:
            return self.read(found)
        except InvalidArgument as error:
            raise told_as(error, columns) from error

    def iterated(self, field: str, items: Any) -> Iterable[Any]:
        """The items of a list. Raises InvalidArgument for what is none."""
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            others = "nor a file or a table of them; of a dataset's splits give one"
            raise InvalidArgument.at(field, f"is no list of {self.name}, {others}")
        return items

    def all_of(self, field: str, items: Any) -> tuple[list[T], list[Place]]:
        """What a list holds, and where each of it comes from.

        Raises InvalidArgument with each wrong item, as one of `field`.
        """
        found, places, wrong = list[T](), list[Place](), Violations()
        for index, item in enumerate(self.iterated(field, items)):
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
