"""Packs as documents and tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.table import Table

from lotrtensor.analysis.rows import Collection
from lotrtensor.packs.pack import Pack
from lotrtensor.packs.verifying import VerifiedRow
from lotrtensor.report.documents import Document
from lotrtensor.report.names import shown_name
from lotrtensor.report.tables import error, new_table, size


def pack_document(pack: Pack) -> Document:
    """Sizes and errors of a pack, and of every adapter in it."""
    return {
        "type": "PACK",
        "path": str(pack.path),
        "bytes": pack.bytes,
        "shared_bytes": pack.shared_bytes,
        "share": pack.share,
        "goal": dict(pack.goal),
        "cells": [
            {
                "modules": list(cell.modules),
                "shape": list(cell.shape),
                "ranks": list(cell.basis.rank),
                "cluster": cell.cluster,
                "lower_bound": bound,
            }
            for cell, bound in itertools.zip_longest(pack.cells, pack.bounds)
        ],
        "adapters": [row._asdict() for row in pack.rows],
    }


def pack_table(document: Document) -> Table:
    """The adapters of a pack: error, that of the mean alone, bytes of their own."""
    table = new_table(
        "ΔW = U (w Ḡ + G) Vᵀ + P Qᵀ, U, V and Ḡ shared, in bits",
        *("adapter", "error", "mean alone", "bytes", "stored"),
    )
    for row in document["adapters"]:
        table.add_row(
            shown_name(row["name"]),
            error(row["relative_error"]),
            error(row["mean_error"]),
            f"{row['bytes']:,}",
            "on the bases" if row["uses_bases"] else "by itself",
        )
    return table


def pack_line(document: Document) -> str:
    """One sentence: how large a pack is, and how much of it is shared."""
    by_itself = sum(not row["uses_bases"] for row in document["adapters"])
    text = (
        f"{len(document['adapters'])} adapters in {size(document['bytes'])}, "
        f"{size(document['shared_bytes'])} of it shared"
    )
    if by_itself and document["shared_bytes"]:
        text += f"; {by_itself} by themselves, which the bases do not suit"
    bounds = [cell["lower_bound"] for cell in document["cells"] if cell["lower_bound"] is not None]
    if bounds:
        text += (
            f"; without private parts no bases of these ranks leave less than {error(min(bounds))} "
            f"to {error(max(bounds))} of a module"
        )
    return text


def verified_document(rows: Sequence[VerifiedRow]) -> Document:
    """Measured errors of adapters of a pack."""
    return {
        "adapters": [
            row._asdict() | {"modules": [module._asdict() for module in row.modules]}
            for row in rows
        ]
    }


def verified_table(document: Document) -> Table:
    """Measured errors of adapters of a pack, beside those of the mean alone."""
    table = new_table(
        "‖ΔW − stored‖ / ‖ΔW‖, measured",
        *("adapter", "error", "mean alone", "largest of a module", "bytes", "original"),
    )
    for row in document["adapters"]:
        worst = max(row["modules"], key=lambda module: module["relative_error"])
        table.add_row(
            shown_name(row["name"]),
            error(row["relative_error"]),
            error(row["mean_error"]),
            f"{error(worst['relative_error'])} {shown_name(worst['name'])}",
            f"{row['bytes']:,}",
            f"{row['source_bytes']:,}",
        )
    return table


def collection_document(found: Collection) -> Document:
    """Clusters, outliers and duplicates of a collection, and the cosines of every two."""
    return {
        "type": "COLLECTION",
        "adapters": [row._asdict() for row in found.rows],
        "duplicates": [pair._asdict() for pair in found.duplicates],
        "cosine": found.cosine.tolist(),
    }


def collection_table(document: Document) -> Table:
    """The adapters of a collection: norm, cluster, and the one that is most alike."""
    table = new_table(
        "cosines of the updates ΔW, over all modules",
        *("adapter", "norm", "cluster", "nearest", "cosine"),
    )
    for row in document["adapters"]:
        nearest = "–" if row["nearest"] is None else shown_name(row["nearest"])
        table.add_row(
            shown_name(row["name"]),
            f"{row['norm']:.4g}",
            f"{row['cluster']}{' (outlier)' if row['outlier'] else ''}",
            nearest,
            "–" if row["cosine"] is None else f"{row['cosine']:.3f}",
        )
    return table


def collection_line(document: Document) -> str:
    """One sentence: how many clusters, outliers and duplicates there are."""
    rows = document["adapters"]
    clusters, outliers = len({row["cluster"] for row in rows}), sum(row["outlier"] for row in rows)
    text = f"{len(rows)} adapters in {clusters} clusters, {outliers} of them of one adapter alone"
    pairs = document["duplicates"]
    if pairs:
        named = ", ".join(f"{pair['first']} = {pair['second']}" for pair in pairs[:5])
        text += f"; the same: {named}{', …' if len(pairs) > 5 else ''}"
    return text
