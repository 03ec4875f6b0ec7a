"""What the calls raise. From a transfer, an exception means that nothing was started."""

from __future__ import annotations

__all__ = [
    "CallError",
    "ClosedError",
    "Error",
    "ForkedError",
    "NoAnswerError",
    "NoDaemonError",
    "RefusedError",
    "SystemCallError",
]


class Error(Exception):
    """Everything that kvferry raises by itself."""


class NoDaemonError(Error, ConnectionError):
    """Nobody answers at the daemon's socket, or the attachment has ended. `path` is the socket tried."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class RefusedError(Error):
    """The daemon, or the library, says no; `failure` says why."""

    def __init__(self, message: str, failure=None) -> None:
        super().__init__(message)
        self.failure = failure

    @property
    def reason(self) -> str:
        """Name of the reason: what to decide by."""
        return self.failure.reason

    @property
    def index(self) -> int | None:
        """Index of the slice, region or range at fault, where there is one."""
        return self.failure.index


class CallError(Error):
    """The call failed without a reason that the protocol knows."""


class SystemCallError(Error, OSError):
    """A system call of this process failed; `errno` says how."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class ForkedError(Error):
    """The engine belongs to the process that attached it, `owner`; a forked child attaches for itself."""

    def __init__(self, message: str, owner: int = 0) -> None:
        super().__init__(message)
        self.owner = owner


class NoAnswerError(Error, TimeoutError):
    """The time given has passed."""


class ClosedError(Error):
    """The engine was closed."""
