"""Writing and drawing the rows of all benchmarks."""

import csv
from pathlib import Path
from types import ModuleType

from srit.runtime.files import atomic_write


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows atomically. The columns are the keys of all rows, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a display; SVG files keep text as text."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot

    return matplotlib.pyplot
