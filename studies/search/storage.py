"""The storage that the workers of a study share: SQLite, PostgreSQL, Optuna's journal file, or its gRPC proxy."""

import json
import os
import re
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import DiskFullError, check_folder, missing_folders, remove_empty

PAUSES = (1, 2, 4, 8, 15)  # seconds between two attempts to reach a storage that is away; the last one is repeated
PATIENCE, WHILE_FULL = 1800, 180  # seconds after which a storage that is away, or has no room, is given up
JOURNAL, GRPC = "journal:///", "grpc://"
MADE_TWICE = "already exists|no such table|UNIQUE constraint failed|duplicate key"  # what SQLite and PostgreSQL say
FULL = "disk is full|disk I/O error|No space left on device"  # what they say of a disk
ATTEMPTS, PAUSE = 5, 0.5  # to open a storage that another worker is creating; seconds in between


@contextmanager
def open_storage(url: str) -> Iterator[BaseStorage]:
    """The storage behind a URL, created if it is a new file in an existing folder; closed at the end.

    ``sqlite:///FILE``, ``postgresql+psycopg://…``, ``journal:///FILE`` (one file that several machines append to), or
    ``grpc://HOST:PORT`` (`optuna.storages.run_grpc_proxy_server` in front of one of the others). `UsageError` if it
    cannot be opened, or fails while it is open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            storage = _open(url)
            try:
                yield storage
            finally:
                if isinstance(engine := getattr(getattr(storage, "_backend", None), "engine", None), Engine):
                    storage.remove_session()
                    engine.dispose()
                elif isinstance(storage, GrpcStorageProxy):
                    storage.close()
        except (NoSuchModuleError, ArgumentError, ImportError) as error:
            raise UsageError(
                f"The storage {without_password(url)} cannot be used ({_first_line(error)}): give sqlite:///FILE, "
                f"{JOURNAL}FILE, {GRPC}HOST:PORT, or postgresql+psycopg://USER@HOST/DATABASE with ltm-pyro[studies] "
                f"installed."
            ) from None
        except Exception as error:
            if not (cause := _failure(error)):
                raise
            if re.search(FULL, str(cause)):
                raise DiskFullError(
                    f"The disk of the storage {without_password(url)} is full ({_first_line(cause)}): make room, and "
                    f"give the same command again."
                ) from None
            raise UsageError(
                f"The storage {without_password(url)} does not answer ({_first_line(cause)}): check the address "
                f"and try again."
            ) from None


def _failure(error: BaseException) -> BaseException | None:
    """What a storage says that fails; None for any other error."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ or error
    if isinstance(error, SQLAlchemyError) or type(error).__module__.startswith("grpc"):
        return error
    traces = traceback.extract_tb(error.__traceback__) if isinstance(error, OSError | json.JSONDecodeError) else []
    return error if any("/optuna/storages/" in frame.filename for frame in traces) else None


def without_password(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _first_line(error: BaseException) -> str:
    told = getattr(error, "details", None)  # of gRPC, whose text is a page
    text = str(told() if callable(told) else error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _open(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        path = url.removeprefix(JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    if url.startswith(GRPC):
        host, _, port = url.removeprefix(GRPC).partition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port):
            raise ArgumentError(f"{url} has no host and port")
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=10)
        return proxy
    address = make_url(url)
    sqlite = address.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"pool_pre_ping": True}
    if sqlite:
        options = {"connect_args": {} if "timeout" in address.query else {"timeout": 60}}
    for attempt in range(ATTEMPTS):
        try:
            database = RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=options)  # a template
            break
        except (SQLAlchemyError, StorageInternalError) as error:  # another worker creates the tables at this moment
            if attempt == ATTEMPTS - 1 or not re.search(MADE_TWICE, f"{error} {error.__cause__}"):
                raise
            time.sleep(PAUSE)
    if sqlite:
        _lock_before_reading(database.engine)
    return get_storage(database)


class Patient:
    """Lets every call of a storage wait while the storage is away, instead of ending its worker.

    Args:
        storage: changed in place.
        url: for what is said.
        wait: waits some seconds; a worker listens to its trials meanwhile.
        back: called when the storage is back.
    """

    def __init__(
        self,
        storage: BaseStorage,
        url: str,
        wait: Callable[[float], None] = time.sleep,
        back: Callable[[], None] = lambda: None,
    ) -> None:
        self.url, self.wait, self.back = url, wait, back
        self.since: float | None = None  # when the storage was first seen away; None while it is there
        for name in BaseStorage.__abstractmethods__:
            setattr(storage, name, partial(self._call, getattr(storage, name)))

    @property
    def is_away(self) -> bool:
        """Whether the storage did not answer when it was last asked."""
        return self.since is not None

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The method's result, however long it takes until the storage answers (`PATIENCE`)."""
        attempt = 0
        while True:
            try:
                found = method(*args, **options)
            except Exception as error:
                cause, now = _failure(error), time.monotonic()
                patience = WHILE_FULL if re.search(FULL, str(cause)) else PATIENCE
                if not cause or not is_outage(cause) or now - (self.since or now) > patience:
                    raise
                if self.since is None:
                    self.since = now
                    reason = f"{without_password(self.url)} does not answer ({_first_line(cause)})"
                    print(f"{reason}: trainings go on, and their figures wait.", file=sys.stderr, flush=True)
            else:
                if self.since is not None:
                    away, self.since = time.monotonic() - self.since, None
                    self.back()
                    print(f"{without_password(self.url)} is back after {away:.0f} s.", file=sys.stderr, flush=True)
                return found
            self.wait(PAUSES[min(attempt, len(PAUSES) - 1)])
            attempt += 1


def is_outage(cause: BaseException) -> bool:
    """Whether a storage fails because it is away or its disk is full, and not because of what it was asked."""
    if isinstance(cause, SQLAlchemyError):
        is_connection = isinstance(cause, OperationalError | InterfaceError) or getattr(
            cause, "connection_invalidated", False
        )
        return bool(is_connection) and not re.search("no such table|no such column", str(cause))
    return not isinstance(cause, json.JSONDecodeError)


def _lock_before_reading(engine: Engine) -> None:
    """Every transaction holds SQLite's lock from its first read on, or two workers could claim one trial.

    A database server locks the row that `claim` reads; SQLite has no such lock, and Python begins its transactions at
    the first write only.
    """
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # the connections opened before


def open_existing(url: str) -> AbstractContextManager[BaseStorage]:
    """The same for a storage that exists: nothing is created."""
    file = file_of(url)
    if file and not file.is_file():
        raise UsageError(f"There is no storage at {file}: give the --storage that `ltm study run` had.")
    return open_storage(url)


def file_of(url: str) -> Path | None:
    """The file that a storage is in, on this machine: of SQLite or of a journal."""
    if url.startswith(JOURNAL):
        return Path(url.removeprefix(JOURNAL))
    if not url.startswith("sqlite:///"):
        return None
    return Path(url.removeprefix("sqlite:///").partition("?")[0].removeprefix("file:"))


def check_destination(url: str, out: Path) -> None:
    """Refuses a storage in memory, and folders that cannot be created; nothing is created yet."""
    file = file_of(url)
    if url.partition("?")[0] in ("sqlite://", "sqlite:///", "sqlite:///:memory:") or "mode=memory" in url:
        raise UsageError(f"The storage {url} is in memory, where no trial would be kept: give sqlite:///FILE.")
    check_folder(out, "--out")
    if file:
        check_folder(file.parent, "--storage")


def create_file(url: str) -> None:
    """Creates a SQLite file and its folder: whole, or not at all if the disk is full. A journal gets its folder."""
    file = file_of(url)
    if file is None:
        return
    if url.startswith(JOURNAL) or file.exists():
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
