"""Frozen parts of a pipeline -> copies that train, whole or by LoRA; and back from a checkpoint's folder.

A folder holds `text_encoder/`, `text_encoder_2/` and `unet/` for parts that train whole, and for LoRA one
`lora/pytorch_lora_weights.safetensors`, as `StableDiffusionPipeline.load_lora_weights` reads it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_layers import GradientCheckpointingLayer

from craftor.diffuser import ENCODERS, Diffuser, freeze
from craftor.train_settings import Part

LORA_FOLDER = "lora"
TARGETS = {
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
}
"""The attention projections that LoRA adapts."""


def make(
    diffuser: Diffuser, parts: Mapping[str, Part], seed: int, before: Mapping[str, nn.Module] | None = None
) -> nn.ModuleDict:
    """Copies of the named parts in float32 with gradient, from `before` where it has them.

    Raises ValueError for a part that the pipeline lacks.
    """
    modules = nn.ModuleDict()
    for name, part in parts.items():
        original = (before or {}).get(name) or find(diffuser, name)
        module: Any = copy.deepcopy(original).eval().requires_grad_(part.method == "full")
        if part.method == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module.add_adapter(lora_config(name, part))
        if name == "text_encoder" and "text_encoder_2" in diffuser.encoders:
            _freeze_unread(module)
        if name in ENCODERS and diffuser.unet.is_gradient_checkpointing:
            _checkpoint_layers(module)
        assert any(p.requires_grad for p in module.parameters()), f"{name}: LoRA bound to no module"
        modules[name] = module
    return modules


def _freeze_unread(encoder: CLIPTextModel) -> None:
    """SDXL reads its first encoder's penultimate layer: what comes after it cannot train."""
    text = getattr(encoder, "text_model", encoder)
    for unread in (text.encoder.layers[-1], text.final_layer_norm):
        unread.requires_grad_(False)


def _checkpoint_layers(encoder: CLIPTextModel) -> None:
    """Layers rebuild their activations in training mode alone: theirs is set, their dropout's is not."""
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in encoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def find(diffuser: Diffuser, name: str) -> nn.Module:
    """A pipeline's part by name."""
    if name == "unet":
        return diffuser.unet
    if name not in diffuser.encoders:
        raise ValueError(
            f"task.train.{name}: this pipeline has no {name}; allowed: {', '.join(diffuser.encoders)}, unet"
        )
    return diffuser.encoders[name]


def lora_config(name: str, part: Part) -> LoraConfig:
    return LoraConfig(r=part.rank, lora_alpha=part.alpha or part.rank, target_modules=TARGETS[name])


def save(modules: nn.ModuleDict, parts: Mapping[str, Part], folder: Path) -> None:
    """Write each part as its folder, and all LoRA adapters as one file."""
    adapters = {}
    for name, part in parts.items():
        if part.method == "full":
            module: Any = modules[name]
            module.save_pretrained(folder / name, safe_serialization=True)
        else:
            state = get_peft_model_state_dict(modules[name])
            adapters[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
            adapters[f"{name}_lora_adapter_metadata"] = lora_config(name, part).to_dict()
    if adapters:
        family = StableDiffusionXLPipeline if "text_encoder_2" in modules else StableDiffusionPipeline
        family.save_lora_weights(folder / LORA_FOLDER, safe_serialization=True, **adapters)


def load(diffuser: Diffuser, folder: Path) -> dict[str, nn.Module]:
    """The tuned parts that a checkpoint's or bundle's folder holds, frozen; adapters are merged into their part."""
    found: dict[str, nn.Module] = {}
    for name in (*ENCODERS, "unet"):
        if (folder / name).is_dir():
            found[name] = _whole(CLASSES[name], folder / name)
    if "unet" in found:
        # In the kernels and layout of the pipeline's own.
        unet = copy.deepcopy(diffuser.unet)
        unet.load_state_dict(found["unet"].state_dict())
        found["unet"] = unet
    if (folder / LORA_FOLDER).is_dir():
        found |= _merged(diffuser, folder / LORA_FOLDER)
    if not found:
        raise ValueError(f"{folder}: holds no tuned part; expected {', '.join((*CLASSES, LORA_FOLDER))}")
    return {name: freeze(module).to(diffuser.device) for name, module in found.items()}


def _whole(family: Any, folder: Path) -> nn.Module:
    """Raises ValueError where tensors are missing or have other shapes: libraries would fill in random ones."""
    module, report = family.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{folder}: {len(wrong)} weights missing or of another shape, the first is {wrong[0]}")
    return module


CLASSES = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
}


def _merged(diffuser: Diffuser, folder: Path) -> dict[str, nn.Module]:
    family = StableDiffusionXLPipeline if "text_encoder_2" in diffuser.encoders else StableDiffusionPipeline
    state, alphas, metadata = family.lora_state_dict(folder, return_lora_metadata=True, use_safetensors=True)
    found: dict[str, nn.Module] = {}
    for name in (*diffuser.encoders, "unet"):
        if not any(key.startswith(f"{name}.") for key in state):
            continue
        module = copy.deepcopy(find(diffuser, name))
        if name == "unet":
            family.load_lora_into_unet(state, alphas, module, metadata=metadata)
        else:
            family.load_lora_into_text_encoder(state, alphas, module, prefix=name, metadata=metadata)
        found[name] = _merge(module)
    return found


def _merge(module: nn.Module) -> nn.Module:
    """Fold adapters into the layers they wrap, and put those layers back."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    return module
