"""`params.yaml`, read into typed, frozen settings, or refused with a reason.

Every mistake in a file is reported at once, one line each: the key's path, what was
found, what was expected, and the nearest valid name. What only the data can tell (how
many records a client has, which epsilon can be reached) is checked by the plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML, YAMLError

from fedpipe.errors import SettingsError, hide_password
from fedpipe.mistakes import explain_all, shown

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # of what the plan lists one by one
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of keys: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSettings(Section):
    """Where the records come from and which columns hold what."""

    source: str  # package:NAME | a file (.csv .parquet .jsonl) | a saved datasets directory | a hub id
    text: str = "text"
    label: str = "label"
    group: str | None = None  # records with the same value never stand on both sides of the test split
    test_fraction: Fraction = 0.2
    max_length: Annotated[int, Field(ge=4)] = 64  # tokens a record; longer ones are cut
    deduplicate: bool = True


class PartitionSettings(Section):
    """How the training records are dealt to clients."""

    scheme: Literal["iid", "dirichlet", "shards", "natural"] = "dirichlet"
    clients: Count | None = 8  # null, with natural: one client for each value of the column
    alpha: PositiveFloat = 0.5  # dirichlet: small is skewed, large is even
    shards_per_client: PositiveInt = 2
    column: str | None = None  # natural: the column whose values are never split
    min_records: PositiveInt = 64

    @model_validator(mode="after")
    def _needs(self) -> PartitionSettings:
        if self.scheme == "natural" and self.column is None:
            raise ValueError("scheme 'natural' needs partition.column, the column whose values make the clients")
        if self.scheme != "natural" and self.clients is None:
            raise ValueError(f"scheme '{self.scheme}' needs partition.clients, a whole number")
        return self


class ModelSettings(Section):
    backbone: str  # package:NAME | a local directory in the Hugging Face layout | a hub id
    task: Literal["text-classification"] = "text-classification"
    pooling: Literal["default", "mean"] = "default"  # what the head reads: the architecture's own choice, or the mean


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): W + (alpha / rank) B A."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # above 0 adds variance to private training
    targets: Literal["auto"] | list[str] = "auto"  # module names; auto: the attention's query and value
    last_layers: PositiveInt | None = None  # adapt only this many layers at the top; null: all
    train_head: bool = True


class FaultSettings(Section):
    """Simulated faults: with which probability a client has one in a round; drawn from the seed, one at the most."""

    exception: Probability = 0.0  # its training fails at the end
    nan: Probability = 0.0  # it sends a value that is not a number
    shape: Probability = 0.0  # it sends a tensor of another shape
    digest: Probability = 0.0  # what arrives is not what it listed
    norm: Probability = 0.0  # it sends values that are absurdly large
    straggle: Probability = 0.0  # it misses the deadline
    vanish: Probability = 0.0  # it sends nothing; with secure aggregation, from one of the protocol's messages on

    @model_validator(mode="after")
    def _at_most_one(self) -> FaultSettings:
        if (total := sum(dict(self).values())) > 1:
            raise ValueError(
                f"federation.faults: the probabilities add up to {total:g}; a client has one fault in a round at the "
                "most, expected no more than 1"
            )
        return self

    @property
    def any(self) -> bool:
        return any(dict(self).values())


class AttackSettings(Section):
    """Simulated clients that send what they should not: the same ones in all rounds, drawn from the seed."""

    kind: Literal["sign-flip", "scaling", "label-flip", "free-rider"] | None = None
    clients: PositiveInt | Fraction = 0.2  # how many of all clients, or which share
    strength: PositiveFloat = 10.0  # sign-flip, scaling: the factor on the move
    noise: NonNegativeFloat = 0.0  # free-rider: the standard deviation of what it adds to the start that it sends


class FederationSettings(Section):
    rounds: Count = 10
    clients_per_round: PositiveInt | None = None  # null: all of them
    local_steps: Count = 5
    batch_size: PositiveInt = 256  # expected size of a client's Poisson batch
    max_participations: PositiveInt | None = None  # hard cap per client, which sigma is calibrated on; null: rounds
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # a sampled client is not available with this probability
    secure_aggregation: bool = False  # the server gets the sum of the updates, and no update
    secure_range: PositiveFloat = 8.0  # a client with a number that moved farther in a round is left out of the sum
    secure_threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.6  # of a round's clients, who must stay to the end
    quorum: Probability = 0.0  # share of a round's clients whose updates must be usable; 0: what the rule needs
    retries: Annotated[int, Field(ge=0, le=100)] = 2  # how often a round below the quorum is tried again
    deadline: PositiveFloat | None = None  # simulated seconds; who takes longer has trained for nothing. null: none
    faults: FaultSettings = FaultSettings()
    attack: AttackSettings = AttackSettings()

    @property
    def tries(self) -> int:
        """How often a round is tried, before it stops the run: once where nothing would be another time."""
        return 1 + self.retries if self.quorum or (self.secure_aggregation and self.faults.any) else 1


Choice = str | dict[str, Any] | None  # a part's name, or {name, options}; null: the method's own choice


class MethodSettings(Section):
    """A method of the catalogue; the other keys override one of its axes each."""

    name: str = "la-lora"
    schedule: Choice = None
    objective: Choice = None
    clip: Choice = None
    filter: Choice = None
    payload: Choice = None
    aggregation: Choice = None
    weights: Choice = None
    server: Choice = None
    initialisation: Choice = None
    ranks: Choice = None
    rounds: Choice = None

    @model_validator(mode="before")
    @classmethod
    def _padding_moved(cls, values: Any) -> Any:
        if isinstance(values, dict) and "padding" in values:
            raise ValueError(
                f"method.padding is an option of the filter: write filter: {{padding: {values['padding']}}}"
            )
        return values


class OptimizerSettings(Section):
    """The client's optimiser; its state starts anew every round."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.1
    lr_head: PositiveFloat | None = None  # null: lr
    lr_a: PositiveFloat | None = None
    lr_b: PositiveFloat | None = None
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # factor per round
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0  # decoupled
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8

    @model_validator(mode="after")
    def _momentum_is_sgd(self) -> OptimizerSettings:
        if self.name != "sgd" and self.momentum:
            raise ValueError("optimizer.momentum belongs to sgd; adamw has beta1")
        return self


class PrivacySettings(Section):
    unit: Literal["record", "group", "client", "none"] = "record"
    adjacency: Literal["add-remove", "replace-one"] = "add-remove"  # how neighbouring data sets differ
    group: str | None = None  # unit group: the column whose equal values are one unit, such as a patient
    group_records: PositiveInt = 8  # unit group: of a group's records at most this many count
    noise: Literal["central", "distributed"] = "central"  # unit client: the server adds it, or each client a share
    epsilon: PositiveFloat = 8.0
    delta: PositiveFloat | Literal["auto"] = "auto"  # auto: min(1e-5, 1 / (10 * largest client))
    clip_norm: PositiveFloat = 1.0
    accountant: Literal["prv", "rdp"] = "prv"
    diagnostics: bool = False  # log training losses, which no noise protects; the run is marked
    # 64 hex digits: fixes the noise, for tests only; the run is not private.
    test_key: str | None = Field(default=None, repr=False)

    @field_validator("delta")
    @classmethod
    def _delta_below_one(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"found {value:g}; expected a number below 1, or auto")
        return value

    @field_validator("test_key")
    @classmethod
    def _hex(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ValueError("expected 64 hexadecimal digits (32 bytes), in quotes, or null")
        return value

    @model_validator(mode="after")
    def _group_has_a_column(self) -> PrivacySettings:
        if self.unit == "group" and self.group is None:
            raise ValueError("unit 'group' needs privacy.group, the column whose equal values are one group")
        return self


class EvaluationSettings(Section):
    every: PositiveInt = 1  # rounds; the last round is always evaluated
    batch_size: PositiveInt = 256  # records at most; tokens_per_batch bounds it too


class RuntimeSettings(Section):
    """How the run is computed; of these, `precision` and `engine` belong to a run's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["cohort", "opacus"] = "cohort"
    tokens_per_batch: PositiveInt | Literal["auto"] = "auto"  # bounds memory: padded tokens in one forward pass
    cache_frozen_prefix: Literal["auto"] | bool = "auto"  # keep what the layers below the adapters compute
    cohort_size: PositiveInt | Literal["auto"] = "auto"  # clients trained together in one task
    # The last rounds whose tensors stay in runs/; null: all. Two at least, so that a damaged one is computed anew.
    keep_rounds: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    task_runner: Literal["threads"] = "threads"


class TrackingSettings(Section):
    uri: str | None = "sqlite:///mlflow.db"  # null: no tracking
    experiment: str = "fedpipe"
    artifacts: bool = True  # the states and updates of each round too, beside numbers, final adapter and reports


class Settings(Section):
    """All of `params.yaml`. Two runs with equal settings, data and code compute the same thing."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    data: DataSettings
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    federation: FederationSettings = FederationSettings()
    method: MethodSettings = MethodSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    privacy: PrivacySettings = PrivacySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _clients_fit(self) -> Settings:
        clients, per_round = self.partition.clients, self.federation.clients_per_round
        if clients is not None and per_round is not None and per_round > clients:
            raise ValueError(
                f"federation.clients_per_round is {per_round}, but partition.clients is {clients}; expected no more"
            )
        return self

    @property
    def private(self) -> bool:
        return self.privacy.unit != "none"

    def flat(self) -> dict[str, Any]:
        """Return every key as `section.key`; the test key itself is not told."""
        values: dict[str, Any] = {}
        for name, section in self:
            if not isinstance(section, Section):
                values[name] = section
                continue
            for key, value in section:
                below = dict(value) if isinstance(value, Section) else {}
                values |= {f"{name}.{key}.{item}": own for item, own in below.items()} or {f"{name}.{key}": value}
        if values["privacy.test_key"] is not None:
            values["privacy.test_key"] = "set"
        return values


def load_settings(path: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read and check a settings file, with `section.key` overrides laid over it.

    Raises
    ------
    SettingsError
        The file is missing or no YAML, or a key, a type or a combination in it is wrong.
    """
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}; run this where params.yaml is") from error
    except (YAMLError, ValueError) as error:
        raise SettingsError(f"{path}{_place(error)}: is not YAML: {_problem(error)}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: found {shown(values)}; expected keys such as 'data:' and 'model:'")
    for key, value in (overrides or {}).items():
        _refuse_secret(key, value)
        _apply(values, key, value)
    return parse_settings(values, where=str(path))


def parse_settings(values: Mapping[str, Any], where: str = "settings") -> Settings:
    """Check settings given as nested dictionaries; `where` names them in messages."""
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError("\n".join(f"{where}: {line}" for line in explain_all(error.errors(), Settings))) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`, as given on a command line; the value is read as YAML.

    >>> parse_override("federation.rounds=3")
    ('federation.rounds', 3)
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise SettingsError(f"--set {text}: expected section.key=value, such as method.name=ffa-lora")
    try:
        return path.strip(), _yaml(value)
    except (YAMLError, ValueError) as error:
        raise SettingsError(f"--set {hide_password(text)}: the value is not YAML: {_problem(error)}") from None


MOST_VALUES = 10_000  # in a settings file, those behind an alias counted each time
MOST_LEVELS = 20


def _yaml(text: str) -> Any:
    """Read YAML: values of the safe kinds, few and shallow enough that no message about them fills a memory.

    Raises
    ------
    YAMLError, ValueError
        It is no YAML; or it is too deep, too large, or holds text that cannot be written down.
    """
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"a value that cannot be read ({type(error).__name__})") from error
    _count(value, MOST_VALUES, MOST_LEVELS)
    return value


def _count(value: Any, left: int, levels: int) -> int:
    """Return how many values are left of a number, after those in `value`."""
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("half of a surrogate pair, which is no letter")
    if levels < 0:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for part in value if isinstance(value, list | tuple | set) else ():
        left = _count(part, left, levels - 1)
    if left <= 0:
        raise ValueError(f"more than {MOST_VALUES} values, where each use of an alias counts anew")
    return left - 1


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _problem(error: Exception) -> str:
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(text).split())


def _refuse_secret(path: str, value: Any) -> None:
    """An override can be read by others: in the list of processes, in a shell's history, in Prefect's records."""
    text = str(value)
    if (path == "tracking.uri" and hide_password(text) != text) or (path == "privacy.test_key" and value is not None):
        raise SettingsError(
            f"{path}: an override would show it to others, in the list of processes and in Prefect's records; write it "
            "into the settings file, or for a tracking server set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _apply(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: '{section}' holds a value, not keys")
    values[key] = value
