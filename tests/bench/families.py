"""Bytes against error of packs, beside each adapter alone and other packages that share.

``python -m tests.bench.families FOLDER`` takes the adapters that ``examples/families.py`` trains,
prints a Markdown table and writes ``docs/families.json``. vlora-dev and lorashare (extra
``bench``) are left out where they are not installed. Their numbers are counted in 16 bits, though
they write 32, and the smaller of what they need: bases, means and coefficients.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lotrtensor as lt

TOLERANCES = (0.5, 0.3, 0.2, 0.1)
COMPONENTS, RANKS = (1, 2, 4, 8, 12), (4, 8, 16, 32, 64)
HALF = 2
"""Bytes of a number of the other packages."""


class Point(NamedTuple):
    """Bytes of a family in one form, root mean square and largest of the relative errors."""

    family: str
    form: str
    setting: float
    bytes: int
    error: float
    worst: float
    seconds: float


def main() -> None:
    """Measure every family in every form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/families.json"))
    parser.add_argument("--only", nargs="+", help="families")
    arguments = parser.parse_args()
    families: dict[str, list[Path]] = {}
    for path in sorted(arguments.folder.iterdir()):
        if (path / "adapter_config.json").is_file():
            families.setdefault(path.name.partition("-")[0], []).append(path)
    points: list[Point] = []
    for name, paths in families.items():
        if arguments.only and name not in arguments.only:
            continue
        for point in measured(name, paths):
            points.append(point)
            print(json.dumps(point._asdict()), flush=True)
    sizes = {n: sum(lora(p).bytes for p in ps) for n, ps in families.items()}
    content = {"source_bytes": sizes, "points": [point._asdict() for point in points]}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join([*table(content), "", *others(content)]))


def measured(family: str, paths: list[Path]) -> Iterator[Point]:
    """All points of one family."""
    for tolerance in TOLERANCES:
        yield packed(family, paths, tolerance)
        yield alone(family, paths, tolerance)
    with tempfile.TemporaryDirectory() as folder:
        # Neither takes bfloat16.
        copies = [Path(folder) / path.name for path in paths]
        for path, copy in zip(paths, copies, strict=True):
            replace(lora(path), dtype=np.dtype("float32")).save(copy)
        for components in COMPONENTS:
            if components < len(paths) and find_spec("vlora"):
                yield vlora(family, copies, components)
        for components in RANKS:
            if find_spec("lorashare"):
                yield lorashare(family, copies, components)


def packed(family: str, paths: list[Path], tolerance: float) -> Point:
    """The pack, measured anew against the originals."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
        made = lt.pack(paths, Path(folder) / "pack", tolerance=tolerance, executor=executor)
        seconds = time.process_time() - started
        size = sum(p.stat().st_size for p in (Path(folder) / "pack").iterdir())
        rows = made.verify({path.name: lora(path) for path in paths})
    return point(family, "pack", tolerance, size, [r.relative_error for r in rows], seconds)


def alone(family: str, paths: list[Path], tolerance: float) -> Point:
    """Every adapter compressed by itself, whole directories."""
    started = time.process_time()
    made = [lt.compress(lora(path), tolerance=tolerance) for path in paths]
    seconds = time.process_time() - started
    size = sum(adapter.file_bytes for adapter in made)
    errors = [adapter.relative_error for adapter in made]
    return point(family, "each alone", tolerance, size, errors, seconds)


def vlora(family: str, paths: list[Path], components: int) -> Point:
    """vlora-dev: principal components of the flattened A and B of every layer, and their means."""
    from vlora import init_subspace

    started = time.process_time()
    names = [path.name for path in paths]
    space = init_subspace(paths, task_ids=names, num_components=components)
    seconds = time.process_time() - started
    parts = (space.components_a, space.components_b, space.means_a, space.means_b)
    numbers = sum(x.numel() for part in parts for x in part.values())
    for task in space.tasks.values():
        numbers += sum(x.numel() for p in (task.loadings_a, task.loadings_b) for x in p.values())
    errors = []
    for path in paths:
        found = space.reconstruct(path.name)
        pairs = {plain(k): (found.lora_b[k], found.lora_a[k]) for k in found.layer_names}
        errors.append(relative_error(path, pairs))
    return point(family, "vlora", components, HALF * numbers, errors, seconds)


def lorashare(family: str, paths: list[Path], components: int) -> Point:
    """Lorashare: principal components of the rows of A and of the columns of B, layer by layer."""
    from lorashare import SHAREModel

    started = time.process_time()
    named = {path.name: str(path) for path in paths}
    with contextlib.redirect_stdout(io.StringIO()):
        model = SHAREModel.from_adapters(named, num_components=components)
    seconds = time.process_time() - started
    numbers = sum(x.numel() for x in model.components.values())
    numbers += sum(x.numel() for own in model.all_loadings.values() for x in own.values())
    errors = []
    for path in paths:
        found = model.reconstruct(path.name)
        ends = (".lora_B.weight", ".lora_A.weight")
        stems = {key.removesuffix(ends[0]) for key in found if key.endswith(ends[0])}
        pairs = {plain(stem): (found[stem + ends[0]], found[stem + ends[1]]) for stem in stems}
        errors.append(relative_error(path, pairs))
    return point(family, "lorashare", components, HALF * numbers, errors, seconds)


def point(
    family: str, form: str, setting: float, size: int, errors: list[float], seconds: float
) -> Point:
    """One point, with the digits that mean something."""
    mean = math.sqrt(sum(e**2 for e in errors) / len(errors))
    rounded = [float(f"{value:.4g}") for value in (mean, max(errors), seconds)]
    return Point(family, form, setting, size, *rounded)


def lora(path: Path) -> lt.LoraAdapter:
    """The adapter at a path."""
    found = lt.load(path)
    assert isinstance(found, lt.LoraAdapter)
    return found


def plain(key: str) -> str:
    """Path of a module, without PEFT's prefix."""
    return key.removeprefix("base_model.model.")


def relative_error(path: Path, pairs: Mapping[str, tuple[Any, Any]]) -> float:
    """Of s B A against the adapter; the others do not keep the scale s."""
    config = json.loads((path / "adapter_config.json").read_text("utf-8"))
    scale = config["lora_alpha"] / config["r"]
    lost2 = norm2 = 0.0
    for module in lora(path).modules:
        own = module.B.astype(float) @ module.A.astype(float)
        b, a = (x.detach().double().numpy() for x in pairs[module.name])
        lost2 += float(np.sum((own - scale * b @ a) ** 2))
        norm2 += float(np.sum(own**2))
    return math.sqrt(lost2 / norm2)


def table(content: Mapping[str, Any]) -> list[str]:
    """Markdown: packs beside each adapter alone at one error, then the other packages."""
    points = [Point(**row) for row in content["points"]]
    lines = ["| family | error | pack, bytes | each alone, bytes | pack smaller by |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for own in points:
        if own.form == "pack":
            other = next(p for p in points if p[:3] == (own.family, "each alone", own.setting))
            lines.append(
                f"| {own.family} | {own.setting} | {own.bytes:,} | {other.bytes:,} | "
                f"{other.bytes / own.bytes:.2f} × |"
            )
    return lines


def others(content: Mapping[str, Any]) -> list[str]:
    """Markdown: what other packages reach."""
    lines = ["| family | package, components | bytes | error | largest error of an adapter |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in (Point(**row) for row in content["points"]):
        if row.form in ("vlora", "lorashare") and row.setting in SHOWN:
            lines.append(
                f"| {row.family} | {row.form}, {row.setting:.0f} | {row.bytes:,} | "
                f"{row.error:.3f} | {row.worst:.3f} |"
            )
    return lines


SHOWN = (1, 4, 8, 32)
"""Components of the points that a page shows."""


if __name__ == "__main__":
    main()
