//! `docs/faults.md` says which test causes which fault. Here it is held to that: a name it gives is a test, and a test
//! named after a row is in it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The functions of a file that are tests.
fn tests_of(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let mut tests = Vec::new();
    let mut marked = false;
    for line in text.lines().map(str::trim_start) {
        let function = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn "));
        match function {
            Some(function) => {
                let name = function.split('(').next().unwrap_or_default();
                tests.extend(marked.then(|| name.to_owned()));
                marked = false;
            }
            None => marked |= line.starts_with("#[test]") || line.starts_with("#[tokio::test"),
        }
    }
    tests
}

/// Every suite of `tests/tests`, by its path there, with its tests.
fn suites() -> BTreeMap<String, Vec<String>> {
    fn walk(folder: &Path, base: &Path, found: &mut BTreeMap<String, Vec<String>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, base, found);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                let name = path.strip_prefix(base).unwrap().to_string_lossy().into_owned();
                found.insert(name, tests_of(&path));
            }
        }
    }
    let base = root().join("tests/tests");
    let mut found = BTreeMap::new();
    walk(&base, &base, &mut found);
    found
}

/// The names that the page gives: file and test, each of which may end in `*`.
fn named() -> Vec<(String, String)> {
    let page = fs::read_to_string(root().join("docs/faults.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let quoted = rows.flat_map(|row| row.split('`').skip(1).step_by(2));
    quoted.filter_map(|name| name.split_once("::")).map(|(file, test)| (file.into(), test.into())).collect()
}

fn fits(name: &str, pattern: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(begin) => name.starts_with(begin),
        None => name == pattern,
    }
}

/// A test that is named after a row or an invariant: `b1_`, `c3b_`, `i10_`.
fn has_id(name: &str) -> bool {
    let Some((id, _)) = name.split_once('_') else { return false };
    let Some(rest) = id.strip_prefix(|first: char| first.is_ascii_lowercase()) else { return false };
    let digits = rest.trim_end_matches('b');
    !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
}

#[test]
fn every_name_in_the_table_is_a_test() {
    let suites = suites();
    let named = named();
    assert!(named.len() > 60, "{} names are not the table", named.len());
    for (file, test) in named {
        let elsewhere = || tests_of(&root().join(&file));
        let tests = suites.get(&file).cloned().unwrap_or_else(elsewhere);
        let exists = tests.iter().any(|name| fits(name, &test));
        assert!(exists, "docs/faults.md names {file}::{test}, which is no test");
    }
}

#[test]
fn every_test_that_is_named_after_a_row_is_in_the_table() {
    let named = named();
    let in_table =
        |suite: &str, name: &str| named.iter().any(|(file, test)| file == suite && fits(name, test));
    for (suite, tests) in suites() {
        for name in tests.iter().filter(|name| has_id(name)) {
            assert!(in_table(&suite, name), "{suite}::{name} is not in docs/faults.md");
        }
    }
}

/// Every row of the table has at least one name behind it.
#[test]
fn every_row_has_a_test() {
    let page = fs::read_to_string(root().join("docs/faults.md")).unwrap();
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| id") && !line.starts_with("| |"));
    for row in rows {
        assert!(row.contains("::"), "no test: {row}");
    }
}
