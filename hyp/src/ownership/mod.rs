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

use crate::addr::{Frame, Gfn, Pages, Pfn};
use crate::memory::MemoryError;
use crate::pgtable::hyp_stage1::HypStage1;
use crate::pgtable::stage2::{Entry, Owner, Sharing, Stage2};
use crate::pgtable::{Table, rest_of_region};
use crate::pool::{Lacking, PagePool};
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
    /// Checks that the host holds all pages of a chunk in one state of sharing.
    fn check<M: crate::machine::Machine>(
        &self,
        machine: &M,
        pages: Pages<Pfn>,
        sharing: Sharing,
    ) -> Result<(), Error> {
        self.table.try_for_each(machine, pages.identity(), |run| match run.entry {
            Entry::Page(page) if page.sharing == sharing => Ok(()),
            _ => Err(Error::HostState(run.pages.start().identity())),
        })
    }
}
