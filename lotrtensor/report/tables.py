"""JSON documents as terminal tables."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lotrtensor.report.documents import Document
from lotrtensor.report.names import shown_name


def size(count: int) -> str:
    """Return a number of bytes as people read it: 648.0 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def error(value: float | None) -> str:
    """Return a relative error with four digits; a trained adapter has none."""
    return "–" if value is None else f"{value:.4g}"


_NAMES = ("group", "module", "adapter", "form", "stored")
"""Columns that hold words."""


def new_table(title: str, *columns: str) -> Table:
    """An empty table with its style."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        # Folded, not cut: what tells two groups apart is often the end of their names.
        table.add_column(
            column,
            justify="left" if column in _NAMES else "right",
            overflow="fold",
        )
    return table


def lotr_table(document: Document) -> Table:
    """Groups of a LoTR adapter, their ranks, errors and sizes, and all together."""
    table = new_table(
        "LoTR: ΔW = U · G · Vᵀ, U and V shared by a group",
        *("group", "slices", "shape", "ranks p, q", "error", "lower bound", "parameters"),
    )
    for group in document["groups"]:
        table.add_row(
            shown_name(group["name"]),
            str(len(group["modules"])),
            "{} × {}".format(*group["shape"]),
            "{}, {}".format(*group["ranks"]),
            error(group["relative_error"]),
            error(group["lower_bound"]),
            f"{group['parameters']:,}",
        )
    table.add_section()
    slices = sum(len(group["modules"]) for group in document["groups"])
    errors = (error(document["relative_error"]), error(document["lower_bound"]))
    table.add_row("all", str(slices), "", "", *errors, f"{document['parameters']:,}", style="bold")
    return table


def compressed_table(document: Document) -> Table:
    """Groups of a compressed adapter: ranks of both parts, mean bits of a number, errors."""
    bounds = () if document["lower_bound"] is None else ("lower bound",)
    table = new_table(
        "compressed: ΔW = U · G · Vᵀ + P · Qᵀ, shared and private, in bits",
        *("group", "slices", "shape", "shared p, q", "private", "numbers", "bits", "error"),
        *bounds,
    )
    for group in document["groups"]:
        ranks = group["private_ranks"]
        lowest, highest = min(ranks), max(ranks)
        table.add_row(
            shown_name(group["name"]),
            str(len(group["modules"])),
            "{} × {}".format(*group["shape"]),
            "{}, {}".format(*group["shared_ranks"]) if any(group["shared_ranks"]) else "–",
            str(lowest) if lowest == highest else f"{lowest} … {highest}",
            f"{group['parameters']:,}",
            f"{group['bits']:.2f}",
            error(group["relative_error"]),
            *(error(group["lower_bound"]) for _ in bounds),
        )
    table.add_section()
    slices = sum(len(group["modules"]) for group in document["groups"])
    numbers = document["parameters"]
    bits = sum(g["bits"] * g["parameters"] for g in document["groups"]) / max(numbers, 1)
    errors = [error(document[key]) for key in ("relative_error", *(["lower_bound"] * len(bounds)))]
    whole = ("", "", "", f"{numbers:,}", f"{bits:.2f}", *errors)
    table.add_row("all", str(slices), *whole, style="bold")
    return table


def file_line(document: Document) -> str:
    """One sentence: what a compressed adapter takes, and what it took before."""
    ratio = document["source_bytes"] / document["file_bytes"]
    change = f"{ratio:.1f} × smaller" if ratio >= 1 else f"{1 / ratio:.1f} × larger"
    return (
        f"{size(document['file_bytes'])} as written ({change} than the adapter's "
        f"{size(document['source_bytes'])})"
    )


def alternative_lines(document: Document) -> list[str]:
    """What other forms would reach at the size of a compressed adapter, one line each.

    Of one compressed by a calibration, the error in its metric.
    """
    if document["weighted_error"] is not None:
        return [
            f"error in the calibration's metric: {error(document['weighted_error'])}; the plain "
            "error is not what was kept low"
        ]
    return [
        f"{other['form']}: error {error(other['relative_error'])} at that size"
        if other["relative_error"] is not None
        else f"{other['form']}: does not get that small"
        for other in document["alternatives"]
    ]


def lora_table(document: Document) -> Table:
    """Groups of a LoRA adapter as they would share factors, and their sizes."""
    table = new_table(
        "LoRA: ΔW = B · A for every module",
        *("group", "slices", "shape", "LoRA rank", "parameters"),
    )
    for group in document["groups"]:
        table.add_row(
            shown_name(group["name"]),
            str(len(group["modules"])),
            "{} × {}".format(*group["shape"]),
            ", ".join(map(str, group["lora_ranks"])),
            f"{group['parameters']:,}",
        )
    table.add_section()
    slices = sum(len(group["modules"]) for group in document["groups"])
    table.add_row("all", str(slices), "", "", f"{document['parameters']:,}", style="bold")
    return table


def adapter_table(document: Document) -> Table:
    """The table that suits what `inspect_document` found."""
    if document["type"] == "LORA":
        return lora_table(document)
    return compressed_table(document) if "file_bytes" in document else lotr_table(document)


def difference_table(document: Document, limit: int = 10) -> Table:
    """The modules that differ most."""
    rows = sorted(document["modules"], key=lambda row: -row["relative_error"])
    title = "‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖"
    if len(rows) > limit:
        title += f", the {limit} largest of {len(rows)} modules"
    table = new_table(title, "module", "difference")
    for row in rows[:limit]:
        table.add_row(shown_name(row["name"]), error(row["relative_error"]))
    return table


def analysis_table(document: Document) -> Table:
    """Errors by size, one row a representation, the smallest error of a size in bold.

    All are predicted: converting and compressing reach them, within 5 percent for forms in bits.
    """
    choices = [choice for choice in document["choices"] if not choice["measured"]]
    budgets = list(dict.fromkeys(choice["budget"] for choice in choices))
    errors = {(c["kind"], c["budget"]): c["relative_error"] for c in choices}
    best = {b: min(c["relative_error"] for c in choices if c["budget"] == b) for b in budgets}
    headers = [
        f"{size(int(budget * document['source_bytes']))} ({budget:.0%})" for budget in budgets
    ]
    table = new_table(f"{shown_name(document['name'])}: relative error at a size", "form", *headers)
    for kind, name in {c["kind"]: c["representation"] for c in choices}.items():
        cells = []
        for budget in budgets:
            value = errors.get((kind, budget))
            text = "–" if value is None else f"{value:.3f}"
            cells.append(f"[bold]{text}[/]" if value == best[budget] else text)
        table.add_row(name, *cells)
    return table


def similarity_table(document: Document) -> Table:
    """Cosines between the updates of several adapters."""
    names = [shown_name(name) for name in document["adapters"]]
    table = new_table("cosine of the updates ΔW", "adapter", *names)
    for name, row in zip(names, document["cosine"], strict=True):
        table.add_row(name, *("–" if value is None else f"{value:.3f}" for value in row))
    return table


def size_line(document: Document) -> str:
    """One sentence: how large it is, and against what it was made from."""
    text = f"{document['parameters']:,} parameters, {size(document['bytes'])}"
    if document.get("source_bytes"):
        ratio = document["source_bytes"] / document["bytes"]
        change = f"{ratio:.1f} × smaller" if ratio >= 1 else f"{1 / ratio:.1f} × larger"
        text += (
            f" ({change} than the LoRA's {document['source_parameters']:,}, "
            f"{size(document['source_bytes'])})"
        )
    return text
