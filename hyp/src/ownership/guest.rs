//! A guest as a component, and what it may do with its own pages: share them with the host, take them back,
//! give them up, and say which addresses are devices.
//!
//! A guest's chunk is a run of *its* pages; the physical pages behind it may lie anywhere. So a transition
//! goes over [`Piece`]s: pages that are consecutive on both sides and in one state. All pieces of a chunk are
//! checked, and all tables reserved, before the first is changed.
//!
//! Sources of the rules: Linux 7.2 `__pkvm_guest_share_host` and `__pkvm_guest_unshare_host`; Android's
//! `MEM_RELINQUISH` and `MMIO_GUARD`.

use super::{Error, GuestDiffers, Host, Owner, chunk};
use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::pgtable::stage2::{Entry, Page, Sharing, Stage2};
use crate::pgtable::{Run, Table, rest_of_region};
use crate::pool::{Lacking, PagePool};
use abi::VmHandle;
use abi::page::{Permissions, Pool};

/// A guest's memory: its stage-2, the pool that pays for it, and how many pages name this VM.
#[derive(Debug)]
pub struct GuestSpace {
    pub(crate) handle: VmHandle,
    pub(crate) table: Table<Stage2>,
    pub(crate) cache: PagePool,
    /// Pages that the guest owns or borrows: so many of its own entries show memory, and the host's table knows of
    /// each (I7). The VM's handle cannot end before this is 0, so no annotation and no loan outlives its VM.
    pub(crate) pages: u64,
}

/// Consecutive pages of a guest, consecutive in memory too and all in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the guest sees them.
    pub gfns: Pages<Gfn>,
    /// Where they are.
    pub pfns: Pages<Pfn>,
    /// Their state at the guest.
    pub sharing: Sharing,
}

/// What a guest's table has where memory was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// Nothing.
    Empty,
    /// Memory that was taken by force.
    Poisoned,
    /// A device, or an entry in change.
    Other,
}

/// The memory that an entry gives access to, or what is there instead.
fn memory(entry: Entry) -> Result<Page, Gap> {
    match entry {
        Entry::Page(page) => Ok(page),
        Entry::Empty => Err(Gap::Empty),
        Entry::Poisoned => Err(Gap::Poisoned),
        _ => Err(Gap::Other),
    }
}

impl Gap {
    /// The refusal of a transition that meets it at this page.
    pub(super) fn error(self, gfn: Gfn) -> Error {
        match self {
            Self::Empty => Error::Missing(gfn),
            Self::Poisoned => Error::Poisoned(gfn),
            Self::Other => Error::GuestState(gfn),
        }
    }
}

/// Shares a chunk of a guest's private pages with the host. Returns the number of pages.
///
/// # Errors
/// A page is missing or poisoned, or not the guest's alone; or table pages are lacking.
pub fn share_host<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    // Check and reserve.
    guest.check_span(gfns)?;
    let (gfns, _) = chunk(gfns, gfns);
    guest.prepare(machine, host, gfns, &[Sharing::Owned])?;
    // Commit.
    guest.change_pieces(machine, gfns, |guest, piece| {
        // The host may look past the caches, with or without FEAT_S2FWB: what it finds there must be what the
        // guest shares, and not what the page held before.
        for page in piece.pfns.iter() {
            machine.clean(page);
        }
        guest.mark(machine, piece, Sharing::Shared);
        host.give_back(machine, piece.pfns, Sharing::Borrowed);
    });
    Ok(gfns.count())
}

/// Takes a chunk of shared pages back from the host. Returns the number of pages.
///
/// # Errors
/// A page is missing or poisoned, or not shared; or table pages are lacking.
pub fn unshare_host<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    // Check and reserve.
    guest.check_span(gfns)?;
    let (gfns, _) = chunk(gfns, gfns);
    guest.prepare(machine, host, gfns, &[Sharing::Shared])?;
    // Commit.
    guest.change_pieces(machine, gfns, |guest, piece| {
        // The host's access is gone from every TLB before the guest may call the pages private.
        host.annotate(machine, piece, guest.handle);
        // What the host left in the caches must not overwrite what the guest stores past them; and what it stored past
        // them must not come to light behind a line that the guest has read. The host chooses how it maps memory, with
        // or without FEAT_S2FWB.
        for page in piece.pfns.iter() {
            machine.clean(page);
        }
        guest.mark(machine, piece, Sharing::Owned);
    });
    Ok(gfns.count())
}

/// Gives a chunk of a guest's private pages back to the host, wiped. Pages that are not there are passed
/// over. Returns the number of pages.
///
/// # Errors
/// A page is shared, poisoned or a device; or table pages are lacking.
pub fn relinquish<M: Machine>(
    machine: &M,
    host: &mut Host,
    guest: &mut GuestSpace,
    gfns: Pages<Gfn>,
) -> Result<u64, Error> {
    // Check and reserve.
    guest.check_span(gfns)?;
    let (gfns, _) = chunk(gfns, gfns);
    let gfns = match guest.before_gap(machine, gfns) {
        Ok(gfns) => gfns,
        Err(Gap::Empty) => return Ok(1),
        Err(gap) => return Err(gap.error(gfns.start())),
    };
    guest.prepare(machine, host, gfns, &[Sharing::Owned])?;
    // Commit: the guest loses the pages, they are wiped, then the host gets them.
    guest.take_pieces(machine, gfns, Entry::Empty, |piece| {
        for page in piece.pfns.iter() {
            machine.wipe(page);
        }
        host.give_back(machine, piece.pfns, Sharing::Owned);
    });
    Ok(gfns.count())
}

/// Enrols a chunk of a guest's empty addresses as a device. Returns the number of pages.
///
/// # Errors
/// There is memory, or there was (poisoned); or table pages are lacking.
pub fn guard_map<M: Machine>(machine: &M, guest: &mut GuestSpace, gfns: Pages<Gfn>) -> Result<u64, Error> {
    guest.exchange(machine, gfns, &[Entry::Empty, Entry::Device], Entry::Device)
}

/// Takes an enrolment back. Returns the number of pages.
///
/// # Errors
/// A page is not enrolled; or table pages are lacking.
pub fn guard_unmap<M: Machine>(machine: &M, guest: &mut GuestSpace, gfns: Pages<Gfn>) -> Result<u64, Error> {
    guest.exchange(machine, gfns, &[Entry::Device], Entry::Empty)
}

impl GuestSpace {
    /// Checks that pages lie in the guest's address space.
    pub(super) fn check_span(&self, gfns: Pages<Gfn>) -> Result<(), Error> {
        if self.table.spans(gfns) { Ok(()) } else { Err(Error::BeyondGuest) }
    }

    /// Check: nothing was ever said of these pages.
    pub(super) fn check_empty<M: Machine>(
        &self,
        machine: &M,
        gfns: Pages<Gfn>,
    ) -> Result<Run<Stage2>, GuestDiffers> {
        self.table.expect(machine, gfns, Entry::Empty).map_err(GuestDiffers)
    }

    /// Reserve: the VM's pool has the tables that a change of these pages takes.
    pub(super) fn reserve(&self, tables: u64) -> Result<(), Lacking> {
        self.cache.check(Pool::Vm, tables, 0)
    }

    /// The pages before the first that is not memory; what is there instead, if that is the first of all.
    pub(super) fn before_gap<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Result<Pages<Gfn>, Gap> {
        for run in self.table.runs(machine, gfns) {
            if let Err(gap) = memory(run.entry()) {
                let before = run.pages().start().as_u64().saturating_sub(gfns.start().as_u64());
                return Pages::new(gfns.start(), before).ok_or(gap);
            }
        }
        Ok(gfns)
    }

    /// Commit: lets the guest access a chunk of new pages.
    pub(super) fn give<M: Machine>(
        &mut self,
        machine: &M,
        hole: Run<Stage2>,
        pfns: Pages<Pfn>,
        sharing: Sharing,
        permissions: Permissions,
    ) {
        let first = Entry::Page(Page { pfn: pfns.start(), sharing, permissions });
        self.table.change(machine, hole, &mut self.cache, first);
        self.pages = self.pages.saturating_add(pfns.count());
    }

    /// The first piece of a chunk, which lies in one last-level table of the host's too.
    ///
    /// # Errors
    /// The first page is missing, poisoned or a device.
    pub(super) fn piece<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Result<Piece, Error> {
        let gfn = gfns.start();
        let run = self.table.run(machine, gfns).ok_or(Error::BeyondGuest)?;
        let page = memory(run.entry()).map_err(|gap| gap.error(gfn))?;
        let count = run.pages().count().min(rest_of_region(page.pfn.as_u64()));
        let pfns = Pages::new(page.pfn, count).ok_or(Error::GuestState(gfn))?;
        Ok(Piece { gfns: gfns.truncated(count), pfns, sharing: page.sharing })
    }

    /// The pieces of a chunk, in order, up to what is wrong with it.
    pub(super) fn pieces<M: Machine>(
        &self,
        machine: &M,
        gfns: Pages<Gfn>,
    ) -> impl Iterator<Item = Result<Piece, Error>> {
        let mut rest = Some(gfns);
        core::iter::from_fn(move || {
            let pages = rest.take()?;
            let piece = self.piece(machine, pages);
            rest = piece.ok().and_then(|piece| pages.advanced(piece.gfns.count()));
            Some(piece)
        })
    }

    /// Checks that the guest has all pages of a chunk in one of the states that the transition takes and that the
    /// host's table agrees, and that both pools have the tables that a change of them takes.
    pub(super) fn prepare<M: Machine>(
        &self,
        machine: &M,
        host: &Host,
        gfns: Pages<Gfn>,
        takes: &[Sharing],
    ) -> Result<(), Error> {
        let mut tables = 0u64;
        for piece in self.pieces(machine, gfns) {
            let piece = piece?;
            if !takes.contains(&piece.sharing) {
                return Err(Error::GuestState(piece.gfns.start()));
            }
            // Several pieces in one region of the host's have their table already: a block is one piece.
            tables = tables.saturating_add(host.check_piece(machine, self.handle, piece)?);
        }
        host.reserve(tables)?;
        Ok(self.reserve(self.table.tables_needed(machine, gfns))?)
    }

    /// Commit: applies `change` to every piece of a chunk that was checked.
    fn change_pieces<M: Machine>(
        &mut self,
        machine: &M,
        gfns: Pages<Gfn>,
        mut change: impl FnMut(&mut Self, Piece),
    ) {
        let mut rest = Some(gfns);
        while let Some(pages) = rest {
            let Ok(piece) = self.piece(machine, pages) else {
                crate::broken("a page that was checked is gone");
            };
            change(self, piece);
            rest = pages.advanced(piece.gfns.count());
        }
    }

    /// Commit: takes every piece of a chunk from the guest and leaves an entry without memory there, then hands the
    /// piece to `then`.
    pub(super) fn take_pieces<M: Machine>(
        &mut self,
        machine: &M,
        gfns: Pages<Gfn>,
        leave: Entry,
        mut then: impl FnMut(Piece),
    ) {
        self.change_pieces(machine, gfns, |guest, piece| {
            guest.table.set(machine, piece.gfns, &mut guest.cache, leave);
            guest.pages = guest.pages.saturating_sub(piece.gfns.count());
            then(piece);
        });
    }

    /// Commit: changes the state of a piece; only software bits change.
    fn mark<M: Machine>(&mut self, machine: &M, piece: Piece, sharing: Sharing) {
        let first = Entry::Page(Page { pfn: piece.pfns.start(), sharing, permissions: Permissions::ALL });
        self.table.set(machine, piece.gfns, &mut self.cache, first);
    }

    /// Replaces entries without memory by another such entry.
    fn exchange<M: Machine>(
        &mut self,
        machine: &M,
        gfns: Pages<Gfn>,
        from: &[Entry],
        to: Entry,
    ) -> Result<u64, Error> {
        // Check.
        self.check_span(gfns)?;
        let (gfns, _) = chunk(gfns, gfns);
        for run in self.table.runs(machine, gfns) {
            if !from.contains(&run.entry()) {
                return Err(Error::GuestState(run.pages().start()));
            }
        }
        // Reserve.
        self.reserve(self.table.tables_needed(machine, gfns))?;
        // Commit.
        self.table.set(machine, gfns, &mut self.cache, to);
        Ok(gfns.count())
    }
}

impl Host {
    /// Check: the host's table says of a piece what the guest's does: this guest's page where the guest owns it
    /// alone, a borrowed one where the guest shares it, a lent one where the guest borrows it. Returns the tables
    /// that a change of the piece takes.
    fn check_piece<M: Machine>(&self, machine: &M, vm: VmHandle, piece: Piece) -> Result<u64, Error> {
        let first = match piece.sharing {
            Sharing::Owned => Entry::Owned(Owner::Guest { vm, gfn: piece.gfns.start() }),
            Sharing::Shared => Self::entry(piece.pfns, Sharing::Borrowed),
            _ => return self.check_lent(machine, piece.pfns),
        };
        Ok(self.check_says(machine, piece.pfns, first)?.tables_needed())
    }

    /// Check: the host lends these pages to guests, however often. Returns the tables that a change takes.
    fn check_lent<M: Machine>(&self, machine: &M, pages: Pages<Pfn>) -> Result<u64, Error> {
        for run in self.table.runs(machine, pages.identity()) {
            if !matches!(run.entry(), Entry::Page(Page { sharing: Sharing::Lent(_), .. })) {
                return Err(Error::HostState(run.pages().start().identity()));
            }
        }
        Ok(self.table.tables_needed(machine, pages.identity()))
    }

    /// Commit: takes a piece from the host and records whose it is.
    fn annotate<M: Machine>(&mut self, machine: &M, piece: Piece, vm: VmHandle) {
        let first = Entry::Owned(Owner::Guest { vm, gfn: piece.gfns.start() });
        self.table.set(machine, piece.pfns.identity(), &mut self.pool, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::query::GuestPage;
    use crate::pgtable::REGION_PAGES;
    use crate::testing::{PROTECTED, RAM_START, World};
    use abi::HostState;
    use abi::host::HostCall;
    use abi::page::{Permissions, Pool};

    const GFN: u64 = 0x8_0000;

    fn run(first: u64, count: u64) -> Pages<Gfn> {
        Pages::from_raw(GFN + first, count).unwrap()
    }

    /// A guest with these pages of RAM at its first pages, one by one.
    fn guest(world: &World, pages: &[u64]) -> VmHandle {
        let vm = world.protected_vm();
        for (offset, page) in pages.iter().enumerate() {
            let gfn = GFN + offset as u64;
            world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn, pages: 1 });
        }
        vm
    }

    #[test]
    fn a_shared_page_is_the_hosts_to_read_until_it_is_taken_back() {
        let world = World::new();
        let vm = guest(&world, &[5]);
        let before = world.census();
        assert_eq!(world.hyp.guest_share_host(vm, run(0, 1)), Ok(1));
        assert_eq!(world.host_state(5), Some(HostState::SharedBorrowed));
        world.load_all();
        assert!(world.host_reads(5));
        assert_eq!(world.hyp.guest_unshare_host(vm, run(0, 1)), Ok(1));
        world.check();
        assert!(!world.host_reads(5));
        assert_eq!(world.guest_reads(vm, GFN), Some(5));
        assert_eq!(world.census(), before);
    }

    #[test]
    fn a_page_of_which_the_hosts_table_says_something_else_does_not_change_hands() {
        let world = World::new();
        let machine = world.hyp.machine();
        let vm = guest(&world, &[5, 6]);
        assert_eq!(world.hyp.guest_share_host(vm, run(1, 1)), Ok(1));
        // Damaged on purpose, as no call can: the oracle would stop here, so it is not asked.
        let mut host = world.hyp.host.lock();
        let mut vm = world.hyp.vms.lock(vm).unwrap();
        let elsewhere = Entry::Owned(Owner::Guest { vm: vm.handle(), gfn: Gfn::new(GFN + 9).unwrap() });
        for (page, entry) in [(5, elsewhere), (6, Entry::Owned(Owner::Hyp))] {
            let Host { table, pool, .. } = &mut *host;
            table.set(machine, machine.ram(page, 1).identity(), pool, entry);
        }
        let refused = |page: u64| Err(Error::HostState(Pfn::new(RAM_START + page).unwrap()));
        let (host, space) = (&mut *host, &mut vm.space);
        assert_eq!(share_host(machine, host, space, run(0, 1)), refused(5));
        assert_eq!(relinquish(machine, host, space, run(0, 1)), refused(5));
        assert_eq!(unshare_host(machine, host, space, run(1, 1)), refused(6));
        assert_eq!(crate::ownership::reclaim::from_dying(machine, host, space, run(0, 1)), refused(5));
        assert_eq!(crate::ownership::reclaim::from_dying(machine, host, space, run(1, 1)), refused(6));
    }

    #[test]
    fn a_page_that_the_host_does_not_lend_cannot_be_taken_back() {
        let world = World::new();
        let machine = world.hyp.machine();
        let vm = world.vm(abi::VmFlags::default(), 0x1000, 8);
        let (pfn, permissions) = (RAM_START + 5, Permissions::ALL);
        world.ok(HostCall::ShareGuest { vm, pfn, gfn: GFN, pages: 1, permissions });
        // Damaged on purpose, as above.
        let mut host = world.hyp.host.lock();
        let mut vm = world.hyp.vms.lock(vm).unwrap();
        let Host { table, pool, .. } = &mut *host;
        table.set(
            machine,
            machine.ram(5, 1).identity(),
            pool,
            Host::entry(machine.ram(5, 1), Sharing::Owned),
        );
        let refused = Err(Error::HostState(Pfn::new(pfn).unwrap()));
        let ended = crate::ownership::share::host_unshare_guest(machine, &mut host, &mut vm.space, run(0, 1));
        assert_eq!(ended, refused);
    }

    /// A page out of the middle of a block changes hands: the host's table for it is asked for before anything
    /// changes, and not asked for if it is there.
    #[test]
    fn a_block_of_the_hosts_is_split_only_with_a_table_for_it() {
        let open = abi::VmFlags::default();
        let end_loan = |world: &World, vm| world.hyp.host_unshare_guest(vm, run(9, 1));
        let share = |world: &World, vm| world.hyp.guest_share_host(vm, run(9, 1));
        type Take<'a> = &'a dyn Fn(&World, abi::VmHandle) -> Result<u64, Error>;
        let cases: [(abi::VmFlags, Take<'_>); 2] = [(open, &end_loan), (PROTECTED, &share)];
        for (flags, take) in cases {
            let world = World::new();
            let vm = world.vm(flags, 0x1000, 8);
            let (pfn, gfn, pages) = (RAM_START + 0x400, GFN, REGION_PAGES);
            world.ok(match flags.protected {
                true => HostCall::DonateGuest { vm, pfn, gfn, pages },
                false => HostCall::ShareGuest { vm, pfn, gfn, pages, permissions: Permissions::ALL },
            });
            world.drain_tables();
            let before = world.snapshot();
            assert!(matches!(take(&world, vm), Err(Error::Lacking(_))));
            assert_eq!(before.difference(&world.snapshot()), None);
            world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0xc00, pages: 16 });
            assert_eq!(take(&world, vm), Ok(1));
            world.drain_tables();
            let next = run(10, 1);
            assert_eq!(
                match flags.protected {
                    true => world.hyp.guest_share_host(vm, next),
                    false => world.hyp.host_unshare_guest(vm, next),
                },
                Ok(1),
                "the table is there"
            );
            world.check();
        }
    }

    #[test]
    fn what_the_host_finds_past_the_caches_is_what_the_guest_shares() {
        let world = World::new();
        let vm = guest(&world, &[5]);
        world.fill(5);
        let pa = (RAM_START + 5) << 12;
        world.sim().write_bytes(pa, &[0; 8]);
        assert_ne!(world.sim().load64_uncached(pa), 0, "the secret is still behind the caches");
        assert_eq!(world.hyp.guest_share_host(vm, run(0, 1)), Ok(1));
        assert_eq!(world.sim().load64_uncached(pa), 0);
    }

    #[test]
    fn unshare_leaves_no_line_of_the_host_whatever_stage_2_forces() {
        for forces_write_back in [false, true] {
            let world = World::new();
            if forces_write_back {
                world.hyp.machine().force_write_back();
            }
            let vm = guest(&world, &[5]);
            assert_eq!(world.hyp.guest_share_host(vm, run(0, 1)), Ok(1));
            let pa = (RAM_START + 5) << 12;
            world.sim().write_bytes(pa, b"hostdata");
            assert_eq!(world.hyp.guest_unshare_host(vm, run(0, 1)), Ok(1));
            assert!(!world.sim().is_dirty(pa), "it could be written back over what the guest stores");
        }
    }

    #[test]
    fn a_chunk_of_scattered_pages_is_shared_whole() {
        let world = World::new();
        let vm = guest(&world, &[9, 3, 4, 0x700, 0x701, 2]);
        assert_eq!(world.hyp.guest_share_host(vm, run(0, 6)), Ok(6));
        for page in [9, 3, 4, 0x700, 0x701, 2] {
            assert_eq!(world.host_state(page), Some(HostState::SharedBorrowed), "{page:#x}");
        }
        assert_eq!(world.hyp.guest_unshare_host(vm, run(1, 4)), Ok(4));
        assert_eq!(world.host_state(0x701), Some(HostState::NoPage));
        assert_eq!(world.host_state(2), Some(HostState::SharedBorrowed));
        world.check();
    }

    #[test]
    fn a_chunk_with_one_wrong_page_changes_nothing() {
        let world = World::new();
        let vm = guest(&world, &[1, 2, 3]);
        assert_eq!(world.hyp.guest_share_host(vm, run(1, 1)), Ok(1));
        let gfn = |offset| Gfn::new(GFN + offset).unwrap();
        let before = world.census();
        assert_eq!(world.hyp.guest_share_host(vm, run(0, 3)), Err(Error::GuestState(gfn(1))));
        assert_eq!(world.hyp.guest_unshare_host(vm, run(0, 3)), Err(Error::GuestState(gfn(0))));
        assert_eq!(world.hyp.guest_share_host(vm, run(2, 2)), Err(Error::Missing(gfn(3))));
        assert_eq!(world.hyp.guest_relinquish(vm, run(1, 1)), Err(Error::GuestState(gfn(1))));
        let beyond = Pages::from_raw((1 << 28) - 1, 2).unwrap();
        assert_eq!(world.hyp.guard_map(vm, beyond), Err(Error::BeyondGuest));
        let beyond = Pages::from_raw(1 << 28, 1).unwrap();
        assert_eq!(world.hyp.guest_share_host(vm, beyond), Err(Error::BeyondGuest));
        assert_eq!(world.census(), before);
        world.check();
    }

    #[test]
    fn the_first_page_of_a_chunk_that_cannot_be_shared_decides_what_becomes_of_the_call() {
        let gfn = |offset| Gfn::new(GFN + offset).unwrap();
        // Page 1 is shared already. Before the gap at page 3, pages 1 and 2 are one piece or two.
        for pages in [[1, 2, 3], [1, 2, 9]] {
            let world = World::new();
            let vm = guest(&world, &pages);
            assert_eq!(world.hyp.guest_share_host(vm, run(1, 2)), Ok(2));
            assert_eq!(
                world.hyp.guest_share_host(vm, run(0, 4)),
                Err(Error::GuestState(gfn(1))),
                "{pages:?}"
            );
            assert_eq!(
                world.hyp.guest_share_host(vm, run(2, 2)),
                Err(Error::GuestState(gfn(2))),
                "{pages:?}"
            );
            assert_eq!(world.hyp.guest_unshare_host(vm, run(1, 2)), Ok(2));
            assert_eq!(world.hyp.guest_share_host(vm, run(0, 4)), Err(Error::Missing(gfn(3))), "{pages:?}");
        }
    }

    #[test]
    fn a_relinquished_page_is_wiped_and_the_hosts_again() {
        let world = World::new();
        let vm = guest(&world, &[5, 6]);
        world.fill(5);
        assert_eq!(world.hyp.guest_relinquish(vm, run(0, 1)), Ok(1));
        assert_eq!(world.host_state(5), Some(HostState::Owned));
        assert!(world.is_wiped(5));
        assert_eq!(world.guest_reads(vm, GFN), None);
        assert_eq!(world.hyp.guest_relinquish(vm, run(0, 2)), Ok(1), "a hole is passed over");
        assert_eq!(world.guest_reads(vm, GFN + 1), Some(6));
        world.check();
    }

    #[test]
    fn a_page_of_a_donated_block_can_be_shared_alone() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN, pages: 0x200 });
        assert_eq!(world.hyp.guest_share_host(vm, run(7, 1)), Ok(1));
        assert!(world.host_reads(0x407) && !world.host_reads(0x406) && !world.host_reads(0x408));
        assert_eq!(world.guest_reads(vm, GFN + 0x1ff), Some(0x5ff));
        world.load_all();
        assert_eq!(world.hyp.guest_unshare_host(vm, run(7, 1)), Ok(1));
        assert!(!world.host_reads(0x407));
        world.check();
    }

    #[test]
    fn an_enrolled_device_is_no_place_for_memory() {
        let world = World::new();
        let vm = guest(&world, &[5]);
        let device = Pages::from_raw(0x9000, 2).unwrap();
        assert_eq!(world.hyp.guard_map(vm, device), Ok(2));
        assert_eq!(world.hyp.guard_map(vm, device), Ok(2), "twice is once");
        assert_eq!(world.hyp.guest_page(vm, device.start()), GuestPage::Device);
        let donate = HostCall::DonateGuest { vm, pfn: RAM_START + 8, gfn: 0x9000, pages: 1 };
        assert_eq!(world.call(donate).outcome, Err(abi::Error::Permission));
        assert_eq!(
            world.hyp.guard_map(vm, run(0, 1)),
            Err(Error::GuestState(Gfn::new(GFN).unwrap())),
            "memory does not become a device"
        );
        assert_eq!(world.hyp.guard_unmap(vm, device), Ok(2));
        assert_eq!(world.hyp.guard_unmap(vm, device), Err(Error::GuestState(device.start())));
        world.ok(donate);
        world.check();
    }

    #[test]
    fn a_page_relinquished_from_a_block_is_one_page_less_and_its_neighbours_stay() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 0x400, gfn: GFN, pages: 0x200 });
        world.fill(0x407);
        let pages = || world.hyp.with_vm(vm, |vm| vm.space.pages);
        assert_eq!(world.hyp.guest_relinquish(vm, run(7, 1)), Ok(1));
        assert_eq!((pages(), world.census().guest), (Some(0x1ff), 0x1ff));
        assert!(world.host_reads(0x407) && world.is_wiped(0x407));
        assert!(!world.host_reads(0x406) && !world.host_reads(0x408));
        assert_eq!([6, 7, 8].map(|page| world.guest_reads(vm, GFN + page)), [Some(0x406), None, Some(0x408)]);
        let mut done = 0;
        while done < 0x200 {
            done += world.hyp.guest_relinquish(vm, run(done, 0x200 - done)).unwrap();
        }
        assert_eq!((pages(), world.census().guest), (Some(0), 0));
        world.check();
    }
}
