//! The checked-in code is what the `.proto` files say.

use std::{fs, path::Path};

use prost_types::FileDescriptorSet;

const FILES: [&str; 3] =
    ["kvferry/types/v1/types.proto", "kvferry/engine/v1/engine.proto", "kvferry/peer/v1/peer.proto"];

fn descriptors(root: &Path) -> FileDescriptorSet {
    protox::compile(FILES, [root.join("proto")]).expect("the proto files compile")
}

fn generate(root: &Path, into: &Path) {
    let fds = descriptors(root);
    let bytes = prost_types_encode(&fds);
    tonic_prost_build::configure()
        .out_dir(into)
        .emit_rerun_if_changed(false)
        .compile_fds(fds)
        .expect("code is generated");
    fs::write(into.join("descriptors.bin"), bytes).expect("descriptors are written");
}

fn prost_types_encode(fds: &FileDescriptorSet) -> Vec<u8> {
    use prost::Message as _;
    fds.encode_to_vec()
}

/// `KVFERRY_REGENERATE=1 cargo test -p kvferry-proto` renews the checked-in files instead of comparing.
#[test]
fn checked_in_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kept = root.join("src/generated");
    if std::env::var_os("KVFERRY_REGENERATE").is_some() {
        generate(root, &kept);
        return;
    }
    let fresh = tempfile::tempdir().expect("a temporary directory");
    generate(root, fresh.path());
    for entry in fs::read_dir(fresh.path()).expect("generated files") {
        let name = entry.expect("an entry").file_name();
        let want = fs::read(fresh.path().join(&name)).expect("the fresh file");
        let have = fs::read(kept.join(&name)).unwrap_or_default();
        assert!(
            want == have,
            "src/generated/{} is stale: run KVFERRY_REGENERATE=1 cargo test -p kvferry-proto",
            name.to_string_lossy()
        );
    }
}
