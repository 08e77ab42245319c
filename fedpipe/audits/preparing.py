"""The beginning of an audit: a partition with canaries, and a run on it that is a run of its own."""

from __future__ import annotations

from fedpipe.config import Settings
from fedpipe.data.canaries import AuditSettings, audited_project, link_probe
from fedpipe.errors import SettingsError
from fedpipe.methods import compose
from fedpipe.models.source import open_backbone
from fedpipe.models.task import load_tokenizer
from fedpipe.project import Project
from fedpipe.state import Opened
from fedpipe.steps import prepare

UNITS = ("record", "group")  # what a canary can be one of


def prepare_audit(project: Project, settings: Settings, audit: AuditSettings) -> Opened:
    """Make the audited partition, and open the run on it, which never meets the runs of the project itself.

    Raises
    ------
    FedpipeError
        The settings promise nothing about one record, or they, the data and the canaries do not fit together.
    """
    if settings.privacy.unit not in UNITS:
        raise SettingsError(
            f"audit: privacy.unit: found {settings.privacy.unit}; a canary is one record, and a group of its own, "
            "so expected record or group"
        )
    if settings.federation.secure_aggregation:
        raise SettingsError(
            "audit: federation.secure_aggregation: found true; the white-box score reads what each client sends, "
            "and no noise depends on this key: set it to false for the audit"
        )
    tokenizer = load_tokenizer(open_backbone(project.backbone, settings.model.backbone).path)
    inner = audited_project(project, settings, audit, tokenizer)
    link_probe(project, inner, compose(settings).schedule.public)
    return prepare(inner, settings, audit=True)


def project_of(run_project: Project) -> Project:
    """Return the project that an audited one lies in: `runs/audits/<name>/` below it."""
    return Project(run_project.root.parents[2])
