//! The checked-in code is what the `.proto` files say.
//!
//! Beside the code lies what it was made of: the digest of the `.proto` files. Comparing that is cheap and notices
//! a file that was changed and not generated from. With the feature `generate` the code itself is made again and
//! compared; `KVFERRY_REGENERATE=1 cargo test -p kvferry-proto --features generate` renews it.

use std::{fs, path::Path};

use sha2::{Digest, Sha256};

const FILES: [&str; 3] =
    ["kvferry/types/v1/types.proto", "kvferry/engine/v1/engine.proto", "kvferry/peer/v1/peer.proto"];

/// Names the digest of the sources beside the generated code.
const DIGEST: &str = "sources.sha256";

const RENEW: &str = "run KVFERRY_REGENERATE=1 cargo test -p kvferry-proto --features generate";

/// As `sha256sum` would write it.
fn digests(root: &Path) -> String {
    let line = |file: &str| {
        let source = fs::read(root.join("proto").join(file)).expect("a proto file");
        let digest: String = Sha256::digest(&source).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digest}  proto/{file}\n")
    };
    FILES.into_iter().map(line).collect()
}

#[test]
fn checked_in_code_belongs_to_these_files() {
    if std::env::var_os("KVFERRY_REGENERATE").is_some() {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let recorded = fs::read_to_string(root.join("src/generated").join(DIGEST)).expect("recorded digests");
    assert_eq!(recorded, digests(root), "src/generated is stale: {RENEW}");
}

#[cfg(feature = "generate")]
mod generate {
    use prost::Message as _;

    use super::*;

    fn generate(root: &Path, into: &Path) {
        let fds = protox::compile(FILES, [root.join("proto")]).expect("the proto files compile");
        let bytes = fds.encode_to_vec();
        tonic_prost_build::configure()
            .out_dir(into)
            .emit_rerun_if_changed(false)
            .compile_fds(fds)
            .expect("code is generated");
        fs::write(into.join("descriptors.bin"), bytes).expect("descriptors are written");
        fs::write(into.join(DIGEST), digests(root)).expect("digests are written");
    }

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
            assert!(want == have, "src/generated/{} is stale: {RENEW}", name.to_string_lossy());
        }
    }
}
