//! The end of a VM: everything that it has of the host comes back, or is booked as lost.

use abi::HostCall;
use abi::HostState;

use super::memory::take_lent_back;
use super::vm::{Given, Vm};
use crate::errno::Errno;
use crate::host::Host;
use crate::mm::{Holder, Pfn};

/// Pages that one call asks for at most.
const CHUNK: u64 = 512;
/// How often the end is asked for; each time EL2 has done a chunk.
const FINISH_LIMIT: u32 = 1 << 20;

/// Ends a VM to which no reference is left.
///
/// Begins the teardown, reclaims every page that the guest was given, ends it, and frees the pages. The
/// books are not believed: a page is freed only when EL2 says that the host owns it again.
pub fn destroy(host: &mut Host, vm: Vm) {
    let handle = vm.handle();
    if !vm.is_protected() {
        // What is left is memory of programs: content came back when its view ended.
        for frame in take_lent_back(host, &vm, 0..u64::MAX) {
            host.frames.note(frame, Holder::Program);
        }
    }
    match host.call(HostCall::VmTeardownStart { vm: handle }) {
        Ok(_) => (),
        // Somebody else, a program with the research device, has begun or even ended it.
        Err(error) => log::warn!("teardown of {handle:?} does not begin: {error:?}"),
    }
    let Given { guest, tables } = vm.given.into_inner();
    for (gfn, pages) in runs(guest.keys().copied()) {
        reclaim(host, handle, gfn, pages);
    }
    for _ in 0..FINISH_LIMIT {
        match host.call(HostCall::VmTeardownFinish { vm: handle }).map(|result| result.values) {
            Ok([_, 0, ..]) => break,
            Ok(_) => (),
            Err(error) => {
                if error != Errno::ENOENT {
                    log::error!("teardown of {handle:?} does not end: {error:?}");
                }
                break;
            }
        }
    }
    for (gfn, frame) in guest {
        // A frame that left the books of this VM, say through a hole in its file, is somebody else's by now.
        let expected = u32::try_from(gfn).ok().map(|gfn| Holder::Guest { vm: handle, gfn });
        settle(host, frame, expected);
    }
    for (first, pages) in tables {
        for page in 0..pages {
            settle(host, first.plus(page), Some(Holder::VmPool(handle)));
        }
    }
    for vcpu in vm.vcpus.into_inner().into_values() {
        host.give_back(vcpu.run_page());
    }
}

/// Reclaims a run of guest frames. One that EL2 refuses is left out; [`settle`] finds out what it is.
fn reclaim(host: &mut Host, vm: abi::VmHandle, gfn: u64, pages: u64) {
    let mut done = 0u64;
    while done < pages {
        let chunk = pages.saturating_sub(done).min(CHUNK);
        let call = HostCall::ReclaimGuest { vm, gfn: gfn.saturating_add(done), pages: chunk };
        let Some(result) = host.machine.call(call) else { return };
        let [count, ..] = result.values;
        done = match result.outcome {
            Ok(()) => done.saturating_add(count.clamp(1, chunk)),
            // Pages before the refused one are done; the refused one is skipped.
            Err(abi::Error::Permission | abi::Error::NoEntry | abi::Error::Poisoned) => {
                done.saturating_add(count.min(chunk)).saturating_add(1)
            }
            Err(error) => {
                log::error!("{vm:?} keeps its pages from gfn {:#x} on: {error:?}", gfn.saturating_add(done));
                return;
            }
        };
    }
}

/// Frees a frame that the books give to `expected`, if it is the host's own again.
fn settle(host: &mut Host, frame: Pfn, expected: Option<Holder>) {
    if host.frames.holder(frame) != expected {
        return;
    }
    let state = host.call(HostCall::QueryPage { pfn: frame.0 }).ok().and_then(|result| result.host_state());
    if state == Some(HostState::Owned) {
        host.frames.taken_back(frame);
    } else {
        log::error!("{frame:?} did not come back: EL2 says {state:?}");
        host.frames.note(frame, Holder::Lost);
    }
}

/// Joins adjacent numbers: first and count of each run.
fn runs(numbers: impl Iterator<Item = u64>) -> impl Iterator<Item = (u64, u64)> {
    let mut numbers = numbers.peekable();
    core::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut count = 1u64;
        while numbers.next_if(|next| Some(*next) == first.checked_add(count)).is_some() {
            count = count.saturating_add(1);
        }
        Some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeMachine, World};
    use alloc::vec::Vec;

    #[test]
    fn adjacent_numbers_are_one_run() {
        let found: Vec<_> = runs([1, 2, 3, 7, 9, 10].into_iter()).collect();
        assert_eq!(found, [(1, 3), (7, 1), (9, 2)]);
    }

    #[test]
    fn every_page_comes_back() {
        let machine = FakeMachine::new(128);
        let before = machine.host().frames.free();
        let mut world = World::new(&machine, 16);
        world.give_all_pages();
        assert_eq!(world.host.frames.census().vms, 16 + abi::host::VM_ROOT_PAGES);
        let host = world.close_everything();
        assert_eq!(host.frames.free(), before);
        assert_eq!(host.frames.census().lost, 0);
    }

    #[test]
    fn pages_that_do_not_come_back_are_booked_as_lost_and_never_used_again() {
        let machine = FakeMachine::new(128);
        let before = machine.host().frames.free();
        let mut world = World::new(&machine, 4);
        world.give_all_pages();
        machine.refuse_reclaim();
        let host = world.close_everything();
        assert_eq!(host.frames.census().lost, 4);
        assert_eq!(host.frames.free(), before - 4);
    }

    #[test]
    fn top_up_pages_come_back_too() {
        let machine = FakeMachine::new(128);
        machine.lack_at_donate(2);
        let before = machine.host().frames.free();
        let mut world = World::new(&machine, 4);
        world.give_all_pages();
        assert!(world.host.frames.census().vms > 4 + abi::host::VM_ROOT_PAGES);
        let host = world.close_everything();
        assert_eq!(host.frames.free(), before);
    }
}
