//! The daemon's Unix sockets: are they there, does anybody listen, and is this user let in?

use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
    time::Duration,
};

use tokio::{net::UnixStream, time::timeout};

use super::{Findings, finding::Finding};

/// A Unix socket's path may have so many bytes.
const LONGEST_PATH: usize = 107;

/// A daemon that lets nobody of this user in says so at once. One that says nothing waits for the first word.
const REFUSED_WITHIN: Duration = Duration::from_millis(500);

/// A daemon that accepts does so at once.
const CONNECTED_WITHIN: Duration = Duration::from_secs(5);

/// A socket that this user may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Door {
    /// The listening process, where it can be seen from here.
    pub(super) daemon: Option<u32>,
}

/// Nothing where it cannot be used; then it has been told why.
pub(super) fn check(what: &'static str, path: &Path, findings: &Findings) -> Option<Door> {
    let (finding, door) = match look(what, path).and_then(|file| connect(what, path, &file)) {
        Ok((finding, door)) => (finding, Some(door)),
        Err(finding) => (finding, None),
    };
    findings.tell(finding);
    door
}

/// What a file looks like from outside: `mode 0660, owner 0:0`.
fn described(file: &fs::Metadata) -> String {
    format!("mode {:04o}, owner {}:{}", file.mode() & 0o7777, file.uid(), file.gid())
}

/// Who asks: `uid 1000, gid 1000, groups 27 44`.
fn caller() -> String {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let groups = rustix::process::getgroups().unwrap_or_default();
    let others: Vec<_> = groups.iter().map(|group| group.as_raw().to_string()).collect();
    match others.as_slice() {
        [] => format!("uid {uid}, gid {gid}, no other groups"),
        others => format!("uid {uid}, gid {gid}, groups {}", others.join(" ")),
    }
}

fn look(what: &'static str, path: &Path) -> Result<fs::Metadata, Finding> {
    let shown = path.display();
    let length = path.as_os_str().as_bytes().len();
    if length > LONGEST_PATH {
        let why = format!("{shown} has {length} bytes; a Unix socket's path may have {LONGEST_PATH}");
        return Err(Finding::fail(what, why, "use a shorter path (endpoint.socket, KVFERRY_SOCKET)"));
    }
    let file = fs::metadata(path).map_err(|error| missing(what, path, &error))?;
    if !file.file_type().is_socket() {
        let kind = if file.is_dir() { "a folder" } else { "a file" };
        return Err(Finding::fail(
            what,
            format!("{shown} is {kind}, not a socket"),
            "mount the socket's folder into the container, not the socket: what is not there when a container starts \
             is mounted as an empty folder",
        ));
    }
    Ok(file)
}

fn missing(what: &'static str, path: &Path, error: &io::Error) -> Finding {
    let shown = path.display();
    let folder = path.parent().unwrap_or(Path::new("/"));
    if error.kind() == io::ErrorKind::PermissionDenied {
        let about = fs::metadata(folder).map_or_else(|_| "hidden too".to_owned(), |file| described(&file));
        let why = format!("{shown}: {} may not look into {} ({about})", caller(), folder.display());
        return Finding::fail(what, why, "let this user enter the folder: chmod o+x, or join its group");
    }
    let mut why = format!("{shown}: {error}");
    if !folder.is_dir() {
        why += &format!("; its folder {} is not there either", folder.display());
    }
    let fix = "start kvferryd on this node, mount its socket's folder into the container, or name the socket with \
               KVFERRY_SOCKET";
    Finding::fail(what, why, fix)
}

/// Connects, and listens whether the daemon hangs up on this user.
fn connect(what: &'static str, path: &Path, file: &fs::Metadata) -> Result<(Finding, Door), Finding> {
    let shown = format!("{} ({})", path.display(), described(file));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Finding::fail(what, format!("{shown}: {error}"), "free descriptors of this process")
    })?;
    runtime.block_on(async {
        let connected = timeout(CONNECTED_WITHIN, UnixStream::connect(path)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| unreachable(what, &shown, file, &error))?;
        let daemon = stream.peer_cred().ok().and_then(|daemon| daemon.pid()).filter(|pid| *pid > 0);
        if timeout(REFUSED_WITHIN, stream.readable()).await.is_ok() {
            return Err(not_allowed(what, &shown));
        }
        let door = Door { daemon: daemon.and_then(|pid| u32::try_from(pid).ok()) };
        Ok((Finding::ok(what, format!("{shown} accepts {}", caller())), door))
    })
}

fn unreachable(what: &'static str, shown: &str, file: &fs::Metadata, error: &io::Error) -> Finding {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Finding::fail(
            what,
            format!("{shown} was left over by a daemon that is gone: nobody listens"),
            "start kvferryd on this node",
        ),
        io::ErrorKind::PermissionDenied => Finding::fail(
            what,
            format!("{shown}: {} may not write to it", caller()),
            format!(
                "give the engine the socket's group {} (docker --group-add, Kubernetes supplementalGroups), or the \
                 daemon another one (Group= in its unit); {ALLOW}",
                file.gid()
            ),
        ),
        _ => Finding::fail(
            what,
            format!("{shown}: {error}"),
            "the daemon accepts nobody: it is stopped or stuck; see its log, restart it",
        ),
    }
}

const ALLOW: &str = "and name the engine's uid in security.allow_uids of the daemon, or its primary gid in \
                     security.allow_gids";

fn not_allowed(what: &'static str, shown: &str) -> Finding {
    Finding::fail(
        what,
        format!("{shown}: the daemon hangs up on {}", caller()),
        ALLOW.trim_start_matches("and ").to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, sync::mpsc};

    use super::*;
    use crate::doctor::finding::Status;

    /// The one finding, and whether the socket can be used.
    fn finding(path: &Path) -> (Finding, bool) {
        let (tell, told) = mpsc::sync_channel(4);
        let door = check("socket", path, &Findings(tell));
        (told.recv().unwrap(), door.is_some())
    }

    fn fails(path: &Path, says: &str, helps: &str) {
        let (finding, usable) = finding(path);
        assert_eq!((finding.status, usable), (Status::Fail, false), "{finding}");
        assert!(finding.why.contains(says), "{finding}");
        assert!(finding.fix.as_ref().is_some_and(|fix| fix.contains(helps)), "{finding}");
    }

    #[test]
    fn a_socket_that_waits_for_the_first_word_is_usable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let (finding, usable) = finding(&path);
        assert_eq!((finding.status, usable), (Status::Ok, true), "{finding}");
        assert!(finding.why.contains("mode ") && finding.why.contains("uid "), "{finding}");
    }

    #[test]
    fn every_way_not_to_be_a_living_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        fails(&path, "No such file", "start kvferryd");
        fails(&folder.path().join("no/s"), "is not there either", "mount");
        fails(folder.path(), "is a folder", "mount the socket's folder");
        fails(&folder.path().join("x".repeat(200)), "a Unix socket's path may have 107", "shorter");
        drop(UnixListener::bind(&path).unwrap());
        fails(&path, "left over by a daemon that is gone", "start kvferryd");
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        fails(&file, "is a file", "mount");
    }

    /// As the daemon does to users that are not on its lists.
    #[test]
    fn a_daemon_that_hangs_up_has_refused_this_user() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = std::thread::spawn(move || drop(listener.accept().unwrap()));
        fails(&path, "the daemon hangs up on uid", "security.allow_uids");
        daemon.join().unwrap();
    }
}
