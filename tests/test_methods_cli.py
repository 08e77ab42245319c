"""`fedpipe methods`: every method is listed and has a card, and the bytes it shows are those it sends."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import make_project

from fedpipe.cli import main
from fedpipe.listing.overview import PLAIN, differing, families, spelled
from fedpipe.listing.traffic import Model, Traffic, open_model, sent_in, with_structure
from fedpipe.methods import CATALOGUE, Method, register
from fedpipe.methods.sums import not_summed
from fedpipe.models.factors import GlobalState, pairs
from fedpipe.models.layers import TensorSpec
from fedpipe.server.aggregate import Mean, Round
from fedpipe.server.initialisation import Global
from fedpipe.server.ranks import RankPolicy
from fedpipe.server.round import Updates, server_round
from fedpipe.server.scheduling import Buffered, Ringmaster
from fedpipe.server.weights import Norm, Samples

NAMES = list(CATALOGUE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project") / "made"
    make_project(root)
    return root


@pytest.fixture(scope="module")
def model(project: Path) -> Model:
    found, missing = open_model(project / "params.yaml", ())
    assert missing is None
    return found


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def methods(*words: str, params: Path | None = None, width: int | None = None) -> Result:
    given = ["methods", *words, *(["--params", str(params)] if params else [])]
    return CliRunner().invoke(main, given, env={"COLUMNS": str(width)} if width else None)


def flowed(text: str) -> str:
    """Return a text without its line breaks and bullets, as it was before it was laid out."""
    return " ".join(text.split())


# The list


def test_every_method_has_one_line_with_its_bytes(project: Path, model: Model) -> None:
    done = methods(params=project / "params.yaml")
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line[:4] == " " * 4 and line[4:5].strip()]
    assert [name for name in listed if name != "method"] == NAMES
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name, method in CATALOGUE.items():
        assert method.summary in lines[name]
        assert re.search(r" [\d.]+ k?B .* [\d.]+ k?B .* (yes|no) +(yes|no) +(yes|no) ", lines[name])
        for axis, part in differing(method).items():
            assert f"{axis} {part.name}" in done.stdout
    assert "Bytes are left out" not in done.stdout


@pytest.mark.parametrize("width", [50, 80, 109, 110, 140])
def test_no_line_is_wider_than_the_terminal(project: Path, width: int) -> None:
    for words in ((), (NAMES[-1],)):
        shown = methods(*words, params=project / "params.yaml", width=width).stdout
        assert max(map(len, shown.splitlines())) <= width
        assert "\x1b" not in shown
        assert not any(line.endswith(" ") for line in shown.splitlines())
    everything = flowed(methods(params=project / "params.yaml", width=width).stdout)
    if width < 110:
        assert all(method.summary in everything for method in CATALOGUE.values())


def test_without_a_project_the_bytes_are_left_out_and_it_says_why(tmp_path: Path) -> None:
    for words in ((), ("la-lora",)):
        done = methods(*words, params=tmp_path / "params.yaml")
        assert done.exit_code == 0
        assert "Bytes are left out: " in done.stdout
        assert "params.yaml: cannot be read" in done.stdout
        assert not re.search(r"\d k?B\b", done.stdout)
    assert "A and B of every adapted layer, the head" in done.stdout


def test_before_the_partition_is_made_it_says_what_to_run(project: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    shown = methods(params=tmp_path / "params.yaml").stdout
    assert re.search(r"Bytes are left out: .*run `fedpipe \w+`", shown)


def test_an_override_changes_the_bytes_and_a_wrong_one_is_a_mistake(project: Path) -> None:
    def up(*words: str) -> str:
        shown = methods("dp-lora", *words, params=project / "params.yaml").stdout
        return re.search(r"up +([\d.]+ k?B)", shown).group(1)

    assert (up(), up("--set", "lora.rank=4")) == ("1.2 kB", "2.2 kB")
    done = methods("--set", "lora.rnk=4", params=project / "params.yaml")
    assert done.exit_code == 2
    assert "did you mean 'rank'?" in done.stderr


def test_families_are_the_modules_of_entries_and_what_was_registered() -> None:
    own = replace(CATALOGUE["dp-lora"], name="mine", summary="Mine.")
    register(own)
    try:
        groups = families(CATALOGUE)
    finally:
        del CATALOGUE["mine"]
    assert groups["Registered in this process"] == [own]
    assert sorted(method.name for members in groups.values() for method in members) == sorted([*NAMES, "mine"])
    assert CATALOGUE["la-lora"] in groups["Methods that differ in which factor is trained when"]


# Cards


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_all_that_the_entry_says(project: Path, name: str) -> None:
    method = CATALOGUE[name]
    done = methods(name, params=project / "params.yaml")
    shown = flowed(done.stdout)
    assert done.exit_code == 0
    assert shown.startswith(f"{name}: {flowed(method.summary)} {flowed(method.paper)}")
    assert flowed(method.idea) in shown
    for line in method.differs:
        assert f"- {flowed(line)}" in shown
    for axis, part in method.parts.items():
        assert f"{axis} {part.name}" in shown
    for axis, part in differing(method).items():
        assert flowed(f"{axis} {spelled(part, all_options=True)}") in shown
        assert flowed(part.__doc__.splitlines()[0]) in shown
    assert f"method: {{name: {name}}}" in shown


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    done = methods("la-lara", params=tmp_path / "params.yaml")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr == "error: there is no method named 'la-lara'; did you mean 'la-lora'?\n"


def test_options_are_spelled_as_in_the_settings() -> None:
    assert spelled(Buffered(ignore_stale=True)) == "buffered {ignore_stale: true}"
    assert spelled(Ringmaster(), all_options=True) == "ringmaster {spread: 0.5, threshold: null}"
    assert spelled(Mean()) == "mean"


# What may be combined


class Asking(RankPolicy):
    name = "asking"

    def pruned(self, rank: int, began: Any, ended: Any, specs: Any) -> int:
        return 1


def test_a_sum_suffices_only_where_nobody_looks_at_single_updates() -> None:
    plain = CATALOGUE["dp-lora"]

    class Median(Mean):
        name = "some-median"
        linear = False

    assert not_summed(plain) is None
    assert not_summed(replace(plain, aggregation=Median())) == "aggregation some-median needs every client's update"
    assert not_summed(replace(plain, weights=Norm())) == "weights norm are not public"
    assert not_summed(replace(plain, weights=Samples())) is None  # whole numbers, masked as the updates are
    assert not_summed(replace(plain, ranks=Asking())) == "ranks asking follows what every client asks for"
    for method in CATALOGUE.values():
        assert method.aggregation.linear or not_summed(method)


def test_what_is_plain_is_what_a_method_has_by_default() -> None:
    assert differing(Method("m", "s", "p")) == {}
    assert Method("m", "s", "p").parts == dict(PLAIN)


# Bytes


def roberta(rank: int, layers: int = 24) -> list[TensorSpec]:
    """The adapters of query and value in RoBERTa-base: 768 x 768 each."""
    shapes = {"A": (rank, 768), "B": (768, rank)}
    return [
        TensorSpec(f"l{n:02d}.lora_{factor}.weight", shape, factor, f"l{n}", "weight")
        for n in range(layers)
        for factor, shape in shapes.items()
    ]


def counted(method: Method, model: Model, rank: int, clients: int = 10) -> Traffic:
    lora = model.settings.lora.model_copy(update={"rank": rank, "alpha": float(rank)})
    settings = model.settings.model_copy(update={"lora": lora})
    return Model(roberta(rank), settings, [f"c{n:03d}" for n in range(clients)]).traffic(method)


class Core(Global):
    name = "some-core"
    core = True


def test_bytes_at_the_size_of_roberta_are_the_published_ones(model: Model) -> None:
    both, one = (1_179_648, 1_179_648), (589_824, 589_824)
    assert counted(CATALOGUE["dp-lora"], model, 8) == Traffic(both, both)
    assert counted(CATALOGUE["la-lora"], model, 8) == Traffic(both, both)
    assert counted(CATALOGUE["ffa-lora"], model, 8) == Traffic(one, one)
    assert counted(CATALOGUE["rolora"], model, 8) == Traffic(one, one)
    assert counted(replace(CATALOGUE["dp-lora"], initialisation=Core()), model, 64) == Traffic(
        (393_216,) * 2, (393_216,) * 2
    )


@pytest.fixture(params=CATALOGUE.values(), ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def test_down_is_what_the_server_counts(method: Method, model: Model) -> None:
    """Of layers that are all of one shape one is tried out, or none; here the server steps with all of them."""
    settings = model.settings
    specs, names = with_structure(method, model.specs, settings.seed), [f"c{n}" for n in range(12)]
    sent = sent_in(method, specs, 1, settings.federation.rounds, settings.federation.local_steps, settings.seed)
    generator = torch.Generator().manual_seed(4)
    state = {spec.name: torch.randn(spec.shape, generator=generator) for spec in specs}
    facts = Round(
        number=1,
        rounds=settings.federation.rounds,
        specs=specs,
        sent=sent,
        scale=2.0,
        start=state,
        ranks=dict.fromkeys(names, settings.lora.rank),
        records=dict.fromkeys(names, 9),
        seed=settings.seed,
    )
    expected = [*sent, *method.objective.extra_specs(sent)]
    updates = {
        name: {s.name: state.get(s.name, 0) + 0.1 * torch.randn(s.shape, generator=generator) for s in expected}
        for name in names
    }
    weights = {pair.name: torch.randn(pair.B.shape[0], pair.A.shape[1], generator=generator) for pair in pairs(specs)}
    read = {name: partial(dict, update) for name, update in updates.items()}
    result = server_round(method, facts, GlobalState(state), {}, Updates(read), len(names), weights.__getitem__)
    least, most = Model(model.specs, settings, names).traffic(method).down
    assert least <= 4 * result.down <= most


def test_up_is_what_the_method_sends(method: Method, model: Model) -> None:
    """The least and the most of all rounds: what is sent may alternate, or have phases."""
    settings, full = model.settings, set()
    specs = with_structure(method, model.specs, settings.seed)
    for number in range(1, settings.federation.rounds + 1):
        sent = sent_in(method, specs, number, settings.federation.rounds, 2, settings.seed)
        full.add(4 * sum(spec.numel for spec in [*sent, *method.objective.extra_specs(sent)]))
    least, most = model.traffic(method).up
    if method.ranks.name == "common":
        assert (least, most) == (min(full), max(full))
    else:
        assert least <= most <= max(full)
