//! What the kernel says of itself and of this process: which boot it is and how old, and whether descriptors are scarce.
//!
//! The time since boot is the one clock that nobody can set.
//!
//! A time namespace shifts what a process sees of that clock, start times in `/proc` included, and a daemon may be
//! restarted in another one than its predecessor. What is compared between daemons is therefore told here without
//! the shift.

use std::{io, time::Duration};

use rustix::{
    process::{Resource, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};

use crate::domain::{Failure, Reason};

/// Of this boot of the kernel.
///
/// # Errors
/// `/proc` is not there.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// How long ago it booted, sleep included.
pub(crate) fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seen = i128::from(now.tv_sec) * NANOS + i128::from(now.tv_nsec);
    let nanos = u64::try_from(seen - shift()).unwrap_or(0);
    Duration::from_nanos(nanos)
}

/// When a process started, in clock ticks after the boot. Two looks at one process may be a tick apart, where
/// a shift is not a whole number of ticks. Nothing: there is no such process.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let seen = start_time_of(&String::from_utf8_lossy(&stat))?;
    let tick = NANOS / i128::from(rustix::param::clock_ticks_per_second()).max(1);
    u64::try_from(i128::from(seen) - shift().div_euclid(tick)).ok()
}

/// Lets this process have as many descriptors as it may: the default soft limit is for programs that use `select`.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%errno, soft = limit.current, "the limit of descriptors could not be raised");
    }
}

/// Whether more than so many descriptors are free. They are counted: the number that the next one would get says
/// nothing, as it may be a hole that somebody left below.
///
/// # Errors
/// LIMIT, with the errno of whoever finds none free.
pub(crate) fn spare_descriptors(wanted: u64) -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let scarce = |code: i32| Failure {
        code,
        ..Failure::new(
            Reason::Limit,
            format!(
                "{wanted} descriptors are kept for the engines that are there, and fewer are free of {limit} (RLIMIT_NOFILE)"
            ),
        )
    };
    // Counting takes one itself, and counts it.
    let open =
        std::fs::read_dir("/proc/self/fd").map_err(|error| scarce(error.raw_os_error().unwrap_or(0)))?;
    let used = u64::try_from(open.count()).unwrap_or(u64::MAX).saturating_sub(1);
    match used.saturating_add(wanted) < limit {
        true => Ok(()),
        false => Err(scarce(rustix::io::Errno::MFILE.raw_os_error())),
    }
}

const NANOS: i128 = 1_000_000_000;

/// What this time namespace adds to the time since boot, ns. A kernel without time namespaces adds nothing.
fn shift() -> i128 {
    std::fs::read_to_string("/proc/self/timens_offsets").ok().and_then(|text| shift_of(&text)).unwrap_or(0)
}

/// Of lines like `boottime 3600 0`: seconds, which may be negative, and nanoseconds, which may not.
fn shift_of(offsets: &str) -> Option<i128> {
    let line = offsets.lines().find_map(|line| line.strip_prefix("boottime"))?;
    let mut words = line.split_whitespace().map(|word| word.parse::<i64>().ok());
    Some(i128::from(words.next()??) * NANOS + i128::from(words.next()??))
}

/// Field 22 of `/proc/<pid>/stat`. The command before it may hold spaces and parentheses, so counting begins
/// after the last of the latter: with field 3.
fn start_time_of(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_command() {
        let fields: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        for command in ["kvferryd", "a b", ") R 1 (", ""] {
            let stat = format!("77 ({command}) S {}", fields.join(" "));
            assert_eq!(start_time_of(&stat), Some(22), "{stat}");
        }
        for spoilt in ["", "77 (x", "77 (x) S 1 2 3"] {
            assert_eq!(start_time_of(spoilt), None);
        }
    }

    #[test]
    fn a_shift_is_read_with_its_sign() {
        let offsets = "monotonic           7         0\nboottime        -3600 500000000\n";
        assert_eq!(shift_of(offsets), Some(-3600 * NANOS + 500_000_000));
        for spoilt in ["", "monotonic 7 0\n", "boottime 1\n", "boottime x 0\n"] {
            assert_eq!(shift_of(spoilt), None, "{spoilt:?}");
        }
    }

    #[test]
    fn this_process_is_younger_than_the_kernel() {
        let ticks = rustix::param::clock_ticks_per_second();
        let started = start_time(rustix::process::getpid().as_raw_nonzero().get()).expect("it runs");
        assert!(Duration::from_secs(started / ticks) <= since_boot());
        assert_eq!(start_time(i32::MAX), None);
    }
}
