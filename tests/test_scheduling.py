"""Schedules: who works for which round, from which state, as played through on simulated speeds."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe.errors import SettingsError
from fedpipe.methods import AXES
from fedpipe.parts import choose
from fedpipe.server.clusters import k_means
from fedpipe.server.scheduling import (
    Buffered,
    Clusters,
    Demand,
    Ringmaster,
    Schedule,
    Scheduling,
    Synchronous,
)


def demand_of(clients: int = 8, **changes: Any) -> Demand:
    values = {"rounds": 12, "wanted": clients, "local_steps": 3, "seed": 5} | changes
    return Demand(tuple(f"c{n:03d}" for n in range(clients)), **{"cap": values["rounds"]} | values)


demands = st.integers(1, 9).flatmap(
    lambda clients: st.builds(
        demand_of,
        clients=st.just(clients),
        rounds=st.integers(1, 15),
        wanted=st.integers(1, clients),
        local_steps=st.integers(1, 4),
        dropout=st.sampled_from([0.0, 0.3, 0.9]),
        seed=st.integers(0, 1000),
    )
)
spreads = st.sampled_from([0.0, 0.5, 2.0])
schedulings = st.one_of(
    st.builds(Synchronous, spread=spreads),
    st.builds(Clusters, spread=spreads, tau_max=st.none() | st.integers(1, 6)),
    st.builds(
        Buffered,
        spread=spreads,
        size=st.none() | st.just(1),
        ignore_stale=st.booleans(),
        max_staleness=st.none() | st.integers(0, 3),
    ),
    st.builds(Ringmaster, spread=spreads, threshold=st.none() | st.integers(1, 4)),
)


def bound(rounds: Scheduling, demand: Demand) -> float:
    """Return how many steps late a used update may be."""
    if isinstance(rounds, Ringmaster):
        return (rounds.threshold or demand.wanted) - 1
    if isinstance(rounds, Buffered):
        return 0 if rounds.ignore_stale else math.inf if rounds.max_staleness is None else rounds.max_staleness
    return 0


def check(schedule: Schedule, rounds: Scheduling, demand: Demand) -> None:
    """Check what holds of every schedule."""
    assert len(schedule.jobs) == len(schedule.seconds) == len(schedule.away) == demand.rounds
    for names in schedule.away:
        assert list(names) == sorted(set(names))
        assert set(names) <= set(demand.clients)
    if not demand.dropout:
        assert not any(schedule.away)
    assert set(schedule.steps) == set(schedule.most) == set(demand.clients)
    spans = defaultdict(list)
    for number, jobs in enumerate(schedule.jobs, start=1):
        names = [job.client for job in jobs]
        assert names == sorted(set(names))
        assert set(names) <= set(demand.clients)
        assert any(job.used for job in jobs)
        for job in jobs:
            assert 0 <= job.start < number
            assert number - 1 - job.start <= bound(rounds, demand)
            spans[job.client].append((job.start, number))
    for name in demand.clients:
        assert len(spans[name]) <= min(demand.cap, schedule.most[name])
        # On one job at a time: the next one begins from no state before the one that the last one made.
        assert all(after[0] >= before[1] for before, after in zip(spans[name], spans[name][1:], strict=False))
    assert min(schedule.most.values()) >= 1
    assert min(schedule.steps.values()) >= 1
    assert min(schedule.seconds) >= 0
    assert sum(schedule.seconds) > 0


@given(demands, schedulings)
def test_every_schedule_keeps_its_rules_and_is_the_same_again(demand: Demand, rounds: Scheduling) -> None:
    schedule = rounds.plan(demand)
    check(schedule, rounds, demand)
    assert schedule == rounds.plan(demand)


@given(demands, schedulings, st.integers(1, 15))
def test_the_cap_is_kept_or_the_schedule_refused(demand: Demand, rounds: Scheduling, cap: int) -> None:
    demand = Demand(**{**vars(demand), "cap": min(cap, demand.rounds)})
    try:
        schedule = rounds.plan(demand)
    except SettingsError as caught:
        refused = str(caught)
    else:
        check(schedule, rounds, demand)
        return
    assert "federation.max_participations: with " in refused
    assert "\n" not in refused
    assert demand.cap < demand.rounds


@given(demands)
def test_who_was_drawn_takes_part_or_is_away(demand: Demand) -> None:
    demand = Demand(**{**vars(demand), "cap": demand.rounds})
    schedule, full = (Synchronous().plan(Demand(**{**vars(demand), "dropout": p})) for p in (demand.dropout, 0.0))
    for jobs, away, drawn in zip(schedule.jobs, schedule.away, full.jobs, strict=True):
        assert sorted([*(job.client for job in jobs), *away]) == [job.client for job in drawn]


@given(demands)
def test_equal_speeds_and_a_buffer_for_all_are_like_synchronous_rounds(demand: Demand) -> None:
    demand = Demand(**{**vars(demand), "dropout": 0.0})
    schedule = Buffered(spread=0.0, size=demand.wanted).plan(demand)
    for before, jobs in enumerate(schedule.jobs):
        assert len(jobs) == demand.wanted
        assert all(job.used and job.start == before for job in jobs)
    assert schedule.seconds == pytest.approx(Synchronous(spread=0.0).plan(demand).seconds)
    if demand.wanted == len(demand.clients):
        assert schedule.jobs == Synchronous(spread=0.0).plan(demand).jobs


def test_rennala_with_a_buffer_of_one_takes_the_first_of_each_state() -> None:
    schedule = Buffered(size=1, ignore_stale=True, spread=1.0).plan(demand_of(rounds=30))
    used = [[job for job in jobs if job.used] for jobs in schedule.jobs]
    assert all(len(jobs) == 1 and jobs[0].start == before for before, jobs in enumerate(used))
    assert sum(map(len, schedule.jobs)) > 30


def test_rennala_takes_only_updates_of_the_state_it_steps_from() -> None:
    rounds = Buffered(size=3, ignore_stale=True, spread=1.0)
    schedule = rounds.plan(demand_of(rounds=30))
    for before, jobs in enumerate(schedule.jobs):
        assert sum(job.used for job in jobs) == 3
        assert all(job.start == before for job in jobs)


def test_without_a_bound_nothing_is_dropped_and_slow_clients_are_late() -> None:
    schedule = Buffered(size=2, spread=1.0).plan(demand_of(rounds=30))
    late = [before - job.start for before, jobs in enumerate(schedule.jobs) for job in jobs]
    assert all(job.used for jobs in schedule.jobs for job in jobs)
    assert max(late) > 3
    assert min(late) == 0


def test_a_threshold_drops_what_is_too_late_and_counts_it() -> None:
    demand = demand_of(rounds=60)
    strict, loose = (Ringmaster(threshold=t, spread=1.0).plan(demand) for t in (2, 50))
    assert all(job.used for jobs in loose.jobs for job in jobs)
    dropped = [job for jobs in strict.jobs for job in jobs if not job.used]
    assert dropped
    for name in demand.clients:
        assert strict.most[name] == max(1, sum(job.client == name for jobs in strict.jobs for job in jobs))


def test_ringmaster_at_equal_speeds_drops_nothing() -> None:
    schedule = Ringmaster(spread=0.0).plan(demand_of(rounds=40))
    assert all(len(jobs) == 1 and jobs[0].used for jobs in schedule.jobs)
    assert max(before - job.start for before, jobs in enumerate(schedule.jobs) for job in jobs) == 7


def test_fast_clients_work_more_often() -> None:
    demand = demand_of(rounds=200)
    rounds = Ringmaster(threshold=100, spread=1.0)
    speeds, schedule = rounds.speeds(demand), rounds.plan(demand)
    times = [speeds.job(index, 3) for index in range(8)]
    taken = [schedule.most[name] for name in demand.clients]
    elapsed = sum(schedule.seconds)
    assert taken == [math.floor(elapsed / time + 1e-9) or 1 for time in times]


def test_who_does_not_wait_is_faster_and_all_draw_the_same_speeds() -> None:
    demand = demand_of(rounds=40)
    seconds = {r.name: sum(r.plan(demand).seconds) for r in (Synchronous(), Buffered(size=8), Buffered(size=4))}
    assert seconds["buffered"] < seconds["synchronous"]
    speeds = Synchronous().speeds(demand)
    slowest = max(speeds.job(index, 3) for index in range(8))
    assert Synchronous().plan(demand).seconds == (slowest,) * 40
    other = Ringmaster().speeds(demand)
    assert np.array_equal(other.step, speeds.step)
    assert np.array_equal(other.transfer, speeds.transfer)


def test_speeds_are_log_normal_with_median_one() -> None:
    speeds = Synchronous(spread=0.7).speeds(demand_of(clients=4000))
    for values in (np.log(speeds.step), np.log(speeds.transfer)):
        assert np.median(values) == pytest.approx(0, abs=0.05)
        assert values.std() == pytest.approx(0.7, rel=0.05)


def test_an_unavailable_client_does_not_work_until_the_next_step() -> None:
    demand = demand_of(rounds=60, wanted=3)
    seldom = Demand(**{**vars(demand), "dropout": 0.95})
    rarely, usual = Buffered(size=2).plan(seldom), Buffered(size=2).plan(demand)
    assert sum(rarely.seconds) > sum(usual.seconds)
    check(rarely, Buffered(size=2), seldom)
    for jobs, away in zip(rarely.jobs, rarely.away, strict=True):
        assert len(away) > len(demand.clients) / 2
        assert not {job.client for job in jobs if job.used} & set(away)
    half = Buffered(size=2).plan(Demand(**{**vars(demand), "dropout": 0.5}))
    assert {job.client for jobs in half.jobs[30:] for job in jobs} == set(demand.clients), "some never came back"


def test_a_discount_divides_by_the_root_of_what_is_late() -> None:
    assert [Buffered().discount(s) for s in (0, 3)] == [1.0, 0.5]
    assert Buffered(exponent=0).discount(9) == 1.0
    assert Ringmaster().discount(9) == Synchronous().share(7) == Buffered().share(7) == 1.0


# Clusters


def test_one_cluster_is_fedavg() -> None:
    demand = demand_of(clients=9, wanted=4)
    schedule, plain = Clusters(clusters=1).plan(demand), Synchronous().plan(demand)
    assert schedule == plain
    assert len({Clusters().share(steps) for steps in schedule.steps.values()}) == 1


def test_equal_speeds_are_one_cluster() -> None:
    demand = demand_of(clients=9, wanted=4)
    assert Clusters(spread=0.0).plan(demand) == Synchronous(spread=0.0).plan(demand)


def test_a_cluster_takes_steps_by_its_size_over_its_cost() -> None:
    demand, rounds = demand_of(clients=30, local_steps=2), Clusters(tau_max=40, spread=1.0)
    speeds = rounds.speeds(demand)
    of, schedule = rounds.assign(demand, speeds), rounds.plan(demand)
    assert 2 < len(set(of)) <= 6
    worth = {}
    for cluster in set(of):
        members = np.flatnonzero(of == cluster)
        worth[cluster] = len(members) / np.mean([speeds.step[i] + speeds.transfer[i] / 40 for i in members])
    for index, name in enumerate(demand.clients):
        assert schedule.steps[name] == max(1, round(40 * worth[of[index]] / max(worth.values())))
    assert max(schedule.steps.values()) == 40
    assert all(schedule.most[name] == demand.cap for name in demand.clients)


def test_moves_of_many_steps_count_less() -> None:
    """Clients that move by the same amount in each step pull the mean alike, whatever their number of steps."""
    weights = {steps: Clusters().share(steps) for steps in (1, 4, 20)}
    assert len({round(weight * steps, 12) for steps, weight in weights.items()}) == 1


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_k_means_leaves_no_point_nearer_to_another_cluster(points: int, count: int, seed: int) -> None:
    places = np.random.default_rng(seed).normal(size=(points, 2))
    count = min(count, points)
    of = k_means(places, count)
    assert sorted(set(of)) == list(range(count))
    centres = np.stack([places[of == cluster].mean(axis=0) for cluster in range(count)])
    nearest = ((places[:, None] - centres[None]) ** 2).sum(axis=2)
    assert (nearest[np.arange(points), of] <= nearest.min(axis=1) + 1e-12).all()


def test_k_means_finds_clusters_that_are_far_apart() -> None:
    places = np.concatenate([np.random.default_rng(1).normal(size=(5, 2)) + at for at in (0, 100, 200)])
    assert [len(set(k_means(places, 3)[start : start + 5])) for start in (0, 5, 10)] == [1, 1, 1]
    assert len(set(k_means(np.ones((4, 2)), 3))) == 1


# Settings


@pytest.mark.parametrize(
    ("rounds", "pattern"),
    [
        (Buffered(size=9), r"method\.rounds\.size: found 9; .* has 8 clients, expected no more"),
        (Clusters(clusters=9), r"method\.rounds\.clusters: found 9; the partition has 8 clients, expected no more"),
    ],
)
def test_more_than_there_are_clients_is_refused(rounds: Scheduling, pattern: str) -> None:
    with pytest.raises(SettingsError, match=pattern):
        rounds.plan(demand_of())


def test_when_all_are_at_their_cap_it_says_which_round_and_what_to_change() -> None:
    with pytest.raises(SettingsError, match=r"with 2 a client, method\.rounds ringmaster .* round 17 of 20; raise it"):
        Ringmaster(spread=0.0).plan(demand_of(rounds=20, cap=2))


def test_the_settings_choose_and_change_a_scheduling() -> None:
    chosen = choose("rounds", AXES["rounds"], Synchronous(), {"name": "buffered", "size": 2, "ignore_stale": True})
    assert chosen == Buffered(size=2, ignore_stale=True)
    assert set(AXES["rounds"]) == {"synchronous", "clusters", "buffered", "ringmaster"}
    with pytest.raises(SettingsError, match=r"method\.rounds\.spread: .*less than or equal to 3"):
        choose("rounds", AXES["rounds"], Synchronous(), {"spread": 9})
