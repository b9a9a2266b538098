"""Files from strangers: what is decoded, how, and what is refused before it is unpacked."""

import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from craftor.uploads import Limits, UploadRefused, mask, picture


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bars(width: int = 6, height: int = 4) -> Image.Image:
    """Red on the left half, blue on the right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def _claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_pixels_arrive_as_they_are() -> None:
    found = picture(_file(_bars()))
    assert found.image.shape == (3, 4, 6) and found.alpha is None
    assert found.image[:, 0, 0].tolist() == [1, 0, 0] and found.image[:, 0, -1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("side", [5000, 60_000])
def test_a_decompression_bomb_is_refused_unopened(side: int) -> None:
    with pytest.raises(UploadRefused, match="pixels"):
        picture(_claiming(side, side))


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(UploadRefused, match="1048576 bytes; allowed: at most 1000"):
        picture(b"\0" * (1 << 20), Limits(max_bytes=1000))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    whole = _file(noise, kind)
    with pytest.raises(UploadRefused, match="broken or cut short|not a picture"):
        picture(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    data = _file(_bars(), kind, save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 255, 0))])
    with pytest.raises(UploadRefused, match="2 frames"):
        picture(data)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", _file(_bars(), "BMP")])
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(UploadRefused, match="allowed format"):
        picture(data)


def test_a_camera_s_rotation_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the sensor's top row is the picture's right side
    found = picture(_file(_bars(), "JPEG", exif=exif, quality=95))
    assert found.image.shape == (3, 6, 4)
    assert found.image[0, 0].mean() > 0.8 and found.image[2, -1].mean() > 0.8


def test_inks_become_light() -> None:
    inks = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    found = picture(_file(inks, "JPEG", quality=95))
    assert found.image[0].mean() > 0.8 and found.image[1].mean() < 0.2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept_apart(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    data = _file(image.convert("P"), transparency=0) if mode == "P" else _file(image.convert(mode))
    found = picture(data)
    assert found.image.shape == (3, 4, 4) and found.alpha is not None
    if mode != "P":
        assert torch.equal(found.alpha[0, 0], torch.tensor([0.0, 0, 1, 1]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_channel_that_is_opaque_everywhere_is_no_transparency(mode: str) -> None:
    """Many programs write one: as an object's mask it would be the whole picture."""
    assert picture(_file(Image.new("RGBA", (4, 4), (255, 0, 0, 255)).convert(mode))).alpha is None


def test_sixteen_bits_are_refused_rather_than_clipped() -> None:
    with pytest.raises(UploadRefused, match="8 bits a channel"):
        picture(_file(Image.new("I;16", (4, 4), 40_000)))


def test_a_mask_is_brightness_or_opacity() -> None:
    bright = Image.new("L", (4, 2), 0)
    bright.paste(255, (2, 0, 4, 2))
    assert mask(_file(bright))[0, 0].tolist() == [0, 0, 1, 1]
    clear = Image.new("RGBA", (4, 2), (9, 9, 9, 0))
    clear.paste((9, 9, 9, 255), (2, 0, 4, 2))
    assert mask(_file(clear))[0, 0].tolist() == [0, 0, 1, 1]
    painted = bright.convert("RGBA")  # as an editor saves it, opaque everywhere
    assert mask(_file(painted))[0, 0].tolist() == [0, 0, 1, 1]


def test_a_second_picture_behind_a_camera_s_jpeg_is_no_animation() -> None:
    data = _file(_bars(), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))], quality=95)
    found = picture(data)
    assert found.image.shape == (3, 4, 6) and found.image[0, 0, 0] > 0.8


def test_one_size_alone_is_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = _file(_bars(), "JPEG", exif=exif)
    assert picture(lying, Limits(size=(4, 6))).image.shape == (3, 6, 4)
    for size, found in (((6, 4), "4x6"), ((5, 5), "6x4")):
        with pytest.raises(UploadRefused, match=f"image: {found} pixels, allowed: {size[0]}x{size[1]}"):
            picture(lying, Limits(size=size))
