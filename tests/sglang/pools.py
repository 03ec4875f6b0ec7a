"""The memory of one rank: sglang's own pools on the CPU, painted and looked over byte by byte.

What a room's KV is follows from its number alone, for the whole model: every rank paints, or expects, its share of it.
Whatever no room owns holds the background, so a byte that lands anywhere else is seen too. Prefill and decode have
different ones: a page that is read after it was given away is seen where it lands.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy
import torch
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.disaggregation.utils import (
    KVClassType,
    MetadataBuffers,
    TransferBackend,
    append_state_component,
    get_kv_class,
    get_pd_kv_layout,
    setup_state_kv_args,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

DTYPE = torch.bfloat16
# Which buffer of a room it is, in the seed of its content.
KV, AUX, STATE = range(3)


@dataclass(frozen=True)
class Shape:
    """What a model's pools look like. Items are pages; page 0 takes padding in sglang and stays unused."""

    kind: str = "mha"  # or "mla"
    layers: int = 4
    pages: int = 257
    page_size: int = 16
    heads: int = 4  # of the model; a rank has its share
    head_dim: int = 64
    slots: int = 64  # of the metadata buffers
    state: str = ""  # or "swa": pages, or "mamba": one item a request


class Canvas:
    """Buffers of items of one length each, by address."""

    def __init__(self, kind: int, background: int, addresses, lengths, item_lengths, cut=None) -> None:
        self.kind, self.background = kind, background
        self.buffers = [
            _bytes_at(address, length).reshape(-1, item)
            for address, length, item in zip(addresses, lengths, item_lengths, strict=True)
        ]
        self._cut = cut
        for buffer in self.buffers:
            buffer.fill(background)
        self._owned = [numpy.zeros(len(buffer), bool) for buffer in self.buffers]

    def content(self, room: int, entry: int, items: int) -> numpy.ndarray:
        """What a room has in these items of a buffer, in the order of its tokens."""
        draw = numpy.random.default_rng([room, self.kind, entry])
        if self._cut is not None:
            return self._cut(draw, items)
        length = self.buffers[entry].shape[1]
        return numpy.frombuffer(draw.bytes(items * length), numpy.uint8).reshape(items, length)

    def own(self, items) -> None:
        for owned in self._owned:
            owned[items] = True

    def paint(self, room: int, items) -> None:
        for entry, buffer in enumerate(self.buffers):
            buffer[items] = self.content(room, entry, len(items))

    def wrong(self, room: int, items) -> int:
        """Bytes that are not what the room has."""
        return sum(
            int(numpy.count_nonzero(buffer[items] != self.content(room, entry, len(items))))
            for entry, buffer in enumerate(self.buffers)
        )

    def release(self, items) -> None:
        """The items are nobody's, and painted over at once: what lands now is a stranger's."""
        for buffer, owned in zip(self.buffers, self._owned, strict=True):
            buffer[items] = self.background
            owned[items] = False

    def strangers(self) -> int:
        """Bytes that landed where no room is."""
        return sum(
            int(numpy.count_nonzero(buffer[~owned] != self.background))
            for buffer, owned in zip(self.buffers, self._owned, strict=True)
        )


class Pools:
    """KV, metadata and state of one rank."""

    def __init__(self, shape: Shape, tp_size: int, tp_rank: int, background: int) -> None:
        self.shape = shape
        self.tp_size, self.tp_rank = tp_size, tp_rank
        tokens = (shape.pages - 1) * shape.page_size
        common = {"size": tokens, "page_size": shape.page_size, "dtype": DTYPE, "layer_num": shape.layers}
        common |= {"device": "cpu", "enable_memory_saver": False}
        if shape.kind == "mla":
            self.kv = MLATokenToKVPool(kv_lora_rank=512, qk_rope_head_dim=64, **common)
        else:
            heads = shape.heads // tp_size
            self.kv = MHATokenToKVPool(head_num=heads, head_dim=shape.head_dim, **common)
        self.metadata = MetadataBuffers(shape.slots, 128, DTYPE, max_sampling_mask_tokens=1)
        self.state = self._state_buffers()
        self.args = self._args()
        args = self.args
        cut = None if shape.kind == "mla" else self._share
        kv = args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens
        aux = args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens
        self.canvases = {KV: Canvas(KV, background, *kv, cut=cut), AUX: Canvas(AUX, background, *aux)}
        if shape.state:
            state = args.state_data_ptrs[0], args.state_data_lens[0], args.state_item_lens[0]
            self.canvases[STATE] = Canvas(STATE, background, *state)

    def _share(self, draw: numpy.random.Generator, pages: int) -> numpy.ndarray:
        """This rank's heads of what the model has in so many pages."""
        shape = self.shape
        row = shape.head_dim * DTYPE.itemsize
        tokens = pages * shape.page_size
        whole = numpy.frombuffer(draw.bytes(tokens * shape.heads * row), numpy.uint8)
        whole = whole.reshape(tokens, shape.heads, row)
        mine = shape.heads // self.tp_size
        return whole[:, self.tp_rank * mine : (self.tp_rank + 1) * mine].reshape(pages, -1)

    def _state_buffers(self) -> list[torch.Tensor]:
        """Like a sliding window's K and V of every layer, or like the recurrent state of some."""
        items, length = {"": (0, 0), "swa": (self.shape.pages, 8192), "mamba": (self.shape.slots, 40_000)}[
            self.shape.state
        ]
        return [torch.zeros((items, length), dtype=torch.uint8) for _ in range(2 * self.shape.layers) if items]

    def _args(self):
        """As PrefillBootstrapQueue and DecodePreallocQueue of sglang fill them in."""
        args = get_kv_class(TransferBackend.MOONCAKE, KVClassType.KVARGS)()
        args.engine_rank = self.tp_rank
        args.pp_rank = 0
        args.system_dp_rank = 0
        args.rust_http_port = None
        args.kv_cache_dtype_str = str(DTYPE)
        args.kv_layout = get_pd_kv_layout(self.kv)
        args.prefill_start_layer = 0
        args.prefill_end_layer = None
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = self.kv.get_contiguous_buf_infos()
        args.kv_layer_ids = []
        args.num_draft_entries = 0
        if self.shape.kind == "mha":
            args.kv_head_num = self.kv.head_num
            args.total_kv_head_num = self.shape.heads
        args.page_size = self.shape.page_size
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = self.metadata.get_buf_infos()
        args.ib_device = None
        args.gpu_id = 0
        setup_state_kv_args(args, self.kv, None, self.shape.layers)
        if self.state:
            append_state_component(
                args,
                StateType.SWA if self.shape.state == "swa" else StateType.MAMBA,
                [buffer.data_ptr() for buffer in self.state],
                [buffer.nbytes for buffer in self.state],
                [buffer[0].nbytes for buffer in self.state],
            )
        return args

    @staticmethod
    def items(room: dict) -> dict[int, list[int]]:
        """Which items of which canvas a room has."""
        return {KV: room["pages"], AUX: [room["slot"]], STATE: room.get("state") or []}

    def bytes_of(self, room: dict) -> int:
        items = self.items(room)
        return sum(
            len(items[kind]) * buffer.shape[1] for kind, canvas in self.canvases.items() for buffer in canvas.buffers
        )

    def own(self, room: dict) -> None:
        for kind, canvas in self.canvases.items():
            canvas.own(self.items(room)[kind])

    def paint(self, room: dict) -> None:
        for kind, canvas in self.canvases.items():
            canvas.paint(room["room"], self.items(room)[kind])

    def wrong(self, room: dict) -> int:
        return sum(canvas.wrong(room["room"], self.items(room)[kind]) for kind, canvas in self.canvases.items())

    def release(self, room: dict) -> None:
        for kind, canvas in self.canvases.items():
            canvas.release(self.items(room)[kind])

    def strangers(self) -> int:
        return sum(canvas.strangers() for canvas in self.canvases.values())


def _bytes_at(address: int, length: int) -> numpy.ndarray:
    return numpy.frombuffer((ctypes.c_uint8 * length).from_address(address), numpy.uint8)
