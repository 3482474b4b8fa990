//! The invariants of `docs/memory-ownership.md` that make sense without tables, TLBs and registers: as predicates
//! over a state, or over a step from one to the next.
//!
//! | id | here |
//! |---|---|
//! | I1 | a page has one owner: no two guest pages, of one guest or two, show the same page, unless the host lends it |
//! | I2 | both sides' books agree, so whoever reaches a page is its owner or its borrower on both sides |
//! | I3 | what is the hypervisor's is out of reach of host and guests |
//! | I4 | what the host can read is no secret, and pages that leave a guest's private memory or the hypervisor are zeros |
//! | I5 | a refusal changes nothing |
//! | I7 | the number of pages that a VM counts is their number, as is that of a page's loans; only pages lent to the hypervisor are pinned |
//! | I8 | no call stops [`step`](crate::step()): the explorer tries absurd ones too |
//! | I9 | a VM that is gone stays gone, and none changes its kind |
//! | poison | a page taken by force stays marked; a living guest loses a page only so, or by its own call |
//! | host | with a host that means well, what a program has mapped or the kernel holds is accessible |
//!
//! I6 and I10 are about TLBs and registers.

use crate::call::{Call, Outcome};
use crate::state::{Content, GuestEntry, HostEntry, Page, Phase, Sharing, State, Use, Vm};
use abi::page::OwnerKind;

/// Finds what a state breaks.
pub fn broken_by_state<const P: usize, const V: usize, const G: usize>(
    state: &State<P, V, G>,
) -> Option<&'static str> {
    // How often a page is shown by a guest of any VM.
    let mut shown = [0u8; P];
    for (number, vm) in state.vms.iter().enumerate() {
        if !vm.protected && vm.entries.contains(&GuestEntry::Poisoned) {
            return Some("poison: the host took by force what it only lends");
        }
        let mut pages = 0;
        for (gfn, entry) in vm.entries.iter().enumerate() {
            let GuestEntry::Page { pfn, sharing } = *entry else { continue };
            pages += 1;
            shown[usize::from(pfn)] += 1;
            if let Some(broken) = broken_by_page(&state.pages[usize::from(pfn)], number, vm, gfn, sharing) {
                return Some(broken);
            }
        }
        if vm.pages != pages {
            return Some("I7: a VM's count of pages is not their number");
        }
        if matches!(vm.phase, Phase::Unborn | Phase::Gone) && pages > 0 {
            return Some("I9: a page names a VM that is not there");
        }
        if vm.phase != Phase::Live && vm.pending.iter().any(Option::is_some) {
            return Some("I9: an unshare outlives its VM");
        }
    }
    for (page, shown) in state.pages.iter().zip(shown) {
        if let HostEntry::LentToGuests(borrowers) = page.host
            && borrowers != shown
        {
            return Some("I7: a page is lent to another number of guest pages than show it");
        }
        if shown > 1 && !matches!(page.host, HostEntry::LentToGuests(_)) {
            return Some("I1: a page is shown twice");
        }
        let by_guest =
            matches!(page.host, HostEntry::Guest { .. } | HostEntry::Borrowed | HostEntry::LentToGuests(_));
        if by_guest != (shown > 0) {
            return Some("I2: the host's books name a guest that has no such page");
        }
        if let HostEntry::Hyp(Use::Vm(vm)) = page.host
            && !matches!(state.vms[usize::from(vm)].phase, Phase::Live | Phase::Dying)
        {
            return Some("I9: a table of a VM that is not there");
        }
        if page.host_state().is_accessible() && page.content == Content::Secret {
            return Some("I4: the host can read a secret");
        }
        if page.pins > 0 && page.host != HostEntry::LentToHyp {
            return Some("I7: a page is pinned that is not lent to the hypervisor");
        }
    }
    None
}

/// Finds what a guest's page breaks.
fn broken_by_page<const G: usize>(
    page: &Page,
    number: usize,
    vm: &Vm<G>,
    gfn: usize,
    sharing: Sharing,
) -> Option<&'static str> {
    let agrees = match sharing {
        Sharing::Owned => page.host == HostEntry::Guest { vm: number as u8, gfn: gfn as u16 },
        Sharing::Shared => page.host == HostEntry::Borrowed,
        Sharing::Borrowed(_) => matches!(page.host, HostEntry::LentToGuests(_)),
    };
    if matches!(page.host, HostEntry::Hyp(_)) {
        return Some("I3: a guest reaches what is the hypervisor's");
    }
    if !agrees {
        return Some("I2: the two sides' books disagree");
    }
    if vm.protected == matches!(sharing, Sharing::Borrowed(_)) {
        return Some("I2: a guest has a page that its kind cannot have");
    }
    None
}

/// Finds what a window of something larger breaks: its pages may be of VMs, and its VMs may have pages, that it
/// does not show.
pub fn broken_in_window<const P: usize, const V: usize, const G: usize>(
    state: &State<P, V, G>,
) -> Option<&'static str> {
    let mut shown = [0u8; P];
    for (number, vm) in state.vms.iter().enumerate() {
        let mut pages = 0;
        for (gfn, entry) in vm.entries.iter().enumerate() {
            let GuestEntry::Page { pfn, sharing } = *entry else { continue };
            pages += 1;
            shown[usize::from(pfn)] = shown[usize::from(pfn)].saturating_add(1);
            if let Some(broken) = broken_by_page(&state.pages[usize::from(pfn)], number, vm, gfn, sharing) {
                return Some(broken);
            }
        }
        if vm.pages < pages {
            return Some("I7: a VM counts fewer pages than it has");
        }
    }
    for (pfn, (page, shown)) in state.pages.iter().zip(shown).enumerate() {
        if matches!(page.host, HostEntry::LentToGuests(borrowers) if borrowers < shown) {
            return Some("I7: a page is lent to fewer guest pages than show it");
        }
        if let HostEntry::Guest { vm, gfn } = page.host
            && let Some(vm) = state.vms.get(usize::from(vm))
            && vm.entries.get(usize::from(gfn))
                != Some(&GuestEntry::Page { pfn: pfn as u16, sharing: Sharing::Owned })
        {
            return Some("I2: the host's books name a guest that has no such page");
        }
        if page.pins > 0 && page.host != HostEntry::LentToHyp {
            return Some("I7: a page is pinned that is not lent to the hypervisor");
        }
    }
    None
}

/// Finds what a step breaks.
pub fn broken_by_step<const P: usize, const V: usize, const G: usize>(
    before: &State<P, V, G>,
    call: Call,
    outcome: Outcome,
    after: &State<P, V, G>,
) -> Option<&'static str> {
    if outcome.is_refusal() && before != after {
        return Some("I5: a refused call changed something");
    }
    for (old, new) in before.pages.iter().zip(&after.pages) {
        let private = matches!(old.host, HostEntry::Guest { .. } | HostEntry::Hyp(_));
        if private && new.owner() == OwnerKind::Host && new.content != Content::Zeros {
            return Some("I4: a private page came to the host unwiped");
        }
    }
    for (old, new) in before.vms.iter().zip(&after.vms) {
        if new.phase < old.phase {
            return Some("I9: a VM went back in its life");
        }
        let kind_changed = (old.protected, old.immediate) != (new.protected, new.immediate);
        if old.phase != Phase::Unborn && kind_changed {
            return Some("I9: a VM changed its kind");
        }
        if new.phase != Phase::Gone
            && let Some(broken) = old
                .entries
                .iter()
                .zip(&new.entries)
                .find_map(|(old_entry, new_entry)| broken_by_loss(old, call, *old_entry, *new_entry))
        {
            return Some(broken);
        }
    }
    None
}

/// Finds what the loss of a guest's page breaks.
fn broken_by_loss<const G: usize>(
    vm: &Vm<G>,
    call: Call,
    old: GuestEntry,
    new: GuestEntry,
) -> Option<&'static str> {
    let had_page = matches!(old, GuestEntry::Page { .. });
    let has_page = matches!(new, GuestEntry::Page { .. });
    let gave_it_up = matches!(call, Call::Relinquish { .. });
    if old == GuestEntry::Poisoned && new != old {
        return Some("poison: what was taken by force is not marked any more");
    }
    if had_page
        && !has_page
        && vm.protected
        && vm.phase == Phase::Live
        && new != GuestEntry::Poisoned
        && !gave_it_up
    {
        return Some("poison: a living guest lost a page and cannot know");
    }
    None
}

/// Finds what a host that means well would not have come to.
pub fn broken_for_honest_host<const P: usize, const V: usize, const G: usize>(
    state: &State<P, V, G>,
) -> Option<&'static str> {
    let dead =
        state.pages.iter().any(|page| (page.mapped || page.held) && !page.host_state().is_accessible());
    dead.then_some("host: a program's mapping is dead, though the host means well")
}
