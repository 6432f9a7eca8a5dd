"""The storage that the workers of a study share, SQLite or PostgreSQL, with heartbeats of the running trials."""

import os
import re
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import DiskFullError, check_folder, missing_folders, remove_empty

HEARTBEAT, GRACE = 10, 40  # seconds between two heartbeats, and without one until a worker counts as dead
RETRIES = 3
MADE_TWICE = "already exists|no such table|UNIQUE constraint failed|duplicate key"  # what SQLite and PostgreSQL say
FULL = "disk is full|disk I/O error|No space left on device"  # what they say of a disk
ATTEMPTS, PAUSE = 5, 0.5  # to open a storage that another worker is creating; seconds in between


@contextmanager
def open_storage(url: str) -> Iterator[RDBStorage]:
    """The storage behind a URL, created if it is a new SQLite file in an existing folder; closed at the end.

    `UsageError` if it cannot be opened, or fails while it is open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = _open(url)
            try:
                yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        except (NoSuchModuleError, ArgumentError, ImportError) as error:
            raise UsageError(
                f"The storage {without_password(url)} cannot be used ({_first_line(error)}): give sqlite:///FILE, or "
                f"postgresql+psycopg://USER@HOST/DATABASE with ltm-pyro[studies] installed."
            ) from None
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
            if re.search(FULL, str(cause)):
                raise DiskFullError(
                    f"The disk of the storage {without_password(url)} is full ({_first_line(cause)}): make room, and "
                    f"give the same command again."
                ) from None
            raise UsageError(
                f"The storage {without_password(url)} does not answer ({_first_line(cause)}): check the address "
                f"and try again."
            ) from None


def without_password(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _open(url: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sqlite = url.startswith("sqlite")
    options = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            storage = RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # Optuna fills its version into a template
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
            break
        except (SQLAlchemyError, StorageInternalError) as error:  # another worker creates the tables at this moment
            if attempt == ATTEMPTS - 1 or not re.search(MADE_TWICE, f"{error} {error.__cause__}"):
                raise
            time.sleep(PAUSE)
    if sqlite:
        _lock_before_reading(storage.engine)
    return storage


def _lock_before_reading(engine: Engine) -> None:
    """Every transaction holds SQLite's lock from its first read on, or two workers could claim one trial.

    A database server locks the row that `claim` reads; SQLite has no such lock, and Python begins its transactions at
    the first write only.
    """
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # the connections opened before


def open_existing(url: str) -> AbstractContextManager[RDBStorage]:
    """The same for a storage that exists: nothing is created."""
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.is_file():
        raise UsageError(f"There is no storage at {file}: give the --storage that `ltm study run` had.")
    return open_storage(url)


def check_destination(url: str, out: Path) -> None:
    """Refuses a storage in memory, and folders that cannot be created; nothing is created yet."""
    if url in ("sqlite://", "sqlite:///", "sqlite:///:memory:"):
        raise UsageError(f"The storage {url} is in memory, where no trial would be kept: give sqlite:///FILE.")
    check_folder(out, "--out")
    if url.startswith("sqlite:///"):
        check_folder(Path(url.removeprefix("sqlite:///")).parent, "--storage")


def create_file(url: str) -> None:
    """Creates a SQLite file and its folder: whole, or not at all if the disk is full."""
    file = Path(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///"):
        return
    if "?" in url or file.exists():  # SQLite's options, or a storage already
        file.parent.mkdir(parents=True, exist_ok=True)
        return
    missing, new = missing_folders(file.parent), file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_storage(f"sqlite:///{new}"):
            pass
        try:
            os.link(new, file)
        except OSError:  # another worker was faster, or a file system without hard links
            if not file.exists():
                os.replace(new, file)
    except UsageError as error:
        raise type(error)(str(error).replace(str(new), str(file))) from None
    finally:
        for left in (new, Path(f"{new}-journal")):
            left.unlink(missing_ok=True)
        remove_empty(missing)
