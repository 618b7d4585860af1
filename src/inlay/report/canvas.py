"""What every plot shares: two palettes, two widths, and the way from a matplotlib figure to a clean SVG.

A `Plot` is a recipe, not a picture. It is painted on demand on a `Canvas` for one of four situations: light or dark,
wide (a screen, a page of paper) or narrow (a phone, where a shrunk wide plot would have unreadable labels). Only
matplotlib's object API is used; its settings are changed inside a context and put back.

Text stays text in the SVG, so that it can be selected, searched and read aloud, and takes the page's own font. The
layout is measured with DejaVu Sans, which is wider than the fonts of the stack, so labels have room wherever the page
is opened.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MplFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from inlay.files import write_whole
from inlay.report.document import Figure, ReportError

FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
TEXT_SIZE = 9.0
TITLE_SIZE = 11.0
_WIDTH_WIDE, _WIDTH_NARROW = 6.9, 3.7
_PNG_FONTS = ("Inter", "Helvetica Neue", "Segoe UI", "Arial", "Liberation Sans", "DejaVu Sans")


@dataclass(frozen=True)
class Theme:
    """Colours of one mode, as `#rrggbb`; `series` can be told apart by colour-blind readers."""

    page: str
    ink: str
    muted: str
    rule: str
    baseline: str
    series: tuple[str, ...]


LIGHT = Theme(
    page="#ffffff",
    ink="#1b1e23",
    muted="#5c636d",
    rule="#e3e6ea",
    baseline="#6a717b",
    series=("#1d5fc2", "#b84a00", "#00786a", "#a0307a", "#7a5c00"),
)
DARK = Theme(
    page="#101317",
    ink="#e9ebee",
    muted="#a3aab4",
    rule="#2b3139",
    baseline="#9aa3ae",
    series=("#7ab0ff", "#ffa25e", "#45d0bb", "#f08fc4", "#e0c050"),
)


@dataclass(frozen=True)
class Canvas:
    """An empty matplotlib figure with the palette to paint it in."""

    figure: Any
    theme: Theme
    narrow: bool

    @property
    def width(self) -> float:
        """Width in points, the unit of text sizes."""
        return float(self.figure.get_figwidth()) * 72

    def color(self, index: int) -> str:
        """Colour of series `index`; the palette repeats when it runs out."""
        return self.theme.series[index % len(self.theme.series)]

    def fits_beside(self, labels: Sequence[str]) -> bool:
        """Whether labels of this length may stand to the right of the axes rather than below them."""
        longest = max((len(label) for label in labels), default=0)
        return longest * TEXT_SIZE * 0.6 < 0.27 * self.width

    def wrap(self, text: str, size: float) -> str:
        """`text` broken into as few lines as fit the figure's width at `size` points, of about the same length."""
        width = max(20, int(self.width / (size * 0.62)))
        lines = len(textwrap.wrap(text, width))
        while width > 20 and len(textwrap.wrap(text, width - 1)) <= lines:
            width -= 1
        return textwrap.fill(text, width)


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn in any mode. Made by the functions of `inlay.report.plots`.

    Attributes:
        title: Heading inside the picture.
        paint: Draws onto an empty canvas.
        alt: What the plot shows, in words, for readers who cannot see it.
        heights: Height in inches, wide and narrow (the widths are 6.9 and 3.7 inches).
        note: What could not be drawn and why; empty if everything was.
        empty: True if nothing at all could be drawn. `figure()` then carries only the note.
        mixes_colors: True if it shows others than those of its theme, which then cannot be told apart in its SVG.
    """

    title: str
    paint: Callable[[Canvas], None]
    alt: str
    heights: tuple[float, float] = (3.5, 3.3)
    note: str = ""
    empty: bool = False
    mixes_colors: bool = False

    def svg(self, *, dark: bool = False, narrow: bool = False) -> str:
        """One `<svg>` element with a transparent background, without prolog, metadata or style sheet."""
        buffer = io.StringIO()
        with self._painted(dark, narrow, "DejaVu Sans") as figure:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _clean(buffer.getvalue())

    def figure(self, caption: str = "", alt: str | None = None) -> Figure:
        """The plot as an item of a report, drawn light and dark, wide and narrow.

        Args:
            caption: Sentence under the plot; inline markup as in `Text`.
            alt: Replaces the description made from the data.
        """
        alt = self.alt if alt is None else alt
        if self.empty:
            return Figure(
                "", "", caption=caption, alt=alt, note=f"{self.title}. {self.note}" if self.title else self.note
            )
        wide, narrow = self.svg(), self.svg(narrow=True)
        return Figure(
            light_svg=wide,
            dark_svg=self.svg(dark=True) if self.mixes_colors else _darkened(wide),
            caption=caption,
            alt=alt,
            note=self.note,
            narrow_light_svg=narrow,
            narrow_dark_svg=self.svg(dark=True, narrow=True) if self.mixes_colors else _darkened(narrow),
        )

    @contextmanager
    def _painted(self, dark: bool, narrow: bool, font: str) -> Iterator[Any]:
        theme = DARK if dark else LIGHT
        size = (_WIDTH_NARROW, self.heights[1]) if narrow else (_WIDTH_WIDE, self.heights[0])
        with mpl.rc_context(_settings(theme, font)), warnings.catch_warnings():
            # The browser has glyphs that the font used for measuring lacks.
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
            layout = ConstrainedLayoutEngine(w_pad=0.005, h_pad=0.03, hspace=0.06)
            figure = MplFigure(figsize=size, layout=layout)
            FigureCanvasAgg(figure)
            canvas = Canvas(figure, theme, narrow)
            if self.title:
                title = canvas.wrap(self.title, TITLE_SIZE)
                figure.set_figheight(size[1] + title.count("\n") * TITLE_SIZE * 1.3 / 72)
                figure.suptitle(title, x=0, ha="left", fontsize=TITLE_SIZE, fontweight="bold")
            if self.empty:
                figure.text(0.5, 0.45, canvas.wrap(self.note, TEXT_SIZE), ha="center", va="center", color=theme.muted)
            else:
                self.paint(canvas)
            yield figure


def save_png(plot: Plot, path: str | Path, *, dark: bool = False, narrow: bool = False) -> Path:
    """Write `plot` as a PNG at twice the screen's resolution (192 dots per inch) on an opaque page colour.

    The file appears whole or not at all: it is written beside `path` and moved into place.

    Args:
        plot: What to draw.
        path: Target file; its folder is made if missing.
        dark: Use the dark palette.
        narrow: Draw the phone layout.

    Returns:
        The path written.

    Raises:
        ReportError: `path` does not end in `.png`.
        OSError: It cannot be written, or is a folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ReportError(f"save_png writes PNG files, got {path.name!r}: give the file a name that ends in .png")
    installed = set(font_manager.get_font_names())
    font = next((name for name in _PNG_FONTS if name in installed), "DejaVu Sans")
    buffer = io.BytesIO()
    with plot._painted(dark, narrow, font) as figure:
        page = (DARK if dark else LIGHT).page
        figure.savefig(buffer, format="png", dpi=192, facecolor=page, bbox_inches=figure.bbox_inches.padded(0.2))
    return write_whole(path, buffer.getvalue())


def _settings(theme: Theme, font: str) -> dict[str, Any]:
    return {
        "font.family": [font],
        "font.size": TEXT_SIZE,
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.labelcolor": theme.muted,
        "axes.labelsize": TEXT_SIZE,
        "axes.linewidth": 0.7,
        "axes.unicode_minus": True,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": TEXT_SIZE,
        "ytick.labelsize": TEXT_SIZE,
        "xtick.major.size": 3.0,
        "xtick.major.width": 0.7,
        "ytick.major.size": 0.0,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "inlay",
        "path.simplify": True,
        "savefig.bbox": None,
    }


def _colors(theme: Theme) -> list[str]:
    return [theme.page, theme.ink, theme.muted, theme.rule, theme.baseline, *theme.series]


_DARK_FOR = dict(zip(_colors(LIGHT), _colors(DARK), strict=True))


def _darkened(svg: str) -> str:
    """What a plot painted in the light theme is in the dark one, without painting it again."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda color: _DARK_FOR.get(color.group(), color.group()), svg)


def _clean(svg: str) -> str:
    """Cut what an inlined SVG must not bring along, and hand the choice of font to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)
    return re.sub(r"'DejaVu Sans'(, [^;\"]*)?", FONT_STACK, svg).strip() + "\n"
