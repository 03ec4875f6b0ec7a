//! All metrics of the daemon, registered once.
//!
//! Counters are raised where something ends; what already has an owner that counts (the registrar) is sampled
//! when somebody asks. Names: `kvferry_<what>_<unit>`, `_total` for counters.

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use super::labels::{
    Build, Ending, InPhase, OfWhat, OpLabel, OutcomeLabel, PathLabel, PathOp, PathReason, Phase, ReasonLabel,
    RevokedLabel, SessionState, State, Why,
};
use crate::domain::{Op, PathKind, Reason, Report};

/// What the registrar has counted so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegistrarSample {
    /// Driver calls that wait.
    pub queued: u64,
    /// Driver calls in progress.
    pub in_progress: u64,
    /// Most driver calls ever in progress at once (I7: 1 under the default policy).
    pub high_water: u64,
    /// Driver calls ended.
    pub calls: u64,
    /// Those among them that failed.
    pub failures: u64,
    /// Time that ended calls waited, summed.
    pub waited: Duration,
    /// Time that ended calls took, summed.
    pub busy: Duration,
}

/// All metrics.
pub struct Metrics {
    registry: Registry,
    transfers: Family<Ending, Counter>,
    transfer_bytes: Family<PathOp, Counter>,
    resent_bytes: Family<PathOp, Counter>,
    retries: Family<PathOp, Counter>,
    phases: Family<InPhase, Histogram>,
    sessions: Family<State, Gauge>,
    open_lanes: Family<PathOp, Gauge>,
    closed_lanes: Family<PathReason, Counter>,
    refused_handshakes: Family<Why, Counter>,
    revocations: Family<OfWhat, Counter>,
    refused_revocations: Counter,
    /// Parts that targets refused because something was revoked.
    pub revoked_parts: Counter,
    /// Parts whose table or payload did not fit its checksum when it arrived.
    pub damaged_parts: Counter,
    /// Connections closed before they had said what they are.
    pub unclassified: Counter,
    /// Writes of the record of ports that failed.
    pub unrecorded_ports: Counter,
    /// Engines attached now.
    pub engines: Gauge,
    /// Transfers received and not ended.
    pub active_transfers: Gauge,
    /// Regions registered now.
    pub regions: Gauge,
    /// Bytes registered now.
    pub region_bytes: Gauge,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// All at zero. `registrar` is asked whenever the metrics are read.
    pub fn new(registrar: impl Fn() -> RegistrarSample + Send + Sync + 'static) -> Arc<Self> {
        let mut metrics = Self {
            registry: Registry::with_prefix("kvferry"),
            transfers: Family::default(),
            transfer_bytes: Family::default(),
            resent_bytes: Family::default(),
            retries: Family::default(),
            phases: Family::new_with_constructor(phase_histogram),
            sessions: Family::default(),
            open_lanes: Family::default(),
            closed_lanes: Family::default(),
            refused_handshakes: Family::default(),
            revocations: Family::default(),
            refused_revocations: Counter::default(),
            revoked_parts: Counter::default(),
            damaged_parts: Counter::default(),
            unclassified: Counter::default(),
            unrecorded_ports: Counter::default(),
            engines: Gauge::default(),
            active_transfers: Gauge::default(),
            regions: Gauge::default(),
            region_bytes: Gauge::default(),
        };
        metrics.register(registrar);
        Arc::new(metrics)
    }

    fn register(&mut self, registrar: impl Fn() -> RegistrarSample + Send + Sync + 'static) {
        let r = &mut self.registry;
        let build = Info::new(Build { version: env!("CARGO_PKG_VERSION") });
        r.register("build", "The running daemon", build);
        r.register("transfers", "Transfers that ended", self.transfers.clone());
        r.register("active_transfers", "Transfers received and not ended", self.active_transfers.clone());
        let bytes = self.transfer_bytes.clone();
        r.register_with_unit("transfer", "Payload applied and acknowledged", Unit::Bytes, bytes);
        let bytes = self.resent_bytes.clone();
        r.register_with_unit("resent", "Payload sent again after a loss", Unit::Bytes, bytes);
        r.register("transfer_retries", "Losses charged to transfers", self.retries.clone());
        let phases = self.phases.clone();
        r.register_with_unit("transfer_phase", "Where the time of transfers went", Unit::Seconds, phases);
        r.register("sessions", "Sessions by state", self.sessions.clone());
        r.register("open_lanes", "Lanes open now", self.open_lanes.clone());
        r.register("closed_lanes", "Lanes that closed", self.closed_lanes.clone());
        r.register("refused_handshakes", "Sessions refused while opening", self.refused_handshakes.clone());
        r.register("revocations", "Revocations by engines", self.revocations.clone());
        r.register(
            "refused_revocations",
            "Tags not revoked because too many are",
            self.refused_revocations.clone(),
        );
        r.register(
            "revoked_parts",
            "Parts that hit a revocation at their target",
            self.revoked_parts.clone(),
        );
        r.register(
            "damaged_parts",
            "Parts that arrived with a table or payload that does not fit its checksum",
            self.damaged_parts.clone(),
        );
        r.register(
            "unclassified_connections",
            "Connections closed before they had said what they are",
            self.unclassified.clone(),
        );
        r.register(
            "port_record_failures",
            "Writes of the record of ports that failed",
            self.unrecorded_ports.clone(),
        );
        r.register("attached_engines", "Engines attached now", self.engines.clone());
        r.register("registered_regions", "Regions registered now", self.regions.clone());
        r.register_with_unit("registered", "Memory registered now", Unit::Bytes, self.region_bytes.clone());
        r.register_collector(Box::new(RegistrarCollector(registrar)));
    }

    /// A transfer's terminal report, or its UNSETTLED one, was given.
    pub fn transfer_ended(&self, op: Op, report: &Report) {
        let way = way(report.path, op);
        let ending = Ending {
            outcome: OutcomeLabel(report.outcome),
            reason: ReasonLabel(report.failure.as_ref().map(|failure| failure.reason)),
            path: PathLabel(report.path),
        };
        self.transfers.get_or_create(&ending).inc();
        self.transfer_bytes.get_or_create(&way).inc_by(report.bytes_done);
        self.resent_bytes.get_or_create(&way).inc_by(report.bytes_resent);
        self.retries.get_or_create(&way).inc_by(u64::from(report.attempts.saturating_sub(1)));
        let times = report.timings;
        for (phase, time) in
            [(Phase::Queued, times.queued), (Phase::Moving, times.moving), (Phase::Settling, times.settling)]
        {
            self.phases.get_or_create(&InPhase { phase }).observe(time.as_secs_f64());
        }
    }

    /// A session was made (`from` nothing), changed its state, or is gone (`to` nothing).
    pub fn session_changed(&self, from: Option<SessionState>, to: Option<SessionState>) {
        if let Some(state) = from {
            self.sessions.get_or_create(&State { state }).dec();
        }
        if let Some(state) = to {
            self.sessions.get_or_create(&State { state }).inc();
        }
    }

    /// A lane was opened, on either side.
    pub fn lane_opened(&self, path: PathKind, op: Op) {
        self.open_lanes.get_or_create(&way(Some(path), op)).inc();
    }

    /// A lane that was opened has closed.
    pub fn lane_closed(&self, path: PathKind, op: Op, reason: Reason) {
        self.open_lanes.get_or_create(&way(Some(path), op)).dec();
        let why = PathReason { path: PathLabel(Some(path)), reason: ReasonLabel(Some(reason)) };
        self.closed_lanes.get_or_create(&why).inc();
    }

    /// A session was refused while it was being opened, by this side.
    pub fn handshake_refused(&self, reason: Reason) {
        self.refused_handshakes.get_or_create(&Why { reason: ReasonLabel(Some(reason)) }).inc();
    }

    /// An engine has revoked ranges.
    pub fn ranges_revoked(&self) {
        self.revocations.get_or_create(&OfWhat { of: RevokedLabel::Ranges }).inc();
    }

    /// An engine has revoked a tag, or was refused because too many are.
    pub fn tag_revoked(&self, taken: bool) {
        match taken {
            true => self.revocations.get_or_create(&OfWhat { of: RevokedLabel::Tag }).inc(),
            false => self.refused_revocations.inc(),
        };
    }

    /// Everything, in the OpenMetrics text format.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a String takes everything that is written to it");
        out
    }
}

fn way(path: Option<PathKind>, op: Op) -> PathOp {
    PathOp { path: PathLabel(path), op: OpLabel(op) }
}

/// From 10 us, about the least a call takes, by threes to about a minute.
fn phase_histogram() -> Histogram {
    Histogram::new(exponential_buckets(10e-6, 3.0, 15))
}

struct RegistrarCollector<F>(F);

impl<F> fmt::Debug for RegistrarCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistrarCollector")
    }
}

impl<F: Fn() -> RegistrarSample + Send + Sync + 'static> Collector for RegistrarCollector<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sample = (self.0)();
        let gauges = [
            ("registrar_queued_calls", "Driver calls that wait", sample.queued),
            ("registrar_active_calls", "Driver calls in progress", sample.in_progress),
            ("registrar_most_active_calls", "Most driver calls ever in progress at once", sample.high_water),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("registrar_calls", "Driver calls ended", sample.calls),
            ("registrar_failed_calls", "Driver calls that failed", sample.failures),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let times = [
            ("registrar_wait", "Time that ended driver calls waited", sample.waited),
            ("registrar_call", "Time that ended driver calls took", sample.busy),
        ];
        for (name, help, time) in times {
            let counter = ConstCounter::new(time.as_secs_f64());
            let seconds = Some(&Unit::Seconds);
            counter.encode(encoder.encode_descriptor(name, help, seconds, counter.metric_type())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Failure, Outcome, PeerHalf, Timings, TransferId};

    fn report() -> Report {
        Report {
            transfer: TransferId([0; 16]),
            outcome: Outcome::Failed,
            peer_half: PeerHalf::Confirmed,
            failure: Some(Failure::plain(Reason::ConnectionLost)),
            slices: 10,
            slices_done: 5,
            bytes: 1000,
            bytes_done: 500,
            bytes_resent: 20,
            attempts: 3,
            path: Some(PathKind::Tcp),
            timings: Timings { moving: Duration::from_millis(2), ..Timings::default() },
        }
    }

    /// Metrics with every series in use.
    fn used() -> Arc<Metrics> {
        let sample = RegistrarSample {
            queued: 4,
            in_progress: 1,
            high_water: 1,
            calls: 9,
            failures: 2,
            waited: Duration::from_millis(1500),
            busy: Duration::from_millis(250),
        };
        let metrics = Metrics::new(move || sample);
        metrics.transfer_ended(Op::Write, &report());
        metrics.session_changed(None, Some(SessionState::Idle));
        metrics.session_changed(Some(SessionState::Idle), Some(SessionState::Healthy));
        metrics.lane_opened(PathKind::Tcp, Op::Read);
        metrics.lane_opened(PathKind::Tcp, Op::Read);
        metrics.lane_closed(PathKind::Tcp, Op::Read, Reason::PeerSilent);
        metrics.handshake_refused(Reason::PeerRestarted);
        metrics.unclassified.inc();
        metrics.ranges_revoked();
        metrics.tag_revoked(true);
        metrics.tag_revoked(false);
        metrics.revoked_parts.inc_by(3);
        metrics.damaged_parts.inc();
        metrics
    }

    #[test]
    fn what_happened_is_shown() {
        let text = used().to_text();
        for line in [
            "kvferry_transfers_total{outcome=\"failed\",reason=\"connection_lost\",path=\"tcp\"} 1",
            "kvferry_transfer_bytes_total{path=\"tcp\",op=\"write\"} 500",
            "kvferry_resent_bytes_total{path=\"tcp\",op=\"write\"} 20",
            "kvferry_transfer_retries_total{path=\"tcp\",op=\"write\"} 2",
            "kvferry_transfer_phase_seconds_count{phase=\"moving\"} 1",
            "kvferry_sessions{state=\"idle\"} 0",
            "kvferry_sessions{state=\"healthy\"} 1",
            "kvferry_open_lanes{path=\"tcp\",op=\"read\"} 1",
            "kvferry_closed_lanes_total{path=\"tcp\",reason=\"peer_silent\"} 1",
            "kvferry_refused_handshakes_total{reason=\"peer_restarted\"} 1",
            "kvferry_revocations_total{of=\"ranges\"} 1",
            "kvferry_revocations_total{of=\"tag\"} 1",
            "kvferry_refused_revocations_total 1",
            "kvferry_revoked_parts_total 3",
            "kvferry_damaged_parts_total 1",
            "kvferry_unclassified_connections_total 1",
            "kvferry_registrar_queued_calls 4",
            "kvferry_registrar_most_active_calls 1",
            "kvferry_registrar_calls_total 9",
            "kvferry_registrar_failed_calls_total 2",
            "kvferry_registrar_wait_seconds_total 1.5",
            "kvferry_registrar_call_seconds_total 0.25",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    /// A name says what is counted and in which unit. Gauges of things end in the things.
    #[test]
    fn every_name_has_the_prefix_and_a_unit() {
        let things = ["_sessions", "_lanes", "_engines", "_regions", "_transfers", "_calls"];
        let text = used().to_text();
        let mut names = 0;
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').expect("a name and a type");
            assert!(name.starts_with("kvferry_"), "{name}");
            let has_unit = match kind {
                // The encoder adds _total and _info to the samples of these.
                "counter" | "info" => true,
                "histogram" => name.ends_with("_seconds"),
                _ => name.ends_with("_bytes") || things.iter().any(|thing| name.ends_with(thing)),
            };
            assert!(has_unit, "{name} ({kind})");
            names += 1;
        }
        assert_eq!(names, 27);
    }
}
