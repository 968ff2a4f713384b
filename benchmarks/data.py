"""Times how a data set is opened and read, and counts the bytes and the memory that it takes.

    python benchmarks/data.py                     # 400 images of 500 KB
    python benchmarks/data.py --large 20000       # memory with 20,000 of them: 10 GB on the disk

Four ways to read images in random order: Parquet with row groups of 256 (what srccore wrote before,
and what many tools write), the Arrow cache of Hugging Face `datasets`, a file per image, and a
split of srccore. Images are not decoded, and all files are in the page cache. Memory is that of a
process of its own, which writes a split, streams it and reads its images in random order.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from timing import alternate, arguments, report

from srccore.config import DataConfig
from srccore.data.dataset import open_data, stream_data, write_data
from srccore.data.index import index_of
from srccore.data.records import Category, Sample
from srccore.stages.data import prepare_data

SIZE = 500_000
READ = 20
"""Images that one repetition reads."""


def rows(count: int, size: int = SIZE) -> Iterator[tuple[Sample, bytes]]:
    """Samples with images of so many bytes: a small PNG, and bytes that readers skip."""
    file = io.BytesIO()
    Image.new("RGB", (336, 336)).save(file, "PNG")
    image = file.getvalue()
    for number in range(count):
        sample = Sample(
            id=f"s{number}",
            category=list(Category)[number % 3],
            question=f"What does picture {number} show? " * 5,
            answer="A number.",
            rationale="It shows a number. " * 20,
        )
        yield sample, image + os.urandom(size - len(image))


def write_in_groups(path: Path, data: list[tuple[Sample, bytes]]) -> None:
    """A data set as other tools write it: 256 rows to a group, Snappy, no description."""
    values = [each.model_dump(exclude={"facts"}) | {"image": image} for each, image in data]
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=256)


def readers(folder: Path, count: int) -> dict[str, Callable[[int], bytes]]:
    """Writes the data set in four ways, and returns what reads the image of a number from each."""
    import datasets

    data = list(rows(count))
    theirs, ours, files = folder / "groups.parquet", folder / "split.parquet", folder / "files"
    write_in_groups(theirs, data)
    write_data(ours, data)
    files.mkdir()
    for number, (_, image) in enumerate(data):
        (files / f"{number}.png").write_bytes(image)
    arrow = datasets.load_dataset(
        "parquet", data_files=str(theirs), split="train", cache_dir=str(folder / "cache")
    )
    opened = open_data(ours)

    def from_group(number: int) -> bytes:
        with pq.ParquetFile(theirs, memory_map=True) as file:
            group = file.read_row_group(number // 256, columns=["image"])
        image: bytes = group.column("image")[number % 256].as_py()
        return image

    def from_split(number: int) -> bytes:
        return opened.encoded(f"s{number}")

    return {
        "row groups of 256": from_group,
        "datasets": lambda number: arrow[number]["image"],
        "a file per image": lambda number: (files / f"{number}.png").read_bytes(),
        "srccore": from_split,
    }


def bytes_read() -> int:
    """What this process has read from files, without what it has mapped."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def counted(work: Callable[[], object]) -> float:
    """The megabytes that a piece of work reads."""
    before = bytes_read()
    work()
    return (bytes_read() - before) / 1e6


def own_memory(count: int, size: int, folder: Path) -> None:
    """Prints the peak of this process before and after it wrote, streamed and read a split."""

    def peak() -> str:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(line.split()[1] for line in lines if line.startswith("VmHWM"))

    write_data(folder / "warm.parquet", rows(4))
    open_data(folder / "warm.parquet").image("s0")
    before = peak()
    path = folder / f"{count}.parquet"
    write_data(path, rows(count, size))
    for _, encoded in stream_data(path):
        encoded()
    data = open_data(path)
    for number in random.Random(0).sample(range(count), min(count, 1000)):
        data.image(f"s{number}")
    path.unlink()
    print(before, peak())


def memory(count: int, size: int, folder: Path) -> str:
    """Runs `own_memory` in a process of its own."""
    command = [sys.executable, __file__, "--own-memory", str(count), str(size), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = (int(text) / 1024 for text in done.stdout.split())
    return f"{after - before:.0f} MiB more than before the first image, peak {after:.0f} MiB"


def main() -> None:
    """Runs the benchmark."""
    if sys.argv[1:2] == ["--own-memory"]:
        own_memory(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400, help="images that are read")
    parser.add_argument("--small", type=int, default=1000, help="images of the first memory test")
    parser.add_argument("--large", type=int, default=4000, help="images of the second memory test")
    parser.add_argument("--size", type=int, default=SIZE, help="bytes of an image in these tests")
    given = arguments(__doc__, parser)
    chance = random.Random(0)
    notes: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = readers(folder, given.images)

        def reading(read: Callable[[int], bytes]) -> Callable[[], None]:
            def way() -> None:
                for number in chance.sample(range(given.images), READ):
                    assert len(read(number)) == SIZE

            return way

        timed = {way: reading(read) for way, read in ways.items()}
        theirs, ours = folder / "groups.parquet", folder / "split.parquet"
        opening = {
            "from elsewhere: all headers": lambda: open_data(theirs),
            "srccore": lambda: open_data(ours),
        }
        results = {
            f"{READ} images in random order": alternate(timed, given.repetitions),
            f"open {given.images} samples": alternate(opening, given.repetitions),
        }
        notes["MB read for one image of a split"] = round(counted(timed["srccore"]) / READ, 2)
        notes["MB read to open a split"] = round(counted(opening["srccore"]), 2)
        index = Path(index_of(str(ours))).stat().st_size / 1e6
        notes["MB that a pod fetches for the texts"] = (
            f"{index:.2f} of {ours.stat().st_size / 1e6:.0f}"
        )
        each = given.images // 4
        config = DataConfig(source=str(theirs), train=each, calibration=each, heldout=each)
        total = counted(lambda: prepare_data(config, folder / "out"))
        size = theirs.stat().st_size / 1e6
        notes["prepare-data"] = (
            f"{total:.0f} MB read of a source of {size:.0f} MB: to identify it, to copy it, and "
            "the splits again for the index and for the manifest"
        )
        for count in (given.small, given.large):
            notes[f"memory with {count} images"] = memory(count, given.size, folder)
    report(results, given.json, notes)


if __name__ == "__main__":
    main()
