//! The machine under the target `calls`: `sim`, with two eyes of its own.
//!
//! EL2 has no business with memory that somebody else can write: what it reads there could change between two reads.
//! So each descriptor that it reads or writes must lie where the host's present translation does not lead, and the pages
//! are noted, for the target to hold against what guests reach.

use hyp::addr::{Gfn, PAGE_SHIFT, Pages, Pfn, PhysAddr, Vpn};
use hyp::machine::{Machine, Stage2Id, Tree};
use hyp::vm::context::{Context, Trap};
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a guest does when it is run: sets registers and traps.
#[derive(Clone, Debug)]
pub struct Turn {
    /// x0 to x6.
    pub x: [u64; 7],
    /// The value that x7 to x30 begin with, each with its number added.
    pub secret: u64,
    /// Processor state, if another than it had.
    pub pstate: Option<u64>,
    /// Why it stops.
    pub trap: Trap,
}

/// A simulated machine with two CPUs.
#[derive(Debug)]
pub struct FuzzMachine {
    sim: sim::Sim,
    script: Mutex<VecDeque<Turn>>,
    /// The translations that are in use.
    trees: Mutex<Vec<sim::Stage2>>,
    writes: AtomicU64,
    /// The page that was used last.
    last: AtomicU64,
    touched: Mutex<Vec<u64>>,
    records: Mutex<Vec<Chunk>>,
}

/// Memory for records: its address and its number of pages.
type Chunk = (usize, usize);

/// Memory for records that no machine uses any more.
static FREE: Mutex<Vec<Chunk>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FuzzMachine {
    /// A machine with this RAM.
    pub fn new(ram: Pages<Pfn>) -> Self {
        let base = ram.start().base().as_u64();
        let ram = vec![sim::Region { base, size: ram.count() << PAGE_SHIFT }];
        Self {
            sim: sim::Sim::new(sim::Config { ram, cpus: 2 }),
            script: Mutex::default(),
            trees: Mutex::default(),
            writes: AtomicU64::new(0),
            last: AtomicU64::new(0),
            touched: Mutex::default(),
            records: Mutex::default(),
        }
    }

    /// The simulated hardware.
    pub fn sim(&self) -> &sim::Sim {
        &self.sim
    }

    /// Decides what guests do at their next runs, and forgets what was decided before. Behind the last one an
    /// interrupt arrives.
    pub fn play(&self, turns: impl IntoIterator<Item = Turn>) {
        *lock(&self.script) = turns.into_iter().collect();
    }

    /// Descriptors written so far.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// The pages whose descriptors were read or written since the last question.
    pub fn take_touched(&self) -> Vec<u64> {
        self.last.store(0, Ordering::Relaxed);
        let mut pages = std::mem::take(&mut *lock(&self.touched));
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// The translation with this root, if it is in use: the host's, or that of a VM.
    pub fn tree(&self, root: u64) -> Option<sim::Stage2> {
        lock(&self.trees).iter().copied().find(|tree| tree.root == root)
    }

    /// EL2 is about to use a word of memory as its own.
    fn touch(&self, at: PhysAddr, how: &str) {
        let page = at.as_u64() >> PAGE_SHIFT;
        // A table is used word by word: to look at its first word, and now and then another, will do.
        if self.last.swap(page, Ordering::Relaxed) == page && at.as_u64() & 0x1f8 != 0 {
            return;
        }
        lock(&self.touched).push(page);
        // The first tree that comes into use is the host's.
        let host = lock(&self.trees).first().copied();
        if let Some(host) = host {
            let reached = self.sim.walk_stage2(host, page << PAGE_SHIFT).is_ok();
            assert!(!reached, "EL2 {how} {:#x}, which the host can write", at.as_u64());
        }
    }
}

impl Drop for FuzzMachine {
    fn drop(&mut self) {
        lock(&FREE).append(&mut lock(&self.records));
    }
}

impl Machine for FuzzMachine {
    fn read_descriptor(&self, at: PhysAddr) -> u64 {
        self.touch(at, "reads");
        self.sim.load64(at.as_u64())
    }

    fn write_descriptor(&self, at: PhysAddr, value: u64) {
        self.touch(at, "writes");
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.sim.write_desc(at.as_u64(), value);
    }

    fn publish(&self) {
        self.sim.dsb_ishst();
    }

    fn invalidate_stage2(&self, id: Stage2Id, pages: Pages<Gfn>) {
        let ipa = pages.start().base().as_u64();
        self.sim.tlbi_stage2_ipa(0, id.vmid, ipa, pages.count() << PAGE_SHIFT);
    }

    fn retire_stage2(&self, id: Stage2Id) {
        let root = id.root.base().as_u64();
        self.sim.retire_root(root);
        lock(&self.trees).retain(|tree| tree.root != root);
        self.sim.tlbi_stage2_vmid(0, id.vmid);
    }

    fn adopt(&self, tree: Tree, input_bits: u32) {
        match tree {
            Tree::Stage2(Stage2Id { vmid, root }) => {
                let root = root.base().as_u64();
                self.sim.table_root(root, sim::TableKind::Stage2 { vmid, ipa_bits: input_bits });
                lock(&self.trees).push(sim::Stage2 { vmid, root, ipa_bits: input_bits });
            }
            Tree::Hyp(root) => {
                self.sim.table_root(root.base().as_u64(), sim::TableKind::El2 { va_bits: input_bits });
            }
        }
    }

    fn invalidate_hyp(&self, pages: Pages<Vpn>) {
        self.sim.tlbi_hyp_va(0, pages.start().base().as_u64(), pages.count() << PAGE_SHIFT);
    }

    fn wipe(&self, page: Pfn) {
        // A table that is given away must be out of use by then, and out of all TLBs.
        if self.sim.is_table(page.base().as_u64()) {
            self.sim.free_table(page.base().as_u64());
        }
        self.sim.wipe_page(page.base().as_u64());
    }

    fn clean(&self, page: Pfn) {
        self.sim.clean_page(page.base().as_u64());
    }

    fn needs_clean(&self) -> bool {
        true
    }

    fn invalidate_icache(&self) {
        self.sim.invalidate_icache();
    }

    fn is_zeros(&self, page: Pfn) -> bool {
        self.sim.is_zero_page(page.base().as_u64())
    }

    fn run(&self, _id: Stage2Id, context: &mut Context) -> Trap {
        let Some(turn) = lock(&self.script).pop_front() else { return Trap::Irq };
        context.x[..7].copy_from_slice(&turn.x);
        for (number, register) in context.x.iter_mut().enumerate().skip(7) {
            *register = turn.secret.wrapping_add(number as u64);
        }
        if let Some(pstate) = turn.pstate {
            context.pstate = pstate;
        }
        turn.trap
    }

    fn forget_vcpu(&self, _id: Stage2Id) {}

    /// Memory of the build machine, aligned as a page is, that goes from machine to machine.
    fn record_memory(&self, pages: Pages<Pfn>) -> Option<NonNull<u8>> {
        #[repr(align(4096))]
        #[derive(Clone)]
        struct Page {
            _bytes: [u8; 4096],
        }
        let count = usize::try_from(pages.count()).ok()?;
        let mut free = lock(&FREE);
        let chunk = match free.iter().position(|(_, pages)| *pages == count) {
            Some(place) => free.swap_remove(place),
            None => {
                let memory = vec![Page { _bytes: [0; 4096] }; count].leak();
                (memory.as_mut_ptr().expose_provenance(), count)
            }
        };
        lock(&self.records).push(chunk);
        NonNull::new(std::ptr::with_exposed_provenance_mut(chunk.0))
    }
}
