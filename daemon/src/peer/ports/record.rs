//! The table as a file: one line per port, so that its rest outlives the daemon.
//!
//! Rests are recorded by the wall clock, the only one that outlives a reboot. What a line does not say plainly
//! is left out and counted: a spoilt record costs quarantines, never a start.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::table::{Entry, Standing, Table};
use crate::domain::Incarnation;

const HEADER: &str = "kvferry ports 1";

/// What a record says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Where the next turn begins.
    pub(super) next: Option<u16>,
    pub(super) entries: Vec<Entry>,
    /// Lines that make no sense.
    pub(super) spoilt: usize,
}

pub(super) fn write(table: &Table, now: std::time::Instant, wall: SystemTime) -> String {
    let mut text = format!("{HEADER}\nnext {}\n", table.next());
    for Entry { port, who, standing } in table.entries(now) {
        let who: String = who.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = match standing {
            Standing::InUse => format!("in-use {port} {who}\n"),
            Standing::Rests(rest) => format!("rests {port} {who} {}\n", unix_ms(wall + rest)),
        };
        text.push_str(&line);
    }
    text
}

/// Rests that are over by `wall` are left out.
pub(super) fn parse(text: &str, wall: SystemTime) -> Record {
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Record { spoilt: 1, ..Record::default() };
    }
    let mut record = Record::default();
    for line in lines {
        match parse_line(line, wall) {
            Some(Line::Next(port)) => record.next = Some(port),
            Some(Line::Port(entry)) => record.entries.push(entry),
            None => record.spoilt += 1,
        }
    }
    record.entries.retain(|entry| entry.standing != Standing::Rests(Duration::ZERO));
    record
}

enum Line {
    Next(u16),
    Port(Entry),
}

fn parse_line(line: &str, wall: SystemTime) -> Option<Line> {
    let words: Vec<&str> = line.split(' ').collect();
    let entry = |port: &str, who: &str, standing| {
        Some(Line::Port(Entry { port: port.parse().ok()?, who: incarnation(who)?, standing }))
    };
    match words[..] {
        ["next", port] => Some(Line::Next(port.parse().ok()?)),
        ["in-use", port, who] => entry(port, who, Standing::InUse),
        ["rests", port, who, until] => {
            let until = Duration::from_millis(until.parse().ok()?);
            let rest = until.saturating_sub(wall.duration_since(UNIX_EPOCH).unwrap_or_default());
            entry(port, who, Standing::Rests(rest))
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

fn unix_ms(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const WALL: Duration = Duration::from_secs(1_700_000_000);

    #[test]
    fn a_table_comes_back_from_its_record() {
        let (now, wall) = (Instant::now(), UNIX_EPOCH + WALL);
        let mut table = Table::new(20_000..=20_009, Duration::from_secs(900), 20_005);
        table.take(20_001, Incarnation([1; 32]), now);
        table.take(20_002, Incarnation([0xab; 32]), now);
        table.give_back(20_002, now);
        let text = write(&table, now, wall);
        let read = parse(&text, wall + Duration::from_secs(100));
        let entry = |port, byte, standing| Entry { port, who: Incarnation([byte; 32]), standing };
        let rests = Standing::Rests(Duration::from_secs(800));
        assert_eq!(read.entries, [entry(20_001, 1, Standing::InUse), entry(20_002, 0xab, rests)]);
        assert_eq!((read.next, read.spoilt), (Some(20_005), 0));
        let later = parse(&text, wall + Duration::from_secs(900));
        assert_eq!(later.entries.len(), 1, "a rest that is over is not restored");
    }

    #[test]
    fn what_makes_no_sense_is_left_out_and_counted() {
        let who = "01".repeat(32);
        let wall = UNIX_EPOCH + WALL;
        for spoilt in ["", "kvferry ports 2\nnext 1", "\0\0\0", "in-use 20000"] {
            assert_eq!(parse(spoilt, wall), Record { spoilt: 1, ..Record::default() }, "{spoilt:?}");
        }
        let text = format!(
            "{HEADER}\nnext 70000\nin-use 20000 {who}\nin-use 20001 zz{}\nrests 20002 {who}\nrests 20003 {who} -5\n\
             in-use 20004 {}\nrests 20005 {who} 99999999999999999999999\nwhat is this\nin-use 20006 {who}",
            &who[2..],
            "é".repeat(32),
        );
        let read = parse(&text, wall);
        assert_eq!(read.entries.iter().map(|entry| entry.port).collect::<Vec<_>>(), [20_000, 20_006]);
        assert_eq!((read.next, read.spoilt), (None, 7));
    }

    #[test]
    fn a_time_beyond_all_bounds_is_still_only_a_long_rest() {
        let who = "01".repeat(32);
        let read = parse(&format!("{HEADER}\nrests 20000 {who} {}", u64::MAX), UNIX_EPOCH + WALL);
        assert!(matches!(read.entries[..], [Entry { standing: Standing::Rests(_), .. }]), "{read:?}");
    }
}
