//! The rules: one function for each call, each in two halves. First everything that can refuse, in the order of
//! `docs/memory-ownership.md`; then what changes.

use crate::call::{Call, Outcome};
use crate::state::{Content, GuestEntry, HostEntry, Page, Phase, Run, Sharing, State, Use, Vm};
use abi::Error;
use abi::page::Pool;

/// Pages of the region that a chunk does not leave.
const REGION: u64 = 512;
/// Page numbers end here: 48 bits of address.
const LAST_PAGE: u64 = 1 << 36;
/// Pages of a VM's root, and their alignment.
pub(crate) const ROOT: u64 = abi::host::VM_ROOT_PAGES;

/// Where the world lies, and what it has of things that are not memory.
///
/// A world can be a window of something larger: memory and guests may go on behind the pages that the state knows,
/// as long as no chunk of a call leaves those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    /// Page number of the world's first page: tells where 2 MiB regions end.
    pub pfn: u64,
    /// Number of pages from there to the end of memory that may change hands.
    pub pages: u64,
    /// Guest page number of each guest's first page.
    pub gfn: u64,
    /// Number of guest pages from there to the end of a guest's address space.
    pub gfns: u64,
    /// Pages that can be pinned at a time.
    pub pins: usize,
}

/// What becomes of a call, and the state after it. A refused call has changed nothing (I5): nothing puts the state
/// before it back, so rules that change something before they refuse show in the explorer.
///
/// Tables are not part of the rules, so whether their pages suffice is not either: `lack` is the pool, if any,
/// that does not have what the call would take. It decides only when nothing else refuses, and only in calls that
/// can take pages of that pool.
pub fn step<const P: usize, const V: usize, const G: usize>(
    world: &World,
    state: &State<P, V, G>,
    call: Call,
    lack: Option<Pool>,
) -> (Outcome, State<P, V, G>) {
    let mut next = *state;
    let (Ok(outcome) | Err(outcome)) = step_in_place(world, &mut next, call, lack);
    (outcome, next)
}

/// The same for a state that is too large to be copied.
///
/// # Errors
/// The outcome of a call that is refused. Nothing has changed, as far as the rules keep to their two halves.
pub fn step_in_place<const P: usize, const V: usize, const G: usize>(
    world: &World,
    state: &mut State<P, V, G>,
    call: Call,
    lack: Option<Pool>,
) -> Result<Outcome, Outcome> {
    Turn { world, state, lack }.serve(call)
}

pub(crate) type Answer = Result<Outcome, Outcome>;

pub(crate) const PERMISSION: Outcome = Outcome::Refused(Error::Permission);
pub(crate) const NO_ENTRY: Outcome = Outcome::Refused(Error::NoEntry);
pub(crate) const INVALID: Outcome = Outcome::Refused(Error::Invalid);

/// Pools that a change of the host's side, or of a guest's too, can lack.
pub(crate) const TABLES: &[Pool] = &[Pool::Tables];
pub(crate) const BOTH: &[Pool] = &[Pool::Tables, Pool::Vm];

pub(crate) struct Turn<'a, const P: usize, const V: usize, const G: usize> {
    pub(crate) world: &'a World,
    pub(crate) state: &'a mut State<P, V, G>,
    pub(crate) lack: Option<Pool>,
}

impl<const P: usize, const V: usize, const G: usize> Turn<'_, P, V, G> {
    fn serve(&mut self, call: Call) -> Answer {
        match call {
            Call::PoolTopUp { pool, pfns } => self.pool_top_up(pool, pfns),
            Call::VmTopUp { vm, pfns } => self.vm_top_up(vm, pfns),
            Call::ShareHyp { pfns } => self.share_hyp(pfns),
            Call::UnshareHyp { pfns } => self.unshare_hyp(pfns),
            Call::DonateGuest { vm, pfn, gfn, count } => {
                self.give_guest(vm, Run { first: pfn, count }, Run { first: gfn, count }, None)
            }
            Call::ShareGuest { vm, pfn, gfn, count, permissions } => {
                self.give_guest(vm, Run { first: pfn, count }, Run { first: gfn, count }, Some(permissions))
            }
            Call::UnshareGuest { vm, gfns } => self.unshare_guest(vm, gfns),
            Call::ReclaimGuest { vm, gfns } => self.reclaim_guest(vm, gfns),
            Call::ForceReclaim { pfns } => self.force_reclaim(pfns),
            Call::QueryPage { pfn } => self.query_page(pfn),
            Call::VmCreate { protected, immediate, root } => self.vm_create(protected, immediate, root),
            Call::UnshareAck { vm, vcpu } => self.unshare_ack(vm, vcpu),
            Call::VmTeardownStart { vm } => self.teardown_start(vm),
            Call::VmTeardownFinish { vm } => self.teardown_finish(vm),
            Call::Pin { pfn } => self.pin(pfn),
            Call::Unpin { pfn } => self.unpin(pfn),
            Call::Share { vm, gfns } => self.share(vm, gfns),
            Call::Unshare { vm, vcpu, gfns } => self.unshare(vm, vcpu, gfns),
            Call::Relinquish { vm, gfns } => self.relinquish(vm, gfns),
            Call::GuardMap { vm, gfns } => self.guard(vm, gfns, true),
            Call::GuardUnmap { vm, gfns } => self.guard(vm, gfns, false),
            Call::GuestStore { vm, gfn } => self.guest_store(vm, gfn),
            Call::HostStore { pfn } => self.host_store(pfn),
            Call::Map { pfn } => self.gate(pfn).map(|page| page.mapped = true).map(|()| Outcome::Done(1)),
            Call::Hold { pfn } => self.gate(pfn).map(|page| page.held = true).map(|()| Outcome::Done(1)),
            Call::Unmap { pfn } => self.let_go(pfn, |page| page.mapped = false),
            Call::Release { pfn } => self.let_go(pfn, |page| page.held = false),
        }
    }

    // What refuses.

    /// The range could be one: it is not empty and does not leave the address space.
    pub(crate) fn range(&self, base: u64, run: Run) -> Result<(), Outcome> {
        let end = base.checked_add(run.first).and_then(|first| first.checked_add(run.count));
        if run.count > 0 && end.is_some_and(|end| end <= LAST_PAGE) { Ok(()) } else { Err(INVALID) }
    }

    /// The pages are RAM that may change hands.
    pub(crate) fn memory(&self, run: Run) -> Result<(), Outcome> {
        match run.first {
            first if first >= self.world.pages => Err(PERMISSION),
            first if first + run.count > self.world.pages => Err(INVALID),
            _ => Ok(()),
        }
    }

    /// The guest pages lie in the guest's address space.
    pub(crate) fn span(&self, run: Run) -> Result<(), Outcome> {
        let fits = run.first.checked_add(run.count).is_some_and(|end| end <= self.world.gfns);
        if fits { Ok(()) } else { Err(Outcome::Refused(Error::Range)) }
    }

    /// A VM that is there.
    pub(crate) fn vm(&mut self, vm: u8) -> Result<&mut Vm<G>, Outcome> {
        let vm = self.state.vms.get_mut(usize::from(vm)).ok_or(NO_ENTRY)?;
        if matches!(vm.phase, Phase::Live | Phase::Dying) { Ok(vm) } else { Err(NO_ENTRY) }
    }

    /// A guest that can make calls about its memory: protected, alive.
    pub(crate) fn guest(&mut self, vm: u8) -> Result<&mut Vm<G>, Outcome> {
        let vm = self.vm(vm).map_err(|_| Outcome::NotServed)?;
        if vm.protected && vm.phase == Phase::Live { Ok(vm) } else { Err(Outcome::NotServed) }
    }

    /// The host holds every page so.
    pub(crate) fn host_has(&self, run: Run, entry: HostEntry) -> Result<(), Outcome> {
        let fits = run.indices().all(|pfn| self.state.pages[pfn].host == entry);
        if fits { Ok(()) } else { Err(PERMISSION) }
    }

    /// The pools have what it takes.
    pub(crate) fn supply(&self, pools: &[Pool]) -> Result<(), Outcome> {
        match self.lack {
            Some(pool) if pools.contains(&pool) => Err(Outcome::Lacking(pool)),
            _ => Ok(()),
        }
    }

    /// The first chunk of a run: what lies in one 2 MiB region.
    pub(crate) fn chunk(&self, base: u64, run: Run) -> Run {
        let rest = REGION - (base + run.first) % REGION;
        Run { count: run.count.min(rest), ..run }
    }

    /// The pages of a guest's chunk before the first that is not memory.
    pub(crate) fn before_gap(&self, vm: u8, gfns: Run) -> Run {
        let entries = &self.state.vms[usize::from(vm)].entries[gfns.indices()];
        let there = entries.iter().take_while(|entry| matches!(entry, GuestEntry::Page { .. })).count();
        Run { count: there as u64, ..gfns }
    }

    /// The guest has every page so, and the host's side agrees.
    pub(crate) fn guest_has(&self, vm: u8, gfns: Run, fits: impl Fn(Sharing) -> bool) -> bool {
        gfns.indices().all(|gfn| match self.state.vms[usize::from(vm)].entries[gfn] {
            GuestEntry::Page { pfn, sharing } => {
                let host = self.state.pages[usize::from(pfn)].host;
                let agrees = match sharing {
                    Sharing::Owned => host == HostEntry::Guest { vm, gfn: gfn as u16 },
                    Sharing::Shared => host == HostEntry::Borrowed,
                    Sharing::Borrowed(_) => matches!(host, HostEntry::LentToGuests(_)),
                };
                fits(sharing) && agrees
            }
            _ => false,
        })
    }

    // What changes.

    pub(crate) fn give_hyp(&mut self, run: Run, purpose: Use) {
        for page in &mut self.state.pages[run.indices()] {
            page.host = HostEntry::Hyp(purpose);
            page.content = Content::Secret;
        }
    }

    /// Changes each page of a chunk on both sides: `change` gets the guest's entry and the page.
    pub(crate) fn change(
        &mut self,
        vm: u8,
        gfns: Run,
        mut change: impl FnMut(usize, &mut GuestEntry, &mut Page),
    ) {
        for gfn in gfns.indices() {
            let entry = &mut self.state.vms[usize::from(vm)].entries[gfn];
            if let GuestEntry::Page { pfn, .. } = *entry {
                change(gfn, entry, &mut self.state.pages[usize::from(pfn)]);
            }
        }
    }

    /// Gives pages back to the host, wiped if they were private.
    pub(crate) fn take_from_guest(&mut self, vm: u8, gfns: Run) {
        self.change(vm, gfns, |_, entry, page| {
            if matches!(entry, GuestEntry::Page { sharing: Sharing::Owned, .. }) {
                page.content = Content::Zeros;
            }
            page.host = match page.host {
                // Others borrow it still.
                HostEntry::LentToGuests(borrowers) if borrowers > 1 => HostEntry::LentToGuests(borrowers - 1),
                _ => HostEntry::Owned,
            };
            *entry = GuestEntry::Empty;
        });
        self.state.vms[usize::from(vm)].pages -= gfns.count as u16;
    }
}
