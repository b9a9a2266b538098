"""`[evaluation.methods]` of a recipe: what is compared with the base beside the tuned model. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from craftor.rollout import Section


class PromptEngineering(Section):
    """The base, given longer prompts; scored against the original ones."""

    kind: Literal["prompt_engineering"]
    extender: str = "micro"
    """`micro` extends by the rules of the micro world; else a folder or hub id of a language model, such as one trained
    on people's prompts."""
    max_new_tokens: int = Field(40, ge=1)


class BestOf(Section):
    """The best of several of the base's images, by one of the recipe's rewards."""

    kind: Literal["best_of"]
    num: int = Field(4, ge=2)
    """Images made for each that is kept: so many times the cost of one."""
    by: str
    """Name of the reward."""


MethodSettings = Annotated[PromptEngineering | BestOf, Field(discriminator="kind")]
