"""What of a pipeline trains, and how: a part of any `[task]`. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from craftor.rollout import Section


class Part(Section):
    """How one part of the pipeline trains."""

    method: Literal["full", "lora"] = "full"
    rank: int = Field(8, ge=1)
    alpha: int | None = Field(None, ge=1)
    """LoRA's scale times its rank; by default the rank, so the scale is 1."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of this part, where it is not the optimizer's."""


class Train(Section):
    """What trains: the parts named here, and nothing else."""

    text_encoder: Part | None = None
    text_encoder_2: Part | None = None
    """SDXL's second encoder."""
    unet: Part | None = None

    @model_validator(mode="after")
    def _something(self) -> "Train":
        if not self.parts:
            raise ValueError("nothing trains; name at least one of text_encoder, text_encoder_2, unet")
        return self

    @property
    def parts(self) -> dict[str, Part]:
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2, "unet": self.unet}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts if name != "unet")
