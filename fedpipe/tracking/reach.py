"""Is a store there, and what is to be said when it is not?

A store that is away may come back by itself: the network, a server that does not answer, a
database that others lock or that cannot be written. A run does not wait for it. What does not
pass by itself is the user's mistake: a file that is no database, a missing driver, a server
that is not MLflow's or refuses the password.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from fedpipe.errors import StorageError, hide_password

PROBE = 5.0  # seconds for a server to say anything at all
BUSY = 20.0  # seconds to wait for other writers of a SQLite file, as MLflow itself does

T = TypeVar("T")

_GATEWAY = (502, 503, 504)
_PASSING = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
_SCHEMA = "out-of-date database schema"
_NO_MLFLOW = "was successful but the response body was not"
# These are MLflow's INTERNAL_ERROR too, and no time mends them.
_NEVER_PASSING = (_SCHEMA, _NO_MLFLOW, "Can't locate revision")


class StoreAwayError(StorageError):
    """The store does not answer now; it may later."""


@contextlib.contextmanager
def reached(shown: str) -> Iterator[None]:
    """Turn what MLflow, a database driver or the network raise into one clear line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        kind = StoreAwayError if away(error) else StorageError
        raise kind(
            f"tracking.uri: the MLflow store {shown} cannot be used: {reason(error)}. "
            "Mend or start it, name another one, or train without it: --set tracking.uri=null"
        ) from error


def away(error: BaseException) -> bool:
    """Say whether an error of a store may pass by itself."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return False
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING and not any(words in str(error) for words in _NEVER_PASSING)
    return isinstance(error, (OSError, OperationalError, PoolTimeout, StoreAwayError))


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords and the final stop."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if _SCHEMA in text:
        text = "another version of MLflow made it; save a copy, then run 'mlflow db upgrade' with this URI"
    if "ConnectionPool(" in text:
        detail = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out)", text)
        text = f"the server does not answer ({detail[1] or detail[2]})" if detail else "the server does not answer"
    return hide_password(text).rstrip(".")[:300]


def ask_server(uri: str) -> None:
    """Wait a moment for a server's first word, which may be a refusal.

    Raises
    ------
    OSError
        There is no answer, or only a gateway's that nobody is behind it.
    """
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # a password is not needed for any answer
    try:
        urllib.request.urlopen(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health", timeout=PROBE).close()
    except urllib.error.HTTPError as answer:
        answer.close()
        if answer.code in _GATEWAY:
            raise OSError(f"the server does not answer (status {answer.code})") from None
    except OSError as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):  # MLflow may know the certificate
            return
        detail = getattr(cause, "strerror", None) or str(cause)
        raise OSError(f"the server does not answer ({detail})") from error


def ask_database(uri: str, seconds: float) -> None:
    """Connect once; for SQLite, also check that the file is a database that can be written."""
    import sqlalchemy

    url = sqlalchemy.engine.make_url(uri)
    backend, driver = url.get_backend_name(), url.get_driver_name()
    options: dict[str, float] = {}
    if backend == "sqlite":
        options = {"timeout": seconds}
    elif driver in ("psycopg2", "psycopg", "pymysql", "mysqldb"):
        options = {"connect_timeout": max(1, round(seconds))}
    engine = sqlalchemy.create_engine(uri, connect_args=options)
    try:
        with engine.connect() as connection:
            if backend == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        engine.dispose()


def answers(uri: str) -> bool:
    """Say, within seconds, whether a store is there."""
    try:
        if uri.startswith(("http://", "https://")):
            ask_server(uri)
        elif not uri.startswith("databricks"):
            ask_database(uri, PROBE)
    except Exception:  # whatever is wrong with it, it is of no use now
        return False
    return True


def unless_busy(call: Callable[[], T]) -> T:
    """Call, and call again while SQLite refuses because of another writer.

    SQLite waits for one, but refuses at once where waiting could be for ever. What was refused
    has changed nothing.
    """
    deadline, wait = time.monotonic() + BUSY, 0.05
    while True:
        try:
            return call()
        except Exception as error:
            if "database is locked" not in str(error) or time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
        wait = min(2 * wait, 1.0)
