//! Reads what this folder names, because a wrapper written elsewhere would pass clippy's lists unseen.

use std::{
    fs,
    path::{Path, PathBuf},
};

const ALLOWED_STD: [&str; 5] = ["time", "fmt", "cmp", "collections", "ops"];

/// The folder's own modules, those of `crate`, numbers, what turns text into values, and what attributes and groups bring
/// along.
const ALLOWED_ROOTS: [&str; 22] = [
    "super",
    "self",
    "domain",
    "clippy",
    "u8",
    "u64",
    "beat",
    "disposition",
    "drain",
    "health",
    "jitter",
    "rails",
    "serde",
    "de",
    "serde_json",
    "reconnect",
    "retry",
    "revocations",
    "route",
    "spans",
    "tombstones",
    "purity",
];

/// Identifiers and the signs that hold paths together, without comments and tests.
fn tokens(source: &str) -> Vec<&str> {
    let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let mut tokens = Vec::new();
    for mut line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
        while let Some(first) = line.chars().next() {
            let ident = line.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(line.len());
            let length = match ident {
                0 if line.starts_with("::") => 2,
                0 => first.len_utf8(),
                _ => ident,
            };
            let (token, rest) = line.split_at(length);
            tokens.push(token);
            line = rest;
        }
    }
    tokens.retain(|token| !token.trim().is_empty());
    tokens
}

/// What follows `first::`: one name, or the first names of a group's members.
fn members<'a>(after: &[&'a str]) -> Vec<&'a str> {
    if after.first() != Some(&"{") {
        return after.first().copied().into_iter().collect();
    }
    let (mut depth, mut members) = (0, Vec::new());
    for pair in after.windows(2) {
        match pair[0] {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if depth == 1 && ["{", ","].contains(&pair[0]) && pair[1] != "}" {
            members.push(pair[1]);
        }
    }
    members
}

/// The first path that production code must not name.
fn impurity(source: &str) -> Option<String> {
    let tokens = tokens(source);
    for (at, pair) in tokens.windows(2).enumerate() {
        let (root, after) = (pair[0], &tokens[at + 2..]);
        // Types (`Duration::from_millis`) and turbofish are no modules.
        if pair[1] != "::" || !root.starts_with(char::is_lowercase) || after.first() == Some(&"<") {
            continue;
        }
        let allowed: &[&str] = match root {
            "std" => &ALLOWED_STD,
            "crate" => &["domain"],
            _ if ALLOWED_ROOTS.contains(&root) || ALLOWED_STD.contains(&root) => continue,
            _ => return Some(root.to_owned()),
        };
        if let Some(bad) = members(after).into_iter().find(|member| !allowed.contains(member)) {
            return Some(format!("{root}::{bad}"));
        }
    }
    None
}

/// Production code, however deep.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of policy") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if !["purity.rs", "tests.rs"].iter().any(|test| path.ends_with(test)) {
            found.push(path);
        }
    }
}

#[test]
fn policy_names_nothing_but_std_data_and_the_domain() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/policy"), &mut files);
    for path in &files {
        let source = fs::read_to_string(path).expect("source");
        assert_eq!(impurity(&source), None, "{} names it", path.display());
    }
    let nested = files.iter().any(|path| path.ends_with("revocations/spans.rs"));
    assert!(files.len() >= 8 && nested, "found {files:?} only");
}

#[test]
fn the_reader_sees_what_it_must_refuse() {
    for source in [
        "use std::sync::Mutex;",
        "use std::{fmt, sync::Arc};",
        "use std::{fmt, env};",
        "use std::{\n    sync::{Arc, Mutex},\n    time::Duration,\n};",
        "use crate::telemetry::Metrics;",
        "use crate::{domain::Op, session::Session};",
        "use tokio::time;",
        "fn f() { std::thread::sleep(d); }",
        "fn f() -> u8 { tracing::info!(x); 1 }",
    ] {
        assert!(impurity(source).is_some(), "{source}");
    }
    for source in [
        "use std::{fmt, time::{Duration, Instant}};",
        "use crate::domain::{Op, Reason};",
        "// use std::sync::Mutex;",
        "fn f() { Duration::from_millis(1); }",
        "use std::fmt;\n#[cfg(test)]\nmod tests {\n    use std::sync::Arc;\n}",
    ] {
        assert_eq!(impurity(source), None, "{source}");
    }
}
