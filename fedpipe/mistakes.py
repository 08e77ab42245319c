"""What is wrong in a user's keys, in one line each: where, what was found, what is expected, the nearest valid.

Pydantic finds the mistakes; its own words speak of types and branches of unions, and not of a settings file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel

from fedpipe.errors import hide_password, nearest


def explain_all(errors: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> list[str]:
    """Return one line a mistake that pydantic found in the keys of `root`.

    A key that takes a number or a word is reported once for each, and joined here.
    """
    joined: dict[str, str] = {}
    # Of a list with a wrong item, the item is told, and not that a word would have done as well.
    lists = [_path(root, error["loc"])[:-1] for error in errors if error["loc"] and isinstance(error["loc"][-1], int)]
    for line in (_explain(root, error) for error in errors if _path(root, error["loc"]) not in lists):
        said, expected, what = line.partition("; expected ")
        joined[said] = f"{joined[said]} or {what}" if said in joined and expected else line
    return list(joined.values())


def _keys(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the valid keys of the section that `location` (keys from the top) points into."""
    section: Any = root
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        section = field.annotation
    return list(getattr(section, "model_fields", {}))


def _path(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Drop what pydantic puts into a location for the branch of a union."""
    path: list[str] = []
    for part in location:
        if not path or str(part) in _keys(root, path) or isinstance(part, int):
            path.append(str(part))
    return path


def _explain(root: type[BaseModel], error: Mapping[str, Any]) -> str:
    kind, location, found = error["type"], list(error["loc"]), error["input"]
    if kind == "extra_forbidden":
        return f"{'.'.join(map(str, location))}: unknown key; {nearest(location[-1], _keys(root, location[:-1]))}"
    path = ".".join(_path(root, location))
    if kind == "missing":
        return f"{path}: missing; every settings file needs it"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        prefix = path if path and path in root.model_fields else None
        return message if not path or message.startswith(f"{path}.") else f"{prefix or path}: {message}"
    options = _options(root, path)
    if isinstance(found, str) and options:
        return f"{path}: found '{found}'; {nearest(found, options)}"
    if kind in ("model_type", "dict_type"):
        return f"{path}: found {shown(found)}; expected keys below it: {', '.join(_keys(root, path.split('.')))}"
    expected = error["msg"].replace("Input should be", "expected").replace("a valid integer", "a whole number")
    expected = expected.replace("a valid ", "a ")
    return f"{path}: found {shown(found)}; {expected}"


def _options(root: type[BaseModel], path: str) -> list[str]:
    """Return the words a key may hold, where it is a choice of words only."""
    annotation: Any = root
    for part in path.split("."):
        field = getattr(annotation, "model_fields", {}).get(part)
        if field is None:
            return []
        annotation = field.annotation
    branches = [a for a in get_args(annotation) if a is not type(None)] if not _is_literal(annotation) else [annotation]
    words = [w for branch in branches if _is_literal(branch) for w in get_args(branch)]
    only_words = all(_is_literal(branch) for branch in branches)
    return [str(word) for word in words] if words and only_words else []


def _is_literal(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is Literal


def shown(value: Any) -> str:
    """Show what was found as the settings file spells it, cut to fit a line."""
    words = {None: "nothing", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    text = hide_password(text)
    return text if len(text) <= 60 else f"{text[:60]}…"
