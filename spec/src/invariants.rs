//! The invariants of `docs/memory-ownership.md` that make sense without tables, TLBs and registers: as predicates
//! over a state, or over a step from one to the next.
//!
//! | id | here |
//! |---|---|
//! | I1 | a page has one owner: no two guest pages, of one guest or two, show the same page, unless the host lends it |
//! | I2 | both sides' books agree, so whoever reaches a page is its owner or its borrower on both sides |
//! | I3 | what is the hypervisor's is out of reach of host and guests |
//! | I4 | what the host can read is no secret, and pages that leave a guest's private memory or the hypervisor are zeros |
//! | I5 | a refusal changes nothing; a call about a run changes, on the side that it names, only the pages that it says it did, from the first on |
//! | I7 | the number of pages that a VM counts is their number, as is that of a page's loans; only pages lent to the hypervisor are pinned |
//! | I8 | no call stops [`step`](crate::step()): the explorer tries absurd ones too |
//! | I9 | a VM that is gone stays gone, and none changes its kind |
//! | poison | a page taken by force stays marked; a living guest loses a page only so, or by its own call about it |
//! | consent | a guest's private page is shared by its own call alone |
//! | host | with a host that means well, what a program has mapped or the kernel holds is accessible |
//!
//! I6 and I10 are about TLBs and registers: `World::check` of `hyp` asserts the first after each call of a test, and
//! `docs/memory-ownership.md` names the tests of the second.

use crate::call::{Call, Outcome};
use crate::state::{Content, GuestEntry, HostEntry, Page, Phase, Run, Sharing, State, Use, Vm};
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
        if shown > 1 && !matches!(page.host, HostEntry::LentToGuests(_)) {
            return Some("I1: a page is shown twice");
        }
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
        if let (HostEntry::Guest { vm: of, .. }, HostEntry::Borrowed) = (old.host, new.host)
            && !matches!(call, Call::Share { vm, .. } if vm == of)
        {
            return Some("consent: a guest's private page was shared by somebody else");
        }
    }
    for (number, (old, new)) in before.vms.iter().zip(&after.vms).enumerate() {
        if new.phase < old.phase {
            return Some("I9: a VM went back in its life");
        }
        let kind_changed = (old.protected, old.immediate) != (new.protected, new.immediate);
        if old.phase != Phase::Unborn && kind_changed {
            return Some("I9: a VM changed its kind");
        }
        let gives_up = |gfn: usize| match call {
            Call::Relinquish { vm, gfns } => {
                usize::from(vm) == number && at_least_one(gfns).contains(gfn as u64)
            }
            _ => false,
        };
        let mut entries = old.entries.iter().zip(&new.entries).enumerate();
        let broken =
            entries.find_map(|(gfn, (before, after))| broken_by_loss(old, *before, *after, gives_up(gfn)));
        if new.phase != Phase::Gone && broken.is_some() {
            return broken;
        }
    }
    let more = changes_more_than_it_says(before, call, outcome, after);
    more.then_some("I5: a call changed what is not of the pages that it says it did")
}

/// A guest's run: none means one.
fn at_least_one(run: Run) -> Run {
    Run { count: run.count.max(1), ..run }
}

/// Whether something changed that is not of the pages that a call about a run was done for: as many as its outcome
/// says, from the first of the run on.
fn changes_more_than_it_says<const P: usize, const V: usize, const G: usize>(
    before: &State<P, V, G>,
    call: Call,
    outcome: Outcome,
    after: &State<P, V, G>,
) -> bool {
    let Outcome::Done(done) = outcome else { return false };
    let (pfns, vm, gfns) = match call {
        Call::PoolTopUp { pfns, .. }
        | Call::VmTopUp { pfns, .. }
        | Call::ShareHyp { pfns }
        | Call::UnshareHyp { pfns }
        | Call::ForceReclaim { pfns } => (Some(pfns.first), None, None),
        Call::DonateGuest { vm, pfn, gfn, .. } | Call::ShareGuest { vm, pfn, gfn, .. } => {
            (Some(pfn), Some(vm), Some(gfn))
        }
        Call::UnshareGuest { vm, gfns }
        | Call::ReclaimGuest { vm, gfns }
        | Call::Share { vm, gfns }
        | Call::Unshare { vm, gfns, .. }
        | Call::Relinquish { vm, gfns }
        | Call::GuardMap { vm, gfns }
        | Call::GuardUnmap { vm, gfns } => (None, Some(vm), Some(gfns.first)),
        _ => return false,
    };
    let of = |first: u64| Run { first, count: done };
    let pages = before.pages.iter().zip(&after.pages).enumerate();
    let mut changed_pages = pages.filter(|(_, (old, new))| old != new).map(|(pfn, _)| pfn as u64);
    let other_page = pfns.is_some_and(|first| changed_pages.any(|pfn| !of(first).contains(pfn)));
    let other_entry = vm.is_some()
        && before.vms.iter().zip(&after.vms).enumerate().any(|(number, (old, new))| {
            let entries = old.entries.iter().zip(&new.entries).enumerate();
            let mut changed = entries.filter(|(_, (old, new))| old != new).map(|(gfn, _)| gfn as u64);
            changed.any(|gfn| vm != Some(number as u8) || gfns.is_some_and(|first| !of(first).contains(gfn)))
        });
    other_page || other_entry
}

/// Finds what the loss of a guest's page breaks, which the guest has given up or not.
fn broken_by_loss<const G: usize>(
    vm: &Vm<G>,
    old: GuestEntry,
    new: GuestEntry,
    gives_up: bool,
) -> Option<&'static str> {
    if old == GuestEntry::Poisoned && new != old {
        return Some("poison: what was taken by force is not marked any more");
    }
    let GuestEntry::Page { pfn: had, .. } = old else { return None };
    let is_lost = match new {
        GuestEntry::Page { pfn: has, .. } => has != had,
        GuestEntry::Poisoned => false,
        GuestEntry::Empty | GuestEntry::Device => !gives_up,
    };
    if is_lost && vm.protected && vm.phase == Phase::Live {
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

#[cfg(test)]
mod tests {
    use super::*;
    use abi::page::Permissions;

    type Small = State<4, 2, 2>;

    const LENT: GuestEntry = GuestEntry::Page { pfn: 2, sharing: Sharing::Borrowed(Permissions::ALL) };
    const SHARED: GuestEntry = GuestEntry::Page { pfn: 1, sharing: Sharing::Shared };

    /// A private page and a shared one of a protected VM, a page lent to another VM, and one that EL2 has pinned.
    fn good() -> Small {
        let mut state = Small::new();
        let hosts = [
            HostEntry::Guest { vm: 0, gfn: 0 },
            HostEntry::Borrowed,
            HostEntry::LentToGuests(1),
            HostEntry::LentToHyp,
        ];
        state.pages.iter_mut().zip(hosts).for_each(|(page, host)| page.host = host);
        state.pages[0].content = Content::Secret;
        state.pages[3].pins = 1;
        let [first, second] = &mut state.vms;
        *first = Vm { phase: Phase::Live, protected: true, pages: 2, ..*first };
        first.entries = [GuestEntry::Page { pfn: 0, sharing: Sharing::Owned }, SHARED];
        *second = Vm { phase: Phase::Live, pages: 1, entries: [LENT, GuestEntry::Empty], ..*second };
        state
    }

    fn changed(change: impl FnOnce(&mut Small)) -> Small {
        let mut state = good();
        change(&mut state);
        state
    }

    #[test]
    fn each_mistake_in_a_state_is_told_apart() {
        let found = |change: fn(&mut Small)| broken_by_state(&changed(change)).unwrap_or("nothing");
        assert_eq!(found(|_| ()), "nothing");
        assert_eq!(
            found(|state| state.vms[1].entries[1] = GuestEntry::Poisoned),
            "poison: the host took by force what it only lends"
        );
        let reached = found(|state| state.pages[1].host = HostEntry::Hyp(Use::Pool));
        assert_eq!(reached, "I3: a guest reaches what is the hypervisor's");
        assert_eq!(
            found(|state| state.pages[0].host = HostEntry::Owned),
            "I2: the two sides' books disagree"
        );
        assert_eq!(
            found(|state| state.vms[0].protected = false),
            "I2: a guest has a page that its kind cannot have"
        );
        assert_eq!(found(|state| state.vms[0].pages = 1), "I7: a VM's count of pages is not their number");
        assert_eq!(
            found(|state| state.vms[0].phase = Phase::Gone),
            "I9: a page names a VM that is not there"
        );
        let outlived = |state: &mut Small| {
            state.vms[0].pending[0] = Some(Run::one(1));
            state.vms[0].phase = Phase::Dying;
        };
        assert_eq!(found(outlived), "I9: an unshare outlives its VM");
        assert_eq!(
            found(|state| state.pages[2].host = HostEntry::LentToGuests(2)),
            "I7: a page is lent to another number of guest pages than show it"
        );
        let twice = |state: &mut Small| {
            state.vms[0].entries[0] = SHARED;
            state.pages[0] = Small::new().pages[0];
        };
        assert_eq!(found(twice), "I1: a page is shown twice");
        let forgotten = |state: &mut Small| {
            state.vms[0].entries[0] = GuestEntry::Empty;
            state.vms[0].pages = 1;
        };
        assert_eq!(found(forgotten), "I2: the host's books name a guest that has no such page");
        let table = |state: &mut Small| {
            state.vms[1] = Vm { phase: Phase::Gone, ..Small::new().vms[1] };
            state.pages[2].host = HostEntry::Hyp(Use::Vm(1));
        };
        assert_eq!(found(table), "I9: a table of a VM that is not there");
        assert_eq!(found(|state| state.pages[1].content = Content::Secret), "I4: the host can read a secret");
        assert_eq!(
            found(|state| state.pages[2].pins = 1),
            "I7: a page is pinned that is not lent to the hypervisor"
        );
    }

    #[test]
    fn a_window_may_hide_pages_and_vms_but_not_contradict_itself() {
        let found = |change: fn(&mut Small)| broken_in_window(&changed(change)).unwrap_or("nothing");
        let hidden = |state: &mut Small| {
            state.vms[0].pages = 5;
            state.pages[2].host = HostEntry::LentToGuests(3);
            state.pages[3] = Page { host: HostEntry::Guest { vm: 7, gfn: 9 }, ..Small::new().pages[3] };
        };
        assert_eq!(found(hidden), "nothing");
        assert_eq!(
            found(|state| state.pages[0].host = HostEntry::Owned),
            "I2: the two sides' books disagree"
        );
        assert_eq!(found(|state| state.vms[0].pages = 1), "I7: a VM counts fewer pages than it has");
        let twice = |state: &mut Small| {
            state.vms[1].entries[1] = LENT;
            state.vms[1].pages = 2;
        };
        assert_eq!(found(twice), "I7: a page is lent to fewer guest pages than show it");
        assert_eq!(
            found(|state| state.vms[0].entries[0] = GuestEntry::Empty),
            "I2: the host's books name a guest that has no such page"
        );
        let shared_twice = |state: &mut Small| {
            state.vms[0].entries[0] = SHARED;
            state.pages[0] = Small::new().pages[0];
        };
        assert_eq!(found(shared_twice), "I1: a page is shown twice");
        assert_eq!(
            found(|state| state.pages[2].pins = 1),
            "I7: a page is pinned that is not lent to the hypervisor"
        );
    }

    #[test]
    fn each_mistake_of_a_step_is_told_apart() {
        let gfns = Run::one(0);
        let other = Call::Share { vm: 0, gfns };
        let after = |call, outcome, change: fn(&mut Small)| {
            broken_by_step(&good(), call, outcome, &changed(change)).unwrap_or("nothing")
        };
        let step = |change| after(other, Outcome::Done(1), change);
        assert_eq!(step(|_| ()), "nothing");
        assert_eq!(
            after(other, Outcome::Refused(abi::Error::Permission), |state| state.pages[3].pins = 2),
            "I5: a refused call changed something"
        );
        assert_eq!(
            step(|state| state.pages[0] = Page { content: Content::Known, ..Small::new().pages[0] }),
            "I4: a private page came to the host unwiped"
        );
        assert_eq!(step(|state| state.vms[0].phase = Phase::Unborn), "I9: a VM went back in its life");
        assert_eq!(step(|state| state.vms[0].immediate = true), "I9: a VM changed its kind");
        let lost = |state: &mut Small| state.vms[0].entries[1] = GuestEntry::Empty;
        assert_eq!(step(lost), "poison: a living guest lost a page and cannot know");
        let gives_up = |vm, gfns| after(Call::Relinquish { vm, gfns }, Outcome::Done(1), lost);
        assert_eq!(gives_up(0, Run::one(1)), "nothing");
        assert_eq!(gives_up(0, Run { first: 1, count: 0 }), "nothing", "no number is one page");
        assert_eq!(gives_up(1, Run::one(1)), "poison: a living guest lost a page and cannot know");
        assert_eq!(gives_up(0, gfns), "poison: a living guest lost a page and cannot know");
        let replaced = |state: &mut Small| {
            state.vms[0].entries[1] = GuestEntry::Page { pfn: 3, sharing: Sharing::Shared }
        };
        assert_eq!(step(replaced), "poison: a living guest lost a page and cannot know");
        let force = |first| Call::ForceReclaim { pfns: Run::one(first) };
        let poisoned = |state: &mut Small| state.vms[0].entries[1] = GuestEntry::Poisoned;
        assert_eq!(after(force(1), Outcome::Done(1), poisoned), "nothing");
        let shared = |state: &mut Small| state.pages[0].host = HostEntry::Borrowed;
        assert_eq!(after(other, Outcome::Done(1), shared), "nothing");
        let by_another = "consent: a guest's private page was shared by somebody else";
        assert_eq!(after(Call::Share { vm: 1, gfns }, Outcome::Done(1), shared), by_another);
        assert_eq!(after(force(0), Outcome::Done(1), shared), by_another);
        let too_much = "I5: a call changed what is not of the pages that it says it did";
        assert_eq!(after(force(0), Outcome::Done(1), |state| state.pages[2].pins = 1), too_much);
        assert_eq!(step(|state| state.vms[1].entries[0] = GuestEntry::Device), too_much);
        let guard = Call::GuardMap { vm: 1, gfns: Run { first: 0, count: 2 } };
        let mapped = |state: &mut Small| state.vms[1].entries[1] = GuestEntry::Device;
        assert_eq!(after(guard, Outcome::Done(1), mapped), too_much);
        assert_eq!(after(guard, Outcome::Done(2), mapped), "nothing");
        let poisoned = changed(|state| state.vms[0].entries[0] = GuestEntry::Poisoned);
        let unmarked = changed(|state| state.vms[0].entries[0] = GuestEntry::Empty);
        let found = broken_by_step(&poisoned, other, Outcome::Done(1), &unmarked);
        assert_eq!(found, Some("poison: what was taken by force is not marked any more"));
    }

    #[test]
    fn a_dead_mapping_of_a_host_that_means_well_is_found() {
        assert_eq!(broken_for_honest_host(&changed(|state| state.pages[1].mapped = true)), None);
        assert!(broken_for_honest_host(&changed(|state| state.pages[0].mapped = true)).is_some());
        assert!(broken_for_honest_host(&changed(|state| state.pages[0].held = true)).is_some());
    }
}
