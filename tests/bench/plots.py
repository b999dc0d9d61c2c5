"""Figures against the load as pictures: bars of letters for a terminal, lines in SVG for a page. No dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_BAR = 60
_LEFT, _TOP, _RIGHT, _BOTTOM = 20, 40, 620, 260


class Line(NamedTuple):
    """One value for each load; `most` is the top of the picture, and what is more runs along it."""

    name: str
    colour: str
    values: Sequence[float]
    most: float


def bars(loads_name: str, loads: Sequence[float], line: Line) -> None:
    """Print a bar for each load; one that is more than the line's `most` ends with `>`."""
    print(f"\n{line.name}, against {loads_name}\n")
    for load, value in zip(loads, line.values, strict=True):
        length = round(min(value / line.most, 1.0) * _BAR)
        print(f"{load:>6g} |{'#' * length}{'>' if value > line.most else ''} {value:.1f}")


def svg(loads_name: str, loads: Sequence[float], lines: Sequence[Line]) -> str:
    """A picture of the lines against ascending loads."""

    def across(load: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * load / max(loads)

    def up(share: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * min(share, 1.0)

    drawn = [f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="black"/>']
    for place, line in enumerate(lines):
        points = " ".join(f"{across(x):.1f},{up(y / line.most):.1f}" for x, y in zip(loads, line.values, strict=True))
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}"/>')
        name = f"{line.name} (top: {line.most:g})"
        drawn.append(f'<text x="{_LEFT + 200 * place}" y="{_TOP - 15}" fill="{line.colour}">{name}</text>')
    drawn += [f'<text x="{across(x):.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{x:g}</text>' for x in loads]
    drawn.append(f'<text x="{_RIGHT}" y="{_BOTTOM + 32}" text-anchor="end">{loads_name}</text>')
    attributes = 'viewBox="0 0 640 300" font-family="sans-serif" font-size="10"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>', *drawn, "</svg>\n"])
