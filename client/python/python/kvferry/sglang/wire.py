"""What the two plugins say to each other, within the messages that sglang exchanges anyway.

Decode publishes the pages of a room to each prefill rank in a message of ten frames. The tag travels as a frame behind
them, far enough that frames which later versions append have room; those between are empty, which sglang reads as
"not given". A prefill without the plugin reads ten frames and no more.

A prefill rank that has read the tag answers BOUND: from then on whatever it writes for this room carries the tag. Only
then is the tag's revocation a proof. Decode cannot know it otherwise: the peer may run without the plugin, and its
next chunk would reach pages that belong to somebody else by then.

Why not (decode session, room, count of sends): rooms are used twice, so the count is needed, and both sides can only
agree on one if it travels or if no message is ever lost and nobody restarts. What travels may as well be the tag
itself, and 128 random bits need no counter that outlives a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "BOUND",
    "TAG_BYTES",
    "Bound",
    "RoomSession",
    "Tagged",
    "bound",
    "is_dummy",
    "parse_bound",
    "tagged",
    "with_tag",
]

TAG_BYTES = 16

# Frames that `build_receiver_metadata_message` makes, and where ours stands.
METADATA_FRAMES = 10
_OURS = 32
_MAGIC = b"kvferry-tag-1:"

# First frame of the answer. No status message begins so: those begin with a room's number.
BOUND = b"KVFERRY_BOUND"


class RoomSession(str):
    """A decode's session id that knows for which room it is used, and by which tag.

    It is what `TransferInfo.mooncake_session_id` holds, and sglang hands that very object down to the engine's call,
    through closures and thread pools. So a write is tagged by the publication that it was planned from, even where
    another one for the same room has arrived since.
    """

    __slots__ = ("room", "tag")

    room: int
    tag: bytes | None

    def __new__(cls, session: str, room: int, tag: bytes | None) -> RoomSession:
        made = super().__new__(cls, session)
        made.room = room
        made.tag = tag
        return made


class Tagged(NamedTuple):
    """The tag of a publication, and the number of the prefill rank among those it went to."""

    tag: bytes
    index: int


class Bound(NamedTuple):
    """A rank's answer."""

    room: int
    tag: bytes
    index: int


def with_tag(message: Sequence[bytes], tag: bytes, index: int) -> list[bytes]:
    """The message with the tag behind it; as it was where it is longer than there is room for."""
    if len(message) > _OURS or len(tag) != TAG_BYTES:
        return list(message)
    padding = [b""] * (_OURS - len(message))
    return [*message, *padding, _MAGIC + tag + index.to_bytes(4, "big")]


def tagged(message: Sequence[bytes]) -> Tagged | None:
    """What `with_tag` put there; None where it did not."""
    if len(message) != _OURS + 1:
        return None
    frame = message[_OURS]
    if len(frame) != len(_MAGIC) + TAG_BYTES + 4 or not frame.startswith(_MAGIC):
        return None
    rest = frame[len(_MAGIC) :]
    return Tagged(bytes(rest[:TAG_BYTES]), int.from_bytes(rest[TAG_BYTES:], "big"))


def is_dummy(message: Sequence[bytes]) -> bool:
    """Whether sglang takes a publication for one to a rank that has nothing to write."""
    return message[4] == b"" and message[5] == b""


def bound(room: int, tagged: Tagged) -> list[bytes]:
    """The answer to a publication."""
    return [BOUND, str(room).encode("ascii"), tagged.tag, str(tagged.index).encode("ascii")]


def parse_bound(message: Sequence[bytes]) -> Bound | None:
    """What `bound` made; None for anything else that begins so."""
    try:
        _, room, tag, index = message
        return Bound(int(room), bytes(tag), int(index)) if len(tag) == TAG_BYTES else None
    except ValueError:
        return None
