"""Kernels and layouts that are chosen for speed: the same numbers, but for rounding."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from torch import nn

from craftor import precision
from craftor.decode import decode
from craftor.determinism import prefer_deterministic
from craftor.diffuser import Diffuser, _is_faster_channels_last, load
from craftor.precision import PRECISIONS
from craftor.recipe import Model


def last(module: nn.Module) -> bool:
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def in_bf16(tiny: Path, **settings: bool) -> Diffuser:
    return load(Model(path=str(tiny / "pipeline"), precision="bf16", **settings))


def test_a_gpu_without_a_deterministic_kernel_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing's backward pass has none on CUDA: an error would end every run there."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = []
    try:
        for device in ("cpu", "cuda"):
            prefer_deterministic(torch.device(device))
            enabled = torch.are_deterministic_algorithms_enabled()
            found.append((enabled, torch.is_deterministic_algorithms_warn_only_enabled()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [(True, False), (True, True)] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_attention_in_bfloat16_takes_its_softmax_in_float32(tiny: Path) -> None:
    attention = next(module for module in in_bf16(tiny).unet.modules() if isinstance(module, Attention))
    query, key = (torch.randn(8, 50, 24, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    found = attention.get_attention_scores(query, key)
    exact = (query.double() @ key.double().mT * attention.scale).bfloat16().double().softmax(-1)
    assert found.dtype == torch.bfloat16 and attention.upcast_softmax
    assert (found - exact).abs().max() <= 2**-8 * exact.max()
    whole = load(Model(path=str(tiny / "pipeline"))).unet
    assert not any(m.upcast_softmax for m in whole.modules() if isinstance(m, Attention)), "nothing to gain"


@pytest.mark.parametrize(
    ("family", "precision", "device", "faster"),
    [
        (AutoencoderTiny, "bf16", "cpu", True),
        (AutoencoderTiny, "bf16", "cuda", False),
        (AutoencoderKL, "bf16", "cpu", False),
        (AutoencoderKL, "fp32", "cpu", True),
    ],
)
def test_channels_last_where_no_group_norm_suffers(family: type, precision: str, device: str, faster: bool) -> None:
    assert _is_faster_channels_last(family(), PRECISIONS[precision], torch.device(device)) == faster


@pytest.mark.parametrize(("has_kernels", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_device_multiplies_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, has_kernels: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: has_kernels)
    ours = load(Model(path=str(tiny / "pipeline"), precision="auto"))
    assert ours.precision == chosen
    # What else is chosen by the precision follows the one that is computed in, not the recipe's word.
    attentions = [module for module in ours.unet.modules() if isinstance(module, Attention)]
    assert {attention.upcast_softmax for attention in attentions} == {has_kernels}
    assert load(Model(path=str(tiny / "pipeline"), precision="bf16")).precision == torch.bfloat16, "taken at its word"


def test_a_cpu_multiplies_bf16_where_it_has_avx_512() -> None:
    about = Path("/proc/cpuinfo")
    flags = set(about.read_text().split()) if about.exists() else set()
    if "avx2" not in flags or "avx_ne_convert" in flags:
        pytest.skip("not an x86 processor that says what it has, or one with other instructions for it")
    wide = {"avx512vl", "avx512bw", "avx512dq"} <= flags
    assert precision.multiplies_bf16(torch.device("cpu")) == wide


def test_the_layout_changes_pictures_by_rounding_alone() -> None:
    """Of the micro model, whose decoder is a tiny one."""
    ours, plain = (load(Model(path="micro:base", precision="bf16", channels_last=asked)) for asked in (None, False))
    assert last(ours.vae) and not last(plain.vae)
    assert not last(ours.unet), "it has group norms"
    latents = torch.randn((2, *ours.latent_shape), generator=torch.Generator().manual_seed(0))
    one, other = (decode(each.vae, latents, torch.bfloat16) for each in (ours, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=2**-5)
