"""Pictures in requests: whatever is wrong with a file is said in words, and no file makes anything else happen."""

import io

import numpy as np
import pytest
from PIL import Image

from craftor.serving.upload import read
from craftor.uploads import Limits, UploadRefused

SIZE = (32, 48)
"""Height, width."""
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def packed(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", Limits().formats)
def test_pictures_come_in_three_formats(kind: str) -> None:
    found = read(packed(Image.fromarray(PIXELS), kind), None, 0.5, SIZE)
    assert found.image.shape == (3, *SIZE) and found.mask is None
    if kind == "PNG":
        assert (found.image.movedim(0, -1).numpy() * 255).round().astype(np.uint8).tobytes() == PIXELS.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_masks_are_white_where_to_draw(mode: str) -> None:
    shown = np.zeros(SIZE, dtype=np.uint8)
    shown[:, 24:] = 255
    mask = packed(Image.fromarray(shown).convert(mode))
    found = read(packed(Image.fromarray(PIXELS)), mask, 0.5, SIZE)
    assert found.mask is not None and found.mask.shape == (1, *SIZE)
    assert found.mask[..., 24:].eq(1).all() and found.mask[..., :24].eq(0).all()
    assert found.sha256 != found.mask_sha256


GOOD = packed(Image.fromarray(PIXELS))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", r"not a picture of an allowed format \(PNG, JPEG, WEBP\); UnidentifiedImageError"),
        (b"hello", "not a picture"),
        (GOOD[: len(GOOD) // 2], "broken or cut short"),
        (packed(Image.fromarray(PIXELS), "GIF"), "not a picture"),
        (packed(Image.fromarray(PIXELS), "TIFF"), "not a picture"),
        (packed(Image.new("RGB", (32, 48))), "32x48 pixels, allowed: 48x32, the size asked for"),
        (packed(Image.new("RGB", (20_000, 20_000))), "far more pixels"),
        (
            packed(Image.fromarray(np.zeros(SIZE, dtype=np.uint16))),
            "pixels of kind I;16; allowed: 8 bits a channel",
        ),
    ],
)
@pytest.mark.parametrize("param", ["image", "mask"])
def test_bad_pictures_are_named(sent: bytes, message: str, param: str) -> None:
    pair = (sent, None) if param == "image" else (GOOD, sent)
    with pytest.raises(UploadRefused, match=f"{param}: .*({message})") as refused:
        read(*pair, 0.5, SIZE)
    assert refused.value.what == param


@pytest.mark.parametrize("kind", Limits().formats)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    good, drawn = packed(Image.fromarray(PIXELS), kind), np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        bad = np.frombuffer(good, dtype=np.uint8).copy()
        bad[drawn.integers(0, len(bad), 1 + drawn.integers(8))] = drawn.integers(256)
        bad = bad[: drawn.integers(1, len(bad) + 1)] if drawn.uniform() < 0.3 else bad
        try:
            read(bad.tobytes(), None, 0.5, SIZE)
        except UploadRefused:
            refused += 1
    assert refused > 30
