//! How long a lane's thread looks for work before it sleeps.
//!
//! A small transfer wakes six threads one after the other, and on a virtual machine, or a CPU in a deep idle
//! state, a wake-up costs more than the transfer. A thread that looks a while before it sleeps spares its own.
//! One that always looked would take a CPU from the engines. So the time is learned, as the kernel's haltpoll
//! does it: sleeps that were short, and would have been spared by looking, lengthen it; a long one ends it.

use std::time::Duration;

/// Looking begins with this much.
const FIRST: Duration = Duration::from_micros(20);

/// How long to look before the next sleep.
#[derive(Debug)]
pub(super) struct Spin {
    now: Duration,
    most: Duration,
}

impl Spin {
    /// Never more than `most`; zero never looks.
    pub(super) fn new(most: Duration) -> Self {
        Self { now: Duration::ZERO, most }
    }

    /// How long to look now.
    pub(super) fn window(&self) -> Duration {
        self.now
    }

    /// The thread went to sleep, and so much time passed from its first look until there was work.
    pub(super) fn slept(&mut self, waited: Duration) {
        self.now = match waited <= self.most {
            true => (self.now * 2).max(FIRST).min(self.most),
            false => Duration::ZERO,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(100);

    fn after(sleeps: &[u64]) -> Duration {
        let mut spin = Spin::new(MOST);
        sleeps.iter().for_each(|micros| spin.slept(Duration::from_micros(*micros)));
        spin.window()
    }

    #[test]
    fn short_sleeps_lengthen_it_and_a_long_one_ends_it() {
        assert_eq!(after(&[]), Duration::ZERO, "an idle daemon begins asleep");
        assert_eq!(after(&[50]), FIRST);
        assert_eq!(after(&[50, 50]), FIRST * 2);
        assert_eq!(after(&[50; 10]), MOST);
        assert_eq!(after(&[50, 50, 50, 101]), Duration::ZERO);
    }

    #[test]
    fn zero_never_looks() {
        let mut spin = Spin::new(Duration::ZERO);
        (0..10).for_each(|micros| spin.slept(Duration::from_micros(micros)));
        assert_eq!(spin.window(), Duration::ZERO);
    }
}
