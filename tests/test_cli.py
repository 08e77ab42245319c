"""Mistakes, as a user makes them: one line each that says what, where and what to do; and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Done, Fault, fedpipe, new_project, start
from transformers import LlamaConfig, LlamaForSequenceClassification

# What a run says of itself before a mistake can show.
PROGRESS = re.compile(r"run la-lora|NOT PRIVATE|a new run; since|resumed|(before )?round \d")


def mistakes(done: Done, *patterns: str, code: int = 2) -> None:
    """Check that a command reported exactly these mistakes, one line each, and nothing else."""
    lines = [line for line in done.err.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == len(patterns), done.err
    for line, pattern in zip(lines, patterns, strict=True):
        assert line.startswith("error: ")
        assert re.search(pattern, line), line
    assert done.code == code
    assert done.out == ""


def overridden(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def flip(path: Path, at: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new_project(tmp_path / "project")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project for mistakes that are found before anything is made."""
    return new_project(tmp_path_factory.mktemp("untouched") / "project")


class TestSettings:
    """Found before anything is fetched or started, so that a typing error costs a second."""

    @pytest.mark.parametrize(
        ("values", "patterns"),
        [
            (["federation.roundz=3"], [r"params\.yaml: federation\.roundz: unknown key; did you mean 'rounds'\?"]),
            (["federations.rounds=3"], [r"federations: unknown key; did you mean 'federation'\?"]),
            (["federation.rounds=three"], [r"federation\.rounds: found 'three'; expected a whole number"]),
            (["method.name=la-lara"], [r"method\.name: found 'la-lara'; did you mean 'la-lora'\?"]),
            (
                ["method.name=fedit"],
                [r"fedit is for training without privacy; set privacy\.unit to none, or use dp-lora"],
            ),
            (["method.weights=samples"], [r"method\.weights: samples .*; use uniform"]),
            (["seed.x=1"], [r"seed\.x: 'seed' holds a value, not keys"]),
            (["rounds"], [r"--set rounds: expected section\.key=value, such as"]),
            (["lora.targets=[q"], [r"--set lora\.targets=\[q: the value is not YAML: expected ',' or '\]'"]),
            (
                ["federation.clients_per_round=9"],
                [r"federation\.clients_per_round is 9, but partition\.clients is 3; expected no more"],
            ),
            (
                ["seed=-1", "optimizer.lr=fast", "lora.targets=3"],
                [
                    r"seed: found -1; expected greater than or equal to 0",
                    r"lora\.targets: found 3; expected 'auto' or a list",
                    r"optimizer\.lr: found 'fast'; expected a number",
                ],
            ),
        ],
    )
    def test_overrides(self, untouched: Path, values: list[str], patterns: list[str]) -> None:
        mistakes(fedpipe(untouched, "run", *overridden(*values)), *patterns)
        assert {path.name for path in untouched.iterdir()} == {"backbone", "records.csv", "params.yaml"}

    @pytest.mark.parametrize("command", ["run", "train", "fetch", "partition"])
    def test_a_missing_file(self, tmp_path: Path, command: str) -> None:
        found = r"params\.yaml: cannot be read: No such file or directory; run this where params\.yaml is"
        mistakes(fedpipe(tmp_path, command), found)

    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("seed: [1", r"params\.yaml, line 1, column 9: is not YAML: expected ',' or '\]'"),
            ("seed: 1\nseed: 2\n", r"params\.yaml, line 2, column 1: is not YAML: found duplicate key \"seed\""),
            ("seed: !!python/object/apply:os.getcwd []", r"line 1, column 7: is not YAML: could not determine"),
            ("", r"params\.yaml: found nothing; expected keys such as"),
            ("- 1", r"params\.yaml: found \[1\]; expected keys such as"),
        ],
    )
    def test_a_file_that_is_not_settings(self, tmp_path: Path, text: str, pattern: str) -> None:
        (tmp_path / "params.yaml").write_text(text)
        mistakes(fedpipe(tmp_path, "run"), pattern)


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


class TestData:
    """Found by a task of the flow, whose own logging must not show."""

    @pytest.mark.parametrize(
        ("values", "pattern"),
        [
            (["data.text=sentence"], r"data\.text: no column 'sentence' in records\.csv, which has text, label, topic"),
            (["data.source=other.csv"], r"data\.source: other\.csv: no such file or directory, seen from"),
            (
                ["partition.clients=1000"],
                r"320 training records are too few for 1000 clients with at least 20 each .*; lower one of the two",
            ),
            (
                ["partition.clients=16", "partition.scheme=dirichlet", "partition.alpha=0.01"],
                r"partition\.alpha: in 100 draws .*; raise partition\.alpha, or lower",
            ),
            (["privacy.epsilon=0.00001"], r"privacy\.epsilon: 1e-05 cannot be reached .*; raise privacy\.epsilon, or"),
            (["model.backbone=./other"], r"model\.backbone: \./other: no such directory, seen from"),
            (["lora.targets=[query_proj]"], r"no linear layer named 'query_proj'; (did you mean|expected one of)"),
            (["lora.last_layers=9"], r"lora\.last_layers: found 9; this backbone has 2 layers"),
            (
                ["federation.max_participations=1", "federation.clients_per_round=2"],
                r"federation\.max_participations: with 1 a client, 3 clients take part 3 times at most, "
                r"and 3 rounds of 2 need 6; raise it to 2, or lower",
            ),
        ],
    )
    def test_settings_that_only_the_data_can_refuse(self, project: Path, values: list[str], pattern: str) -> None:
        mistakes(fedpipe(project, "run", *overridden(*values)), pattern)
        assert not (project / "reports").exists()

    @pytest.mark.parametrize(
        ("change", "pattern"),
        [
            (lambda lines: [*lines, "a fine film,ugly,topic0"], r"label 'ugly' has 1 record among \d+; .*add more"),
            (lambda lines: [line.replace("bad", "good") for line in lines], r"only one label, 'good'"),
            (lambda lines: [*lines, "a,b,c,d"], r"records\.csv: cannot be read: CSV parse error: Row #402: Expected 3"),
            (lambda lines: [], r"records\.csv: cannot be read: "),
        ],
    )
    def test_records(self, project: Path, change: Callable[[list[str]], list[str]], pattern: str) -> None:
        rewrite(project / "records.csv", change)
        mistakes(fedpipe(project, "run"), pattern)

    def test_the_order_of_the_commands(self, project: Path) -> None:
        mistakes(fedpipe(project, "partition"), r"data/raw: no data here yet; run `fedpipe fetch`")
        mistakes(fedpipe(project, "train"), r"data/partition: no complete partition here; run `fedpipe partition`")
        mistakes(fedpipe(project, "report"), r"models/adapter: no trained adapter here; run `fedpipe run`", code=3)

    def test_a_partition_that_does_not_fit(self, project: Path) -> None:
        assert fedpipe(project, "fetch").out.startswith("data: records.csv (licence: not stated by the source)\n")
        assert fedpipe(project, "partition").code == 0
        stale = r"data/partition: stale partition: data\.test_fraction 0\.2 -> 0\.3; run `dvc repro` or `fedpipe"
        mistakes(fedpipe(project, "train", *overridden("data.test_fraction=0.3")), stale)
        rewrite(project / "records.csv", lambda lines: lines[:-1])
        mistakes(fedpipe(project, "partition"), r"records\.csv: changed since fetch; run `fedpipe fetch` again")
        assert fedpipe(project, "fetch").code == 0
        mistakes(fedpipe(project, "train"), r"stale partition: records\.csv has other records now; run `dvc repro`")

    @pytest.mark.parametrize("file", ["c001.arrow", "test.arrow"])
    def test_a_damaged_partition_is_found_before_a_run_begins(self, project: Path, file: str) -> None:
        fedpipe(project, "fetch")
        fedpipe(project, "partition")
        flip(project / "data" / "partition" / file)
        damaged = rf"partition/{file}: damaged: its sha256 is not the manifest's; run `fedpipe partition` .*again"
        mistakes(fedpipe(project, "train"), damaged)
        assert not (project / "runs").exists()
        (project / "data" / "partition" / file).unlink()
        mistakes(fedpipe(project, "train"), rf"partition/{file}: cannot be read: No such file or directory; run")

    def test_a_damaged_manifest(self, project: Path) -> None:
        fedpipe(project, "fetch")
        fedpipe(project, "partition")
        manifest = project / "data" / "partition" / "manifest.json"
        manifest.write_text(manifest.read_text()[:-100])
        mistakes(fedpipe(project, "train"), r"manifest\.json: is not a valid JSON file: .*; run `fedpipe partition`")
        assert fedpipe(project, "partition").code == 0

    def test_changed_records_are_not_taken_for_the_old_ones(self, project: Path) -> None:
        fast = overridden("federation.rounds=1")
        first = fedpipe(project, "run", *fast)
        rewrite(project / "records.csv", lambda lines: lines[:-1])
        second = fedpipe(project, "run", *fast)
        assert (first.code, second.code) == (0, 0)
        assert re.search(r"^a new run; since la-lora-\w+: dataset: \w+… -> \w+…$", second.err, re.M)


class TestBackbone:
    def test_changed_since_it_was_fetched(self, project: Path) -> None:
        fedpipe(project, "fetch")
        fedpipe(project, "partition")
        flip(project / "backbone" / "model.safetensors")
        mistakes(fedpipe(project, "train"), r"model\.safetensors: changed since fetch; run `fedpipe fetch` again")

    def test_cut_off(self, project: Path) -> None:
        weights = project / "backbone" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        mistakes(
            fedpipe(project, "run"), r"model\.backbone: backbone: model\.safetensors is damaged .*; download or save"
        )

    def test_a_configuration_that_is_none(self, project: Path) -> None:
        (project / "backbone" / "config.json").write_text("{")
        mistakes(fedpipe(project, "run"), r"backbone: its config\.json or index is damaged: .*config\.json")

    def test_without_a_vocabulary(self, project: Path) -> None:
        (project / "backbone" / "vocab.txt").unlink()
        mistakes(fedpipe(project, "run"), r"backbone: the tokenizer has no vocabulary; save it beside the model")

    def test_a_name_from_another_family(self, project: Path) -> None:
        """A recipe's `query` is `q_proj` in other families, and in later versions of the same."""
        (project / "backbone" / "config.json").unlink()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForSequenceClassification(config).save_pretrained(project / "backbone")
        found = r"lora\.targets: LlamaForSequenceClassification has no linear layer named 'query'; .*q_proj"
        mistakes(fedpipe(project, "run", *overridden("lora.targets=[query]")), found)


class TestTraining:
    def test_divergence(self, project: Path) -> None:
        done = fedpipe(project, "run", *overridden("optimizer.lr=1e30"))
        *refused, last = [line for line in done.err.splitlines() if not PROGRESS.match(line)]
        assert all(re.match(r"WARNING: round 1, client c00\d: its update has moved by", line) for line in refused)
        assert re.match(r"error: .*0 usable updates.*; lower optimizer\.lr or lr_head$", last)
        assert len(refused) == 3
        assert (done.code, done.out) == (5, "")

    def test_numbers_that_are_none(self, project: Path) -> None:
        done = fedpipe(project, "run", *overridden("optimizer.lr=1e38", "optimizer.weight_decay=10"))
        *refused, last = [line for line in done.err.splitlines() if not PROGRESS.match(line)]
        assert all(re.match(r"WARNING: round 1, client c00\d: ", line) for line in refused)
        assert re.match(r"error: .*(diverged|no longer finite).*; lower optimizer\.lr or lr_head$", last)
        assert (done.code, done.out) == (5, "")


class TestStores:
    @pytest.mark.parametrize(
        ("uri", "why"),
        [
            ("http://127.0.0.1:9", "the server does not answer (Connection refused)"),
            ("sqlite:////proc/none/mlflow.db", "[Errno 2] No such file or directory: '/proc/none'"),
        ],
    )
    def test_a_tracking_store_that_is_away(self, project: Path, uri: str, why: str) -> None:
        done = fedpipe(project, "run", *overridden(f"tracking.uri={uri}"))
        assert done.code == 0
        first, last = [line for line in done.err.splitlines() if line.startswith("WARNING")]
        assert first == f"WARNING: MLflow does not take what is recorded: {why}. The run goes on; it is tried again"
        assert f"({why}): kept in the run's directory; 'fedpipe sync' records it" in last

    def test_a_tracking_store_that_is_none(self, project: Path) -> None:
        (project / "text.db").write_text("this is a text, not a database " * 9)
        done = fedpipe(project, "run", *overridden("tracking.uri=sqlite:///text.db"))
        mistakes(done, r"tracking\.uri: .*file is not a database.*--set tracking\.uri=null", code=4)
        assert fedpipe(project, "run", *overridden("tracking.uri=null")).code == 0

    @pytest.mark.slow
    def test_a_database_half_made(self, tmp_path: Path) -> None:
        """MLflow cannot go on with tables that a crash left half made."""
        project = new_project(tmp_path / "project", federation={"rounds": 1})
        tracked = overridden("tracking.uri=sqlite:///mlflow.db")
        killed = fedpipe(project, "run", *tracked, fault=Fault("alembic.command", "upgrade", 1))
        assert killed.code == -signal.SIGKILL
        assert fedpipe(project, "run", *tracked).code == 0

    @pytest.mark.slow
    def test_a_prefect_server_that_does_not_answer(self, project: Path) -> None:
        done = real(project, "run", PREFECT_API_URL="http://127.0.0.1:9/api")
        assert done.code == 0
        assert [line for line in done.err.splitlines() if line.startswith("WARNING")] == [
            "WARNING: Prefect's server at http://127.0.0.1:9/api is away: the server does not answer (Connection "
            "refused). The run goes on with a server of its own"
        ]


class TestDisk:
    @pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EACCES"])
    def test_nothing_can_be_written(self, project: Path, kind: str) -> None:
        words = {"ENOSPC": "the disk is full; free", "EROFS": "read-only", "EACCES": "permission"}
        done = fedpipe(project, "run", fault=Fault("tempfile", "mkstemp", 1, kind))
        mistakes(done, rf"data/raw/origin\.json: cannot write: .*{words[kind]}.* Run the same command again", code=4)
        assert [path for path in project.rglob("*.tmp")] == []

    @pytest.mark.parametrize("number", [10, 35])
    def test_a_disk_that_fills_up_on_the_way(self, project: Path, number: int) -> None:
        """Wherever it happens, what is complete stays, and the next start goes on from there."""
        fault = Fault("os", "fsync", number, "ENOSPC")
        done = fedpipe(project, "run", *overridden("runtime.cohort_size=1"), fault=fault)
        mistakes(done, r"cannot write: the disk is full; free some space\. Run the same command again", code=4)
        kept = [path.read_bytes() for path in sorted(project.glob("runs/*/rounds/*/round.json"))]
        assert fedpipe(project, "run", *overridden("runtime.cohort_size=1")).code == 0
        after = [path.read_bytes() for path in sorted(project.glob("runs/*/rounds/*/round.json"))]
        assert after[: len(kept)] == kept
        assert len(after) == 4

    @pytest.mark.slow
    @pytest.mark.parametrize("size", ["1500k", "6200k", "6600k", "7000k"])
    def test_a_small_disk_with_everything_on_it(self, tmp_path: Path, size: str) -> None:
        """Prefect's and MLflow's databases fill it up too, and are the first to complain."""
        project = new_project(tmp_path / "project", tracked=True)
        where, script = tmp_path / "disk", tmp_path / "script"
        script.write_text(
            f"mkdir {where} && mount -t tmpfs -o size={size} tmpfs {where} && cp -r {project}/. {where} || exit 77\n"
            f"cd {where}; {fedpipe_path()} run > {tmp_path}/out 2> {tmp_path}/err; echo $? > {tmp_path}/code\n"
            f"mount -o remount,size=100m {where} && {fedpipe_path()} run\n"
        )
        again = isolated(script)
        code = int((tmp_path / "code").read_text())
        done = Done(code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text())
        if code != 0:  # the last sizes may suffice, as databases differ
            rest = "\n".join(line for line in done.err.splitlines() if not line.startswith("WARNING: MLflow"))
            mistakes(Done(code, done.out, rest), r"disk is full|are free, and the run needs about", code=4)
        assert again.returncode == 0, again.stderr

    @pytest.mark.slow
    def test_a_read_only_disk(self, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project")
        script = tmp_path / "script"
        script.write_text(
            f"mount --bind {project} {project} && mount -o remount,bind,ro {project} || exit 77\n"
            f"cd {project}; exec {fedpipe_path()} run\n"
        )
        done = isolated(script)
        mistakes(Done(done.returncode, done.stdout, done.stderr), r"cannot write: the file system is read-only", code=4)


def fedpipe_path() -> Path:
    return Path(sys.executable).with_name("fedpipe")


def real(directory: Path, *arguments: str, **env: str) -> Done:
    """Run the installed command as a shell does, with a Prefect server of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        [fedpipe_path(), *arguments], cwd=directory, env=clean | env, capture_output=True, text=True, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr)


def isolated(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script whose mounts nobody else sees."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare here: a disk of its own cannot be made")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        [unshare, "--mount", "--map-root-user", "sh", script], env=clean, capture_output=True, text=True, timeout=300
    )
    if done.returncode in (1, 77) and "error: " not in done.stderr:
        pytest.skip(f"mounts are not permitted here: {done.stderr.strip().splitlines()[-1:]}")
    return done


def test_a_second_process_waits_outside(project: Path) -> None:
    long = overridden("federation.rounds=200", "evaluation.every=100")
    first = start(project, "run", *long)
    deadline = time.monotonic() + 60
    while not list(project.glob("runs/*/rounds/0001/round.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    # Stopped, it cannot end before the second one has looked, however slow the machine is.
    os.kill(first.process.pid, signal.SIGSTOP)
    second = fedpipe(project, "run", *long)
    assert first.process.is_alive()
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    holder = rf"process {first.process.pid} on \S+ since [-\d]+ [:\d]+ UTC"
    mistakes(second, f"in use by {holder}; wait for it, or stop it and run again", code=3)


def test_a_run_is_quiet_and_says_where_things_are(tmp_path: Path) -> None:
    """The installed command with its own Prefect server: nothing but the run's own words."""
    project = new_project(tmp_path / "project", tracked=True)
    done = real(project, "run")
    assert done.code == 0
    lines = done.err.splitlines()
    assert re.fullmatch(r"run la-lora-\w{10}: la-lora, 3 clients, 3 rounds, epsilon at most 8 \(.*\), on cpu", lines[0])
    assert lines[1].startswith("NOT PRIVATE: the noise is fixed by privacy.test_key")
    rounds = [f"{when}round {number}/3" for number in (1, 2, 3) for when in ("before ", "")]
    assert [line.split("  ")[0] for line in lines[2:]] == rounds
    shown = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.out.splitlines())
    for name in ("adapter", "report", "ledger", "run directory"):
        assert (project / shown[name]).exists()
    assert not re.search(r"traceback|warning|info", done.out + done.err, re.I)
    assert set(json.loads((project / "reports" / "metrics.json").read_text())) >= {"accuracy", "epsilon_max"}


def test_help(tmp_path: Path) -> None:
    shown = fedpipe(tmp_path, "--help").out
    assert all(f"  {name} " in shown for name in ("run", "fetch", "partition", "train", "report", "methods", "doctor"))
    unknown = fedpipe(tmp_path, "rum")
    assert unknown.code == 2
    assert "Did you mean 'run'?" in unknown.err
