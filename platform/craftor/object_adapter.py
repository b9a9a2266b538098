"""An object's cross-attention beside a UNet's text cross-attention, as diffusers' IP-Adapter: made, installed, saved.

The form is chosen so that no object means exactly the base model: an image encoder's output goes through a projection
whose biases are zero and do not train, then through keys and values without bias. Zeros in, zeros out, to the last bit.
So dropping an object while training, switching it off and the unconditional branch of guidance are one thing.

`pooled` projects CLIP's image embedding to 4 tokens; `patches` projects each of its patch tokens (penultimate layer) to
one, the IP-Adapter form called full. A resampler of patch tokens would have learned queries, which make tokens out of
nothing; it has no such null and is not offered.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "ip_adapter.safetensors"
Tokens = Literal["pooled", "patches"]
State = dict[str, dict[str, Tensor]]
"""What diffusers' loader takes: `image_proj` and `ip_adapter`, each its tensors by name."""

_RENAMED = {
    "pooled": {"image_embeds.": "proj.", "norm.": "norm."},
    "patches": {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2.", "norm.": "proj.3."},
}
"""Prefixes of a projection's tensors: in its module, and in a file."""


def initial(unet: UNet2DConditionModel, embed_dim: int, tokens: Tokens, seed: int) -> State:
    """An untrained adapter: a random projection, keys and values copied from those of the text.

    `embed_dim` is the width of what the image encoder gives: its projection's for `pooled`, its layers' for `patches`.
    """
    width = unet.config.cross_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = (
            ImageProjection(embed_dim, width, 4)
            if tokens == "pooled"
            else IPAdapterFullImageProjection(embed_dim, width)
        )
    attentions = _cross_attentions(unet)
    return {
        "image_proj": _without_biases(_renamed(projection, tokens)),
        "ip_adapter": {
            f"{2 * i + 1}.to_{kind}_ip.weight": getattr(attention, f"to_{kind}").weight.detach().float().cpu().clone()
            for i, attention in enumerate(attentions)
            for kind in ("k", "v")
        },
    }


def install(unet: UNet2DConditionModel, state: State, *, eager: bool = False) -> None:
    """Put an adapter into a UNet in place, by diffusers' own loader.

    `eager` chooses batched-matmul attention (see `attention.eager_is_faster`); the loader's is fused. Raises
    ValueError where the adapter is of a form without null, or was made for another architecture.
    """
    tokens_of(state)
    expected = {
        f"{2 * i + 1}.to_{kind}_ip.weight": (attention.to_k.out_features, unet.config.cross_attention_dim)
        for i, attention in enumerate(_cross_attentions(unet))
        for kind in ("k", "v")
    }
    found = {name: tuple(tensor.shape) for name, tensor in state["ip_adapter"].items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ValueError(
            f"the IP-Adapter is of another architecture: {wrong[0]} is {found.get(wrong[0], 'missing')}, and this UNet "
            f"takes {expected.get(wrong[0], 'none')}"
        )
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    if eager:
        unet.set_attn_processor({name: _eager(processor) for name, processor in unet.attn_processors.items()})


def tokens_of(state: State) -> Tokens:
    """The form of an adapter. Raises ValueError for one that is neither `pooled` nor `patches`."""
    for tokens, key in (("pooled", "proj.weight"), ("patches", "proj.3.weight")):
        if key in state["image_proj"]:
            return tokens  # type: ignore[return-value]  # mypy widens the loop's literals
    raise ValueError(
        "not an IP-Adapter of a form that is read here (base with proj.weight, full with proj.3.weight); its "
        f"image_proj has {', '.join(sorted(state['image_proj'])[:3]) or 'nothing'}"
    )


def width_of(state: State) -> int:
    """Width of the image encoder's output that an adapter was made for."""
    name = "proj.weight" if tokens_of(state) == "pooled" else "proj.0.weight"
    return state["image_proj"][name].shape[1]


def with_null(state: State) -> State:
    """The same adapter with a projection that has no bias: one from elsewhere may not turn zeros into zeros."""
    return {**state, "image_proj": _without_biases(state["image_proj"])}


def parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """What trains of an installed adapter, by its name in the UNet: all but the projection's biases."""
    assert unet.encoder_hid_proj is not None, "no adapter is installed"
    return {
        name: parameter
        for name, parameter in unet.named_parameters()
        if "_ip." in name or (name.startswith("encoder_hid_proj.") and not name.endswith(".bias"))
    }


def extract(unet: UNet2DConditionModel) -> State:
    """The adapter of a UNet, as `install` takes it."""
    (projection,) = unet.encoder_hid_proj.image_projection_layers
    tokens: Tokens = "pooled" if isinstance(projection, ImageProjection) else "patches"
    processors = [a.processor for a in _cross_attentions(unet)]
    return {
        "image_proj": _renamed(projection, tokens),
        "ip_adapter": {
            f"{2 * i + 1}.to_{kind}_ip.weight": getattr(processor, f"to_{kind}_ip")[0].weight.detach().cpu().clone()
            for i, processor in enumerate(processors)
            for kind in ("k", "v")
        },
    }


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write `ip_adapter.safetensors`, as a stock pipeline's `load_ip_adapter` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}.{name}": t.contiguous() for part, tensors in extract(unet).items() for name, t in tensors.items()}
    save_file(flat, folder / FILE)


def read(path: Path) -> State:
    """An IP-Adapter file. Raises ValueError for a file that is none; only safetensors are read."""
    state: State = {"image_proj": {}, "ip_adapter": {}}
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{path}: no such IP-Adapter file; allowed: a .safetensors file")
    with safe_open(path, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118  # not a dictionary
            part, _, name = key.partition(".")
            if part not in state:
                raise ValueError(f"{path}: not an IP-Adapter file: it holds {key}; expected image_proj.*, ip_adapter.*")
            state[part][name] = file.get_tensor(key).float()
    return state


def without_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the UNet alone, as `save_pretrained` can write it: adapter weights in it would be lost on loading."""
    config = {name: value for name, value in unet.config.items() if name != "encoder_hid_dim_type"}
    plain = UNet2DConditionModel.from_config(config)
    own = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in unet.state_dict().items() if name in own}, strict=True)
    return plain


def zero(embeds: Float[Tensor, "b 1 *tokens d"], kept: Bool[Tensor, " b"]) -> Float[Tensor, "b 1 *tokens d"]:
    """Embeddings with the null object in the rows that are not kept."""
    return embeds * kept.view(-1, *(1,) * (embeds.ndim - 1)).to(embeds)


def _cross_attentions(unet: UNet2DConditionModel) -> list[Any]:
    """In the order that the loader numbers them by: down, up, middle."""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return [unet.get_submodule(name.removesuffix(".processor")) for name in names]


def _renamed(projection: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """A projection's tensors under the names of the file format."""
    return {
        new + name.removeprefix(old): tensor.detach().cpu().clone()
        for old, new in _RENAMED[tokens].items()
        for name, tensor in projection.state_dict().items()
        if name.startswith(old)
    }


def _without_biases(image_proj: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in image_proj.items()}


def _eager(processor: Any) -> nn.Module:
    if not isinstance(processor, IPAdapterAttnProcessor2_0):
        return processor
    fitting = IPAdapterAttnProcessor(
        processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, processor.scale
    )
    fitting.load_state_dict(processor.state_dict())
    return fitting.to(processor.to_k_ip[0].weight.device)
