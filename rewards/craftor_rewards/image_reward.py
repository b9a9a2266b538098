"""ImageReward v1.0: BLIP reads a prompt with the image in view and predicts people's preference (Xu et al. 2023).

A ViT-L/16 turns the image into tokens, a BERT reads the prompt and attends to them in every layer, and a linear head
scores the [CLS] token: r = (head(h_CLS) - 0.16717) / 1.03334, of mean 0 and spread 1 on the images it was trained on.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.initialization import no_init_weights

from craftor_rewards.image_reward_names import to_transformers
from craftor_rewards.loading import find, load_tensors, missing
from craftor_rewards.preprocess import Fit, preprocess
from craftor_rewards.protocol import Range, check_inputs

REPOSITORY = "THUDM/ImageReward"
MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072
NUM_TOKENS = 35
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
BERT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


class ImageReward(nn.Module):
    """The normalised score, about -2 to 2; with a `ceiling`, ReFL's hinge -relu(ceiling - r), at most 0.

    The hinge has no gradient above the ceiling (2 in ReFL): a guard against over-optimisation that is built in.
    Arithmetic is float32 but for the image tower where `dtype` says otherwise; with `checkpoint` that tower recomputes
    its activations in the backward pass instead of keeping them.
    """

    differentiable = True
    needs_prompt = True
    fit: Fit = "crop_torchvision"

    def __init__(
        self,
        weights: str | Path,
        *,
        ceiling: float | None = None,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = False,
    ) -> None:
        """`weights`: `ImageReward.pt` with `med_config.json` beside it, their folder, or "THUDM/ImageReward".

        BERT's tokenizer is taken from the same folder or, as the public one has none, from the catalogue's
        "bert-tokenizer".
        """
        super().__init__()
        if ceiling is not None and not math.isfinite(ceiling):
            raise ValueError(f"ceiling is {ceiling}; expected a finite score, or None for no hinge")
        self.ceiling, self.dtype, self.checkpoint = ceiling, dtype, checkpoint
        self.score_range: Range = "about -2 to 2" if ceiling is None else f"about {-2 - ceiling:g} to 0"
        state, bert, self.tokenizer = _load(weights)
        with no_init_weights():  # every tensor is loaded: drawing 446 million random numbers first would take longer
            self.vision = BlipVisionModel(_vision_config(state))
            self.text = BlipTextModel(_text_config(bert, self.vision.config.hidden_size), add_pooling_layer=False)
            widths = (self.text.config.hidden_size, *HEAD_WIDTHS)
            self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.load_state_dict(to_transformers(state, self.state_dict()))
        self.vision.to(dtype)
        self.input_size: int = self.vision.config.image_size
        self.requires_grad_(False)
        if checkpoint:
            self.vision.activation_checkpointing_enable()
        self.train(False)

    def train(self, mode: bool = True) -> "ImageReward":
        """Frozen: stays in evaluation mode. transformers checkpoints layers that say they train, so those do."""
        super().train(False)
        if self.checkpoint:
            for layer in self.vision.encoder.layers:
                layer.training = True  # of this module alone: its attention's dropout stays off
        return self

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts)
        pixels = preprocess(images, self.input_size, fit=self.fit)
        patches = self.vision(pixel_values=pixels.to(self.dtype)).last_hidden_state.float()
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt"
        ).to(images.device)
        # BLIP's image-text matching puts [ENC] in the place of [CLS]; ImageReward was trained with [CLS].
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches
        ).last_hidden_state
        scores = (self.head(read[:, 0]).squeeze(-1) - MEAN) / SPREAD
        return scores if self.ceiling is None else -F.relu(self.ceiling - scores)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more than 35 tokens; what is beyond does not count for the score."""
        ids = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
        return [len(row) > NUM_TOKENS for row in ids]


def _load(weights: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], BertTokenizer]:
    """The tensors under their original names, BERT's settings, and the tokenizer."""
    path = find(weights)
    folder, file = (path, path / "ImageReward.pt") if path.is_dir() else (path.parent, path)
    config = folder / "med_config.json"
    if not file.is_file() or not config.is_file():
        raise FileNotFoundError(
            f"'{folder}' lacks an ImageReward: expected ImageReward.pt and med_config.json; {missing(REPOSITORY)}"
        )
    bert = json.loads(config.read_text())
    if lacking := [key for key in BERT_KEYS if key not in bert]:
        raise ValueError(f"'{config}' lacks {', '.join(lacking)}")
    return load_tensors(file), bert, _tokenizer(folder, bert["vocab_size"])


def _tokenizer(folder: Path, vocab_size: int) -> BertTokenizer:
    """BERT's uncased one and BLIP's two tokens at the end, of which a prompt makes no use."""
    beside = any((folder / name).is_file() for name in BertTokenizer.vocab_files_names.values())
    tokenizer = BertTokenizer.from_pretrained(folder if beside else find("bert-tokenizer"))
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in '{folder}' has {len(tokenizer)} tokens; its med_config.json has {vocab_size}"
        )
    return tokenizer


def _vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """No file says it, the shapes do; heads are 64 wide in every ViT of BLIP's, and its norms have eps 1e-6."""
    prefix = "blip.visual_encoder."
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in state.items() if name.startswith(prefix)}
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in shapes:
            raise ValueError(f"no tensor '{prefix}{name}': these are not the weights of an ImageReward")
    _, num_positions, width = shapes["pos_embed"]
    patch_size = shapes["patch_embed.proj.weight"][-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=sum(name.startswith("blocks.") and name.endswith(".norm1.bias") for name in shapes),
        num_attention_heads=width // 64,
        image_size=math.isqrt(num_positions - 1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _text_config(bert: Mapping[str, Any], image_width: int) -> BlipTextConfig:
    """`is_decoder` stands for the cross-attention layers; the mask stays bidirectional. Dropout is left at 0."""
    return BlipTextConfig(**{key: bert[key] for key in BERT_KEYS}, encoder_hidden_size=image_width, is_decoder=True)
