"""Settings: what is read, what is refused and in which words, and that the defaults are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedpipe.config import Settings, load_settings, parse_override, parse_settings
from fedpipe.errors import SettingsError

NEEDED: dict[str, Any] = {"data": {"source": "records.csv"}, "model": {"backbone": "backbone"}}


def values(path: str, value: Any) -> dict[str, Any]:
    """Return the smallest settings with one key laid over them."""
    section, _, key = path.partition(".")
    if not key:
        return {**NEEDED, section: value}
    return {**NEEDED, section: {**NEEDED.get(section, {}), key: value}}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(values, where="params.yaml")
    return str(caught.value)


class TestDefaults:
    def test_only_two_keys_have_none(self) -> None:
        assert refusal({}).splitlines() == [
            "params.yaml: data: missing; every settings file needs it",
            "params.yaml: model: missing; every settings file needs it",
        ]
        assert refusal({"data": {}, "model": {}}).splitlines() == [
            "params.yaml: data.source: missing; every settings file needs it",
            "params.yaml: model.backbone: missing; every settings file needs it",
        ]
        assert parse_settings(NEEDED).data.source == "records.csv"

    def test_they_are_the_ones_that_scripts_rely_on(self) -> None:
        flat = parse_settings(NEEDED).flat()
        published = {
            "seed": 17,
            "data.text": "text",
            "data.label": "label",
            "data.max_length": 64,
            "partition.scheme": "dirichlet",
            "partition.clients": 8,
            "partition.min_records": 64,
            "model.task": "text-classification",
            "lora.rank": 8,
            "lora.alpha": 8.0,
            "lora.dropout": 0.0,
            "lora.targets": "auto",
            "lora.train_head": True,
            "federation.rounds": 10,
            "federation.local_steps": 5,
            "federation.batch_size": 256,
            "federation.max_participations": None,
            "method.name": "la-lora",
            "optimizer.name": "sgd",
            "privacy.unit": "record",
            "privacy.epsilon": 8.0,
            "privacy.delta": "auto",
            "privacy.clip_norm": 1.0,
            "privacy.accountant": "prv",
            "privacy.test_key": None,
            "evaluation.every": 1,
            "evaluation.batch_size": 256,
            "runtime.device": "auto",
            "runtime.precision": "fp32",
            "runtime.engine": "cohort",
            "runtime.tokens_per_batch": "auto",
            "runtime.cohort_size": "auto",
            "runtime.task_runner": "threads",
            "tracking.uri": "sqlite:///mlflow.db",
            "tracking.experiment": "fedpipe",
        }
        assert {key: flat[key] for key in published} == published

    def test_flat_names_every_key_and_tells_no_key(self) -> None:
        settings = parse_settings(values("privacy.test_key", "0f" * 32))
        flat = settings.flat()

        def count(value: Any) -> int:
            return sum(map(count, value.values())) if isinstance(value, dict) else 1

        assert len(flat) == count(settings.model_dump())
        assert flat["privacy.test_key"] == "set"
        assert "0f0f" not in str(flat)


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("sed", 1, "sed: unknown key; did you mean 'seed'?"),
            ("federation.roundz", 3, "federation.roundz: unknown key; did you mean 'rounds'?"),
            ("evaluation.x", 3, "evaluation.x: unknown key; expected one of: every, batch_size"),
            ("seed", "1", "seed: found '1'; expected a whole number"),
            ("seed", 1.5, "seed: found 1.5; expected a whole number"),
            ("seed", True, "seed: found true; expected a whole number"),
            ("seed", -1, "seed: found -1; expected greater than or equal to 0"),
            ("data.source", None, "data.source: found nothing; expected a string"),
            ("data.test_fraction", 1.0, "data.test_fraction: found 1.0; expected less than 1"),
            ("data", "records.csv", "data: found 'records.csv'; expected keys below it: source, text, label, group"),
            ("partition.scheme", "dirichet", "partition.scheme: found 'dirichet'; did you mean 'dirichlet'?"),
            ("partition.scheme", "x", "expected one of: iid, dirichlet, shards, natural"),
            ("partition.alpha", 0, "partition.alpha: found 0; expected greater than 0"),
            ("partition.alpha", float("inf"), "partition.alpha: found inf; expected a finite number"),
            ("partition.scheme", "natural", "partition: scheme 'natural' needs partition.column"),
            ("partition.clients", None, "partition: scheme 'dirichlet' needs partition.clients, a whole number"),
            ("lora.targets", 3, "lora.targets: found 3; expected 'auto' or a list"),
            ("lora.targets", ["query", 3], "lora.targets.1: found 3; expected a string"),
            ("lora.targets", "query", "lora.targets: found 'query'; expected 'auto' or a list"),
            ("lora.train_head", "yes", "lora.train_head: found 'yes'; expected a boolean"),
            ("federation.rounds", 0, "federation.rounds: found 0; expected greater than or equal to 1"),
            ("federation.clients_per_round", 9, "clients_per_round is 9, but partition.clients is 8; expected no more"),
            ("optimizer.name", "adam", "optimizer.name: found 'adam'; did you mean 'adamw'?"),
            ("optimizer", {"name": "adamw", "momentum": 0.9}, "optimizer.momentum belongs to sgd; adamw has beta1"),
            ("privacy.unit", "groups", "privacy.unit: found 'groups'; did you mean 'group'?"),
            ("privacy.unit", "group", "privacy: unit 'group' needs privacy.group, the column"),
            ("privacy.delta", 1.5, "privacy.delta: found 1.5; expected a number below 1, or auto"),
            ("privacy.test_key", "abc", "privacy.test_key: expected 64 hexadecimal digits (32 bytes), in quotes"),
            ("runtime.cohort_size", "all", "runtime.cohort_size: found 'all'; expected a whole number or 'auto'"),
            ("runtime.device", "gpu", "runtime.device: found 'gpu'; "),
        ],
    )
    def test_one_line_with_key_finding_and_cure(self, path: str, value: Any, message: str) -> None:
        line = refusal(values(path, value))
        assert "\n" not in line
        assert line.startswith("params.yaml: ")
        assert message in line

    def test_all_mistakes_at_once(self) -> None:
        wrong = {**NEEDED, "sed": 1, "lora": {"rank": 0, "alfa": 1}, "privacy": {"epsilon": -1}}
        lines = refusal(wrong).splitlines()
        assert [line.split(":")[1].strip() for line in lines] == ["lora.rank", "lora.alfa", "privacy.epsilon", "sed"]

    def test_what_was_found_never_fills_the_screen(self) -> None:
        line = refusal(values("seed", "x" * 5000))
        assert len(line) < 150
        assert "x…" in line

    def test_a_wrong_test_key_is_not_repeated(self) -> None:
        assert "c0ffee" not in refusal(values("privacy.test_key", "c0ffee"))


class TestFile:
    def load(self, tmp_path: Path, text: str, **overrides: Any) -> Settings:
        (tmp_path / "params.yaml").write_text(text)
        return load_settings(tmp_path / "params.yaml", {key.replace("__", "."): v for key, v in overrides.items()})

    def test_overrides_lie_over_the_file(self, tmp_path: Path) -> None:
        text = "data: {source: a.csv}\nmodel: {backbone: b}\nfederation: {rounds: 4, local_steps: 2}\n"
        settings = self.load(tmp_path, text, federation__rounds=3, method__name="ffa-lora", seed=1)
        assert (settings.federation.rounds, settings.federation.local_steps) == (3, 2)
        assert (settings.method.name, settings.seed) == ("ffa-lora", 1)

    def test_yaml_is_1_2(self, tmp_path: Path) -> None:
        text = "data: {source: no, label: on}\nmodel: {backbone: b}\noptimizer: {lr: 1e-3}\n"
        settings = self.load(tmp_path, text)
        assert (settings.data.source, settings.data.label, settings.optimizer.lr) == ("no", "on", 1e-3)

    def test_an_override_through_a_value(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"^seed\.x: 'seed' holds a value, not keys$"):
            self.load(tmp_path, "seed: 1\n", seed__x=1)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [1", r"params\.yaml, line 1, column 6: is not YAML: expected ',' or '\]', but got '<stream end>'$"),
            ("a: 1\na: 2\n", r"params\.yaml, line 2, column 1: is not YAML: found duplicate key"),
            ("a: !!python/name:os.system\n", r"is not YAML: could not determine a constructor for the tag"),
            ("\x00", r"params\.yaml: is not YAML: special characters are not allowed$"),
            ("", r"params\.yaml: found nothing; expected keys such as 'data:' and 'model:'$"),
            ("[1, 2]", r"params\.yaml: found \[1, 2\]; expected keys such as 'data:' and 'model:'$"),
        ],
    )
    def test_what_is_no_settings_file(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(SettingsError, match=message) as caught:
            self.load(tmp_path, text)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "params.yaml").write_bytes(b"\xff\xfe")
        with pytest.raises(SettingsError, match=r"params\.yaml: is not YAML: invalid start byte$"):
            load_settings(tmp_path / "params.yaml")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"cannot be read: No such file or directory; run this where params"):
            load_settings(tmp_path / "params.yaml")


class TestOverride:
    @pytest.mark.parametrize(
        ("text", "parsed"),
        [
            ("federation.rounds=3", ("federation.rounds", 3)),
            ("tracking.uri=sqlite:///a.db?x=1", ("tracking.uri", "sqlite:///a.db?x=1")),
            ("tracking.uri=null", ("tracking.uri", None)),
            ("tracking.uri=", ("tracking.uri", None)),
            ("lora.targets=[q, v]", ("lora.targets", ["q", "v"])),
            ("privacy.epsilon=.5", ("privacy.epsilon", 0.5)),
        ],
    )
    def test_the_value_is_yaml(self, text: str, parsed: tuple[str, Any]) -> None:
        assert parse_override(text) == parsed

    @pytest.mark.parametrize("text", ["rounds", "=3", ""])
    def test_without_a_key_or_a_value(self, text: str) -> None:
        with pytest.raises(SettingsError, match=r"--set .*: expected section\.key=value, such as method\.name="):
            parse_override(text)

    def test_a_value_that_is_no_yaml(self) -> None:
        with pytest.raises(SettingsError, match=r"^--set a=\[1: the value is not YAML: expected ',' or '\]'"):
            parse_override("a=[1")


class TestFrozen:
    def test_nothing_can_be_changed(self) -> None:
        settings = parse_settings(NEEDED)
        with pytest.raises(ValidationError):
            settings.seed = 1
        with pytest.raises(ValidationError):
            settings.privacy.epsilon = 100.0

    def test_private_is_the_default(self) -> None:
        assert parse_settings(NEEDED).private
        assert not parse_settings(values("privacy.unit", "none")).private
