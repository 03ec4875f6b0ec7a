//! Which RDMA devices ("rails") an engine may use: the strings that sglang takes for it, judged as sglang does.
//!
//! A comma list names devices for every GPU, a JSON object those of each. Errors say what sglang's say, so that what
//! people find out about one helps with the other.
//!
//! Not here: which devices there are, and the file that a map may come from. Both are passed in.

use std::{collections::BTreeSet, fmt};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::domain::{Failure, Reason};

/// Longest name of a device, in bytes: the kernel's, without the terminating zero.
const MAX_NAME: usize = 63;

/// How much of a map an error repeats, in characters.
const SHOWN: usize = 200;

/// A rail map whose form is right. Whether its devices exist is asked by [`RailMap::rails`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RailMap(Groups);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Groups {
    Every(Group),
    /// In the order in which they were written.
    ByGpu(Vec<(u32, Group)>),
}

/// One comma list.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Group {
    devices: Vec<String>,
    repeats: bool,
}

/// What the answer depends on.
#[derive(Clone, Copy, Debug)]
pub struct RailQuery<'a> {
    /// The engine's GPU, as its process numbers them.
    pub gpu: Option<u32>,
    /// The devices of this node.
    pub available: &'a [String],
    /// Devices that are not there are refused. False for an engine that does not ask for rdma: it may run where
    /// there are none.
    pub must_exist: bool,
}

/// The rails of one engine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rails {
    /// In order of preference.
    pub devices: Vec<String>,
    /// What the map names, for any GPU, and the node does not have.
    pub absent: Vec<String>,
    /// A device is named twice in one list; the second time counts for nothing.
    pub repeats: bool,
}

/// What is wrong with a rail map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RailError {
    /// Nothing but blanks.
    Empty,
    /// A list without a device; of this GPU, or of all.
    EmptyList(Option<u32>),
    /// It begins like a JSON object and is none.
    Json {
        /// The map, or the beginning of it.
        map: String,
        /// What is wrong, and where.
        wrong: String,
    },
    /// JSON, but not an object.
    NotAMapping,
    /// A key that is no number, or a value that is no text.
    Entry,
    /// An object without entries.
    NoEntries,
    /// A path, where only content is taken.
    Path,
    /// The map has lists by GPU, and this one has none.
    NoList {
        /// The engine's.
        gpu: u32,
        /// Those that have one.
        known: Vec<u32>,
    },
    /// The map has lists by GPU, and the engine does not say which it uses.
    NoGpu,
    /// Devices that are not there, or cannot be.
    Invalid {
        /// Whose list names them; of all GPUs where `None`.
        gpu: Option<u32>,
        /// Those.
        invalid: Vec<String>,
        /// What there is.
        available: Vec<String>,
    },
}

impl RailMap {
    /// A comma list, or a JSON object from GPU to comma list.
    pub fn parse(text: &str) -> Result<Self, RailError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(RailError::Empty);
        }
        // The suffix is looked at first: `{...}.json` is a path.
        if Self::is_path(text) {
            return Err(RailError::Path);
        }
        if text.starts_with('{') {
            return Self::parse_json(text);
        }
        Group::parse(None, text).map(|group| Self(Groups::Every(group)))
    }

    /// Whether the text names a file that holds the map.
    pub fn is_path(text: &str) -> bool {
        text.trim().ends_with(".json")
    }

    /// The content of a file: a JSON object from GPU to comma list.
    pub fn parse_json(text: &str) -> Result<Self, RailError> {
        let entries: Entries = serde_json::from_str(text).map_err(|error| {
            if error.is_data() {
                return RailError::NotAMapping;
            }
            RailError::Json { map: text.chars().take(SHOWN).collect(), wrong: error.to_string() }
        })?;
        let mut lists: Vec<(u32, String)> = Vec::new();
        for (key, value) in entries.0 {
            let (Some(gpu), Value::String(list)) = (gpu(&key), value) else { return Err(RailError::Entry) };
            // "0" and "00" are one GPU: the last one wins.
            match lists.iter_mut().find(|(known, _)| *known == gpu) {
                Some((_, known)) => *known = list,
                None => lists.push((gpu, list)),
            }
        }
        let group = |(gpu, list): (u32, String)| Ok((gpu, Group::parse(Some(gpu), &list)?));
        let groups: Vec<_> = lists.into_iter().map(group).collect::<Result<_, RailError>>()?;
        if groups.is_empty() { Err(RailError::NoEntries) } else { Ok(Self(Groups::ByGpu(groups))) }
    }

    /// Whether it has lists by GPU.
    pub fn is_by_gpu(&self) -> bool {
        matches!(self.0, Groups::ByGpu(_))
    }

    /// The rails of an engine. All lists of the map are judged, not only its own: a wrong one is a mistake now, not
    /// when its GPU is first used.
    pub fn rails(&self, query: RailQuery<'_>) -> Result<Rails, RailError> {
        let mut absent = BTreeSet::new();
        for (gpu, group) in self.groups() {
            let missing = |device: &&String| !query.available.contains(*device);
            let refused = |device: &&String| query.must_exist || !can_be_a_device(device);
            let missing: Vec<&String> = group.devices.iter().filter(missing).collect();
            if missing.iter().copied().any(|device| refused(&device)) {
                let invalid = missing.into_iter().filter(refused).cloned().collect();
                return Err(RailError::Invalid { gpu, invalid, available: query.available.to_vec() });
            }
            absent.extend(missing.into_iter().cloned());
        }
        let group = self.group(query.gpu)?;
        Ok(Rails {
            devices: group.devices.clone(),
            absent: absent.into_iter().collect(),
            repeats: self.groups().any(|(_, group)| group.repeats),
        })
    }

    fn groups(&self) -> impl Iterator<Item = (Option<u32>, &Group)> {
        let (every, by_gpu): (_, &[(u32, Group)]) = match &self.0 {
            Groups::Every(group) => (Some((None, group)), &[]),
            Groups::ByGpu(groups) => (None, groups),
        };
        every.into_iter().chain(by_gpu.iter().map(|(gpu, group)| (Some(*gpu), group)))
    }

    fn group(&self, gpu: Option<u32>) -> Result<&Group, RailError> {
        let groups = match &self.0 {
            Groups::Every(group) => return Ok(group),
            Groups::ByGpu(groups) => groups,
        };
        let gpu = gpu.ok_or(RailError::NoGpu)?;
        let found = groups.iter().find(|(known, _)| *known == gpu);
        let known = || groups.iter().map(|(known, _)| *known).collect();
        found.map(|(_, group)| group).ok_or_else(|| RailError::NoList { gpu, known: known() })
    }
}

impl Group {
    fn parse(gpu: Option<u32>, list: &str) -> Result<Self, RailError> {
        let named = || list.split(',').map(|device| device.trim()).filter(|device| !device.is_empty());
        let mut seen = BTreeSet::new();
        let devices: Vec<String> =
            named().filter(|device| seen.insert(*device)).map(ToOwned::to_owned).collect();
        if devices.is_empty() {
            return Err(RailError::EmptyList(gpu));
        }
        let repeats = named().count() > devices.len();
        Ok(Self { devices, repeats })
    }
}

/// What a person, a table and a log line can take as the name of a device.
fn can_be_a_device(name: &str) -> bool {
    name.len() <= MAX_NAME && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
}

/// Digits and nothing else: no sign, no blank.
fn gpu(key: &str) -> Option<u32> {
    key.chars().all(|c| c.is_ascii_digit()).then(|| key.parse().ok()).flatten()
}

/// A JSON object in the order in which it was written, which `serde_json::Map` would forget.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder)
    }
}

struct InOrder;

impl<'de> Visitor<'de> for InOrder {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

/// `all GPUs` or `GPU 3`.
struct Whose(Option<u32>);

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(gpu) => write!(f, "GPU {gpu}"),
            None => f.write_str("all GPUs"),
        }
    }
}

impl fmt::Display for RailError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("No valid IB devices specified"),
            Self::EmptyList(gpu) => write!(f, "No valid IB devices specified for {}", Whose(*gpu)),
            Self::Json { map, wrong } => write!(f, "Invalid JSON mapping: {map} ({wrong})"),
            Self::NotAMapping => {
                f.write_str("Invalid format: expected a mapping from GPU id to IB device string")
            }
            Self::Entry => f.write_str(
                "Invalid format: keys must be integers (or string representations of integers) and values must be \
                 strings",
            ),
            Self::NoEntries => f.write_str("No valid GPU mappings found in JSON"),
            Self::Path => f.write_str(
                "a file is read where its path means something: by the client library, which sends its content",
            ),
            Self::NoList { gpu, known } => {
                write!(f, "No IB devices configured for GPU {gpu}. Available GPUs: {known:?}")
            }
            Self::NoGpu => f.write_str("the map has devices by GPU, and the engine does not name its GPU (gpu_id)"),
            Self::Invalid { gpu, invalid, available } => write!(
                f,
                "Invalid IB devices specified for {}: {invalid:?}. Available devices: {available:?}",
                Whose(*gpu)
            ),
        }
    }
}

impl RailError {
    /// BAD_ARGUMENT that names the field or key at fault.
    pub fn of(self, field: &str) -> Failure {
        Failure::new(Reason::BadArgument, format!("{field}: {self}"))
    }
}

#[cfg(test)]
mod tests;
