"""`preprocess` against PIL, the reference of every tower: values within 8-bit rounding, gradient wherever one looks."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from craftor_rewards.preprocess import CLIP_MEAN, CLIP_STD, preprocess

SIZE = 224
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHAPES = [(512, 512), (768, 768), (1216, 832), (300, 500), (128, 128)]


@cache
def photograph(height: int, width: int) -> np.ndarray:
    """What a photograph has: detail of every scale falling as 1/f, smooth shading, hard edges, saturated checks."""
    random = np.random.default_rng(height)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / (height + width)
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width))) / frequency
    image = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    image = 128 + 60 * image / image.std()
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(8):
        centre_x, centre_y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(5, width / 4)
        image[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] = random.uniform(0, 255, 3)
    image[: height // 5, : width // 5] = 255 * ((x + y)[: height // 5, : width // 5, None] % 2)
    return image.clip(0, 255).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def black_and_white(height: int, width: int) -> np.ndarray:
    """Noise of two values: half of what a bicubic filter makes of it is outside [0, 1] before PIL cuts it off."""
    return np.random.default_rng(2).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


def array(images: torch.Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).numpy()


def assert_within_8_bits(ours: torch.Tensor, reference: Image.Image) -> None:
    """PIL rounds to 8 bits after each axis, so at most 0.5 / 255 x (1 + the filter's weights' absolute sum, 1.25)."""
    levels = array(ours) * 255
    error = np.abs(levels - np.asarray(reference))
    assert error.max() <= 1.125, error.max()
    assert np.abs(levels.round() - np.asarray(reference)).max() <= 1, "one level of 255"
    assert np.sqrt((error**2).mean()) < 0.45


@pytest.mark.parametrize("draw", [photograph, noise, black_and_white])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_is_what_pil_gives(draw, shape):
    image = draw(*shape)
    (height, width), short = shape, min(shape)
    pil = Image.fromarray(image).resize((SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC)
    for fit, halve in (("crop", lambda margin: margin // 2), ("crop_torchvision", lambda margin: round(margin / 2))):
        left, top = halve(pil.width - SIZE), halve(pil.height - SIZE)
        reference = pil.crop((left, top, left + SIZE, top + SIZE))
        for clamp in ("hard", "straight_through"):
            assert_within_8_bits(preprocess(tensor(image), SIZE, fit=fit, clamp=clamp, **PLAIN), reference)


def test_the_two_crops_differ_where_half_a_pixel_is_left_over():
    image = tensor(photograph(1216, 832))  # 327 rows: a margin of 103
    transformers, torchvision = (preprocess(image, SIZE, fit=fit, **PLAIN) for fit in ("crop", "crop_torchvision"))
    torch.testing.assert_close(transformers[:, :, 1:], torchvision[:, :, :-1])


@pytest.mark.parametrize("draw", [photograph, noise])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_letterbox_is_a_resize_of_tensors_with_black_bars(draw, shape):
    """HPSv2 resizes floating point. PIL's mode F does too: bicubic without 8-bit rounding and without cutting off."""
    image = draw(*shape)
    (height, width), long = shape, max(shape)
    new = (round(width * SIZE / long), round(height * SIZE / long))
    reference = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    left, top = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
    for channel in range(3):
        plane = Image.fromarray(image[..., channel].astype(np.float32) / 255).resize(new, Image.Resampling.BICUBIC)
        reference[top : top + new[1], left : left + new[0], channel] = np.asarray(plane)
    ours = preprocess(tensor(image), SIZE, fit="letterbox", clamp="none", mean=CLIP_MEAN, std=CLIP_STD)
    normalised = (reference - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert np.abs(array(ours) - normalised).max() < 1e-4, "float32 sums; a level of 255 would be 0.015"


@pytest.mark.parametrize("shape", [(500, 300), (300, 501), (256, 256)], ids=str)
def test_pad_mean_is_a_square_of_the_mean_colour_then_a_resize(shape):
    image, side = photograph(*shape), max(shape)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP_MEAN))
    square.paste(Image.fromarray(image), ((side - shape[1]) // 2, (side - shape[0]) // 2))
    reference = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    ours = preprocess(tensor(image), SIZE, fit="pad_mean", clamp="hard", mean=CLIP_MEAN, std=CLIP_STD)
    levels = 255 * (array(ours) * np.float32(CLIP_STD) + np.float32(CLIP_MEAN))
    # The reference cuts its mean colour to 8 bits, up to one level more.
    assert np.abs(levels - reference).max() <= 2.125
    if shape[0] > shape[1]:
        assert ours[..., 0].abs().max() < 1e-5, "what is added is zero to the tower"


@pytest.mark.parametrize("fit", ["crop", "crop_torchvision", "letterbox", "pad_mean"])
@pytest.mark.parametrize("resize", ["bicubic", "average_pool"])
@pytest.mark.parametrize("shape", [(96, 96), (96, 64), (40, 56)], ids=str)
def test_every_pixel_that_is_seen_has_gradient(fit, resize, shape):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    out = preprocess(images, 48, fit=fit, resize=resize)
    assert out.shape == (2, 3, 48, 48) and out.dtype == torch.float32
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    gradient = images.grad
    if fit.startswith("crop"):
        height, width = shape
        short, scale = min(shape), min(shape) / 48
        reach = round(short / 2 - 2 * max(scale, 1))  # the crop less the filter's support
        gradient = gradient[:, :, height // 2 - reach : height // 2 + reach, width // 2 - reach : width // 2 + reach]
    assert gradient.numel() and (gradient != 0).all()


def test_clamps_differ_in_value_and_in_gradient():
    images = tensor(black_and_white(64, 64))
    out, gradient = {}, {}
    for clamp in ("none", "straight_through", "hard"):
        leaf = images.clone().requires_grad_(True)
        out[clamp] = preprocess(leaf, 96, clamp=clamp, **PLAIN)
        out[clamp].sum().backward()
        gradient[clamp] = leaf.grad
    assert out["none"].min() < -0.05 and out["none"].max() > 1.05
    assert out["hard"].min() == 0 and out["hard"].max() == 1
    torch.testing.assert_close(out["straight_through"], out["hard"])
    torch.testing.assert_close(gradient["straight_through"], gradient["none"], rtol=1e-4, atol=1e-4)
    assert (gradient["hard"] - gradient["none"]).abs().max() > 0.1
    for clamp in ("none", "straight_through", "hard"):
        assert torch.equal(preprocess(images, 64, clamp=clamp, **PLAIN), images), "images of the right size stay"


def test_average_pool_is_the_papers():
    images = tensor(photograph(512, 512))
    expected = F.adaptive_avg_pool2d(images, SIZE)
    torch.testing.assert_close(preprocess(images, SIZE, resize="average_pool", clamp="none", **PLAIN), expected)
    assert (preprocess(images, SIZE, **PLAIN) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "stretch"}, "unknown fit 'stretch'; available: crop, "),
        ({"resize": "bilinear"}, "unknown resize 'bilinear'; available: bicubic, average_pool"),
        ({"clamp": "soft"}, "unknown clamp 'soft'; available: none, "),
    ],
)
def test_unknown_options_say_what_there_is(options, message):
    with pytest.raises(ValueError, match=message):
        preprocess(torch.rand(1, 3, 8, 8), 16, **options)
