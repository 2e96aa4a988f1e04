"""Plain data that is written down as JSON and read back from files which anybody may have changed."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from regrow.errors import InputError


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
