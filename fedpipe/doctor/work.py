"""What a run needs, and what earlier runs left: settings, data, backbone, partition, runs."""

from __future__ import annotations

from fedpipe.config import Settings, load_settings
from fedpipe.doctor.check import Check
from fedpipe.project import Project


def settings_file(project: Project, settings: Settings | None) -> Check:
    from fedpipe.methods import compose

    if settings is None:
        load_settings(project.params)
        return Check("settings", False, "the overrides of --set are wrong", "Run the same command without them.")
    compose(settings)
    found = f"{project.params.name}: {settings.method.name}, {settings.federation.rounds} rounds"
    return Check("settings", True, found)


def data(project: Project, settings: Settings) -> Check:
    from fedpipe.data.origin import read_origin, verify

    origin = read_origin(project.raw, "data")
    if origin["source"] != settings.data.source:
        found = f"holds '{origin['source']}', but data.source is '{settings.data.source}'"
        return Check("data", False, found, "Run `fedpipe fetch`, then `fedpipe partition`; or `dvc repro`.")
    verify(project.raw, origin)
    return Check("data", True, f"{origin['source']}: {len(origin['files'])} files, unchanged since they were fetched")


def backbone(project: Project, settings: Settings) -> Check:
    from fedpipe.models.source import open_backbone

    backbone = open_backbone(project.backbone, settings.model.backbone)
    return Check("backbone", True, f"{backbone.name}: unchanged since it was fetched")


def partition(project: Project, settings: Settings) -> Check:
    from fedpipe.data.federation import Federation
    from fedpipe.files import file_digest

    federation = Federation.open(project.partition)
    federation.check_fresh(settings)
    for entry in (*federation.manifest["clients"], federation.manifest["test"]):
        path = project.partition / entry["file"]
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            advice = "Run `fedpipe partition`, or `dvc repro -f partition`."
            return Check("partition", False, f"{path}: missing or damaged", advice)
    return Check("partition", True, f"{len(federation.clients)} clients, {sum(federation.sizes.values())} records")


def runs(project: Project) -> Check | None:
    """Look for runs that were stopped on the way."""
    from fedpipe.state import Run

    open_runs = [Run(path.parent) for path in sorted(project.runs.glob("*/run.json"))]
    stopped = [run for run in open_runs if not run.complete]
    keyless = [run for run in stopped if run.plan.private and not run.key_path.exists()]
    if keyless:
        found = f"{keyless[0].root.name}: not complete, and its noise key is gone"
        return Check("runs", False, found, f"It cannot go on: rm -r {keyless[0].root}")
    if stopped:
        listed = ", ".join(f"{r.root.name} (round {max(r.completed_rounds(), 0)} of {r.plan.rounds})" for r in stopped)
        return Check("runs", True, f"stopped on the way: {listed}", "The same settings and data go on from there.")
    return Check("runs", True, f"{len(open_runs)} complete") if open_runs else None
