"""Rounds with secure aggregation: the right sum, nothing else at the server, and what happens when clients vanish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limited
from hypothesis import strategies as st
from made_rounds import Update, make_round
from test_secure import Played, make_clients, make_vectors, reachable
from test_steps import Killed, changed, copied, kill_at

from fedpipe import steps, workspace
from fedpipe.config import FederationSettings, Settings
from fedpipe.errors import FedpipeError, PrivacyError, SettingsError, StateError
from fedpipe.files import file_digest, read_json, read_tensors
from fedpipe.methods import CATALOGUE, Method, compose, warnings_for
from fedpipe.models.factors import GlobalState
from fedpipe.plan import make_plan
from fedpipe.project import Project
from fedpipe.publish import publish, round_row
from fedpipe.server.aggregate import Round
from fedpipe.server.masking import MODULUS, Codec
from fedpipe.server.optimizers import Momentum
from fedpipe.server.robust import NormBound
from fedpipe.server.round import Result, Total, Updates, server_round, sum_round
from fedpipe.server.secure import Client, secure_sum
from fedpipe.server.summing import by_name, flat_move, message_bytes, most_levels, terms_of, threshold_of, unfit
from fedpipe.server.weights import Samples
from fedpipe.state import Run
from fedpipe.steps import aggregating, summing
from fedpipe.steps.skipping import skip_reason
from fedpipe.steps.summing import Vanished

pytestmark = pytest.mark.usefixtures("fresh_process")

KEY = bytes(range(32))
CLIENTS = ("c000", "c001", "c002", "c003")


@pytest.fixture(scope="module")
def settings(tiny: tuple[Project, Settings]) -> Settings:
    return changed(tiny[1], federation__secure_aggregation=True, federation__rounds=2, privacy__accountant="rdp")


@pytest.fixture
def project(tiny: tuple[Project, Settings], tmp_path: Path) -> Project:
    return copied(tiny[0], tmp_path / "copy")


def trained(project: Project, settings: Settings) -> tuple[Run, list[dict[str, str]]]:
    """A run whose first round is trained and not summed."""
    run = steps.prepare(project, settings).run
    plan = steps.begin_round(run.root, 1)
    return run, [steps.train(run.root, 1, cohort) for cohort in range(len(plan["cohorts"]))]


def outboxes(run: Run, round: int = 1) -> dict[str, Update]:
    paths = sorted((run.root / "clients").glob(f"*/outbox-{round:04d}.safetensors"))
    return {path.parent.name: read_tensors(path) for path in paths}


# The sum


def summed(
    round: Round, updates: Mapping[str, Update], method: Method, federation: FederationSettings, absent: tuple[str, ...]
) -> tuple[Total, Codec]:
    """What clients that do as the step says leave at the server."""
    terms = terms_of(federation, "query", 1, list(updates), round.sent, 40 if round.records else None)
    clients = []
    for name, update in updates.items():
        vector = flat_move(method.aggregation.bounded(update, round.start), round.start, round.sent)
        clients.append(Client(name, KEY, terms, vector, (round.records or {}).get(name)))
    found = secure_sum(terms, clients, lost=absent)
    stayed = tuple(name for name in updates if name not in absent)
    return Total(by_name(found.values, round.sent), found.weight, stayed), terms.codec


def plain(round: Round, updates: Mapping[str, Update], method: Method, absent: tuple[str, ...]) -> Result:
    there = {name: update for name, update in updates.items() if name not in absent}
    readers = Updates({name: lambda update=update: dict(update) for name, update in there.items()})
    return server_round(method, round, GlobalState(dict(round.start)), {}, readers, 9, None)


METHODS = {
    "mean": Method("m", "", ""),
    "momentum": Method("m", "", "", server=Momentum()),
    "samples": Method("m", "", "", weights=Samples()),
    "norm-bound": Method("m", "", "", aggregation=NormBound(bound=0.3)),
}


@pytest.mark.parametrize("name", METHODS)
@limited(max_examples=12, deadline=None)
@given(
    count=st.integers(3, 7), spread=st.sampled_from([0.01, 1.0]), limit=st.sampled_from([2.0, 30.0]), drop=st.booleans()
)
def test_the_server_makes_of_the_sum_what_it_makes_of_the_updates(
    name: str, count: int, spread: float, limit: float, drop: bool
) -> None:
    method, (round, updates) = METHODS[name], make_round(clients=count, spread=spread, seed=count)
    if method.weights.uses_sizes:
        records = {client: 3 + 11 * index % 38 for index, client in enumerate(updates)}
        round = Round(**{**vars(round), "records": records})
    absent = tuple(updates)[1 : 1 + drop]
    federation = FederationSettings(secure_aggregation=True, secure_range=limit)
    total, codec = summed(round, updates, method, federation, absent)
    found = sum_round(method, round, GlobalState(dict(round.start)), {}, total, 9, None)
    expected = plain(round, updates, method, absent)
    bound = len(total.clients) * (codec.max_weight or 1) * codec.step / total.weight
    assert found.weights == pytest.approx(expected.weights)
    for tensor, value in expected.state.adapter.items():
        assert (found.state.adapter[tensor] - value).abs().max() <= bound * (1 + 1e-6)
        assert not torch.equal(value, round.start[tensor])
    assert (found.down, found.ranked, found.memory.keys()) == (expected.down, expected.ranked, expected.memory.keys())


def test_a_client_of_lower_rank_is_padded_as_in_the_plain_mean() -> None:
    round, updates = make_round()
    for name in list(updates)[:2]:
        for tensor in updates[name]:
            updates[name][tensor][-1:] = 0.0
    method, federation = METHODS["mean"], FederationSettings(secure_aggregation=True)
    found = sum_round(method, round, GlobalState({}), {}, summed(round, updates, method, federation, ())[0], 9, None)
    expected = plain(round, updates, method, ())
    assert all((found.state.adapter[n] - v).abs().max() < 1e-7 for n, v in expected.state.adapter.items())


def test_no_number_of_clients_can_make_the_sum_wrap_round() -> None:
    for clients in [*range(1, 300), 10**4, 10**6]:
        levels = most_levels(clients)
        Codec(levels=levels).check_overflow(clients)
        assert levels % 2 == 1
        assert clients * (levels + 1) >= MODULUS or levels == 2**31 - 1
    with pytest.raises(SettingsError, match="can reach"):
        Codec(levels=most_levels(6)).check_overflow(7)


@pytest.mark.parametrize(
    ("share", "clients", "most"), [(0.6, 2, 2), (0.5, 4, 3), (0.6, 5, 3), (0.6, 10, 6), (1.0, 7, 7)]
)
def test_the_threshold(share: float, clients: int, most: int) -> None:
    assert threshold_of(FederationSettings(secure_threshold=share), clients) == most


def test_bytes_are_those_of_the_messages() -> None:
    federation, (round, _) = FederationSettings(secure_aggregation=True), make_round()
    terms = terms_of(federation, "query", 1, CLIENTS, round.sent, None)
    played = Played(terms, make_clients(terms, make_vectors(terms)), lost=CLIENTS[3:])
    up = sum(len(advert.sealing) + len(advert.masking) for advert in played.adverts)
    up += sum(len(sealed) for deal in played.deals for sealed in deal.sealed.values())
    up += sum(played.uploads[name].numbers.nbytes for name in played.sent)
    reveals = played.reveals()
    up += 33 * sum(len(reveal.own) + len(reveal.pair) for reveal in reveals)
    down = 64 * 4 * 3 + sum(len(sealed) for box in played.inboxes.values() for sealed in box.values())
    counts = {"keys": 4, "shares": 4, "upload": 3, "reveal": len(reveals)}
    assert message_bytes(terms, counts) == {"bytes_up": up, "bytes_down": down}


def test_a_vector_out_of_range_stays_with_its_client() -> None:
    assert unfit(np.array([0.5, -2.0]), 2.0) is None
    assert "federation.secure_range, 2" in unfit(np.array([0.5, -2.1]), 2.0)
    assert "not finite" in unfit(np.array([np.nan, 0.0]), 2.0)


# A run


def test_the_state_is_the_mean_of_what_clients_hold_ready(project: Project, settings: Settings) -> None:
    run, cohorts = trained(project, settings)
    held, start = outboxes(run), run.adapter(0)
    aggregated = steps.aggregate(run.root, 1, [steps.sum_updates(run.root, 1, cohorts)])
    after = read_tensors(run.adapter_path(1))
    assert len(held) == 3
    for name in held["c000"]:
        mean = start[name].double() + sum(update[name].double() - start[name].double() for update in held.values()) / 3
        assert (after[name].double() - mean).abs().max() < 2 * 8 * 3 / 2**32 + 1e-7
        assert not torch.equal(after[name], start[name])
    assert aggregated["clients"] == {name: {"weight": 1 / 3} for name in held}


def test_clients_shorten_their_own_moves_for_a_norm_bound(project: Project, settings: Settings) -> None:
    bound = 1e-3
    asked = changed(settings, method={"name": "norm-bound", "aggregation": {"bound": bound}})
    run, cohorts = trained(project, asked)
    start, moves = run.adapter(0), []
    for update in outboxes(run).values():
        move = torch.cat([(update[name].double() - start[name].double()).flatten() for name in sorted(update)])
        assert move.norm() > 2 * bound
        moves.append(bound * move / move.norm())
    entry = steps.sum_updates(run.root, 1, cohorts)
    found = read_tensors(run.round_dir(1) / "sum.safetensors")
    total = torch.cat([found[name].flatten() for name in sorted(found)])
    assert (total - sum(moves)).abs().max() < 3 * 16 / 2**30
    assert steps.aggregate(run.root, 1, [entry])["refused"] == {}


def found_in(run: Run, updates: Mapping[str, Update], start: Update) -> list[str]:
    """Files below `rounds/` that hold an update, or its move, as tensors or as bytes of any of their tensors."""
    found = []
    for path in sorted((run.root / "rounds").rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        tensors = read_tensors(path) if path.suffix == ".safetensors" else {}
        for update in updates.values():
            for name, tensor in update.items():
                move = tensor.double() - start[name].double()
                texts = [kind.numpy().tobytes() for kind in (tensor, tensor.double(), move, move.float())]
                same = name in tensors and any(
                    torch.allclose(tensors[name].double(), t.double()) for t in (tensor, move)
                )
                if same or any(text in content for text in texts):
                    found.append(path.name)
    return found


def test_no_file_of_the_server_holds_an_update(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _ = trained(project, settings)
    held, start = outboxes(run), run.adapter(0)
    handed: list[Any] = []
    real = aggregating.sum_round
    monkeypatch.setattr(aggregating, "sum_round", lambda *args: (handed.append(args), real(*args))[1])
    steps.run_round(run.root, 1)
    assert found_in(run, held, start) == []
    (arguments,) = handed
    tensors = [thing for thing in reachable(arguments) if isinstance(thing, torch.Tensor)]
    arrays = [tensor.detach().double().numpy().ravel() for tensor in tensors] + [
        thing.ravel() for thing in reachable(arguments) if isinstance(thing, np.ndarray)
    ]
    assert len(tensors) > len(start)
    for update in held.values():
        for name, tensor in update.items():
            for known in (tensor.double(), tensor.double() - start[name].double()):
                flat = known.numpy().ravel()
                assert not any(len(array) == len(flat) and np.allclose(array, flat) for array in arrays)
    # Once it is summed it is nobody else's: nothing of it is left at the client either.
    assert outboxes(run) == {}
    open_run = trained(copied(project, tmp_path / "open"), changed(settings, federation__secure_aggregation=False))[0]
    sent = {path.stem: read_tensors(path) for path in open_run.round_dir(1).glob("updates/*")}
    assert found_in(open_run, sent, start)  # the search finds what is there


def test_what_clients_hold_ready_is_for_their_owner_only(project: Project, settings: Settings) -> None:
    run, cohorts = trained(project, settings)
    assert (run.root / "clients").stat().st_mode & 0o777 == 0o700
    assert list(outboxes(run)) == ["c000", "c001", "c002"]
    listing = read_json(run.round_dir(1) / "cohort-00.json")["updates"]
    assert {key for entry in listing.values() for key in entry} == {"outbox"}
    # No digest of an update, by which a guess at it could be confirmed.
    texts = "".join(path.read_text() for path in run.round_dir(1).glob("*.json"))
    for path in (run.root / "clients").glob("*/outbox-*"):
        assert file_digest(path) not in texts
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(StateError, match="damaged; run the same command again"):
        steps.sum_updates(run.root, 1, cohorts)
    steps.run_round(run.root, 1)


def end(project: Project, run: Run) -> dict[str, bytes]:
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    publish(run, project)
    files = [path for number in (1, 2) for path in run.round_dir(number).glob("*.safetensors")]
    files += [run.round_dir(number) / "sum.json" for number in (1, 2)]
    return {str(path.relative_to(run.root)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (steps, "sum_updates", 1, False),
        (summing, "secure_sum", 1, True),
        (summing, "write_tensors", 1, True),
        (summing, "write_sealed", 2, True),
        (steps, "aggregate", 2, True),
        (aggregating, "empty", 1, True),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Any, name: str,
    call: int, after: bool,
) -> None:  # fmt: skip
    other = copied(project, tmp_path / "undisturbed")
    expected = end(other, steps.prepare(other, settings).run)
    run = steps.prepare(project, settings).run
    with monkeypatch.context() as patch:
        kill_at(patch, target, name, call, after)
        with pytest.raises(Killed):
            end(project, run)
    workspace.forget_workspaces()
    assert end(project, Run(run.root)) == expected
    assert len(expected) == 6


@pytest.mark.parametrize("stage", ["keys", "shares", "upload", "reveal"])
def test_one_client_may_vanish_at_any_stage(project: Project, settings: Settings, stage: str, tmp_path: Path) -> None:
    run, cohorts = trained(project, settings)
    held, start = outboxes(run), run.adapter(0)
    entry = steps.summing.sum_updates(run.root, 1, cohorts, Vanished(**{stage: frozenset(["c001"])}))
    aggregated = steps.aggregate(run.root, 1, [entry])
    inside = {name: update for name, update in held.items() if stage == "reveal" or name != "c001"}
    after = read_tensors(run.adapter_path(1))
    for name in start.keys() & held["c000"].keys():
        mean = sum(update[name].double() for update in inside.values()) / len(inside)
        assert (after[name].double() - mean).abs().max() < 1e-6
    # It has trained and so has spent: it counts as a participant, of weight zero.
    assert aggregated["clients"]["c001"]["weight"] == (1 / 3 if stage == "reveal" else 0.0)
    assert ("c001" in aggregated["refused"]) == (stage != "reveal")
    record = steps.finish_round(run.root, 1, aggregated, {"accuracy": 0.5, "loss": 1.0}, 1.0)
    row = round_row(record)
    assert (row["participants"], row["refused"]) == (3, int(stage != "reveal"))
    assert (row["update_norm"], row["snr"]) == (None, None)


def test_who_is_absent_does_not_matter_only_who_is_there(project: Project, settings: Settings, tmp_path: Path) -> None:
    states = set()
    for number, stage in enumerate(("keys", "shares", "upload")):
        mine = copied(project, tmp_path / str(number))
        run, cohorts = trained(mine, settings)
        entry = steps.summing.sum_updates(run.root, 1, cohorts, Vanished(**{stage: frozenset(["c002"])}))
        states.add(steps.aggregate(run.root, 1, [entry])["state"])
        workspace.forget_workspaces()
    assert len(states) == 1


@pytest.mark.parametrize(
    ("stage", "did"),
    [("keys", "sent their keys"), ("shares", "dealt"), ("upload", "sent their vectors"), ("reveal", "revealed")],
)
def test_with_too_few_the_round_stops_and_goes_on_later(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, stage: str, did: str
) -> None:
    run, cohorts = trained(project, settings)
    ledger, held = run.ledger_path.read_bytes(), outboxes(run)
    queries: list[str] = []
    real = summing.agreed
    monkeypatch.setattr(summing, "agreed", lambda *a: (queries.append((found := real(*a)).query), found)[1])
    for _ in range(2):
        with pytest.raises(PrivacyError, match=rf"1 of 3 clients {did}.*expected 2.*kept: run the same command again"):
            steps.summing.sum_updates(run.root, 1, cohorts, Vanished(**{stage: frozenset(["c000", "c001"])}))
    assert not list(run.round_dir(1).glob("sum*"))
    assert run.ledger_path.read_bytes() == ledger
    assert outboxes(run).keys() == held.keys()
    steps.run_round(run.root, 1)
    assert run.round_record(1)["secure_aggregation"]["survivors"] == 3
    assert run.ledger_path.read_bytes() == ledger
    # Shares that were told in an attempt that failed must not unmask the next one.
    assert len(set(queries)) == len(queries) == 3


def test_a_second_sum_of_other_clients_is_refused(project: Project, settings: Settings) -> None:
    run, cohorts = trained(project, settings)
    first = steps.sum_updates(run.root, 1, cohorts)
    fewer = Vanished(upload=frozenset(["c001"]))
    assert steps.summing.sum_updates(run.root, 1, cohorts, fewer) == first  # not made again
    path = run.round_dir(1) / "sum.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(PrivacyError, match="opened for other clients before"):
        steps.summing.sum_updates(run.root, 1, cohorts, fewer)
    assert steps.sum_updates(run.root, 1, cohorts) == first
    assert path.read_bytes() == whole


def test_clients_that_moved_too_far_say_so_and_stay_out(project: Project, settings: Settings) -> None:
    run, cohorts = trained(project, changed(settings, federation__secure_range=1e-7))
    with pytest.raises(PrivacyError, match=r"c000: has a number that moved.*a larger federation.secure_range"):
        steps.sum_updates(run.root, 1, cohorts)


def test_an_edited_or_older_sum_is_not_used(project: Project, settings: Settings) -> None:
    run, cohorts = trained(project, settings)
    entry = steps.sum_updates(run.root, 1, cohorts)
    with pytest.raises(FedpipeError, match="run again"):
        steps.aggregate(run.root, 1, [{**entry, "sha256": "0" * 64}])
    path = run.round_dir(1) / "sum.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(FedpipeError, match="damaged"):
        steps.aggregate(run.root, 1, [entry])


# What may run so


RULES = {
    "median": ({"aggregation": "median"}, "method.aggregation: aggregation median needs every client's update"),
    "fedex": ({"aggregation": "fedex"}, "use mean"),
    "norm": ({"weights": "norm"}, "method.weights: weights norm are not public"),
    "truncation": ({"weights": "truncation-error"}, "whole numbers"),
    "adaptive": ({"schedule": "adaptive"}, "scores"),
    "pruning": ({"ranks": "self-pruning"}, "use fixed or common"),
    "clusters": ({"rounds": "clusters"}, "use synchronous"),
    "buffered": ({"rounds": "buffered"}, "use synchronous"),
    "ringmaster": ({"rounds": "ringmaster"}, "one update"),
    "scaffold": ({"objective": "scaffold"}, "sends more than an update"),
}


@pytest.mark.parametrize("name", RULES)
def test_refused(settings: Settings, name: str) -> None:
    parts, words = RULES[name]
    base = {"name": "fedit", **parts}
    asked = changed(settings, method=base, privacy__unit="none", privacy__test_key=None)
    with pytest.raises(SettingsError) as caught:
        compose(asked)
    assert words in str(caught.value)
    assert "federation.secure" in str(caught.value)
    compose(changed(asked, federation__secure_aggregation=False))


def test_allowed(settings: Settings) -> None:
    found = []
    for name, method in CATALOGUE.items():
        unit = {"privacy__unit": "none", "privacy__test_key": None} if not method.private else {}
        try:
            compose(changed(settings, method={"name": name}, federation__rounds=9, **unit))
            found.append(name)
        except SettingsError as error:
            if "federation.secure" not in str(error):
                raise
    assert {"fedit", "dp-lora", "ffa-lora", "rolora", "la-lora", "fedsa-lora", "norm-bound", "fedadam"} <= set(found)
    assert not {"krum", "median", "fedbuff", "scaffold", "fedhl", "flora", "as-lora"} & set(found)


def test_rounds_of_one_client_are_refused(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="a round has one client, whose update is the sum"):
        compose(changed(settings, federation__clients_per_round=1))
    sizes = dict.fromkeys(CLIENTS, 100)
    with pytest.raises(SettingsError, match="lower federation"):
        make_plan(changed(settings, federation__dropout=0.9), sizes)
    method = CATALOGUE["la-lora"]
    assert "federation.secure_aggregation needs 2" in skip_reason(
        method, CLIENTS, dict.fromkeys(CLIENTS[1:], "x"), [], True
    )
    assert skip_reason(method, CLIENTS, dict.fromkeys(CLIENTS[1:], "x"), []) is None
    assert skip_reason(method, CLIENTS, dict.fromkeys(CLIENTS[2:], "x"), [], True) is None


def test_many_clients_are_warned_about(settings: Settings) -> None:
    many = changed(settings, partition__clients=400)
    assert any("square of its 400 clients" in note for note in warnings_for(compose(many), many))
    assert not any("square" in note for note in warnings_for(compose(settings), settings))
