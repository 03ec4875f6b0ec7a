//! Serving a ring: claim, check, copy, tell.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering::SeqCst},
};

use kvferry_proto::ring::{DATA_BYTES, PIECES, SLOTS, Word, operation, status};
use rustix::io::Errno;

use super::{Duty, ring::Ring};
use crate::regions::Regions;

/// What the thread has.
#[derive(Debug)]
pub(super) struct Server {
    ring: Ring,
    /// This process's own.
    memory: File,
    regions: Arc<Regions>,
    duty: Arc<Duty>,
    /// The request under way: address and bytes of each piece.
    pieces: Vec<(u64, usize)>,
    /// Its slot.
    claimed: Option<usize>,
}

impl Drop for Server {
    /// Where the thread panics it copies nothing any more, and the daemon need not wait for it.
    fn drop(&mut self) {
        if let Some(slot) = self.claimed {
            self.ring.tell(slot, status::FAILED);
        }
    }
}

/// What a look at the ring came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Round {
    /// Nothing is posted.
    Idle,
    /// Something was.
    Served,
    /// Nothing is to be claimed any more.
    Retired,
}

/// Why a request failed, as the daemon is told: at which piece, and the errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Fault {
    piece: usize,
    errno: Errno,
}

impl Server {
    pub(super) fn new(ring: Ring, memory: File, regions: Arc<Regions>, duty: Arc<Duty>) -> Self {
        Self { ring, memory, regions, duty, pieces: Vec::with_capacity(PIECES), claimed: None }
    }

    /// The body of the thread.
    pub(super) fn run(&mut self) {
        loop {
            // Before the look: whoever posts after it has rung another bell.
            let heard = self.ring.beat();
            match self.round() {
                Round::Idle => self.ring.wait(heard),
                Round::Served => {}
                Round::Retired => return,
            }
        }
    }

    /// Serves what is posted.
    pub(super) fn round(&mut self) -> Round {
        let mut served = Round::Idle;
        for slot in 0..SLOTS {
            match self.serve(slot) {
                Round::Retired => return Round::Retired,
                Round::Served => served = Round::Served,
                Round::Idle => {}
            }
        }
        served
    }

    fn serve(&mut self, slot: usize) -> Round {
        let duty = self.duty.clone();
        let Some(on_duty) = duty.begin() else { return Round::Retired };
        let word = self.ring.word(slot, Word::Status);
        // Acquires what the daemon wrote before it posted. Where it has taken the slot back this fails.
        if word.compare_exchange(status::POSTED, status::CLAIMED, SeqCst, SeqCst).is_err() {
            return Round::Idle;
        }
        self.claimed = Some(slot);
        let result = self.carry_out(slot);
        self.claimed = None;
        // The last touch of memory comes before the word that there is none any more.
        drop(on_duty);
        match result {
            Ok(()) => self.ring.tell(slot, status::DONE),
            Err(Fault { piece, errno }) => {
                self.ring.word(slot, Word::Errno).store(errno.raw_os_error().cast_unsigned(), SeqCst);
                self.ring.word(slot, Word::Piece).store(piece as u32, SeqCst);
                self.ring.tell(slot, status::FAILED);
            }
        }
        Round::Served
    }

    fn carry_out(&mut self, slot: usize) -> Result<(), Fault> {
        let writes = match self.ring.word(slot, Word::Operation).load(SeqCst) {
            operation::READ => false,
            operation::WRITE => true,
            _ => return Err(Fault { piece: 0, errno: Errno::OPNOTSUPP }),
        };
        self.take_pieces(slot)?;
        let mut data = self.ring.data(slot);
        for (piece, &(address, length)) in self.pieces.iter().enumerate() {
            let (bytes, rest) = data.split_at_mut(length);
            data = rest;
            let copied = match writes {
                true => write_all(&self.memory, bytes, address),
                false => read_all(&self.memory, bytes, address),
            };
            copied.map_err(|errno| Fault { piece, errno })?;
        }
        Ok(())
    }

    /// Copies the table and checks all of it: inside registered private memory, and together no more than the data.
    fn take_pieces(&mut self, slot: usize) -> Result<(), Fault> {
        let count = self.ring.word(slot, Word::Count).load(SeqCst) as usize;
        if count > PIECES {
            return Err(Fault { piece: 0, errno: Errno::TOOBIG });
        }
        let private = self.regions.private();
        self.pieces.clear();
        let mut room = DATA_BYTES;
        for piece in 0..count {
            let (address, length) = self.ring.entry(slot, piece);
            let fits = usize::try_from(length).ok().filter(|length| *length <= room);
            let length = fits.ok_or(Fault { piece, errno: Errno::TOOBIG })?;
            if !private.contains(address, length as u64) {
                return Err(Fault { piece, errno: Errno::FAULT });
            }
            room -= length;
            self.pieces.push((address, length));
        }
        Ok(())
    }
}

fn read_all(memory: &File, bytes: &mut [u8], address: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        done += moved(memory.read_at(&mut bytes[done..], address + done as u64))?;
    }
    Ok(())
}

fn write_all(memory: &File, bytes: &[u8], address: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        done += moved(memory.write_at(&bytes[done..], address + done as u64))?;
    }
    Ok(())
}

/// How far a call came; an interrupted one came nowhere.
fn moved(result: io::Result<usize>) -> Result<usize, Errno> {
    match result {
        Ok(0) => Err(Errno::IO),
        Ok(count) => Ok(count),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}
