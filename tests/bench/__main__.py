"""Print what `tests.bench` measures, as tables; ``--json FILE`` keeps that of the core, too.

Whole commands (`tests.bench.bench_commands`) first, which keep their own file, then the core.
About a quarter of an hour, most of it TensorLy's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import bench_commands, bench_core


def main() -> None:
    """Run every measurement."""
    with tempfile.TemporaryDirectory() as scratch:
        found = bench_commands.measure(Path(scratch), bench_commands.RUNS)
    if "--json" in sys.argv:
        bench_commands.keep(found, bench_commands.JSON)
    print(bench_commands.table(found))
    rows = bench_core.run()
    if "--json" in sys.argv:
        target = Path(sys.argv[sys.argv.index("--json") + 1])
        target.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=140).print(table)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
