"""How every benchmark here keeps and draws its rows."""

import csv
from pathlib import Path
from types import ModuleType

from srit.runtime.files import atomic_write


def write_csv(rows: list[dict], path: Path) -> None:
    """One line a row, under the names of all rows in the order they appear; whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a screen, whose SVG files keep text as text."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot

    return matplotlib.pyplot
