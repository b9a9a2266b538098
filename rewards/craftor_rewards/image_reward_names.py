"""The tensors of `ImageReward.pt`, named as BLIP's first code names them, <-> the names of transformers' BLIP parts.

Only names differ: both keep the vision attention's query, key and value in one matrix, and the text side is the same
BERT with cross-attention, name for name.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

# BERT's constant 0, 1, 2, ... and the two projections of BLIP's contrastive training, which no score reads.
UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
)
PREFIXES = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    # The reference counts its dropout layers too.
    "mlp.layers.0.": "head.0.",
    "mlp.layers.2.": "head.1.",
    "mlp.layers.4.": "head.2.",
    "mlp.layers.6.": "head.3.",
    "mlp.layers.7.": "head.4.",
}
VISION_BLOCK = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def to_transformers(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`ImageReward.pt` under the names of `ImageReward.state_dict()`, which are `expected`.

    Raises ValueError when a name is unknown, or when an expected one is missing: what half a model returns would look
    like a score.
    """
    expected = set(expected)
    names = {name: _rename(name, PREFIXES, VISION_BLOCK) for name in state if name not in UNUSED}
    if unknown := sorted(name for name, ours in names.items() if ours not in expected):
        raise ValueError(f"{len(unknown)} tensors do not belong to an ImageReward, first '{unknown[0]}'")
    if missing := sorted(expected - set(names.values())):
        first = next(iter(to_original(dict.fromkeys(missing[:1], Tensor()))))
        raise ValueError(f"{len(missing)} tensors of an ImageReward are missing, first '{first}'")
    return {ours: state[name] for name, ours in names.items()}


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, without the unused tensors."""
    prefixes, block = ({ours: theirs for theirs, ours in names.items()} for names in (PREFIXES, VISION_BLOCK))
    return {_rename(name, prefixes, block): tensor for name, tensor in state.items()}


def _rename(name: str, prefixes: Mapping[str, str], block: Mapping[str, str]) -> str:
    """The name on the other side, "" where it has none."""
    for old, new in prefixes.items():
        if name.startswith(old):
            tail = name.removeprefix(old)
            if "vision.encoder.layers." in (old, new):
                for old_part, new_part in block.items():
                    tail = tail.replace(old_part, new_part)
            return new + tail
    return ""
