"""Objects in a recipe: the task that trains their encoder, and those shown beside other training. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from craftor.rollout import Section
from craftor.train_settings import Part

IDENTITY = "identity"
"""The name of the reward that `task.shown.identity` adds."""


class ConditionDropout(Section):
    """Chances that a sample sees no caption, no object, or neither: what guidance needs both branches of."""

    text: float = Field(0.05, ge=0, le=1)
    object: float = Field(0.05, ge=0, le=1)
    both: float = Field(0.05, ge=0, le=1)

    @property
    def total(self) -> float:
        return self.text + self.object + self.both

    @model_validator(mode="after")
    def _some_is_left(self) -> "ConditionDropout":
        if self.total >= 1:
            raise ValueError(f"text + object + both = {self.total:g}; allowed: less than 1")
        return self


class ObjectFeatures(Section):
    """A second loss on the object: what a frozen network sees of it, in what one step predicts and in the picture."""

    weights: str
    """What looks at both: folder or hub id of a CLIP or a DINO, or `micro:NAME`."""
    weight: float = Field(gt=0)
    below: int = Field(400, ge=1, le=1000)
    """Timestep below which a sample has it: of noisier latents one step predicts nothing to look at."""


class ObjectEncoder(Section):
    """Train an object's cross-attention beside the text's, so that one picture of it conditions new ones.

    None of the defaults is a published value of the method's: its paper's settings are not known.
    """

    kind: Literal["object_encoder"]
    domain: str = ""
    """What kind of objects it learns, in your words ("dogs"): a label, in its registered versions."""
    image_encoder: str
    """A frozen CLIP, or a ResNet: a folder, a hub id, or `micro:NAME`."""
    tokens: Literal["pooled", "patches"] = "patches"
    """What is read of it: the image embedding (4 tokens), or each patch or last cell (one token each)."""
    unet: Part | Literal["frozen"] = Part()
    """How the UNet trains beside the new cross-attention: whole, by LoRA, or not at all."""
    adapter: str | None = None
    """An IP-Adapter file to start from."""
    domain_share: float = Field(0.5, gt=0, le=1)
    """Share of rows in every batch that have an object; `data.path` must hold them so."""
    identity_weight: float = Field(0.5, ge=0)
    """Weight of the error on the object's own cells."""
    features: ObjectFeatures | None = None
    dropout: ConditionDropout = ConditionDropout()
    min_snr_gamma: float = Field(5.0, gt=0)
    min_weight: float = Field(0.0, ge=0, le=1)

    @property
    def tuned(self) -> Part | None:
        return None if self.unet == "frozen" else self.unet

    def check_batch(self, size: int) -> None:
        """Raises ValueError where `domain_share` of a batch is no whole number of rows."""
        num = self.domain_share * size
        if abs(num - round(num)) > 1e-6:
            raise ValueError(
                f"task.domain_share = {self.domain_share} of run.batch_size = {size} is {num:g} rows; allowed: a whole "
                "number of them in every batch"
            )


class Identity(Section):
    """One more reward, named `identity`: how alike an object and the picture it was shown for are, -1 to 1."""

    weights: str
    """What looks at both: folder or hub id of a CLIP or a DINO, or a short name of the catalogue."""
    weight: float = Field(gt=0)
    scale: float = Field(1.0, gt=0)


class ShownObject(Section):
    """An object shown beside the text to a share of samples, so that what trains suits pictures with and without."""

    encoder: str
    """A trained object encoder: a run's folder or a bundle's. Its UNet draws, and does not train."""
    references: str
    """A folder of Parquet that an object encoder trains on; its references are shown."""
    share: float = Field(0.5, gt=0, le=1)
    identity: Identity | None = None
    """A reward for samples that see an object; those that see none score 0 in it."""
