//! What can be seen of a world at once: of every page its owner, its state, who reaches it and how; of every pool what
//! it has.
//!
//! Who reaches a page is not asked of the core: the simulated hardware walks all tables. What it finds in TLBs beyond
//! that is the business of [`World::check`](super::World::check).

use super::World;
use crate::addr::{PAGE_SHIFT, Pages, Pfn};
use crate::ownership::Host;
use crate::ownership::query::{Census, host_state};
use crate::pgtable::stage2::{self, Entry, Owner, Sharing};
use crate::vm::Phase;
use crate::vm::vcpu::{Pending, Vcpu};
use abi::{HostState, VmFlags, VmHandle};
use std::collections::BTreeMap;

/// Who can reach a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The host.
    Host,
    /// EL2.
    Hyp,
    /// A guest.
    Guest(VmHandle),
}

/// A way to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Whose.
    pub by: By,
    /// Number of the page in its address space.
    pub at: u64,
    /// Loads are allowed.
    pub read: bool,
    /// Stores are allowed.
    pub write: bool,
    /// Execution is allowed.
    pub execute: bool,
}

/// Who owns a page, as far as the host's table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOwner {
    /// The host.
    Host,
    /// The hypervisor.
    Hyp,
    /// A guest, at this page of its space.
    Guest(VmHandle, u64),
    /// A guest that shares it with the host: its own table says which.
    SharingGuest,
    /// Nobody: withheld, or being changed.
    Nobody,
}

/// A page of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Who owns it.
    pub owner: PageOwner,
    /// What it is to the host.
    pub state: HostState,
    /// Who reaches it.
    pub reach: Vec<Reach>,
    /// How often the hypervisor holds it.
    pub pins: u32,
    /// How many guest pages it is lent to.
    pub loans: u32,
    /// It reads as zeros, with caches and without.
    pub wiped: bool,
}

/// What the pool of a VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmPool {
    /// The VM.
    pub vm: VmHandle,
    /// Free table pages.
    pub free: u64,
    /// Pages that the host gave, and gets back.
    pub given: u64,
    /// Pages of the host's or its own that name it.
    pub pages: u64,
}

/// A VM as it is, beside its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmLife {
    /// Whether its end has not begun.
    pub live: bool,
    /// What it was made as.
    pub flags: VmFlags,
    /// Pages of the host's or its own that name it.
    pub pages: u64,
    /// The guest pages that each vCPU of a living VM wants back and waits for; up to the first vCPU that a CPU has
    /// claimed.
    pub unshares: Vec<Option<(u64, u64)>>,
}

/// What the pools have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pools {
    /// Free table pages of the host's pool.
    pub free: u64,
    /// Pages that were given to it.
    pub total: u64,
    /// Bytes of records.
    pub records: u64,
    /// Of each VM.
    pub vms: Vec<VmPool>,
}

/// A world at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every page of RAM, in order.
    pub pages: Vec<Page>,
    /// All pools.
    pub pools: Pools,
    /// All memory by owner.
    pub census: Census,
}

impl Snapshot {
    /// Tells the first thing in which another snapshot differs, by the number of its page.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self == other {
            return None;
        }
        let pages = self.pages.iter().zip(&other.pages).enumerate();
        let page = pages
            .filter(|(_, (before, after))| before != after)
            .map(|(number, (before, after))| format!("RAM page {number} was {before:?} and is {after:?}"));
        let pools = || format!("pools were {:?} and are {:?}", self.pools, other.pools);
        page.into_iter().next().or_else(|| Some(pools()))
    }
}

impl World {
    /// Looks at everything.
    pub fn snapshot(&self) -> Snapshot {
        let ram = self.hyp.machine().regions();
        let mut pages: BTreeMap<u64, Page> =
            ram.iter().flat_map(|run| run.iter()).map(|pfn| (pfn.as_u64(), self.look_at(pfn))).collect();
        let mut reaches = |by: By, leaves: Vec<sim::Leaf>| {
            for leaf in leaves {
                let (first, end) = (leaf.pa >> PAGE_SHIFT, leaf.pa.saturating_add(leaf.size) >> PAGE_SHIFT);
                // Beyond RAM the host reaches what is no page of RAM, in its large blocks: those need no look.
                for run in ram {
                    for page in first.max(run.start().as_u64())..end.min(run.end()) {
                        let at = (leaf.ipa >> PAGE_SHIFT).wrapping_add(page.wrapping_sub(first));
                        let (read, write, execute) = (leaf.read, leaf.write, leaf.execute);
                        if let Some(page) = pages.get_mut(&page) {
                            page.reach.push(Reach { by, at, read, write, execute });
                        }
                    }
                }
            }
        };
        reaches(By::Host, self.sim().leaves_stage2(self.host()));
        reaches(By::Hyp, self.sim().leaves_el2(self.el2()));
        let pools = self.pools();
        for VmPool { vm, .. } in &pools.vms {
            reaches(By::Guest(*vm), self.sim().leaves_stage2(self.guest(*vm)));
        }
        Snapshot { pages: pages.into_values().collect(), pools, census: self.census() }
    }

    fn look_at(&self, pfn: Pfn) -> Page {
        let entry = self.hyp.host.lock().table.entry(self.hyp.machine(), pfn.identity());
        let state = host_state(entry);
        let owner = match entry {
            Some(Entry::Page(_)) if state == HostState::SharedBorrowed => PageOwner::SharingGuest,
            Some(Entry::Page(_)) => PageOwner::Host,
            Some(Entry::Owned(Owner::Hyp)) => PageOwner::Hyp,
            Some(Entry::Owned(Owner::Guest { vm, gfn })) => PageOwner::Guest(vm, gfn.as_u64()),
            _ => PageOwner::Nobody,
        };
        let (pins, loans) = self.holds(pfn);
        let wiped = self.sim().is_zero_page(pfn.base().as_u64());
        Page { owner, state, reach: Vec::new(), pins, loans, wiped }
    }

    /// How often the hypervisor holds a page, and how many guest pages it is lent to.
    pub fn holds(&self, pfn: Pfn) -> (u32, u32) {
        self.holds_of(Pages::one(pfn)).pop().unwrap_or_default()
    }

    /// The same of each of these pages.
    pub fn holds_of(&self, pages: Pages<Pfn>) -> Vec<(u32, u32)> {
        let loans = |host: &Host, pfn: Pfn| match host.table.entry(self.hyp.machine(), pfn.identity()) {
            Some(Entry::Page(stage2::Page { sharing: Sharing::Lent(borrowers), .. })) => {
                borrowers.get().into()
            }
            _ => 0,
        };
        let host = self.hyp.host.lock();
        let loans: Vec<u32> = pages.iter().map(|pfn| loans(&host, pfn)).collect();
        drop(host);
        let hyp = self.hyp.hyp.lock();
        pages.iter().map(|pfn| hyp.pins.count(pfn)).zip(loans).collect()
    }

    /// A VM as it is; `None` if there is none.
    pub fn life_of(&self, vm: VmHandle) -> Option<VmLife> {
        let unshare = |vcpu: &Vcpu| match vcpu.pending {
            Pending::Unshare(gfns) => Some((gfns.start().as_u64(), gfns.count())),
            _ => None,
        };
        self.hyp.with_vm(vm, |vm| VmLife {
            live: vm.phase == Phase::Live,
            flags: vm.flags,
            pages: vm.space.pages,
            unshares: vm.idle_vcpus().filter(|_| vm.phase == Phase::Live).map(unshare).collect(),
        })
    }

    /// What the pools have.
    pub fn pools(&self) -> Pools {
        let (free, total) = {
            let host = self.hyp.host.lock();
            (host.pool.free(), host.pool.total())
        };
        let mut vms = Vec::new();
        self.hyp.vms.for_each(|vm| {
            let (free, pages) = (vm.space.cache.free(), vm.space.pages);
            vms.push(VmPool { vm: vm.handle(), free, given: vm.given, pages });
        });
        Pools { free, total, records: self.hyp.records.used(), vms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM_START, plain_setup};
    use abi::host::HostCall;

    #[test]
    fn a_snapshot_shows_who_owns_and_who_reaches_a_page() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 5, gfn: 0x80, pages: 2 });
        let _ = world.hyp.guest_share_host(vm, crate::addr::Pages::from_raw(0x81, 1).unwrap());
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 7, pages: 1 });
        world.hyp.pin(Pfn::new(RAM_START + 7).unwrap()).unwrap();
        let snapshot = world.snapshot();
        let whose = |page: usize| {
            snapshot.pages[page].reach.iter().map(|reach| (reach.by, reach.at)).collect::<Vec<_>>()
        };
        assert_eq!(snapshot.pages[5].owner, PageOwner::Guest(vm, 0x80));
        assert_eq!(whose(5), [(By::Guest(vm), 0x80)]);
        assert_eq!(whose(6), [(By::Host, RAM_START + 6), (By::Guest(vm), 0x81)]);
        assert_eq!(
            (snapshot.pages[6].owner, snapshot.pages[6].state),
            (PageOwner::SharingGuest, HostState::SharedBorrowed)
        );
        assert_eq!(whose(7), [(By::Host, RAM_START + 7), (By::Hyp, RAM_START + 7)]);
        assert_eq!((snapshot.pages[7].pins, snapshot.pages[8].pins), (1, 0));
        assert_eq!(whose(0x211), [(By::Hyp, RAM_START + 0x211)], "the image");
        assert_eq!(snapshot.pools.vms[0].pages, 2);
    }

    #[test]
    fn a_world_is_of_the_ram_and_the_cpus_that_are_asked_for() {
        let mut setup = plain_setup(0x40);
        let far = crate::addr::Pages::from_raw(0x8_0000, 3).unwrap();
        setup.ram.push(far);
        let world = World::of(&setup, 5);
        assert_eq!(world.sim().cpus(), 5);
        let snapshot = world.snapshot();
        let count: u64 = setup.ram.iter().map(|run| run.count()).sum();
        assert_eq!(snapshot.pages.len() as u64, count);
        let last = snapshot.pages.last().unwrap();
        let way = Reach { by: By::Host, at: 0x8_0002, read: true, write: true, execute: true };
        assert_eq!((last.owner, last.reach.as_slice()), (PageOwner::Host, [way].as_slice()));
        let vm = world.vm(crate::testing::PROTECTED, 0x1000, 16);
        let donate = HostCall::DonateGuest { vm, pfn: 0x8_0001, gfn: 0, pages: 2 };
        assert_eq!(world.call_on(4, donate).outcome, Ok(()));
        let owners = world.snapshot().pages.into_iter().rev().take(3).map(|page| page.owner);
        let [one, two] = [1, 0].map(|gfn| PageOwner::Guest(vm, gfn));
        assert!(owners.eq([one, two, PageOwner::Host]));
        world.check();
    }

    #[test]
    fn a_difference_is_told_by_its_page() {
        let world = World::new();
        let before = world.snapshot();
        assert_eq!(before.difference(&world.snapshot()), None);
        world.fill(9);
        let told = before.difference(&world.snapshot()).unwrap();
        assert!(told.starts_with("RAM page 9 was"), "{told}");
    }
}
