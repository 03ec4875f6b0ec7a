"""The sources of sglang that this plugin was written against, by their hashes.

They are read from sglang's files, so that looking imports nothing. `python -m kvferry.sglang.known` prints the table
for the sglang that is installed. Before a version is added, read what changed: a hash says that a function is the
same, and nothing about those that are not listed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

__all__ = ["SOURCES", "VERSIONS", "digest", "forget", "strangers"]

# Version -> path -> first 16 hexadecimal digits of the SHA-256 of its source text.
SOURCES: dict[str, dict[str, str]] = {
    "0.5.23": {
        "sglang.srt.disaggregation.common.conn.CommonKVManager._make_worker_recv": "d402216ce886f7c2",
        "sglang.srt.disaggregation.common.conn.CommonKVManager._maybe_ack_drained_abort": "9c988084e8aa3c61",
        "sglang.srt.disaggregation.common.conn.CommonKVManager._send_multipart_locked": "a46c352306c43c09",
        "sglang.srt.disaggregation.common.conn.CommonKVManager.clear_deferred_abort_state": "c636309acf08e0e3",
        "sglang.srt.disaggregation.common.conn.CommonKVManager.is_abort_release_safe": "0e60f7f5a8c044fb",
        "sglang.srt.disaggregation.common.conn.CommonKVManager.poison_deferred_ack_room": "aca514df1aceadcc",
        "sglang.srt.disaggregation.common.conn.CommonKVReceiver._send_abort_notification": "bb605f3c20d21b2a",
        "sglang.srt.disaggregation.common.conn.CommonKVReceiver.ensure_abort_notified": "a4d6fa7b4ffb2280",
        "sglang.srt.disaggregation.common.conn.CommonKVReceiver.send_metadata": "6cc2a55a32dabda3",
        "sglang.srt.disaggregation.common.staging_handler.PrefillStagingStrategy.transfer": "34fe035b3ce4b049",
        "sglang.srt.disaggregation.decode.DecodeTransferQueue.__init__": "11807a634d9c5741",
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._defer_release": "79a8d6c2ae63a8be",
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._do_release": "9f26dbd909d8b32a",
        "sglang.srt.disaggregation.decode.DecodeTransferQueue.resolve_deferred_releases": "d64f5427aaffdecd",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.__init__": "4bfa08d0ab692bfe",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._await_transfer_futures": "fb992a0035d6bc7a",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._do_staging_transfer": "33066a3ed4850103",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._poison_unsettled_send": "bc365fcffb5ad6be",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._publish_peer_registration": "21683bbb3de0c917",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._run_one_probe_pass": "3f5eb029721219f0",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._send_kvcache_generic": "a65459cbac295e1e",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._send_mamba_state": "103996cc13052513",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._send_mamba_state_slice": "fc40f33c3cdad1df",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._send_slot_state": "df9b414548ac8ffa",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._send_swa_state_slice": "5bdacbaf93645964",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._transfer_data": "c5a3fab0b234eb1e",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._unblacklist_session": "27e774a208a37ab0",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.build_receiver_metadata_message": "249e58260c11b33f",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.maybe_send_extra": "60e0f59fef222c90",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.send_aux": "9c3b1acea2660ea5",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.send_kvcache": "04e2ab18d802d73f",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.send_kvcache_dcp": "7023087c93adae84",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.send_kvcache_slice": "5d489b2805e053ca",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.send_kvcache_staged": "bbd3765cca5b7d4b",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.start_decode_thread": "9deebb20f5a19047",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.start_prefill_thread": "3d1dd917b584bda4",
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.transfer_worker": "552491016341ed1f",
        "sglang.srt.disaggregation.mooncake.conn.TransferInfo.from_zmq": "d8ecbed57a524ee8",
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine": "93f86279fa7dadca",
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine.init_mooncake_transfer_engine": "e34a484aa5472533",
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine.maybe_init_shared_mooncake_transfer_engine": "5527c69bd8c56c2e",
    },
}

VERSIONS = tuple(SOURCES)


def digest(path: str) -> str | None:
    """Of the source of a function or class, decorators included, by its dotted path; None where there is none."""
    file, names = _file(path)
    if file is None:
        return None
    lines, tree = _parsed(file)
    node: ast.AST | None = tree
    for name in names:
        node = next((child for child in getattr(node, "body", []) if getattr(child, "name", None) == name), None)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = "\n".join(lines[first - 1 : node.end_lineno])
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def strangers(paths: Iterable[str]) -> list[str]:
    """Those whose source is none that is known."""
    return [path for path in paths if digest(path) not in {table.get(path, "") for table in SOURCES.values()}]


def forget() -> None:
    """Gives back what was read to answer: some 30 MB."""
    _parsed.cache_clear()


def _file(path: str) -> tuple[Path | None, list[str]]:
    """The file that a dotted path leads into, and the names within it."""
    top, *names = path.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None, names
    file = Path(spec.origin)
    while file.name == "__init__.py" and names:
        below = file.parent / names[0]
        module, package = below.with_suffix(".py"), below / "__init__.py"
        # A folder without __init__.py is a package as well.
        if not module.is_file() and not below.is_dir():
            break
        file = module if module.is_file() else package
        names = names[1:]
    return (file if file.is_file() else None), names


@functools.lru_cache(maxsize=8)
def _parsed(file: Path) -> tuple[list[str], ast.Module]:
    text = file.read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def _main() -> None:
    from importlib.metadata import version

    from kvferry.sglang.hooks import PARTS

    paths = sorted({path for part in PARTS for path in (*part.hooked, *part.relies)})
    print(f'    "{version("sglang")}": {{')
    for path in paths:
        print(f'        "{path}": "{digest(path)}",')
    print("    },")


if __name__ == "__main__":
    _main()
