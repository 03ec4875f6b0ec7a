//! The table as a file: one line per port, so that its rest outlives the daemon.
//!
//! The end of a rest is recorded by two clocks. Within one boot of the kernel its age decides, which nobody can set;
//! the wall clock may jump, and is asked only where nothing else outlived the reboot. What a line does not say
//! plainly is left out and counted: a spoilt record costs quarantines, never a start. Records of version 1 are read
//! too, which have the wall clock only.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::table::{Entry, Standing, Table};
use crate::{domain::Incarnation, kernel};

const HEADER: &str = "kvferry ports 2";
const WALL_CLOCK_ONLY: &str = "kvferry ports 1";

/// What a record says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Where the next turn begins.
    pub(super) next: Option<u16>,
    pub(super) entries: Vec<Entry>,
    /// Lines that make no sense.
    pub(super) spoilt: usize,
}

/// What time it is, by the clocks that outlive a daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Clocks {
    /// Which boot of the kernel. Empty where it does not say: then it is another one every time.
    pub(super) boot: String,
    pub(super) since_boot: Duration,
    /// Since 1970.
    pub(super) wall: Duration,
}

impl Clocks {
    pub(super) fn now() -> Self {
        Self {
            boot: kernel::boot_id().unwrap_or_default(),
            since_boot: kernel::since_boot(),
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }
}

/// `now` is the instant at which the clocks were read.
pub(super) fn write(table: &Table, now: Instant, clocks: &Clocks) -> String {
    let mut text = format!("{HEADER}\nboot {}\nnext {}\n", clocks.boot, table.next());
    for Entry { port, who, standing } in table.entries(now) {
        let who: String = who.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = match standing {
            Standing::InUse => format!("in-use {port} {who}\n"),
            Standing::Rests(rest) => {
                let until = [clocks.since_boot, clocks.wall].map(|clock| (clock + rest).as_millis());
                format!("rests {port} {who} {} {}\n", until[0], until[1])
            }
        };
        text.push_str(&line);
    }
    text
}

/// Rests that are over by now are left out.
pub(super) fn parse(text: &str, clocks: &Clocks) -> Record {
    let mut lines = text.lines();
    let parse_line = match lines.next() {
        Some(HEADER) => parse_line,
        Some(WALL_CLOCK_ONLY) => parse_line_of_1,
        _ => return Record { spoilt: 1, ..Record::default() },
    };
    let mut record = Record::default();
    let mut same_boot = false;
    for line in lines {
        match parse_line(line) {
            Some(Line::Boot(boot)) => same_boot = !boot.is_empty() && boot == clocks.boot,
            Some(Line::Next(port)) => record.next = Some(port),
            Some(Line::InUse(port, who)) => {
                record.entries.push(Entry { port, who, standing: Standing::InUse });
            }
            Some(Line::Rests(port, who, until)) => {
                let rest = match until.since_boot.filter(|_| same_boot) {
                    Some(since_boot) => since_boot.saturating_sub(clocks.since_boot),
                    None => until.wall.saturating_sub(clocks.wall),
                };
                record.entries.push(Entry { port, who, standing: Standing::Rests(rest) });
            }
            None => record.spoilt += 1,
        }
    }
    record.entries.retain(|entry| entry.standing != Standing::Rests(Duration::ZERO));
    record
}

enum Line<'a> {
    Boot(&'a str),
    Next(u16),
    InUse(u16, Incarnation),
    Rests(u16, Incarnation, Until),
}

struct Until {
    /// Nothing: not recorded.
    since_boot: Option<Duration>,
    wall: Duration,
}

/// Of version 1: `rests port who wall`, and nothing of a boot.
fn parse_line_of_1(line: &str) -> Option<Line<'_>> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["rests", port, who, wall] => {
            let until = Until { since_boot: None, wall: millis(wall)? };
            Some(Line::Rests(port.parse().ok()?, incarnation(who)?, until))
        }
        ["next" | "in-use", ..] => parse_line(line),
        _ => None,
    }
}

fn millis(text: &str) -> Option<Duration> {
    text.parse().ok().map(Duration::from_millis)
}

fn parse_line(line: &str) -> Option<Line<'_>> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["boot", boot] => Some(Line::Boot(boot)),
        ["next", port] => Some(Line::Next(port.parse().ok()?)),
        ["in-use", port, who] => Some(Line::InUse(port.parse().ok()?, incarnation(who)?)),
        ["rests", port, who, since_boot, wall] => {
            let until = Until { since_boot: Some(millis(since_boot)?), wall: millis(wall)? };
            Some(Line::Rests(port.parse().ok()?, incarnation(who)?, until))
        }
        _ => None,
    }
}

fn incarnation(text: &str) -> Option<Incarnation> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(Incarnation(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const QUARANTINE: Duration = Duration::from_secs(900);

    fn clocks() -> Clocks {
        let wall = Duration::from_secs(1_700_000_000);
        Clocks { boot: "one".to_owned(), since_boot: 10 * HOUR, wall }
    }

    fn later(clocks: &Clocks, by: Duration) -> Clocks {
        Clocks { since_boot: clocks.since_boot + by, wall: clocks.wall + by, ..clocks.clone() }
    }

    /// 20001 is in use, 20002 rests.
    fn text() -> String {
        let now = Instant::now();
        let mut table = Table::new(20_000..=20_009, QUARANTINE, 20_005);
        table.take(20_001, Incarnation([1; 32]), now);
        table.take(20_002, Incarnation([0xab; 32]), now);
        table.give_back(20_002, now);
        write(&table, now, &clocks())
    }

    fn rest(clocks: &Clocks) -> Option<Duration> {
        let rests = |entry: &Entry| match entry.standing {
            Standing::Rests(rest) => Some(rest),
            Standing::InUse => None,
        };
        parse(&text(), clocks).entries.iter().find_map(rests)
    }

    #[test]
    fn a_table_comes_back_from_its_record() {
        let read = parse(&text(), &later(&clocks(), Duration::from_secs(100)));
        let entry = |port, byte, standing| Entry { port, who: Incarnation([byte; 32]), standing };
        let rests = Standing::Rests(Duration::from_secs(800));
        assert_eq!(read.entries, [entry(20_001, 1, Standing::InUse), entry(20_002, 0xab, rests)]);
        assert_eq!((read.next, read.spoilt), (Some(20_005), 0));
        assert_eq!(rest(&later(&clocks(), QUARANTINE)), None, "a rest that is over is not restored");
    }

    /// H2.
    #[test]
    fn h2_the_wall_clock_decides_only_over_a_reboot() {
        let (soon, clocks) = (Duration::from_secs(100), clocks());
        let jumped = Clocks { wall: clocks.wall + HOUR, ..later(&clocks, soon) };
        let set_back = Clocks { wall: clocks.wall - HOUR, ..later(&clocks, soon) };
        assert_eq!(rest(&jumped), Some(QUARANTINE - soon), "nothing expires early");
        assert_eq!(rest(&set_back), Some(QUARANTINE - soon), "nothing lives longer");
        let rebooted = |boot: &str, wall| Clocks { boot: boot.to_owned(), since_boot: soon, wall };
        assert_eq!(rest(&rebooted("another", clocks.wall + soon)), Some(QUARANTINE - soon));
        assert_eq!(rest(&rebooted("another", clocks.wall + QUARANTINE)), None);
        // A kernel that does not say who it is may be any.
        assert_eq!(rest(&rebooted("", clocks.wall + soon)), Some(QUARANTINE - soon));
    }

    /// An upgrade forgets no quarantine.
    #[test]
    fn a_record_of_version_1_is_read_by_the_wall_clock() {
        let clocks = clocks();
        let who = Incarnation([1; 32]);
        let hex = "01".repeat(32);
        let until = (clocks.wall + QUARANTINE).as_millis();
        let text = format!(
            "{WALL_CLOCK_ONLY}\nnext 20005\nin-use 20001 {hex}\nrests 20002 {hex} {until}\n\
             rests 20003 {hex} {}\nrests 20004 {hex} {until} {until}\nboot one\n",
            clocks.wall.as_millis(),
        );
        let entry = |port, standing| Entry { port, who, standing };
        let entries = vec![entry(20_001, Standing::InUse), entry(20_002, Standing::Rests(QUARANTINE))];
        assert_eq!(parse(&text, &clocks), Record { next: Some(20_005), entries, spoilt: 2 });
    }

    #[test]
    fn what_makes_no_sense_is_left_out_and_counted() {
        let who = "01".repeat(32);
        let read = |text: &str| parse(text, &clocks());
        for spoilt in ["", "kvferry ports 3\nnext 1", "\0\0\0", "in-use 20000"] {
            assert_eq!(read(spoilt), Record { spoilt: 1, ..Record::default() }, "{spoilt:?}");
        }
        let text = format!(
            "{HEADER}\nnext 70000\nin-use 20000 {who}\nin-use 20001 zz{}\nrests 20002 {who} 5\n\
             rests 20003 {who} -5 5\nin-use 20004 {}\nrests 20005 {who} 5 99999999999999999999999\nwhat is this\n\
             in-use 20006 {who}",
            &who[2..],
            "é".repeat(32),
        );
        let read = read(&text);
        assert_eq!(read.entries.iter().map(|entry| entry.port).collect::<Vec<_>>(), [20_000, 20_006]);
        assert_eq!((read.next, read.spoilt), (None, 7));
    }

    #[test]
    fn a_time_beyond_all_bounds_is_still_only_a_long_rest() {
        let text = format!("{HEADER}\nrests 20000 {} {} {}", "01".repeat(32), u64::MAX, u64::MAX);
        let read = parse(&text, &clocks());
        assert!(matches!(read.entries[..], [Entry { standing: Standing::Rests(_), .. }]), "{read:?}");
    }
}
