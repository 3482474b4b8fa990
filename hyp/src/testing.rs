//! The core on a simulated machine, for tests on the build machine.
//!
//! [`TestMachine`] implements [`Machine`](crate::machine::Machine) over `sim::Sim`, whose TLB keeps every translation until the right
//! invalidation and whose checker sees every descriptor write. [`World`] is a hypervisor on it, with a
//! snapshot of who owns and who reaches every page. It is a facade: any suite can build a world, make every call on
//! it as the host on one of its CPUs, as a guest's vCPU or as the hypervisor, look at all of it, and make it fail.
//!
//! | file | what it offers |
//! |---|---|
//! | `failure` | allocations that fail on request |
//! | `machine` | the machine |
//! | [`snapshot`] | owner, state and reach of every page, and all pools |

pub(crate) mod failure;
mod machine;
pub mod snapshot;

use machine::lock;
pub use machine::{CPUS, Step, TestMachine, become_cpu, this_cpu};

use crate::addr::{Pages, Pfn};
use crate::hypervisor::{Hypervisor, MAX_MAPPINGS, Mapping, Setup, SetupError};
use crate::ownership::query::Census;
use crate::pgtable::hyp_stage1::{Rights, VA_BITS};
use crate::vm::context::Trap;
use abi::host::{HostCall, HostResult};
use abi::{HostState, VmFlags, VmHandle};
use arrayvec::ArrayVec;
use std::sync::Mutex;

/// First page of simulated RAM.
pub const RAM_START: u64 = 0x4_0000;
/// Pages of simulated RAM: 64 MiB and one page, so that the end is no block.
pub const RAM_PAGES: u64 = 0x4001;
/// First page of the simulated hypervisor image, in the middle of a block.
pub const HYP_START: u64 = RAM_START + 0x210;
/// Pages of the image.
pub const HYP_PAGES: u64 = 0x60;
/// Width of the host's addresses.
pub const IPA_BITS: u32 = 40;
/// EL2's private addresses begin here.
pub const PRIVATE: u64 = 1 << 35;

/// A protected VM that takes shared pages back at once.
pub const PROTECTED: VmFlags = VmFlags { protected: true, unshare_immediate: true, mmio_unguarded: false };

/// A hypervisor on a simulated machine.
#[derive(Debug)]
pub struct World {
    /// The hypervisor.
    pub hyp: Hypervisor<TestMachine>,
    /// Width of the host's addresses.
    ipa_bits: u32,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// Each in a line of its own.
pub fn lines(all: &[impl std::fmt::Display]) -> String {
    all.iter().map(|one| format!("\n    {one}")).collect()
}

/// A guest's translation, by the identity that the core gives it.
fn guest_stage2(id: crate::machine::Stage2Id) -> sim::Stage2 {
    let ipa_bits = crate::pgtable::stage2::GUEST_IPA_BITS;
    sim::Stage2 { vmid: id.vmid, root: id.root.base().as_u64(), ipa_bits }
}

fn ram(first: u64, count: u64) -> Pages<Pfn> {
    match Pages::from_raw(RAM_START.saturating_add(first), count) {
        Some(pages) => pages,
        None => panic!("no such run"),
    }
}

/// The set-up of most worlds, with a static pool of `pool` pages: RAM that ends amid a block, the image amid another, a
/// hole, a device of EL2's and a page that is withheld.
pub fn setup(pool: u64) -> Setup {
    let mut setup = plain_setup(pool);
    setup.ram = [ram(0, RAM_PAGES)].into_iter().collect();
    setup.no_map.push(ram(0x800, 2));
    setup.withheld.extend(Pages::from_raw(0x9020, 1));
    setup.ipa_bits = IPA_BITS;
    if let Some(pages) = Pages::<Pfn>::from_raw(0x9000, 1) {
        setup.hyp_map.push(Mapping { va: pages.start().identity_va(), pages, rights: Rights::Device });
    }
    setup
}

/// The set-up of a world that is made in half the time, for tests that make thousands: the same RAM but for the page at its
/// end, the same image, nothing else, and 32 bits of address.
pub fn plain_setup(pool: u64) -> Setup {
    let start = HYP_START.saturating_sub(RAM_START);
    let text = ram(start, 8);
    let data = ram(start.saturating_add(8), HYP_PAGES.saturating_sub(8));
    let map = [(text, Rights::ReadExecute), (data, Rights::ReadWrite)];
    let hyp_map: ArrayVec<Mapping, MAX_MAPPINGS> = map
        .into_iter()
        .map(|(pages, rights)| Mapping { va: pages.start().identity_va(), pages, rights })
        .collect();
    Setup {
        ram: [ram(0, RAM_PAGES.saturating_sub(1))].into_iter().collect(),
        no_map: Default::default(),
        hyp: ram(start, HYP_PAGES),
        withheld: Default::default(),
        ipa_bits: 32,
        force_write_back: false,
        hyp_map,
        pool: ram(start.saturating_add(0x10), pool),
        metadata: ram(start.saturating_add(0x50), 0x10),
    }
}

impl World {
    /// A world with 64 static table pages.
    ///
    /// # Panics
    /// If it cannot be built, which is a bug.
    pub fn new() -> Self {
        Self::with_pool(0x40)
    }

    /// A world with this many static table pages.
    ///
    /// # Panics
    /// If it cannot be built.
    pub fn with_pool(pool: u64) -> Self {
        let world = Self::cold(pool);
        world.load_all();
        world
    }

    /// The same with nothing in any TLB.
    ///
    /// # Panics
    /// If it cannot be built.
    pub fn cold(pool: u64) -> Self {
        Self::of(&setup(pool), CPUS)
    }

    /// A world with this RAM, set up so, on this many CPUs; nothing is in any TLB.
    ///
    /// # Panics
    /// If it cannot be built.
    pub fn of(setup: &Setup, cpus: usize) -> Self {
        match Self::on(TestMachine::with(&setup.ram, cpus), setup) {
            Ok(world) => world,
            Err(error) => panic!("no world: {error:?}"),
        }
    }

    /// The same on a machine that is there.
    ///
    /// # Errors
    /// If the hypervisor refuses the set-up.
    pub fn on(machine: TestMachine, setup: &Setup) -> Result<Self, SetupError> {
        let hyp = Hypervisor::new(machine, setup)?;
        Ok(Self { hyp, ipa_bits: setup.ipa_bits })
    }

    /// The fewest static table pages with which a world set up so can be built.
    ///
    /// # Panics
    /// If there are none.
    pub fn least_pool(setup: fn(u64) -> Setup) -> u64 {
        let is_enough = |pool: &u64| {
            let setup = setup(*pool);
            Self::on(TestMachine::with(&setup.ram, CPUS), &setup).is_ok()
        };
        match (1..HYP_PAGES).find(is_enough) {
            Some(pool) => pool,
            None => panic!("no pool is large enough"),
        }
    }

    /// The simulated hardware.
    pub fn sim(&self) -> &sim::Sim {
        self.hyp.machine().sim()
    }

    /// Takes every table page out of the host's pool that a call could take. They are lost.
    #[cfg(test)]
    pub fn drain_tables(&self) {
        let mut host = self.hyp.host.lock();
        while host.pool.free() > crate::ownership::TOPUP_RESERVE {
            let _ = host.pool.pop(self.hyp.machine());
        }
    }

    /// Makes a call as the host on this thread's CPU, through its registers.
    ///
    /// # Panics
    /// If the call is not served.
    pub fn call(&self, call: HostCall) -> HostResult {
        let reply = self.hyp.host_call(this_cpu(), &call.encode());
        reply.result().unwrap_or_else(|| panic!("not served: {call:?}"))
    }

    /// Makes a call as the host on a CPU of the machine.
    ///
    /// # Panics
    /// If there is no such CPU, or the call is not served.
    pub fn call_on(&self, cpu: usize, call: HostCall) -> HostResult {
        let before = this_cpu();
        become_cpu(cpu);
        let result = self.call(call);
        become_cpu(before);
        result
    }

    /// Makes a call as a vCPU, by HVC, through the run loop: runs it with these in x0 to x3. Returns what the host
    /// sees, and, if the guest goes on without the host, what it finds in x0 to x3 then.
    pub fn guest_call(&self, vm: VmHandle, vcpu: u64, call: [u64; 4]) -> (HostResult, Option<[u64; 4]>) {
        /// ESR_EL2 of an HVC with immediate 0.
        const HVC: u64 = 0x16 << 26 | 1 << 25;
        let answer = std::sync::Arc::new(Mutex::new(None));
        let seen = std::sync::Arc::clone(&answer);
        self.hyp.machine().push_step(move |context| {
            call.into_iter().zip(0..).for_each(|(value, x)| context.set_x(x, value));
            Trap::Sync { esr: HVC, far: 0, hpfar: 0 }
        });
        self.hyp.machine().push_step(move |context| {
            *lock(&seen) = Some([0, 1, 2, 3].map(|x| context.x(x)));
            Trap::Irq
        });
        let result = self.call(HostCall::VcpuRun { vm, vcpu, values: [0; 4] });
        self.hyp.machine().drop_steps();
        let answer = *lock(&answer);
        (result, answer)
    }

    /// Makes the `k`-th allocation from now on this thread's CPU fail, 1 being the next: table pages of the host's
    /// pool or a VM's, or a record. Later ones succeed.
    pub fn fail_allocation(&self, k: u64) {
        failure::fail(k);
    }

    /// Lets all allocations succeed again. Returns the pool whose allocation failed, if one did.
    pub fn stop_failing(&self) -> Option<abi::page::Pool> {
        failure::stop()
    }

    /// Changes a word of a page of RAM just before the `n`-th load of it from now on, 1 being the next: what a host
    /// may do to memory that it shares, between two loads.
    pub fn change_at_load(&self, page: u64, word: u64, n: usize, value: u64) {
        let pa = RAM_START.saturating_add(page) << crate::addr::PAGE_SHIFT;
        self.sim().on_nth_load(pa.saturating_add(word.saturating_mul(8)), n, value);
    }

    /// Makes a call that must succeed and returns its first value.
    ///
    /// # Panics
    /// If it is refused.
    pub fn ok(&self, call: HostCall) -> u64 {
        let result = self.call(call);
        assert_eq!(result.outcome, Ok(()), "{call:?}");
        result.values.first().copied().unwrap_or(0)
    }

    /// Lets every CPU's TLB hold every translation of the host, of the guests and of EL2 that there is, as hardware may.
    pub fn load_all(&self) {
        self.load(self.host());
        self.hyp.vms.for_each(|vm| self.load(guest_stage2(vm.id())));
        self.load_el2();
    }

    /// Lets every CPU's TLB hold every translation of one stage 2.
    pub fn load(&self, stage2: sim::Stage2) {
        for cpu in 0..self.sim().cpus() {
            self.sim().speculate(cpu, stage2);
        }
    }

    /// Lets every CPU's TLB hold every translation of EL2.
    pub fn load_el2(&self) {
        for cpu in 0..self.sim().cpus() {
            self.sim().speculate_el2(cpu, self.el2());
        }
    }

    /// EL2's own translation, for the simulated hardware.
    pub fn el2(&self) -> sim::El2Stage1 {
        sim::El2Stage1 { root: self.hyp.hyp_root().base().as_u64(), va_bits: VA_BITS }
    }

    /// The host's translation, for the simulated hardware.
    pub fn host(&self) -> sim::Stage2 {
        let id = self.hyp.host_stage2();
        sim::Stage2 { vmid: id.vmid, root: id.root.base().as_u64(), ipa_bits: self.ipa_bits }
    }

    /// A guest's translation, for the simulated hardware.
    ///
    /// # Panics
    /// If there is no such VM.
    pub fn guest(&self, vm: abi::VmHandle) -> sim::Stage2 {
        match self.hyp.with_vm(vm, |vm| vm.id()) {
            Some(id) => guest_stage2(id),
            None => panic!("no such VM"),
        }
    }

    /// Makes a VM, its root at RAM page `root`, with table pages behind the root.
    ///
    /// # Panics
    /// If that fails.
    pub fn vm(&self, flags: VmFlags, root: u64, tables: u64) -> VmHandle {
        let root = RAM_START.saturating_add(root);
        let word = self.ok(HostCall::VmCreate { flags, root });
        let Some(vm) = VmHandle::from_word(word) else { panic!("no handle: {word:#x}") };
        if tables > 0 {
            let pfn = root.saturating_add(abi::host::VM_ROOT_PAGES);
            self.ok(HostCall::VmTopUp { vm, pfn, pages: tables });
        }
        vm
    }

    /// Makes a protected VM whose unshare is immediate, its root at RAM page 0x1000, with 16 table pages.
    pub fn protected_vm(&self) -> VmHandle {
        self.vm(PROTECTED, 0x1000, 16)
    }

    /// Takes a VM apart whose pages have all gone back.
    ///
    /// # Panics
    /// If that fails.
    pub fn finish(&self, vm: VmHandle) {
        loop {
            let result = self.call(HostCall::VmTeardownFinish { vm });
            assert_eq!(result.outcome, Ok(()));
            if result.values.get(1) == Some(&0) {
                break;
            }
        }
    }

    /// Puts content into a page of RAM, in the caches and behind them.
    pub fn fill(&self, page: u64) {
        let pa = RAM_START.saturating_add(page) << crate::addr::PAGE_SHIFT;
        self.sim().fill_page(pa, u64::from_ne_bytes([0xa5; 8]));
    }

    /// Whether a page of RAM reads as zeros, with caches and without.
    pub fn is_wiped(&self, page: u64) -> bool {
        let pa = RAM_START.saturating_add(page) << crate::addr::PAGE_SHIFT;
        self.sim().is_zero_page(pa)
    }

    /// Whether the host could read a page of RAM now, by the tables or by any TLB.
    pub fn host_reads(&self, page: u64) -> bool {
        let ipa = RAM_START.saturating_add(page) << crate::addr::PAGE_SHIFT;
        (0..self.sim().cpus())
            .any(|cpu| self.sim().access_stage2(cpu, self.host(), ipa, sim::Access::Read).is_ok())
    }

    /// The page of RAM that a guest reads at one of its pages.
    pub fn guest_reads(&self, vm: VmHandle, gfn: u64) -> Option<u64> {
        let ipa = gfn << crate::addr::PAGE_SHIFT;
        let pa = self.sim().access_stage2(1, self.guest(vm), ipa, sim::Access::Read).ok()?;
        (pa >> crate::addr::PAGE_SHIFT).checked_sub(RAM_START)
    }

    /// What the host's table says of a page of RAM.
    pub fn host_state(&self, page: u64) -> Option<HostState> {
        self.call(HostCall::QueryPage { pfn: RAM_START.saturating_add(page) }).host_state()
    }

    /// Counts all memory by owner.
    pub fn census(&self) -> Census {
        self.hyp.census()
    }

    /// Checks what must hold whenever a call has returned: no TLB grants more than the tables do (I6), every
    /// change of them is published, and no descriptor was changed against the rules.
    ///
    /// # Panics
    /// If it does not hold.
    pub fn check(&self) {
        let violations: Vec<_> = self.sim().violations();
        assert!(violations.is_empty(), "page-table discipline:{}", lines(&violations));
        let unpublished = self.sim().unordered_writes();
        assert!(unpublished.is_empty(), "descriptors that walks need not see yet: {unpublished:x?}");
        assert!(!self.sim().is_anything_pending(), "TLBs may still hold what was taken away");
        let stale: Vec<_> = self.sim().new_stale_entries();
        assert!(stale.is_empty(), "stale translations:{}", lines(&stale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Machine, Stage2Id};
    use crate::vm::context::Context;

    #[test]
    #[should_panic(expected = "a table is written without its owner's lock Host, under [Hyp]")]
    fn a_table_written_without_its_owners_lock_is_noticed() {
        let world = World::new();
        let _hyp = world.hyp.hyp.lock();
        world.hyp.machine().write_descriptor(world.hyp.host_stage2().root.base(), 0);
    }

    #[test]
    #[should_panic(expected = "a table is written without its owner's lock Vm(0), under [Vm(1)]")]
    fn the_lock_of_another_vm_does_not_do() {
        let world = World::new();
        let [first, second] = [0x1000, 0x2000].map(|root| world.vm(PROTECTED, root, 0));
        let id = world.hyp.with_vm(first, |vm| vm.id());
        let root = id.map(|id| id.root.base()).expect("the VM is there");
        world.hyp.with_vm(second, |_| world.hyp.machine().write_descriptor(root, 0));
    }

    #[test]
    #[should_panic(expected = "EL2 has no mapping of page 0x40005, a table that it uses")]
    fn a_table_that_is_the_hosts_is_noticed() {
        let world = World::new();
        world.hyp.machine().read_descriptor(world.hyp.machine().ram(5, 1).start().base());
    }

    #[test]
    #[should_panic(expected = "page 0x40221 was given back while it is part of a tree")]
    fn a_table_that_is_wiped_while_it_is_in_use_is_noticed() {
        let world = World::new();
        let roots = [world.hyp.host_stage2().root, world.hyp.hyp_root()];
        let mut image = (HYP_START..HYP_START + HYP_PAGES).filter_map(Pfn::new);
        let is_lower = |page: &Pfn| !roots.contains(page) && world.sim().is_table(page.base().as_u64());
        world.hyp.machine().wipe(image.find(is_lower).expect("a table below a root"));
        world.check();
    }

    #[test]
    fn a_word_that_the_host_shares_changes_between_two_loads() {
        let world = World::new();
        world.change_at_load(9, 3, 2, 0x1234);
        let load = || world.sim().load64(((RAM_START + 9) << 12) + 24);
        assert_eq!([load(), load(), load()], [0, 0x1234, 0x1234]);
    }

    #[test]
    fn a_call_is_made_on_the_cpu_that_is_asked_for_and_this_thread_stays_what_it_was() {
        let world = World::new();
        world.sim().clear();
        let vm = world.protected_vm();
        let donate = HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 };
        assert_eq!(world.call_on(1, donate).outcome, Ok(()));
        let by = |cpu| {
            let of_cpu =
                |event: &sim::Event| matches!(event, sim::Event::TlbiStage2Ipa { cpu: by, .. } if *by == cpu);
            world.sim().events().iter().any(of_cpu)
        };
        assert!(by(1));
        assert_eq!(this_cpu(), 0);
    }

    #[test]
    fn a_guests_call_goes_through_the_run_loop() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x1000, x0: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 });
        let share = [u64::from(abi::guest::MEM_SHARE), 0, 1, 0];
        let (result, answer) = world.guest_call(vm, 0, share);
        assert_eq!((result.outcome, answer.map(|[x0, ..]| x0)), (Ok(()), Some(0)));
        world.fail_allocation(1);
        assert_eq!(world.stop_failing(), None, "nothing was allocated");
        assert!(world.host_reads(0));
    }

    #[test]
    fn a_guest_does_what_is_scripted_for_the_cpu_that_runs_it() {
        let machine = TestMachine::new();
        let id = Stage2Id { vmid: 1, root: machine.ram(0, 1).start() };
        machine.push_step(|_| Trap::Retry);
        let run = |cpu| {
            become_cpu(cpu);
            machine.run(id, &mut Context::default())
        };
        assert_eq!([run(1), run(0), run(0)], [Trap::Irq, Trap::Retry, Trap::Irq]);
    }
}
