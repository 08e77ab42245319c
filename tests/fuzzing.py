"""What the fuzz tests share: mutations of bytes and of trees, a cheap command line, a watched directory.

By default a test tries a fixed set of examples. `FEDPIPE_EXPLORE=1` draws ones that were never
tried, and `make test-slow` tries many more.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fedpipe.errors import FedpipeError

EXPLORED = int(os.environ.get("FEDPIPE_EXPLORE_EXAMPLES", "2000"))


def tried(examples: int) -> settings:
    """Return how a fuzz test runs: without deadlines, since machines differ."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


ODD_TEXTS = ("", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "\0", "\ud800", "é", "c000", "__proto__", "1e999", "~")
ODD_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.0, 1e308, 5e-324, 0.5)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(-5, 300),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, drop, repeat, insert or cut: one to three changes of a file's bytes."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(changed))), draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "drop", "repeat", "insert", "cut", "zero"]))
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "drop":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del changed[at:]
        elif kind == "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
    return bytes(changed)


@st.composite
def changed_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """Swap, drop, repeat or move whole lines."""
    lines = content.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        first, second = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["swap", "drop", "repeat", "end"]))
        if kind == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        elif kind == "drop" and len(lines) > 1:
            del lines[first]
        elif kind == "repeat":
            lines.insert(second, lines[first])
        elif kind == "end":
            lines = lines[: first + 1]
    return b"".join(lines)


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """Replace, remove, rename or add one to three nodes of a JSON tree."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths_of(changed))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        node = changed
        for part in above:
            node = node[part]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if kind == "replace":
            node[key] = draw(TREES)
        elif kind == "remove":
            del node[key]
        elif isinstance(node, dict):
            name = draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=5))
            node[name] = node.pop(key) if kind == "rename" else draw(TREES)
    return changed


@contextlib.contextmanager
def only_told() -> Iterator[None]:
    """Let a mistake pass that is told as one, in lines that a terminal can show; anything else is a defect."""
    try:
        yield
    except FedpipeError as error:
        text = str(error)
        assert text.strip(), "an error without a word"
        assert len(text) < 20_000, f"an error of {len(text)} characters: {text[:200]}"


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time and inode of everything below a directory: what a write would change."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if not path.is_dir():
            found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found
