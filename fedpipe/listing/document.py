"""The tables of docs/methods.md, made from the catalogue, so that the document says what the code does.

In the document a table stands between `<!-- table: NAME -->` and `<!-- end -->`. To write them anew:

    python -m fedpipe.listing.document docs/methods.md
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fedpipe.config import Settings, load_settings
from fedpipe.listing.overview import as_yaml, differing, spelled
from fedpipe.listing.traffic import traffic
from fedpipe.methods import AXES, CATALOGUE
from fedpipe.methods.method import Method
from fedpipe.methods.sums import not_summed
from fedpipe.methods.whole import not_for_clients
from fedpipe.models.layers import TensorSpec
from fedpipe.parts import Part

_TABLE = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WIDTH, _LABELS, _LAYERS = 384, 2, ("4.query", "4.value", "5.query", "5.value")


def written(text: str, settings: Settings) -> str:
    """Return the document with all of its tables written anew; `settings` are the demo's."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{_table(found[2], settings)}\n\n{found[3]}", text)


def _table(name: str, settings: Settings) -> str:
    if name == "catalogue":
        return catalogue()
    return sizes(settings) if name == "traffic" else parts(name)


def catalogue() -> str:
    """Return the table of all methods: what is not plain, and what they allow."""
    head = ("method", "parts that are not plain", "private", "own models", "client level", "secure sum")
    return _rows(head, (_method_row(method) for method in CATALOGUE.values()))


def _method_row(method: Method) -> list[str]:
    own = ", ".join(f"{axis} `{spelled(part)}`" for axis, part in differing(method).items())
    facts = (method.private, method.personal, not_for_clients(method) is None, not_summed(method) is None)
    return [f"`{method.name}`", own or "none", *("yes" if fact else "no" for fact in facts)]


def parts(axis: str) -> str:
    """Return the table of an axis: its parts and their options."""
    head = ("part", "what it does", "options with defaults")
    return _rows(head, ([f"`{name}`", _first_line(part), _options(part)] for name, part in AXES[axis].items()))


def _first_line(part: type[Part]) -> str:
    return (part.__doc__ or "").splitlines()[0].replace("|", r"\|")


def _options(part: type[Part]) -> str:
    defaults = part().model_dump()
    return ", ".join(f"`{key}: {as_yaml(value)}`{_others(part, key, value)}" for key, value in defaults.items())


def _others(part: type[Part], option: str, default: Any) -> str:
    """Return the other words that an option may be, where it is a choice of words."""
    kind = part.model_fields[option].annotation
    words = [f"`{word}`" for word in get_args(kind) if word != default] if get_origin(kind) is Literal else []
    return f" (or {', '.join(words)})" if words else ""


def sizes(settings: Settings) -> str:
    """Return the table of the bytes that a client of the demo sends and receives in a round."""
    clients = [f"c{number:03d}" for number in range(settings.partition.clients or 1)]
    specs, alike = demo_specs(settings.lora.rank), defaultdict(list)
    for name, method in CATALOGUE.items():
        found = traffic(method, specs, settings, clients)
        alike[_span(found.up), _span(found.down)].append(f"`{name}`")
    return _rows(("methods", "up", "down"), ([", ".join(names), *both] for both, names in alike.items()))


def demo_specs(rank: int) -> list[TensorSpec]:
    """Return the trained tensors of the demo's model: query and value of two layers of width 384, two labels."""
    specs = []
    for layer in _LAYERS:
        specs += [TensorSpec(f"{layer}.lora_A.weight", (rank, _WIDTH), "A", layer, "weight")]
        specs += [TensorSpec(f"{layer}.lora_B.weight", (_WIDTH, rank), "B", layer, "weight")]
    head = [TensorSpec("head.weight", (_LABELS, _WIDTH), "head", "head", "weight")]
    return [*specs, *head, TensorSpec("head.bias", (_LABELS,), "head", "head", "bias")]


def _span(bounds: tuple[int, int] | None) -> str:
    if bounds is None:
        return "-"
    return f"{bounds[0]}" if bounds[0] == bounds[1] else f"{bounds[0]} - {bounds[1]}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main(path: Path) -> None:
    """Write the tables of a document anew."""
    settings = load_settings(path.resolve().parents[1] / "params.yaml")
    path.write_text(written(path.read_text(encoding="utf-8"), settings), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
