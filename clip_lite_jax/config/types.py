"""Types of configuration fields."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Scalar = bool | int | float | str
Options = dict[str, Scalar | list[Scalar]]

Triple = tuple[float, float, float]

Captions = Literal["random", "first", "joined", "averaged"]
GalleryCaptions = Literal["first", "joined", "all", "averaged"]

STRICT = pydantic.ConfigDict(extra="forbid")
