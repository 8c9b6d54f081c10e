"""Bytes against error of packs, beside each adapter alone and other packages that share.

``python -m tests.bench.families FOLDER`` takes the adapters that ``examples/families.py`` and
``python -m tests.evidence.family`` train, prints Markdown tables and writes
``docs/families.json``; ``python -m tests.evidence.families`` scores them on their tasks. vlora-dev
and lorashare (extra ``bench``) are left out where they are not installed. Their numbers are counted
in 16 bits, though they write 32, and the smaller of what they need: bases, means and coefficients.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lotrtensor as lt
from lotrtensor.adapters.modules import LoraModule

TOLERANCES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
COMPONENTS, RANKS = (1, 2, 4, 8, 12), (4, 8, 16, 32, 64)
HALVES = "each alone, 16 bit"
"""Truncated LoRAs, ranks shared out over the modules at one error: plain numbers."""

FORMS: tuple[tuple[str, float], ...] = (
    *((form, tolerance) for tolerance in TOLERANCES for form in ("pack", "each alone", HALVES)),
    *(("vlora", components) for components in COMPONENTS),
    *(("lorashare", components) for components in RANKS),
)
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


class Made(NamedTuple):
    """What a form makes of a family: its bytes, every adapter as a LoRA, seconds of a processor."""

    bytes: int
    adapters: list[lt.LoraAdapter]
    seconds: float


def main() -> None:
    """Measure every family in every form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/families.json"))
    parser.add_argument("--only", nargs="+", help="families")
    arguments = parser.parse_args()
    families = families_of(arguments.folder)
    points: list[Point] = []
    for name, paths in families.items():
        if arguments.only and name not in arguments.only:
            continue
        for form, setting in FORMS:
            made = make(form, paths, setting)
            if made is not None:
                points.append(point(name, form, setting, made, paths))
                print(json.dumps(points[-1]._asdict()), flush=True)
    sizes = {n: sum(lora(p).bytes for p in ps) for n, ps in families.items()}
    content = {"source_bytes": sizes, "points": [point._asdict() for point in points]}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join([*table(content), "", *others(content)]))


def families_of(folder: Path) -> dict[str, list[Path]]:
    """Adapters by the first word of their names."""
    families: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (path / "adapter_config.json").is_file():
            families.setdefault(path.name.partition("-")[0], []).append(path)
    return families


def make(form: str, paths: list[Path], setting: float) -> Made | None:
    """A family in a form; None where a package is missing, or has no such form of so few."""
    if form == "pack":
        return packed(paths, setting)
    if form in ("each alone", HALVES):
        return alone(paths, setting, bits=form != HALVES)
    if not find_spec(form) or (form == "vlora" and setting >= len(paths)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        # Neither takes bfloat16.
        copies = [Path(folder) / path.name for path in paths]
        for path, copy in zip(paths, copies, strict=True):
            replace(lora(path), dtype=np.dtype("float32")).save(copy)
        return {"vlora": vlora, "lorashare": lorashare}[form](copies, int(setting))


def packed(paths: list[Path], tolerance: float) -> Made:
    """The pack, and what is in it."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
        made = lt.pack(paths, Path(folder) / "pack", tolerance=tolerance, executor=executor)
        seconds = time.process_time() - started
        size = sum(p.stat().st_size for p in (Path(folder) / "pack").iterdir())
        found = [like(path, made.member(path.name).updates()) for path in paths]
    return Made(size, found, seconds)


def alone(paths: list[Path], tolerance: float, *, bits: bool) -> Made:
    """Every adapter by itself: compressed, whole directories, or truncated, its numbers alone."""
    started = time.process_time()
    if bits:
        made = [lt.compress(lora(path), tolerance=tolerance) for path in paths]
        size = sum(adapter.file_bytes for adapter in made)
        found = [like(p, a.updates()) for p, a in zip(paths, made, strict=True)]
    else:
        found = [lt.truncate(lora(path), tolerance=tolerance) for path in paths]
        size = sum(adapter.bytes for adapter in found)
    return Made(size, found, time.process_time() - started)


def vlora(paths: list[Path], components: int) -> Made:
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
    made = []
    for path in paths:
        found = space.reconstruct(path.name)
        pairs = {plain(k): (found.lora_b[k], found.lora_a[k]) for k in found.layer_names}
        made.append(scaled(path, pairs))
    return Made(HALF * numbers, made, seconds)


def lorashare(paths: list[Path], components: int) -> Made:
    """Lorashare: principal components of the rows of A and of the columns of B, layer by layer."""
    from lorashare import SHAREModel

    started = time.process_time()
    named = {path.name: str(path) for path in paths}
    with contextlib.redirect_stdout(io.StringIO()):
        model = SHAREModel.from_adapters(named, num_components=components)
    seconds = time.process_time() - started
    numbers = sum(x.numel() for x in model.components.values())
    numbers += sum(x.numel() for own in model.all_loadings.values() for x in own.values())
    made = []
    for path in paths:
        found = model.reconstruct(path.name)
        ends = (".lora_B.weight", ".lora_A.weight")
        stems = {key.removesuffix(ends[0]) for key in found if key.endswith(ends[0])}
        pairs = {plain(stem): (found[stem + ends[0]], found[stem + ends[1]]) for stem in stems}
        made.append(scaled(path, pairs))
    return Made(HALF * numbers, made, seconds)


def point(family: str, form: str, setting: float, made: Made, paths: list[Path]) -> Point:
    """One point, with the digits that mean something."""
    pairs = zip(paths, made.adapters, strict=True)
    errors = [lt.compare(lora(path), found).relative_error for path, found in pairs]
    mean = math.sqrt(sum(e**2 for e in errors) / len(errors))
    rounded = [float(f"{value:.4g}") for value in (mean, max(errors), made.seconds)]
    return Point(family, form, setting, made.bytes, *rounded)


def lora(path: Path) -> lt.LoraAdapter:
    """The adapter at a path."""
    found = lt.load(path)
    assert isinstance(found, lt.LoraAdapter)
    return found


def plain(key: str) -> str:
    """Path of a module, without PEFT's prefix."""
    return key.removeprefix("base_model.model.")


def like(path: Path, modules: tuple[LoraModule, ...]) -> lt.LoraAdapter:
    """Modules as a LoRA in float32, so that nothing beside their own rounding is lost."""
    return lt.LoraAdapter(modules, lora(path).config, np.dtype("float32"))


def scaled(path: Path, pairs: Mapping[str, tuple[Any, Any]]) -> lt.LoraAdapter:
    """Factors of another package as s B and A; the others do not keep the scale s."""
    config = json.loads((path / "adapter_config.json").read_text("utf-8"))
    scale = config["lora_alpha"] / config["r"]
    modules = []
    for module in lora(path).modules:
        b, a = (x.detach().double().numpy() for x in pairs[module.name])
        modules.append(LoraModule(module.name, scale * b, a))
    return like(path, tuple(modules))


def table(content: Mapping[str, Any]) -> list[str]:
    """Markdown: packs beside each adapter alone at one error."""
    points = [Point(**row) for row in content["points"]]
    names = ("family", "error", "pack, bytes", "each alone, bytes", "in 16 bits", "smaller by")
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for own in (point for point in points if point.form == "pack"):
        bits, halves = (
            next(p.bytes for p in points if p[:3] == (own.family, form, own.setting))
            for form in ("each alone", HALVES)
        )
        lines.append(
            f"| {own.family} | {own.setting} | {own.bytes:,} | {bits:,} | {halves:,} | "
            f"{bits / own.bytes:.2f} ×, {halves / own.bytes:.1f} × |"
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
