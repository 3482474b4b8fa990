//! Donations: a page changes its owner.
//!
//! Sources of the rules: Linux 7.2 `__pkvm_host_donate_hyp`, `__pkvm_hyp_donate_host` and
//! `__pkvm_host_donate_guest`, to which ranges and blocks are added.

use super::guest::GuestSpace;
use super::{Error, Host, HypDiffers, HypSpace, Owner, TOPUP_RESERVE, chunk};
use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::memory::MemoryMap;
use crate::pgtable::Run;
use crate::pgtable::hyp_stage1::{HypStage1, Mapped, Rights};
use crate::pgtable::stage2::{Entry, Sharing, Stage2};
use crate::pool::Lacking;
use abi::page::{Permissions, Pool};

/// How far a donation to the hypervisor may draw on the table pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// The pages become tables: the reserve may be used, since they refill it.
    Refill,
    /// They do not: the reserve stays.
    Keep,
}

/// A chunk of the host's pages that the hypervisor may have: checked, and what it takes reserved, as long as the locks
/// are held.
#[derive(Debug)]
#[must_use = "nothing has changed yet"]
pub struct HostToHyp {
    run: Run<Stage2>,
    hole: Run<HypStage1>,
}

/// Checks that a chunk of the host's pages can go to the hypervisor, and reserves what that takes. More can be reserved
/// before the [`commit`](HostToHyp::commit).
///
/// # Errors
/// The host does not own all of them alone, or table pages are lacking. With [`Draw::Refill`], also if the
/// chunk is smaller than the number of tables that it takes and the pool would end below its reserve.
pub fn host_to_hyp<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &Host,
    hyp: &HypSpace,
    pages: Pages<Pfn>,
    draw: Draw,
) -> Result<HostToHyp, Error> {
    // Check.
    memory.check(pages)?;
    let (pages, _) = chunk(pages, pages);
    let run = host.check(machine, pages, Sharing::Owned)?;
    let hole = hyp.check_unmapped(machine, pages)?;
    // Reserve.
    let tables = run.tables_needed().saturating_add(hole.tables_needed());
    match draw {
        Draw::Keep => host.reserve(tables)?,
        Draw::Refill => {
            host.pool.check(Pool::Tables, tables, 0)?;
            let after = host.pool.free().saturating_sub(tables).saturating_add(pages.count());
            if after < TOPUP_RESERVE.min(host.pool.free()) {
                return Err(Lacking { pool: Pool::Tables, pages: tables }.rounded().into());
            }
        }
    }
    Ok(HostToHyp { run, hole })
}

impl HostToHyp {
    /// Gives the chunk to the hypervisor and maps it at EL2. Returns it.
    ///
    /// The content stays: whoever uses the pages overwrites them.
    pub fn commit<M: Machine>(self, machine: &M, host: &mut Host, hyp: &mut HypSpace) -> Pages<Pfn> {
        let pages = self.run.pages().identity();
        host.table.change(machine, self.run, &mut host.pool, Entry::Owned(Owner::Hyp));
        hyp.map(machine, host, self.hole);
        pages
    }
}

/// Gives pages of the hypervisor's back to the host, wiped: one, or a few that belong together. `release` takes them
/// out of use, once it is sure that they go.
///
/// # Errors
/// The hypervisor does not own all of them, they cross the end of a chunk, or table pages are lacking.
pub fn hyp_to_host<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    hyp: &mut HypSpace,
    pages: Pages<Pfn>,
    release: impl FnOnce(),
) -> Result<(), Error> {
    // Check.
    memory.check(pages)?;
    let run = host.check_says(machine, pages, Entry::Owned(Owner::Hyp))?;
    let shown = Some(Mapped { pfn: pages.start(), rights: Rights::ReadWrite });
    let mapping = hyp.table.expect(machine, pages.identity_va(), shown).map_err(HypDiffers)?;
    // Reserve.
    let tables = run.tables_needed().saturating_add(mapping.tables_needed());
    host.reserve(tables)?;
    // Commit.
    release();
    hyp.table.change(machine, mapping, &mut host.pool, None);
    pages.iter().for_each(|page| machine.wipe(page));
    host.give(machine, run, Sharing::Owned);
    Ok(())
}

/// Gives a chunk of the host's pages to a protected guest, which sees it at `gfns`. Returns the number of
/// pages.
///
/// Both runs have the same length. The content stays: what the host put there is what the guest starts with.
///
/// # Errors
/// The host does not own all of them alone, the guest has something there already, or table pages are
/// lacking in the host's pool or the VM's.
pub fn host_to_guest<M: Machine>(
    machine: &M,
    memory: &MemoryMap,
    host: &mut Host,
    guest: &mut GuestSpace,
    pfns: Pages<Pfn>,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    // Check.
    memory.check(pfns)?;
    guest.check_span(gfns)?;
    let (pfns, gfns) = chunk(pfns, gfns);
    let run = host.check(machine, pfns, Sharing::Owned)?;
    let hole = guest.check_empty(machine, gfns)?;
    // Reserve.
    host.reserve(run.tables_needed())?;
    guest.reserve(hole.tables_needed())?;
    // Commit: the host loses the pages before the guest gets them.
    let handle = guest.handle;
    let owner = Owner::Guest { vm: handle, gfn: gfns.start() };
    host.table.change(machine, run, &mut host.pool, Entry::Owned(owner));
    if machine.needs_clean() {
        for page in pfns.iter() {
            machine.clean(page);
        }
    }
    machine.invalidate_icache();
    guest.give(machine, hole, pfns, Sharing::Owned, Permissions::ALL);
    Ok(pfns.count())
}

impl HypSpace {
    /// Check: nothing is mapped at EL2 for these pages.
    #[inline]
    pub(super) fn check_unmapped<M: Machine>(
        &self,
        machine: &M,
        pages: Pages<Pfn>,
    ) -> Result<Run<HypStage1>, HypDiffers> {
        self.table.expect(machine, pages.identity_va(), None).map_err(HypDiffers)
    }

    /// Commit: maps a chunk read-write. Its tables come from the host's pool.
    pub(super) fn map<M: Machine>(&mut self, machine: &M, host: &mut Host, hole: Run<HypStage1>) {
        let first = Some(Mapped { pfn: hole.pages().start().identity(), rights: Rights::ReadWrite });
        self.table.change(machine, hole, &mut host.pool, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Setup;
    use crate::testing::{HYP_START, PROTECTED, RAM_PAGES, RAM_START, TestMachine, World, setup};
    use abi::host::HostCall;
    use abi::{Error as Code, HostState, VmHandle};

    fn donate(world: &World, vm: VmHandle, page: u64, gfn: u64, pages: u64) -> (Result<(), Code>, u64) {
        let result = world.call(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn, pages });
        (result.outcome, result.values[0])
    }

    #[test]
    fn a_donated_page_is_the_guests_and_no_longer_the_hosts() {
        let world = World::new();
        let vm = world.protected_vm();
        world.load_all();
        assert_eq!(donate(&world, vm, 5, 0x8_0000, 1), (Ok(()), 1));
        world.check();
        assert!(!world.host_reads(5));
        assert!(world.host_reads(4) && world.host_reads(6), "the neighbours stay");
        assert_eq!(world.guest_reads(vm, 0x8_0000), Some(5));
        assert_eq!(world.census().guest, 1);
    }

    #[test]
    fn what_the_host_wrote_is_behind_the_caches_before_a_guest_has_it() {
        let world = World::new();
        let vm = world.protected_vm();
        let pages = [5, 6, 7].map(|page| (RAM_START + page) << 12);
        pages.iter().for_each(|pa| world.sim().store64(pa + 8, 0x1234));
        let before = world.sim().icache_invalidations();
        assert_eq!(donate(&world, vm, 5, 0x8_0000, 3), (Ok(()), 3));
        for pa in pages {
            assert_eq!(world.sim().load64_uncached(pa + 8), 0x1234, "a guest starts with its caches off");
        }
        assert_eq!(world.sim().icache_invalidations(), before + 1, "once a call");
    }

    #[test]
    fn where_stage_2_forces_write_back_all_but_a_donation_clean() {
        let machine = TestMachine::new();
        machine.force_write_back();
        let setup = Setup { force_write_back: true, ..setup(0x40) };
        let world = World::on(machine, &setup).unwrap();
        let vm = world.protected_vm();
        let (pa, gfns) = ((RAM_START + 5) << 12, Pages::from_raw(0x8_0000, 1).unwrap());
        let past_the_caches = || world.sim().load64_uncached(pa);
        world.sim().store64(pa, 0x1234);
        assert_eq!(donate(&world, vm, 5, 0x8_0000, 1), (Ok(()), 1));
        assert_eq!(past_the_caches(), 0, "the guest reads what is in the caches");
        assert_eq!(world.hyp.guest_share_host(vm, gfns), Ok(1));
        assert_eq!(past_the_caches(), 0x1234, "the host may look there");
        world.sim().store64(pa, 0x5678);
        assert_eq!(world.hyp.guest_unshare_host(vm, gfns), Ok(1));
        assert_eq!(past_the_caches(), 0x5678, "nothing else comes to light behind a line");
        assert_eq!(world.guest_reads(vm, 0x8_0000), Some(5));
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(world.ok(HostCall::ReclaimGuest { vm, gfn: 0x8_0000, pages: 1 }), 1);
        assert!(world.is_wiped(5), "also past the caches");
        world.check();
    }

    #[test]
    fn a_run_that_is_donated_is_gone_from_every_tlb() {
        let world = World::new();
        let vm = world.protected_vm();
        assert_eq!(donate(&world, vm, 0x400, 0x8_0000, 1), (Ok(()), 1));
        world.load_all();
        assert_eq!(donate(&world, vm, 0x401, 0x8_0001, 3), (Ok(()), 3));
        world.check();
        assert!((0x400..0x404).all(|page| !world.host_reads(page)) && world.host_reads(0x404));
    }

    #[test]
    fn a_whole_block_stays_a_block_on_both_sides() {
        let world = World::new();
        let vm = world.protected_vm();
        let before = world.hyp.host.lock().pool.free();
        assert_eq!(donate(&world, vm, 0x400, 0x8_0200, 0x200), (Ok(()), 0x200));
        world.check();
        assert_eq!(world.hyp.host.lock().pool.free(), before);
        assert!(!world.host_reads(0x400) && !world.host_reads(0x5ff) && world.host_reads(0x600));
        let leaves = world.sim().leaves_stage2(world.guest(vm));
        assert_eq!(leaves.iter().map(|leaf| leaf.size).collect::<Vec<_>>(), [2 << 20]);
    }

    #[test]
    fn a_block_that_is_not_aligned_alike_on_both_sides_is_given_in_pages() {
        let world = World::new();
        let vm = world.protected_vm();
        let (mut done, mut calls) = (0, 0);
        while done < 0x200 {
            let (outcome, pages) = donate(&world, vm, 0x401 + done, 0x8_0200 + done, 0x200 - done);
            assert_eq!(outcome, Ok(()));
            done += pages;
            calls += 1;
        }
        world.check();
        assert_eq!(calls, 2);
        assert_eq!(world.guest_reads(vm, 0x8_03ff), Some(0x600));
        assert_eq!(world.census().guest, 0x200);
    }

    #[test]
    fn every_page_that_is_not_the_hosts_to_give_is_refused_and_nothing_changes() {
        let world = World::new();
        let vm = world.protected_vm();
        let hyp = HYP_START - RAM_START;
        assert_eq!(donate(&world, vm, 9, 0x100, 1).0, Ok(()));
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 10, pages: 1 });
        let before = (world.census(), world.hyp.with_vm(vm, |vm| vm.space.pages));
        let cases = [
            ("of the hypervisor", hyp, 0x200, 1, Code::Permission),
            ("last before the hypervisor and on", hyp - 1, 0x200, 2, Code::Invalid),
            ("from RAM's start over the hypervisor", 0, 0x200, 0x800, Code::Invalid),
            ("of the guest already", 9, 0x200, 1, Code::Permission),
            ("shared", 10, 0x200, 1, Code::Permission),
            ("from the host's own to one of the guest", 8, 0x200, 2, Code::Permission),
            ("no-map", 0x800, 0x200, 1, Code::Permission),
            ("into the no-map range", 0x7ff, 0x200, 2, Code::Invalid),
            ("behind RAM", RAM_PAGES, 0x200, 1, Code::Permission),
            ("over the end of RAM", RAM_PAGES - 1, 0x200, 2, Code::Invalid),
            ("at a taken guest page", 20, 0x100, 1, Code::Permission),
            ("before and at a taken guest page", 20, 0xff, 2, Code::Permission),
            ("beyond the guest's space", 20, 1 << 28, 1, Code::Range),
            ("over the end of the guest's space", 20, (1 << 28) - 1, 2, Code::Range),
            ("none", 20, 0x200, 0, Code::Invalid),
            ("2^52 pages", 20, 0x200, 1 << 52, Code::Invalid),
            ("all pages", 20, 0x200, u64::MAX, Code::Invalid),
            ("an absurd guest page", 20, u64::MAX, 1, Code::Invalid),
        ];
        for (what, page, gfn, pages, error) in cases {
            assert_eq!(donate(&world, vm, page, gfn, pages), (Err(error), 0), "{what}");
            assert_eq!((world.census(), world.hyp.with_vm(vm, |vm| vm.space.pages)), before, "{what}");
            world.check();
        }
    }

    #[test]
    fn a_guest_without_table_pages_asks_for_them_and_nothing_changes() {
        let world = World::new();
        let vm = world.vm(PROTECTED, 0x1000, 0);
        let before = world.census();
        let result = world.call(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 });
        assert_eq!(result.outcome, Err(Code::NoMemory));
        assert_eq!(result.values[..2], [2, Pool::Vm as u64]);
        assert_eq!(world.census(), before);
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1002, pages: 2 });
        assert_eq!(donate(&world, vm, 0, 0, 1), (Ok(()), 1));
        world.check();
    }

    #[test]
    fn a_host_without_table_pages_asks_for_them_and_a_top_up_helps() {
        let world = World::with_pool(World::least_pool(setup));
        assert_eq!(world.hyp.host.lock().pool.free(), TOPUP_RESERVE);
        let root = RAM_START + 0x1400;
        let flags = PROTECTED;
        let result = world.call(HostCall::VmCreate { flags, root });
        assert_eq!(result.outcome, Err(Code::NoMemory));
        assert_eq!(result.values[1], Pool::Tables as u64);
        let small = world.call(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0xc00, pages: 1 });
        assert_eq!(small.outcome, Err(Code::NoMemory), "it would eat up the reserve");
        let pages = 0x10;
        world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0xc00, pages });
        world.ok(HostCall::VmCreate { flags, root });
        world.check();
        assert_eq!(world.host_state(0xc00), Some(HostState::NoPage));
    }

    #[test]
    fn the_table_pages_that_are_asked_for_suffice_wherever_they_lie() {
        for page in (0xc00..0x1000).step_by(8) {
            let world = World::with_pool(World::least_pool(setup));
            let vm = HostCall::VmCreate { flags: PROTECTED, root: RAM_START + 0x1400 };
            let result = world.call(vm);
            assert_eq!(result.outcome, Err(Code::NoMemory));
            let (pfn, pages) = (RAM_START + page, result.values[0]);
            assert_eq!(page % pages, 0, "aligned as asked for");
            assert_eq!(world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn, pages }), pages);
            world.ok(vm);
        }
    }

    #[test]
    fn a_top_up_may_leave_just_the_reserve() {
        let world = World::with_pool(World::least_pool(setup));
        assert_eq!(world.hyp.host.lock().pool.free(), TOPUP_RESERVE);
        // In a block of the host's that EL2 has nothing in: a table each.
        let top_up = |pages| HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0xc00, pages };
        assert_eq!(world.call(top_up(1)).outcome, Err(Code::NoMemory));
        world.ok(top_up(2));
        assert_eq!(world.hyp.host.lock().pool.free(), TOPUP_RESERVE);
        world.check();
    }

    #[test]
    fn a_whole_block_given_to_the_hypervisor_is_mapped_there_in_pages() {
        let world = World::new();
        let (pfn, pages) = (RAM_START + 0xc00, crate::pgtable::REGION_PAGES);
        world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn, pages });
        let leaves = world.sim().leaves_el2(world.el2());
        let its: Vec<u64> =
            leaves.iter().filter(|leaf| leaf.pa >> 21 == pfn >> 9).map(|leaf| leaf.size).collect();
        assert_eq!(its, [0x1000; 512], "a block could not be split while another CPU uses it");
    }

    #[test]
    fn pages_given_to_the_hypervisor_are_mapped_there_and_nowhere_else() {
        let world = World::new();
        world.load_all();
        world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0xc00, pages: 3 });
        world.check();
        for page in 0xc00..0xc03 {
            assert!(!world.host_reads(page));
        }
        assert!(world.host_reads(0xc03));
        assert!(world.hyp.audit(crate::addr::Vpn::new(crate::testing::PRIVATE).unwrap()).is_ok());
    }
}
