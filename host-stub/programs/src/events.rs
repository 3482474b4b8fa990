//! Page-table events, as TEST_EVENTS tells them: what a program may read of the hypervisor's order of steps.

use core::fmt;

use abi::host::EventKind;

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its number.
    pub number: u64,
    /// What happened.
    pub kind: EventKind,
    /// VMID, of stage-2 maintenance.
    pub vmid: u64,
    /// Of the descriptor, or of the first page.
    pub address: u64,
    /// The descriptor before, or a number of pages.
    pub old: u64,
    /// The descriptor after.
    pub new: u64,
}

const VALID: u64 = 1;
/// Output address of a page descriptor of 4 KiB, and bits 1:0 of one.
const OUTPUT: u64 = 0xffff_ffff_f000;
const PAGE: u64 = 0b11;

impl Event {
    fn is_write(&self, old: u64, new: u64) -> bool {
        self.kind == EventKind::Write && self.old & VALID == old && self.new & VALID == new
    }

    /// Whether a last-level entry, or a larger one, becomes a translation to this page.
    fn maps(&self, page: u64) -> bool {
        self.is_write(0, VALID) && self.new & PAGE == PAGE && self.new & OUTPUT == page
    }

    /// Whether a translation of this page under a VMID is dropped.
    fn drops(&self, vmid: u64, page: u64) -> bool {
        let pages = page.wrapping_sub(self.address) / 4096;
        self.kind == EventKind::DropStage2 && self.vmid == vmid && page >= self.address && pages < self.old
    }

    fn takes(&self, page: u64) -> bool {
        self.is_write(VALID, 0) && self.old & PAGE == PAGE && self.old & OUTPUT == page
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, vmid, address, old, new } = *self;
        write!(f, "event {number}: ")?;
        match (kind, old & VALID, new & VALID) {
            (EventKind::Write, 0, 0) => {
                write!(f, "entry {address:#x} says {new:#x} in place of {old:#x}, both invalid")
            }
            (EventKind::Write, 0, _) => {
                write!(f, "entry {address:#x} maps {:#x} ({old:#x} -> {new:#x})", new & OUTPUT)
            }
            (EventKind::Write, _, 0) => {
                write!(f, "entry {address:#x} unmaps {:#x} ({old:#x} -> {new:#x})", old & OUTPUT)
            }
            (EventKind::Write, ..) => {
                write!(f, "entry {address:#x} changes while valid ({old:#x} -> {new:#x})")
            }
            (EventKind::DropStage2, ..) => {
                write!(f, "TLBs drop {old} pages from {address:#x} on under VMID {vmid}")
            }
            (EventKind::Retire, ..) => write!(f, "TLBs drop everything under VMID {vmid}"),
            (EventKind::DropHyp, ..) => write!(f, "EL2's TLBs drop {old} pages from {address:#x} on"),
            (EventKind::Wipe, ..) => write!(f, "page {address:#x} is wiped"),
        }
    }
}

/// Whether a page was given away in the right order: the host's entry is invalid, then no TLB has it, and only then is
/// it mapped for somebody else.
pub fn is_taken_before_it_is_given(events: &[Event], page: u64) -> bool {
    const HOST: u64 = 0;
    let Some(taken) = events.iter().position(|event| event.takes(page)) else { return false };
    let dropped = events.iter().skip(taken).position(|event| event.drops(HOST, page));
    let Some(dropped) = dropped.map(|dropped| taken + dropped) else { return false };
    let given = events.iter().position(|event| event.maps(page));
    given.is_some_and(|given| given > dropped)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::string::ToString;

    const PFN: u64 = 0x4800_1000;

    fn event(number: u64, kind: EventKind, address: u64, old: u64, new: u64) -> Event {
        Event { number, kind, vmid: 0, address, old, new }
    }

    fn donation() -> [Event; 4] {
        [
            event(1, EventKind::Write, 0x4000_0008, PFN | 0x7ff, 0x10),
            event(2, EventKind::DropStage2, PFN, 1, 0),
            event(3, EventKind::Write, 0x4000_0008, 0x10, 0x1234_5678),
            event(4, EventKind::Write, 0x4000_2000, 0, PFN | 0x7ff),
        ]
    }

    #[test]
    fn a_donation_in_order_is_one_and_any_other_order_is_none() {
        assert!(is_taken_before_it_is_given(&donation(), PFN));
        for (a, b) in [(0, 1), (1, 3), (0, 3)] {
            let mut wrong = donation();
            wrong.swap(a, b);
            assert!(!is_taken_before_it_is_given(&wrong, PFN), "{a} {b}");
        }
        let mut other = donation();
        other[1].vmid = 3;
        assert!(!is_taken_before_it_is_given(&other, PFN), "another VMID");
        other[1] = event(2, EventKind::DropStage2, PFN + 4096, 1, 0);
        assert!(!is_taken_before_it_is_given(&other, PFN), "another page");
        assert!(!is_taken_before_it_is_given(&donation()[..3], PFN), "never given");
        assert!(!is_taken_before_it_is_given(&[], PFN));
    }

    #[test]
    fn an_event_tells_its_story() {
        let [taken, dropped, ..] = donation();
        assert_eq!(taken.to_string(), "event 1: entry 0x40000008 unmaps 0x48001000 (0x480017ff -> 0x10)");
        assert_eq!(dropped.to_string(), "event 2: TLBs drop 1 pages from 0x48001000 on under VMID 0");
    }
}
