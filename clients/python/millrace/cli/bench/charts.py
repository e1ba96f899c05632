"""Small charts as inline SVG: lines, steps and dots over linear or logarithmic axes.

Colours are classes, which the page that holds the charts defines: `c0`, `c1` for series, `bad` for
failures, `limit` for objectives, `grid` and `axis` for the frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 40


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high`, laid out from pixel `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self._of(self.low), self._of(self.high)
        part = (self._of(value) - low) / (high - low)
        return self.start + part * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values, about five."""
        if not self.is_log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(decades) < 5 else (1,)
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        return [tick for tick in ticks if self.low <= tick <= self.high]

    def _of(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value


@dataclass(slots=True)
class Chart:
    """A chart that marks are added to; `svg` gives it.

    Args:
        x_range, y_range: of the values; widened where they are empty.
        unit: of x ticks; y has `y_unit`.
        is_count_y: what y shows are whole numbers.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    unit: str = ""
    y_unit: str = ""
    is_log_x: bool = False
    is_count_y: bool = False
    _marks: list[str] = field(default_factory=list)

    @property
    def x(self) -> Scale:
        """The horizontal scale."""
        low, high = self.x_range
        if self.is_log_x:
            low = max(low, high / 1e6, 1e-6)
            low, high = low * 0.9, max(high, low * 1.2) * 1.1
        return Scale(low, max(high, low + 1e-9), _LEFT, WIDTH - _RIGHT, self.is_log_x)

    @property
    def y(self) -> Scale:
        """The vertical scale; pixels count down."""
        low, high = self.y_range
        return Scale(low, high if high > low else low + 1, HEIGHT - _BOTTOM, _TOP)

    def line(self, points: Points, css: str, *, is_filled: bool = False) -> None:
        """A line through `points`, and the area under it."""
        if not points:
            return
        x, y = self.x, self.y
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
        if is_filled:
            floor = y.at(y.low)
            first, last = x.at(points[0][0]), x.at(points[-1][0])
            self._marks.append(
                f'<polygon class="{css} area" points="{first:.1f},{floor:.1f} {path} '
                f'{last:.1f},{floor:.1f}"/>'
            )
        self._marks.append(f'<polyline class="{css} line" points="{path}"/>')

    def dots(self, points: Points, css: str) -> None:
        """A dot at each of `points`."""
        x, y = self.x, self.y
        self._marks += [
            f'<circle class="{css} dot" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5"/>'
            for a, b in points
        ]

    def vertical(self, value: float, text: str, css: str, row: int = 0) -> None:
        """A vertical rule at `value`, named at its foot, where distributions are low.

        Args:
            row: names of rules that may lie close stand in rows of their own, from the foot on.
        """
        at = self.x.at(value)
        if not _LEFT <= at <= WIDTH - _RIGHT:
            return
        is_right = at > WIDTH - 130
        anchor, shift = ("end", -4) if is_right else ("start", 4)
        self._marks.append(
            f'<line class="{css} rule" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" '
            f'y2="{HEIGHT - _BOTTOM}"/><text class="{css} name" x="{at + shift:.1f}" '
            f'y="{HEIGHT - _BOTTOM - 8 - 15 * row}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def horizontal(self, value: float, text: str, css: str) -> None:
        """A horizontal rule at `value`, named."""
        at = self.y.at(value)
        if _TOP <= at <= HEIGHT - _BOTTOM:
            self._marks.append(
                f'<line class="{css} rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" '
                f'y2="{at:.1f}"/><text class="{css} name" x="{WIDTH - _RIGHT}" y="{at - 4:.1f}" '
                f'text-anchor="end">{escape(text)}</text>'
            )

    def svg(self, title: str) -> str:
        """The chart; `title` is for those who cannot see it."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"{self._frame()}{''.join(self._marks)}</svg>"
        )

    def _frame(self) -> str:
        x, y = self.x, self.y
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y.at(t) + 4:.1f}" text-anchor="end">'
            f"{number(t)}{self.y_unit}</text>"
            for t in y.ticks()
            if not self.is_count_y or t == round(t)
        ]
        parts += [
            f'<line class="grid" x1="{x.at(t):.1f}" x2="{x.at(t):.1f}" y1="{_TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{x.at(t):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{number(t)}{self.unit}</text>"
            for t in x.ticks()
        ]
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="tick" x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(self.x_label)}</text>"
        )
        return "".join(parts)


def number(value: float) -> str:
    """A tick's text: `0.5`, `20`, `1.5k`."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{round(value, 6):g}"


def _round_step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((n * power for n in (1, 2, 5) if n * power >= rough), 10 * power)
