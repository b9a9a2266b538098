"""Token ids -> embeddings: the condition the UNet sees."""

from jaxtyping import Float, Int
from torch import Tensor, nn


def embed(text_encoder: nn.Module, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """Last hidden states after the final layer norm, as Stable Diffusion 1.x and 2.x use them."""
    return text_encoder(input_ids=input_ids)[0]


def mix(embeds: list[Float[Tensor, "b n d"]], weights: list[float]) -> Float[Tensor, "b n d"]:
    """Output-space mixture `sum_i w_i * E_i(prompt)`; a member of weight 0 leaves no trace, bit for bit.

    Raises ValueError unless there is one weight per member and the weights sum to 1.
    """
    if len(embeds) != len(weights):
        raise ValueError(f"{len(embeds)} encoders but {len(weights)} weights")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"mixture weights {weights} sum to {sum(weights)}, allowed: 1")
    members = [(e, w) for e, w in zip(embeds, weights, strict=True) if w != 0]
    if len(members) == 1:
        return members[0][0]
    return sum((w * e for e, w in members[1:]), start=members[0][1] * members[0][0])
