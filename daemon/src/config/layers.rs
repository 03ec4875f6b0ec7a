//! The layers and who set what.
//!
//! Each layer is taken apart into `section.key = value` before it is merged, so that a key that does not exist,
//! or a value of the wrong type, can be named together with the file, variable or flag that brought it. The
//! `config` crate alone would name only the key.

use std::{collections::BTreeMap, ffi::OsString, path::Path};

use config::{Environment, FileFormat, Map, Source, Value, ValueKind};

use super::{Config, ConfigError, ENV_PREFIX, Flags, Problem};

/// Which layer set a key, by key; keys that none set are not there.
pub(super) type Origins = BTreeMap<String, String>;

/// Settings on their way to becoming a [`Config`]; later layers win.
pub(super) struct Layers {
    known: BTreeMap<String, toml::Value>,
    values: BTreeMap<String, Value>,
    origins: Origins,
    problems: Vec<Problem>,
}

impl Default for Layers {
    fn default() -> Self {
        let known = known_keys(&Config::default());
        Self { known, values: BTreeMap::new(), origins: Origins::new(), problems: Vec::new() }
    }
}

impl Layers {
    /// A TOML file, which must be there.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
        let table = config::File::from_str(&text, FileFormat::Toml)
            .collect()
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })?;
        for (key, value) in flatten(table) {
            self.set(key, value, path.display().to_string());
        }
        Ok(())
    }

    /// Variables that begin with [`ENV_PREFIX`]; all others are nobody's business.
    pub(super) fn add_environment(
        &mut self,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<(), ConfigError> {
        let mut ours = Map::new();
        for (name, value) in environment {
            let Ok(name) = name.into_string() else { continue };
            if !name.starts_with(ENV_PREFIX) {
                continue;
            }
            match value.into_string() {
                Ok(value) => drop(ours.insert(name, value)),
                Err(_) => self.complain(env_key(&name), name.clone(), "the value is not Unicode".to_owned()),
            }
        }
        let names: BTreeMap<String, String> = ours.keys().map(|name| (env_key(name), name.clone())).collect();
        let mut source = Environment::with_prefix(ENV_PREFIX.trim_end_matches('_'))
            .prefix_separator("__")
            .separator("__")
            .list_separator(",")
            .try_parsing(true)
            .source(Some(ours));
        for (key, _) in self.known.iter().filter(|(_, default)| default.is_array()) {
            source = source.with_list_parse_key(key);
        }
        // Collecting strings cannot fail; if it ever does, the message is all there is.
        let table = source.collect().map_err(|error| {
            let problem = Problem {
                key: ENV_PREFIX.to_owned(),
                origin: "the environment".to_owned(),
                message: error.to_string(),
            };
            ConfigError::Keys(vec![problem])
        })?;
        for (key, value) in table {
            let value =
                if self.known.get(&key).is_some_and(toml::Value::is_array) { numbers(value) } else { value };
            let origin = names.get(&key).cloned().unwrap_or_else(|| "the environment".to_owned());
            self.set(key, value, origin);
        }
        Ok(())
    }

    /// Flags that were given.
    pub(super) fn add_flags(&mut self, flags: &Flags) {
        for given in flags.given() {
            self.set(given.key.to_owned(), Value::from(given.value), given.flag.to_owned());
        }
    }

    /// The settings and who set them, or every problem seen on the way.
    pub(super) fn merge(self) -> Result<(Config, Origins), ConfigError> {
        if !self.problems.is_empty() {
            return Err(ConfigError::Keys(self.problems));
        }
        let merged = self.values.iter().try_fold(config::Config::builder(), |builder, (key, value)| {
            builder.set_override(key, value.clone())
        });
        let config = merged.and_then(|builder| builder.build()).and_then(config::Config::try_deserialize);
        match config {
            Ok(config) => Ok((config, self.origins)),
            Err(error) => Err(ConfigError::Keys(vec![locate(&error, &self.origins)])),
        }
    }

    fn set(&mut self, key: String, value: Value, origin: String) {
        match self.known.get(&key) {
            None => self.complain(key, origin, "there is no such key".to_owned()),
            Some(default) if !same_type(default, &value.kind) => {
                let message = format!("expected {}, found {}", expected(default), shown(&value));
                self.complain(key, origin, message);
            }
            Some(_) => {
                self.origins.insert(key.clone(), origin);
                self.values.insert(key, value);
            }
        }
    }

    fn complain(&mut self, key: String, origin: String, message: String) {
        self.problems.push(Problem { key, origin, message });
    }
}

/// Every key with its default.
pub(super) fn known_keys(config: &Config) -> BTreeMap<String, toml::Value> {
    let table = toml::Table::try_from(config).expect("the settings are tables of plain values");
    let mut keys = BTreeMap::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(section) => {
                keys.extend(section.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)));
            }
            value => drop(keys.insert(name, value)),
        }
    }
    keys
}

fn flatten(table: Map<String, Value>) -> Vec<(String, Value)> {
    let mut keys = Vec::new();
    for (name, value) in table {
        match value.kind {
            ValueKind::Table(section) => {
                // A section that is not known is a problem even when it is empty.
                if section.is_empty() && !is_section(&name) {
                    keys.push((name.clone(), Value::from("")));
                }
                keys.extend(
                    flatten(section).into_iter().map(|(key, value)| (format!("{name}.{key}"), value)),
                );
            }
            _ => keys.push((name, value)),
        }
    }
    keys
}

fn is_section(name: &str) -> bool {
    let prefix = format!("{name}.");
    known_keys(&Config::default()).keys().any(|key| key.starts_with(&prefix))
}

/// The elements of a list from the environment, which come as text, as numbers where they are.
fn numbers(value: Value) -> Value {
    let ValueKind::Array(elements) = value.kind else { return value };
    let number = |element: Value| match element.clone().into_string().map(|text| text.trim().parse::<i64>()) {
        Ok(Ok(number)) => Value::from(number),
        _ => element,
    };
    // An empty variable is an empty list, not a list of one empty text.
    let elements =
        elements.into_iter().filter(|e| e.clone().into_string().is_ok_and(|text| !text.is_empty()));
    Value::from(elements.map(number).collect::<Vec<_>>())
}

fn env_key(name: &str) -> String {
    name[ENV_PREFIX.len()..].replace("__", ".").to_lowercase()
}

/// The `config` crate would take `true` for 1 and 1.5 for 2.
fn same_type(default: &toml::Value, found: &ValueKind) -> bool {
    match default {
        toml::Value::Integer(_) => matches!(found, ValueKind::I64(_) | ValueKind::U64(_)),
        toml::Value::Boolean(_) => matches!(found, ValueKind::Boolean(_)),
        toml::Value::Array(_) => matches!(found, ValueKind::Array(_)),
        // A text in the environment that looks like a number has been parsed as one; it can be a text again.
        _ => !matches!(found, ValueKind::Array(_) | ValueKind::Table(_) | ValueKind::Nil),
    }
}

fn expected(default: &toml::Value) -> &'static str {
    match default {
        toml::Value::Integer(_) => "a whole number",
        toml::Value::Boolean(_) => "true or false",
        toml::Value::Array(_) => "a list",
        _ => "a text",
    }
}

fn shown(value: &Value) -> String {
    match &value.kind {
        ValueKind::String(text) => format!("{text:?}"),
        kind => kind.to_string(),
    }
}

/// Takes key and complaint out of an error of the `config` crate.
fn locate(error: &config::ConfigError, origins: &Origins) -> Problem {
    let (key, message) = match error {
        config::ConfigError::Type { unexpected, expected, key, .. } => {
            (key.clone(), format!("expected {expected}, found {unexpected}"))
        }
        config::ConfigError::At { error, key, .. } => (key.clone(), error.to_string()),
        other => (None, other.to_string()),
    };
    let key = key.unwrap_or_default();
    // An element of a list is set by whoever set the list.
    let whole = key.split('[').next().unwrap_or_default();
    let origin = origins.get(whole).cloned().unwrap_or_else(|| "the configuration".to_owned());
    Problem { key, origin, message }
}
