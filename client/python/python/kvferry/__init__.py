"""Moves KV-cache slices between LLM engines, through the kvferry daemon of this node.

>>> import kvferry, numpy
>>> engine = kvferry.Engine.attach()
>>> pool = kvferry.SharedBuffer(1 << 30)
>>> engine.register([pool])
>>> numpy.asarray(pool)[:] = 7
>>> report = engine.transfer(peer_session, "write", [pool.address], [peer_address], 4096)
>>> assert report.done, report

When a report says "DONE", "FAILED" or "CANCELLED", nobody can touch this engine's memory for that transfer any more.
"UNSETTLED" says that this is not proven: leave the memory alone and `wait`.
"""

from kvferry._native import (
    Engine,
    Events,
    Failure,
    Pending,
    Probe,
    Region,
    Report,
    SharedBuffer,
    tag,
)
from kvferry.errors import (
    CallError,
    ClosedError,
    Error,
    ForkedError,
    NoAnswerError,
    NoDaemonError,
    RefusedError,
    SystemCallError,
)

__all__ = [
    "CallError",
    "ClosedError",
    "Engine",
    "Error",
    "Events",
    "Failure",
    "ForkedError",
    "NoAnswerError",
    "NoDaemonError",
    "Pending",
    "Probe",
    "RefusedError",
    "Region",
    "Report",
    "SharedBuffer",
    "SystemCallError",
    "tag",
]
