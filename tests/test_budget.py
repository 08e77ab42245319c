"""The largest epsilon of many clients is found from a few of them, and is exactly the largest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe.budget import check_round_spent, epsilon_so_far, price_of, undominated
from fedpipe.errors import PrivacyError
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from fedpipe.privacy.ledger import Ledger, LedgerEntry

DELTA = 1e-5


def accounted(accountant: str) -> Callable[..., float]:
    """What a plan computes of a history; the accountants are looked up anew at each call."""
    return lambda history, by=None: {"prv": epsilon_prv, "rdp": epsilon_rdp}[by or accountant](history, DELTA)


def made_run(path: Path, accountant: str, epsilon: float = 50.0) -> SimpleNamespace:
    """A run of 60 clients with 20 rates in four classes of noise, that took one to three steps each."""
    ledger = Ledger(path / "ledger.jsonl", run_id="run")
    entries = [
        LedgerEntry(f"c{n:03d}", 1, step, 1.5 + 0.2 * (n % 4), (8 + n % 20) / 100, "q")
        for n in range(60)
        for step in range(1, 2 + n % 3)
    ]
    ledger.append([*entries, LedgerEntry("c007", 2, 1, 3.0, 0.3, "q")])
    plan = SimpleNamespace(private=True, accountant=accountant, epsilon=epsilon, accounted=accounted(accountant))
    return SimpleNamespace(plan=plan, ledger=ledger)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_it_is_exactly_the_largest_of_all_clients(tmp_path: Path, accountant: str) -> None:
    run = made_run(tmp_path, accountant)
    histories = [run.ledger.history(client) for client in run.ledger.clients()]
    assert len(set(histories)) > 50
    rdp = max(epsilon_rdp(history, DELTA) for history in histories)
    prv = max(epsilon_prv(history, DELTA) for history in histories)
    assert epsilon_so_far(run) == {"epsilon_max": prv if accountant == "prv" else rdp, "epsilon_rdp": rdp}


def test_few_clients_are_accounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = {"prv": 0, "rdp": 0}, made_run(tmp_path, "prv")
    account = run.plan.accounted

    def counted(history, by):
        asked[by] += 1
        return account(history, by)

    monkeypatch.setattr(run.plan, "accounted", counted)
    epsilon_so_far(run)
    assert 0 < asked["prv"] <= asked["rdp"] <= 4 * 3 + 1  # noise levels by numbers of steps, and the mixed history


def test_above_the_target_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"above the target 0\.5; stopped"):
        epsilon_so_far(made_run(tmp_path, "prv", epsilon=0.5))


def test_an_edited_ledger_is_found(tmp_path: Path) -> None:
    run = made_run(tmp_path, "rdp")
    epsilon_so_far(run)
    content = run.ledger.path.read_bytes()
    run.ledger.path.write_bytes(content.replace(b'"q":0.08', b'"q":0.07', 1))
    assert len(content) == run.ledger.path.stat().st_size
    with pytest.raises(PrivacyError, match="line 2: "):
        epsilon_so_far(run)


def with_steps(path: Path) -> SimpleNamespace:
    """A run of two clients with two and with three steps a job, both of which have done round 1."""
    ledger = Ledger(path / "ledger.jsonl", run_id="run")
    ledger.append(
        [LedgerEntry(c, 1, k, 1.0, 0.1, "q") for c, steps in (("a", 2), ("b", 3)) for k in range(1, steps + 1)]
    )
    own = {"noise_multiplier": 1.0, "sampling_rate": 0.1}
    clients = {
        "a": SimpleNamespace(local_steps=2, max_steps=4, **own),
        "b": SimpleNamespace(local_steps=3, max_steps=5, **own),
    }
    charged, participants = (lambda round: clients), (("a", "b"), ("a", "b"))
    plan = SimpleNamespace(private=True, epsilon=50.0, charged=charged, participants=participants, clients=clients)
    plan.accounted = accounted("rdp")
    return SimpleNamespace(plan=plan, ledger=ledger, ledger_path=ledger.path)


def test_a_client_has_spent_its_own_steps(tmp_path: Path) -> None:
    run = with_steps(tmp_path)
    check_round_spent(run, 1, "q", ["a", "b"])
    run.plan.clients["a"].local_steps = 3
    with pytest.raises(PrivacyError, match=r"holds 2 of the 3 noisy steps that a took in round 1"):
        check_round_spent(run, 1, "q", ["a", "b"])


def test_a_client_stops_where_its_own_steps_would_go_past_its_own_limit(tmp_path: Path) -> None:
    excluded = price_of(with_steps(tmp_path), 2, "next").excluded
    assert excluded == {"b": "3 of 5 noisy steps are spent; a round takes 3"}


def test_nothing_spent_is_no_epsilon(tmp_path: Path) -> None:
    plan = SimpleNamespace(private=True, accountant="prv", epsilon=1.0, accounted=accounted("prv"))
    run = SimpleNamespace(plan=plan, ledger=Ledger(tmp_path / "ledger.jsonl", run_id="run"))
    assert epsilon_so_far(run) == {"epsilon_max": 0.0, "epsilon_rdp": 0.0}


@given(
    st.sets(
        st.lists(
            st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([0.1, 0.2, 0.3]), st.integers(1, 4)),
            min_size=1,
            max_size=2,
        ).map(tuple)
    )
)
def test_only_what_another_history_covers_is_left_out(histories: set) -> None:
    kept = undominated(histories)
    assert set(kept) <= histories
    assert len(set(kept)) == len(kept)
    for history in histories - set(kept):
        ((sigma, rate, steps),) = history
        covering = [own for own in kept if len(own) == 1 and own[0][0] == sigma]
        assert any(own[0][1] >= rate and own[0][2] >= steps for own in covering)
