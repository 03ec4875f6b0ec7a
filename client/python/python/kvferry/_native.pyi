from collections.abc import Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypedDict

# Lists, tuples and one-dimensional numpy arrays of integers.
Column = Sequence[int] | Any
Transport = Literal["local", "tcp", "rdma"]
Outcome = Literal["DONE", "FAILED", "CANCELLED", "UNSETTLED"]

def tag(name: str | bytes) -> bytes: ...

class Failure:
    reason: str
    code: int
    message: str
    index: int | None
    retryable: bool

class Report:
    id: bytes
    outcome: Outcome
    done: bool
    settled: bool
    peer_confirmed: bool
    failure: Failure | None
    slices: int
    slices_done: int
    bytes: int
    bytes_done: int
    bytes_resent: int
    attempts: int
    path: str | None
    queued: float
    moving: float
    settling: float
    total: float

class Region:
    id: int
    generation: int
    base: int
    length: int
    kind: str

class Probe:
    alive: bool
    failure: Failure | None
    path: str | None
    round_trip: float
    def __bool__(self) -> bool: ...

class SharedBuffer:
    address: int
    __array_interface__: dict[str, Any]
    def __init__(self, length: int) -> None: ...
    def __len__(self) -> int: ...
    def view(self) -> memoryview: ...

class Event(TypedDict, total=False):
    event: Literal[
        "session_changed", "transfer_settled", "region_invalidated", "draining", "reattached", "detached"
    ]
    session: str
    state: str
    cause: Failure | str | None
    report: Report
    region: int
    grace: float
    session_id: str
    moved_from: str | None
    boot_id: bytes

class Events(Iterator[Event]):
    def get(self, timeout: float | None = None) -> Event | None: ...
    def __next__(self) -> Event: ...

class Pending:
    id: bytes
    def wait(self) -> Report: ...

class Engine:
    session_id: str
    engine_id: int
    daemon_version: str
    daemon_pid: int
    boot_id: bytes
    events_lost: int
    @staticmethod
    def attach(
        socket: str | PathLike[str] | None = None,
        *,
        name: str | None = None,
        attempts: int | None = None,
        backoff: float | None = None,
        failure_threshold: int | None = None,
        deadline: float | None = None,
        transports: Sequence[Transport] | None = None,
        advertise_host: str | None = None,
        gpu_id: int | None = None,
        rail_map: str | None = None,
        port: int | None = None,
        reattach: bool = True,
        timeout: float | None = None,
    ) -> Engine: ...
    def close(self) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def register(self, memory: Sequence[SharedBuffer | tuple[int, int]]) -> list[Region]: ...
    def unregister(self, regions: Sequence[int]) -> bool: ...
    def transfer(
        self,
        session: str,
        op: Literal["write", "read"],
        local: Column,
        remote: Column,
        lengths: int | Column,
        *,
        tag: str | bytes | None = None,
        deadline: float | None = None,
        attempts: int | None = None,
        backoff: float | None = None,
        id: bytes | None = None,
    ) -> Report: ...
    def transfer_async(
        self,
        session: str,
        op: Literal["write", "read"],
        local: Column,
        remote: Column,
        lengths: int | Column,
        *,
        tag: str | bytes | None = None,
        deadline: float | None = None,
        attempts: int | None = None,
        backoff: float | None = None,
        id: bytes | None = None,
    ) -> Pending: ...
    def wait(self, id: bytes, timeout: float | None = None) -> Report: ...
    def cancel(self, id: bytes) -> bool: ...
    def revoke(self, ranges: Sequence[tuple[int, int]]) -> bool: ...
    def revoke_tag(self, tag: str | bytes) -> bool: ...
    def probe(self, session: str, timeout: float | None = None) -> Probe: ...
    def reset_session(self, session: str) -> None: ...
    def events(self) -> Events: ...
