//! Whether the core is in a state of the specification: all that the core says of itself and all that the simulated
//! hardware reaches is looked at, and a difference told in words.

use super::Real;
use abi::host::HostCall;
use abi::page::OwnerKind;
use abi::{HostState, VmFlags, VmHandle};
use hyp::addr::{Gfn, Pages, Pfn};
use hyp::ownership::query::GuestPage;
use hyp::testing::RAM_START;
use hyp::testing::snapshot::VmLife;
use spec::State;
use spec::state::{Content, GuestEntry, HostEntry, Phase, Sharing};
use std::sync::atomic::Ordering;

impl<const P: usize, const V: usize, const G: usize> Real<P, V, G> {
    /// Compares everything with a state of the specification, which was `before`. Where that is the same and no
    /// word of RAM was written since, only what EL2 keeps in records of its own is looked at; the content of a page
    /// is looked at where the specification changed it. Without `before`, everything is looked at.
    ///
    /// # Errors
    /// The first difference.
    pub fn compare(&self, state: &State<P, V, G>, before: Option<&State<P, V, G>>) -> Result<(), String> {
        self.compare_records(state)?;
        let changes = self.core.sim().changes();
        if self.seen.swap(changes, Ordering::Relaxed) == changes && before == Some(state) {
            return Ok(());
        }
        self.core.check();
        if before.is_none() {
            let stale = self.core.sim().stale_entries(None);
            assert!(stale.is_empty(), "stale translations: {stale:?}");
        }
        for (number, page) in state.pages.iter().enumerate() {
            let pfn = self.place.pfn + number as u64;
            let [host_state, owner, vm, gfn, el2, ..] = self.core.call(HostCall::TestPage { pfn }).values;
            let (named_vm, named_gfn) = match page.host {
                HostEntry::Guest { vm, gfn } => (self.handle(vm).to_word(), self.place.gfn + u64::from(gfn)),
                _ => (0, 0),
            };
            let expected = [
                page.host_state() as u64,
                page.owner() as u64,
                named_vm,
                named_gfn,
                page.mapped_at_el2().into(),
            ];
            let real = [host_state, owner, vm, gfn, el2];
            if real != expected {
                let (real, spec) = (whose(real), whose(expected));
                return Err(format!("page {number}: the core says {real}; the specification says {spec}"));
            }
            let reads = self.core.host_reads(pfn - RAM_START);
            same(|| format!("page {number}: the host reads it"), &reads, &page.host_state().is_accessible())?;
            let leaf = self.core.sim().walk_stage2(self.core.host(), pfn << 12).ok();
            let leads =
                leaf.map(|leaf| (leaf.pa + ((pfn << 12) - leaf.ipa), leaf.read, leaf.write, leaf.execute));
            let expected = page.host_state().is_accessible().then_some((pfn << 12, true, true, true));
            same(|| format!("page {number}: where the host comes to, and how"), &leads, &expected)?;
            let changed = before.is_none_or(|before| before.pages[number] != *page);
            if changed && !matches!(page.host, HostEntry::Hyp(_)) {
                let wiped = self.core.is_wiped(pfn - RAM_START);
                same(|| format!("page {number}: it is zeros"), &wiped, &(page.content == Content::Zeros))?;
            }
        }
        for (number, vm) in state.vms.iter().enumerate() {
            if matches!(vm.phase, Phase::Live | Phase::Dying) {
                let handle = self.handle(number as u8);
                let real = self.reach(handle);
                for (gfn, entry) in vm.entries.iter().enumerate() {
                    let expected = match entry {
                        GuestEntry::Page { pfn, sharing } => Some(word(u64::from(*pfn), *sharing)),
                        _ => None,
                    };
                    if real[gfn] != expected {
                        let (real, spec) = (what(real[gfn]), what(expected));
                        return Err(format!(
                            "VM {number}, guest page {gfn}: the core's tables show {real}; the specification, {spec}"
                        ));
                    }
                    let frame = Gfn::new(self.place.gfn + gfn as u64).expect("a guest page");
                    let expected = match entry {
                        GuestEntry::Empty => GuestPage::Missing,
                        GuestEntry::Device => GuestPage::Device,
                        GuestEntry::Poisoned => GuestPage::Poisoned,
                        GuestEntry::Page { .. } => GuestPage::Present,
                    };
                    let real = self.core.hyp.guest_page(handle, frame);
                    same(|| format!("VM {number}: what is at guest page {gfn}"), &real, &expected)?;
                }
            }
        }
        let count =
            |fits: fn(&HostEntry) -> bool| state.pages.iter().filter(|page| fits(&page.host)).count() as u64;
        let census = self.core.census();
        let real = [census.host_shared, census.guest, census.guest_shared, census.total()];
        let expected = [
            count(|host| matches!(host, HostEntry::LentToHyp | HostEntry::LentToGuests(_))),
            count(|host| matches!(host, HostEntry::Guest { .. })),
            count(|host| matches!(host, HostEntry::Borrowed)),
            self.total,
        ];
        same(
            || "pages lent by the host, of guests, shared by guests, of anybody".to_owned(),
            &real,
            &expected,
        )
    }

    /// Compares what is in no table: pins and loans of pages; VMs, and what their vCPUs wait for.
    fn compare_records(&self, state: &State<P, V, G>) -> Result<(), String> {
        let window = Pages::<Pfn>::from_raw(self.place.pfn, P as u64).expect("pages of RAM");
        for (number, (page, real)) in state.pages.iter().zip(self.core.holds_of(window)).enumerate() {
            let expected = match page.host {
                HostEntry::LentToGuests(loans) => (page.pins, loans.into()),
                _ => (page.pins, 0),
            };
            same(|| format!("page {number}: holds and loans"), &real, &expected)?;
        }
        for (number, vm) in state.vms.iter().enumerate().filter(|(_, vm)| vm.phase != Phase::Unborn) {
            let live = vm.phase == Phase::Live;
            let pages = vm.entries.iter().filter(|entry| matches!(entry, GuestEntry::Page { .. })).count();
            let flags =
                VmFlags { protected: vm.protected, unshare_immediate: vm.immediate, mmio_unguarded: false };
            let unshares = vm.pending.map(|run| run.map(|run| (self.place.gfn + run.first, run.count)));
            // The vCPU of which the rules know nothing waits for nothing.
            let unshares = if live { [&unshares[..], &[None]].concat() } else { Vec::new() };
            let expected =
                (vm.phase != Phase::Gone).then_some(VmLife { live, flags, pages: pages as u64, unshares });
            let real = self.core.life_of(self.handle(number as u8));
            same(|| format!("VM {number}: its life"), &real, &expected)?;
        }
        Ok(())
    }

    /// What the hardware reaches at each guest page: the page of the world, whose it is, and how. Every TLB holds it
    /// afterwards.
    fn reach(&self, vm: VmHandle) -> [Option<(u64, u8, bool, bool)>; G] {
        let mut reach = [None; G];
        self.core.load(self.core.guest(vm));
        for leaf in self.core.sim().leaves_stage2(self.core.guest(vm)) {
            for page in 0..leaf.size >> 12 {
                let gfn = ((leaf.ipa >> 12) + page).wrapping_sub(self.place.gfn);
                let pfn = ((leaf.pa >> 12) + page).wrapping_sub(self.place.pfn);
                match reach.get_mut(gfn as usize) {
                    Some(place) if leaf.read => *place = Some((pfn, leaf.sw, leaf.write, leaf.execute)),
                    Some(_) => panic!("{vm:?} has a page that it cannot read: {leaf:?}"),
                    None => panic!("{vm:?} reaches a page outside its world: {leaf:?}"),
                }
            }
        }
        reach
    }
}

/// What TEST_PAGE tells, in words. Guest pages are counted from the guest's own address 0.
fn whose([state, owner, vm, gfn, el2]: [u64; 5]) -> String {
    let owner = match owner {
        owner if owner == OwnerKind::Host as u64 => "the host's".to_owned(),
        owner if owner == OwnerKind::Hyp as u64 => "the hypervisor's".to_owned(),
        _ => match VmHandle::from_word(vm) {
            Some(vm) => format!("{vm:?}'s alone, as its page {gfn:#x}"),
            None => "a guest's".to_owned(),
        },
    };
    let state = match HostState::from_word(state) {
        Some(HostState::NoPage) => "out of the host's reach",
        Some(HostState::Owned) => "the host's alone",
        Some(HostState::SharedOwned) => "lent by the host",
        Some(HostState::SharedBorrowed) => "shared with the host",
        None => "in no state",
    };
    let el2 = if el2 == 0 { "not mapped at EL2" } else { "mapped at EL2" };
    format!("{owner}, {state}, {el2}")
}

/// What a leaf of a guest says, in words.
fn what(leaf: Option<(u64, u8, bool, bool)>) -> String {
    let Some((pfn, sharing, write, execute)) = leaf else { return "no memory".to_owned() };
    let how = ["its own", "its own, shared with the host", "lent by the host", "in no state"];
    let how = how.get(usize::from(sharing)).copied().unwrap_or("in no state");
    let rights = match (write, execute) {
        (true, true) => "",
        (true, false) => ", not to be executed",
        (false, true) => ", read-only",
        (false, false) => ", read-only and not to be executed",
    };
    format!("page {pfn}, {how}{rights}")
}

/// Compares what the core has with what the specification has.
fn same<T: PartialEq + std::fmt::Debug>(
    what: impl FnOnce() -> String,
    real: &T,
    spec: &T,
) -> Result<(), String> {
    if real == spec {
        return Ok(());
    }
    Err(format!("{}: the core has {real:?}, the specification {spec:?}", what()))
}

/// What a leaf is expected to say.
fn word(pfn: u64, sharing: Sharing) -> (u64, u8, bool, bool) {
    match sharing {
        Sharing::Owned => (pfn, 0, true, true),
        Sharing::Shared => (pfn, 1, true, true),
        Sharing::Borrowed(permissions) => (pfn, 2, permissions.write, permissions.execute),
    }
}
