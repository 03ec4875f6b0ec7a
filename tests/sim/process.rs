//! An engine process: its memory, and who owns which of its bytes.
//!
//! Every word of it says whose it is: a payload word names its transfer and its place in the payload, a word of
//! free memory names the occasion on which it became free. Memory is given to the next owner at once, so a byte
//! that comes too late, or was read too late, lands among words of somebody else and names the culprit.

use std::{ops::Range, os::fd::OwnedFd, sync::Arc};

use kvferryd::domain::{Incarnation, RegionId};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{dice::Dice, revoked::Revoked};

/// Where every engine's memory begins, in its own address space: the same everywhere, so that nothing but an
/// identity check keeps one engine's parts out of another's memory.
pub(super) const BASE: u64 = 0x10_0000_0000;
/// Bytes of a region.
pub(super) const REGION_BYTES: u64 = 96 << 10;
/// Regions of a process, one behind the other.
pub(super) const REGIONS: usize = 2;
/// Words that are handed out together.
const GRAIN: usize = 128;
const REGION_WORDS: usize = REGION_BYTES as usize / 8;
const WORDS: usize = REGION_WORDS * REGIONS;

const FREE: u64 = 2 << 30;
const BLANK: u64 = 1 << 30;

/// Where a region of the process stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Registration {
    /// Nobody but the process may touch it.
    None,
    /// Asked for.
    Coming,
    /// There.
    Live(RegionId),
    /// Unregistered, not answered yet.
    Going,
}

/// Who owns a grain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    /// Nobody, since this occasion.
    Nobody(u32),
    /// This transfer.
    Transfer(u32),
}

/// What a range is to its transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Read: nothing ever changes it.
    Source,
    /// Written: each word is blank or the payload's.
    Destination,
}

/// Words of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Holding {
    /// Which.
    pub(super) words: Range<usize>,
    /// What for.
    pub(super) role: Role,
    /// The transfer's number.
    pub(super) owner: u32,
    /// The payload's word at each place, where places do not follow the payload.
    pub(super) order: Order,
}

/// Which payload word lies where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// In order.
    Forward,
    /// Blocks of so many words, the last block first.
    Reversed(usize),
}

impl Order {
    /// The payload word at a place.
    pub(super) fn payload(self, at: usize, words: usize) -> usize {
        match self {
            Self::Forward => at,
            Self::Reversed(block) => (words / block - 1 - at / block) * block + at % block,
        }
    }
}

impl Holding {
    /// First address.
    pub(super) fn address(&self) -> u64 {
        BASE + self.words.start as u64 * 8
    }

    fn payload(&self, at: usize) -> u64 {
        u64::from(self.owner) << 32 | self.order.payload(at, self.words.len()) as u64
    }

    fn blank(&self, at: usize) -> u64 {
        u64::from(self.owner) << 32 | BLANK | at as u64
    }

    /// Whether every word is what its owner put there, or the payload did. `whole`: all of the payload.
    pub(super) fn check(&self, words: &[u64], whole: bool) -> Result<(), String> {
        for (at, &word) in words.iter().enumerate() {
            let fine = word == self.payload(at)
                || (self.role == Role::Destination && !whole && word == self.blank(at));
            if !fine {
                let place = self.words.start + at;
                return Err(format!(
                    "word {place} of transfer {} ({:?}): {}, expected {}{}",
                    self.owner,
                    self.role,
                    describe(word),
                    describe(self.payload(at)),
                    if whole { "" } else { " or blank" },
                ));
            }
        }
        Ok(())
    }
}

fn describe(word: u64) -> String {
    let (owner, index) = (word >> 32, word & (BLANK - 1));
    match word & (FREE | BLANK) {
        FREE => format!("[free since occasion {owner}, word {index}]"),
        BLANK => format!("[blank of transfer {owner}, word {index}]"),
        0 => format!("[payload of transfer {owner}, word {index}]"),
        _ => format!("[{word:#x}]"),
    }
}

/// One life of an engine process.
#[derive(Debug)]
pub(super) struct Process {
    /// Who it is.
    pub(super) incarnation: Incarnation,
    /// Its memory.
    pub(super) fd: Arc<OwnedFd>,
    /// What of it is registered.
    pub(super) regions: [Registration; REGIONS],
    /// What it has revoked.
    pub(super) revoked: Revoked,
    grains: Vec<Owner>,
    occasions: u32,
}

impl Process {
    /// Starts, with all of its memory free.
    pub(super) fn start(incarnation: Incarnation) -> Self {
        let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("kvferry-sim", flags).expect("a memfd");
        rustix::fs::ftruncate(&fd, REGION_BYTES * REGIONS as u64).expect("a size");
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).expect("seals");
        let grains = vec![Owner::Nobody(0); WORDS / GRAIN];
        let mut process = Self {
            incarnation,
            fd: Arc::new(fd),
            regions: [Registration::None; REGIONS],
            revoked: Revoked::default(),
            grains,
            occasions: 0,
        };
        process.make_free(0..WORDS);
        process
    }

    /// Which region a word lies in.
    pub(super) fn region_of(word: usize) -> usize {
        word / REGION_WORDS
    }

    /// All words of a region.
    pub(super) fn region_words(region: usize) -> Range<usize> {
        region * REGION_WORDS..(region + 1) * REGION_WORDS
    }

    /// Gives free words of a live region to a transfer and fills them. Nothing where there is no room.
    pub(super) fn give(
        &mut self,
        dice: &mut Dice,
        (owner, words): (u32, usize),
        role: Role,
        order: Order,
    ) -> Result<Option<Holding>, String> {
        let live: Vec<usize> =
            (0..REGIONS).filter(|at| matches!(self.regions[*at], Registration::Live(_))).collect();
        let Some(region) = dice.pick(&live) else { return Ok(None) };
        let grains = words.div_ceil(GRAIN);
        let per_region = REGION_WORDS / GRAIN;
        let first = region * per_region;
        let starts = per_region - grains + 1;
        let turn = dice.below(starts);
        let free =
            |at: &usize| self.grains[*at..at + grains].iter().all(|owner| matches!(owner, Owner::Nobody(_)));
        let Some(at) = (0..starts).map(|at| first + (at + turn) % starts).find(free) else { return Ok(None) };
        self.check_free(at * GRAIN..(at + grains) * GRAIN)?;
        self.grains[at..at + grains].fill(Owner::Transfer(owner));
        let holding = Holding { words: at * GRAIN..at * GRAIN + words, role, owner, order };
        self.fill(&holding);
        Ok(Some(holding))
    }

    /// Takes words back from their owner after a last look; they are somebody else's from now on.
    pub(super) fn take_back(&mut self, holding: &Holding) -> Result<(), String> {
        self.check(holding, false)?;
        let end = holding.words.end.next_multiple_of(GRAIN);
        self.make_free(holding.words.start..end);
        Ok(())
    }

    /// Looks at a transfer's words.
    pub(super) fn check(&self, holding: &Holding, whole: bool) -> Result<(), String> {
        holding.check(&self.read(holding.words.clone()), whole)
    }

    /// The process uses a region for something else: whatever was there is gone, but for what is still wanted.
    pub(super) fn reuse_region(&mut self, region: usize, wanted: &[Holding]) {
        self.make_free(Self::region_words(region));
        for holding in wanted {
            let end = holding.words.end.div_ceil(GRAIN);
            self.grains[holding.words.start / GRAIN..end].fill(Owner::Transfer(holding.owner));
            self.fill(holding);
        }
    }

    fn fill(&self, holding: &Holding) {
        let word = |at| match holding.role {
            Role::Source => holding.payload(at),
            Role::Destination => holding.blank(at),
        };
        self.write(holding.words.start, (0..holding.words.len()).map(word));
    }

    /// Whether a transfer still owns its words.
    pub(super) fn owns(&self, holding: &Holding) -> bool {
        self.grains[holding.words.start / GRAIN] == Owner::Transfer(holding.owner)
    }

    /// Puts payload words where they belong, as a lane that is inside a call does.
    pub(super) fn touch(&self, holding: &Holding, places: Range<usize>) {
        let words = places.clone().map(|at| holding.payload(at));
        self.write(holding.words.start + places.start, words);
    }

    /// Every word that nobody owns.
    pub(super) fn check_all_free(&self) -> Result<(), String> {
        let mut at = 0;
        while at < self.grains.len() {
            if matches!(self.grains[at], Owner::Nobody(_)) {
                self.check_free(at * GRAIN..(at + 1) * GRAIN)?;
            }
            at += 1;
        }
        Ok(())
    }

    fn check_free(&self, words: Range<usize>) -> Result<(), String> {
        for (at, word) in words.clone().zip(self.read(words)) {
            let Owner::Nobody(occasion) = self.grains[at / GRAIN] else { continue };
            let expected = u64::from(occasion) << 32 | FREE | at as u64;
            if word != expected {
                return Err(format!(
                    "word {at}, which nobody owns: {}, expected {}",
                    describe(word),
                    describe(expected)
                ));
            }
        }
        Ok(())
    }

    fn make_free(&mut self, words: Range<usize>) {
        self.occasions += 1;
        let occasion = self.occasions;
        self.grains[words.start / GRAIN..words.end / GRAIN].fill(Owner::Nobody(occasion));
        self.write(words.start, words.map(|at| u64::from(occasion) << 32 | FREE | at as u64));
    }

    fn read(&self, words: Range<usize>) -> Vec<u64> {
        let mut bytes = vec![0; words.len() * 8];
        let read = rustix::io::pread(&*self.fd, &mut bytes, words.start as u64 * 8);
        assert_eq!(read, Ok(bytes.len()));
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect()
    }

    fn write(&self, first: usize, words: impl Iterator<Item = u64>) {
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        assert_eq!(rustix::io::pwrite(&*self.fd, &bytes, first as u64 * 8), Ok(bytes.len()));
    }
}
