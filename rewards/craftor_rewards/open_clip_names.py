"""open_clip's names of a CLIP's tensors <-> transformers' names, both ways and exactly.

Two things differ beside names: open_clip keeps an attention's query, key and value as one matrix, and its projections
transposed, as parameters that multiply from the right. open_clip checkpoints hold no configuration: widths and depths
follow from shapes, heads and activation from what is published of each width.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPConfig

_TOWERS = {"visual.": "vision_model.", "": "text_model."}
_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IGNORED = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
"""Constants that older checkpoints store beside the weights."""
_OPEN_CLIP_LAYER = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)")
_TRANSFORMERS_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_VISION_HEADS = {384: 6, 512: 8, 640: 10, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads of the published image towers by their width: 64 wide up to L, wider in H, g and bigG."""


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `CLIPModel`. Raises ValueError naming tensors that a CLIP of open_clip does not have."""
    out, unknown = {}, []
    for name, tensor in state.items():
        if name in _NAMES:
            out[_NAMES[name]] = tensor
        elif name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = tensor.T
        elif match := _OPEN_CLIP_LAYER.fullmatch(name):
            tower, layer, rest = match.groups()
            prefix = f"{_TOWERS[tower]}encoder.layers.{layer}."
            module, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{prefix}self_attn.{part}_proj.{kind}"] = rows
            elif module in _IN_LAYER:
                out[f"{prefix}{_IN_LAYER[module]}.{kind}"] = tensor
            else:
                unknown.append(name)
        elif name not in _IGNORED:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not a CLIP of open_clip: unknown tensors {', '.join(sorted(unknown)[:5])}")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, of a `CLIPModel`'s state dict."""
    names = {new: old for old, new in _NAMES.items()}
    transposed = {new: old for old, new in _TRANSPOSED.items()}
    in_layer = {new: old for old, new in _IN_LAYER.items()}
    out, unknown = {}, []
    for name, tensor in state.items():
        if name in names:
            out[names[name]] = tensor
        elif name in transposed:
            out[transposed[name]] = tensor.T
        elif match := _TRANSFORMERS_LAYER.fullmatch(name):
            tower, layer, rest = match.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}."
            module, _, kind = rest.rpartition(".")
            if module == "self_attn.q_proj":
                parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                out[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
            elif module in in_layer:
                out[f"{prefix}{in_layer[module]}.{kind}"] = tensor
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                unknown.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not transformers' CLIPModel: unknown tensors {', '.join(sorted(unknown)[:5])}")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def infer_config(
    state: Mapping[str, Tensor], *, activation: str = "gelu", vision_heads: int | None = None
) -> CLIPConfig:
    """The configuration of an open_clip state dict.

    `activation` is "gelu" for what open_clip trained and "quick_gelu" for OpenAI's weights; nothing in a checkpoint
    tells them apart. `vision_heads` is needed for widths that are not published. Raises ValueError for such a width.
    """
    width, _, patch, _ = state["visual.conv1.weight"].shape
    positions = state["visual.positional_embedding"].shape[0]
    text_width, embedding = state["text_projection"].shape
    vocabulary, length = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    if vision_heads is None:
        if width not in _VISION_HEADS:
            known = ", ".join(map(str, _VISION_HEADS))
            raise ValueError(f"an image tower {width} wide: give vision_heads; known widths: {known}")
        vision_heads = _VISION_HEADS[width]
    common = {"hidden_act": activation, "projection_dim": embedding}
    vision = {
        **common,
        "hidden_size": width,
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _num_layers(state, "visual.transformer.resblocks."),
        "num_attention_heads": vision_heads,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
    }
    text = {
        **common,
        "hidden_size": text_width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _num_layers(state, "transformer.resblocks."),
        "num_attention_heads": max(text_width // 64, 1),
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=embedding)


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
