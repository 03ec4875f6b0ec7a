//! A rail map on its way to the daemon. A path means something only where the engine runs, so a file is read here and
//! its content sent: the daemon opens nothing that an engine names.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::Error;

/// Longest file, in bytes; a daemon takes no longer map.
const LONGEST: u64 = 16_384;

/// As it is, unless it is the path of a `.json` file: then the content, which is a JSON object.
///
/// # Errors
/// BAD_ARGUMENT in sglang's words. All else about a map is the daemon's to judge.
pub(crate) fn inline(map: String) -> Result<String, Error> {
    if !map.trim().ends_with(".json") {
        return Ok(map);
    }
    content(map.trim()).map_err(|wrong| Error::argument(format!("rail_map: {wrong}"), None))
}

fn content(path: &str) -> Result<String, String> {
    // Not a pipe, for example, which would be waited for.
    if !Path::new(path).is_file() {
        return Err(format!("File {path} does not exist."));
    }
    let text = read(path).map_err(|error| format!("Failed to read JSON file {path}: {error}"))?;
    match serde_json::from_str(&text) {
        Ok(serde_json::Value::Object(_)) => Ok(text.trim().to_owned()),
        Ok(_) => Err(format!("{path}: Invalid format: expected a mapping from GPU id to IB device string")),
        Err(error) => Err(format!("Failed to parse JSON content from file {path}: {error}")),
    }
}

fn read(path: &str) -> io::Result<String> {
    let mut text = String::new();
    let bytes = File::open(path)?.take(LONGEST + 1).read_to_string(&mut text)?;
    if bytes as u64 > LONGEST {
        return Err(io::Error::other(format!("more than {LONGEST} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;

    fn refusal(map: &str) -> String {
        match inline(map.to_owned()) {
            Err(Error::Refused(failure)) if failure.reason == Reason::BadArgument => failure.message,
            other => panic!("{map:?} gave {other:?}"),
        }
    }

    #[test]
    fn what_is_no_path_is_the_daemons_to_judge() {
        for map in ["", "mlx5_0, mlx5_1", r#"{"0":"mlx5_0"}"#, "{", "rails.JSON"] {
            assert_eq!(inline(map.to_owned()).unwrap(), map);
        }
    }

    #[test]
    fn a_file_is_sent_as_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rails.json");
        std::fs::write(&path, "\n {\"1\": \"mlx5_2\", \"00\": \"mlx5_0\"} \n").unwrap();
        let sent = inline(format!("  {} ", path.display())).unwrap();
        assert_eq!(sent, r#"{"1": "mlx5_2", "00": "mlx5_0"}"#, "as written: of two spellings the last wins");
    }

    #[test]
    fn a_file_that_is_not_there_or_no_mapping() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rails.json");
        let name = path.display().to_string();
        assert_eq!(refusal(&name), format!("rail_map: File {name} does not exist."));
        // The suffix is looked at before the brace.
        assert_eq!(refusal("{}.json"), "rail_map: File {}.json does not exist.");
        let folder_name = folder.path().join("folder.json");
        std::fs::create_dir(&folder_name).unwrap();
        assert!(refusal(&folder_name.display().to_string()).ends_with("does not exist."));
        for (content, says) in [
            ("{0: 1}", format!("rail_map: Failed to parse JSON content from file {name}: ")),
            ("", format!("rail_map: Failed to parse JSON content from file {name}: ")),
            ("[]", format!("rail_map: {name}: Invalid format: expected a mapping")),
            (
                &" ".repeat(20_000),
                format!("rail_map: Failed to read JSON file {name}: more than 16384 bytes"),
            ),
        ] {
            std::fs::write(&path, content).unwrap();
            let told = refusal(&name);
            assert!(told.starts_with(&says), "{told}");
        }
        std::fs::write(&path, b"{\"0\": \"\xff\"}").unwrap();
        assert!(refusal(&name).starts_with(&format!("rail_map: Failed to read JSON file {name}: ")));
    }
}
