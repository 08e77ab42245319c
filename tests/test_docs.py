"""The documents say what the code does: settings, methods, commands, numbers, links, examples."""

from __future__ import annotations

import ast
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
from fedpipe.client.schedule import SCHEDULES
from fedpipe.client.training import payload
from fedpipe.config import Settings, parse_settings
from fedpipe.methods import CATALOGUE, Method, compose
from fedpipe.methods.catalogue import AXES
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
        rows = [[cell.strip().replace("`", "") for cell in line[1:-1].split("|")] for line in table.splitlines()]
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
    assert set(TEXTS) >= names | {f"docs/{name}.md" for name in ("architecture", "methods", "privacy", "operations")}
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
    made = {"data/sources/letters.parquet", "data/sources/reviews.csv"}
    for span in spans(TEXTS[name]):
        if re.fullmatch(r"(fedpipe|flows|tasks|tests|docs)/[\w./-]+|[\w-]+\.(yaml|toml|txt|md)", span):
            assert (ROOT / span).exists() or span in made, span
        if re.fullmatch(r"\w+\.py", span):
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
            yield from defaults_of(kind, f"{name}.")
        else:
            yield prefix + name, field.default


class TestMethods:
    def test_the_table_is_the_catalogue(self) -> None:
        described = table("docs/methods.md", "method", *AXES, "private")
        expected = {
            name: [*method.axes.values(), "yes" if method.private else "no"] for name, method in CATALOGUE.items()
        }
        assert described == expected

    def test_every_method_and_choice_is_described(self) -> None:
        text = TEXTS["docs/methods.md"]
        assert re.findall(r"^### (\S+)$", text, re.MULTILINE) == list(CATALOGUE)
        assert re.findall(r"^\*\*`(\w+)`\*\*", text, re.MULTILINE) == list(AXES)
        named = set(spans(text.partition("## The axes")[2]))
        assert {choice for choices in AXES.values() for choice in choices} <= named
        for method in CATALOGUE.values():
            assert method.paper.rpartition("arXiv ")[2] in text

    def test_traffic(self) -> None:
        layers = [f"layer.{layer}.{part}" for layer in (4, 5) for part in ("query", "value")]
        specs = [TensorSpec(f"{layer}.A", (4, 384), "A", layer, "weight") for layer in layers]
        specs += [TensorSpec(f"{layer}.B", (384, 4), "B", layer, "weight") for layer in layers]
        specs += [TensorSpec("head.weight", (2, 384), "head", "head", "weight")]
        specs += [TensorSpec("head.bias", (2,), "head", "head", "bias")]
        trained = frozenset(spec.name for spec in specs)

        def size(method: Method, round: int) -> int:
            sent = payload(specs, method, trained, round, 2) if round else specs
            return 4 * sum(spec.numel for spec in sent)

        described = table("docs/methods.md", "method", "up, odd round")
        expected = {name: [str(size(method, round)) for round in (1, 2, 0, 1, 2)] for name, method in CATALOGUE.items()}
        assert described == expected

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


class TestPrivacy:
    def test_golden_numbers(self) -> None:
        described = table("docs/privacy.md", "history: (sigma, q, steps)")
        found = [
            (list(ast.literal_eval(f"[{history}]")), float(rdp), float(prv))
            for history, (rdp, prv) in described.items()
        ]
        assert found == GOLDEN

    def test_numbers_in_sentences(self) -> None:
        text = TEXTS["docs/privacy.md"]
        separate, replaced = ([(1 / 2**0.5, 0.01, 1000)], [(0.5, 0.01, 1000)])
        assert f"turns 1.84 into {epsilon_prv(separate, 1e-5):.2f}" in text
        assert f"{epsilon_prv(replaced, 1e-5):.1f} instead of 1.84" in text
        published = [(0.36, 16 / 3367, 2000)]
        expected = f"{epsilon_prv(published, 1e-5):.1f} (PRV) and {epsilon_rdp(published, 1e-5):.1f} (RDP)"
        assert expected in TEXTS["docs/methods.md"]


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
                parse_settings({"data": {"source": "x"}, "model": {"backbone": "x"}} | values)

    def test_a_method_is_added_as_it_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (example,) = [block for block in blocks(TEXTS["README.md"], "python") if "def every_third" in block]
        monkeypatch.setitem(SCHEDULES, "every-third", SCHEDULES["both"])
        monkeypatch.setitem(CATALOGUE, "every-third", CATALOGUE["fedit"])
        names = {"TensorSpec": TensorSpec, "SCHEDULES": SCHEDULES, "CATALOGUE": CATALOGUE, "Method": Method}
        exec(example, names)
        method = compose(
            parse_settings(
                {"data": {"source": "x"}, "model": {"backbone": "x"}, "method": {"name": "every-third"}},
            )
        )
        specs = {factor: TensorSpec(factor, (1, 1), factor, "layer", "weight") for factor in ("A", "B", "head")}
        active = [
            [factor for factor, spec in specs.items() if method.is_active(round, 1, spec)] for round in range(1, 5)
        ]
        assert active == [["B", "head"], ["B", "head"], ["A", "head"], ["B", "head"]]
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
