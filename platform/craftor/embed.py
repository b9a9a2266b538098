"""Token ids -> the condition that the UNet sees."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Ids = Mapping[str, Int[Tensor, "b n"]]
"""Token ids by the name of the encoder that reads them: `text_encoder`, and `text_encoder_2` in SDXL."""


@dataclass(frozen=True)
class Condition:
    """What text encoders make of prompts; of the empty prompt it has one row, which stands for all."""

    embeds: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b p"] | None = None
    """SDXL: the second encoder's projected sentence embedding."""
    image: Float[Tensor, "b 1 *tokens c"] | None = None
    """What an image encoder makes of an object shown beside the text, for a UNet with an object's cross-attention."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.embeds, self.pooled, self.image) if tensor is not None)

    def like(self, tensors: Iterable[Tensor]) -> "Condition":
        """Other `tensors` in the places of these."""
        given = iter(tensors)
        embeds = next(given)
        pooled, image = (None if own is None else next(given) for own in (self.pooled, self.image))
        return Condition(embeds, pooled, image)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        return self.like(function(tensor) for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self.map(lambda tensor: tensor[rows])

    def detach(self) -> "Condition":
        return self.map(Tensor.detach)

    def leaf(self) -> "Condition":
        """The same numbers as leaves of a graph of their own, that collect gradient where these would."""
        return self.map(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))


def embed(encoders: Mapping[str, nn.Module], ids: Ids) -> Condition:
    """One encoder: last hidden states after the final layer norm (Stable Diffusion 1.x, 2.x).

    Two: penultimate hidden states side by side, and the second's projected sentence embedding (SDXL).
    """
    if len(encoders) == 1:
        ((name, encoder),) = encoders.items()
        return Condition(encoder(input_ids=ids[name])[0])
    outputs = [encoder(input_ids=ids[name], output_hidden_states=True) for name, encoder in encoders.items()]
    return Condition(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds)


def mix(conditions: Sequence[Condition], weights: Sequence[float]) -> Condition:
    """Output-space mixture `sum_i w_i * E_i(prompt)`; a member of weight 0 leaves no trace, bit for bit.

    Raises ValueError unless there is one weight per member and the weights sum to 1.
    """
    if len(conditions) != len(weights):
        raise ValueError(f"{len(conditions)} encoders but {len(weights)} weights")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"mixture weights {list(weights)} sum to {sum(weights)}, allowed: 1")
    members = [(c, w) for c, w in zip(conditions, weights, strict=True) if w != 0]
    if len(members) == 1:
        return members[0][0]
    columns = zip(*(condition.tensors for condition, _ in members), strict=True)
    weights = [weight for _, weight in members]
    return members[0][0].like(
        sum((w * t for t, w in zip(c[1:], weights[1:], strict=True)), weights[0] * c[0]) for c in columns
    )
