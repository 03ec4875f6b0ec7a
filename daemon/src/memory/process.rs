//! The private memory of an engine process, through its `/proc/<pid>/mem` (*direct*) or by way of its own client
//! library (*assisted*, [`Assistant`]).
//!
//! The descriptor is opened once, at attach, and is bound to the address space of that moment: after the
//! engine execs or dies, reads and writes move nothing. `process_vm_writev` names a pid instead and would write
//! into whatever program runs under it by then. The kernel checks the right to read and to write when the
//! descriptor is opened, so that registration only has to *read* a byte; writing one to see whether it works
//! would race the engine.
//!
//! Bounds are the caller's matter. A failed call may have moved the bytes before the one that failed.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use rustix::process::Pid;

use super::Assistant;
use crate::domain::{Failure, Reason};

/// A way into one address space, for as long as that exists.
#[derive(Debug)]
pub struct ProcessMemory(Way);

#[derive(Debug)]
enum Way {
    Direct(File),
    Assisted(Assistant),
}

/// A piece of an engine's memory, and its place in bytes of this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First address, in the engine's address space.
    pub address: u64,
    /// First of the bytes here.
    pub at: usize,
    /// How many.
    pub length: usize,
}

impl Extent {
    fn range(&self) -> Range<usize> {
        self.at..self.at + self.length
    }
}

impl ProcessMemory {
    /// Opens the memory of the process that has this pid now, to be read and written. Whoever must be sure that it is
    /// the process they mean holds its pidfd and looks, after this call, that it is still alive.
    ///
    /// ENGINE_GONE where there is no such process, UNSUPPORTED_MEMORY where the kernel denies access.
    pub fn open(pid: Pid) -> Result<Self, Failure> {
        let path = format!("/proc/{}/mem", pid.as_raw_nonzero());
        let denied = |error: io::Error| {
            let reason = match error.kind() {
                io::ErrorKind::NotFound => Reason::EngineGone,
                _ => Reason::UnsupportedMemory,
            };
            let doing = format!("opening {path} (same user, PR_SET_PTRACER or CAP_SYS_PTRACE needed)");
            Failure::io(reason, doing, &error)
        };
        let memory = File::options().read(true).write(true).open(&path).map_err(denied)?;
        // Nothing is mapped at address zero, and the kernel says so to whoever may read: anything else said here holds
        // for every address, and is better known before the engine has registered anything.
        match memory.read_at(&mut [0], 0) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(denied(error)),
            _ => Ok(Self(Way::Direct(memory))),
        }
    }

    /// The memory of an engine that copies itself.
    pub(super) fn assisted(assistant: Assistant) -> Self {
        Self(Way::Assisted(assistant))
    }

    /// Whether the engine's own library copies: then a call may wait for it.
    pub fn is_assisted(&self) -> bool {
        matches!(self.0, Way::Assisted(_))
    }

    /// The engine is out of reach: whoever waits for it, and need not, waits no longer.
    pub(super) fn close(&self) {
        if let Way::Assisted(assistant) = &self.0 {
            assistant.close();
        }
    }

    /// Fills `bytes` from the engine's memory, as the extents say. ENGINE_GONE, DRIVER with the errno where a page is
    /// not there, or ENGINE_SILENT where the engine was to copy and does not.
    pub fn read(&self, extents: &[Extent], bytes: &mut [u8]) -> Result<(), Failure> {
        extents.iter().try_for_each(check_address)?;
        match &self.0 {
            Way::Assisted(assistant) => assistant.read(extents, bytes),
            Way::Direct(memory) => extents.iter().try_for_each(|extent| {
                let into = &mut bytes[extent.range()];
                let mut done = 0;
                while done < into.len() {
                    let at = extent.address + done as u64;
                    done += moved(memory.read_at(&mut into[done..], at), "reading", at)?;
                }
                Ok(())
            }),
        }
    }

    /// Puts `bytes` into the engine's memory, as the extents say. Errors as with [`ProcessMemory::read`].
    pub fn write(&self, extents: &[Extent], bytes: &[u8]) -> Result<(), Failure> {
        extents.iter().try_for_each(check_address)?;
        match &self.0 {
            Way::Assisted(assistant) => assistant.write(extents, bytes),
            Way::Direct(memory) => extents.iter().try_for_each(|extent| {
                let from = &bytes[extent.range()];
                let mut done = 0;
                while done < from.len() {
                    let at = extent.address + done as u64;
                    done += moved(memory.write_at(&from[done..], at), "writing", at)?;
                }
                Ok(())
            }),
        }
    }

    /// Whether the range can be a region: its first and last byte are read. A hole in the middle shows when
    /// bytes are moved. UNSUPPORTED_MEMORY where a byte is not there.
    pub fn probe(&self, base: u64, length: u64) -> Result<(), Failure> {
        self.probe_all(&[(base, length)]).map_err(|(_, failure)| failure)
    }

    /// The same for many ranges at once; the failure comes with the range it is of.
    pub(super) fn probe_all(&self, ranges: &[(u64, u64)]) -> Result<(), (usize, Failure)> {
        let mut extents = Vec::with_capacity(2 * ranges.len());
        for (which, &(base, length)) in ranges.iter().enumerate() {
            let last = length.checked_sub(1).and_then(|length| base.checked_add(length));
            let last = last.ok_or_else(|| (which, Failure::plain(Reason::BadArgument)))?;
            extents.extend([base, last].map(|address| Extent { address, at: 0, length: 1 }));
        }
        if self.read(&extents, &mut [0]).is_ok() {
            return Ok(());
        }
        let probe = |(which, ends): (usize, &[Extent])| match self.read(ends, &mut [0]) {
            Err(failure) if failure.reason == Reason::Driver => {
                Err((which, Failure { reason: Reason::UnsupportedMemory, ..failure }))
            }
            other => other.map_err(|failure| (which, failure)),
        };
        extents.chunks(2).enumerate().try_for_each(probe)
    }
}

/// File offsets are signed: an address in the upper half would be another one, or none.
fn check_address(extent: &Extent) -> Result<(), Failure> {
    let Extent { address, length, .. } = *extent;
    match address.checked_add(length as u64) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => {
            let message = format!("{length} bytes at {address:#x} lie in no process's memory");
            Err(Failure::new(Reason::UnsupportedMemory, message))
        }
    }
}

/// How far one call came; an interrupted one came nowhere.
fn moved(result: io::Result<usize>, doing: &str, address: u64) -> Result<usize, Failure> {
    match result {
        Ok(0) => Err(Failure::new(Reason::EngineGone, "the engine's address space is gone")),
        Ok(count) => Ok(count),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => {
            Err(Failure::io(Reason::Driver, format_args!("{doing} process memory at {address:#x}"), &error))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        process::{Child, ChildStdin, Command, Stdio},
    };

    use super::*;

    impl ProcessMemory {
        pub(crate) fn read_at(&self, address: u64, bytes: &mut [u8]) -> Result<(), Failure> {
            self.read(&[Extent { address, at: 0, length: bytes.len() }], bytes)
        }

        pub(crate) fn write_at(&self, address: u64, bytes: &[u8]) -> Result<(), Failure> {
            self.write(&[Extent { address, at: 0, length: bytes.len() }], bytes)
        }
    }

    fn own() -> ProcessMemory {
        ProcessMemory::open(rustix::process::getpid()).expect("our own memory")
    }

    #[test]
    fn bytes_are_read_and_written_where_they_lie() {
        let page = vec![3u8; 20_000];
        let address = page.as_ptr() as u64;
        own().write_at(address + 5000, &[9; 10_000]).expect("a write");
        let mut seen = vec![0; 20_000];
        own().read_at(address, &mut seen).expect("a read");
        let expected = [vec![3; 5000], vec![9; 10_000], vec![3; 5000]].concat();
        assert!(seen == expected && std::hint::black_box(&page) == &expected);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        assert_eq!(own().read_at(4096, &mut [0]).expect_err("no page").reason, Reason::Driver);
        assert_eq!(own().read_at(4096, &mut [0]).expect_err("no page").code, libc::EIO);
        assert_eq!(own().probe(4096, 4096).expect_err("no page").reason, Reason::UnsupportedMemory);
        let byte = 0u8;
        let address = &raw const byte as u64;
        assert!(own().probe(address, 1).is_ok());
        let far = own().probe(address, 1 << 46).expect_err("the last byte is not there");
        assert_eq!(far.reason, Reason::UnsupportedMemory);
        assert_eq!(own().probe(address, 0).expect_err("no byte").reason, Reason::BadArgument);
        assert_eq!(own().probe(u64::MAX, 2).expect_err("wraps").reason, Reason::BadArgument);
    }

    #[test]
    fn addresses_beyond_a_file_offset_are_refused() {
        for address in [1 << 63, u64::MAX, i64::MAX as u64] {
            let failure = own().read_at(address, &mut [0; 2]).expect_err("a refusal");
            assert_eq!(failure.reason, Reason::UnsupportedMemory, "{address:#x}");
            let failure = own().write_at(address, &[0; 2]).expect_err("a refusal");
            assert_eq!(failure.reason, Reason::UnsupportedMemory, "{address:#x}");
        }
    }

    /// A shell that prints a line, then waits for one before it goes on with `next`.
    fn child(next: &str) -> (Child, ChildStdin, impl BufRead) {
        let mut child = Command::new("sh")
            .args(["-c", &format!("echo ready; read _; {next}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let stdin = child.stdin.take().expect("its stdin");
        let mut stdout = BufReader::new(child.stdout.take().expect("its stdout"));
        stdout.read_line(&mut String::new()).expect("its first line");
        (child, stdin, stdout)
    }

    fn memory_of(child: &Child) -> (ProcessMemory, u64) {
        let pid = Pid::from_child(child);
        let memory = ProcessMemory::open(pid).expect("the child's memory");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).expect("its maps");
        let stack = maps.lines().find(|line| line.ends_with("[stack]")).expect("a stack");
        let end = stack.split(['-', ' ']).nth(1).expect("an end");
        (memory, u64::from_str_radix(end, 16).expect("an address") - 1)
    }

    #[test]
    fn after_death_nothing_is_touched() {
        let (mut child, _stdin, _stdout) = child("exit");
        let (memory, address) = memory_of(&child);
        assert!(memory.probe(address, 1).is_ok());
        child.kill().expect("a kill");
        child.wait().expect("an end");
        assert_eq!(memory.read_at(address, &mut [0]).expect_err("dead").reason, Reason::EngineGone);
        assert_eq!(memory.write_at(address, &[0]).expect_err("dead").reason, Reason::EngineGone);
        assert_eq!(memory.probe(address, 1).expect_err("dead").reason, Reason::EngineGone);
        let pid = Pid::from_child(&child);
        assert_eq!(ProcessMemory::open(pid).expect_err("dead").reason, Reason::EngineGone);
    }

    #[test]
    fn after_exec_the_new_program_is_not_touched() {
        let (mut child, mut stdin, mut stdout) = child("exec sh -c 'echo new; read _'");
        let (memory, _) = memory_of(&child);
        io::Write::write_all(&mut stdin, b"\n").expect("a line");
        let mut line = String::new();
        stdout.read_line(&mut line).expect("the new program's line");
        assert_eq!(line, "new\n");
        // An address that the new program really has.
        let (fresh, address) = memory_of(&child);
        assert!(fresh.probe(address, 1).is_ok());
        assert_eq!(memory.write_at(address, &[0]).expect_err("exec").reason, Reason::EngineGone);
        assert_eq!(memory.probe(address, 1).expect_err("exec").reason, Reason::EngineGone);
        drop(stdin);
        child.wait().expect("an end");
    }
}
