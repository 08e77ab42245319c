"""Files of a killed run that are cut, changed or lost, and disks that are full or read-only.

The run goes on to the same end; or it stops in one line that names the file and the cure, changes
nothing, and goes on to the same end once the file is back, or the disk can be written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Done, Fault, fedpipe, new_project, prefect_access, prefect_home
from test_cli import fedpipe_path, isolated
from test_kill_matrix import KILLED, KINDS
from undisturbed import differences, everything

SLOW = pytest.mark.slow
CURE = re.compile(r"restore|delete|remove|move it away|run (it |the same command )?again|start anew")
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "halved": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "deleted": lambda content: None,
}


class Scene:
    """A run that was killed when its second round was evaluated and not yet recorded; put back before each damage."""

    def __init__(self, root: Path, kind: str) -> None:
        usual = new_project(root / "usual", tracked=True, **KINDS[kind])
        assert fedpipe(usual, "run").code == 0
        self.expected = everything(usual)
        self.project, self._kept = new_project(root / "project", tracked=True, **KINDS[kind]), root / "kept"
        fault = Fault("fedpipe.steps.evaluating", "write_sealed", 3, after=True)
        assert fedpipe(self.project, "run", fault=fault).code == KILLED
        shutil.copytree(self.project, self._kept)

    def put_back(self) -> None:
        shutil.rmtree(self.project)
        shutil.copytree(self._kept, self.project)

    def files(self) -> list[str]:
        """Return one file of each kind, and of a complete round and one that was begun."""
        paths = [path for path in sorted(self._kept.glob("runs/**/*")) if path.is_file() and path.name != "lock"]
        names = [str(path.relative_to(self._kept)) for path in paths if not path.name.endswith(".tmp")]
        seen: dict[str, str] = {}
        for name in names:
            seen.setdefault(re.sub(r"c\d{3}|cohort-\d\d", "*", re.sub(r"-\w{10}/", "/", name)), name)
        return list(seen.values())

    def damaged(self, name: str, damage: str) -> tuple[Done, list[str]]:
        """Damage a file and go on; return how that ended, and what is wrong with it."""
        self.put_back()
        path = self.project / name
        content = path.read_bytes()
        changed = DAMAGE[damage](content)
        path.unlink() if changed is None else path.write_bytes(changed)
        before = self._state()
        done = fedpipe(self.project, "run")
        if done.code == 0:
            return done, self.wrong_at_the_end(done, name)
        wrong = _untold(done, path.name)
        wrong += [f"{other}: was changed" for other, old in before.items() if self._state().get(other) != old]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600 if "secrets" in path.parts else 0o644)
        return done, wrong + self.wrong_at_the_end(fedpipe(self.project, "run"))

    def wrong_at_the_end(self, done: Done, unused: str = "") -> list[str]:
        """Compare with the undisturbed run, without what stays of a damaged file that nobody needs any more."""
        if done.code != 0 or "Traceback" in done.err:
            return [f"exit code {done.code}: {done.err[-1000:]}"]
        found, expected = everything(self.project), dict(self.expected)
        for side in (found, expected):
            side.pop(unused, None)
            logged = dict(side["mlflow files"])
            logged.pop(unused.partition("/")[2].partition("/")[2], None)
            side["mlflow files"] = logged
            if unused.endswith("/round.json"):
                _without_spending(side)
        return differences(found, expected)

    def _state(self) -> dict[str, bytes]:
        """Return what privacy and the result rest on; files that are made anew at every start left out."""
        anew = ("lock", "runtime.json")
        paths = [path for path in self.project.glob("runs/*-*/**/*") if path.is_file() and path.name not in anew]
        return {str(path): path.read_bytes() for path in paths if not path.name.startswith("mlflow")}


def _without_spending(side: dict[str, Any]) -> None:
    """Leave out what rounds before the last one say of epsilon: in one that is recorded anew, later ones count too."""
    for name in ("rounds", "records"):
        *before, last = side[name]
        rows = [{key: value for key, value in row.items() if not re.match("epsilon|cost", key)} for row in before]
        side[name] = [*rows, last]
    points = side["mlflow points"].items()
    side["mlflow points"] = {at: value for at, value in points if not at[0].startswith("privacy/") or at[1] == 3}


def _untold(done: Done, name: str) -> list[str]:
    """Say what a refusal does not say."""
    wrong = [] if len(done.errors) == 1 and "Traceback" not in done.err else [f"not one line: {done.err[-1000:]}"]
    line = done.errors[-1] if done.errors else ""
    wrong += [] if name in line else [f"does not name {name}: {line}"]
    wrong += [] if CURE.search(line) else [f"says no cure: {line}"]
    return wrong + ([] if done.code in (2, 3, 4, 5) else [f"exit code {done.code}"])


@dataclass
class Scenes:
    root: Path
    made: dict[str, Scene]

    def of(self, kind: str) -> Scene:
        if kind not in self.made:
            self.made[kind] = Scene(self.root / kind.replace(" ", "-"), kind)
        return self.made[kind]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenes]:
    found = Scenes(tmp_path_factory.mktemp("damage"), {})
    yield found
    shutil.rmtree(found.root)


@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("runs/*/secrets/noise.key", "flipped", "is not the key that the run began with; restore it"),
        pytest.param("runs/*/ledger.jsonl", "halved", "restore the file from a newer copy", marks=SLOW),
        pytest.param("runs/*/rounds/0001/round.json", "deleted", None, marks=SLOW),
        pytest.param("runs/*/rounds/0002/updates/c001.safetensors", "flipped", None, marks=SLOW),
    ],
)
def test_a_damaged_file(scenes: Scenes, pattern: str, damage: str, said: str | None) -> None:
    scene = scenes.of("usual")
    (path,) = scene.project.glob(pattern)
    done, wrong = scene.damaged(str(path.relative_to(scene.project)), damage)
    assert not wrong
    assert (done.code == 0) == (said is None), done.err
    if said is not None:
        assert re.search(said, done.errors[0])


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(scenes: Scenes, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual kind of run shows most; of the others, what only they have."""
    scene, ends, wrong = scenes.of(kind), {"went on": 0, "refused": 0}, []
    usual = {re.sub(r"-\w{10}/", "/", name) for name in scenes.of("usual").files()}
    alike = [name for name in scene.files() if kind != "usual" and re.sub(r"[\w-]+-\w{10}/", "la-lora/", name) in usual]
    for name in [name for name in scene.files() if name not in alike]:
        for damage in DAMAGE:
            done, found = scene.damaged(name, damage)
            ends["refused" if done.code else "went on"] += 1
            wrong += [f"{name} {damage}: {line}" for line in found]
    with capsys.disabled():
        print(f"\n{kind}: {ends}", *wrong, sep="\n")
    assert not wrong


FULL = """
mkdir -p {where} && mount -t tmpfs -o size={size} tmpfs {where} && cp -a {kept}/. {where} || exit 77
cd {project}; {fedpipe} run > ../out 2> ../err; echo $? > ../code
mount -o remount,size=100m {where}; {fedpipe} run >> ../again 2>&1; echo $? >> ../code
rm -r {kept} && cp -a {where} {kept} && umount {where} && rm -r {where} && cp -a {kept} {where}
"""
READ_ONLY = """
mount --bind {where} {where} && mount -o remount,bind,ro {where} || exit 77
cd {project}; {fedpipe} run > ../out 2> ../err; echo $? > ../code
umount {where}; {fedpipe} run >> ../again 2>&1; echo $? >> ../code
"""


def disturbed(scene: Scene, script: str, where: str, **values: Any) -> tuple[Done, Done]:
    """Run where a place cannot be written, and again when it can; return how both ended."""
    scene.put_back()
    above, place = scene.project.parent, scene.project / where
    if not place.exists():
        place.mkdir(parents=True)
    kept = above / "aside"
    shutil.rmtree(kept, ignore_errors=True)
    if place.is_dir():
        shutil.copytree(place, kept)
    # With a Prefect server that is there: one of its own would take longer than the run.
    served = {**prefect_access(), "PREFECT_HOME": str(prefect_home())}
    exported = "".join(f"export {name}='{value}'\n" for name, value in served.items())
    values |= {"where": place, "kept": kept, "project": scene.project, "fedpipe": fedpipe_path()}
    (above / "script").write_text(exported + script.format(**values))
    (above / "again").unlink(missing_ok=True)
    isolated(above / "script")
    codes = [int(code) for code in (above / "code").read_text().split()]
    first = Done(codes[0], (above / "out").read_text(), (above / "err").read_text())
    return first, Done(codes[1], "", (above / "again").read_text())


@SLOW
@pytest.mark.parametrize(("where", "room"), [("runs", 16), ("models", 4), ("reports", 4), ("mlruns", 8)])
def test_a_full_disk(scenes: Scenes, where: str, room: int) -> None:
    """A disk of its own for one place, with so many KB of room."""
    scene = scenes.of("usual")
    scene.put_back()
    used = sum(4 * -(-path.stat().st_size // 4096) for path in (scene.project / where).rglob("*") if path.is_file())
    first, again = disturbed(scene, FULL, where, size=f"{used + room}k")
    if where == "mlruns":  # the record waits
        assert first.code == 0
        assert "WARNING: MLflow does not take what is recorded: [Errno 28] No space left on device" in first.err
    else:
        assert (first.code, len(first.errors), "Traceback" in first.err) == (4, 1, False), first.err
        full = r"cannot write: the disk is full; free some space\. Run the same command again"
        assert re.search(rf"{full}|are free, and the run needs about", first.err)
    assert not scene.wrong_at_the_end(again)


@SLOW
@pytest.mark.parametrize("where", ["runs", "models", "reports", "mlflow.db", "mlruns"])
def test_a_place_that_is_read_only(scenes: Scenes, where: str) -> None:
    scene = scenes.of("usual")
    first, again = disturbed(scene, READ_ONLY, where)
    if where.startswith("ml"):
        assert first.code == 0
        assert "WARNING: MLflow does not take what is recorded: " in first.err
    else:
        assert (first.code, len(first.errors), "Traceback" in first.err) == (4, 1, False), first.err
        assert re.search(r"cannot write: the file system is read-only; choose a place", first.err)
    assert not scene.wrong_at_the_end(again)
