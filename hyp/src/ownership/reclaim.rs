//! Taking pages back from a guest that is dying, and wiping all of them before the machine goes down.
//!
//! Source of the rules: Linux 7.2 `__pkvm_host_reclaim_page_guest`. A private page is wiped and cleaned
//! before the host can reach it (I4); a shared one is not, since the host can read it already.

use super::guest::{Gap, GuestSpace};
use super::{Error, Host, chunk};
use crate::addr::{Frame, Gfn, Pages};
use crate::machine::Machine;
use crate::pgtable::stage2::Sharing;

/// Takes a chunk back from a dying protected guest. Poisoned pages are the host's already and are passed
/// over; at a page that is not there the chunk ends. Returns the number of pages.
///
/// # Errors
/// The first page is not there, the tables disagree, or table pages are lacking.
pub fn from_dying<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    guest.check_span(gfns)?;
    let (gfns, _) = chunk(gfns, gfns);
    let gfns = match guest.before_gap(machine, gfns) {
        Ok(gfns) => gfns,
        Err(Gap::Poisoned) => return Ok(1),
        Err(gap) => return Err(gap.error(gfns.start())),
    };
    guest.prepare(machine, host, gfns, |_| true)?;
    // Commit: the guest loses the pages, they are wiped, then the host gets them.
    guest.take_pieces(machine, gfns, |piece| {
        if piece.sharing == Sharing::Owned {
            for page in piece.pfns.iter() {
                machine.wipe(page);
            }
        }
        host.give(machine, piece.pfns, Sharing::Owned);
    });
    Ok(gfns.count())
}

/// Wipes every page that a guest owns alone, leaving its tables as they are: for a machine that goes down.
/// Returns the number of pages.
pub fn wipe_private<M: Machine>(machine: &M, guest: &GuestSpace) -> u64 {
    let mut wiped = 0u64;
    let everything = Gfn::new(0).and_then(|first| Pages::new(first, guest.table.input_end()));
    if let Some(gfns) = everything {
        let _ = guest.table.try_for_each(machine, gfns, |run| {
            if let Some(page) = run.entry.owned() {
                for offset in 0..run.pages.count() {
                    if let Some(pfn) = page.pfn.checked_add(offset) {
                        machine.wipe(pfn);
                        wiped = wiped.saturating_add(1);
                    }
                }
            }
            Ok::<(), Error>(())
        });
    }
    wiped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM_START, World};
    use abi::host::HostCall;
    use abi::{Error as Code, HostState};

    const GFN: u64 = 0x8_0000;

    #[test]
    fn reclaim_wipes_private_pages_before_the_host_has_them_and_leaves_shared_ones() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        for page in [4, 5] {
            world.fill(page);
        }
        assert_eq!(world.hyp.guest_share_host(vm, Pages::from_raw(GFN + 1, 1).unwrap()), Ok(1));
        let reclaim = HostCall::ReclaimGuest { vm, gfn: GFN, pages: 2 };
        assert_eq!(world.call(reclaim).outcome, Err(Code::Permission), "the VM is alive");
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(world.ok(reclaim), 2);
        world.check();
        assert!(world.is_wiped(4) && !world.is_wiped(5));
        assert_eq!(world.host_state(4), Some(HostState::Owned));
        assert_eq!(world.call(reclaim).outcome, Err(Code::NoEntry));
    }

    #[test]
    fn a_page_of_a_block_is_reclaimed_without_its_neighbours() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN, pages: 0x200 });
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(world.ok(HostCall::ReclaimGuest { vm, gfn: GFN + 0x100, pages: 1 }), 1);
        world.check();
        assert!(world.host_reads(0x500) && !world.host_reads(0x4ff) && !world.host_reads(0x501));
        assert_eq!(world.hyp.with_vm(vm, |vm| vm.space.pages), Some(0x1ff));
    }

    #[test]
    fn a_page_that_a_guest_gave_up_does_not_keep_its_neighbours_from_the_host() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 8 });
        let hole = Pages::from_raw(GFN + 5, 1).unwrap();
        assert_eq!(world.hyp.guest_relinquish(vm, hole), Ok(1));
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(world.ok(HostCall::ReclaimGuest { vm, gfn: GFN, pages: 8 }), 5);
        let at_the_hole = HostCall::ReclaimGuest { vm, gfn: GFN + 5, pages: 3 };
        assert_eq!(world.call(at_the_hole).outcome, Err(Code::NoEntry));
        assert_eq!(world.ok(HostCall::ReclaimGuest { vm, gfn: GFN + 6, pages: 2 }), 2);
        world.finish(vm);
        world.check();
    }

    #[test]
    fn what_a_dying_vm_lacks_can_be_given() {
        let world = World::new();
        let vm = world.vm(crate::testing::PROTECTED, 0x1000, 1);
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN, pages: 0x200 });
        world.ok(HostCall::VmTeardownStart { vm });
        let reclaim = HostCall::ReclaimGuest { vm, gfn: GFN, pages: 1 };
        assert_eq!(world.call(reclaim).outcome, Err(Code::NoMemory));
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1100, pages: 1 });
        world.ok(reclaim);
        world.check();
    }

    #[test]
    fn before_the_machine_goes_down_every_private_page_is_wiped_and_no_guest_runs_again() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x8000_0000, x0: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN + 0x200, pages: 0x200 });
        world.fill(0x5ff);
        assert_eq!(world.hyp.wipe_all_guests(), 0x202);
        assert!(world.is_wiped(0x5ff));
        let run = HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] };
        assert_eq!(world.call(run).outcome, Err(Code::Permission));
    }
}
