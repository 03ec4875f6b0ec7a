//! The rows of sglang's table, and what an engine without rdma may name.

use super::*;

const HERE: [&str; 3] = ["mlx5_0", "mlx5_1", "mlx5_2"];

fn here() -> Vec<String> {
    HERE.map(str::to_owned).to_vec()
}

/// Judged as an engine with rdma, on a node with three devices.
fn rails(text: &str, gpu: u32) -> Result<Rails, RailError> {
    let available = here();
    RailMap::parse(text)?.rails(RailQuery { gpu: Some(gpu), available: &available, must_exist: true })
}

fn devices(text: &str, gpu: u32) -> Vec<String> {
    let rails = rails(text, gpu).unwrap_or_else(|error| panic!("{text:?} for GPU {gpu}: {error}"));
    assert_eq!(rails.absent, Vec::<String>::new());
    rails.devices
}

fn error(text: &str, gpu: u32) -> String {
    match rails(text, gpu) {
        Err(error) => error.to_string(),
        Ok(rails) => panic!("{text:?} for GPU {gpu} gave {rails:?}"),
    }
}

#[test]
fn blanks_are_no_devices() {
    for blank in ["", " ", "\t\n "] {
        assert_eq!(error(blank, 0), "No valid IB devices specified", "{blank:?}");
    }
    assert_eq!(error(" , ,", 0), "No valid IB devices specified for all GPUs");
}

#[test]
fn a_list_is_the_same_for_every_gpu() {
    for gpu in [0, 1, 7] {
        assert_eq!(devices("mlx5_0, mlx5_1", gpu), ["mlx5_0", "mlx5_1"]);
        assert_eq!(devices("  mlx5_2 ,,mlx5_0 ", gpu), ["mlx5_2", "mlx5_0"], "in the order given");
    }
}

#[test]
fn duplicates_are_dropped_and_told() {
    let twice = rails(" mlx5_0,mlx5_0 ", 0).expect("valid");
    assert_eq!((twice.devices, twice.repeats), (vec!["mlx5_0".to_owned()], true));
    let in_map = rails(r#"{"0": "mlx5_1,mlx5_0,mlx5_1"}"#, 0).expect("valid");
    assert_eq!((in_map.devices, in_map.repeats), (vec!["mlx5_1".to_owned(), "mlx5_0".to_owned()], true));
    assert!(!rails("mlx5_0,mlx5_1", 0).expect("valid").repeats);
}

#[test]
fn an_unknown_device_is_named_beside_what_there_is() {
    let wrong = |device: &str| {
        format!(
            "Invalid IB devices specified for all GPUs: [{device:?}]. Available devices: [\"mlx5_0\", \"mlx5_1\", \
             \"mlx5_2\"]"
        )
    };
    assert_eq!(error("mlx5_0,mlx5_9", 0), wrong("mlx5_9"));
    // A port is no part of the name.
    assert_eq!(error("mlx5_0:1", 0), wrong("mlx5_0:1"));
    assert_eq!(error("mlx5", 0), wrong("mlx5"), "the beginning of a name is no name");
}

#[test]
fn a_map_has_devices_for_each_gpu() {
    let map = r#"{"0":"mlx5_0, mlx5_1","1":"mlx5_2"}"#;
    assert_eq!(devices(map, 0), ["mlx5_0", "mlx5_1"]);
    assert_eq!(devices(map, 1), ["mlx5_2"]);
    assert_eq!(devices(&format!("  {map}\n"), 1), ["mlx5_2"]);
}

#[test]
fn a_gpu_that_is_not_in_the_map_is_told_who_is() {
    assert_eq!(error(r#"{"0":"mlx5_0"}"#, 1), "No IB devices configured for GPU 1. Available GPUs: [0]");
    let map = r#"{"5":"mlx5_0","2":"mlx5_1"}"#;
    assert_eq!(error(map, 0), "No IB devices configured for GPU 0. Available GPUs: [5, 2]");
}

#[test]
fn a_mistake_for_another_gpu_is_a_mistake_now() {
    let wrong = error(r#"{"0":"mlx5_0","1":"mlx5_9"}"#, 0);
    assert!(wrong.starts_with(r#"Invalid IB devices specified for GPU 1: ["mlx5_9"]."#), "{wrong}");
}

#[test]
fn keys_are_numbers_and_values_texts() {
    let form = "Invalid format: keys must be integers (or string representations of integers) and values must be \
                strings";
    for map in [
        r#"{"0":["mlx5_0"]}"#,
        r#"{"0":1}"#,
        r#"{"0":null}"#,
        r#"{"a":"mlx5_0"}"#,
        r#"{"-1":"mlx5_0"}"#,
        r#"{"+1":"mlx5_0"}"#,
        r#"{" 1":"mlx5_0"}"#,
        r#"{"":"mlx5_0"}"#,
        r#"{"1.0":"mlx5_0"}"#,
        r#"{"99999999999":"mlx5_0"}"#,
        // One good entry does not save it.
        r#"{"0":"mlx5_0","x":"mlx5_1"}"#,
    ] {
        assert_eq!(error(map, 0), form, "{map}");
    }
}

#[test]
fn an_empty_map_and_an_empty_list() {
    assert_eq!(error("{}", 0), "No valid GPU mappings found in JSON");
    assert_eq!(error(r#"{"0":""}"#, 0), "No valid IB devices specified for GPU 0");
    assert_eq!(error(r#"{"0":"mlx5_0","3":" , "}"#, 0), "No valid IB devices specified for GPU 3");
}

#[test]
fn what_begins_like_json_must_be_json() {
    for bad in [r#"{0:"x"}"#, "{", r#"{"0":"mlx5_0""#, r#"{"0":"mlx5_0"} more"#, r#"{"0":"mlx5_0",}"#] {
        let wrong = error(bad, 0);
        assert!(wrong.starts_with(&format!("Invalid JSON mapping: {bad} (")), "{wrong}");
    }
    let long = format!("{{{}", "x".repeat(100_000));
    assert!(error(&long, 0).len() < 500, "an error is for people");
}

#[test]
fn a_list_of_maps_is_a_device_that_is_not_there() {
    let wrong = error(r#"[{"0":"mlx5_0"}]"#, 0);
    assert!(wrong.starts_with("Invalid IB devices specified for all GPUs: "), "{wrong}");
}

#[test]
fn a_file_holds_a_mapping() {
    let map = RailMap::parse_json(" {\"1\": \"mlx5_2\"}\n").expect("valid");
    assert!(map.is_by_gpu());
    for content in ["[\"mlx5_0\"]", "\"mlx5_0\"", "3", "null"] {
        assert_eq!(RailMap::parse_json(content), Err(RailError::NotAMapping), "{content}");
    }
    for content in ["", "mlx5_0", "{", "{'0': 'mlx5_0'}"] {
        let wrong = RailMap::parse_json(content).expect_err("no JSON");
        assert!(matches!(wrong, RailError::Json { .. }), "{content}: {wrong:?}");
    }
}

/// The suffix is looked at before a leading brace, and blanks around the path do not matter.
#[test]
fn a_path_is_not_opened_here() {
    for path in ["/etc/rails.json", " rails.json ", "{\"0\":\"mlx5_0\"}.json", ".json"] {
        assert!(RailMap::is_path(path), "{path}");
        assert_eq!(RailMap::parse(path), Err(RailError::Path), "{path}");
    }
    assert!(!RailMap::is_path("rails.JSON"));
}

#[test]
fn of_two_spellings_of_a_gpu_the_last_wins() {
    assert_eq!(devices(r#"{"0":"mlx5_0","00":"mlx5_1"}"#, 0), ["mlx5_1"]);
    assert_eq!(devices(r#"{"00":"mlx5_1","0":"mlx5_0"}"#, 0), ["mlx5_0"]);
    assert_eq!(devices(r#"{"0":"mlx5_0","0":"mlx5_2"}"#, 0), ["mlx5_2"]);
    // What is overruled is not looked at any more.
    assert_eq!(devices(r#"{"0":"","00":"mlx5_1"}"#, 0), ["mlx5_1"]);
}

/// tcp needs no device, and the same command line runs where there is none.
#[test]
fn without_rdma_devices_may_be_absent_but_must_be_names() {
    let judge =
        |text: &str, gpu| RailMap::parse(text)?.rails(RailQuery { gpu, available: &[], must_exist: false });
    let noted = judge("mlx5_1,mlx5_0", None).expect("noted");
    assert_eq!(noted.devices, ["mlx5_1", "mlx5_0"]);
    assert_eq!(noted.absent, ["mlx5_0", "mlx5_1"]);
    let map = judge(r#"{"0":"mlx5_0","1":"mlx5_3"}"#, Some(0)).expect("noted");
    assert_eq!((map.devices.len(), map.absent), (1, vec!["mlx5_0".to_owned(), "mlx5_3".to_owned()]));
    for bad in ["mlx5_0:1", r#"[{"0":"mlx5_0"}]"#, "a b", "\u{1b}[31m", &"x".repeat(64)] {
        let wrong = judge(bad, None).expect_err("no name");
        assert!(matches!(&wrong, RailError::Invalid { invalid, .. } if invalid == &[bad]), "{wrong:?}");
    }
    assert_eq!(
        judge(r#"{"0":"mlx5_0"}"#, Some(1)).expect_err("no list").to_string(),
        "No IB devices configured for GPU 1. Available GPUs: [0]"
    );
}

#[test]
fn a_map_by_gpu_needs_the_gpu() {
    let available = here();
    let query = RailQuery { gpu: None, available: &available, must_exist: true };
    let by_gpu = RailMap::parse(r#"{"0":"mlx5_0"}"#).expect("valid");
    assert_eq!(by_gpu.rails(query), Err(RailError::NoGpu));
    let list = RailMap::parse("mlx5_0").expect("valid");
    assert_eq!(list.rails(query).expect("no GPU is needed").devices, ["mlx5_0"]);
}

#[test]
fn a_failure_names_the_field() {
    let failure = RailError::Empty.of("rail_map");
    assert_eq!(failure.reason, Reason::BadArgument);
    assert_eq!(failure.message, "rail_map: No valid IB devices specified");
}
