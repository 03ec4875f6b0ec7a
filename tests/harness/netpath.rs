//! A network path that loses everything: two network namespaces with one Ethernet cable between them.
//!
//! Nothing of it is seen outside: neither namespace has a name, both live only as long as a process in them, and the
//! cable dies with them. To lose frames, each side is told that the other's address belongs to hardware that nobody
//! has: they leave as ever, nobody takes them, and neither side hears of it. No reset, no unreachable, no carrier.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};

/// Addresses of the two ends, known in the two namespaces alone.
pub const ENDS: [&str; 2] = ["10.99.0.1", "10.99.0.2"];
const HARDWARE: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
const NOBODY: &str = "02:00:00:00:00:66";
const CABLE: &str = "cable";

/// Two namespaces and a cable. Engines and tests reach the daemons in them by their Unix sockets.
#[derive(Debug)]
pub struct NetPath {
    ends: [Child; 2],
}

impl NetPath {
    /// Lays the cable.
    ///
    /// # Errors
    /// Needs root, network namespaces and `veth`, and the programs `unshare`, `nsenter` and `ip`.
    pub fn lay() -> anyhow::Result<Self> {
        let path = Self { ends: [namespace()?, namespace()?] };
        let other = path.ends[1].id().to_string();
        let cable = ["link", "add", CABLE, "address", HARDWARE[0], "type", "veth", "peer", "name", CABLE];
        path.ip(0, &[&cable[..], &["address", HARDWARE[1], "netns", &other]].concat())?;
        for end in [0, 1] {
            path.ip(end, &["address", "add", &format!("{}/30", ENDS[end]), "dev", CABLE])?;
            path.ip(end, &["link", "set", CABLE, "up"])?;
            path.ip(end, &["link", "set", "lo", "up"])?;
        }
        path.lose(false)?;
        Ok(path)
    }

    /// What runs a program at this end of the cable, 0 or 1.
    pub fn at(&self, end: usize) -> [String; 2] {
        ["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", self.ends[end].id())]
    }

    /// Loses every frame in both directions from now on, or none.
    pub fn lose(&self, everything: bool) -> anyhow::Result<()> {
        for end in [0, 1] {
            let hardware = if everything { NOBODY } else { HARDWARE[1 - end] };
            let neighbour = ["neigh", "replace", ENDS[1 - end], "lladdr", hardware, "dev", CABLE];
            self.ip(end, &[&neighbour[..], &["nud", "permanent"]].concat())?;
        }
        Ok(())
    }

    fn ip(&self, end: usize, arguments: &[&str]) -> anyhow::Result<()> {
        let [program, namespace] = self.at(end);
        let output = Command::new(program).arg(namespace).arg("ip").args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {} (it needs root): {said}", arguments.join(" "));
        Ok(())
    }
}

impl Drop for NetPath {
    fn drop(&mut self) {
        for end in &mut self.ends {
            // Its pipe is all it waits for.
            drop(end.stdin.take());
            let _ = end.wait();
        }
    }
}

/// A process in a namespace of its own. It ends with the pipe, so also when the test is killed.
fn namespace() -> anyhow::Result<Child> {
    let mut holder = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo ready; exec cat >/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("unshare, of util-linux")?;
    let mut said = String::new();
    if let Some(output) = holder.stdout.take() {
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut said)?;
    }
    ensure!(said == "ready\n", "a network namespace cannot be had: it needs root");
    Ok(holder)
}
