"""Where things are in a project directory. These paths are a contract with other people's scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """The paths below a project's root, the directory that holds `params.yaml`."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def raw(self) -> Path:
        """What `fedpipe fetch` left: the data file, or a pointer to it, and `origin.json`."""
        return self.root / "data" / "raw"

    @property
    def partition(self) -> Path:
        return self.root / "data" / "partition"

    @property
    def backbone(self) -> Path:
        """The backbone in the Hugging Face layout, or a pointer to it, and `origin.json`."""
        return self.root / "models" / "backbone"

    @property
    def adapter(self) -> Path:
        return self.root / "models" / "adapter"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def runs(self) -> Path:
        return self.root / "runs"
