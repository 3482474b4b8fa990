//! Who owns every page, and how that changes.
//!
//! | file | transitions |
//! |---|---|
//! | [`donate`] | host to hypervisor and back, host to guest |
//! | [`share`] | host with hypervisor, host with guests that are not protected, pins |
//! | [`guest`] | what a guest does with its own pages: share, unshare, relinquish, enrol a device |
//! | [`reclaim`] | from a dying guest, from one that is alive by force, and from all before the machine goes down |
//! | [`query`] | what the tables say, without changing it |
//!
//! Every transition has three phases. *Check*: the entries of all parties are in the state that the
//! transition starts from, and the whole range is one that could be. *Reserve*: the pools hold the tables that splitting will take. *Commit*: it cannot
//! fail; access is taken away, with all TLB maintenance, before it is given (I5, I6).
//!
//! A transition takes `&mut` of each component that it changes; only a lock's guard gives that, so a missing
//! lock does not compile. Order of the locks: creation of VMs, [`Host`], [`HypSpace`], a guest, records.

#![forbid(unsafe_code)]

pub mod donate;
pub mod guest;
pub mod query;
pub mod reclaim;
pub mod share;

use crate::addr::{Frame, Gfn, Pages, Pfn, Vpn};
use crate::machine::Machine;
use crate::memory::MemoryError;
use crate::pgtable::hyp_stage1::HypStage1;
use crate::pgtable::stage2::{Entry, Owner, Page, Sharing, Stage2};
use crate::pgtable::{Run, Table, rest_of_region};
use crate::pool::{Lacking, PagePool};
use abi::page::{Permissions, Pool};
use share::Pins;

/// Table pages that only a top-up may take: a donated page may need two tables for its split at the host and
/// three for its mapping at EL2 (levels 1 to 3), before it can serve as a table itself.
pub const TOPUP_RESERVE: u64 = 5;

/// The host as a component: its stage-2, and the pool that pays for it and for EL2's own tables.
#[derive(Debug)]
pub struct Host {
    pub(crate) table: Table<Stage2>,
    pub(crate) pool: PagePool,
}

/// The hypervisor as a component: its stage-1, and what it has pinned.
#[derive(Debug)]
pub struct HypSpace {
    pub(crate) table: Table<HypStage1>,
    pub(crate) pins: Pins,
}

/// Why a transition was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The page numbers are empty, overflow or straddle memory regions.
    BadRange,
    /// The pages are no memory that may change hands.
    NotMemory,
    /// The guest pages are beyond the guest's address space.
    BeyondGuest,
    /// The host does not hold the page in the state that the transition starts from.
    HostState(Pfn),
    /// The hypervisor does not.
    HypState(Pfn),
    /// The guest does not.
    GuestState(Gfn),
    /// The host has access to the page already.
    HostHasAccess(Pfn),
    /// Nothing is mapped at the guest page.
    Missing(Gfn),
    /// The guest page was taken by force.
    Poisoned(Gfn),
    /// The hypervisor has pinned the page.
    Pinned(Pfn),
    /// The transition is not for this kind of VM, or not at this time of its life.
    WrongVm,
    /// No such VM.
    NoVm,
    /// Too many distinct pages are pinned.
    TooManyPins,
    /// The page is lent to as many guest pages as can be.
    TooManyBorrowers(Pfn),
    /// Table pages are lacking.
    Lacking(Lacking),
}

/// The first page of which the host's table says something else than a transition starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostDiffers(Gfn);

/// The same of EL2's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HypDiffers(Vpn);

/// The same of a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GuestDiffers(Gfn);

impl From<HostDiffers> for Error {
    fn from(HostDiffers(page): HostDiffers) -> Self {
        Self::HostState(page.identity())
    }
}

impl From<HypDiffers> for Error {
    fn from(HypDiffers(page): HypDiffers) -> Self {
        Self::HypState(page.identity())
    }
}

impl From<GuestDiffers> for Error {
    fn from(GuestDiffers(page): GuestDiffers) -> Self {
        Self::GuestState(page)
    }
}

impl From<Lacking> for Error {
    fn from(lacking: Lacking) -> Self {
        Self::Lacking(lacking)
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::BadRange => Self::BadRange,
            MemoryError::NotMemory => Self::NotMemory,
        }
    }
}

/// Cuts two runs of equal length to the first chunk: what lies within one last-level table on both sides.
fn chunk<A: Frame, B: Frame>(a: Pages<A>, b: Pages<B>) -> (Pages<A>, Pages<B>) {
    let count = rest_of_region(a.start().as_u64()).min(rest_of_region(b.start().as_u64()));
    (a.truncated(count), b.truncated(count))
}

impl Host {
    /// Check: the host has all pages of a chunk in one state of sharing.
    #[inline(always)]
    fn check<M: Machine>(
        &self,
        machine: &M,
        pages: Pages<Pfn>,
        sharing: Sharing,
    ) -> Result<Run<Stage2>, HostDiffers> {
        self.check_says(machine, pages, Self::entry(pages, sharing))
    }

    /// Check: the host's table says `first` of the first page of a chunk and what follows from it of the others.
    #[inline(always)]
    fn check_says<M: Machine>(
        &self,
        machine: &M,
        pages: Pages<Pfn>,
        first: Entry,
    ) -> Result<Run<Stage2>, HostDiffers> {
        self.table.expect(machine, pages.identity(), first).map_err(HostDiffers)
    }

    /// Reserve: the pool has the tables that a change of these pages takes, beyond the reserve.
    #[inline(always)]
    fn reserve(&self, tables: u64) -> Result<(), Lacking> {
        self.pool.check(Pool::Tables, tables, TOPUP_RESERVE)
    }

    /// Commit: lets the host access a chunk.
    #[inline(always)]
    fn give<M: Machine>(&mut self, machine: &M, run: Run<Stage2>, sharing: Sharing) {
        let first = Self::entry(run.pages().identity(), sharing);
        self.table.change(machine, run, &mut self.pool, first);
    }

    /// Commit: lets the host access a chunk whose entries were checked, but not kept.
    fn give_back<M: Machine>(&mut self, machine: &M, pages: Pages<Pfn>, sharing: Sharing) {
        self.table.set(machine, pages.identity(), &mut self.pool, Self::entry(pages, sharing));
    }

    /// What the host's table says of the first of these pages, which are memory, if the host may access them.
    #[inline(always)]
    fn entry(pages: Pages<Pfn>, sharing: Sharing) -> Entry {
        Entry::Page(Page { pfn: pages.start(), sharing, permissions: Permissions::ALL })
    }
}
