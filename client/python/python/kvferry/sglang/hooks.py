"""What the plugin takes over, what that relies on, and how it gets there."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from kvferry.sglang import decode, known, prefill
from kvferry.sglang.engine import TransferEngine
from kvferry.sglang.holds import Holds
from kvferry.sglang.revoker import GIVE_UP_SECONDS

__all__ = ["PARTS", "Part", "install"]

logger = logging.getLogger("kvferry.sglang")

ENGINE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
COMMON = "sglang.srt.disaggregation.common.conn"
DECODE = "sglang.srt.disaggregation.decode"

_MANAGER = f"{MOONCAKE}.MooncakeKVManager"
_COMMON_MANAGER = f"{COMMON}.CommonKVManager"
_RECEIVER = f"{COMMON}.CommonKVReceiver"
_QUEUE = f"{DECODE}.DecodeTransferQueue"


class Part(NamedTuple):
    """Taken over as a whole or not at all."""

    name: str
    # Parts without which this one would be worth nothing, or wrong.
    needs: tuple[str, ...]
    # What is hooked.
    hooked: tuple[str, ...]
    # Whose sources were read to know that the hooks are right, besides those that are hooked.
    relies: tuple[str, ...]


PARTS = (
    Part(
        "engine",
        (),
        (f"{ENGINE}.MooncakeTransferEngine",),
        (f"{ENGINE}.init_mooncake_transfer_engine", f"{ENGINE}.maybe_init_shared_mooncake_transfer_engine"),
    ),
    Part(
        "health",
        ("engine",),
        (f"{_MANAGER}.transfer_worker", f"{_MANAGER}._publish_peer_registration"),
        (f"{_MANAGER}.__init__", f"{_MANAGER}._unblacklist_session", f"{_MANAGER}._run_one_probe_pass"),
    ),
    Part(
        "tags",
        ("engine",),
        (f"{MOONCAKE}.TransferInfo.from_zmq", f"{_COMMON_MANAGER}._make_worker_recv"),
        (
            # Whoever writes for a room must hand the session id down as it is.
            f"{_MANAGER}.transfer_worker",
            f"{_MANAGER}._transfer_data",
            f"{_MANAGER}.send_kvcache",
            f"{_MANAGER}._send_kvcache_generic",
            f"{_MANAGER}.send_kvcache_slice",
            f"{_MANAGER}.send_kvcache_dcp",
            f"{_MANAGER}.send_kvcache_staged",
            f"{_MANAGER}._do_staging_transfer",
            f"{_MANAGER}.maybe_send_extra",
            f"{_MANAGER}._send_slot_state",
            f"{_MANAGER}._send_mamba_state",
            f"{_MANAGER}._send_mamba_state_slice",
            f"{_MANAGER}._send_swa_state_slice",
            f"{_MANAGER}.send_aux",
            "sglang.srt.disaggregation.common.staging_handler.PrefillStagingStrategy.transfer",
            # Both threads must take None for "nothing came".
            f"{_MANAGER}.start_prefill_thread",
            f"{_MANAGER}.start_decode_thread",
            f"{_COMMON_MANAGER}._send_multipart_locked",
        ),
    ),
    Part(
        "poison",
        ("engine", "tags"),
        (f"{_MANAGER}._poison_unsettled_send",),
        (
            f"{_MANAGER}.transfer_worker",
            f"{_MANAGER}._await_transfer_futures",
            f"{_COMMON_MANAGER}._maybe_ack_drained_abort",
            f"{_COMMON_MANAGER}.poison_deferred_ack_room",
        ),
    ),
    Part(
        "release",
        ("engine", "tags"),
        (
            f"{_RECEIVER}.send_metadata",
            f"{_MANAGER}.build_receiver_metadata_message",
            f"{_RECEIVER}._send_abort_notification",
            f"{_COMMON_MANAGER}.is_abort_release_safe",
            f"{_COMMON_MANAGER}.clear_deferred_abort_state",
        ),
        (
            f"{_RECEIVER}.ensure_abort_notified",
            f"{_QUEUE}.__init__",
            f"{_QUEUE}._defer_release",
            f"{_QUEUE}._do_release",
            f"{_QUEUE}.resolve_deferred_releases",
        ),
    ),
)


def install() -> None:
    """Registers the hooks of every part whose sources are known, and says which those are.

    Raises ImportError where sglang is not installed.
    """
    from sglang.srt.plugins import hook_registry
    from sglang.version import __version__

    hold_seconds = _hold_seconds()
    was_raised = hold_seconds.get() == GIVE_UP_SECONDS
    hooks = _hooks(Holds(hold_seconds.default if was_raised else hold_seconds.get()))
    taken: list[str] = []
    for part in PARTS:
        if _is_known(part, taken):
            for path in part.hooked:
                kind, hook = hooks[path]
                hook_registry.HookRegistry.register(path, hook, hook_registry.HookType(kind))
            taken.append(part.name)
    if "release" in taken and not hold_seconds.is_set():
        # From now on a last resort. Processes that this one starts inherit it.
        hold_seconds.set(GIVE_UP_SECONDS)
    if hook_registry._current_plugin_source.get() is None:
        # Not called by sglang's loader, which applies them when all plugins have registered theirs.
        hook_registry.HookRegistry.apply_hooks()
    known.forget()
    logger.info("kvferry: sglang %s with %s", __version__, ", ".join(taken) or "nothing of kvferry")


def _hold_seconds():
    from sglang.srt.environ import envs

    return envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT


def _hooks(holds: Holds) -> dict[str, tuple[str, Callable[..., Any]]]:
    """For each path that is hooked: how, and by what."""
    on_decode = decode.Decode(holds)
    receive = functools.partial(
        decode.around_make_worker_recv, holds=holds, sglang=prefill.Sglang(_to_tcp, _sends_aux_itself)
    )
    return {
        f"{ENGINE}.MooncakeTransferEngine": ("replace", TransferEngine),
        f"{_MANAGER}.transfer_worker": ("around", prefill.around_transfer_worker),
        f"{_MANAGER}._publish_peer_registration": ("after", prefill.after_registration),
        f"{_MANAGER}._poison_unsettled_send": ("around", prefill.around_poison),
        f"{MOONCAKE}.TransferInfo.from_zmq": ("around", prefill.around_from_zmq),
        f"{_COMMON_MANAGER}._make_worker_recv": ("around", receive),
        f"{_RECEIVER}.send_metadata": ("around", on_decode.around_send_metadata),
        f"{_MANAGER}.build_receiver_metadata_message": ("after", on_decode.after_metadata_message),
        f"{_RECEIVER}._send_abort_notification": ("after", on_decode.after_abort_notification),
        f"{_COMMON_MANAGER}.is_abort_release_safe": ("around", on_decode.around_release_safe),
        f"{_COMMON_MANAGER}.clear_deferred_abort_state": ("after", on_decode.after_release),
    }


def _is_known(part: Part, taken: list[str]) -> bool:
    """Whether it is as it was when this was written; an error says what is not."""
    strangers = known.strangers([*part.hooked, *part.relies])
    missing = [need for need in part.needs if need not in taken]
    if strangers:
        logger.error(
            "kvferry: %s stays sglang's own: this plugin was written for sglang %s, and these are others: %s",
            part.name,
            " and ".join(known.VERSIONS),
            ", ".join(strangers),
        )
    elif missing:
        logger.error("kvferry: %s stays sglang's own: it needs %s", part.name, ", ".join(missing))
    return not strangers and not missing


def _to_tcp(host: str, port: int) -> tuple[str, bool]:
    from sglang.srt.utils.network import NetworkAddress

    address = NetworkAddress(host, port)
    return address.to_tcp(), address.is_ipv6


def _sends_aux_itself(manager) -> bool:
    """As `MooncakeKVManager.send_aux` decides."""
    from sglang.srt.environ import envs

    over_nvlink = manager.enable_custom_mem_pool and manager.custom_mem_pool_type == "NVLINK"
    return over_nvlink or envs.SGLANG_MOONCAKE_SEND_AUX_TCP.get()
