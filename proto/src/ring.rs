//! The ring through which a daemon asks an engine's client library to copy for it (assisted memory).
//!
//! One memfd per attachment, made by the engine, sealed against shrinking and mapped by both. All words are native:
//! both ends are on one machine. The daemon writes operation, table and, for a write, the data, then the status;
//! the engine's thread claims the slot, copies, and says how it went.
//!
//! ```text
//!             daemon                 engine                    engine
//!   IDLE -----------------> POSTED -----------> CLAIMED -----------------> DONE or FAILED
//!    ^                        |     (CAS)                                        |
//!    |  taken back (CAS)      |                                                  |
//!    +------------------------+--------------------------------------------------+  daemon
//! ```
//!
//! Who takes a POSTED slot back knows that the engine never touched memory for it. A CLAIMED one is the engine's until
//! it says otherwise, or its process has ended.
//!
//! Whoever posts raises the *bell* and wakes its futex; the engine raises the *beat* each time it wakes, and wakes the
//! futex of a slot's status when it has changed it. While the engine's process lives, it holds a POSIX record lock on the
//! memfd: where the daemon cannot see the process, the lock says whether there is one.

/// First word of the memfd.
pub const MAGIC: u32 = u32::from_ne_bytes(*b"KVAR");
/// Second word: the layout below.
pub const VERSION: u32 = 1;

/// Requests that can be under way at once.
pub const SLOTS: usize = 4;
/// Pieces of memory in one request.
pub const PIECES: usize = 1024;
/// Payload of one request.
pub const DATA_BYTES: usize = 1 << 20;

/// Where the magic is.
pub const MAGIC_AT: usize = 0;
/// Where the version is.
pub const VERSION_AT: usize = 4;
/// Word that the daemon raises.
pub const BELL_AT: usize = 64;
/// Word that the engine raises.
pub const BEAT_AT: usize = 128;

const WORDS_AT: usize = 256;
const WORDS_BYTES: usize = 64;
const TABLES_AT: usize = 4096;
const DATA_AT: usize = TABLES_AT + SLOTS * TABLE_BYTES;

/// Bytes of one entry of a table: address and length, 64 bits each.
pub const ENTRY_BYTES: usize = 16;
/// Bytes of a slot's table.
pub const TABLE_BYTES: usize = PIECES * ENTRY_BYTES;
/// Bytes of the whole memfd.
pub const BYTES: usize = DATA_AT + SLOTS * DATA_BYTES;

/// The words of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Word {
    /// See [`status`].
    Status = 0,
    /// See [`operation`].
    Operation = 4,
    /// Pieces of the request.
    Count = 8,
    /// Of a FAILED request: what the system said.
    Errno = 12,
    /// Of a FAILED request: the first piece that was not moved.
    Piece = 16,
}

/// Values of [`Word::Status`].
pub mod status {
    /// The daemon's, and free.
    pub const IDLE: u32 = 0;
    /// To be claimed.
    pub const POSTED: u32 = 1;
    /// The engine may be touching memory for it.
    pub const CLAIMED: u32 = 2;
    /// Every byte was moved.
    pub const DONE: u32 = 3;
    /// Not every byte was.
    pub const FAILED: u32 = 4;
}

/// Values of [`Word::Operation`].
pub mod operation {
    /// From the engine's memory into the slot's data.
    pub const READ: u32 = 1;
    /// From the slot's data into the engine's memory.
    pub const WRITE: u32 = 2;
}

/// Where a word of a slot is. The slot must exist.
pub const fn word_at(slot: usize, word: Word) -> usize {
    assert!(slot < SLOTS);
    WORDS_AT + slot * WORDS_BYTES + word as usize
}

/// Where the table of a slot begins. The slot must exist.
pub const fn table_at(slot: usize) -> usize {
    assert!(slot < SLOTS);
    TABLES_AT + slot * TABLE_BYTES
}

/// Where the data of a slot begins. The slot must exist.
pub const fn data_at(slot: usize) -> usize {
    assert!(slot < SLOTS);
    DATA_AT + slot * DATA_BYTES
}

const _: () = assert!(WORDS_AT + SLOTS * WORDS_BYTES <= TABLES_AT, "tables begin behind the words");
