//! Attaching, and every way in which it does not work out.

use std::{
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    time::{Duration, Instant},
};

use kvferry_client::{Engine, EngineOptions, Error, Event, Node, Policy, Reason, SessionState};
use kvferry_proto::{engine::v1 as wire, types::v1 as types};
use tonic::Code;

use crate::fake::{BOOT, Fake, First, SESSION};

fn no_daemon(socket: &Path) -> String {
    let options = EngineOptions { socket: socket.to_owned(), ..EngineOptions::default() };
    match Engine::attach(options) {
        Err(Error::NoDaemon { path, cause }) if path == socket => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_first_event_says_who_we_are() {
    let fake = Fake::start();
    let policy = Policy {
        attempts: Some(2),
        backoff: Some(Duration::from_millis(7)),
        failure_threshold: Some(3),
        deadline: Some(Duration::from_secs(4)),
    };
    let options = EngineOptions {
        policy,
        transports: vec![kvferry_client::Path::Tcp],
        advertise_host: Some("10.1.2.3".into()),
        preferred_port: Some(20_007),
        ..fake.options()
    };
    let engine = Engine::attach(options).unwrap();
    assert_eq!(engine.session_id(), SESSION);
    assert_eq!((engine.engine_id(), engine.boot_id()), (7, BOOT));
    assert_eq!(engine.daemon_version(), "fake");
    assert_eq!(engine.daemon_pid(), std::process::id());
    assert_eq!(engine.limits().slices, 4 << 20);

    let asked = fake.attach_request();
    assert_eq!(asked.key.len(), 32);
    assert_eq!((asked.name.as_str(), asked.advertise_host.as_str()), ("tester", "10.1.2.3"));
    assert_eq!(asked.preferred_port, 20_007);
    assert_eq!(asked.transports, [types::Path::Tcp as i32]);
    let sent = wire::Policy {
        attempts: Some(2),
        backoff_ms: Some(7),
        failure_threshold: Some(3),
        deadline_ms: Some(4000),
    };
    assert_eq!(asked.policy, Some(sent));
}

#[test]
fn every_engine_has_a_key_of_its_own() {
    let fake = Fake::start();
    let _one = Engine::attach(fake.options()).unwrap();
    let key = fake.attach_request().key;
    let _other = Engine::attach(fake.options()).unwrap();
    assert_ne!(fake.attach_request().key, key);
}

#[test]
fn the_lease_ends_with_the_last_handle() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let clone = engine.clone();
    drop(engine);
    assert!(clone.probe("127.0.0.1:1", Duration::from_secs(5)).unwrap().alive);
    drop(clone);
    assert!(fake.lease_is_closed());
}

#[test]
fn nobody_there_names_the_path_and_what_helps() {
    let dir = tempfile::tempdir().unwrap();
    let cause = no_daemon(&dir.path().join("engine.sock"));
    assert!(cause.contains("start kvferryd") && cause.contains("KVFERRY_SOCKET"), "{cause}");
}

#[test]
fn a_left_over_socket_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("engine.sock");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(no_daemon(&socket).contains("left over"));
}

#[test]
fn a_path_that_no_socket_can_have_is_told_apart() {
    let cause = no_daemon(Path::new(&format!("/tmp/{}", "x".repeat(103))));
    assert!(cause.contains("108 bytes") && cause.contains("107"), "{cause}");
}

#[test]
fn a_socket_we_may_not_use_is_told_apart() {
    if rustix::process::geteuid().is_root() {
        println!("skipped: root may use every socket");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("engine.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o000)).unwrap();
    assert!(no_daemon(&socket).contains("may not use this socket"));
}

#[test]
fn anything_but_attached_at_first_is_an_error() {
    let draining = wire::engine_event::Event::Draining(wire::Draining { grace_ms: 1 });
    for first in [
        First::Other(Box::new(wire::EngineEvent { event: Some(draining) })),
        First::Other(Box::new(wire::EngineEvent { event: None })),
        First::Ends,
    ] {
        let fake = Fake::with_first(first);
        let error = Engine::attach(fake.options()).unwrap_err();
        assert!(matches!(error, Error::Call { call: "Attach", .. }), "{error:?}");
    }
}

#[test]
fn a_first_event_that_lacks_something_is_an_error() {
    let changes: [fn(&mut wire::Attached); 3] = [
        |attached| attached.token.truncate(31),
        |attached| attached.boot_id.clear(),
        |attached| attached.limits = None,
    ];
    for change in changes {
        let fake = Fake::with(change);
        let error = Engine::attach(fake.options()).unwrap_err();
        assert!(matches!(error, Error::Call { call: "Attach", .. }), "{error:?}");
    }
}

#[test]
fn a_daemon_that_refuses_says_why() {
    let fake = Fake::with_first(First::Status(Code::ResourceExhausted, Some(Reason::PortUnavailable as i32)));
    match Engine::attach(fake.options()) {
        Err(Error::Refused(failure)) => assert_eq!(failure.reason, Reason::PortUnavailable),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_daemon_that_says_nothing_is_given_up() {
    let fake = Fake::with_first(First::Silence);
    let timeout = Duration::from_millis(300);
    let started = Instant::now();
    let error = Engine::attach(EngineOptions { attach_timeout: timeout, ..fake.options() }).unwrap_err();
    assert!(matches!(error, Error::Timeout(given) if given == timeout), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn events_arrive_in_order_and_the_last_is_detached() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let events = engine.events();
    fake.send(wire::engine_event::Event::SessionChanged(wire::SessionChanged {
        session_id: "127.0.0.1:20001".into(),
        state: types::SessionState::Failed.into(),
        cause: Some(types::Failure { reason: types::Reason::PeerSilent.into(), ..Default::default() }),
        ..Default::default()
    }));
    fake.send(wire::engine_event::Event::Notification(wire::Notification::default()));
    fake.send(wire::engine_event::Event::RegionInvalidated(wire::RegionInvalidated {
        region_id: 5,
        ..Default::default()
    }));
    fake.send(wire::engine_event::Event::Draining(wire::Draining { grace_ms: 1500 }));
    let next = || events.recv_timeout(Duration::from_secs(20)).unwrap();
    match next() {
        Event::SessionChanged { session, state: SessionState::Failed, cause: Some(cause) } => {
            assert_eq!((session.as_str(), cause.reason), ("127.0.0.1:20001", Reason::PeerSilent));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(next(), Event::RegionInvalidated { region: 5, cause: None }));
    assert!(matches!(next(), Event::Draining { grace } if grace == Duration::from_millis(1500)));
    fake.end_lease();
    assert!(matches!(next(), Event::Detached { .. }));
    assert!(events.recv_timeout(Duration::from_secs(20)).is_err(), "disconnected");
    assert_eq!(engine.events_lost(), 0);
}

#[test]
fn a_node_answers_without_attachment() {
    let mut fake = Fake::start();
    let node = Node::connect(&fake.socket()).unwrap();
    assert_eq!(node.info().unwrap().node_id, "fake");
    assert_eq!(node.engines().unwrap()[0].engine_id, 7);
    assert_eq!(node.sessions().unwrap()[0].session_id, SESSION);
    fake.die();
    assert!(matches!(node.info(), Err(Error::NoDaemon { path, .. }) if path == fake.socket()));
    std::fs::remove_file(fake.socket()).unwrap();
    assert!(matches!(Node::connect(&fake.socket()), Err(Error::NoDaemon { .. })));
}
