"""The tokens of a reply in colour, by a number that each of them has: its log-probability, say, or
whether it carries loss.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from PIL import Image, ImageDraw, ImageFont

COLOURS = "Blues"  # from white to dark blue, which also shows in grey
DARKEST = 0.6  # of COLOURS: black text stays readable
WIDTH, LINE, MARGIN = 760, 26, 8  # pixels of the picture, of one of its lines, of its border


@dataclass(frozen=True, repr=False)
class ColouredTokens:
    """Coloured text for a notebook: HTML with the numbers as tool tips, and the same as a picture,
    for a page that shows no styles. title: what it shows, also where there is no picture.
    """

    html: str
    image: Image.Image
    title: str

    def __repr__(self) -> str:
        return self.title or "Coloured tokens"

    def _repr_html_(self) -> str:
        return self.html

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def colour_tokens(tokens: Sequence[str], values: Sequence[float], title: str = "",
                  low: float | None = None, high: float | None = None,
                  number_format: str = ".2f") -> ColouredTokens:
    """The tokens one after the other, each on a ground that is the darker the larger its value.

    values: one a token; low, high: those that are white and darkest, by default the smallest and
    the largest. number_format: of the tool tips. Everything is escaped. ValueError where there is
    not one value for each token.
    """
    if len(tokens) != len(values):
        raise ValueError(f"there are {len(tokens)} tokens and {len(values)} values; give one value "
                         "for each token")
    values = [float(value) for value in values]
    low = min(values, default=0.0) if low is None else low
    high = max(values, default=0.0) if high is None else high
    span = (high - low) or 1.0
    colours = [_colour(min(1.0, max(0.0, (value - low) / span))) for value in values]
    shown = [token.replace("\n", "\\n") for token in tokens]
    tips = [format(value, number_format) for value in values]
    return ColouredTokens(_write_html(shown, colours, tips, title), _draw(shown, colours, title),
                          title)


def _colour(share: float) -> str:
    """#rrggbb of a share in 0..1."""
    return matplotlib.colors.to_hex(matplotlib.colormaps[COLOURS](share * DARKEST))


def _write_html(tokens: list[str], colours: list[str], tips: list[str], title: str) -> str:
    spans = "".join(
        f'<span style="background:{colour};color:#000;border-right:1px solid #fff;'
        f'white-space:pre-wrap" title="{escape(tip)}">{escape(token)}</span>'
        for token, colour, tip in zip(tokens, colours, tips))
    head = f"<b>{escape(title)}</b><br>" if title else ""
    style = f"font-family:monospace;line-height:1.9;max-width:{WIDTH}px"
    return f'<div style="{style}">{head}{spans}</div>'


def _draw(tokens: list[str], colours: list[str], title: str) -> Image.Image:
    """The same as a picture of WIDTH pixels."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(16)
    places, x, y = [], MARGIN, MARGIN
    head = textwrap.wrap(title, WIDTH // 9)
    y += LINE * len(head)
    for token in tokens:
        width = round(font.getlength(token)) + 3
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y = MARGIN, y + LINE
        places.append((x, y, width))
        x += width
    page = Image.new("RGB", (WIDTH, y + LINE + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    pen.multiline_text((MARGIN, MARGIN), "\n".join(head), fill="#111111", font=bold)
    for token, colour, (x, y, width) in zip(tokens, colours, places):
        pen.rectangle((x, y, x + width - 2, y + LINE - 5), fill=colour)
        pen.text((x + 1, y + 1), token, fill="#000000", font=font)
    return page
