"""Line charts as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = (
    "#1f4e9c", "#c0392b", "#2e8b57", "#e08e0b", "#7d3c98", "#17a2b8", "#8d6e63", "#555555",
    "#d81b60",
)  # fmt: skip
WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 290, 40, 55


@dataclass(frozen=True)
class Series:
    """One line; a point whose y is None breaks off there."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    dots: bool = True


@dataclass(frozen=True)
class Band:
    """An area behind the lines; its points are x, and the lowest and highest y there."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Axis:
    """A label, the limits of the values, and whether they are spaced by their logarithm."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def at(self, value: float) -> float:
        """Where a value lies between the limits: 0 to 1, cut at both."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    def marks(self) -> tuple[float, ...]:
        """The values that are labelled."""
        return self.ticks or tuple(self.low + (self.high - self.low) * n / 5 for n in range(6))


def line_chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], bands: Sequence[Band] = ()
) -> str:
    """A chart with its legend on the right. What lies outside an axis is drawn at its edge."""
    drawn = [_band(b, x, y, n) for n, b in enumerate(bands, len(series))]
    drawn += [_line(s, x, y, n) for n, s in enumerate(series)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            _text(LEFT, 24, title, size=15),
            *(_x_mark(x, value) for value in x.marks()),
            *(_y_mark(y, value) for value in y.marks()),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x.label, anchor="middle"),
            _text(18, HEIGHT / 2, y.label, anchor="middle", turned=True),
            *drawn,
            "</svg>",
            "",
        ]
    )


def below_one_another(charts: Sequence[str]) -> str:
    """Several charts as one picture."""
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    placed = [
        chart.replace("<svg ", f'<svg y="{HEIGHT * n}" {size} ', 1)
        for n, chart in enumerate(charts)
    ]
    view = f'viewBox="0 0 {WIDTH} {HEIGHT * len(charts)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n{"".join(placed)}</svg>\n'


def _place(x: Axis, y: Axis, point: tuple[float, float]) -> tuple[float, float]:
    across, up = x.at(point[0]), y.at(point[1])
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + across * width, HEIGHT - BOTTOM - up * height


def _line(series: Series, x: Axis, y: Axis, number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    style = f'stroke="{colour}" stroke-width="2" fill="none"'
    style += ' stroke-dasharray="6 4"' if series.dashed else ""
    places = [_place(x, y, (px, py)) for px, py in series.points if py is not None]
    return "\n".join(
        [
            f'<polyline points="{_path(places)}" {style}/>',
            *(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="{colour}"/>'
                for px, py in places
                if series.dots
            ),
            _legend(series.name, number, style),
        ]
    )


def _band(band: Band, x: Axis, y: Axis, number: int) -> str:
    below = [_place(x, y, (px, low)) for px, low, _ in band.points]
    above = [_place(x, y, (px, high)) for px, _, high in reversed(band.points)]
    area = f'<polygon points="{_path([*below, *above])}" fill="#bbb"/>'
    return area + "\n" + _legend(band.name, number, 'stroke="#bbb" stroke-width="10"')


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in places)


def _legend(name: str, number: int, style: str) -> str:
    left, height = WIDTH - RIGHT + 18, TOP + 12 + 20 * number
    line = f'<line x1="{left}" y1="{height}" x2="{left + 24}" y2="{height}" {style}/>'
    return line + "\n" + _text(left + 30, height + 4, name)


def _x_mark(axis: Axis, value: float) -> str:
    px = LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)
    grid = f'<line x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>'
    return grid + _text(px, HEIGHT - BOTTOM + 18, f"{value:.4g}", anchor="middle")


def _y_mark(axis: Axis, value: float) -> str:
    py = HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)
    grid = f'<line x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" stroke="#ddd"/>'
    return grid + _text(LEFT - 8, py + 4, f"{value:.4g}", anchor="end")


def _text(
    px: float, py: float, text: str, size: int = 12, anchor: str = "start", turned: bool = False
) -> str:
    turn = f' transform="rotate(-90 {px:.1f} {py:.1f})"' if turned else ""
    where = f'x="{px:.1f}" y="{py:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {where}{turn}>{escape(text)}</text>"
