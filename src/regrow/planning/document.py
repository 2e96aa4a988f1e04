"""Plain data that is written down as JSON and read back from files which anybody may have changed."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regrow.errors import InputError

LARGEST = 2**53
"""Whole numbers from here on are not exact in every reader of JSON, and no count comes near."""

Whole = Annotated[int, Field(strict=True, ge=0, lt=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=LARGEST)]


class Document(BaseModel):
    """A JSON document; what it holds must be known, complete and finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    called: ClassVar[str]
    """What people call one."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read JSON.

        Raises:
            InputError: if it is no such document; the message names the place.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"not a valid {cls.called}: {place + ': ' if place else ''}{first['msg']}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump(mode="json")
