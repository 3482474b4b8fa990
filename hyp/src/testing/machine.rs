//! The simulated machine under the core: [`Machine`] over `sim::Sim`. Threads are its CPUs.
//!
//! Each operation asserts what the core owes it: that EL2 maps the table that is read or written, which the host
//! did not reach when it was first used; that the writing CPU holds the lock of a table's owner; that a guest gets
//! a page for itself after the host has lost it; and that a change is published before its translations are
//! dropped.

use super::RAM_PAGES;
use crate::addr::{Gfn, Pages, Pfn, PhysAddr, Vpn};
use crate::machine::{Machine, Stage2Id, Tree};
use crate::sync::{AtomicU64, Lock, Ordering, order};
use crate::vm::context::{Context, Trap};
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::AtomicBool;
use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock};

#[cfg(deed_shuttle)]
use shuttle::thread_local;
#[cfg(not(deed_shuttle))]
use std::thread_local;

/// CPUs of a simulated machine that is not asked for another number.
pub const CPUS: usize = 2;

/// What a guest does when it is run: changes its registers, and traps.
pub type Step = Box<dyn FnMut(&mut Context) -> Trap + Send>;

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// The CPU that this thread is: the first one, unless it [`became`](become_cpu) another.
pub fn this_cpu() -> usize {
    CPU.with(Cell::get)
}

/// Makes this thread a CPU. A machine that has no such CPU panics at the next invalidation or step of a guest.
pub fn become_cpu(cpu: usize) {
    CPU.with(|this| this.set(cpu));
}

/// A simulated machine with a script for its guests. Threads are its CPUs.
pub struct TestMachine {
    sim: sim::Sim,
    /// What the guests do that run on each CPU.
    scripts: Vec<Mutex<VecDeque<Step>>>,
    /// Another CPU may go on before each step: under shuttle, each use of `steps` is such a point.
    interleaved: AtomicBool,
    steps: AtomicU64,
    /// Some tree is in use. Before that nobody's lock is asked for: at boot there is one CPU.
    adopted: AtomicBool,
    /// EL2's own tables, once they are in use.
    el2: OnceLock<sim::El2Stage1>,
    /// The host's.
    host: OnceLock<sim::Stage2>,
    /// Its RAM, in ascending order.
    ram: Vec<Pages<Pfn>>,
    /// Pages from the first of RAM on that were found mapped at EL2 and not taken out of its tables since.
    reachable: Vec<AtomicBool>,
    /// Syndromes of SErrors that were made pending for the host.
    serrors: Mutex<Vec<u64>>,
    /// What [`Machine::record_memory`] has shown.
    records: Mutex<Vec<Vec<RecordPage>>>,
    /// Sizes of the records that were cleaned to memory.
    cleaned: Mutex<Vec<usize>>,
    /// On which CPU, and for which VMID, the translations of another vCPU were dropped.
    forgotten: Mutex<Vec<(usize, u16)>>,
    /// Whether each CPU is on its guest stack.
    on_guest_stacks: Vec<AtomicBool>,
    /// A CPU stays on its guest stack for a while when it has nothing to do there any more.
    leaves_slowly: AtomicBool,
    /// The guest stacks were zeroed.
    guest_stacks_forgotten: AtomicBool,
    /// Stage 2 forces write-back memory.
    forces_write_back: AtomicBool,
}

/// Records stand in memory of the test, aligned as a page is.
#[repr(align(4096))]
#[derive(Clone)]
struct RecordPage {
    _bytes: [u8; 4096],
}

impl core::fmt::Debug for TestMachine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("TestMachine")
    }
}

impl Default for TestMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl TestMachine {
    /// A machine with nothing on it.
    pub fn new() -> Self {
        Self::with(&[super::ram(0, RAM_PAGES)], CPUS)
    }

    /// The same with this RAM, which no runs share, and this many CPUs.
    ///
    /// # Panics
    /// If there is no RAM or no CPU.
    pub fn with(ram: &[Pages<Pfn>], cpus: usize) -> Self {
        let mut ram = ram.to_vec();
        ram.sort_by_key(|run| run.start());
        let base = |run: &Pages<Pfn>| run.start().base().as_u64();
        let regions = ram.iter().map(|run| sim::Region { base: base(run), size: bytes(run.count()) });
        let sim = sim::Sim::new(sim::Config { ram: regions.collect(), cpus });
        let (Some(first), Some(last)) = (ram.first(), ram.last()) else { panic!("a machine without RAM") };
        let pages = last.end().saturating_sub(first.start().as_u64());
        Self {
            sim,
            scripts: (0..cpus).map(|_| Mutex::default()).collect(),
            interleaved: AtomicBool::new(false),
            adopted: AtomicBool::new(false),
            el2: OnceLock::new(),
            host: OnceLock::new(),
            forgotten: Mutex::default(),
            reachable: (0..pages).map(|_| AtomicBool::new(false)).collect(),
            ram,
            steps: AtomicU64::new(0),
            serrors: Mutex::default(),
            records: Mutex::default(),
            cleaned: Mutex::default(),
            on_guest_stacks: (0..cpus).map(|_| AtomicBool::new(false)).collect(),
            leaves_slowly: AtomicBool::new(false),
            guest_stacks_forgotten: AtomicBool::new(false),
            forces_write_back: AtomicBool::new(false),
        }
    }

    /// The simulated hardware.
    pub fn sim(&self) -> &sim::Sim {
        &self.sim
    }

    /// The simulated hardware, for this CPU's next step.
    pub fn step(&self) -> &sim::Sim {
        if self.interleaved.load(Ordering::Relaxed) {
            self.steps.fetch_add(1, Ordering::Relaxed);
        }
        &self.sim
    }

    /// From now on stage 2 forces write-back memory, as with FEAT_S2FWB.
    pub fn force_write_back(&self) {
        self.forces_write_back.store(true, Ordering::Relaxed);
    }

    /// From now on other CPUs may go on before each step, or not.
    pub fn interleave(&self, interleaved: bool) {
        self.interleaved.store(interleaved, Ordering::Relaxed);
    }

    /// The note whether EL2 reaches a page of RAM.
    fn reach(&self, page: u64) -> Option<&AtomicBool> {
        self.reachable.get(usize::try_from(page.checked_sub(self.first_page())?).ok()?)
    }

    /// Whether the host reaches a page of RAM, once its tables are in use.
    fn host_reaches(&self, page: u64) -> bool {
        self.host.get().is_some_and(|host| self.sim.walk_stage2(*host, bytes(page)).is_ok())
    }

    /// EL2 maps the table that it reads or writes, at its own address: on hardware it would take an abort
    /// otherwise. Before its tables are in use it runs without translation. The host does not reach it, at the
    /// first use: it could write its own translations.
    #[track_caller]
    fn check_reach(&self, at: PhysAddr) {
        let Some(el2) = self.el2.get() else { return };
        let page = at.as_u64() >> crate::addr::PAGE_SHIFT;
        let reach = self.reach(page);
        if reach.is_some_and(|reach| reach.load(Ordering::Relaxed)) {
            return;
        }
        let leaf = self.sim.walk_el2(*el2, at.as_u64());
        let is_itself = |leaf: sim::Leaf| leaf.write && leaf.pa == leaf.ipa;
        assert!(leaf.is_ok_and(is_itself), "EL2 has no mapping of page {page:#x}, a table that it uses");
        assert!(!self.host_reaches(page), "the host reaches page {page:#x}, a table that EL2 uses");
        if let Some(reach) = reach {
            reach.store(true, Ordering::Relaxed);
        }
    }

    /// Whoever writes to a table that is in use holds the lock of the table's owner.
    #[track_caller]
    fn check_lock(&self, at: PhysAddr) {
        if !self.adopted.load(Ordering::Relaxed) {
            return;
        }
        let owner = match self.sim.table_regime(at.as_u64()) {
            None => return,
            Some(sim::Regime::El2) => Lock::Hyp,
            Some(sim::Regime::Stage2 { vmid }) => match vmid.checked_sub(1) {
                None => Lock::Host,
                Some(slot) => Lock::Vm(u8::try_from(slot).unwrap_or(u8::MAX)),
            },
        };
        let held = order::held();
        assert!(
            held.contains(&owner),
            "a table is written without its owner's lock {owner:?}, under {held:?}"
        );
    }

    /// A guest is given pages for itself after the host has lost them.
    #[track_caller]
    fn check_taken(&self, at: PhysAddr, value: u64) {
        if !matches!(self.sim.table_regime(at.as_u64()), Some(sim::Regime::Stage2 { vmid: 1.. })) {
            return;
        }
        /// Software bits of a leaf that say how a guest has the page.
        const SHARING: u8 = 0b11;
        /// It is the guest's alone.
        const OWNED: u8 = 0b00;
        let owned = self.sim.leaf_at(at.as_u64(), value).filter(|leaf| leaf.sw & SHARING == OWNED);
        let pages = |leaf: sim::Leaf| {
            let first = leaf.pa >> crate::addr::PAGE_SHIFT;
            first..first.saturating_add(leaf.size >> crate::addr::PAGE_SHIFT)
        };
        for page in owned.into_iter().flat_map(pages) {
            assert!(!self.host_reaches(page), "a guest is given page {page:#x} before the host has lost it");
        }
    }

    /// Whoever invalidates has made the change visible first: a walk that comes in between would cache the old
    /// translation again. Barriers that are part of an invalidation are for the invalidation.
    #[track_caller]
    fn check_published(&self, regime: sim::Regime) {
        let of_regime = |pa: &u64| self.sim.table_regime(*pa) == Some(regime);
        let unpublished = self.sim.unordered_writes().iter().any(of_regime);
        assert!(!unpublished, "translations are invalidated before the change of their table is published");
    }

    /// Its RAM, in ascending order.
    pub fn regions(&self) -> &[Pages<Pfn>] {
        &self.ram
    }

    fn first_page(&self) -> u64 {
        self.ram.first().map_or(0, |run| run.start().as_u64())
    }

    /// A run of pages from page `first` of RAM on.
    ///
    /// # Panics
    /// If it is empty or leaves the address space.
    pub fn ram(&self, first: u64, count: u64) -> Pages<Pfn> {
        match Pages::from_raw(self.first_page().saturating_add(first), count) {
            Some(pages) => pages,
            None => panic!("no such run"),
        }
    }

    /// Adds what a guest does at its next run on this CPU that has no step yet.
    ///
    /// # Panics
    /// If the machine has no such CPU.
    pub fn push_step(&self, step: impl FnMut(&mut Context) -> Trap + Send + 'static) {
        match self.scripts.get(this_cpu()) {
            Some(script) => lock(script).push_back(Box::new(step)),
            None => panic!("there is no CPU {}", this_cpu()),
        }
    }

    /// Syndromes of the SErrors that were made pending for the host since the last time.
    pub fn take_serrors(&self) -> Vec<u64> {
        core::mem::take(&mut lock(&self.serrors))
    }

    /// Sizes of the records that were cleaned to memory since the last time.
    pub fn take_cleaned(&self) -> Vec<usize> {
        core::mem::take(&mut lock(&self.cleaned))
    }

    /// On which CPUs, and for which VMIDs, the translations of another vCPU were dropped since the last time.
    pub fn take_forgotten(&self) -> Vec<(usize, u16)> {
        core::mem::take(&mut lock(&self.forgotten))
    }

    /// From now on a CPU that goes back from its guest stack takes its time, so that others have done what they can.
    pub fn leave_guest_stacks_slowly(&self) {
        self.leaves_slowly.store(true, Ordering::SeqCst);
    }

    /// Whether the stacks on which guests ran were zeroed.
    pub fn has_forgotten_guest_stacks(&self) -> bool {
        self.guest_stacks_forgotten.load(Ordering::SeqCst)
    }

    /// Drops the steps of this CPU's guests that were not made.
    pub fn drop_steps(&self) {
        if let Some(script) = self.scripts.get(this_cpu()) {
            lock(script).clear();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn bytes(pages: u64) -> u64 {
    pages << crate::addr::PAGE_SHIFT
}

impl Machine for TestMachine {
    #[track_caller]
    fn read_descriptor(&self, at: PhysAddr) -> u64 {
        self.check_reach(at);
        self.step().load64(at.as_u64())
    }

    #[track_caller]
    fn write_descriptor(&self, at: PhysAddr, value: u64) {
        self.check_lock(at);
        self.check_reach(at);
        self.check_taken(at, value);
        self.step().write_desc(at.as_u64(), value);
    }

    fn publish(&self) {
        self.step().dsb_ishst();
    }

    fn invalidate_stage2(&self, id: Stage2Id, pages: Pages<Gfn>) {
        self.check_published(sim::Regime::Stage2 { vmid: id.vmid });
        let ipa = pages.start().base().as_u64();
        self.step().tlbi_stage2_ipa(this_cpu(), id.vmid, ipa, bytes(pages.count()));
    }

    fn retire_stage2(&self, id: Stage2Id) {
        self.step().retire_root(id.root.base().as_u64());
        self.step().tlbi_stage2_vmid(this_cpu(), id.vmid);
    }

    fn adopt(&self, tree: Tree, input_bits: u32) {
        let (root, kind) = match tree {
            Tree::Stage2(id) => (id.root, sim::TableKind::Stage2 { vmid: id.vmid, ipa_bits: input_bits }),
            Tree::Hyp(root) => (root, sim::TableKind::El2 { va_bits: input_bits }),
        };
        self.adopted.store(true, Ordering::Relaxed);
        if let Tree::Hyp(root) = tree {
            let _ = self.el2.set(sim::El2Stage1 { root: root.base().as_u64(), va_bits: input_bits });
        }
        if let Tree::Stage2(Stage2Id { vmid: 0, root }) = tree {
            let root = root.base().as_u64();
            let _ = self.host.set(sim::Stage2 { vmid: 0, root, ipa_bits: input_bits });
        }
        self.step().table_root(root.base().as_u64(), kind);
    }

    fn invalidate_hyp(&self, pages: Pages<Vpn>) {
        self.check_published(sim::Regime::El2);
        for reach in pages.iter().filter_map(|page| self.reach(page.as_u64())) {
            reach.store(false, Ordering::Relaxed);
        }
        self.step().tlbi_hyp_va(this_cpu(), pages.start().base().as_u64(), bytes(pages.count()));
    }

    fn wipe(&self, page: Pfn) {
        // Who wipes a page is about to give it away: a table must be out of use by then, and out of all TLBs.
        if self.sim.is_table(page.base().as_u64()) {
            self.sim.free_table(page.base().as_u64());
        }
        self.step().wipe_page(page.base().as_u64());
    }

    fn clean(&self, page: Pfn) {
        self.step().clean_page(page.base().as_u64());
    }

    fn needs_clean(&self) -> bool {
        !self.forces_write_back.load(Ordering::Relaxed)
    }

    fn invalidate_icache(&self) {
        self.step().invalidate_icache();
    }

    fn on_guest_stack(&self, mut work: impl FnMut()) {
        let Some(on_it) = self.on_guest_stacks.get(this_cpu()) else {
            panic!("there is no CPU {}", this_cpu())
        };
        assert!(!on_it.swap(true, Ordering::SeqCst), "a CPU that is on its guest stack begins at its top");
        work();
        if self.leaves_slowly.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        on_it.store(false, Ordering::SeqCst);
    }

    fn forget_guest_stacks(&self) {
        let in_use = self.on_guest_stacks.iter().any(|on_it| on_it.load(Ordering::SeqCst));
        assert!(!in_use, "a stack that a CPU is on is zeroed");
        self.guest_stacks_forgotten.store(true, Ordering::SeqCst);
    }

    fn run(&self, _id: Stage2Id, context: &mut Context) -> Trap {
        let step = self.scripts.get(this_cpu()).and_then(|script| lock(script).pop_front());
        match step {
            Some(mut step) => step(context),
            None => Trap::Irq,
        }
    }

    fn pend_serror(&self, esr: u64) {
        lock(&self.serrors).push(esr);
    }

    fn forget_vcpu(&self, id: Stage2Id) {
        lock(&self.forgotten).push((this_cpu(), id.vmid));
    }

    #[cfg(feature = "oracle")]
    fn is_zeros(&self, page: Pfn) -> bool {
        self.sim.is_zero_page(page.base().as_u64())
    }

    fn clean_record(&self, _start: *const u8, bytes: usize) {
        lock(&self.cleaned).push(bytes);
    }

    fn record_memory(&self, pages: Pages<Pfn>) -> Option<NonNull<u8>> {
        let mut memory = vec![RecordPage { _bytes: [0; 4096] }; usize::try_from(pages.count()).ok()?];
        let start = NonNull::new(memory.as_mut_ptr().cast());
        lock(&self.records).push(memory);
        start
    }
}
