//! Files that are replaced whole: after a crash there is the old content or the new one, never half of each.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

/// Replaces the file. One writer per path: the new content is prepared beside it, under a name of its own.
///
/// # Errors
/// The old content is still there then.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let prepared = path.with_extension("new");
    let mut file = File::create(&prepared)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&prepared, path)?;
    // The name is as durable as the content only once the directory is written too.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_replaced_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("record");
        for content in ["first, and longer", "second"] {
            replace(&path, content.as_bytes()).expect("written");
            assert_eq!(std::fs::read_to_string(&path).expect("read"), content);
        }
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn what_cannot_be_replaced_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("record");
        replace(&path, b"old").expect("written");
        std::fs::create_dir(path.with_extension("new")).expect("in the way");
        replace(&path, b"new").expect_err("no place to prepare it");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "old");
    }
}
