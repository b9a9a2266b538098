"""Pictures of the same prompts by several makers -> PNG contact sheets: a row a prompt, a column a maker."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from craftor.figures import LIGHT

ROWS = 8
_SIDE, _GAP, _TOP, _CAPTION = 192, 10, 44, 40


@dataclass(frozen=True)
class Strip:
    """One prompt's pictures, in the order of the columns."""

    prompt: str
    pictures: Sequence[Image.Image]


def save_sheets(folder: Path, columns: Sequence[str], strips: Sequence[Strip]) -> list[Path]:
    """Write `contact-1.png` and so on, eight prompts to a sheet; returns their paths."""
    paths = []
    for number, start in enumerate(range(0, len(strips), ROWS), start=1):
        paths.append(folder / f"contact-{number}.png")
        _sheet(columns, strips[start : start + ROWS]).save(paths[-1])
    return paths


def shortened(name: str, length: int = 24) -> str:
    """Both ends of it: names of runs often differ in the last."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 - length // 2 :]}"


def _sheet(columns: Sequence[str], strips: Sequence[Strip]) -> Image.Image:
    width = _GAP + len(columns) * (_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _TOP + len(strips) * (_CAPTION + _SIDE + _GAP)), "white")
    draw, head, body = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(13)
    for column, name in enumerate(columns):
        left = _GAP + column * (_SIDE + _GAP)
        draw.text((left, 14), shortened(name), fill=LIGHT.ink, font=head)
    for row, strip in enumerate(strips):
        top = _TOP + row * (_CAPTION + _SIDE + _GAP)
        letters = max(20, int((width - 2 * _GAP) / body.getlength("n")))
        lines = textwrap.wrap(strip.prompt, letters, max_lines=2, placeholder=" …")
        draw.multiline_text((_GAP, top + 2), "\n".join(lines), fill=LIGHT.muted, font=body, spacing=3)
        for column, picture in enumerate(strip.pictures):
            # Small pictures are enlarged pixel by pixel: no blur that a model did not make.
            method = Image.Resampling.NEAREST if picture.width <= _SIDE else Image.Resampling.LANCZOS
            place = (_GAP + column * (_SIDE + _GAP), top + _CAPTION)
            sheet.paste(picture.convert("RGB").resize((_SIDE, _SIDE), method), place)
    return sheet
