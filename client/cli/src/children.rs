//! Every process and folder this command makes, and the promise that none is left behind.
//!
//! [`Children`] owns them all. They end when it is dropped (a normal end, an error, a panic), when a signal asks
//! this command to end, and, because the kernel is asked for it, even when this command is killed. Processes
//! are only ever ended by the id of a child not yet reaped, so never somebody else's.
#![allow(unsafe_code)]

use std::{
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};

/// How often a child that was asked to end is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Sockets live below the folder; their paths must fit `sun_path` (108 bytes).
const FOLDER_PATH_MAX: usize = 70;

#[derive(Debug, Default)]
struct Owned {
    children: Vec<Child>,
    folder: Option<tempfile::TempDir>,
}

impl Owned {
    /// Ends everything without asking, the stopped ones too.
    fn end_all(&mut self) {
        for child in &mut self.children {
            // Failure means that it has ended already.
            let _ = child.kill();
        }
        for mut child in self.children.drain(..) {
            let _ = child.wait();
        }
        if let Some(folder) = self.folder.take() {
            let path = folder.path().to_owned();
            if let Err(error) = folder.close() {
                eprintln!("kvferry: {} could not be removed: {error}", path.display());
            }
        }
    }
}

/// The owner. A lock, because the signal watcher ends everything from its own thread.
#[derive(Debug)]
pub(crate) struct Children {
    owned: Arc<Mutex<Owned>>,
    folder: PathBuf,
}

impl Children {
    /// Makes the temporary folder and starts watching for SIGINT, SIGTERM and SIGHUP.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let mut base = std::env::temp_dir();
        if base.as_os_str().len() > FOLDER_PATH_MAX - 20 {
            base = PathBuf::from("/tmp");
        }
        let folder =
            tempfile::Builder::new().prefix("kvferry-").tempdir_in(&base).context("no temporary folder")?;
        let path = folder.path().to_owned();
        let owned = Arc::new(Mutex::new(Owned { folder: Some(folder), ..Owned::default() }));
        watch_signals(owned.clone())?;
        Ok(Self { owned, folder: path })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Starts a child that the kernel ends together with the calling thread's process.
    ///
    /// The lock is held over the spawn: a signal between spawn and adoption would leave the child behind.
    /// `take` gets the child before it is owned here, to keep its pipes.
    pub(crate) fn spawn<T>(
        &self,
        command: &mut Command,
        take: impl FnOnce(&mut Child) -> T,
    ) -> io::Result<(Pid, T)> {
        let parent = rustix::process::getpid();
        let die_with_parent = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above took effect.
            match rustix::process::getppid() {
                Some(pid) if pid == parent => Ok(()),
                _ => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
            }
        };
        // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed. It makes
        // two plain system calls (prctl, getppid), allocates nothing and takes no lock; `parent` is a copied
        // integer.
        unsafe { command.pre_exec(die_with_parent) };
        // A group of its own: Ctrl-C reaches this command alone, which then ends them all in one way.
        command.process_group(0);
        let mut owned = lock(&self.owned);
        let mut child = command.spawn()?;
        let pid = pid_of(&child)?;
        let taken = take(&mut child);
        owned.children.push(child);
        Ok((pid, taken))
    }

    /// Sends a signal to a child that was not reaped yet; whether it was there to get it.
    pub(crate) fn signal(&self, pid: Pid, signal: Signal) -> bool {
        let mut owned = lock(&self.owned);
        let running = owned.children.iter_mut().find(|child| is(child, pid)).is_some_and(is_running);
        running && kill_process(pid, signal).is_ok()
    }

    /// Whether the child is still running.
    pub(crate) fn is_running(&self, pid: Pid) -> bool {
        let mut owned = lock(&self.owned);
        owned.children.iter_mut().find(|child| is(child, pid)).is_some_and(is_running)
    }

    /// Waits for a child that was asked to end, and ends it when the time is over. Whether it ended by itself.
    pub(crate) fn reap(&self, pid: Pid, within: Duration) -> bool {
        let end = Instant::now() + within;
        while self.is_running(pid) && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        let mut owned = lock(&self.owned);
        let Some(at) = owned.children.iter().position(|child| is(child, pid)) else { return true };
        let mut child = owned.children.swap_remove(at);
        let ended = matches!(child.try_wait(), Ok(Some(_)));
        if !ended {
            let _ = child.kill();
            let _ = child.wait();
        }
        ended
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        lock(&self.owned).end_all();
    }
}

/// A poisoned lock still owns children that must end.
fn lock(owned: &Mutex<Owned>) -> MutexGuard<'_, Owned> {
    owned.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn is(child: &Child, pid: Pid) -> bool {
    pid_of(child).is_ok_and(|own| own == pid)
}

/// Reaps a child that has ended; its id means nothing from then on.
fn is_running(child: &mut Child) -> bool {
    matches!(child.try_wait(), Ok(None))
}

/// The watcher registers before it answers, so a signal after `new` never finds the default action.
fn watch_signals(owned: Arc<Mutex<Owned>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(guard);
    let watch = move || {
        let number = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => libc::SIGINT,
                _ = terminate.recv() => libc::SIGTERM,
                _ = hangup.recv() => libc::SIGHUP,
            }
        });
        // Held until the process is gone: nothing can be spawned any more.
        let mut owned = lock(&owned);
        owned.end_all();
        eprintln!("\nkvferry: stopped by a signal; everything started here is ended and removed");
        // What a shell expects of a command that ended by a signal.
        std::process::exit(128 + number);
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(pid: Pid) -> bool {
        rustix::process::test_kill_process(pid).is_err()
    }

    #[test]
    fn dropping_the_owner_ends_even_a_stopped_child_and_removes_the_folder() {
        let children = Children::new().unwrap();
        let folder = children.folder().to_owned();
        let (pid, ()) = children.spawn(Command::new("sleep").arg("600"), |_| ()).unwrap();
        assert!(children.signal(pid, Signal::STOP));
        assert!(folder.is_dir() && !gone(pid));
        drop(children);
        assert!(gone(pid) && !folder.exists());
    }

    #[test]
    fn a_reaped_child_is_never_signalled_again() {
        let children = Children::new().unwrap();
        let (pid, ()) = children.spawn(&mut Command::new("true"), |_| ()).unwrap();
        assert!(children.reap(pid, Duration::from_secs(10)));
        assert!(!children.signal(pid, Signal::KILL) && !children.is_running(pid));
    }

    #[test]
    fn a_child_that_does_not_end_in_time_is_ended() {
        let children = Children::new().unwrap();
        let (pid, ()) = children.spawn(Command::new("sleep").arg("600"), |_| ()).unwrap();
        assert!(!children.reap(pid, Duration::ZERO));
        assert!(gone(pid));
    }
}
