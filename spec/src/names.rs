//! Names of pages and VMs: states that differ in names only count once, and stories are told in the names of boot.

use crate::call::Call;
use crate::explore::encode;
use crate::state::{GuestEntry, HostEntry, Page, Phase, Run, State, Use, Vm};

/// New names of pages and VMs, by the old ones.
#[derive(Clone, Copy)]
pub(crate) struct Names<const P: usize, const V: usize> {
    pages: [u8; P],
    vms: [u8; V],
}

impl<const P: usize, const V: usize> Names<P, V> {
    /// Everything keeps its name.
    pub(crate) const SAME: Self = {
        let mut same = Self { pages: [0; P], vms: [0; V] };
        let mut number = 0;
        while number < P {
            same.pages[number] = number as u8;
            number += 1;
        }
        number = 0;
        while number < V {
            same.vms[number] = number as u8;
            number += 1;
        }
        same
    };

    /// The old names, by these.
    pub(crate) fn inverse(&self) -> Self {
        let mut inverse = *self;
        (0..P).for_each(|old| inverse.pages[usize::from(self.pages[old])] = old as u8);
        (0..V).for_each(|old| inverse.vms[usize::from(self.vms[old])] = old as u8);
        inverse
    }

    pub(crate) fn then(&self, later: &Self) -> Self {
        Self {
            pages: self.pages.map(|page| later.pages[usize::from(page)]),
            vms: self.vms.map(|vm| later.vms[usize::from(vm)]),
        }
    }

    fn page(&self, pfn: u64) -> u64 {
        self.pages.get(pfn as usize).map_or(pfn, |page| u64::from(*page))
    }

    fn vm(&self, vm: u8) -> u8 {
        self.vms.get(usize::from(vm)).copied().unwrap_or(vm)
    }

    /// A run of one page, or of a pair.
    fn run(&self, run: Run) -> Run {
        let last = run.first.saturating_add(run.count.clamp(1, 2) - 1);
        Run { first: self.page(run.first).min(self.page(last)), ..run }
    }

    pub(crate) fn rename(&self, call: Call) -> Call {
        let mut call = call;
        match &mut call {
            Call::PoolTopUp { pfns, .. }
            | Call::ShareHyp { pfns }
            | Call::UnshareHyp { pfns }
            | Call::ForceReclaim { pfns } => {
                *pfns = self.run(*pfns);
            }
            Call::VmTopUp { vm, pfns } => (*vm, *pfns) = (self.vm(*vm), self.run(*pfns)),
            Call::DonateGuest { vm, pfn, .. } | Call::ShareGuest { vm, pfn, .. } => {
                (*vm, *pfn) = (self.vm(*vm), self.page(*pfn));
            }
            Call::VmCreate { root, .. } => *root = self.run(Run { first: *root, count: 2 }).first,
            Call::QueryPage { pfn }
            | Call::Pin { pfn }
            | Call::Unpin { pfn }
            | Call::HostStore { pfn }
            | Call::Map { pfn }
            | Call::Unmap { pfn }
            | Call::Hold { pfn }
            | Call::Release { pfn } => *pfn = self.page(*pfn),
            Call::UnshareGuest { vm, .. }
            | Call::ReclaimGuest { vm, .. }
            | Call::UnshareAck { vm, .. }
            | Call::VmTeardownStart { vm }
            | Call::VmTeardownFinish { vm }
            | Call::Share { vm, .. }
            | Call::Unshare { vm, .. }
            | Call::Relinquish { vm, .. }
            | Call::GuardMap { vm, .. }
            | Call::GuardUnmap { vm, .. }
            | Call::GuestStore { vm, .. } => *vm = self.vm(*vm),
        }
        call
    }

    fn apply<const G: usize>(&self, state: &State<P, V, G>) -> State<P, V, G> {
        let mut named = *state;
        for (old, page) in state.pages.iter().enumerate() {
            let host = match page.host {
                HostEntry::Hyp(Use::Vm(vm)) => HostEntry::Hyp(Use::Vm(self.vm(vm))),
                HostEntry::Guest { vm, gfn } => HostEntry::Guest { vm: self.vm(vm), gfn },
                other => other,
            };
            named.pages[usize::from(self.pages[old])] = Page { host, ..*page };
        }
        for (old, vm) in state.vms.iter().enumerate() {
            let entries = vm.entries.map(|entry| match entry {
                GuestEntry::Page { pfn, sharing } => {
                    GuestEntry::Page { pfn: self.pages[usize::from(pfn)].into(), sharing }
                }
                other => other,
            });
            named.vms[usize::from(self.vms[old])] = Vm { entries, ..*vm };
        }
        named
    }
}

/// What tells pages apart but their names: what the books say of them, and which guest pages show them, a bit each.
type Look = (Page, u64);

fn looks<const P: usize, const V: usize, const G: usize>(state: &State<P, V, G>) -> [Look; P] {
    let mut looks = state.pages.map(|page| (page, 0));
    for (number, vm) in state.vms.iter().enumerate() {
        for (gfn, entry) in vm.entries.iter().enumerate() {
            if let GuestEntry::Page { pfn, .. } = entry {
                looks[usize::from(*pfn)].1 |= 1 << (number * G + gfn);
            }
        }
    }
    looks
}

/// The state among those that differ in names only that stands for all of them, and the names that it gives.
/// Pages keep their pairs; VMs that are born change names with each other.
pub(crate) fn canonical<const P: usize, const V: usize, const G: usize>(
    state: &State<P, V, G>,
) -> (State<P, V, G>, Names<P, V>) {
    let same = Names::<P, V>::SAME.vms;
    let by_vms = |vms: [u8; V]| {
        let names = Names { vms, ..Names::SAME };
        let named = names.apply(state);
        let looks = looks(&named);
        let mut order: [usize; P] = core::array::from_fn(|page| page);
        order.chunks_exact_mut(2).for_each(|pair| pair.sort_by_key(|page| looks[*page]));
        let mut pairs: Vec<&[usize]> = order.chunks_exact(2).collect();
        pairs.sort_by_key(|pair| (looks[pair[0]], looks[pair[1]]));
        let mut sorted = Names { pages: [0; P], vms: same };
        for (new, old) in pairs.into_iter().flatten().enumerate() {
            sorted.pages[*old] = new as u8;
        }
        (sorted.apply(&named), names.then(&sorted))
    };
    let mut best = by_vms(same);
    let born = state.vms.iter().filter(|vm| vm.phase != Phase::Unborn).count();
    if born == 2 {
        let mut swapped = same;
        swapped.swap(0, 1);
        let other = by_vms(swapped);
        if encode(&other.0) < encode(&best.0) {
            best = other;
        }
    }
    best
}

/// Of the pages of a canonical state that look the same, the first.
pub(crate) fn representatives<const P: usize, const V: usize, const G: usize>(
    state: &State<P, V, G>,
) -> [bool; P] {
    let looks = looks(state);
    core::array::from_fn(|page| {
        let pair = page & !1;
        let twin_of_pair = pair >= 2 && looks[pair - 2..pair] == looks[pair..pair + 2];
        !twin_of_pair && (page == pair || looks[page] != looks[pair])
    })
}
