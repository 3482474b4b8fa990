//! The gate: decides every access of the host to content.
//!
//! No other code turns an index of an inode into a frame for the host's use. The gate asks EL2 each time;
//! what the host has in its books (flags, draining) can only make it refuse more.
//!
//! | page | EL2 says | INIT_SHARED | otherwise |
//! |---|---|---|---|
//! | beyond the end | - | refused | refused |
//! | none yet | - | made, then asked for | refused |
//! | there | no access | refused | refused |
//! | there | the host's own (also lent to a VM) | admitted | refused: content is private |
//! | there | a guest's, shared with the host | admitted | admitted |
//! | draining | - | refused | refused |

use abi::{HostCall, HostState};

use super::inode::{GmemFlags, Inode};
use crate::errno::Errno;
use crate::host::{Host, Misbehaviour};
use crate::mm::Pfn;

/// What the host wants to do with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Map it for a program.
    Fault,
    /// Copy it for a system call.
    Copy,
    /// Keep hold of it for long. The pin is counted; [`unpin`] ends it.
    Pin,
}

/// Why the gate refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such page.
    BeyondEnd,
    /// The host has no business there.
    Private,
    /// No frame is free.
    NoMemory,
}

/// Admits the host to one page of content, or refuses.
pub fn admit(host: &mut Host, inode: &Inode, index: u64, intent: Intent) -> Result<Pfn, Refusal> {
    if index >= inode.pages() {
        return Err(Refusal::BeyondEnd);
    }
    if intent == Intent::Fault
        && host.misbehaviour.contains(Misbehaviour::MAP_WITHOUT_ASKING)
        && let Some(page) = inode.page(index)
    {
        return Ok(page.frame);
    }
    let initially_shared = inode.flags().contains(GmemFlags::INIT_SHARED);
    let page = match inode.page(index) {
        Some(page) => page,
        None if initially_shared => match inode.page_or_new(host, index) {
            Ok(Some(page)) => page,
            Ok(None) => return Err(Refusal::BeyondEnd),
            Err(Errno::ENOMEM) => return Err(Refusal::NoMemory),
            Err(_) => return Err(Refusal::Private),
        },
        None => return Err(Refusal::Private),
    };
    if page.draining {
        return Err(Refusal::Private);
    }
    let admitted = match state(host, page.frame) {
        HostState::NoPage => false,
        HostState::Owned | HostState::SharedOwned => initially_shared,
        HostState::SharedBorrowed => true,
    };
    if !admitted {
        return Err(Refusal::Private);
    }
    if intent == Intent::Pin {
        inode.add_pin(index).map_err(|_| Refusal::Private)?;
    }
    Ok(page.frame)
}

/// Ends a pin.
pub fn unpin(inode: &Inode, index: u64) {
    inode.drop_pin(index);
}

/// What EL2 says of a frame. No answer means no access.
fn state(host: &Host, frame: Pfn) -> HostState {
    host.call(HostCall::QueryPage { pfn: frame.0 })
        .ok()
        .and_then(|result| result.host_state())
        .unwrap_or(HostState::NoPage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::PAGE;
    use crate::testing::FakeMachine;

    const ALL_STATES: [HostState; 4] =
        [HostState::NoPage, HostState::Owned, HostState::SharedOwned, HostState::SharedBorrowed];

    #[test]
    fn nothing_is_admitted_where_el2_says_no_page() {
        for flags in 0..4 {
            let machine = FakeMachine::new(8);
            let mut host = machine.host();
            let inode = Inode::new(&mut host, PAGE, flags).unwrap();
            let page = inode.page_or_new(&mut host, 0).unwrap().unwrap();
            machine.set_state(page.frame, HostState::NoPage);
            for intent in [Intent::Fault, Intent::Copy, Intent::Pin] {
                assert_eq!(admit(&mut host, &inode, 0, intent), Err(Refusal::Private));
            }
            assert_eq!(machine.queries(page.frame), 3);
        }
    }

    #[test]
    fn content_that_starts_private_is_admitted_only_when_a_guest_shares_it() {
        for flags in 0..4 {
            let shared = flags & GmemFlags::INIT_SHARED.bits() != 0;
            for state in ALL_STATES {
                let machine = FakeMachine::new(8);
                let mut host = machine.host();
                let inode = Inode::new(&mut host, PAGE, flags).unwrap();
                let page = inode.page_or_new(&mut host, 0).unwrap().unwrap();
                machine.set_state(page.frame, state);
                let expected = match state {
                    HostState::NoPage => false,
                    HostState::SharedBorrowed => true,
                    HostState::Owned | HostState::SharedOwned => shared,
                };
                assert_eq!(admit(&mut host, &inode, 0, Intent::Fault).is_ok(), expected, "{flags} {state:?}");
            }
        }
    }

    #[test]
    fn a_first_touch_makes_a_page_only_where_content_starts_shared() {
        for flags in 0..4 {
            let machine = FakeMachine::new(8);
            let mut host = machine.host();
            let inode = Inode::new(&mut host, PAGE, flags).unwrap();
            let shared = flags & GmemFlags::INIT_SHARED.bits() != 0;
            assert_eq!(admit(&mut host, &inode, 0, Intent::Fault).is_ok(), shared);
            assert_eq!(inode.page(0).is_some(), shared);
        }
    }

    #[test]
    fn draining_content_is_refused_although_el2_would_allow_it() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = Inode::new(&mut host, PAGE, 3).unwrap();
        admit(&mut host, &inode, 0, Intent::Fault).unwrap();
        inode.set_draining(0..1, true);
        assert_eq!(admit(&mut host, &inode, 0, Intent::Copy), Err(Refusal::Private));
        inode.set_draining(0..1, false);
        assert!(admit(&mut host, &inode, 0, Intent::Copy).is_ok());
    }

    #[test]
    fn beyond_the_end_nothing_is_admitted_or_made() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = Inode::new(&mut host, PAGE, 3).unwrap();
        assert_eq!(admit(&mut host, &inode, 1, Intent::Fault), Err(Refusal::BeyondEnd));
        assert_eq!(host.frames.free(), 8);
    }

    #[test]
    fn without_an_answer_from_el2_nothing_is_admitted() {
        let machine = FakeMachine::new(8);
        machine.remove_hypervisor();
        let mut host = machine.host();
        let inode = Inode::new(&mut host, PAGE, 3).unwrap();
        assert_eq!(admit(&mut host, &inode, 0, Intent::Fault), Err(Refusal::Private));
    }

    #[test]
    fn a_host_told_to_misbehave_maps_without_asking() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = Inode::new(&mut host, PAGE, 1).unwrap();
        let page = inode.page_or_new(&mut host, 0).unwrap().unwrap();
        machine.set_state(page.frame, HostState::NoPage);
        host.misbehaviour = Misbehaviour::MAP_WITHOUT_ASKING;
        assert_eq!(admit(&mut host, &inode, 0, Intent::Fault), Ok(page.frame));
        assert_eq!(admit(&mut host, &inode, 0, Intent::Copy), Err(Refusal::Private));
    }

    #[test]
    fn a_pin_is_counted_until_it_ends() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = Inode::new(&mut host, PAGE, 3).unwrap();
        admit(&mut host, &inode, 0, Intent::Pin).unwrap();
        admit(&mut host, &inode, 0, Intent::Pin).unwrap();
        unpin(&inode, 0);
        assert!(inode.is_pinned(0..1));
        unpin(&inode, 0);
        assert!(!inode.is_pinned(0..1));
    }
}
