"""Line charts as inline SVG, without scripts or dependencies. CSS classes give the colours."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34

Series = tuple[str, Sequence[tuple[float, float]]]  # name, points


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between low and high, at most `most` steps apart."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """A figure with axes and a legend that shows each line's last value; at most four lines.

    Points that are not finite are left out. Returns "" if none remain.
    """
    series = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    series = [(name, points) for name, points in series if points]
    if not series:
        return ""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if y1 - y0 < 1e-9 * max(1.0, abs(y1)):  # a flat line goes in the middle of the chart
        y0, y1 = y0 - 0.5, y1 + 0.5
    pad = 0.06 * (y1 - y0)
    y0, y1 = y0 - pad, y1 + pad
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + wide * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def py(y: float) -> float:
        return TOP + tall * (1 - (y - y0) / (y1 - y0))

    parts = []
    for y in ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" '
                     f'y2="{py(y):.1f}"/><text class="tick" x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" '
                     f'text-anchor="end">{y:.4g}</text>')
    for x in ticks(x0, x1, 6):
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                     f'text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" '
                 f'text-anchor="end">{escape(x_label)}</text>')
    for number, (_, points) in enumerate(series):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        mark = (f'<circle class="dot c{number}" cx="{px(points[-1][0]):.1f}" '
                f'cy="{py(points[-1][1]):.1f}" r="3"/>')
        parts.append(f'<polyline class="line c{number}" points="{path}"/>{mark}')
    legend = "".join(f'<span class="key"><i class="c{number}"></i>{escape(name)} '
                     f'<b>{points[-1][1]:.4g}</b></span>'
                     for number, (name, points) in enumerate(series))
    return (f'<figure><figcaption>{escape(title)}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}</svg><div class="legend">{legend}</div></figure>')
