"""What every section of a recipe is built from: its base class, and types with a range."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

IMPORT_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no conversion between types, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def problem(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise problem(f"{text!r}: expected one line, without line breaks and control characters")
    return text


Line = Annotated[Text, AfterValidator(_one_line)]
"""A text that stands in one line of a script, where a line break would begin another."""


class NamedSection(Section):
    """A section that chooses by `name`; its other keys are options of what was chosen."""

    name: str = Field(description="What is chosen.")

    def options(self) -> dict[str, Any]:
        """Every key but `name`, extra keys included, as JSON values: keyword arguments for what is named."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})
