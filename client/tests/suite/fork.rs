//! A forked child: told at once, harmless when it lets go.
#![allow(unsafe_code)]

use std::time::Duration;

use kvferry_client::{Engine, Error, Memory, Node, Outcome, TransferId};

use crate::fake::{Fake, transfer};

/// Runs `body` in a forked child; its answer is the child's exit status.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs `body` alone, which takes no lock that another thread of this program may have
    // held at the fork (that is what is being tested), and ends without running destructors.
    match unsafe { libc::fork() } {
        -1 => panic!("{}", std::io::Error::last_os_error()),
        0 => {
            // A child that hangs is killed, and its status then is not 0.
            // SAFETY: neither call has preconditions.
            unsafe {
                libc::alarm(20);
                libc::_exit(body())
            }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` is valid for the write, `child` is ours.
            let waited = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(waited, child);
            assert!(libc::WIFEXITED(status), "status {status:#x}");
            libc::WEXITSTATUS(status)
        }
    }
}

#[test]
fn a_child_is_told_at_once_and_the_parent_never_notices() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let node = Node::connect(&fake.socket()).unwrap();
    // So that there is a link and a pending transfer to inherit.
    assert_eq!(engine.transfer(transfer(1)).unwrap().outcome, Outcome::Done);
    let pending = engine.submit(transfer(1)).unwrap();
    let parent = std::process::id();
    let id = TransferId([1; 16]);
    let moment = Duration::from_secs(5);
    let mut inherited = Some((engine.clone(), pending, node));
    let status = in_child(|| {
        let Some((engine, pending, node)) = inherited.take() else { return 99 };
        let answers = [
            engine.transfer(transfer(1)).map(drop),
            engine.submit(transfer(1)).map(drop),
            engine.register(&[Memory::Process { address: 1, length: 1 }]).map(drop),
            engine.unregister(&[1]).map(drop),
            engine.wait(id, moment).map(drop),
            engine.cancel(id).map(drop),
            engine.probe("127.0.0.1:1", moment).map(drop),
            engine.reset_session("127.0.0.1:1"),
            node.info().map(drop),
            pending.wait().map(drop),
        ];
        let told =
            |answer: &Result<(), Error>| matches!(answer, Err(Error::Forked { owner }) if *owner == parent);
        if let Some(wrong) = answers.iter().position(|answer| !told(answer)) {
            return wrong as i32 + 1;
        }
        if engine.events().recv().is_ok() {
            return 50;
        }
        drop(engine.clone());
        drop((engine, node));
        0
    });
    assert_eq!(status, 0);
    let (_, pending, node) = inherited.take().unwrap();
    assert_eq!(pending.wait().unwrap().outcome, Outcome::Done);
    assert_eq!(node.info().unwrap().node_id, "fake");
    assert_eq!(engine.transfer(transfer(1)).unwrap().outcome, Outcome::Done);
    assert!(engine.probe("127.0.0.1:1", moment).unwrap().alive);
}
