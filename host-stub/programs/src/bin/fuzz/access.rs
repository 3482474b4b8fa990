//! What a guest does beside the specification's calls, and giving it the pages that it misses.

use abi::page::Permissions;
use guest_stub::protocol::player::RET;
use host_programs::deed::Touch;
use host_programs::{Failure, failure};
use spec::state::{GuestEntry, HostEntry, Phase, Sharing};
use spec::{Call, Outcome, Run};

use crate::guest::Act;
use crate::play::{G, P, Play, V};
use crate::tell::Deed;
use crate::watch::CODE_SLOT;

impl Play<'_> {
    /// Gives a guest the page that it misses, mostly, and lets it go on.
    pub(crate) fn serve_missing(&mut self, call: Call, outcome: Outcome) -> Result<(), Failure> {
        let (Outcome::Missing(gfn), Some(vm)) = (outcome, call.vm()) else { return Ok(()) };
        if self.chooser.dice.below(8) == 0 {
            return Ok(());
        }
        if self.give(vm, gfn, None)? {
            self.play(call)?;
        }
        Ok(())
    }

    /// Gives a guest memory at a guest page, with everything allowed; `false` if the host has none to give.
    pub(crate) fn give(&mut self, vm: u8, gfn: u64, code: Option<u64>) -> Result<bool, Failure> {
        let from = self.chooser.dice.below(P as u64) as usize;
        if let Some(GuestEntry::Page { sharing: Sharing::Borrowed(_), .. }) =
            self.state.vms[usize::from(vm)].entries.get(gfn as usize)
        {
            // It has a page, with too little allowed.
            self.play(Call::UnshareGuest { vm, gfns: Run::one(gfn) })?;
        }
        let owned = |page: &usize| self.state.pages[*page].host == HostEntry::Owned;
        let Some(page) = (0..P).map(|page| (page + from) % P).find(owned) else { return Ok(false) };
        if let Some(code) = code {
            let (at, pfn) = (self.address(page, CODE_SLOT), page as u64);
            self.play(Call::HostStore { pfn })?;
            match self.deed.store(at, code)? {
                Touch::Done(_) => self.content[page][CODE_SLOT] = code,
                touch => return Err(failure!("the host cannot store to its page {page}: {touch}")),
            }
        }
        let (pfn, count) = (page as u64, 1);
        let outcome = if self.state.vms[usize::from(vm)].protected {
            self.play(Call::DonateGuest { vm, pfn, gfn, count })?
        } else {
            self.play(Call::ShareGuest { vm, pfn, gfn, count, permissions: Permissions::ALL })?
        };
        Ok(matches!(outcome, Outcome::Done(1)))
    }

    /// A guest loads, or fetches an instruction: accesses that the specification's calls do not have.
    pub(crate) fn other_access(&mut self) -> Result<(), Failure> {
        let vm = self.chooser.dice.below(V as u64) as u8;
        let gfn = self.chooser.dice.below(G as u64);
        let load = self.chooser.dice.below(3) > 0;
        let act = if load { Act::Load { gfn } } else { Act::Fetch { gfn } };
        if self.state.vms[usize::from(vm)].phase != Phase::Live || self.vcpu_for(vm, act).is_none() {
            return Ok(());
        }
        if load { self.guest_loads(vm, gfn) } else { self.guest_fetches(vm, gfn) }
    }

    fn guest_loads(&mut self, vm: u8, gfn: u64) -> Result<(), Failure> {
        for _ in 0..2 {
            let act = Act::Load { gfn };
            let Some(vcpu) = self.vcpu_for(vm, act) else { return Ok(()) };
            let outcome = self.act(vm, act)?;
            self.tale.note(Deed::Access { vm, act, outcome });
            let (slot, _) = self.touch_of(vm, vcpu)?;
            let expected = match self.state.vms[usize::from(vm)].entries[gfn as usize] {
                GuestEntry::Page { pfn, .. } => Outcome::Done(self.content[usize::from(pfn)][slot]),
                GuestEntry::Poisoned => Outcome::Aborted,
                GuestEntry::Empty | GuestEntry::Device if self.is_device(vm, gfn) => Outcome::Device(gfn),
                _ => Outcome::Missing(gfn),
            };
            if outcome != expected {
                return Err(failure!(
                    "a load of VM {vm}, vCPU {vcpu} at guest page {gfn} came to {outcome:x?}, and should to {expected:x?}"
                ));
            }
            if expected != Outcome::Missing(gfn) || !self.give(vm, gfn, None)? {
                break;
            }
        }
        Ok(())
    }

    /// A guest calls code in a page. Where there is something else it is not tried, so that the guest lives.
    fn guest_fetches(&mut self, vm: u8, gfn: u64) -> Result<(), Failure> {
        let act = Act::Fetch { gfn };
        let expected = match self.state.vms[usize::from(vm)].entries[gfn as usize] {
            GuestEntry::Page { pfn, sharing } => {
                let is_code = self.content[usize::from(pfn)][CODE_SLOT] != 0;
                match sharing {
                    Sharing::Borrowed(allowed) if !allowed.execute => Outcome::Missing(gfn),
                    _ if is_code => Outcome::Done(0),
                    _ => return Ok(()),
                }
            }
            GuestEntry::Device | GuestEntry::Poisoned => Outcome::Aborted,
            GuestEntry::Empty => Outcome::Missing(gfn),
        };
        if expected == Outcome::Missing(gfn)
            && !self.state.pages.iter().any(|page| page.host == HostEntry::Owned)
        {
            return Ok(());
        }
        let outcome = self.act(vm, act)?;
        self.tale.note(Deed::Access { vm, act, outcome });
        if outcome != expected {
            return Err(failure!(
                "a fetch of VM {vm} at guest page {gfn} came to {outcome:x?}, and should to {expected:x?}"
            ));
        }
        if outcome == Outcome::Missing(gfn) {
            if !self.give(vm, gfn, Some(u64::from(RET)))? {
                return Err(failure!("no page for a guest's code"));
            }
            let outcome = self.act(vm, act)?;
            self.tale.note(Deed::Access { vm, act, outcome });
            if outcome != Outcome::Done(0) {
                return Err(failure!(
                    "a fetch of VM {vm} at guest page {gfn} that is there came to {outcome:x?}"
                ));
            }
        }
        Ok(())
    }
}
