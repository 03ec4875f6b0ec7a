//! Peers that stop without a word, and how long their callers wait (D2); daemons that were starved and come back to a
//! full inbox (D3b); streams that lose bytes on the way.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{Arrangement, Move},
    daemon::{Daemon, Launch},
    eventually,
    faulty::{CONFIG, Faulty, megabytes},
    netpath::{ENDS, NetPath},
    oracle::Kind,
    pattern::Stamp,
    process::Signal,
    proxy::{Fault, Kind as Carries, Proxy, Rule, Toward},
    scene::{Peer, SOURCE, Scene, TARGET, assert_reason, done, failed, once, request},
};
use kvferry_client::{Error, Op, Outcome, Path, Policy, Reason, Transfer};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// I9: what a verdict over a silent peer may take, with what a busy machine may add.
const NOTICED: Duration = Duration::from_millis(3500);

/// D2 without a proxy: frames vanish between two network namespaces.
#[test]
fn d2_a_network_that_loses_everything_is_noticed_in_time() {
    let path = NetPath::lay().unwrap();
    let daemon = |end: usize| {
        let [program, namespace] = path.at(end);
        let launch = Launch::new().unwrap().config("[security]\ninsecure = true\n").host(ENDS[end]);
        launch.under(&[&program, &namespace]).start().unwrap()
    };
    let daemons = [daemon(0), daemon(1)];
    let source = Peer::attach(&daemons[0], Kind::Shared, 16 * MIB, SOURCE).unwrap();
    let mut sink = Peer::attach(&daemons[1], Kind::Shared, 16 * MIB, TARGET).unwrap();
    let moves = megabytes(8);
    let write = || request(Op::Write, sink.engine.session_id(), &moves, &source.pool, &sink.pool);
    done(source.engine.transfer(write()), &moves);
    path.lose(true).unwrap();
    let begun = Instant::now();
    let (report, failure) = failed(source.engine.transfer(Transfer { policy: once(), ..write() }));
    let took = begun.elapsed();
    println!("{:?} after {took:?}", failure.reason);
    assert_reason(&failure, &[Reason::PeerSilent]);
    assert!(took < NOTICED, "the verdict took {took:?}");
    assert!(!report.peer_confirmed, "{report:?}");
    // Each side proves its own half alone.
    eventually("the target has dropped the session", NOTICED, || {
        daemons[1].node().unwrap().sessions().unwrap().iter().all(|session| !session.inbound)
    });
    path.lose(false).unwrap();
    eventually("the path is well again", LIMIT, || {
        source.engine.transfer(write()).unwrap().outcome == Outcome::Done
    });
    sink.pool.expect(&source.pool, &moves);
    sink.pool.verify().assert_clean("after a network that lost everything");
}

/// A dozen callers of a daemon that has stopped, more than its lanes and windows hold: how long each waited.
fn told_by_a_stopped_daemon(policy: Policy, config: &str) -> Vec<Duration> {
    let scene = Scene::with_config(Path::Tcp, 16 * MIB, &format!("{CONFIG}{config}")).unwrap();
    let moves = megabytes(12);
    let write = || Transfer { policy, ..scene.write_to(scene.session(), &moves) };
    done(scene.initiator.engine.transfer(write()), &moves);
    scene.nodes.target().process().signal(Signal::STOP).unwrap();
    let told: Mutex<Vec<Duration>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let begun = Instant::now();
                let (_, failure) = failed(scene.initiator.engine.transfer(write()));
                assert_reason(&failure, &[Reason::PeerSilent, Reason::ConnectTimeout]);
                told.lock().unwrap().push(begun.elapsed());
            });
        }
    });
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    println!("{policy:?}: told after {told:?}");
    told
}

/// D2: also who waits behind others for a peer that has stopped is told in time.
#[test]
fn d2_without_retries_everybody_waiting_for_a_stopped_daemon_is_told_in_time() {
    let told = told_by_a_stopped_daemon(once(), "");
    assert!(told.iter().all(|took| *took < NOTICED), "{told:?}");
}

#[test]
fn d2_with_retries_everybody_waiting_for_a_stopped_daemon_is_told_when_it_is_given_up() {
    // The default in the long suite.
    let reconnect = if harness::long() { 5000 } else { 1000 };
    let told = told_by_a_stopped_daemon(Policy::default(), &format!("[retry]\nreconnect_ms = {reconnect}\n"));
    let given_up = NOTICED + Duration::from_millis(reconnect);
    assert!(told.iter().all(|took| *took < given_up), "{told:?}");
}

/// A daemon with peers on two others, one of them by way of a proxy, under load from a few callers.
struct Load {
    initiator: Peer,
    peers: [Peer; 2],
    proxy: Proxy,
    /// The initiator's first. Dropped last.
    daemons: [Daemon; 3],
}

/// How the transfers of a [`Load`] ended.
#[derive(Debug, Default)]
struct Ends {
    done: AtomicU64,
    again: AtomicU64,
    /// Reasons of those that failed.
    failed: Mutex<Vec<Reason>>,
}

impl Load {
    fn new(config: &str) -> Self {
        let config = format!("{CONFIG}{config}");
        let daemons = [(); 3].map(|()| Daemon::with_config(&config).unwrap());
        let peer = |daemon, stamp| Peer::attach(daemon, Kind::Shared, 16 * MIB, stamp).unwrap();
        let initiator = peer(&daemons[0], SOURCE);
        let peers = [peer(&daemons[1], TARGET), peer(&daemons[2], Stamp::of(4))];
        let proxy = Proxy::start(peers[0].engine.session_id()).unwrap();
        Self { initiator, peers, proxy, daemons }
    }

    fn write(&self, peer: usize, moves: &[Move]) -> Transfer {
        let proxied = self.proxy.address();
        let session = if peer == 0 { &proxied } else { self.peers[peer].engine.session_id() };
        request(Op::Write, session, moves, &self.initiator.pool, &self.peers[peer].pool)
    }

    /// Runs transfers to both peers all the while.
    fn beside(&self, what: impl FnOnce()) -> Ends {
        let (ends, over) = (Ends::default(), AtomicBool::new(false));
        let moves = megabytes(2);
        thread::scope(|scope| {
            for caller in 0..4 {
                let (ends, over, moves) = (&ends, &over, &moves);
                scope.spawn(move || {
                    while !over.load(SeqCst) {
                        self.one(caller % 2, moves, ends);
                    }
                });
            }
            what();
            over.store(true, SeqCst);
        });
        ends
    }

    fn one(&self, peer: usize, moves: &[Move], ends: &Ends) {
        let report = match self.initiator.engine.transfer(self.write(peer, moves)) {
            Ok(report) => report,
            // It is being attached to again.
            Err(Error::NoDaemon { .. }) => return thread::sleep(Duration::from_millis(20)),
            Err(other) => panic!("{other:?}"),
        };
        let report = match report.outcome {
            Outcome::Unsettled => self.initiator.engine.wait(report.id, LIMIT).unwrap(),
            _ => report,
        };
        match report.outcome {
            Outcome::Done => {
                ends.done.fetch_add(1, SeqCst);
                ends.again.fetch_add(u64::from(report.attempts > 1), SeqCst);
            }
            _ => ends.failed.lock().unwrap().push(failed(Ok(report)).1.reason),
        }
    }

    /// Stops the initiator's daemon for so long, under load, and expects every transfer to go well in the end.
    fn starve(&mut self, length: Duration) -> Ends {
        let daemon = self.daemons[0].process();
        let ends = self.beside(|| {
            thread::sleep(Duration::from_millis(500));
            daemon.signal(Signal::STOP).unwrap();
            thread::sleep(length);
            daemon.signal(Signal::CONT).unwrap();
            let begun = Instant::now();
            let moves = megabytes(1);
            for peer in [0, 1] {
                eventually("it works again", LIMIT, || {
                    let report = self.initiator.engine.transfer(self.write(peer, &moves));
                    report.is_ok_and(|report| report.outcome == Outcome::Done)
                });
            }
            println!("stopped for {length:?}, all peers served {:?} later", begun.elapsed());
            assert!(begun.elapsed() < Duration::from_secs(6), "recovered after {:?}", begun.elapsed());
            thread::sleep(Duration::from_millis(500));
        });
        println!("{ends:?}, {} connections in all", self.proxy.stats().len());
        for peer in &mut self.peers {
            peer.pool.expect(&self.initiator.pool, &megabytes(2));
            peer.pool.verify().assert_clean("a peer of a starved daemon");
        }
        ends
    }
}

/// D3b, for less than the silence that ends sessions: its peers' beats are waiting in its inbox, and until it has read
/// them it judges nobody. Nothing at all is lost.
#[test]
fn d3b_a_daemon_starved_for_a_while_buries_nobody() {
    let mut load = Load::new("");
    done(load.initiator.engine.transfer(load.write(0, &megabytes(1))), &megabytes(1));
    let connections = load.proxy.stats().len();
    let ends = load.starve(Duration::from_millis(2000));
    assert_eq!(ends.failed.into_inner().unwrap(), [], "somebody was buried alive");
    assert_eq!(ends.again.into_inner(), 0, "something had to be sent again");
    assert_eq!(load.proxy.stats().len(), connections, "the session was opened anew");
}

/// D3b, for longer: its peers have buried it, so it ends its sessions itself, opens them once, and nobody is called dead
/// that was not.
#[test]
fn d3b_a_daemon_starved_for_long_fences_itself_and_starts_no_storm() {
    let (config, length) = match harness::long() {
        true => ("", Duration::from_secs(5)),
        false => ("[session]\nheartbeat_ms = 250\nsilence_ms = 1500\n", Duration::from_millis(2500)),
    };
    let mut load = Load::new(config);
    done(load.initiator.engine.transfer(load.write(0, &megabytes(1))), &megabytes(1));
    let connections = load.proxy.stats().len();
    let ends = load.starve(length);
    let failed = ends.failed.into_inner().unwrap();
    assert!(!failed.contains(&Reason::PeerSilent), "a living peer was called silent: {failed:?}");
    // A control connection and a lane; and as many again where a first try met what the peer was still clearing away.
    let opened = load.proxy.stats().len() - connections;
    assert!((1..=8).contains(&opened), "{opened} connections to come back");
    assert!(ends.done.into_inner() > 0);
}

/// Latency is no fault: slow answers in both directions cost time and nothing else.
#[test]
fn d4_a_long_way_costs_time_and_no_attempt() {
    let mut faulty = Faulty::new(16 * MIB);
    for toward in [Toward::Target, Toward::Client] {
        faulty.proxy.delay(toward, Duration::from_millis(15));
    }
    let moves = megabytes(2);
    let report = faulty.works(&moves);
    assert_eq!((report.attempts, report.bytes_resent), (1, 0), "{report:?}");
    let report = done(faulty.transfer(faulty.request(Op::Read, &moves)), &moves);
    assert_eq!(report.attempts, 1, "{report:?}");
    faulty.expect(Op::Read, &moves);
    faulty.scene.verify("over a long way");
}

/// Bytes vanish from the stream of a lane while its connection lives. Whatever stands there then is no part, or never
/// becomes whole: the lane ends, by a refusal or by patience, and what it carried is sent again.
#[test]
fn b1_bytes_that_vanish_cost_the_lane_and_no_byte_is_wrong() {
    let mut faulty = Faulty::with_config(16 * MIB, &format!("{CONFIG}[retry]\nprogress_timeout_ms = 1000\n"));
    let moves = Arrangement::Adjacent.moves(6, MIB);
    // In the middle of a payload; in the last part, behind which nothing follows.
    for (at, bytes) in [(2 * MIB, 100), (MIB, 1), (5 * MIB + MIB / 2, 70_000)] {
        let lost = faulty.lanes_lost();
        faulty.proxy.script(Rule { kind: Carries::Data, fault: Fault::Drop { at, bytes }, times: 1 });
        // A lane of its own, so that it passes its byte.
        faulty.proxy.cut_all(harness::proxy::Cut::Fin);
        let report = faulty.works(&moves);
        println!("{bytes} bytes from {at} on vanished: {} attempts", report.attempts);
        assert!(report.bytes_resent > 0, "{report:?}");
        assert!(faulty.lanes_lost() > lost, "a lane that lost bytes lives");
    }
}
