"""The documents say what the code does: settings, methods, commands, numbers, links, examples."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML
from test_accounting import GOLDEN

from fedpipe import errors
from fedpipe.cli import main
from fedpipe.client.filters import _BINOMIAL, padded_indices
from fedpipe.config import Settings, load_settings, parse_settings
from fedpipe.listing.document import demo_specs, written
from fedpipe.listing.overview import differing
from fedpipe.methods import AXES, CATALOGUE, Method, compose, rules
from fedpipe.methods import catalogue as catalogue_module
from fedpipe.methods.sums import not_summed
from fedpipe.methods.whole import not_for_clients
from fedpipe.models.lora import TensorSpec
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from flows.describe import _METRICS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "sources" / "README.md"])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """Return what stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the head and the rows of every table, backticks taken off."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", line[1:-1]) for line in table.splitlines()]
        rows = [[cell.strip().replace("`", "") for cell in row] for row in cells]
        yield rows[0], rows[2:]


def table(name: str, *head: str) -> dict[str, list[str]]:
    """Return the rows of the one table whose head begins so, by their first cell."""
    (found,) = [rows for cells, rows in tables(TEXTS[name]) if cells[: len(head)] == list(head)]
    result = {row[0]: row[1:] for row in found}
    assert len(result) == len(found)
    return result


def headings_of(path: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)


def slug(heading: str) -> str:
    """Return the anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def test_the_documents_are_there() -> None:
    names = {"README.md", "CHANGELOG.md", "data/sources/README.md"}
    docs = ("architecture", "methods", "add-a-method", "privacy", "operations")
    assert set(TEXTS) >= names | {f"docs/{name}.md" for name in docs}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[name]))
    broken = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        headings = headings_of(target) if anchor and target.is_file() else []
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    made = {"data/sources/letters.parquet", "data/sources/reviews.csv", "vote.py"}
    for span in spans(TEXTS[name]):
        if re.fullmatch(r"(fedpipe|flows|tasks|tests|docs)/[\w./-]+|[\w-]+\.(yaml|toml|txt|md)", span):
            assert (ROOT / span).exists() or span in made, span
        if re.fullmatch(r"\w+\.py", span) and span not in made:
            assert (ROOT / "fedpipe" / span).is_file(), span


def code(text: str) -> str:
    return "\n".join([*spans(text), *(body for _, body in FENCE.findall(text))])


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?<![\w/.-])fedpipe ([a-z][\w-]*)", code(TEXTS[name])))
    made = set(re.findall(r"(?<![\w/.-])make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", code(TEXTS[name])))
    assert named <= set(main.commands)
    assert made <= targets


def test_every_command_and_target_is_described() -> None:
    text = code(TEXTS["docs/operations.md"])
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    assert all(f"fedpipe {command}" in text for command in main.commands)
    assert all(f"make {target}" in text for target in phony[1].split())


class TestOperations:
    def test_every_setting_stands_in_the_table_with_its_default(self) -> None:
        described = {key: cells[1] for key, cells in table("docs/operations.md", "key", "type").items()}
        defaults = dict(defaults_of(Settings))
        assert list(described) == list(defaults)
        yaml = YAML(typ="safe", pure=True)
        for key, text in described.items():
            if defaults[key] is PydanticUndefined:
                assert text == "required", key
            else:
                assert yaml.load(text) == defaults[key], key

    def test_every_metric_is_described(self) -> None:
        named = ", ".join(table("docs/operations.md", "metric (step: round)"))
        assert set(named.split(", ")) == set(_METRICS.values())

    def test_every_exit_code_is_described(self) -> None:
        kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
        codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.FedpipeError)}
        assert codes | {0, 1, 130} == set(map(int, table("docs/operations.md", "exit code")))


def defaults_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from defaults_of(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


METHODS = TEXTS["docs/methods.md"]


def settings_of(*cells: str) -> Settings:
    """Return the settings that pieces of YAML in backticks ask for, laid over none."""
    values: dict[str, Any] = {"data": {"source": "x"}, "model": {"backbone": "x"}}
    for text in cells:
        for span in re.findall(r"`([^`]+)`", text):
            values |= YAML(typ="safe", pure=True).load(span)
    return parse_settings(values)


def rows_of(section: str, *head: str) -> list[list[str]]:
    """Return the rows of the one table of a section of docs/methods.md, backticks left on."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", METHODS, re.MULTILINE | re.DOTALL)
    (found,) = re.findall(rf"^\| {re.escape(' | '.join(head))} \|\n\|[-| ]+\|\n((?:^\|.*\|\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in found.splitlines()]


REFUSED = rows_of("What cannot be combined", "settings", "why")
COMPOSED = rows_of("Compositions worth knowing", "what", "settings")


class TestMethods:
    def test_the_tables_are_written_by_the_code(self) -> None:
        """`python -m fedpipe.listing.document docs/methods.md` writes them anew."""
        assert written(METHODS, load_settings(ROOT / "params.yaml")) == METHODS
        asked_for = re.findall(r"^<!-- table: (.+) -->$", METHODS, re.MULTILINE)
        assert asked_for == ["catalogue", *AXES, "traffic"]
        assert METHODS.count("<!-- end -->") == len(asked_for)

    def test_the_catalogue_says_what_the_methods_are(self) -> None:
        described = table("docs/methods.md", "method", "parts that are not plain")
        assert list(described) == list(CATALOGUE)
        for name, (parts, *said) in described.items():
            method = CATALOGUE[name]
            plain = Method("plain", "", "")
            for axis, part in method.parts.items():
                assert (f"{axis} {part.name}" in parts) == (part != getattr(plain, axis)), name
            facts = (method.private, method.personal, not_for_clients(method) is None, not_summed(method) is None)
            assert said == ["yes" if fact else "no" for fact in facts]

    def test_every_part_stands_in_its_axis_with_its_options_and_defaults(self) -> None:
        yaml = YAML(typ="safe", pure=True)
        found = [rows for cells, rows in tables(METHODS) if cells == ["part", "what it does", "options with defaults"]]
        assert len(found) == len(AXES)
        for rows, parts in zip(found, AXES.values(), strict=True):
            assert [row[0] for row in rows] == list(parts)
            for name, _, options in rows:
                bare = re.sub(r" \(or [^)]*\)", "", options)
                defaults = parts[name]().model_dump(mode="json")
                assert (yaml.load(f"{{{bare}}}") or {}) == defaults, name

    def test_every_method_and_choice_is_described(self) -> None:
        headings = re.findall(r"^### (.+)$", METHODS, re.MULTILINE)
        assert [name for heading in headings for name in heading.split(", ")] == list(CATALOGUE)
        assert re.findall(r"^\*\*`(\w+)`\*\*", METHODS, re.MULTILINE) == list(AXES)
        named = set(spans(METHODS.partition("## The axes")[2]))
        assert {choice for choices in AXES.values() for choice in choices} <= named

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_a_method_is_described_with_its_paper(self, name: str) -> None:
        sections = re.findall(r"^### (.+)\n+((?:(?!^##).*\n)+)", METHODS, re.MULTILINE)
        (text,) = [body for heading, body in sections if name in heading.split(", ")]
        papers = re.findall(r"arXiv (\d{4}\.\d{5})", CATALOGUE[name].paper)
        assert all(f"https://arxiv.org/abs/{paper}" in text for paper in papers)
        assert len(text.split()) >= 20
        # Settings that the text speaks of exist; a key of its own stands for the method it is said of.
        for span in spans(text):
            if re.fullmatch(r"(\w+): \S.*", span) and span.partition(":")[0] in AXES:
                compose(settings_of(f"`method: {{name: {name}, {span}}}`", "`privacy: {unit: none}`"))

    def test_the_readme_has_every_method_once(self) -> None:
        listed = [name for _, cells in table("README.md", "family", "methods").items() for name in cells[0].split(", ")]
        listed = [name.removesuffix(" (without privacy)") for name in listed]
        assert sorted(listed) == sorted(CATALOGUE)

    @pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
    def test_what_cannot_be_combined_is_refused(self, row: list[str]) -> None:
        with pytest.raises(errors.SettingsError):
            compose(settings_of(row[0]))

    def test_every_rule_has_an_example(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each rule of fedpipe/methods/rules.py refuses one of the rows at least."""
        monkeypatch.setattr(catalogue_module, "check", lambda method, settings: None)
        broken = set()
        every = {
            name: rule
            for name, rule in vars(rules).items()
            if inspect.isfunction(rule) and list(inspect.signature(rule).parameters) == ["method", "settings"]
        }
        del every["check"], every["warnings_for"]
        for row in REFUSED:
            try:
                settings = settings_of(row[0])
            except errors.SettingsError:
                continue
            method = compose(settings)
            broken |= {name for name, rule in every.items() if list(rule(method, settings))}
        assert broken == set(every)
        assert len(every) >= 9

    @pytest.mark.parametrize("row", COMPOSED, ids=lambda row: row[0])
    def test_compositions_are_allowed(self, row: list[str]) -> None:
        settings = settings_of(row[1])
        method = compose(settings)
        asked = {axis for axis in AXES if getattr(settings.method, axis) is not None}
        assert asked  # nothing but a name would be no composition
        assert method != CATALOGUE[method.name]
        assert asked <= differing(method).keys() | differing(CATALOGUE[method.name]).keys()

    def test_traffic(self) -> None:
        """What clients send in a round, counted by hand from the shapes, for the simplest of each kind."""
        described = {
            name: row
            for names, row in table("docs/methods.md", "methods", "up", "down").items()
            for name in names.split(", ")
        }
        assert described.keys() == CATALOGUE.keys()
        factor, head = 4 * 4 * 384, 384 * 2 + 2  # of four layers at rank 4
        expected = {
            "dp-lora": 2 * factor + head,
            "ffa-lora": factor + head,
            "rolora": factor + head,
            "scaffold": 2 * (2 * factor + head),
            "fed-sb": 4 * 4 * 4 + head,
            "fedsa-lora": factor,
            "fedalt": 2 * factor,
        }
        for name, numbers in expected.items():
            assert described[name] == [str(4 * numbers)] * 2, name
        # Of four clients: three residual products and the mean's factors, or four products.
        assert described["fedex-lora"][1] == described["flora"][1] == str(4 * (4 * 2 * factor + head))
        assert described["fedsvd"] == [str(4 * (factor + head)), str(4 * (2 * factor + head))]
        specs = demo_specs(4)
        for name, (up, _) in described.items():
            method = CATALOGUE[name]
            if method.ranks.name == "common" and not (method.initialisation.core or method.initialisation.sparse):
                sent = method.sends(specs, 1, 2)
                extra = method.objective.extra_specs(sent)
                assert up == str(4 * sum(spec.numel for spec in [*sent, *extra])), name

    def test_padding(self) -> None:
        for padding, cells in table("docs/methods.md", "value", "beyond the edge").items():
            taps = padded_indices(16, padding)
            matrix = torch.zeros(16, 16, dtype=torch.float64)
            for weight, tap in zip(_BINOMIAL, taps, strict=True):
                matrix[torch.arange(16), tap] += weight
            kept, variance = matrix.sum(0), matrix.square().sum(1)
            for text, values in ((cells[1], kept), (cells[2], variance)):
                numbers = [float(number) for number in re.findall(r"[\d.]+\d|\d", text)]
                assert len(numbers) >= 3
                assert numbers == pytest.approx(values[: len(numbers)].tolist(), abs=5e-4)


class TestAxes:
    """The tables with a row for each axis, beside that of docs/methods.md."""

    def test_interfaces_are_those_of_the_classes(self) -> None:
        text = TEXTS["docs/add-a-method.md"]
        (body,) = re.findall(r"^\| axis \| class and file .*\n.*\n((?:^\|.*\|\n)+)", text, re.MULTILINE)
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in body.splitlines()]
        assert [row[0].strip("`") for row in rows] == list(AXES)
        for axis, where, what, declared in rows:
            file = re.search(r"\(\.\./(fedpipe/[\w/]+)\.py\)", where)
            base = getattr(importlib.import_module(file[1].replace("/", ".")), spans(where)[0])
            assert all(issubclass(part, base) for part in AXES[axis.strip("`")].values())
            # What it declares, and the first thing to write, which is a method of the class.
            assert all(hasattr(base, name) for name in spans(declared)), axis
            assert hasattr(base, re.match(r"[^`]*`(\w+)", what)[1]), axis

    def test_what_is_free_is_said_for_every_axis(self) -> None:
        axes = ", ".join(table("docs/privacy.md", "axis", "sees"))
        assert sorted(axes.split(", ")) == sorted(AXES)

    def test_every_axis_is_a_setting(self) -> None:
        keys = [key.removeprefix("method.") for key in table("docs/operations.md", "key") if key.startswith("method.")]
        assert keys == ["name", *AXES]


class TestPrivacy:
    def test_golden_numbers(self) -> None:
        described = table("docs/privacy.md", "history: (sigma, q, steps)")
        found = [
            (list(ast.literal_eval(f"[{history}]")), float(rdp), float(prv))
            for history, (rdp, prv) in described.items()
        ]
        assert found == GOLDEN

    def test_what_replacing_costs(self) -> None:
        for history, (added, replaced, halved) in table("docs/privacy.md", "history", "add-remove").items():
            sigma, q, steps = ast.literal_eval(history)
            found = [epsilon_prv([(s, q, steps)], 1e-5, by) for s, by in (
                (sigma, "add-remove"), (sigma, "replace-one"), (sigma / 2, "add-remove"))]  # fmt: skip
            assert [f"{value:.4f}" for value in found] == [added, replaced, halved]

    def test_numbers_in_sentences(self) -> None:
        text = TEXTS["docs/privacy.md"]
        separate, halved = ([(1 / 2**0.5, 0.01, 1000)], [(0.5, 0.01, 1000)])
        assert f"turns 1.84 into {epsilon_prv(separate, 1e-5):.2f}" in text
        assert f"{epsilon_prv(halved, 1e-5):.1f} instead of 1.84" in text
        published = [(0.36, 16 / 3367, 2000)]
        expected = f"{epsilon_prv(published, 1e-5):.1f} (PRV) and {epsilon_rdp(published, 1e-5):.1f} (RDP)"
        assert expected in TEXTS["docs/methods.md"]


def active_factors(method: Method, rounds: int) -> list[str]:
    """Return the factors that each round's first step trains; the head always is."""
    specs = {factor: TensorSpec(factor, (1, 1), factor, "layer", "weight") for factor in ("A", "B", "head")}
    active = [
        [factor for factor, spec in specs.items() if method.is_active(round, 1, spec)] for round in range(1, rounds + 1)
    ]
    assert all("head" in factors for factors in active)
    return ["".join(factor for factor in factors if factor != "head") for factors in active]


class TestReadme:
    def test_python_is_python(self) -> None:
        found = blocks(TEXTS["README.md"], "python")
        assert len(found) >= 3
        for block in found:
            ast.parse(block)

    def test_settings_are_settings(self) -> None:
        for text in TEXTS.values():
            for block in blocks(text, "yaml"):
                values = YAML(typ="safe", pure=True).load(block)
                if "majority-vote" not in block:  # which another test registers
                    compose(parse_settings({"data": {"source": "x"}, "model": {"backbone": "x"}} | values))

    def test_a_method_is_added_as_it_says(self) -> None:
        (example,) = [block for block in blocks(TEXTS["README.md"], "python") if "class EveryNth" in block]
        try:
            exec(example, {"__name__": __name__})
            method = compose(settings_of("`method: {name: every-nth}`"))
            assert active_factors(method, 4) == ["B", "B", "A", "B"]
            assert active_factors(compose(settings_of("`method: {name: every-nth, schedule: {n: 2}}`")), 4) == [*"BABA"]
            with pytest.raises(errors.SettingsError, match="makes both factors anew"):
                compose(settings_of("`method: {name: every-nth, aggregation: flora}`"))
        finally:
            CATALOGUE.pop("every-nth", None)
            AXES["schedule"].pop("every-nth", None)
        assert method.private

    def test_the_ledger_is_checked_as_it_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (example,) = [block for block in blocks(TEXTS["README.md"], "python") if "PRVAccountant" in block]
        history, _, prv = GOLDEN[0]
        (tmp_path / "reports").mkdir()
        content = {"delta": 1e-5, "clients": {"c000": {"entries": history, "epsilon_prv": prv}}}
        (tmp_path / "reports" / "ledger.json").write_text(json.dumps(content))
        monkeypatch.chdir(tmp_path)
        exec(example, {})
        client, recomputed, recorded = capsys.readouterr().out.split()
        assert client == "c000"
        assert float(recomputed) == pytest.approx(float(recorded), abs=6e-5)
