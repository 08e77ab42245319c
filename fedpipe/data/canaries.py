"""Canaries: made-up records that are dealt to clients so that a run can be audited.

An audited run needs a partition of its own: that of the project, with slots for canaries behind
the records of chosen clients. All slots are records of their client, whether their coin lets them
into batches or not. So numbers of records, sampling rates and noise are the same for all coins, and
a canary that is left out is exactly a record that was removed (see `fedpipe.client.audited`).

Nobody's data is in a canary: `random` ones are random words of the tokenizer's vocabulary under a
random label; `mislabelled` ones are test records under a wrong label, which leave the test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError
from transformers import PreTrainedTokenizerBase

from fedpipe.config import Fraction, PositiveInt, Section, Settings
from fedpipe.data.federation import AUDIT, MANIFEST, TEST, Federation, write_table
from fedpipe.errors import DataError, SettingsError, nearest
from fedpipe.files import digest, private_directory, storage, write_sealed
from fedpipe.mistakes import explain_all
from fedpipe.project import Project

WORDS = 8  # of a random canary
_FILLED = 0.5  # of the test records, at most, become canaries


class AuditSettings(Section):
    """How an audit is done; all of it is decided before the run, and named by its digest."""

    canaries: Annotated[int, Field(ge=16)] = 256
    clients: list[str] | None = None  # who is given canaries; null: all
    kind: Literal["random", "mislabelled"] = "random"
    guesses: PositiveInt | None = None  # for each answer: so many are called in, and so many out; null: an eighth
    seed: Annotated[int, Field(ge=0)] = 0  # of the canaries' texts and labels, never of their coins
    confidence: Fraction = 0.95

    @property
    def each(self) -> int:
        """How many canaries are guessed to be in, and how many to be out."""
        return self.guesses or self.canaries // 8


def parse_audit(values: Mapping[str, Any]) -> AuditSettings:
    """Check the settings of an audit.

    Raises
    ------
    SettingsError
        A key, a type or a number in them is wrong.
    """
    try:
        audit = AuditSettings.model_validate(dict(values))
    except ValidationError as error:
        lines = explain_all(error.errors(), AuditSettings)
        raise SettingsError("\n".join(f"audit: {line}" for line in lines)) from None
    if 2 * audit.each > audit.canaries:
        raise SettingsError(
            f"audit: guesses: found {audit.each} for each answer; with {audit.canaries} canaries expected "
            f"{audit.canaries // 2} or fewer"
        )
    return audit


def audited_project(
    project: Project, settings: Settings, audit: AuditSettings, tokenizer: PreTrainedTokenizerBase
) -> Project:
    """Make the project of an audited run below `project`, or find it whole; the same arguments give the same bytes.

    Raises
    ------
    SettingsError
        There is no such client.
    DataError
        The vocabulary or the test records do not give enough canaries.
    """
    federation = Federation.open(project.partition)
    chosen = _chosen(federation, audit)
    name = digest([federation.digest, audit.model_dump(mode="json"), settings.data.model_dump(mode="json")])[:10]
    inner = Project(project.runs / "audits" / name)
    private_directory(inner.root)
    private_directory(inner.partition)
    _link(project.backbone, inner.backbone)
    if not (inner.partition / MANIFEST).exists():
        test = federation.test().data.table.select(["text", "label"])
        canaries, kept = _canaries(audit, test, federation.labels, tokenizer)
        _write(federation, inner.partition, audit, chosen, canaries, kept)
    return inner


def link_probe(project: Project, inner: Project, file: str | None) -> None:
    """Let the audited project find the method's public records under the same name."""
    if file is not None and not Path(file).is_absolute():
        _link(project.root / file, inner.root / file)


def _link(target: Path, place: Path) -> None:
    with storage(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(os.path.relpath(target, place.parent))


def _chosen(federation: Federation, audit: AuditSettings) -> list[str]:
    chosen = sorted(set(audit.clients)) if audit.clients else list(federation.clients)
    for client in chosen:
        if client not in federation.sizes:
            raise SettingsError(f"audit: no client '{client}'; {nearest(client, federation.clients)}")
    return chosen[: audit.canaries]


def _canaries(
    audit: AuditSettings, test: pa.Table, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[str, str]], pa.Table]:
    """Return texts and labels of all canaries, and the test records that are left."""
    generator = np.random.default_rng([*b"canaries", audit.seed])
    if audit.kind == "random":
        texts = _random_texts(audit.canaries, _words(tokenizer), generator)
        places = generator.integers(len(labels), size=audit.canaries)
        return list(zip(texts, [labels[place] for place in places], strict=True)), test
    if audit.canaries > _FILLED * len(test) or len(labels) < 2:
        raise DataError(
            f"audit: {audit.canaries} mislabelled canaries are asked of {len(test)} test records and {len(labels)} "
            f"labels; expected at most {int(_FILLED * len(test))} canaries and two labels; use kind random"
        )
    taken = np.sort(generator.permutation(len(test))[: audit.canaries])
    shifts = generator.integers(1, len(labels), size=audit.canaries)
    true = [labels.index(label) for label in test["label"].take(pa.array(taken)).to_pylist()]
    wrong = [labels[(place + shift) % len(labels)] for place, shift in zip(true, shifts, strict=True)]
    left = np.delete(np.arange(len(test)), taken)
    texts = test["text"].take(pa.array(taken)).to_pylist()
    return list(zip(texts, wrong, strict=True)), test.take(pa.array(left))


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the whole words of a vocabulary, in order; where it has none, all that is not a special token."""
    special, vocabulary = set(tokenizer.all_special_tokens), tokenizer.get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if token not in special]
    plain = dict.fromkeys(token.lstrip("▁Ġ") for token in tokens)
    return [word for word in plain if word.isalpha()] or tokens


def _random_texts(count: int, words: Sequence[str], generator: np.random.Generator) -> list[str]:
    texts: dict[str, None] = {}
    for _ in range(100):
        picks = generator.integers(len(words), size=(count, WORDS))
        texts |= dict.fromkeys(" ".join(words[place] for place in row) for row in picks)
        if len(texts) >= count:
            return list(texts)[:count]
    raise DataError(f"audit: the tokenizer's {len(words)} words give no {count} different texts; use fewer canaries")


def _write(
    federation: Federation,
    partition: Path,
    audit: AuditSettings,
    chosen: Sequence[str],
    canaries: Sequence[tuple[str, str]],
    test: pa.Table,
) -> None:
    """Write the partition, its manifest last. Which canary goes where depends on the settings alone."""
    entries, slots, given = [], {}, 0
    shares = dict(zip(chosen, np.array_split(np.arange(len(canaries)), len(chosen)), strict=True))
    for entry in federation.manifest["clients"]:
        client = entry["id"]
        if client not in shares:
            with storage(partition):
                shutil.copyfile(federation.path / entry["file"], partition / entry["file"])
            entries.append(entry)
            continue
        mine = [canaries[place] for place in shares[client]]
        table = federation.client(client).data.table
        joined = pa.concat_tables([table, _rows(mine, table.schema, given)])
        written = write_table(partition / entry["file"], joined, list(federation.labels))
        entries.append({**entry, **written})
        slots[client] = [len(table), len(mine)]
        given += len(mine)
    manifest = {**federation.manifest, "clients": entries}
    manifest["test"] = write_table(partition / TEST, test, list(federation.labels))
    manifest[AUDIT] = {**audit.model_dump(mode="json"), "guesses": audit.each, "slots": slots}
    write_sealed(partition / MANIFEST, manifest)


def _rows(canaries: Sequence[tuple[str, str]], schema: pa.Schema, first: int) -> pa.Table:
    """Return canaries as records; in any other column each has a value of its own, so it is a unit of its own."""
    columns = {"text": [text for text, _ in canaries], "label": [label for _, label in canaries]}
    own = [digest(["canary", first + place]) for place in range(len(canaries))]
    return pa.table({name: pa.array(columns.get(name, own), schema.field(name).type) for name in schema.names})
