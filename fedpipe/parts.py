"""What all parts of a method have in common: a name, options, and how the settings choose them.

A method is one part on each axis. A part is a small frozen object: its fields are its options,
with their defaults and bounds, and its methods are what it does. It holds no state: what lasts
longer than a call is handed in and handed back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from fedpipe.config import Section
from fedpipe.errors import SettingsError, nearest
from fedpipe.mistakes import explain_all


class Part(Section):
    """A choice on an axis.

    `name` is what the settings call it; the first line of its docstring is what `fedpipe methods`
    prints.
    """

    name: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """Return the name and every option, as JSON: part of a run's identity."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        changed = {key: value for key, value in self.model_dump().items() if value != type(self)().model_dump()[key]}
        options = ", ".join(f"{key} {value}" for key, value in changed.items())
        return f"{self.name} ({options})" if options else self.name


P = TypeVar("P", bound=Part)


def registry(*parts: type[P]) -> dict[str, type[P]]:
    """Return the parts of an axis by name."""
    return {part.name: part for part in parts}


def choose(axis: str, parts: Mapping[str, type[P]], default: P, asked: str | Mapping[str, Any] | None) -> P:
    """Return the part that the settings ask for on an axis.

    Parameters
    ----------
    axis : the axis, for messages
    parts : what there is
    default : the method's own choice; with options and no name, these options of it are changed
    asked : a name; or a mapping with `name` and options, or options alone; None for the default

    Raises
    ------
    SettingsError
        There is no such part, or it has no such option, or the option no such value.
    """
    if asked is None:
        return default
    options = {"name": asked} if isinstance(asked, str) else dict(asked)
    name = options.pop("name", default.name)
    if name not in parts:
        raise SettingsError(f"method.{axis}: found '{name}'; {nearest(name, parts)}")
    kept = default.model_dump() if name == default.name else {}
    try:
        return parts[name].model_validate({**kept, **options})
    except ValidationError as error:
        lines = explain_all(error.errors(), parts[name])
        raise SettingsError("\n".join(f"method.{axis}.{line}" for line in lines)) from None
