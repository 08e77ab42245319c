"""The `fedpipe` command. Messages are for people: one line for a mistake, no traceback, exit code not 0."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedpipe.errors import FedpipeError, hide_password


class _Hiding(logging.Formatter):
    """Writes no password of a URL, whatever message it came in."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_password(super().format(record))


class _Commands(click.Group):
    """Reports what went wrong in a line, and what to do next after an interrupt."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FedpipeError as error:
            for line in hide_password(str(error)).splitlines():
                click.echo(f"error: {line}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from here", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedpipe")
def main() -> None:
    """Federated LoRA fine-tuning under differential privacy, run as a reproducible experiment."""
    # A log line that Prefect's server does not take is no news for a terminal.
    logging.raiseExceptions = False
    # On our own logger only: Prefect takes over the root logger's handlers, and logs every task to them.
    log = logging.getLogger("fedpipe")
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Hiding("%(levelname)s: %(message)s"))
        log.addHandler(handler)


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: --set method.name=ffa-lora"
    )(command)
    return click.option(
        "--params", default="params.yaml", type=click.Path(path_type=Path), help="The settings file.", show_default=True
    )(command)


@main.command()
@_with_settings
def fetch(params: Path, overrides: tuple[str, ...]) -> None:
    """Obtain the data and the backbone that the settings name; nothing is downloaded twice."""
    from fedpipe.data.sources import fetch_data
    from fedpipe.models.source import fetch_backbone

    settings, project = _open(params, overrides)
    for name, origin in (
        ("data", fetch_data(settings.data, project.raw)),
        ("backbone", fetch_backbone(settings.model.backbone, project.backbone)),
    ):
        click.echo(f"{name}: {origin['source']} (licence: {origin['license']})")


@main.command()
@_with_settings
def partition(params: Path, overrides: tuple[str, ...]) -> None:
    """Partition the records into clients."""
    from fedpipe.data.federation import Federation, write_partition

    settings, project = _open(params, overrides)
    write_partition(settings, project.raw, project.partition)
    federation = Federation.open(project.partition)
    sizes, groups = federation.sizes.values(), federation.groups
    whole = "" if groups is None else f" in {min(groups.values())} to {max(groups.values())} groups"
    click.echo(
        f"{project.partition}: {len(sizes)} clients, {min(sizes)} to {max(sizes)} records each{whole}, "
        f"{federation.manifest['test']['records']} test records, {federation.digest}"
    )


@main.command()
@_with_settings
def train(params: Path, overrides: tuple[str, ...]) -> None:
    """Train from the partition that is there; what the DVC pipeline calls."""
    _flow(params, overrides, "federated", standalone=False)


@main.command()
@_with_settings
def run(params: Path, overrides: tuple[str, ...]) -> None:
    """Do everything: fetch, partition, train, report. Run again after a crash, it goes on."""
    _flow(params, overrides, "federated", standalone=True)


@main.command()
@_with_settings
@click.option("--canaries", type=int, help="How many there are, over all clients that get some. Default: 256.")
@click.option("--client", "clients", multiple=True, help="Who gets canaries; any number of times. Default: all.")
@click.option("--kind", help="random (words of the vocabulary; the default) or mislabelled (test records).")
@click.option("--guesses", type=int, help="So many are called in, and so many out. Default: an eighth each.")
@click.option("--seed", type=int, help="Of the canaries' texts and labels, never of their coins. Default: 0.")
@click.option("--confidence", type=float, help="Of the lower bound on epsilon. Default: 0.95.")
def audit(params: Path, overrides: tuple[str, ...], clients: tuple[str, ...], **given: Any) -> None:
    """Train a copy of the run with canaries, and hold what attacks can tell against the claimed epsilon."""
    from fedpipe.data.canaries import parse_audit

    options = {name: value for name, value in given.items() if value is not None}
    options |= {"clients": list(clients)} if clients else {}
    parse_audit(options)
    _flow(params, overrides, "audit", options=options)


@main.command()
@click.option("--params", default="params.yaml", type=click.Path(path_type=Path), show_default=True)
def report(params: Path) -> None:
    """Evaluate the adapter as a user would load it, and write reports/report.html."""
    from fedpipe.project import Project
    from fedpipe.report import write_report
    from fedpipe.report.final import evaluate_adapter

    project = Project(params.resolve().parent)
    evaluate_adapter(project)
    click.echo(write_report(project))


@main.command()
@click.argument("name", required=False)
@_with_settings
def methods(name: str | None, params: Path, overrides: tuple[str, ...]) -> None:
    """List the methods, with what each sends and may be combined with; or show the card of one."""
    from fedpipe.errors import SettingsError, nearest
    from fedpipe.listing.cards import card
    from fedpipe.listing.overview import overview, printed
    from fedpipe.listing.traffic import open_model
    from fedpipe.methods import CATALOGUE

    if name is not None and name not in CATALOGUE:
        raise SettingsError(f"there is no method named '{name}'; {nearest(name, CATALOGUE)}")
    model, missing = open_model(params, overrides)
    click.echo(
        printed(lambda width: overview(CATALOGUE, model, width) if name is None else card(CATALOGUE[name], model))
    )
    if missing:
        click.echo(f"\nBytes are left out: {missing}")


@main.command()
@_with_settings
@click.option(
    "--epsilon", type=click.FloatRange(0, min_open=True), help="The wanted epsilon. Default: privacy.epsilon."
)
@click.option("--sigma", type=click.FloatRange(0, min_open=True), help="A noise multiplier: what does it cost?")
@click.option(
    "--records",
    multiple=True,
    type=click.IntRange(1),
    help="A client's number of records (with unit group, of groups), instead of the partition's.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw epsilon by round into this SVG file.")
def budget(
    params: Path,
    overrides: tuple[str, ...],
    epsilon: float | None,
    sigma: float | None,
    records: tuple[int, ...],
    picture: Path | None,
) -> None:
    """Tell, before any training, what the settings cost in privacy, and what other choices would."""
    from fedpipe.data.federation import Federation
    from fedpipe.errors import SettingsError
    from fedpipe.listing.budget import Budget, shown, write_picture
    from fedpipe.listing.overview import printed
    from fedpipe.plan import sampled

    settings, project = _open(params, overrides)
    if records and settings.privacy.unit == "client":
        raise SettingsError("--records: with privacy.unit client nothing depends on records; set partition.clients")
    if records:
        sizes = records
    else:
        federation = Federation.open(project.partition)
        sizes = tuple(sampled(settings, federation.sizes, federation.groups).values())
    asked = Budget(settings, sizes, epsilon or settings.privacy.epsilon, sigma)
    tables = shown(asked)
    click.echo(printed(lambda width: tables))
    if picture is not None:
        write_picture(asked, picture)
        click.echo(f"picture: {picture}")


@main.command()
def claims() -> None:
    """Hold published epsilons against what their noise multiplier, sampling rate and steps really give."""
    from rich.console import Console

    from fedpipe.claims import load
    from fedpipe.claims.check import check
    from fedpipe.claims.show import lines

    for line in lines(Console().width, check(load())):  # each takes a second
        click.echo(line)


@main.group()
def ledger() -> None:
    """What a run has spent."""


@ledger.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Default: the plan's.")
def verify(path: Path, delta: float | None) -> None:
    """Check a ledger's chain, and compute epsilon from it alone; PATH is a run's directory or its ledger.jsonl."""
    from fedpipe.budget import check_spent
    from fedpipe.listing.ledger import shown
    from fedpipe.listing.overview import printed
    from fedpipe.privacy.recompute import verify_ledger
    from fedpipe.state import Run

    verified = verify_ledger(path, delta)
    run = Run(verified.path.parent)
    if (run.root / "run.json").exists():  # the rounds beside it know what must be in it: a chain cut off looks whole
        for number in range(run.completed_rounds() + 1):
            check_spent(run, number)
    click.echo(printed(lambda width: shown(verified)))
    sys.exit(0 if verified.kept else 1)


@main.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--all", "everything", is_flag=True, help="Also the runs that were trained with tracking.uri null.")
@click.option("--list", "listing", is_flag=True, help="Only say what waits, by what is noted beside each run.")
@_with_settings
def sync(runs: tuple[str, ...], everything: bool, listing: bool, params: Path, overrides: tuple[str, ...]) -> None:
    """Record in MLflow what it lacks of RUNs, by default of all that were to be recorded; nothing appears twice."""
    from fedpipe.errors import StateError
    from flows import recording

    settings, project = _open(params, overrides)
    code = 0
    for run in recording.chosen(project, runs, everything):
        lacked = recording.missing(run)
        if listing:
            click.echo(f"{run.root.name}: {f'lacks {lacked}' if lacked else 'has all'}")
            continue
        try:
            click.echo(f"{run.root.name}: {recording.sync(run, project, settings.tracking)}")
        except StateError as error:  # one run that is in use or damaged does not hold up the others
            click.echo(f"error: {hide_password(str(error))}", err=True)
            code = error.exit_code
        else:
            code = code or (4 if recording.missing(run) else 0)
    sys.exit(code)


@main.command()
@_with_settings
def doctor(params: Path, overrides: tuple[str, ...]) -> None:
    """Check versions, disk, stores, data and device, and say what to do about each."""
    from rich.console import Console

    from fedpipe.config import load_settings, parse_override
    from fedpipe.doctor import examine, render
    from fedpipe.project import Project

    project = Project(params.resolve().parent)
    try:
        settings = load_settings(params, dict(map(parse_override, overrides)))
    except FedpipeError:
        settings = None  # the examination says what is wrong with them
    checks = examine(project, settings)
    Console().print(render(checks))
    sys.exit(0 if all(check.ok for check in checks) else 1)


def _open(params: Path, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the checked settings, method included, and the project they are in."""
    from fedpipe.config import load_settings, parse_override
    from fedpipe.methods import compose
    from fedpipe.project import Project

    settings = load_settings(params, dict(map(parse_override, overrides)))
    compose(settings)
    return settings, Project(params.resolve().parent)


def _flow(params: Path, overrides: tuple[str, ...], name: str, **parameters: Any) -> None:
    """Run a Prefect flow in this process. The one place where the library reaches up to the flows."""
    from importlib import import_module

    from fedpipe.config import parse_override
    from flows.settings import quiet

    # A wrong key must not wait for Prefect to start.
    _open(params, overrides)
    quiet(params.resolve().parent)
    from flows.embedded import prefect_api

    with prefect_api():
        flow = getattr(import_module(f"flows.{name}"), name)
        flow(str(params.resolve()), dict(map(parse_override, overrides)), **parameters)
