//! What the host lends: to the hypervisor, and to guests that are not protected.
//!
//! A page shared with the hypervisor is not mapped at EL2 until it is pinned, so that a share costs one word;
//! pins are few and live in a list that costs nothing when unused (I7).
//!
//! Sources of the rules: Linux 7.2 `__pkvm_host_share_hyp`, `hyp_pin_shared_mem`, `__pkvm_host_share_guest`
//! and their inverses. How many guest pages show a page that is lent stands in the host's leaf (I7); which do stands in
//! those guests' tables.

use super::guest::GuestSpace;
use super::{Error, Host, HypSpace, chunk};
use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::memory::MemoryMap;
use crate::pgtable::stage2::{Entry, Page, Sharing};
use abi::page::Permissions;
use arrayvec::ArrayVec;

/// Distinct pages that can be pinned at a time.
pub const MAX_PINNED: usize = 64;

/// Pages that the hypervisor holds on to, each with the number of its holds.
#[derive(Debug, Default)]
pub struct Pins {
    pages: ArrayVec<(Pfn, u32), MAX_PINNED>,
}

impl Pins {
    /// Number of pages that are held.
    #[cfg(all(feature = "oracle", not(deed_shuttle)))]
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Number of holds on a page.
    pub fn count(&self, page: Pfn) -> u32 {
        self.pages.iter().find(|(pinned, _)| *pinned == page).map_or(0, |(_, count)| *count)
    }
}

/// Lends a chunk to the hypervisor. Returns the number of pages.
///
/// # Errors
/// The host does not own all of them alone, or table pages are lacking.
pub fn host_with_hyp<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    hyp: &mut HypSpace,
    pages: Pages<Pfn>,
) -> Result<u64, Error> {
    // Check.
    memory.check(pages)?;
    let (pages, _) = chunk(pages, pages);
    let run = host.check(machine, pages, Sharing::Owned)?;
    hyp.check_unmapped(machine, pages)?;
    // Reserve.
    host.reserve(run.tables_needed())?;
    // Commit.
    host.give(machine, run, Sharing::SharedWithHyp);
    Ok(pages.count())
}

/// Takes a chunk back from the hypervisor. Returns the number of pages.
///
/// # Errors
/// The pages are not all lent to the hypervisor, or it has pinned one.
pub fn host_unshare_hyp<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    hyp: &mut HypSpace,
    pages: Pages<Pfn>,
) -> Result<u64, Error> {
    // Check.
    memory.check(pages)?;
    let (pages, _) = chunk(pages, pages);
    let run = host.check(machine, pages, Sharing::SharedWithHyp)?;
    if let Some((page, _)) = hyp.pins.pages.iter().find(|(page, _)| pages.contains(*page)) {
        return Err(Error::Pinned(*page));
    }
    // Reserve.
    host.reserve(run.tables_needed())?;
    // Commit.
    host.give(machine, run, Sharing::Owned);
    Ok(pages.count())
}

/// Holds on to a page that is shared with the hypervisor: it is mapped at EL2 and cannot be unshared.
///
/// # Errors
/// The page is not shared with the hypervisor, too many are pinned, or table pages are lacking.
pub fn pin<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    hyp: &mut HypSpace,
    page: Pfn,
) -> Result<(), Error> {
    let pages = Pages::one(page);
    // Check.
    memory.check(pages)?;
    let _ = host.check(machine, pages, Sharing::SharedWithHyp)?;
    if let Some((_, count)) = hyp.pins.pages.iter_mut().find(|(pinned, _)| *pinned == page) {
        *count = count.checked_add(1).ok_or(Error::TooManyPins)?;
        return Ok(());
    }
    if hyp.pins.pages.is_full() {
        return Err(Error::TooManyPins);
    }
    // Reserve.
    let hole = hyp.check_unmapped(machine, pages)?;
    host.reserve(hole.tables_needed())?;
    // Commit.
    hyp.pins.pages.push((page, 1));
    hyp.map(machine, host, hole);
    Ok(())
}

/// Lets go of a page; at the last hold it is unmapped from EL2.
///
/// # Errors
/// The page is not pinned.
pub fn unpin<M: Machine>(machine: &M, host: &mut Host, hyp: &mut HypSpace, page: Pfn) -> Result<(), Error> {
    let position = hyp.pins.pages.iter().position(|(pinned, _)| *pinned == page);
    let at = position.ok_or(Error::HypState(page))?;
    if let Some((_, count)) = hyp.pins.pages.get_mut(at) {
        *count = count.saturating_sub(1);
        if *count > 0 {
            return Ok(());
        }
    }
    hyp.pins.pages.swap_remove(at);
    hyp.table.set(machine, Pages::one(page).identity_va(), &mut host.pool, None);
    Ok(())
}

/// Lends a chunk to a guest that is not protected, which sees it at `gfns`. Returns the number of pages.
///
/// They may be lent to guests already, this one included: it then has them twice.
///
/// # Errors
/// The host does not own all of them, or lends one to the hypervisor; one is lent as often as can be; the guest has
/// something there already; or table pages are lacking in the host's pool or the VM's.
pub fn host_with_guest<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    guest: &mut GuestSpace,
    pfns: Pages<Pfn>,
    gfns: Pages<Gfn>,
    permissions: Permissions,
) -> Result<u64, Error> {
    // Check.
    memory.check(pfns)?;
    guest.check_span(gfns)?;
    let (pfns, gfns) = chunk(pfns, gfns);
    host.check_lendable(machine, pfns)?;
    let hole = guest.check_empty(machine, gfns)?;
    // Reserve.
    host.reserve(host.table.tables_needed(machine, pfns.identity()))?;
    guest.reserve(hole.tables_needed())?;
    // Commit.
    host.change_sharing(machine, pfns, Sharing::lent_once_more);
    machine.invalidate_icache();
    guest.give(machine, hole, pfns, Sharing::Borrowed, permissions);
    Ok(pfns.count())
}

/// Takes a chunk back from a guest that is not protected. Returns the number of pages.
///
/// # Errors
/// The first page is not there, a page is not lent, or table pages are lacking. At a later page that is not
/// there the chunk ends.
pub fn host_unshare_guest<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    // Check and reserve.
    guest.check_span(gfns)?;
    let (gfns, _) = chunk(gfns, gfns);
    let gfns = guest.before_gap(machine, gfns).map_err(|gap| gap.error(gfns.start()))?;
    guest.prepare(machine, host, gfns, &[Sharing::Borrowed])?;
    // Commit: the guest loses the pages before they are the host's alone.
    guest.take_pieces(machine, gfns, Entry::Empty, |piece| {
        host.change_sharing(machine, piece.pfns, Sharing::lent_once_less);
    });
    Ok(gfns.count())
}

impl Host {
    /// Checks that all pages of a chunk can be lent to a guest, once more or for the first time.
    fn check_lendable<M: Machine>(&self, machine: &M, pages: Pages<Pfn>) -> Result<(), Error> {
        for run in self.table.runs(machine, pages.identity()) {
            let page = run.pages().start().identity();
            match run.entry() {
                Entry::Page(Page { sharing, .. }) if sharing.lent_once_more().is_some() => {}
                Entry::Page(Page { sharing: Sharing::Lent(_), .. }) => {
                    return Err(Error::TooManyBorrowers(page));
                }
                _ => return Err(Error::HostState(page)),
            }
        }
        Ok(())
    }

    /// Commit: changes the state of each page of a chunk that was checked; only software bits change. Pages of one
    /// state are changed together, so that a block stays one.
    fn change_sharing<M: Machine>(
        &mut self,
        machine: &M,
        pages: Pages<Pfn>,
        change: impl Fn(Sharing) -> Option<Sharing>,
    ) {
        let mut rest = Some(pages);
        while let Some(pages) = rest {
            let run = self.table.run(machine, pages.identity());
            let changed = run.and_then(|run| match run.entry() {
                Entry::Page(page) => Some((run, change(page.sharing)?)),
                _ => None,
            });
            let Some((run, sharing)) = changed else {
                crate::broken("a page that was checked is in another state");
            };
            rest = pages.advanced(run.pages().count());
            self.give(machine, run, sharing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgtable::stage2::Borrowers;
    use crate::testing::{PROTECTED, RAM_START, World};
    use abi::host::HostCall;
    use abi::page::{MAX_BORROWERS, Pool};
    use abi::{Error as Code, HostState, VmFlags, VmHandle};

    const PFN: u64 = RAM_START + 7;

    #[test]
    fn a_shared_page_stays_readable_to_the_host_and_comes_back() {
        let world = World::new();
        let before = world.census();
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 2 });
        assert_eq!(world.host_state(7), Some(HostState::SharedOwned));
        assert_eq!(world.call(HostCall::ShareHyp { pfn: PFN, pages: 1 }).outcome, Err(Code::Permission));
        assert!(world.host_reads(7));
        world.ok(HostCall::UnshareHyp { pfn: PFN, pages: 2 });
        assert_eq!(world.call(HostCall::UnshareHyp { pfn: PFN, pages: 1 }).outcome, Err(Code::Permission));
        assert_eq!(world.census(), before);
        world.check();
    }

    #[test]
    fn unshare_of_a_pinned_page_is_refused() {
        let world = World::new();
        let page = Pfn::new(PFN).unwrap();
        assert_eq!(world.hyp.pin(page), Err(Error::HostState(page)), "not shared");
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 1 });
        assert_eq!((world.hyp.pin(page), world.hyp.pin(page)), (Ok(()), Ok(())));
        for _ in 0..2 {
            assert_eq!(world.call(HostCall::UnshareHyp { pfn: PFN, pages: 1 }).outcome, Err(Code::Busy));
            assert_eq!(world.hyp.unpin(page), Ok(()));
        }
        assert_eq!(world.hyp.unpin(page), Err(Error::HypState(page)));
        world.ok(HostCall::UnshareHyp { pfn: PFN, pages: 1 });
        world.check();
    }

    #[test]
    fn a_page_is_mapped_at_el2_while_it_is_pinned_and_not_longer() {
        let world = World::new();
        let page = Pfn::new(PFN).unwrap();
        let mapped =
            || world.hyp.hyp.lock().table.entry(world.hyp.machine(), page.identity_va()).flatten().is_some();
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 1 });
        assert!(!mapped());
        world.hyp.pin(page).unwrap();
        assert!(mapped());
        world.hyp.unpin(page).unwrap();
        assert!(!mapped());
        world.check();
    }

    #[test]
    fn a_page_that_is_let_go_is_in_no_tlb_of_el2() {
        let world = World::new();
        let page = Pfn::new(PFN).unwrap();
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 1 });
        let reaches = |cpu| world.sim().access_el2(cpu, world.el2(), PFN << 12, sim::Access::Read).is_ok();
        world.hyp.pin(page).unwrap();
        assert!(reaches(0) && reaches(1), "and both have it in their TLBs now");
        world.hyp.unpin(page).unwrap();
        assert!(!reaches(0) && !reaches(1));
        world.check();
    }

    #[test]
    fn a_guest_executes_nothing_that_was_in_a_lent_page_before() {
        let world = World::new();
        let vm = world.vm(VmFlags { protected: false, ..crate::testing::PROTECTED }, 0x1000, 16);
        let before = world.sim().icache_invalidations();
        let permissions = Permissions::ALL;
        world.ok(HostCall::ShareGuest { vm, pfn: PFN, gfn: 4, pages: 1, permissions });
        assert_eq!(world.sim().icache_invalidations(), before + 1);
    }

    #[test]
    fn pins_beyond_the_list_are_refused_and_none_is_lost() {
        let world = World::new();
        world.ok(HostCall::ShareHyp { pfn: RAM_START, pages: 0x100 });
        for offset in 0..MAX_PINNED as u64 {
            world.hyp.pin(Pfn::new(RAM_START + offset).unwrap()).unwrap();
        }
        let one_more = Pfn::new(RAM_START + MAX_PINNED as u64).unwrap();
        assert_eq!(world.hyp.pin(one_more), Err(Error::TooManyPins));
        assert_eq!(world.hyp.unpin(one_more), Err(Error::HypState(one_more)));
        for offset in 0..MAX_PINNED as u64 {
            world.hyp.unpin(Pfn::new(RAM_START + offset).unwrap()).unwrap();
        }
        world.ok(HostCall::UnshareHyp { pfn: RAM_START, pages: 0x100 });
        world.check();
    }

    #[test]
    fn one_pin_too_many_is_refused_as_that_even_if_tables_are_lacking_too() {
        let world = World::new();
        world.ok(HostCall::ShareHyp { pfn: RAM_START, pages: 0x100 });
        // In another region, where EL2 has no table yet.
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 0xc00, pages: 1 });
        for offset in 0..MAX_PINNED as u64 {
            world.hyp.pin(Pfn::new(RAM_START + offset).unwrap()).unwrap();
        }
        world.drain_tables();
        let one_more = Pfn::new(RAM_START + 0xc00).unwrap();
        assert_eq!(world.hyp.pin(one_more), Err(Error::TooManyPins));
        world.hyp.unpin(Pfn::new(RAM_START).unwrap()).unwrap();
        assert!(matches!(world.hyp.pin(one_more), Err(Error::Lacking(_))));
    }

    #[test]
    fn a_page_lent_to_a_guest_keeps_to_its_permissions_and_comes_back() {
        let world = World::new();
        let vm = world.vm(VmFlags::default(), 0x1000, 8);
        let before = world.census();
        let permissions = Permissions { write: false, execute: true };
        world.ok(HostCall::ShareGuest { vm, pfn: PFN, gfn: 3, pages: 1, permissions });
        assert_eq!(world.guest_reads(vm, 3), Some(7));
        let write = world.sim().access_stage2(0, world.guest(vm), 3 << 12, sim::Access::Write);
        assert!(write.is_err());
        assert!(world.host_reads(7));
        let unshare_hyp = world.call(HostCall::UnshareHyp { pfn: PFN, pages: 1 });
        assert_eq!(unshare_hyp.outcome, Err(Code::Permission), "it is not lent to the hypervisor");
        world.ok(HostCall::UnshareGuest { vm, gfn: 3, pages: 1 });
        assert_eq!(world.guest_reads(vm, 3), None);
        assert_eq!(world.census(), before);
        world.check();
    }

    fn open(world: &World, root: u64) -> VmHandle {
        world.vm(VmFlags::default(), root, 8)
    }

    fn lend(world: &World, vm: VmHandle, page: u64, gfn: u64, pages: u64) -> Result<u64, Code> {
        let (pfn, permissions) = (RAM_START + page, Permissions::ALL);
        let result = world.call(HostCall::ShareGuest { vm, pfn, gfn, pages, permissions });
        result.outcome.map(|()| result.values[0])
    }

    /// How the host's table has a page.
    fn sharing(world: &World, page: u64) -> Sharing {
        let page = Pfn::new(RAM_START + page).unwrap();
        match world.hyp.host.lock().table.entry(world.hyp.machine(), page.identity()) {
            Some(Entry::Page(page)) => page.sharing,
            other => panic!("{other:?}"),
        }
    }

    fn lent(borrowers: u8) -> Sharing {
        Sharing::Lent(Borrowers::new(borrowers).unwrap())
    }

    #[test]
    fn a_page_lent_twice_is_the_hosts_alone_only_when_both_loans_have_ended() {
        let world = World::new();
        let (one, other) = (open(&world, 0x1000), open(&world, 0x1100));
        let before = world.census();
        // To one guest at two places, and to another.
        assert_eq!([lend(&world, one, 7, 3, 1), lend(&world, one, 7, 9, 1)], [Ok(1), Ok(1)]);
        assert_eq!(lend(&world, other, 7, 3, 1), Ok(1));
        assert_eq!(sharing(&world, 7), lent(3));
        world.load_all();
        let owner_only = [
            HostCall::ShareHyp { pfn: PFN, pages: 1 },
            HostCall::UnshareHyp { pfn: PFN, pages: 1 },
            HostCall::VmTopUp { vm: one, pfn: PFN, pages: 1 },
            HostCall::DonateGuest { vm: world.vm(PROTECTED, 0x1200, 8), pfn: PFN, gfn: 0, pages: 1 },
        ];
        let loans = [(one, 9), (other, 3), (one, 3)];
        for (ended, (vm, gfn)) in loans.into_iter().enumerate() {
            for call in owner_only {
                assert_eq!(world.call(call).outcome, Err(Code::Permission), "{call:?}");
            }
            assert_eq!(world.host_state(7), Some(HostState::SharedOwned));
            assert_eq!(world.guest_reads(vm, gfn), Some(7));
            world.ok(HostCall::UnshareGuest { vm, gfn, pages: 1 });
            world.check();
            let readers = loans.map(|(vm, gfn)| world.guest_reads(vm, gfn).is_some());
            assert_eq!(readers, [0, 1, 2].map(|loan| loan > ended));
        }
        assert_eq!(world.host_state(7), Some(HostState::Owned));
        let roots_and_tables = 2 + 8;
        assert_eq!(world.census().host + roots_and_tables, before.host);
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 1 });
    }

    #[test]
    fn a_page_is_lent_as_often_as_its_descriptor_can_count_and_not_once_more() {
        let world = World::new();
        let (one, other) = (open(&world, 0x1000), open(&world, 0x1100));
        for gfn in 0..u64::from(MAX_BORROWERS) {
            assert_eq!(lend(&world, one, 7, gfn, 1), Ok(1));
        }
        assert_eq!(sharing(&world, 7), lent(MAX_BORROWERS));
        let before = world.census();
        assert_eq!(lend(&world, other, 7, 0, 1), Err(Code::Busy));
        assert_eq!(lend(&world, other, 6, 0, 2), Err(Code::Busy), "the whole chunk is refused");
        assert_eq!((world.census(), sharing(&world, 6)), (before, Sharing::Owned));
        assert_eq!(world.guest_reads(other, 0), None);
        world.ok(HostCall::UnshareGuest { vm: one, gfn: 5, pages: 1 });
        assert_eq!(lend(&world, other, 7, 0, 1), Ok(1));
        world.check();
    }

    #[test]
    fn pages_that_are_lent_to_different_numbers_of_guests_are_one_chunk() {
        let world = World::new();
        let (one, other) = (open(&world, 0x1000), open(&world, 0x1100));
        assert_eq!(lend(&world, one, 4, 0, 6), Ok(6));
        assert_eq!(lend(&world, other, 6, 0, 2), Ok(2));
        assert_eq!(lend(&world, other, 2, 0x10, 9), Ok(9));
        let of = |pages: [u64; 9]| pages.map(|page| sharing(&world, page));
        let pages = [2, 3, 4, 5, 6, 7, 8, 9, 10];
        let counts = [1, 1, 2, 2, 3, 3, 2, 2, 1];
        assert_eq!(of(pages), counts.map(lent));
        assert_eq!(world.ok(HostCall::UnshareGuest { vm: other, gfn: 0x10, pages: 9 }), 9);
        assert_eq!(of([4, 5, 6, 7, 8, 9, 4, 6, 9]), [1, 1, 2, 2, 1, 1, 1, 2, 1].map(lent));
        assert_eq!([2, 3, 10].map(|page| sharing(&world, page)), [Sharing::Owned; 3]);
        // One chunk that has a page twice.
        assert_eq!(lend(&world, one, 4, 6, 1), Ok(1));
        assert_eq!(world.ok(HostCall::UnshareGuest { vm: one, gfn: 0, pages: 7 }), 7);
        assert_eq!([4, 5, 8, 9].map(|page| sharing(&world, page)), [Sharing::Owned; 4]);
        assert_eq!([6, 7].map(|page| sharing(&world, page)), [lent(1); 2]);
        world.check();
    }

    #[test]
    fn a_block_that_is_lent_twice_stays_one_until_a_part_of_it_is_lent_again() {
        let world = World::new();
        let (one, other) = (open(&world, 0x1000), open(&world, 0x1100));
        let free = || world.hyp.host.lock().pool.free();
        let before = free();
        for vm in [one, other] {
            assert_eq!(lend(&world, vm, 0x400, 0x200, 0x200), Ok(0x200));
        }
        assert_eq!(free(), before, "no table was needed");
        assert_eq!(lend(&world, one, 0x410, 0, 2), Ok(2));
        assert_eq!(free(), before - 1, "the block is split");
        let counts = [0x40f, 0x410, 0x411, 0x412, 0x5ff].map(|page| sharing(&world, page));
        assert_eq!(counts, [2, 3, 3, 2, 2].map(lent));
        assert_eq!(world.ok(HostCall::UnshareGuest { vm: other, gfn: 0x200, pages: 0x200 }), 0x200);
        assert_eq!([0x400, 0x410].map(|page| sharing(&world, page)), [1, 2].map(lent));
        assert!(world.host_reads(0x410));
        world.check();
    }

    #[test]
    fn a_dying_vm_takes_its_loans_with_it_and_leaves_those_of_others() {
        let world = World::new();
        let (one, other) = (open(&world, 0x1000), open(&world, 0x1100));
        for vm in [one, other] {
            assert_eq!(lend(&world, vm, 7, 3, 1), Ok(1));
        }
        world.ok(HostCall::VmTeardownStart { vm: one });
        assert_eq!(world.call(HostCall::VmTeardownFinish { vm: one }).outcome, Err(Code::Busy));
        world.ok(HostCall::UnshareGuest { vm: one, gfn: 3, pages: 1 });
        world.finish(one);
        assert_eq!((sharing(&world, 7), world.guest_reads(other, 3)), (lent(1), Some(7)));
        world.check();
    }

    #[test]
    fn calls_for_the_other_kind_of_vm_are_refused() {
        let world = World::new();
        let protected = world.protected_vm();
        let open = world.vm(VmFlags::default(), 0x1100, 8);
        let permissions = Permissions::ALL;
        let calls = [
            HostCall::ShareGuest { vm: protected, pfn: PFN, gfn: 0, pages: 1, permissions },
            HostCall::UnshareGuest { vm: protected, gfn: 0, pages: 1 },
            HostCall::DonateGuest { vm: open, pfn: PFN, gfn: 0, pages: 1 },
            HostCall::ReclaimGuest { vm: open, gfn: 0, pages: 1 },
            HostCall::ReclaimGuest { vm: protected, gfn: 0, pages: 1 },
        ];
        for call in calls {
            assert_eq!(world.call(call).outcome, Err(Code::Permission), "{call:?}");
        }
        world.check();
    }

    #[test]
    fn a_number_of_pages_whose_size_wraps_is_refused_by_every_call_and_changes_nothing() {
        let world = World::new();
        let (vm, open) = (world.protected_vm(), open(&world, 0x1100));
        let permissions = Permissions::ALL;
        let before = (world.census(), world.snapshot());
        // Their size in bytes wraps, or that of their descriptors, or the number of the last one.
        for pages in [1 << 52, 1 << 55, 1 << 61, u64::MAX, u64::MAX - PFN + 1, 1 << 36] {
            let calls = [
                HostCall::ShareGuest { vm: open, pfn: PFN, gfn: 0, pages, permissions },
                HostCall::UnshareGuest { vm: open, gfn: 0, pages },
                HostCall::DonateGuest { vm, pfn: PFN, gfn: 0, pages },
                HostCall::ReclaimGuest { vm, gfn: 0, pages },
                HostCall::ForceReclaim { pfn: PFN, pages },
                HostCall::ShareHyp { pfn: PFN, pages },
                HostCall::UnshareHyp { pfn: PFN, pages },
                HostCall::PoolTopUp { pool: Pool::Tables, pfn: PFN, pages },
                HostCall::PoolTopUp { pool: Pool::Metadata, pfn: PFN, pages },
                HostCall::VmTopUp { vm, pfn: PFN, pages },
            ];
            for call in calls {
                let outcome = world.call(call).outcome;
                let refusals = [Code::Invalid, Code::Range, Code::Permission];
                assert!(outcome.is_err_and(|error| refusals.contains(&error)), "{call:x?}: {outcome:?}");
            }
        }
        for call in [
            HostCall::ShareGuest { vm: open, pfn: u64::MAX, gfn: 0, pages: 2, permissions },
            HostCall::ShareGuest { vm: open, pfn: (1 << 36) - 1, gfn: 0, pages: 2, permissions },
            HostCall::ShareGuest { vm: open, pfn: PFN, gfn: u64::MAX, pages: 2, permissions },
        ] {
            assert_eq!(world.call(call).outcome, Err(Code::Invalid), "{call:x?}");
        }
        assert_eq!((world.census(), world.snapshot()), before);
        world.check();
    }

    #[test]
    fn holds_on_a_page_are_counted_up_to_what_fits_and_not_once_more() {
        let world = World::new();
        let page = Pfn::new(PFN).unwrap();
        world.ok(HostCall::ShareHyp { pfn: PFN, pages: 1 });
        world.hyp.pin(page).unwrap();
        world.hyp.hyp.lock().pins.pages[0].1 = u32::MAX;
        assert_eq!(world.hyp.pin(page), Err(Error::TooManyPins));
        assert_eq!(world.hyp.hyp.lock().pins.count(page), u32::MAX, "none is lost");
        assert_eq!(world.call(HostCall::UnshareHyp { pfn: PFN, pages: 1 }).outcome, Err(Code::Busy));
    }
}
