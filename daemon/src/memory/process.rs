//! The private memory of an engine process, through its `/proc/<pid>/mem`.
//!
//! The descriptor is opened once, at attach, and is bound to the address space of that moment: after the
//! engine execs or dies, reads and writes move nothing. `process_vm_writev` names a pid instead and would write
//! into whatever program runs under it by then. The kernel checks the right to read and to write when the
//! descriptor is opened, so that registration only has to *read* a byte; writing one to see whether it works
//! would race the engine.
//!
//! Bounds are the caller's matter. A failed call may have moved the bytes before the one that failed.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::process::Pid;

use crate::domain::{Failure, Reason};

/// A way into one address space, for as long as that exists.
#[derive(Debug)]
pub struct ProcessMemory {
    memory: File,
}

impl ProcessMemory {
    /// Opens the memory of the process that has this pid now. Whoever must be sure that it is the process they
    /// mean holds its pidfd and looks, after this call, that it is still alive.
    ///
    /// ENGINE_GONE where there is no such process, UNSUPPORTED_MEMORY where the kernel denies access.
    pub fn open(pid: Pid) -> Result<Self, Failure> {
        let path = format!("/proc/{}/mem", pid.as_raw_nonzero());
        match File::options().read(true).write(true).open(&path) {
            Ok(memory) => Ok(Self { memory }),
            Err(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::NotFound => Reason::EngineGone,
                    _ => Reason::UnsupportedMemory,
                };
                let doing = format!("opening {path} (same user, PR_SET_PTRACER or CAP_SYS_PTRACE needed)");
                Err(Failure::io(reason, doing, &error))
            }
        }
    }

    /// Fills `bytes` from the engine's memory. ENGINE_GONE, or DRIVER with the errno where a page is not there.
    pub fn read_at(&self, address: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        check_address(address, bytes.len())?;
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            done += moved(self.memory.read_at(&mut bytes[done..], at), "reading", at)?;
        }
        Ok(())
    }

    /// Puts `bytes` into the engine's memory. Errors as with [`ProcessMemory::read_at`].
    pub fn write_at(&self, address: u64, bytes: &[u8]) -> Result<(), Failure> {
        check_address(address, bytes.len())?;
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            done += moved(self.memory.write_at(&bytes[done..], at), "writing", at)?;
        }
        Ok(())
    }

    /// Whether the range can be a region: its first and last byte are read. A hole in the middle shows when
    /// bytes are moved. UNSUPPORTED_MEMORY where a byte is not there.
    pub fn probe(&self, base: u64, length: u64) -> Result<(), Failure> {
        let last = length.checked_sub(1).and_then(|length| base.checked_add(length));
        let last = last.ok_or_else(|| Failure::plain(Reason::BadArgument))?;
        for address in [base, last] {
            self.read_at(address, &mut [0]).map_err(|failure| match failure.reason {
                Reason::Driver => Failure { reason: Reason::UnsupportedMemory, ..failure },
                _ => failure,
            })?;
        }
        Ok(())
    }
}

/// File offsets are signed: an address in the upper half would be another one, or none.
fn check_address(address: u64, length: usize) -> Result<(), Failure> {
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
