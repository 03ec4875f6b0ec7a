//! The secret that the daemons of a cluster share, and the proof of knowing it.
//!
//! A proof is an HMAC over the transcript of one open, in one role: the secret never travels, and a proof fits
//! no other conversation. It says who may open sessions; it encrypts nothing.

use std::{fmt, fs::File, io::Read, os::unix::fs::PermissionsExt, path::Path};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::identity::{Role, Transcript};
use crate::domain::{Failure, Reason};

/// Bytes of the shortest secret taken.
const SHORTEST: usize = 16;

/// Bytes of the longest file read.
const LONGEST: u64 = 4096;

/// A cluster's secret. Not shown by `Debug`.
#[derive(Clone)]
pub struct Secret(Hmac<Sha256>);

impl Secret {
    /// Reads it from a file that nobody but its owner and group may read; white space around it does not count.
    pub fn read(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let mode = file.metadata().map_err(|error| error.to_string())?.permissions().mode();
        if mode & 0o007 != 0 {
            return Err(format!("mode {:04o}: others may use it; chmod o-rwx it", mode & 0o7777));
        }
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        if bytes.len() as u64 > LONGEST {
            return Err(format!("more than {LONGEST} bytes"));
        }
        Self::new(bytes.trim_ascii())
    }

    /// From its bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < SHORTEST {
            return Err(format!("{} bytes where at least {SHORTEST} are needed", bytes.len()));
        }
        Hmac::new_from_slice(bytes).map(Self).map_err(|error| error.to_string())
    }

    /// What only a side that knows the secret can say in this role of this conversation.
    pub fn prove(&self, role: Role, transcript: &Transcript) -> [u8; 32] {
        self.mac(role, transcript).finalize().into_bytes().into()
    }

    /// Whether the other side knows it too.
    pub fn verify(&self, role: Role, transcript: &Transcript, proof: &[u8]) -> Result<(), Failure> {
        self.mac(role, transcript).verify_slice(proof).map_err(|_| {
            let what = if proof.is_empty() { "has no" } else { "has another" };
            let message = format!("the {role:?}'s daemon {what} cluster secret (security.secret_file)");
            Failure::new(Reason::Unauthorised, message)
        })
    }

    fn mac(&self, role: Role, transcript: &Transcript) -> Hmac<Sha256> {
        self.0.clone().chain_update(transcript.message(role))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::OpenOptionsExt};

    use super::{super::identity::tests::messages, *};

    fn secret(text: &str) -> Secret {
        Secret::new(text.as_bytes()).expect("long enough")
    }

    /// K1: a proof fits its role, its conversation and its secret.
    #[test]
    fn a_proof_fits_nothing_else() {
        let (open, challenge) = messages();
        let transcript = Transcript::new(&open, &challenge);
        let (ours, theirs) = (secret("a secret of this cluster"), secret("a secret of that cluster"));
        let proof = ours.prove(Role::Target, &transcript);
        assert_eq!(ours.verify(Role::Target, &transcript, &proof), Ok(()));
        assert!(ours.verify(Role::Initiator, &transcript, &proof).is_err());
        let refused = theirs.verify(Role::Target, &transcript, &proof).expect_err("another secret");
        assert_eq!(refused.reason, Reason::Unauthorised);
        assert!(ours.verify(Role::Target, &transcript, &proof[..31]).is_err());
        let none = ours.verify(Role::Target, &transcript, &[]).expect_err("no proof");
        assert!(none.message.contains("has no"), "{none}");
        let later =
            Transcript::new(&open, &super::super::identity::Challenge { nonce: [9; 32], ..challenge });
        assert!(ours.verify(Role::Target, &later, &proof).is_err(), "a replay");
    }

    #[test]
    fn a_file_must_be_private_and_long_enough() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, mode: u32, text: &str| {
            let path = directory.path().join(name);
            let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
            std::io::Write::write_all(&mut file.expect("created"), text.as_bytes()).expect("written");
            path
        };
        let (good, group) =
            (write("good", 0o600, "0123456789abcdef\n"), write("group", 0o640, "0123456789abcdef"));
        let (one, other) = (Secret::read(&good).expect("good"), Secret::read(&group).expect("good"));
        let (open, challenge) = messages();
        let transcript = Transcript::new(&open, &challenge);
        let proof = one.prove(Role::Target, &transcript);
        assert_eq!(other.verify(Role::Target, &transcript, &proof), Ok(()), "the line's end does not count");
        let short = Secret::read(&write("short", 0o600, "  0123456789abcde \n")).expect_err("15 bytes");
        assert!(short.contains("15 bytes"), "{short}");
        let readable = Secret::read(&write("open", 0o604, "0123456789abcdef")).expect_err("readable");
        assert!(readable.contains("0604"), "{readable}");
        assert!(Secret::read(&write("long", 0o600, &"x".repeat(5000))).is_err());
        assert!(Secret::read(&directory.path().join("none")).is_err());
        assert!(!format!("{one:?}").contains("0123"));
    }
}
