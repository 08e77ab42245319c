"""A published adapter, loaded again: the base model that it needs, by what stands beside it."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from torch import nn

from fedpipe.files import read_json
from fedpipe.models.task import Task, make_task

TASK_FILE = "task.json"


def adapter_task(adapter: Path) -> Task:
    """Return the task that an adapter was trained for: kind, labels in order, pooling."""
    facts = read_json(adapter / TASK_FILE)
    return make_task(facts["task"], facts["labels"], facts["pooling"])


def load_base(adapter: str | Path, backbone: str | Path | None = None) -> nn.Module:
    """Load the base model of an adapter, for `peft.PeftModel.from_pretrained(base, adapter)`.

    Parameters
    ----------
    adapter : directory of a published adapter
    backbone : directory of the backbone; by default the one that the adapter names, seen from
        the working directory

    Raises
    ------
    StateError, DataError
        The directory is no published adapter, or the backbone cannot be loaded.
    """
    path = Path(adapter)
    named = read_json(path / "adapter_config.json")["base_model_name_or_path"]
    base, _ = adapter_task(path).load(Path(backbone or named))
    return base


def load_adapter(adapter: str | Path, backbone: str | Path | None = None) -> PeftModel:
    """Load an adapter onto its base model with stock peft, for evaluation; arguments as `load_base` takes them."""
    base = load_base(adapter, backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that is going away
        return PeftModel.from_pretrained(base, adapter).eval()
