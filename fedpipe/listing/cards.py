"""The card of a method: all that there is to say about it, derived from the method itself."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedpipe.listing.overview import as_yaml, both_ways, differing, spelled
from fedpipe.listing.traffic import Model, sent_in, with_structure
from fedpipe.methods.method import Method
from fedpipe.methods.sums import not_summed
from fedpipe.methods.whole import not_for_clients
from fedpipe.models.factors import pairs
from fedpipe.models.layers import TensorSpec
from fedpipe.parts import Part

_WORDS = {"A": "A", "B": "B", "R": "R", "sparse": "some entries"}
# A model of one layer, to say in words what is sent where there is no other.
_LAYER = (
    TensorSpec("m.lora_A.weight", (2, 3), "A", "m", "weight"),
    TensorSpec("m.lora_B.weight", (3, 2), "B", "m", "weight"),
    TensorSpec("head.weight", (2, 3), "head", "head", "weight"),
)


def card(method: Method, model: Model | None) -> RenderableType:
    """Return all that there is to say about one method."""
    own = differing(method)
    parts: list[RenderableType] = [
        Text.assemble((method.name, "bold"), f": {method.summary}"),
        Text(method.paper, style="dim"),
    ]
    if method.idea:
        parts += [Text(), Text(method.idea)]
    others = ", ".join(f"{axis} {part.name}" for axis, part in method.parts.items() if axis not in own)
    axes = [(axis, _part(part)) for axis, part in own.items()]
    parts += _section("axes and their options", [*axes, ("others" if own else "all", Text(others, style="dim"))])
    parts += _section("what a client sends and receives in a round", _sent(method, model))
    parts += _section("privacy", _privacy(method))
    if method.differs:
        title = "what differs here from the paper or its code, and why"
        parts += _section(title, [("-", line) for line in method.differs])
    return Group(*parts, *_section("in params.yaml", _settings(method)))


def _settings(method: Method) -> list[tuple[str, str]]:
    """Return how the method is chosen, and how an option of one of its own parts is changed."""
    rows = [("method:", f"{{name: {method.name}}}")]
    for axis, part in differing(method).items():
        for option in [key for key in type(part).model_fields if key in type(part).__annotations__][:1]:
            value = as_yaml(part.model_dump()[option])
            rows.append(("method:", f"{{name: {method.name}, {axis}: {{{option}: {value}}}}}"))
    return rows[:2]


def _section(title: str, rows: Sequence[tuple[str, str | Text]]) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for key, value in rows:
        grid.add_row(key, value)
    return [Text(), Text(title, style="bold"), Padding(grid, (0, 0, 0, 2))]


def _part(part: Part) -> Text:
    """Return a part's name, options and the first line of what it says of itself."""
    said = (part.__doc__ or "").splitlines()[0]
    return Text.assemble(spelled(part, all_options=True), "\n", (said, "dim"))


def _sent(method: Method, model: Model | None) -> list[tuple[str, str]]:
    rounds, steps, seed = _run(model)
    specs = with_structure(method, model.specs if model else _LAYER, seed)
    numbers = sorted({1, min(2, rounds), rounds})
    sent = {number: sent_in(method, specs, number, rounds, steps, seed) for number in numbers}
    layers = f"{len(pairs(specs))} layers" if model else "every adapted layer"
    words = {number: _named(members, layers) for number, members in sent.items()}
    what = words[1] if len(set(words.values())) == 1 else "; ".join(f"in round {n} {w}" for n, w in words.items())
    more = ", and as much again beside it" if method.objective.extra_specs(sent[1]) else ""
    up, down = (f"{size}: " for size in both_ways(method, model)) if model else ("", "")
    return [("up", f"{up}{what}{more}"), ("down", f"{down}what changed at the server in the round before")]


def _run(model: Model | None) -> tuple[int, int, int]:
    """Return the rounds, local steps and seed of the settings; without any, of a short run."""
    if model is None:
        return 2, 2, 0
    federation = model.settings.federation
    return federation.rounds, federation.local_steps, model.settings.seed


def _named(sent: Sequence[TensorSpec], layers: str) -> str:
    """Return which tensors are sent, in words."""
    factors = [shown for factor, shown in _WORDS.items() if any(spec.factor == factor for spec in sent)]
    words = [f"{' and '.join(factors)} of {layers}"] if factors else []
    words += ["the head"] if any(spec.factor == "head" for spec in sent) else []
    return ", ".join(words) or "nothing"


def _privacy(method: Method) -> list[tuple[str, str]]:
    whole, summed = not_for_clients(method), not_summed(method)
    return [
        ("record level", "yes, privacy.unit record" if method.private else "no: for privacy.unit none only"),
        ("client level", f"no: {whole}" if whole else "yes, privacy.unit client"),
        ("secure aggregation", f"no: {summed}" if summed else "yes, federation.secure_aggregation"),
    ]
