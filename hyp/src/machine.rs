//! What the ownership core asks of the machine under it.
//!
//! Everything that the core does to hardware goes through this trait: reading and writing descriptors,
//! making them visible to table walkers, dropping translations, wiping and cleaning pages, running a guest.
//! `arch::El2` implements it for EL2 and `testing::TestMachine`, over `sim::Sim`, for tests on the build machine, so
//! that the same core runs in both, and a checker in between sees each step.

use crate::addr::{Gfn, Pages, Pfn, PhysAddr, Vpn};
use crate::vm::context::{Context, Trap};

/// Which stage-2 translation: VMID and root, as VTTBR_EL2 holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage2Id {
    /// VMID; 0 is the host's.
    pub vmid: u16,
    /// First page of the (concatenated) start-level tables.
    pub root: Pfn,
}

/// An identification register that a guest may see part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the architecture's registers, by their names")]
pub enum IdRegister {
    Pfr0,
    Pfr1,
    Isar0,
    Isar1,
    Isar2,
    Mmfr0,
    Mmfr1,
    Mmfr2,
}

/// A tree of translation tables, for checkers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tree {
    /// Stage-2 of the host or of a guest.
    Stage2(Stage2Id),
    /// EL2's own stage-1, with this root.
    Hyp(Pfn),
}

/// The machine. Methods take `&self`: an implementation is a handle without state of its own, or guards it.
pub trait Machine {
    /// Reads a descriptor of a table that EL2 owns. `at` is a multiple of 8.
    fn read_descriptor(&self, at: PhysAddr) -> u64;

    /// Writes one, in a single 64-bit store. The store is visible to walkers after
    /// [`publish`](Self::publish).
    fn write_descriptor(&self, at: PhysAddr, value: u64);

    /// Makes all earlier descriptor stores visible to the table walkers of all CPUs (DSB ISHST, and an ISB
    /// for this CPU).
    fn publish(&self);

    /// Drops every translation of these pages under this VMID, stage-2 and combined, on all CPUs, and waits
    /// until accesses that used them are done (Arm ARM D8.17; the sequence: docs/memory-ownership.md, TLB and
    /// cache rules).
    fn invalidate_stage2(&self, id: Stage2Id, pages: Pages<Gfn>);

    /// Drops every translation under this VMID on all CPUs, for the last time: the tree will not be loaded
    /// again, and its tables may be taken apart.
    fn retire_stage2(&self, id: Stage2Id);

    /// Tells a checker that a tree with this root, and this width of input addresses, is in use from now on.
    /// Hardware needs no such thing.
    fn adopt(&self, _tree: Tree, _input_bits: u32) {}

    /// Drops EL2's own translations of these pages on all CPUs.
    fn invalidate_hyp(&self, pages: Pages<Vpn>);

    /// Zeroes a page and cleans it to the point of coherency (invariant I4), through a mapping that is gone
    /// when this returns.
    fn wipe(&self, page: Pfn);

    /// Cleans and invalidates the data cache for a page to the point of coherency, likewise.
    fn clean(&self, page: Pfn);

    /// Whether a page that is donated must be cleaned: not where stage 2 forces write-back (FEAT_S2FWB).
    fn needs_clean(&self) -> bool;

    /// Invalidates the instruction caches of all CPUs.
    fn invalidate_icache(&self);

    /// Does what works with a guest's registers on this CPU's guest stack, so that those which the host is not shown are on
    /// no other. The core calls it with a vCPU claimed, gives that back only when this has returned, and does not nest it.
    /// A simulated machine has one stack.
    fn on_guest_stack(&self, mut work: impl FnMut()) {
        work();
    }

    /// Zeroes the guest stacks of all CPUs, in memory too, for a machine that goes down. The core has closed it and seen every
    /// vCPU given back, under the locks of the VMs: no CPU is on its guest stack, and none will be.
    fn forget_guest_stacks(&self) {}

    /// Puts a vCPU on this CPU in place of the host: the host's registers are kept in `context`, the guest's
    /// are loaded, all but x0 to x30, pc and pstate. A simulated machine has nothing to move.
    fn load(&self, _id: Stage2Id, _context: &mut Context) {}

    /// Runs the vCPU that is loaded on this CPU, under the given stage-2, until it traps or an interrupt
    /// arrives.
    fn run(&self, id: Stage2Id, context: &mut Context) -> Trap;

    /// Puts the host back in place of the vCPU: the inverse of [`load`](Self::load).
    fn unload(&self, _context: &mut Context) {}

    /// Makes an SError that was taken from a guest pending for the host on this CPU.
    fn pend_serror(&self, _esr: u64) {}

    /// Reads an identification register of this CPU. A simulated CPU has no features.
    fn id_register(&self, _register: IdRegister) -> u64 {
        0
    }

    /// Drops what a vCPU of the same VM that last ran on this CPU may have left behind: its translations of
    /// stage 1 and its instructions (TLBI VMALLE1, IC IALLU).
    fn forget_vcpu(&self, id: Stage2Id);

    /// Cleans a record of the hypervisor's own memory to the point of coherency, for a machine that goes down.
    /// A simulated machine keeps records beside its RAM.
    fn clean_record(&self, _start: *const u8, _bytes: usize) {}

    /// Whether every byte of a page reads as zero.
    #[cfg(feature = "oracle")]
    fn is_zeros(&self, page: Pfn) -> bool;

    /// Whether the host runs on this CPU alone: then nobody has written to a page that it has just got back.
    #[cfg(feature = "oracle")]
    fn is_alone(&self) -> bool {
        true
    }

    /// Nanoseconds of the system counter, to tell what the oracle costs. A simulated machine has no time.
    #[cfg(feature = "oracle")]
    fn now(&self) -> u64 {
        0
    }

    /// Test builds: the first page-table event from this number on, of those that the machine has kept. A simulated
    /// machine has a log of its own.
    #[cfg(feature = "test-calls")]
    fn event(&self, _from: u64) -> Option<crate::events::Event> {
        None
    }

    /// Where EL2 reads and writes the records in a page that it owns, as the address of its first byte in
    /// the implementation's own address space: EL2's identity map, or memory of the test.
    fn record_memory(&self, pages: Pages<Pfn>) -> Option<core::ptr::NonNull<u8>>;
}
