"""What all sections of a recipe share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
TrialShare = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Stage = Literal["pretrain", "instruct"]
Bos = Literal["document", "once", "none"]
Template = Literal["auto", "alpaca", "chat"]
MixtureRule = Literal["fixed", "degradation", "sheared", "drpruning"]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
