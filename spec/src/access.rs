//! Loads and stores, and what a host with a guest_memfd keeps in its own books.

use crate::call::{Call, Outcome};
use crate::state::{Content, GuestEntry, Page, Phase, Run, Sharing, State};
use crate::step::{Answer, ROOT, Turn};

impl<const P: usize, const V: usize, const G: usize> Turn<'_, P, V, G> {
    pub(crate) fn guest_store(&mut self, vm: u8, gfn: u64) -> Answer {
        let running = self.vm(vm).map_err(|_| Outcome::NotServed)?;
        if running.phase != Phase::Live {
            return Err(Outcome::NotServed);
        }
        let (pfn, content) = match running.entries.get(gfn as usize) {
            Some(GuestEntry::Page { pfn, sharing: Sharing::Owned }) => (*pfn, Content::Secret),
            Some(GuestEntry::Page { pfn, sharing: Sharing::Shared }) => (*pfn, Content::Known),
            Some(GuestEntry::Page { pfn, sharing: Sharing::Borrowed(allowed) }) if allowed.write => {
                (*pfn, Content::Known)
            }
            // An external abort: what was there will not come back.
            Some(GuestEntry::Poisoned) => return Err(Outcome::Aborted),
            Some(entry) if is_device(running.protected, *entry) => return Err(Outcome::Device(gfn)),
            _ => return Err(Outcome::Missing(gfn)),
        };
        self.state.pages[usize::from(pfn)].content = content;
        Ok(Outcome::Done(1))
    }

    pub(crate) fn host_store(&mut self, pfn: u64) -> Answer {
        let page = self.state.pages.get_mut(pfn as usize).ok_or(Outcome::Aborted)?;
        if !page.host_state().is_accessible() {
            return Err(Outcome::Aborted);
        }
        page.content = Content::Known;
        Ok(Outcome::Done(1))
    }

    /// The host's gate of guest_memfd: a page is let through only if the hypervisor says that the host may
    /// access it, and never while an unshare of it is pending.
    pub(crate) fn gate(&mut self, pfn: u64) -> Result<&mut Page, Outcome> {
        let draining = self.state.is_draining(pfn as usize);
        let page = self.state.pages.get_mut(pfn as usize).ok_or(Outcome::Aborted)?;
        if page.host_state().is_accessible() && !draining { Ok(page) } else { Err(Outcome::Aborted) }
    }

    pub(crate) fn let_go(&mut self, pfn: u64, change: impl FnOnce(&mut Page)) -> Answer {
        change(self.state.pages.get_mut(pfn as usize).ok_or(Outcome::Aborted)?);
        Ok(Outcome::Done(1))
    }
}

/// Whether a guest's loads and stores where its table says this are a device's: of a protected VM, which enrols
/// devices, or of another, for which everything without memory is one. (No VM here is made with `mmio_unguarded`.)
pub const fn is_device(protected: bool, entry: GuestEntry) -> bool {
    match entry {
        GuestEntry::Device => true,
        GuestEntry::Empty => !protected,
        GuestEntry::Poisoned | GuestEntry::Page { .. } => false,
    }
}

/// Whether a host that means well makes this call now: it neither gives away nor acknowledges what its programs
/// have mapped, or what its kernel holds on to.
pub fn is_honest<const P: usize, const V: usize, const G: usize>(state: &State<P, V, G>, call: Call) -> bool {
    let free = |run: Run| {
        run.indices().all(|pfn| state.pages.get(pfn).is_none_or(|page| !page.mapped && !page.held))
    };
    match call {
        Call::PoolTopUp { pfns, .. } | Call::VmTopUp { pfns, .. } => free(pfns),
        Call::DonateGuest { pfn, count, .. } => free(Run { first: pfn, count }),
        Call::VmCreate { root, .. } => free(Run { first: root, count: ROOT }),
        Call::UnshareAck { vm, vcpu } => {
            let pending = state.vms[usize::from(vm)].pending[usize::from(vcpu)];
            pending.into_iter().flat_map(Run::indices).all(|gfn| {
                match state.vms[usize::from(vm)].entries[gfn] {
                    GuestEntry::Page { pfn, .. } => free(Run::one(pfn.into())),
                    _ => true,
                }
            })
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi::page::Pool;

    #[test]
    fn a_host_that_means_well_gives_nothing_away_that_is_mapped_or_held() {
        let mut state: State<6, 1, 2> = State::new();
        state.pages[1].mapped = true;
        state.pages[4].held = true;
        let calls = |first| {
            let pfns = Run { first, count: 2 };
            [
                Call::PoolTopUp { pool: Pool::Tables, pfns },
                Call::VmTopUp { vm: 0, pfns },
                Call::DonateGuest { vm: 0, pfn: first, gfn: 0, count: 2 },
                Call::VmCreate { protected: true, immediate: false, root: first },
            ]
        };
        for first in [0, 1, 3, 4] {
            for call in calls(first) {
                assert!(!is_honest(&state, call), "{call:?}");
            }
            assert!(
                is_honest(&state, Call::ShareHyp { pfns: Run { first, count: 2 } }),
                "it stays the host's"
            );
        }
        for call in calls(2) {
            assert!(is_honest(&state, call), "{call:?}");
        }
    }

    #[test]
    fn a_host_that_means_well_acknowledges_only_what_it_has_let_go_of() {
        let mut state: State<2, 1, 3> = State::new();
        state.vms[0].entries[0] = GuestEntry::Page { pfn: 1, sharing: Sharing::Shared };
        let ack = Call::UnshareAck { vm: 0, vcpu: 1 };
        assert!(is_honest(&state, ack), "nothing is asked for");
        state.vms[0].pending[1] = Some(Run { first: 0, count: 2 });
        assert!(is_honest(&state, ack));
        state.pages[1].held = true;
        assert!(!is_honest(&state, ack));
        assert!(is_honest(&state, Call::UnshareAck { vm: 0, vcpu: 0 }), "another vCPU asks for nothing");
    }
}
