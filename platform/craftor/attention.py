"""Which attention kernels a UNet runs: chosen by name, or the fastest that can run here."""

import importlib.util

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0


def set_attention(unet: UNet2DConditionModel, choice: str, device: torch.device, *, reduced: bool = False) -> str:
    """Set a UNet's attention and return its name; `auto` is xformers where it can run, else sdpa.

    Raises ValueError saying why when xformers is asked for where it cannot run.
    """
    if choice == "auto":
        choice = "eager" if eager_is_faster(device, reduced) else "sdpa"
        if device.type != "cpu" and not xformers_obstacle(unet, device):
            choice = "xformers"
    if choice == "xformers":
        if obstacle := xformers_obstacle(unet, device):
            raise ValueError(f'model.attention = "xformers": {obstacle}; allowed here: auto, sdpa, eager')
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor() if choice == "eager" else AttnProcessor2_0())
    if device.type == "cpu" and reduced:
        # PyTorch's softmax of short bfloat16 rows takes thrice as long as one in float32, which rounds once as well.
        for attention in (module for module in unet.modules() if isinstance(module, Attention)):
            attention.upcast_softmax = True
    return choice


def eager_is_faster(device: torch.device, reduced: bool) -> bool:
    """In reduced precision on CPU, where the fused kernel's backward is slow."""
    return device.type == "cpu" and reduced


def xformers_obstacle(unet: UNet2DConditionModel, device: torch.device) -> str | None:
    """Why xformers cannot run this UNet on this device; None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device and this is {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed (pip install 'craftor[gpu]')"
    sizes = sorted(
        {
            module.inner_dim // module.heads
            for module in unet.modules()
            if hasattr(module, "inner_dim") and hasattr(module, "heads")
        }
    )
    # Its backward kernels read rows of 8 numbers and stop at 256.
    if unfit := [size for size in sizes if size % 8 or size > 256]:
        return f"attention heads of this model have {unfit} channels, it takes multiples of 8 up to 256"
    return None
