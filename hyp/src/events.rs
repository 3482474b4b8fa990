//! A ring of page-table events, in test builds: what was written to tables and dropped from TLBs, in order, for a host
//! or a test suite that asks with TEST_EVENTS.
//!
//! The machine notes events and keeps the ring behind a lock of its own, a leaf: nothing else is taken under it. The core
//! knows nothing of it, and no release build contains it.

#![forbid(unsafe_code)]

use abi::host::EventKind;

/// Events that are kept.
pub const KEPT: usize = 512;

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its number; the first is 1.
    pub number: u64,
    /// What happened.
    pub kind: EventKind,
    /// VMID of the translation, where it is known.
    pub vmid: u64,
    /// Of the descriptor, or the first byte of the pages.
    pub address: u64,
    /// The descriptor before; of maintenance, the number of pages.
    pub old: u64,
    /// The descriptor after.
    pub new: u64,
}

/// The last events.
#[derive(Debug)]
pub struct Ring {
    events: [Option<Event>; KEPT],
    /// Events so far.
    count: u64,
}

impl Ring {
    /// No event yet.
    pub const fn new() -> Self {
        Self { events: [None; KEPT], count: 0 }
    }

    /// Notes an event.
    pub fn note(&mut self, kind: EventKind, vmid: u64, address: u64, old: u64, new: u64) {
        self.count = self.count.saturating_add(1);
        let number = self.count;
        if let Some(place) = self.events.get_mut(place(number)) {
            *place = Some(Event { number, kind, vmid, address, old, new });
        }
    }

    /// The first event that is still kept and has this number or a later one.
    pub fn first_from(&self, number: u64) -> Option<Event> {
        let oldest = self.count.saturating_sub(KEPT as u64).saturating_add(1);
        let number = number.max(oldest);
        if number > self.count {
            return None;
        }
        self.events.get(place(number)).copied().flatten()
    }
}

impl Default for Ring {
    fn default() -> Self {
        Self::new()
    }
}

fn place(number: u64) -> usize {
    number.checked_rem(KEPT as u64).unwrap_or(0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_order_and_the_oldest_are_forgotten() {
        let mut ring = Ring::new();
        assert_eq!(ring.first_from(0), None);
        for address in 1..=KEPT as u64 + 3 {
            ring.note(EventKind::Write, 0, address, 0, 1);
        }
        assert_eq!(ring.first_from(0).unwrap().number, 4);
        assert_eq!(ring.first_from(9).unwrap().address, 9);
        assert_eq!(ring.first_from(KEPT as u64 + 3).unwrap().number, KEPT as u64 + 3);
        assert_eq!(ring.first_from(KEPT as u64 + 4), None);
        assert_eq!(ring.first_from(u64::MAX), None);
    }
}
