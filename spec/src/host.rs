//! What the host asks for, and what the hypervisor does with pages that are lent to it.

use crate::call::Outcome;
use crate::state::{Content, GuestEntry, HostEntry, Phase, Run, Sharing, Use, VCPUS, Vm};
use crate::step::{Answer, BOTH, INVALID, NO_ENTRY, PERMISSION, ROOT, TABLES, Turn};
use abi::Error;
use abi::page::{MAX_BORROWERS, Permissions, Pool};

impl<const P: usize, const V: usize, const G: usize> Turn<'_, P, V, G> {
    pub(crate) fn pool_top_up(&mut self, pool: Pool, pfns: Run) -> Answer {
        if pool == Pool::Vm {
            return Err(INVALID);
        }
        self.range(self.world.pfn, pfns)?;
        self.memory(pfns)?;
        let pfns = self.chunk(self.world.pfn, pfns);
        self.host_has(pfns, HostEntry::Owned)?;
        self.supply(TABLES)?;
        self.give_hyp(pfns, Use::Pool);
        Ok(Outcome::Done(pfns.count))
    }

    pub(crate) fn vm_top_up(&mut self, vm: u8, pfns: Run) -> Answer {
        self.range(self.world.pfn, pfns)?;
        self.vm(vm)?;
        self.memory(pfns)?;
        let pfns = self.chunk(self.world.pfn, pfns);
        self.host_has(pfns, HostEntry::Owned)?;
        self.supply(TABLES)?;
        self.give_hyp(pfns, Use::Vm(vm));
        Ok(Outcome::Done(pfns.count))
    }

    pub(crate) fn share_hyp(&mut self, pfns: Run) -> Answer {
        self.range(self.world.pfn, pfns)?;
        self.memory(pfns)?;
        let pfns = self.chunk(self.world.pfn, pfns);
        self.host_has(pfns, HostEntry::Owned)?;
        self.supply(TABLES)?;
        self.state.pages[pfns.indices()].iter_mut().for_each(|page| page.host = HostEntry::LentToHyp);
        Ok(Outcome::Done(pfns.count))
    }

    pub(crate) fn unshare_hyp(&mut self, pfns: Run) -> Answer {
        self.range(self.world.pfn, pfns)?;
        self.memory(pfns)?;
        let pfns = self.chunk(self.world.pfn, pfns);
        self.host_has(pfns, HostEntry::LentToHyp)?;
        if self.state.pages[pfns.indices()].iter().any(|page| page.pins > 0) {
            return Err(Outcome::Refused(Error::Busy));
        }
        self.supply(TABLES)?;
        self.state.pages[pfns.indices()].iter_mut().for_each(|page| page.host = HostEntry::Owned);
        Ok(Outcome::Done(pfns.count))
    }

    /// DONATE_GUEST, or SHARE_GUEST with these permissions.
    pub(crate) fn give_guest(&mut self, vm: u8, pfns: Run, gfns: Run, lend: Option<Permissions>) -> Answer {
        self.range(self.world.pfn, pfns)?;
        self.range(self.world.gfn, gfns)?;
        let to = self.vm(vm)?;
        if to.phase != Phase::Live || to.protected == lend.is_some() {
            return Err(PERMISSION);
        }
        self.memory(pfns)?;
        self.span(gfns)?;
        let count = self.chunk(self.world.pfn, pfns).count.min(self.chunk(self.world.gfn, gfns).count);
        let (pfns, gfns) = (Run { count, ..pfns }, Run { count, ..gfns });
        match lend {
            None => self.host_has(pfns, HostEntry::Owned)?,
            Some(_) => self.host_can_lend(pfns)?,
        }
        let entries = &self.state.vms[usize::from(vm)].entries;
        if entries[gfns.indices()].iter().any(|entry| *entry != GuestEntry::Empty) {
            return Err(PERMISSION);
        }
        self.supply(BOTH)?;
        for (pfn, gfn) in pfns.indices().zip(gfns.indices()) {
            let (host, sharing) = match (lend, self.state.pages[pfn].host) {
                (None, _) => (HostEntry::Guest { vm, gfn: gfn as u16 }, Sharing::Owned),
                (Some(permissions), HostEntry::LentToGuests(borrowers)) => {
                    (HostEntry::LentToGuests(borrowers + 1), Sharing::Borrowed(permissions))
                }
                (Some(permissions), _) => (HostEntry::LentToGuests(1), Sharing::Borrowed(permissions)),
            };
            self.state.pages[pfn].host = host;
            let entry = &mut self.state.vms[usize::from(vm)].entries[gfn];
            *entry = GuestEntry::Page { pfn: pfn as u16, sharing };
        }
        self.state.vms[usize::from(vm)].pages += count as u16;
        Ok(Outcome::Done(count))
    }

    /// The host owns every page and lends it to nobody but guests, and to not too many of them: the first page that
    /// is wrong decides.
    fn host_can_lend(&self, pfns: Run) -> Result<(), Outcome> {
        pfns.indices().try_for_each(|pfn| match self.state.pages[pfn].host {
            HostEntry::Owned => Ok(()),
            HostEntry::LentToGuests(borrowers) if borrowers < MAX_BORROWERS => Ok(()),
            HostEntry::LentToGuests(_) => Err(Outcome::Refused(Error::Busy)),
            _ => Err(PERMISSION),
        })
    }

    pub(crate) fn unshare_guest(&mut self, vm: u8, gfns: Run) -> Answer {
        self.range(self.world.gfn, gfns)?;
        if self.vm(vm)?.protected {
            return Err(PERMISSION);
        }
        self.take_back(vm, gfns)
    }

    pub(crate) fn reclaim_guest(&mut self, vm: u8, gfns: Run) -> Answer {
        self.range(self.world.gfn, gfns)?;
        let from = self.vm(vm)?;
        if !from.protected || from.phase != Phase::Dying {
            return Err(PERMISSION);
        }
        self.take_back(vm, gfns)
    }

    /// Takes what a guest has of a chunk, up to the first page that is not there.
    pub(crate) fn take_back(&mut self, vm: u8, gfns: Run) -> Answer {
        self.span(gfns)?;
        let chunk = self.chunk(self.world.gfn, gfns);
        let there = self.before_gap(vm, chunk);
        if there.count == 0 {
            return match self.state.vms[usize::from(vm)].entries[gfns.first as usize] {
                GuestEntry::Empty => Err(NO_ENTRY),
                // What was taken by force is the host's already.
                GuestEntry::Poisoned => Ok(Outcome::Done(1)),
                _ => Err(PERMISSION),
            };
        }
        if !self.guest_has(vm, there, |_| true) {
            return Err(PERMISSION);
        }
        self.supply(BOTH)?;
        self.take_from_guest(vm, there);
        Ok(Outcome::Done(there.count))
    }

    /// Takes private pages from a guest that is alive: those that follow each other in RAM and in one guest.
    pub(crate) fn force_reclaim(&mut self, pfns: Run) -> Answer {
        self.range(self.world.pfn, pfns)?;
        self.memory(pfns)?;
        let first = self.state.pages[pfns.first as usize];
        let HostEntry::Guest { vm, gfn } = first.host else {
            let error = if first.host_state().is_accessible() { Error::Again } else { Error::Permission };
            return Err(Outcome::Refused(error));
        };
        if self.vm(vm)?.phase != Phase::Live {
            return Err(PERMISSION);
        }
        let pfns = self.chunk(self.world.pfn, pfns);
        let gfns = self.chunk(self.world.gfn, Run { first: gfn.into(), count: pfns.count });
        let pairs = pfns.indices().zip(gfns.indices());
        let follows = |&(pfn, gfn): &(usize, usize)| {
            self.state.pages[pfn].host == HostEntry::Guest { vm, gfn: gfn as u16 }
        };
        let gfns = Run { count: pairs.take_while(follows).count() as u64, ..gfns };
        if !self.guest_has(vm, gfns, |sharing| sharing == Sharing::Owned) {
            return Err(PERMISSION);
        }
        self.supply(BOTH)?;
        self.change(vm, gfns, |_, entry, page| {
            *entry = GuestEntry::Poisoned;
            page.host = HostEntry::Owned;
            page.content = Content::Zeros;
        });
        self.state.vms[usize::from(vm)].pages -= gfns.count as u16;
        Ok(Outcome::Done(gfns.count))
    }

    pub(crate) fn query_page(&mut self, pfn: u64) -> Answer {
        self.range(self.world.pfn, Run::one(pfn))?;
        Ok(match self.state.pages.get(pfn as usize) {
            Some(page) => Outcome::Page(page.host_state(), pfn < self.world.pages),
            None => Outcome::Page(abi::HostState::NoPage, false),
        })
    }

    pub(crate) fn vm_create(&mut self, protected: bool, immediate: bool, root: u64) -> Answer {
        let run = Run { first: root, count: ROOT };
        self.range(self.world.pfn, run)?;
        if !(self.world.pfn + root).is_multiple_of(ROOT) {
            return Err(INVALID);
        }
        let unborn = self.state.vms.iter().position(|vm| vm.phase == Phase::Unborn);
        let number = unborn.ok_or(Outcome::Refused(Error::Busy))? as u8;
        self.memory(run)?;
        self.host_has(run, HostEntry::Owned)?;
        self.supply(&[Pool::Tables, Pool::Metadata])?;
        self.give_hyp(run, Use::Vm(number));
        let vm = &mut self.state.vms[usize::from(number)];
        *vm = Vm { phase: Phase::Live, protected, immediate, ..*vm };
        Ok(Outcome::Created(number))
    }

    pub(crate) fn teardown_start(&mut self, vm: u8) -> Answer {
        let vm = self.vm(vm)?;
        if vm.phase != Phase::Live {
            return Err(PERMISSION);
        }
        vm.phase = Phase::Dying;
        vm.pending = [None; VCPUS];
        Ok(Outcome::Done(0))
    }

    pub(crate) fn teardown_finish(&mut self, number: u8) -> Answer {
        let vm = self.vm(number)?;
        if vm.phase != Phase::Dying {
            return Err(PERMISSION);
        }
        if vm.pages > 0 {
            return Err(Outcome::Refused(Error::Busy));
        }
        self.supply(TABLES)?;
        let vm = &mut self.state.vms[usize::from(number)];
        vm.phase = Phase::Gone;
        // Enrolments of devices end with the table that they stand in.
        vm.entries = [GuestEntry::Empty; G];
        let mut back = 0;
        for page in &mut self.state.pages {
            if page.host == HostEntry::Hyp(Use::Vm(number)) {
                page.host = HostEntry::Owned;
                page.content = Content::Zeros;
                back += 1;
            }
        }
        Ok(Outcome::Ended(back))
    }

    /// The pages of an unshare are unmapped everywhere: it is checked again as things are now.
    pub(crate) fn unshare_ack(&mut self, vm: u8, vcpu: u8) -> Answer {
        let of = self.vm(vm)?;
        let pending = of.pending.get(usize::from(vcpu)).copied().ok_or(NO_ENTRY)?.ok_or(PERMISSION)?;
        if of.phase != Phase::Live {
            return Err(PERMISSION);
        }
        let shared = self.guest_has(vm, pending, |sharing| sharing == Sharing::Shared);
        if shared {
            self.supply(BOTH)?;
            self.make_private(vm, pending);
        }
        self.state.vms[usize::from(vm)].pending[usize::from(vcpu)] = None;
        Ok(Outcome::Done(if shared { pending.count } else { 0 }))
    }

    pub(crate) fn pin(&mut self, pfn: u64) -> Answer {
        self.memory(Run::one(pfn))?;
        self.host_has(Run::one(pfn), HostEntry::LentToHyp)?;
        if self.state.pages[pfn as usize].pins == 0 {
            if self.state.pages.iter().filter(|page| page.pins > 0).count() >= self.world.pins {
                return Err(Outcome::Refused(Error::Busy));
            }
            self.supply(TABLES)?;
        }
        let pins = &mut self.state.pages[pfn as usize].pins;
        *pins = pins.checked_add(1).ok_or(Outcome::Refused(Error::Busy))?;
        Ok(Outcome::Done(1))
    }

    pub(crate) fn unpin(&mut self, pfn: u64) -> Answer {
        let page = self.state.pages.get_mut(pfn as usize).ok_or(PERMISSION)?;
        page.pins = page.pins.checked_sub(1).ok_or(PERMISSION)?;
        Ok(Outcome::Done(1))
    }
}
