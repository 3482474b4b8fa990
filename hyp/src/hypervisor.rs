//! The hypervisor as a whole: its components behind their locks, built once at boot.
//!
//! Order of the locks: creation of VMs, `host`, `hyp`, a VM, records, CPUs. A method takes what it needs in that
//! order and nothing while a guest runs.

use crate::addr::{Gfn, Pages, Pfn, PhysAddr, Vpn};
use crate::boot::tree::{MAX_RAM, MAX_RESERVED, MAX_WITHHELD};
use crate::machine::{Machine, Stage2Id, Tree};
use crate::memory::{MemoryMap, TooManyRegions};
use crate::ownership::query::{AbortAnswer, AuditError, Census, host_state};
use crate::ownership::{Host, HypSpace, TOPUP_RESERVE};
use crate::pgtable::hyp_stage1::{HypStage1, Mapped, Rights, VA_BITS};
use crate::pgtable::stage2::{Entry, Owner, Page, Sharing, Side, Stage2};
use crate::pgtable::{Level, Regime, Table};
use crate::pool::PagePool;
use crate::pool::records::Records;
use crate::sync::{AtomicBool, AtomicU64, Lock, Mutex, Ordering};
use crate::vm::Vms;
use abi::exit::Access;
use abi::page::{HostState, Permissions};
use arrayvec::ArrayVec;
use core::fmt;

/// VMID of the host.
const HOST_VMID: u16 = 0;

/// Parts of EL2's own map at the most: six, and two stacks for each CPU.
pub const MAX_MAPPINGS: usize = 24;

/// A part of EL2's own map.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Where EL2 sees it.
    pub va: Vpn,
    /// The physical pages.
    pub pages: Pages<Pfn>,
    /// What EL2 may do.
    pub rights: Rights,
}

/// What boot found: the description of the machine that [`Hypervisor::new`] builds its tables from.
#[derive(Clone, Debug)]
pub struct Setup {
    /// All RAM, as the device tree has it.
    pub ram: ArrayVec<Pages<Pfn>, MAX_RAM>,
    /// Parts of RAM that are nobody's to give: firmware memory, no-map ranges. The host sees them as it sees
    /// devices.
    pub no_map: ArrayVec<Pages<Pfn>, MAX_RESERVED>,
    /// The hypervisor's image with all its memory.
    pub hyp: Pages<Pfn>,
    /// Devices that nobody may reach.
    pub withheld: ArrayVec<Pages<Pfn>, MAX_WITHHELD>,
    /// Width of the host's addresses, 32 to 40.
    pub ipa_bits: u32,
    /// FEAT_S2FWB is there and HCR_EL2.FWB will be set.
    pub force_write_back: bool,
    /// EL2's own map.
    pub hyp_map: ArrayVec<Mapping, MAX_MAPPINGS>,
    /// Pages for tables, within `hyp`.
    pub pool: Pages<Pfn>,
    /// Pages for records, within `hyp`.
    pub metadata: Pages<Pfn>,
}

/// Why the machine cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetupError {
    /// RAM lies in too many pieces.
    TooManyRegions,
    /// Something lies beyond the host's address space.
    BeyondHost(Pages<Pfn>),
    /// The static pool is too small.
    PoolTooSmall,
    /// The address width is none that Deed has tables for.
    AddressWidth(u32),
    /// The pages for records cannot be reached.
    NoRecordMemory,
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyRegions => f.write_str("RAM lies in too many pieces"),
            Self::BeyondHost(pages) => {
                let (start, end) = (pages.start().as_u64(), pages.end());
                write!(f, "pages {start:#x} to {end:#x} are beyond the host's addresses")
            }
            Self::PoolTooSmall => f.write_str("the static pool is too small"),
            Self::AddressWidth(bits) => write!(f, "there are no tables for {bits} bits of address"),
            Self::NoRecordMemory => f.write_str("the pages for records cannot be reached"),
        }
    }
}

impl From<TooManyRegions> for SetupError {
    fn from(_: TooManyRegions) -> Self {
        Self::TooManyRegions
    }
}

/// Numbers of events, for tests and for people.
#[derive(Debug, Default)]
pub struct Counters {
    /// Illegal accesses of the host that it was told of.
    pub aborts_injected: AtomicU64,
    /// Aborts of the host that only needed another try.
    pub aborts_retried: AtomicU64,
    /// Calls of the host, in test builds.
    pub host_calls: AtomicU64,
    /// Entries into guests, likewise.
    pub guest_entries: AtomicU64,
}

impl Counters {
    /// Counts an event that only `TEST_COUNTERS` tells of: on the way of every call, so nowhere else.
    #[inline]
    pub(crate) fn count(counter: &AtomicU64) {
        if cfg!(any(test, feature = "sim", feature = "test-calls")) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The hypervisor.
#[derive(Debug)]
pub struct Hypervisor<M> {
    pub(crate) machine: M,
    /// Memory that may change hands: RAM without what firmware claims and without the image.
    pub(crate) memory: MemoryMap,
    /// The same with the image: all memory that has an owner.
    pub(crate) ram: MemoryMap,
    pub(crate) vms: Vms,
    pub(crate) host: Mutex<Host>,
    pub(crate) hyp: Mutex<HypSpace>,
    pub(crate) records: Records,
    pub(crate) force_write_back: bool,
    /// The machine is going down: no guest is entered any more.
    pub(crate) closed: AtomicBool,
    host_id: Stage2Id,
    host_bits: u32,
    /// Event counters.
    pub counters: Counters,
}

impl<M: Machine> Hypervisor<M> {
    /// Builds the tables that say who owns what at boot: the hypervisor its image, the host everything else.
    ///
    /// Works with the MMU off or on: tables are at the addresses of their pages.
    ///
    /// # Errors
    /// The machine is none that Deed can hold; nothing but the pages of the pool was written.
    pub fn new(machine: M, setup: &Setup) -> Result<Self, SetupError> {
        if !(32..=40).contains(&setup.ipa_bits) {
            return Err(SetupError::AddressWidth(setup.ipa_bits));
        }
        let ram = memory_map(setup)?;
        let mut memory = ram.clone();
        memory.remove(setup.hyp)?;
        // A page at address 0 could not be told from no page: it stays the host's.
        if let Some(zero) = Pages::from_raw(0, 1) {
            memory.remove(zero)?;
        }
        let mut pool = PagePool::new();
        let mut table = host_root(&machine, setup, &mut pool)?;
        fill_host(&machine, setup, &mut table, &mut pool)?;
        let hyp_table = fill_hyp(&machine, setup, &mut pool)?;
        if pool.free() < TOPUP_RESERVE {
            return Err(SetupError::PoolTooSmall);
        }
        let host_id = Stage2Id { vmid: HOST_VMID, root: table.root() };
        machine.adopt(Tree::Stage2(host_id), setup.ipa_bits);
        machine.adopt(Tree::Hyp(hyp_table.root()), VA_BITS);
        let records = Records::new();
        let start = machine.record_memory(setup.metadata).ok_or(SetupError::NoRecordMemory)?;
        add_records(&records, start, setup.metadata);
        Ok(Self {
            machine,
            memory,
            ram,
            vms: Vms::new(),
            host_id,
            host_bits: setup.ipa_bits,
            host: Mutex::new(Lock::Host, Host { table, pool }),
            hyp: Mutex::new(Lock::Hyp, HypSpace { table: hyp_table, pins: Default::default() }),
            records,
            force_write_back: setup.force_write_back,
            closed: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    /// The machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// The host's translation.
    pub fn host_stage2(&self) -> Stage2Id {
        self.host_id
    }

    /// Width of the host's addresses.
    pub fn host_ipa_bits(&self) -> u32 {
        self.host_bits
    }

    /// Root of EL2's own tables.
    pub fn hyp_root(&self) -> Pfn {
        self.hyp.lock().table.root()
    }

    /// Decides a stage-2 abort of the host and counts it.
    pub fn host_abort(&self, gfn: Gfn, access: Access) -> AbortAnswer {
        let answer = self.host.lock().abort(&self.machine, gfn, access);
        let counter = match answer {
            AbortAnswer::Inject => &self.counters.aborts_injected,
            AbortAnswer::Retry => &self.counters.aborts_retried,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer
    }

    /// Whether the host may have a CPU begin at this address: it lies in memory that is the host's.
    ///
    /// It may give the page away before the CPU arrives there, whose first fetch then aborts as any would.
    pub fn host_may_begin_at(&self, address: u64) -> bool {
        let Some(page) = PhysAddr::new(address).map(Pfn::containing) else { return false };
        let state = host_state(self.host.lock().table.entry(&self.machine, page.identity()));
        let is_the_hosts = matches!(state, HostState::Owned | HostState::SharedOwned);
        self.memory.contains(page) && is_the_hosts
    }

    /// Counts an abort that is answered by injection without a look at the tables.
    pub fn count_injected(&self) -> AbortAnswer {
        self.counters.aborts_injected.fetch_add(1, Ordering::Relaxed);
        AbortAnswer::Inject
    }

    /// Counts all memory by owner.
    pub fn census(&self) -> Census {
        self.host.lock().census(&self.machine, &self.ram)
    }

    /// Proves that EL2 maps only what is its own, below the private part of its address space.
    pub fn audit(&self, private: Vpn) -> Result<u64, AuditError> {
        let host = self.host.lock();
        self.hyp.lock().audit(&self.machine, &host, &self.ram, private)
    }

    /// Bars every guest from now on, waits for those that run on other CPUs, and wipes what they own alone, pages and
    /// registers, and the stacks on which they ran, since the machine is going down. Returns the number of pages.
    ///
    /// A guest leaves its CPU at the next interrupt of the host's: a host that lets none come waits for ever.
    pub fn wipe_all_guests(&self) -> u64 {
        self.close();
        let mut wiped = 0u64;
        self.vms.for_each_idle(|vm| {
            wiped = wiped.saturating_add(crate::ownership::reclaim::wipe_private(&self.machine, &vm.space));
            vm.forget_registers(&self.machine);
        });
        self.machine.forget_guest_stacks();
        wiped
    }

    /// No guest is entered from now on; one that runs is not entered again.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// A regime of a guest's stage-2.
    pub(crate) fn guest_regime(&self, vmid: u16) -> Stage2 {
        Stage2::new(vmid, self.force_write_back, Side::Guest)
    }
}

/// Hands pages that the hypervisor owns to the heap of records.
#[expect(unsafe_code, reason = "the heap takes memory, not values")]
pub(crate) fn add_records(records: &Records, start: core::ptr::NonNull<u8>, pages: Pages<Pfn>) {
    let bytes = (pages.count() as usize).saturating_mul(crate::addr::PAGE_SIZE as usize);
    // SAFETY: `start` is where the machine shows these pages, which are the hypervisor's own, mapped, and used
    // by nobody: they are the static record pages, handed over once at boot, or come from a donation that
    // the caller has just committed.
    unsafe { records.add(start, bytes) };
}

/// All RAM but what firmware claims.
fn memory_map(setup: &Setup) -> Result<MemoryMap, SetupError> {
    let mut memory = MemoryMap::default();
    for pages in &setup.ram {
        memory.add(*pages)?;
    }
    for pages in &setup.no_map {
        memory.remove(*pages)?;
    }
    Ok(memory)
}

/// Takes the aligned root of the host's table out of the pool's pages; the rest becomes the pool.
fn host_root<M: Machine>(
    machine: &M,
    setup: &Setup,
    pool: &mut PagePool,
) -> Result<Table<Stage2>, SetupError> {
    let regime = Stage2::new(HOST_VMID, setup.force_write_back, Side::Host);
    let start = setup.pool.start();
    let pages = Table::new(start, Level::ONE, setup.ipa_bits, regime).root_pages();
    let skip = start.as_u64().next_multiple_of(pages).saturating_sub(start.as_u64());
    let rest = match skip {
        0 => Some(setup.pool),
        _ => {
            pool.extend(machine, setup.pool.truncated(skip));
            setup.pool.advanced(skip)
        }
    };
    let rest = rest.filter(|rest| rest.count() > pages).ok_or(SetupError::PoolTooSmall)?;
    if let Some(tables) = rest.advanced(pages) {
        pool.extend(machine, tables);
    }
    let table = Table::new(rest.start(), Level::ONE, setup.ipa_bits, regime);
    table.clear(machine);
    Ok(table)
}

/// Says of every page of the host's address space whose it is.
fn fill_host<M: Machine>(
    machine: &M,
    setup: &Setup,
    table: &mut Table<Stage2>,
    pool: &mut PagePool,
) -> Result<(), SetupError> {
    let all = setup.ram.iter().chain(&setup.no_map).chain(&setup.withheld).chain([&setup.hyp]);
    for pages in all {
        if pages.end() > table.input_end() {
            return Err(SetupError::BeyondHost(*pages));
        }
    }
    let mut next = 0;
    while next < table.input_end() {
        let (pages, entry) = host_part(setup, next, table.input_end());
        // Most of the space is whole entries of the root; only what is left at the edges needs the walker.
        table.fill_root(machine, pages, entry);
        let (start, end, whole) = (pages.start().as_u64(), pages.end(), Level::ONE.pages());
        let from = start.next_multiple_of(whole).min(end);
        let to = (end & !whole.saturating_sub(1)).max(from);
        for (edge, edge_end) in [(start, from), (to, end)] {
            if let Some(edge) = Pages::<Gfn>::from_raw(edge, edge_end.saturating_sub(edge)) {
                let first = edge.start().as_u64();
                let entry = table.regime().advance(entry, first.saturating_sub(start));
                put(machine, table, edge, entry, pool)?;
            }
        }
        next = end;
    }
    Ok(())
}

/// What the host's table says at boot from page `from` on, and how far it says the same.
fn host_part(setup: &Setup, from: u64, end: u64) -> (Pages<Gfn>, Entry) {
    let parts = || {
        let hyp = core::iter::once((&setup.hyp, Kind::Hyp));
        let withheld = setup.withheld.iter().map(|pages| (pages, Kind::Withheld));
        let no_map = setup.no_map.iter().map(|pages| (pages, Kind::Device));
        let ram = setup.ram.iter().map(|pages| (pages, Kind::Ram));
        hyp.chain(withheld).chain(no_map).chain(ram)
    };
    // The first that covers the page decides; the next boundary of any part ends what is said.
    let covers = |pages: &Pages<Pfn>| (pages.start().as_u64()..pages.end()).contains(&from);
    let kind = parts().find(|(pages, _)| covers(pages)).map_or(Kind::Device, |(_, kind)| kind);
    let boundary = parts()
        .flat_map(|(pages, _)| [pages.start().as_u64(), pages.end()])
        .filter(|boundary| *boundary > from)
        .min()
        .unwrap_or(end)
        .min(end);
    let Some(pages) = Pages::<Gfn>::from_raw(from, boundary.saturating_sub(from)) else {
        crate::broken("a part of the host's space is empty");
    };
    let execute = matches!(kind, Kind::Ram);
    let entry = match kind {
        Kind::Hyp => Entry::Owned(Owner::Hyp),
        Kind::Withheld => Entry::Withheld,
        Kind::Ram | Kind::Device => match Pfn::new(from) {
            Some(pfn) => {
                let permissions = Permissions { write: true, execute };
                Entry::Page(Page { pfn, sharing: Sharing::Owned, permissions })
            }
            None => Entry::Locked,
        },
    };
    (pages, entry)
}

/// What a part of the host's address space is at boot.
#[derive(Clone, Copy)]
enum Kind {
    Hyp,
    Withheld,
    Ram,
    Device,
}

/// EL2's own tables.
fn fill_hyp<M: Machine>(
    machine: &M,
    setup: &Setup,
    pool: &mut PagePool,
) -> Result<Table<HypStage1>, SetupError> {
    let root = pool.pop(machine).ok_or(SetupError::PoolTooSmall)?;
    let mut table = Table::new(root, Level::ZERO, VA_BITS, HypStage1);
    table.clear(machine);
    for mapping in &setup.hyp_map {
        let first = Some(Mapped { pfn: mapping.pages.start(), rights: mapping.rights });
        let Some(pages) = Pages::new(mapping.va, mapping.pages.count()) else {
            return Err(SetupError::BeyondHost(mapping.pages));
        };
        put(machine, &mut table, pages, first, pool)?;
    }
    Ok(table)
}

/// Says `first` of the first page and what follows from it of the others, in the largest blocks that fit.
fn put<M: Machine, R: Regime>(
    machine: &M,
    table: &mut Table<R>,
    pages: Pages<R::Input>,
    first: R::Entry,
    pool: &mut PagePool,
) -> Result<(), SetupError> {
    let mut done = 0;
    for region in Table::<R>::regions(pages) {
        if table.tables_needed(machine, region) > pool.free() {
            return Err(SetupError::PoolTooSmall);
        }
        let from = table.regime().advance(first, done);
        table.set(machine, region, pool, from);
        done = done.saturating_add(region.count());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestMachine, setup};
    use abi::Error;
    use abi::host::HostCall;

    #[test]
    fn a_page_at_address_0_is_the_hosts_and_never_changes_hands() {
        let machine = TestMachine::new();
        let mut setup = setup(0x40);
        setup.ram.push(Pages::from_raw(0, 0x100).unwrap());
        let world = crate::testing::World::on(machine, &setup).unwrap();
        assert_eq!(world.call(HostCall::QueryPage { pfn: 0 }).host_state(), Some(abi::HostState::Owned));
        let outcome = |call| world.call(call).outcome;
        assert_eq!(outcome(HostCall::ShareHyp { pfn: 0, pages: 1 }), Err(Error::Permission));
        let vm = world.protected_vm();
        assert_eq!(outcome(HostCall::DonateGuest { vm, pfn: 0, gfn: 0, pages: 1 }), Err(Error::Permission));
        assert_eq!(outcome(HostCall::ShareHyp { pfn: 0, pages: 2 }), Err(Error::Permission));
        assert_eq!(outcome(HostCall::ShareHyp { pfn: 1, pages: 1 }), Ok(()), "its neighbour is memory");
        assert!(
            world.hyp.hyp.lock().table.entry(world.hyp.machine(), Vpn::new(0).unwrap()).flatten().is_none()
        );
    }

    #[test]
    fn a_cpu_may_begin_in_memory_of_the_hosts_alone() {
        use crate::testing::{HYP_START, RAM_START, World};

        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 1, gfn: 0, pages: 1 });
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 2, pages: 1 });
        let begins = |page: u64| world.hyp.host_may_begin_at(page << 12 | 0x80);
        assert!(begins(RAM_START));
        assert!(!begins(RAM_START + 1), "a guest's");
        assert!(begins(RAM_START + 2), "lent");
        assert!(!begins(HYP_START));
        assert!(!begins(0x9000), "a device");
        assert!(!begins(0x9020), "withheld");
        assert!(!world.hyp.host_may_begin_at(u64::MAX));
    }

    #[test]
    fn machines_that_cannot_be_held_are_refused_and_each_refusal_says_why() {
        let refused = |change: &dyn Fn(&mut Setup)| {
            let machine = TestMachine::new();
            let mut setup = setup(0x40);
            change(&mut setup);
            Hypervisor::new(machine, &setup).err()
        };
        let pages = |first, count| Pages::<Pfn>::from_raw(first, count).unwrap();
        assert_eq!(refused(&|_| ()), None);
        for bits in [31, 41] {
            assert_eq!(refused(&|setup| setup.ipa_bits = bits), Some(SetupError::AddressWidth(bits)));
        }
        let far = pages(0xf_ffff, 2);
        let beyond = |setup: &mut Setup| {
            setup.ipa_bits = 32;
            setup.ram.push(far);
        };
        assert_eq!(refused(&beyond), Some(SetupError::BeyondHost(far)));
        let unmapped = |setup: &mut Setup| {
            let last = Vpn::new((1 << (VA_BITS - 12)) - 1).unwrap();
            setup.hyp_map[0].va = last;
        };
        let text = setup(0x40).hyp_map[0].pages;
        assert_eq!(refused(&unmapped), Some(SetupError::BeyondHost(text)));
        // Each of these leaves a piece of RAM before it, and the last and the image one behind them.
        let pieces = |setup: &mut Setup| {
            while setup.ram.len() < setup.ram.capacity() {
                setup.ram.push(pages(0x1_0000 + 2 * setup.ram.len() as u64, 1));
            }
            while setup.no_map.len() < setup.no_map.capacity() {
                let page = crate::testing::RAM_START + 0x1000 + 2 * setup.no_map.len() as u64;
                setup.no_map.push(pages(page, 1));
            }
        };
        assert_eq!(refused(&pieces), Some(SetupError::TooManyRegions));
        for count in 1..=2 {
            let small = |setup: &mut Setup| setup.pool = pages(setup.pool.start().as_u64(), count);
            assert_eq!(refused(&small), Some(SetupError::PoolTooSmall));
        }
        let errors = [
            SetupError::TooManyRegions,
            SetupError::BeyondHost(far),
            SetupError::PoolTooSmall,
            SetupError::AddressWidth(31),
            SetupError::NoRecordMemory,
        ];
        let texts: std::collections::BTreeSet<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), errors.len(), "{texts:?}");
        assert!(texts.contains("pages 0xfffff to 0x100001 are beyond the host's addresses"), "{texts:?}");
    }

    #[test]
    fn aborts_and_calls_are_counted_for_what_they_were() {
        let world = crate::testing::World::new();
        let page = |pfn| crate::addr::Gfn::new(pfn).unwrap();
        let counters = || {
            let Counters { aborts_injected, aborts_retried, host_calls, .. } = &world.hyp.counters;
            [aborts_injected, aborts_retried, host_calls].map(|counter| counter.load(Ordering::Relaxed))
        };
        assert_eq!(world.hyp.host_abort(page(crate::testing::RAM_START), Access::Write), AbortAnswer::Retry);
        assert_eq!(counters(), [0, 1, 0]);
        assert_eq!(world.hyp.host_abort(page(crate::testing::HYP_START), Access::Read), AbortAnswer::Inject);
        assert_eq!(world.hyp.count_injected(), AbortAnswer::Inject);
        world.ok(HostCall::Version);
        assert_eq!(counters(), [2, 1, 1]);
    }
}
