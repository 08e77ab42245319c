"""The readers of files under a fuzzer that follows coverage: `python tests/atheris_files.py settings`.

Not a part of the test suite: it needs atheris (`pip install atheris`), which is no dependency of
fedpipe. What it finds becomes an example in `test_fuzz_*.py`. The first word is one of
`TARGETS`, the others are options of libFuzzer, such as -max_total_time=60.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed; `python -m pytest -m slow tests/test_fuzz_*.py` needs none")

import datasets  # noqa: F401 (before the hook: what is not followed need not be instrumented)
import torch  # noqa: F401

with atheris.instrument_imports(include=["fedpipe", "ruamel"]):
    from fedpipe.config import load_settings
    from fedpipe.data.federation import Federation
    from fedpipe.errors import FedpipeError
    from fedpipe.files import read_sealed, read_tensors
    from fedpipe.methods import compose
    from fedpipe.privacy.ledger import Ledger


def _settings(path: Path) -> None:
    compose(load_settings(path))


def _manifest(path: Path) -> None:
    path.rename(path.with_name("manifest.json"))
    Federation.open(path.parent)


TARGETS: dict[str, Callable[[Path], object]] = {
    "settings": _settings,
    "ledger": Ledger,
    "tensors": read_tensors,
    "state": read_sealed,
    "manifest": _manifest,
}


def main() -> None:
    """Fuzz one reader; its own errors are what it should answer with, any other ends the fuzzer."""
    target = TARGETS[sys.argv.pop(1)]
    directory = Path(tempfile.mkdtemp(prefix="fedpipe-fuzz-"))

    def one(content: bytes) -> None:
        path = directory / "file"
        path.write_bytes(content)
        try:
            target(path)
        except FedpipeError:
            return

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
