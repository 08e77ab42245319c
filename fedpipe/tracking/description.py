"""What MLflow is told about a run before its first round, in the words that MLflow takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Dataset

RUN_TAG = "fedpipe.run_id"
DIGEST_TAG = "fedpipe.dataset_digest"
NOTE_TAG = "mlflow.note.content"

LONGEST_PARAM = 6000  # characters
LONGEST_MODEL_PARAM = 5000
LONGEST_TAG = 8000


@dataclass(frozen=True)
class RunDescription:
    """All that MLflow is told about a run before its first round.

    Attributes
    ----------
    run_id
        fedpipe's run id, which is also the MLflow run's name.
    params
        Flat `section.key` names to values: the settings, and what was resolved from them.
    tags
        Such as `method`, `unit`, `dp_valid` and `mlflow.source.git.commit`. The run id and the
        dataset's digest are tagged in any case.
    dataset_name, dataset_source
        What the partition was made from: a name to show, and a URL, a path or a package.
    dataset_digest
        The DVC hash of the partition, `<md5>.dir`: 36 characters, which is MLflow's limit.
    again
        The command that records later what MLflow does not take now.
    """

    run_id: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    dataset_name: str
    dataset_source: str
    dataset_digest: str
    again: str = "fedpipe sync"

    def param_texts(self, longest: int = LONGEST_PARAM) -> dict[str, str]:
        """Return the parameters as MLflow shows them, cut at `longest` characters."""
        return {key: _text(value)[:longest] for key, value in self.params.items()}

    def tag_texts(self) -> dict[str, str]:
        """Return the tags, with those by which fedpipe finds a run and its data again."""
        tags = {DIGEST_TAG: self.dataset_digest, **self.tags, RUN_TAG: self.run_id}
        return {key: str(value)[:LONGEST_TAG] for key, value in tags.items()}

    def dataset(self) -> Dataset:
        """Return the partition as an MLflow dataset of which only the facts are kept, not the records."""
        from mlflow.data import sources
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset

        remote = self.dataset_source.startswith(("http://", "https://"))
        kind = sources.HTTPDatasetSource if remote else sources.LocalArtifactDatasetSource
        source = kind(self.dataset_source)
        facts = MetaDataset(source, name=self.dataset_name, digest=self.dataset_digest).to_dict()
        return Dataset(**facts)


def _text(value: Any) -> str:
    """Spell a value as `params.yaml` does (true, null, 0.5), so that both can be searched alike."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
