"""Where callers over TCP may have folders made, and where the server's own user may."""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_client import ApolloClient
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import status_pb2
from apollo_trainer.config import Settings
from apollo_trainer.services.allowed_folders import AllowedFolders
from tests.services.conftest import ServerThread
from tests.waiting import wait_until


def by_tcp() -> Any:
    return SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")


def owner_of(model: Path) -> Any:
    attachment = SimpleNamespace(directory=str(model))
    return SimpleNamespace(session=lambda: SimpleNamespace(attachment=attachment))


def make_places(folder: Path) -> Path:
    """A model's folder, another one, and links from the first to the second and back."""
    for name in ("models/served", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "models" / "out").symlink_to(folder / "other")
    (folder / "models" / "round").symlink_to("round")
    (folder / "in").symlink_to(folder / "models")
    return folder


@pytest.fixture
def places(tmp_path: Path) -> Path:
    return make_places(tmp_path)


def folders(places: Path, roots: str = "") -> AllowedFolders:
    return AllowedFolders(owner_of(places / "models" / "served"), roots)


@pytest.mark.parametrize("path", ["models/a", "in/a", "models/served/../a", "other/../models/a"])
async def test_beside_the_model_is_allowed_with_links_resolved(places: Path, path: str) -> None:
    found = await folders(places).allowed(places / path, by_tcp())
    assert found == places / "models" / "a"


OUTSIDE = ["other/a", "models/out/a", "models/../other/a", "models", "models/round/a", "models2/a"]


@pytest.mark.parametrize("path", OUTSIDE)
async def test_elsewhere_is_refused_over_tcp_and_allowed_on_the_users_socket(
    places: Path, path: str
) -> None:
    with pytest.raises(InvalidArgument, match="export_roots") as refused:
        await folders(places).allowed(places / path, by_tcp())
    assert refused.value.reason == "PATH_OUTSIDE_ROOTS"
    assert [v.field for v in refused.value.violations] == ["directory"]
    own = SimpleNamespace(peer=lambda: "unix:")
    assert await folders(places).allowed(places / path, own) == places / path


async def test_roots_that_are_set_stand_for_the_models_folder(places: Path) -> None:
    chosen = folders(places, f"{places}/other:{places}/third")
    assert await chosen.allowed(places / "models/out/a", by_tcp()) == places / "other" / "a"
    assert await chosen.allowed(places / "third" / "b" / "a", by_tcp()) == places / "third/b/a"
    with pytest.raises(InvalidArgument, match="third"):
        await chosen.allowed(places / "models" / "a", by_tcp())


STEPS = st.lists(st.sampled_from(["models", "other", "out", "in", "..", ".", "a", "served"]))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(steps=STEPS)
def test_no_path_leads_out(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = make_places(Path(folder).resolve())
        try:
            found = asyncio.run(folders(base).allowed(base.joinpath(*steps), by_tcp()))
        except InvalidArgument:
            return
        assert base / "models" in found.resolve().parents


def test_a_caller_over_tcp_exports_and_copies_beside_the_model_and_nowhere_else(
    start_engine: Any,
    state_dir: Path,
    sidecar_address: str,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start_engine()
    outside = tmp_path_factory.mktemp("outside")
    (model_folder.parent / "out").symlink_to(outside)
    made = Settings(
        address="127.0.0.1:0",
        state_dir=state_dir,
        sidecar=sidecar_address,
        rank=8,
        probe_weights=False,
    )
    with caplog.at_level(logging.INFO):
        listens = re.compile(r"listens on (127\.0\.0\.1:[1-9]\d*)")
        server = ServerThread(made, monkeypatch, serves=lambda: listens.search(caplog.text))
    found = listens.search(caplog.text)
    assert found
    token = (state_dir / "token").read_text()
    with ApolloClient(found[1], token=token) as client:
        attached = status_pb2.ATTACHMENT_STATE_ATTACHED
        wait_until(lambda: client.status().attachment == attached, "the attachment")
        for call in (client.export, client.adopt):
            for place in (outside / "a", model_folder.parent / "out" / "a"):
                with pytest.raises(InvalidArgument) as refused:
                    call(place)
                assert refused.value.reason == "PATH_OUTSIDE_ROOTS"
        assert list(outside.iterdir()) == []
        client.export(model_folder.parent / "exported")
        client.adopt(model_folder.parent / "adopted")
    server.stop()
    for name in ("exported", "adopted"):
        assert (model_folder.parent / name / "config.json").is_file()
