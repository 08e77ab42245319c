"""Any bytes as `params.yaml`, and any words after --set: settings, or a line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuzzing import EXPLORED, TREES, changed_bytes, changed_tree, only_told, snapshot, tried
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_values

from fedpipe.cli import main
from fedpipe.config import load_settings, parse_override, parse_settings
from fedpipe.identity import identify
from fedpipe.methods import compose

SHIPPED = (Path(__file__).resolve().parents[1] / "params.yaml").read_bytes()
VALUES = tiny_values(Path(""), privacy={"test_key": None})
SMALL = json.dumps(VALUES).encode()
# Nine times nine times nine: a few hundred bytes that would be printed as a billion words.
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(12)
)


def read(path: Path, content: bytes) -> None:
    """Do all that is done with settings before any data are needed, and once more from what was understood."""
    path.write_bytes(content)
    before = snapshot(path.parent)
    with only_told():
        settings = load_settings(path)
        understood = settings.model_dump(mode="json")
        assert parse_settings(json.loads(json.dumps(understood))).model_dump(mode="json") == understood
        method = compose(settings)
        identity = identify(settings, method, "d", "b")
        assert "/" not in identity.run_id
    assert snapshot(path.parent) == before


CONTENTS = st.one_of(
    st.binary(max_size=60), changed_bytes(SHIPPED), changed_bytes(SMALL), st.text().map(lambda text: text.encode())
)
TREE = changed_tree(VALUES).map(lambda tree: json.dumps(tree).encode())
KEYS = st.sampled_from([*parse_settings(VALUES).flat(), "method", "data", "", ".", "a.b.c", "seed.x", "data.source.x"])
METHODS = st.fixed_dictionaries(
    {"name": st.sampled_from(["la-lora", "ffa-lora", "fedavg", "dp-lora", "x"])},
    optional={axis: TREES for axis in ("schedule", "filter", "clip", "aggregation", "server", "ranks", "rounds")},
)
EXAMPLES = [
    b"", b"\xff\xfe", b"[" * 5000, b"{" * 5000, b"a: &a [*a]", b"seed: " + b"9" * 5000, b"? [1]\n: 2", b"a: 1\na: 2",
    b"!!python/object/apply:os.system [id]", b"seed: !!timestamp x", b"%YAML 9.9\n---\na", b"<<: 3", b"- " * 3000, BOMB,
    b"data: &d {source: *d}", SMALL + BOMB, b"data: 2001-01-01\nmodel: 0x_", b"? {}\n: x", b"--- x\n--- y",
    SHIPPED + BOMB, SHIPPED.replace(b"name: la-lora", b"name: *a"), SHIPPED.replace(b"name: la-lora ", b"filter: *x "),
    b"seed: &x [x, x]\n".replace(b"[x, x]", b"".join([b"[" * 18, b"x", b"]" * 18])),
    SMALL.replace(b'"seed": 3', b'"seed": 1e400'),
    BOMB.replace(b"m: &m", b"seed:"), BOMB + b"data: {source: *k}", b'data: {"source": "\\ud800"}', b"seed: ._",
    b"seed: 1:_:_",
    SHIPPED.replace(b"seed: 17", b"seed: 0o777777777777777777777777777"), SHIPPED.replace(b"seed: 17", b"17: seed"),
]  # fmt: skip


@pytest.mark.parametrize("content", EXAMPLES, ids=range(len(EXAMPLES)))
def test_what_has_gone_wrong_elsewhere(content: bytes, tmp_path: Path) -> None:
    read(tmp_path / "params.yaml", content)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("params")


@tried(250)
@given(content=CONTENTS)
def test_bytes(content: bytes, directory: Path) -> None:
    read(directory / "params.yaml", content)


@tried(350)
@given(content=TREE)
def test_trees(content: bytes, directory: Path) -> None:
    read(directory / "params.yaml", content)


@tried(150)
@given(method=METHODS)
def test_methods(method: dict[str, object], directory: Path) -> None:
    read(directory / "params.yaml", json.dumps({**VALUES, "method": method}).encode())


@tried(200)
@given(key=KEYS, text=st.text(max_size=30) | TREES.map(str), value=TREES)
def test_overrides(key: str, text: str, value: object, directory: Path) -> None:
    path = directory / "params.yaml"
    path.write_bytes(SMALL)
    with only_told():
        compose(load_settings(path, dict([parse_override(f"{key}={text}")])))
    with only_told():
        compose(load_settings(path, {key: value}))


@tried(25)
@given(content=st.one_of(CONTENTS, TREE))
def test_the_command_prints_lines_and_no_traceback(content: bytes, directory: Path) -> None:
    path = directory / "params.yaml"
    path.write_bytes(content)
    done = CliRunner().invoke(main, ["fetch", "--params", str(path)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 2, 3, 4, 5)
    assert done.exit_code == 0 or done.stderr.startswith("error: ")


@pytest.mark.slow
@tried(EXPLORED)
@given(content=st.one_of(CONTENTS, TREE, METHODS.map(lambda m: json.dumps({**VALUES, "method": m}).encode())))
def test_many_more(content: bytes, directory: Path) -> None:
    read(directory / "params.yaml", content)
