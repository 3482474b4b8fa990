//! Reading the tables: what the host may access, who owns a page, a census, and the audit at boot.

use super::guest::GuestSpace;
use super::{Host, HypSpace, Owner};
use crate::addr::{Frame, Gfn, Pages, Vpn};
use crate::machine::Machine;
use crate::memory::MemoryMap;
use crate::pgtable::hyp_stage1::{Mapped, Rights};
use crate::pgtable::stage2::{Entry, Sharing};
use abi::HostState;
use abi::exit::Access;
use core::fmt;

/// What a guest's table says of a page, as far as an abort of the guest cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPage {
    /// Nothing: the host may give memory.
    Missing,
    /// Memory, with the access that the guest wanted or not.
    Present,
    /// Taken by force.
    Poisoned,
    /// Enrolled as a device.
    Device,
}

/// What becomes of a stage-2 abort of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortAnswer {
    /// The access is allowed by now: try it again.
    Retry,
    /// It is not allowed: tell the host so.
    Inject,
}

/// Pages of memory by owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// The host owns them alone.
    pub host: u64,
    /// The host owns them and lends them.
    pub host_shared: u64,
    /// The hypervisor owns them.
    pub hyp: u64,
    /// Guests own them alone.
    pub guest: u64,
    /// Guests own them and share them with the host.
    pub guest_shared: u64,
}

impl Census {
    /// All pages that were counted.
    pub fn total(&self) -> u64 {
        [self.host, self.host_shared, self.hyp, self.guest, self.guest_shared].iter().sum()
    }
}

/// What breaks the rule that EL2 maps only what is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditError {
    /// EL2 maps memory that the hypervisor does not own.
    NotOwned(Vpn, Mapped),
    /// EL2 maps as a device what is memory.
    DeviceInMemory(Vpn, Mapped),
    /// EL2 can reach nothing: the tables cannot be right.
    Empty,
}

impl fmt::Display for AuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (va, mapped, what) = match self {
            Self::NotOwned(va, mapped) => (va, mapped, "which is not its own"),
            Self::DeviceInMemory(va, mapped) => (va, mapped, "memory, as a device"),
            Self::Empty => return f.write_str("its tables are empty"),
        };
        write!(f, "page {:#x} shows frame {:#x}, {what}", va.as_u64(), mapped.pfn.as_u64())
    }
}

/// What the host may do with a page, memory or not.
pub fn host_state(entry: Option<Entry>) -> HostState {
    match entry {
        Some(Entry::Page(page)) => match page.sharing {
            Sharing::Owned => HostState::Owned,
            Sharing::Shared | Sharing::Lent(_) | Sharing::SharedWithHyp => HostState::SharedOwned,
            Sharing::Borrowed => HostState::SharedBorrowed,
        },
        _ => HostState::NoPage,
    }
}

impl Host {
    /// Decides a stage-2 abort of the host, under the lock: an entry that another CPU was replacing is whole
    /// again by now.
    pub fn abort<M: Machine>(&self, machine: &M, gfn: Gfn, access: Access) -> AbortAnswer {
        let allowed = match self.table.entry(machine, gfn) {
            Some(Entry::Page(page)) => match access {
                Access::Read => true,
                Access::Write => page.permissions.write,
                Access::Execute => page.permissions.execute,
            },
            _ => false,
        };
        if allowed { AbortAnswer::Retry } else { AbortAnswer::Inject }
    }

    /// Counts all memory by owner, from the host's table, entry by entry: blocks count at once.
    pub fn census<M: Machine>(&self, machine: &M, memory: &MemoryMap) -> Census {
        let mut census = Census::default();
        for region in memory.regions() {
            for run in self.table.runs(machine, region.identity()) {
                let counter = match run.entry() {
                    Entry::Page(page) => match page.sharing {
                        Sharing::Owned => Some(&mut census.host),
                        Sharing::Shared | Sharing::Lent(_) | Sharing::SharedWithHyp => {
                            Some(&mut census.host_shared)
                        }
                        Sharing::Borrowed => Some(&mut census.guest_shared),
                    },
                    Entry::Owned(Owner::Hyp) => Some(&mut census.hyp),
                    Entry::Owned(Owner::Guest { .. }) => Some(&mut census.guest),
                    _ => None,
                };
                if let Some(counter) = counter {
                    *counter = counter.saturating_add(run.pages().count());
                }
            }
        }
        census
    }
}

impl GuestSpace {
    /// What the guest's table says of a page; nothing beyond the address space.
    pub fn page<M: Machine>(&self, machine: &M, gfn: Gfn) -> GuestPage {
        match self.table.entry(machine, gfn) {
            Some(Entry::Page(_) | Entry::Locked) => GuestPage::Present,
            Some(Entry::Poisoned) => GuestPage::Poisoned,
            Some(Entry::Device) => GuestPage::Device,
            _ => GuestPage::Missing,
        }
    }

    /// Whether the guest shares all these pages with the host.
    pub fn all_shared<M: Machine>(&self, machine: &M, gfns: Pages<Gfn>) -> bool {
        self.pieces(machine, gfns).all(|piece| piece.is_ok_and(|piece| piece.sharing == Sharing::Shared))
    }
}

impl HypSpace {
    /// Walks all that EL2 can reach and proves that it is the hypervisor's own memory, or a device; that the
    /// host cannot reach that memory; and that nothing is writable and executable (which [`Rights`] cannot
    /// even say). Pages from `private` on are exempt: fixmap slots, whose tables `arch/` keeps. Returns the
    /// number of pages.
    pub fn audit<M: Machine>(
        &self,
        machine: &M,
        host: &Host,
        memory: &MemoryMap,
        private: Vpn,
    ) -> Result<u64, AuditError> {
        let mut pages = 0u64;
        let everything = Vpn::new(0).and_then(|first| Pages::new(first, private.as_u64()));
        let Some(everything) = everything else { return Err(AuditError::Empty) };
        for run in self.table.runs(machine, everything) {
            let Some(first) = run.entry() else { continue };
            pages = pages.saturating_add(run.pages().count());
            for (offset, page) in (0..).zip(run.pages().iter()) {
                let Some(pfn) = first.pfn.checked_add(offset) else { continue };
                let mapped = Mapped { pfn, ..first };
                let owner = host.table.entry(machine, pfn.identity());
                match (mapped.rights == Rights::Device, memory.contains(pfn)) {
                    (true, true) => return Err(AuditError::DeviceInMemory(page, mapped)),
                    (true, false) => {}
                    (false, _) if owner == Some(Entry::Owned(Owner::Hyp)) => {}
                    (false, _) => return Err(AuditError::NotOwned(page, mapped)),
                }
            }
        }
        if pages == 0 { Err(AuditError::Empty) } else { Ok(pages) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;
    use crate::hypervisor::Mapping;
    use crate::testing::{HYP_START, PRIVATE, RAM_PAGES, RAM_START, TestMachine, World};
    use abi::VmFlags;
    use abi::host::HostCall;
    use abi::page::{Permissions, Pool};

    #[test]
    fn at_boot_the_host_reaches_everything_but_the_hypervisor_and_what_is_withheld() {
        let world = World::new();
        let leaves = world.sim().leaves_stage2(world.host());
        let reaches =
            |page: u64| leaves.iter().any(|leaf| (leaf.ipa..leaf.ipa + leaf.size).contains(&(page << 12)));
        for page in (0..RAM_PAGES).map(|page| RAM_START + page) {
            let own = (HYP_START..HYP_START + crate::testing::HYP_PAGES).contains(&page);
            assert_eq!(reaches(page), !own, "{page:#x}");
        }
        assert!(!reaches(0x9020) && reaches(0x9021) && reaches((1 << 28) - 1));
        for leaf in &leaves {
            assert_eq!(leaf.ipa, leaf.pa, "an identity map");
            let ram = leaf.ipa >> 12 >= RAM_START && leaf.ipa >> 12 < RAM_START + RAM_PAGES;
            let no_map = (0x800..0x802).contains(&((leaf.ipa >> 12).wrapping_sub(RAM_START)));
            assert_eq!(leaf.execute, ram && !no_map, "{leaf:?}");
        }
        assert_eq!(world.hyp.audit(Vpn::new(PRIVATE).unwrap()), Ok(crate::testing::HYP_PAGES + 1));
    }

    #[test]
    fn the_census_counts_every_page_of_memory_once() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 3 });
        assert_eq!(world.hyp.guest_share_host(vm, Pages::from_raw(1, 1).unwrap()), Ok(1));
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 9, pages: 2 });
        let census = world.census();
        assert_eq!(census.total(), RAM_PAGES - 2, "all RAM but the no-map pages");
        assert_eq!((census.guest, census.guest_shared, census.host_shared), (2, 1, 2));
        assert_eq!(census.hyp, crate::testing::HYP_PAGES + 18);
    }

    #[test]
    fn an_abort_is_injected_only_if_the_access_is_still_not_allowed() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 });
        let abort = |page, access| world.hyp.host_abort(Gfn::new(page).unwrap(), access);
        assert_eq!(abort(RAM_START, Access::Read), AbortAnswer::Inject);
        assert_eq!(abort(HYP_START, Access::Write), AbortAnswer::Inject);
        assert_eq!(abort(RAM_START + 1, Access::Execute), AbortAnswer::Retry);
        assert_eq!(abort(0x9000, Access::Write), AbortAnswer::Retry);
        assert_eq!(abort(0x9000, Access::Execute), AbortAnswer::Inject);
        assert_eq!(abort(0x9020, Access::Read), AbortAnswer::Inject);
        assert_eq!(abort((1 << 36) - 1, Access::Read), AbortAnswer::Inject);
    }

    /// What the audit says of a world whose EL2 also maps these pages at these addresses.
    fn audit_with(va: u64, pages: Pages<Pfn>, rights: Rights) -> Result<u64, AuditError> {
        let machine = TestMachine::new();
        let mut setup = crate::testing::setup(0x40);
        setup.hyp_map.push(Mapping { va: Vpn::new(va).unwrap(), pages, rights });
        crate::Hypervisor::new(machine, &setup).unwrap().audit(Vpn::new(PRIVATE).unwrap())
    }

    #[test]
    fn the_audit_finds_every_page_that_el2_maps_and_does_not_own() {
        let pages = |first| Pages::<Pfn>::from_raw(first, 1).unwrap();
        let found = |va: u64, pfn: u64, rights| {
            Err(AuditError::NotOwned(Vpn::new(va).unwrap(), Mapped { pfn: Pfn::new(pfn).unwrap(), rights }))
        };
        for rights in [Rights::ReadOnly, Rights::ReadWrite, Rights::ReadExecute] {
            for pfn in [RAM_START, HYP_START - 1, HYP_START + crate::testing::HYP_PAGES, RAM_START + 0x800] {
                assert_eq!(audit_with(pfn, pages(pfn), rights), found(pfn, pfn, rights), "{pfn:#x}");
            }
        }
        let device = audit_with(RAM_START, pages(RAM_START), Rights::Device);
        assert!(matches!(device, Err(AuditError::DeviceInMemory(..))), "{device:?}");
    }

    #[test]
    fn the_audit_goes_by_the_physical_page_wherever_el2_sees_it() {
        let elsewhere = 0x200_0000;
        let page = |first| Pages::<Pfn>::from_raw(first, 1).unwrap();
        // A second view of a page of the image is EL2's own; a view of the host's page at an address like the image's
        // is not.
        let own = audit_with(elsewhere, page(HYP_START), Rights::ReadOnly);
        assert_eq!(own, Ok(crate::testing::HYP_PAGES + 2));
        let foreign = audit_with(HYP_START + crate::testing::HYP_PAGES, page(RAM_START), Rights::ReadOnly);
        assert!(matches!(foreign, Err(AuditError::NotOwned(..))), "{foreign:?}");
    }

    #[test]
    fn a_page_of_the_hypervisors_is_refused_by_every_call_and_stays_as_it_is() {
        let world = World::new();
        let vm = world.protected_vm();
        let open = world.vm(VmFlags::default(), 0x1100, 8);
        world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn: RAM_START + 0x1200, pages: 2 });
        world.ok(HostCall::PoolTopUp { pool: Pool::Metadata, pfn: RAM_START + 0x1210, pages: 2 });
        let before = (world.snapshot(), world.hyp.records.used());
        let (text, data) = (HYP_START, HYP_START + 0x20);
        let roots = [0x1000, 0x1100].map(|root| RAM_START + root);
        let given = [0x1004, 0x1200, 0x1210].map(|page| RAM_START + page);
        for pfn in [text, data].into_iter().chain(roots).chain(given) {
            let (pages, permissions) = (1, Permissions::ALL);
            let calls = [
                HostCall::PoolTopUp { pool: Pool::Tables, pfn, pages },
                HostCall::PoolTopUp { pool: Pool::Metadata, pfn, pages },
                HostCall::VmTopUp { vm, pfn, pages },
                HostCall::ShareHyp { pfn, pages },
                HostCall::UnshareHyp { pfn, pages },
                HostCall::DonateGuest { vm, pfn, gfn: 0, pages },
                HostCall::ShareGuest { vm: open, pfn, gfn: 0, pages, permissions },
                HostCall::ForceReclaim { pfn, pages },
                HostCall::VmCreate { flags: VmFlags::default(), root: pfn },
            ];
            for call in calls {
                assert_eq!(world.call(call).outcome, Err(abi::Error::Permission), "{call:x?}");
            }
            let query = world.call(HostCall::QueryPage { pfn });
            assert_eq!(query.host_state(), Some(HostState::NoPage));
        }
        assert_eq!((world.snapshot(), world.hyp.records.used()), before);
        world.check();
    }

    #[test]
    fn an_audit_of_nothing_finds_that_the_tables_are_empty() {
        let world = World::new();
        // Below the image EL2 maps nothing but the device.
        for end in [0, 0x9000] {
            assert_eq!(world.hyp.audit(Vpn::new(end).unwrap()), Err(AuditError::Empty));
        }
        assert_eq!(world.hyp.audit(Vpn::new(0x9001).unwrap()), Ok(1));
    }

    #[test]
    fn a_finding_of_the_audit_names_page_and_frame() {
        let at = Vpn::new(0x123).unwrap();
        let mapped = Mapped { pfn: Pfn::new(0x456).unwrap(), rights: Rights::ReadOnly };
        let text = AuditError::NotOwned(at, mapped).to_string();
        assert_eq!(text, "page 0x123 shows frame 0x456, which is not its own");
        let text = AuditError::DeviceInMemory(at, mapped).to_string();
        assert_eq!(text, "page 0x123 shows frame 0x456, memory, as a device");
        assert_eq!(AuditError::Empty.to_string(), "its tables are empty");
    }
}
