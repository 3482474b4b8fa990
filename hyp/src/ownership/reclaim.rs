//! Taking pages back from a guest that is dying, or by force from one that is alive; and wiping all of them before the
//! machine goes down.
//!
//! Sources of the rules: Linux 7.2 `__pkvm_host_reclaim_page_guest` and `__pkvm_host_force_reclaim_page_guest`. A private
//! page is wiped and cleaned before the host can reach it (I4); a shared one is not, since the host can read it already.

use super::guest::{Gap, GuestSpace, Piece};
use super::{Error, Host, Owner, chunk};
use crate::addr::{Frame, Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::memory::MemoryMap;
use crate::pgtable::rest_of_region;
use crate::pgtable::stage2::{Entry, Sharing};
use abi::VmHandle;

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
    guest.prepare(machine, host, gfns, &[Sharing::Owned, Sharing::Shared])?;
    // Commit: the guest loses the pages, they are wiped, then the host gets them.
    guest.take_pieces(machine, gfns, Entry::Empty, |piece| {
        if piece.sharing == Sharing::Owned {
            for page in piece.pfns.iter() {
                machine.wipe(page);
            }
        }
        host.give_back(machine, piece.pfns, Sharing::Owned);
    });
    Ok(gfns.count())
}

/// What the host's table says of private pages: the VM that it names, and the first chunk of them. That ends before
/// the first page that does not continue it: of another owner, or elsewhere in the guest.
///
/// # Errors
/// The first page is no guest's alone.
pub fn private_piece<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &Host,
    pages: Pages<Pfn>,
) -> Result<(VmHandle, Piece), Error> {
    memory.check(pages)?;
    let first = pages.start();
    let (vm, gfn) = match host.table.entry(machine, first.identity()) {
        Some(Entry::Owned(Owner::Guest { vm, gfn })) => (vm, gfn),
        Some(Entry::Page(_)) => return Err(Error::HostHasAccess(first)),
        _ => return Err(Error::HostState(first)),
    };
    let (pages, _) = chunk(pages, pages);
    let pages = pages.truncated(rest_of_region(gfn.as_u64()));
    let run = host.table.run(machine, pages.identity()).ok_or(Error::HostState(first))?;
    let pfns = run.pages().identity();
    let gfns = Pages::new(gfn, pfns.count()).ok_or(Error::BeyondGuest)?;
    Ok((vm, Piece { gfns, pfns, sharing: Sharing::Owned }))
}

/// Takes a piece that the host's table names from a guest that is alive, which finds poison in its place. Returns the
/// number of pages.
///
/// # Errors
/// The guest does not show just these pages there, alone; or table pages are lacking.
pub fn by_force<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    piece: Piece,
) -> Result<u64, Error> {
    // Check and reserve. Both sides' entries name each other, so a table that was damaged loses no other page.
    guest.check_span(piece.gfns)?;
    if guest.piece(machine, piece.gfns).ok() != Some(piece) {
        return Err(Error::GuestState(piece.gfns.start()));
    }
    guest.prepare(machine, host, piece.gfns, &[Sharing::Owned])?;
    // Commit: the guest loses the pages, they are wiped, then the host gets them.
    guest.take_pieces(machine, piece.gfns, Entry::Poisoned, |piece| {
        for page in piece.pfns.iter() {
            machine.wipe(page);
        }
        host.give_back(machine, piece.pfns, Sharing::Owned);
    });
    Ok(piece.gfns.count())
}

/// Wipes every page that a guest owns alone, leaving its tables as they are: for a machine that goes down.
/// Returns the number of pages.
pub fn wipe_private<M: Machine>(machine: &M, guest: &GuestSpace) -> u64 {
    let mut wiped = 0u64;
    let everything = Gfn::new(0).and_then(|first| Pages::new(first, guest.table.input_end()));
    if let Some(gfns) = everything {
        for run in guest.table.runs(machine, gfns) {
            let Some(page) = run.entry().owned() else { continue };
            for offset in 0..run.pages().count() {
                if let Some(pfn) = page.pfn.checked_add(offset) {
                    machine.wipe(pfn);
                    wiped = wiped.saturating_add(1);
                }
            }
        }
    }
    wiped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::query::GuestPage;
    use crate::testing::{HYP_START, RAM_PAGES, RAM_START, World};
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

    fn force(page: u64, pages: u64) -> HostCall {
        HostCall::ForceReclaim { pfn: RAM_START + page, pages }
    }

    #[test]
    fn a_page_taken_by_force_is_wiped_and_the_guest_finds_poison() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 3 });
        world.fill(5);
        world.load_all();
        assert_eq!(world.ok(force(5, 1)), 1);
        world.check();
        assert!(world.is_wiped(5) && world.host_reads(5));
        assert_eq!(world.guest_reads(vm, GFN + 1), None);
        assert_eq!(world.hyp.with_vm(vm, |vm| vm.space.pages), Some(2));
        let poisoned = Pages::from_raw(GFN + 1, 1).unwrap();
        assert_eq!(world.hyp.guest_page(vm, poisoned.start()), GuestPage::Poisoned);
        // Nothing makes it good again.
        let refused = Err(Error::Poisoned(poisoned.start()));
        assert_eq!(world.hyp.guest_share_host(vm, poisoned), refused);
        assert_eq!(world.hyp.guest_unshare_host(vm, poisoned), refused);
        assert_eq!(world.hyp.guest_relinquish(vm, poisoned), refused);
        let no_device = Err(Error::GuestState(poisoned.start()));
        assert_eq!(world.hyp.guard_map(vm, poisoned), no_device);
        assert_eq!(world.hyp.guard_unmap(vm, poisoned), no_device);
        let donate = HostCall::DonateGuest { vm, pfn: RAM_START + 5, gfn: GFN + 1, pages: 1 };
        assert_eq!(world.call(donate).outcome, Err(Code::Permission));
        assert_eq!(world.call(force(5, 1)).outcome, Err(Code::Again), "the host has it already");
        world.ok(HostCall::VmTeardownStart { vm });
        let reclaimed = (0..3).map(|page| world.ok(HostCall::ReclaimGuest { vm, gfn: GFN + page, pages: 1 }));
        assert_eq!(reclaimed.sum::<u64>(), 3, "poison is passed over");
        world.finish(vm);
        world.check();
    }

    #[test]
    fn a_page_of_a_block_is_taken_by_force_without_its_neighbours() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN, pages: 0x200 });
        assert_eq!(world.ok(force(0x500, 1)), 1);
        assert!(world.host_reads(0x500) && !world.host_reads(0x4ff) && !world.host_reads(0x501));
        assert_eq!(world.guest_reads(vm, GFN + 0x101), Some(0x501));
        assert_eq!(world.ok(force(0x501, 0xff)), 0xff);
        assert_eq!(world.hyp.with_vm(vm, |vm| vm.space.pages), Some(0x100));
        world.check();
    }

    #[test]
    fn a_chunk_taken_by_force_ends_where_the_guests_pages_do_not_go_on() {
        let world = World::new();
        let (one, other) = (world.protected_vm(), world.vm(crate::testing::PROTECTED, 0x1200, 8));
        let donate = |vm, page, gfn| {
            world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn, pages: 1 });
        };
        // Elsewhere in the guest; another guest; over the end of the guest's table; then the host's own.
        donate(one, 4, GFN);
        donate(one, 5, GFN + 7);
        donate(other, 6, GFN + 8);
        donate(other, 7, GFN + 0x3ff);
        donate(other, 8, GFN + 0x400);
        for page in 4..9 {
            assert_eq!(world.ok(force(page, 9 - page + 2)), 1, "{page}");
        }
        assert_eq!(world.call(force(9, 1)).outcome, Err(Code::Again));
        world.check();
    }

    #[test]
    fn what_is_no_private_page_of_a_guest_that_is_alive_is_not_taken_and_stops_nothing() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        assert_eq!(world.hyp.guest_share_host(vm, Pages::from_raw(GFN + 1, 1).unwrap()), Ok(1));
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 8, pages: 1 });
        let before = (world.census(), world.hyp.with_vm(vm, |vm| vm.space.pages));
        let outcome =
            |page: u64, pages| world.call(HostCall::ForceReclaim { pfn: RAM_START + page, pages }).outcome;
        let cases = [
            ("the hypervisor's text", HYP_START - RAM_START, 1, Code::Permission),
            ("a VM's root", 0x1000, 1, Code::Permission),
            ("shared by its guest", 5, 1, Code::Again),
            ("lent to the hypervisor", 8, 1, Code::Again),
            ("the host's", 9, 1, Code::Again),
            ("no memory", RAM_PAGES, 1, Code::Permission),
            ("no-map", 0x800, 1, Code::Permission),
            ("over the end of memory", RAM_PAGES - 1, 2, Code::Invalid),
            ("none", 4, 0, Code::Invalid),
            ("all numbers of pages", 4, u64::MAX, Code::Invalid),
            ("no page number", u64::MAX - RAM_START, 1, Code::Invalid),
        ];
        for (what, page, pages, error) in cases {
            assert_eq!(outcome(page, pages), Err(error), "{what}");
            assert_eq!((world.census(), world.hyp.with_vm(vm, |vm| vm.space.pages)), before, "{what}");
        }
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(outcome(4, 1), Err(Code::Permission), "a dying VM gives back with RECLAIM_GUEST");
        world.check();
    }

    #[test]
    fn an_annotation_that_its_guest_does_not_confirm_is_an_error() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        let annotate = |page: u64, vm, gfn| {
            let page = Pages::<Pfn>::from_raw(RAM_START + page, 1).unwrap();
            let owner = Owner::Guest { vm, gfn: Gfn::new(gfn).unwrap() };
            let mut host = world.hyp.host.lock();
            let Host { table, pool } = &mut *host;
            table.set(world.hyp.machine(), page.identity(), pool, Entry::Owned(owner));
        };
        // Damaged on purpose, as no call can: the oracle would stop here, so it is not asked.
        let force = |page| {
            let pages = Pages::<Pfn>::from_raw(RAM_START + page, 1).unwrap();
            let mut host = world.hyp.host.lock();
            let machine = world.hyp.machine();
            let (vm, piece) = private_piece(machine, &world.hyp.memory, &host, pages)?;
            let mut vm = world.hyp.vms.lock(vm).ok_or(Error::NoVm)?;
            by_force(machine, &mut host, &mut vm.space, piece)
        };
        let state = |gfn| Err(Error::GuestState(Gfn::new(gfn).unwrap()));
        annotate(9, vm, GFN + 1);
        assert_eq!(force(9), state(GFN + 1), "the guest shows another page there");
        annotate(9, vm, GFN + 2);
        assert_eq!(force(9), state(GFN + 2), "the guest shows nothing there");
        annotate(9, VmHandle::new(vm.slot(), vm.generation() + 1).unwrap(), GFN);
        assert_eq!(force(9), Err(Error::NoVm), "a VM that is not there");
        assert_eq!(force(4), Ok(1));
    }

    #[test]
    fn before_the_machine_goes_down_every_private_page_is_wiped_and_no_guest_runs_again() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x8000_0000, x0: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 2 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN + 0x200, pages: 0x200 });
        // What the guest shares the host has anyway.
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 6, gfn: GFN + 2, pages: 1 });
        assert_eq!(world.hyp.guest_share_host(vm, Pages::from_raw(GFN + 2, 1).unwrap()), Ok(1));
        world.fill(6);
        world.fill(0x5ff);
        assert_eq!(world.hyp.wipe_all_guests(), 0x202);
        assert!(world.is_wiped(0x5ff) && !world.is_wiped(6));
        let run = HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] };
        assert_eq!(world.call(run).outcome, Err(Code::Permission));
    }
}
