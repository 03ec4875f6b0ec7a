"""sglang on kvferry, as a plugin of sglang's: nothing of `mooncake` needs to be installed.

The package registers the entry point `kvferry` of the group `sglang.srt.plugins`; sglang 0.5.23 looks there in every
process it starts. Without `KVFERRY_SGLANG=1` nothing happens. So, for prefill and decode alike::

    KVFERRY_SGLANG=1 MC_FORCE_TCP=1 python -m sglang.launch_server --model-path MODEL \\
        --disaggregation-mode prefill --disaggregation-transfer-backend mooncake

Variables, set where sglang runs:

==============================================  =====================================================================
KVFERRY_SGLANG=1                                use the plugin
KVFERRY_SOCKET                                  the daemon's socket, default /run/kvferry/engine.sock
MC_FORCE_TCP=1, or MOONCAKE_PROTOCOL=tcp        move over tcp; otherwise rdma, and never tcp silently
SGLANG_HOST_IP                                  an address of this node that the daemon listens on
SGLANG_DISAGG_TRANSFER_RETRIES                  tries of a transfer (3)
SGLANG_DISAGG_TRANSFER_RETRY_BACKOFF_MS         pause before each further try (50)
SGLANG_DISAGG_SESSION_FAILURE_THRESHOLD         outages in a row until a session has failed (10)
SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT
                                                seconds that decode holds the pages of an aborted request for want of
                                                proof; 600 unless set, because proof takes milliseconds
==============================================  =====================================================================

Each rank says at its start, at level INFO, logger `kvferry.sglang`::

    kvferry: sglang 0.5.23 with engine, health, tags, poison, release
    kvferry: attached as 10.0.0.1:20000 to kvferryd 0.1.0 (pid 4711), paths local tcp, GPU 0, rails None

The first line names what the plugin took over. What it takes over, and what sglang 0.5.23 does without it:

engine
    `MooncakeTransferEngine` is kvferry's. A registration that fails ends the process with the reason (sglang: a line
    at level DEBUG, and failing transfers later).
health
    A session is blacklisted when kvferry says that it has FAILED, or that its engine is gone or another one lives
    there, and comes back the moment it is healthy (sglang: blacklisted at the first failed transfer, looked at again
    after 30 s). Where nobody is there at all one room waits for a return, the next are tried once.
tags
    The writes of a request carry a tag of 128 random bits that its decode minted and sent along (sglang: nothing
    tells the writes of a request from those of another at the same addresses).
poison
    A failed transfer keeps prefill from acknowledging an abort only where the peer's half is not proven settled
    (sglang: always).
release
    Decode revokes the tag of an aborted request and frees its pages as soon as its daemon has proven that no write
    can reach them any more, heard of the abort or not (sglang: when prefill says so, or after 30 s without proof).

Each of them first compares the sources it relies on with those it was written against. Where they differ it logs an
error that names them, and leaves that part to sglang. tags and release need the plugin on both sides; against a peer
without it they do as sglang does.
"""

from __future__ import annotations

import os

__all__ = ["load"]

_loaded = False


def load() -> None:
    """The entry point. Does nothing unless KVFERRY_SGLANG=1, and nothing the second time.

    Called by sglang's plugin loader the hooks are registered, and the loader applies them together with those of
    other plugins; called by anybody else they are applied at once. Raises ImportError where sglang is not installed.
    """
    global _loaded
    if _loaded or os.environ.get("KVFERRY_SGLANG") != "1":
        return
    # Not before: it imports sglang, and that imports torch.
    from kvferry.sglang import hooks

    hooks.install()
    _loaded = True
