//! What a guest asks for, about its own pages.

use crate::call::Outcome;
use crate::state::{Content, GuestEntry, HostEntry, Run, Sharing};
use crate::step::{Answer, BOTH, Turn};
use abi::page::Pool;

impl<const P: usize, const V: usize, const G: usize> Turn<'_, P, V, G> {
    /// A guest's range: no pages means one; the first chunk of it.
    pub(crate) fn guest_chunk(&self, gfns: Run) -> Result<Run, Outcome> {
        let gfns = Run { count: gfns.count.max(1), ..gfns };
        let sane = self.range(self.world.gfn, gfns).and_then(|()| self.span(gfns));
        sane.map_err(|_| Outcome::InvalidParameter)?;
        Ok(self.chunk(self.world.gfn, gfns))
    }

    pub(crate) fn share(&mut self, vm: u8, gfns: Run) -> Answer {
        self.guest(vm)?;
        let gfns = self.guest_chunk(gfns)?;
        // The first page that is not the guest's alone decides.
        for gfn in gfns.first..gfns.first + gfns.count {
            if !self.guest_has(vm, Run::one(gfn), |sharing| sharing == Sharing::Owned) {
                let empty = self.state.vms[usize::from(vm)].entries[gfn as usize] == GuestEntry::Empty;
                return Err(if empty { Outcome::Missing(gfn) } else { Outcome::InvalidParameter });
            }
        }
        self.supply(BOTH)?;
        self.change(vm, gfns, |_, entry, page| {
            if let GuestEntry::Page { sharing, .. } = entry {
                *sharing = Sharing::Shared;
            }
            page.host = HostEntry::Borrowed;
            // What is in it is now the host's to know: the guest has said so.
            page.content = page.content.min(Content::Known);
        });
        Ok(Outcome::Done(gfns.count))
    }

    pub(crate) fn unshare(&mut self, vm: u8, vcpu: u8, gfns: Run) -> Answer {
        let guest = self.guest(vm)?;
        let immediate = guest.immediate;
        let waits = guest.pending.get(usize::from(vcpu)).copied().ok_or(Outcome::NotServed)?;
        if waits.is_some() {
            return Err(Outcome::NotServed);
        }
        let gfns = self.guest_chunk(gfns)?;
        if !self.guest_has(vm, gfns, |sharing| sharing == Sharing::Shared) {
            return Err(Outcome::InvalidParameter);
        }
        if !immediate {
            self.state.vms[usize::from(vm)].pending[usize::from(vcpu)] = Some(gfns);
            return Ok(Outcome::Asked(gfns.count));
        }
        self.supply(BOTH)?;
        self.make_private(vm, gfns);
        Ok(Outcome::Done(gfns.count))
    }

    pub(crate) fn make_private(&mut self, vm: u8, gfns: Run) {
        self.change(vm, gfns, |gfn, entry, page| {
            if let GuestEntry::Page { sharing, .. } = entry {
                *sharing = Sharing::Owned;
            }
            page.host = HostEntry::Guest { vm, gfn: gfn as u16 };
        });
    }

    pub(crate) fn relinquish(&mut self, vm: u8, gfns: Run) -> Answer {
        self.guest(vm)?;
        let gfns = self.guest_chunk(gfns)?;
        let there = self.before_gap(vm, gfns);
        if there.count == 0 {
            return match self.state.vms[usize::from(vm)].entries[gfns.first as usize] {
                GuestEntry::Empty => Ok(Outcome::Done(1)),
                _ => Err(Outcome::InvalidParameter),
            };
        }
        if !self.guest_has(vm, there, |sharing| sharing == Sharing::Owned) {
            return Err(Outcome::InvalidParameter);
        }
        self.supply(BOTH)?;
        self.take_from_guest(vm, there);
        Ok(Outcome::Done(there.count))
    }

    /// MMIO_GUARD_MAP and MMIO_GUARD_UNMAP.
    pub(crate) fn guard(&mut self, vm: u8, gfns: Run, enrol: bool) -> Answer {
        self.guest(vm)?;
        let gfns = self.guest_chunk(gfns)?;
        let fits = |entry: &GuestEntry| match entry {
            GuestEntry::Empty => enrol,
            GuestEntry::Device => true,
            GuestEntry::Poisoned | GuestEntry::Page { .. } => false,
        };
        if !self.state.vms[usize::from(vm)].entries[gfns.indices()].iter().all(fits) {
            return Err(Outcome::InvalidParameter);
        }
        self.supply(&[Pool::Vm])?;
        let entry = if enrol { GuestEntry::Device } else { GuestEntry::Empty };
        self.state.vms[usize::from(vm)].entries[gfns.indices()].fill(entry);
        Ok(Outcome::Done(gfns.count))
    }
}
