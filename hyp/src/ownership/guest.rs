//! A guest as a component, and what it may do with its own pages: share them with the host, take them back,
//! give them up, and say which addresses are devices.
//!
//! A guest's chunk is a run of *its* pages; the physical pages behind it may lie anywhere. So a transition
//! goes over [`Piece`]s: pages that are consecutive on both sides and in one state. All pieces of a chunk are
//! checked, and all tables reserved, before the first is changed.
//!
//! Sources of the rules: Linux 7.2 `__pkvm_guest_share_host` and `__pkvm_guest_unshare_host`; Android's
//! `MEM_RELINQUISH` and `MMIO_GUARD`.

use super::{Error, Host, Owner, TOPUP_RESERVE, chunk};
use crate::addr::{Frame, Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::pgtable::stage2::{Entry, Page, Sharing, Stage2};
use crate::pgtable::{REGION_PAGES, Table};
use crate::pool::PagePool;
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

impl Piece {
    /// This piece and the next as one, if they are consecutive and within one last-level table of the host.
    fn join(self, next: Self) -> Option<Self> {
        let continues = self.sharing == next.sharing
            && self.gfns.end() == next.gfns.start().as_u64()
            && self.pfns.end() == next.pfns.start().as_u64()
            && !self.pfns.end().is_multiple_of(REGION_PAGES);
        let count = self.gfns.count().checked_add(next.gfns.count())?;
        continues.then_some(())?;
        Some(Self {
            gfns: Pages::new(self.gfns.start(), count)?,
            pfns: Pages::new(self.pfns.start(), count)?,
            sharing: self.sharing,
        })
    }
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
    guest.prepare(machine, host, gfns, |sharing| sharing == Sharing::Owned)?;
    // Commit.
    guest.change_pieces(machine, gfns, |guest, piece| {
        // The host may look past the caches, with or without FEAT_S2FWB: what it finds there must be what the
        // guest shares, and not what the page held before.
        for page in piece.pfns.iter() {
            machine.clean(page);
        }
        guest.mark(machine, piece, Sharing::Shared);
        host.give(machine, piece.pfns, Sharing::Borrowed);
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
    guest.prepare(machine, host, gfns, |sharing| sharing == Sharing::Shared)?;
    // Commit.
    guest.change_pieces(machine, gfns, |guest, piece| {
        // The host's access is gone from every TLB before the guest may call the pages private.
        host.annotate(machine, piece, guest.handle);
        if machine.needs_clean() {
            // What the host left in the caches must not overwrite what the guest stores past them.
            for page in piece.pfns.iter() {
                machine.clean(page);
            }
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
    guest.prepare(machine, host, gfns, |sharing| sharing == Sharing::Owned)?;
    // Commit: the guest loses the pages, they are wiped, then the host gets them.
    guest.take_pieces(machine, gfns, Entry::Empty, |piece| {
        for page in piece.pfns.iter() {
            machine.wipe(page);
        }
        host.give(machine, piece.pfns, Sharing::Owned);
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

    /// Checks that nothing was ever said of these pages.
    pub(super) fn check_empty<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Result<(), Error> {
        self.table.try_for_each(machine, gfns, |run| match run.entry {
            Entry::Empty => Ok(()),
            _ => Err(Error::GuestState(run.pages.start())),
        })
    }

    /// Checks that the VM's pool has the tables that a change of these pages takes.
    pub(super) fn reserve<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Result<(), Error> {
        Ok(self.cache.check(Pool::Vm, self.table.tables_needed(machine, gfns), 0)?)
    }

    /// The pages before the first that is not memory; what is there instead, if that is the first of all.
    pub(super) fn before_gap<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Result<Pages<Gfn>, Gap> {
        let gap = self.table.try_for_each(machine, gfns, |run| match memory(run.entry) {
            Ok(_) => Ok(()),
            Err(gap) => Err((run.pages.start(), gap)),
        });
        match gap {
            Ok(()) => Ok(gfns),
            Err((gfn, gap)) => {
                let before = gfn.as_u64().saturating_sub(gfns.start().as_u64());
                Pages::new(gfns.start(), before).ok_or(gap)
            }
        }
    }

    /// Commit: lets the guest access a chunk of new pages.
    pub(super) fn give<M: Machine>(
        &mut self,
        machine: &M,
        gfns: Pages<Gfn>,
        pfns: Pages<Pfn>,
        sharing: Sharing,
        permissions: Permissions,
    ) {
        let first = Entry::Page(Page { pfn: pfns.start(), sharing, permissions });
        self.table.set_from(machine, gfns, &mut self.cache, first);
        self.pages = self.pages.saturating_add(gfns.count());
    }

    /// Shows the pieces of a chunk in order, until `visit` fails. What `visit` says of a page counts before what
    /// is wrong with a later one.
    ///
    /// # Errors
    /// A page is missing, poisoned or a device; or as `visit` says.
    pub(super) fn try_for_each_piece<M: Machine>(
        &self,
        machine: &M,
        gfns: Pages<Gfn>,
        mut visit: impl FnMut(Piece) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.check_span(gfns)?;
        let mut pending: Option<Piece> = None;
        self.table.try_for_each(machine, gfns, |run| -> Result<(), Error> {
            let gfn = run.pages.start();
            let page = match memory(run.entry) {
                Ok(page) => page,
                Err(gap) => {
                    pending.take().map_or(Ok(()), &mut visit)?;
                    return Err(gap.error(gfn));
                }
            };
            let pfns = Pages::new(page.pfn, run.pages.count()).ok_or(Error::GuestState(gfn))?;
            let piece = Piece { gfns: run.pages, pfns, sharing: page.sharing };
            match pending.and_then(|pending| pending.join(piece)) {
                Some(joined) => pending = Some(joined),
                None => {
                    if let Some(done) = pending.replace(piece) {
                        visit(done)?;
                    }
                }
            }
            Ok(())
        })?;
        pending.map_or(Ok(()), visit)
    }

    /// Checks that the guest has all pages of a chunk in a state that the transition takes and that the host's
    /// table agrees, and that both pools have the tables that a change of them takes.
    pub(super) fn prepare<M: Machine>(
        &self,
        machine: &M,
        host: &Host,
        gfns: Pages<Gfn>,
        takes: impl Fn(Sharing) -> bool,
    ) -> Result<(), Error> {
        let mut tables = 0u64;
        let mut last_region = None;
        self.try_for_each_piece(machine, gfns, |piece| {
            if !takes(piece.sharing) {
                return Err(Error::GuestState(piece.gfns.start()));
            }
            host.check_piece(machine, self.handle, piece)?;
            let region = piece.pfns.start().as_u64() / REGION_PAGES;
            if last_region.replace(region) != Some(region) {
                tables = tables.saturating_add(host.table.tables_needed(machine, piece.pfns.identity()));
            }
            Ok(())
        })?;
        host.pool.check(Pool::Tables, tables, TOPUP_RESERVE)?;
        self.reserve(machine, gfns)
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
            let Some(piece) = self.first_piece(machine, pages) else {
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
            guest.table.set(machine, piece.gfns, &mut guest.cache, |_| leave);
            guest.pages = guest.pages.saturating_sub(piece.gfns.count());
            then(piece);
        });
    }

    /// The first piece of a run; `None` if its first page is not there.
    pub(super) fn first_piece<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> Option<Piece> {
        let mut first = None;
        // The visit stops the walk at the second piece; what it says then does not matter.
        let _ = self.try_for_each_piece(machine, gfns, |piece| {
            if first.is_some() {
                return Err(Error::BadRange);
            }
            first = Some(piece);
            Ok(())
        });
        first
    }

    /// Commit: changes the state of a piece; only software bits change.
    fn mark<M: Machine>(&mut self, machine: &M, piece: Piece, sharing: Sharing) {
        let first = Entry::Page(Page { pfn: piece.pfns.start(), sharing, permissions: Permissions::ALL });
        self.table.set_from(machine, piece.gfns, &mut self.cache, first);
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
        self.table.try_for_each(machine, gfns, |run| {
            if from.contains(&run.entry) { Ok(()) } else { Err(Error::GuestState(run.pages.start())) }
        })?;
        // Reserve.
        self.reserve(machine, gfns)?;
        // Commit.
        self.table.set(machine, gfns, &mut self.cache, |_| to);
        Ok(gfns.count())
    }
}

impl Host {
    /// Checks that the host's table says of a piece what the guest's does: this guest's page where the guest
    /// owns it alone, a borrowed one where the guest shares it, a lent one where the guest borrows it.
    fn check_piece<M: Machine>(&self, machine: &M, vm: VmHandle, piece: Piece) -> Result<(), Error> {
        self.table.try_for_each(machine, piece.pfns.identity(), |run| {
            let offset = run.pages.start().as_u64().saturating_sub(piece.pfns.start().as_u64());
            let gfn = piece.gfns.start().checked_add(offset);
            let agrees = match (piece.sharing, run.entry) {
                (Sharing::Owned, Entry::Owned(Owner::Guest { vm: owner, gfn: at })) => {
                    owner == vm && Some(at) == gfn
                }
                (Sharing::Shared, Entry::Page(page)) => page.sharing == Sharing::Borrowed,
                (Sharing::Borrowed, Entry::Page(page)) => matches!(page.sharing, Sharing::Lent(_)),
                _ => false,
            };
            if agrees { Ok(()) } else { Err(Error::HostState(run.pages.start().identity())) }
        })
    }

    /// Commit: takes a piece from the host and records whose it is.
    fn annotate<M: Machine>(&mut self, machine: &M, piece: Piece, vm: VmHandle) {
        let first = Entry::Owned(Owner::Guest { vm, gfn: piece.gfns.start() });
        self.table.set_from(machine, piece.pfns.identity(), &mut self.pool, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::query::GuestPage;
    use crate::testing::{RAM_START, World};
    use abi::HostState;
    use abi::host::HostCall;

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
    fn unshare_leaves_no_dirty_line_of_the_host() {
        let world = World::new();
        let vm = guest(&world, &[5]);
        assert_eq!(world.hyp.guest_share_host(vm, run(0, 1)), Ok(1));
        let pa = (RAM_START + 5) << 12;
        world.sim().write_bytes(pa, b"hostdata");
        assert_eq!(world.hyp.guest_unshare_host(vm, run(0, 1)), Ok(1));
        assert!(!world.sim().is_dirty(pa), "it could be written back over what the guest stores");
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
}
