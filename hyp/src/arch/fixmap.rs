//! The only way in which EL2 reaches a page that is not its own: a slot for each CPU, mapped for one operation
//! and unmapped with a broadcast TLBI at once (docs/memory-ownership.md, TLB and cache rules).
//!
//! The slots have tables of their own, linked into the root of EL2's tables at boot. Slot n is CPU n's, and
//! EL2 runs with interrupts masked, so no lock is needed.

use super::exceptions;
use super::instructions as i;
use crate::addr::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::cpus::MAX_CPUS;
use crate::pgtable::Regime;
use crate::pgtable::hyp_stage1::{HypStage1, Mapped, Rights};
use core::cell::UnsafeCell;

/// First address of the fixmap: bit 47, which no physical address of this machine's RAM has.
pub const FIXMAP_BASE: u64 = 0x8000_0000_0000;
const ENTRIES: usize = 512;
const VALID_TABLE: u64 = 0b11;
/// Index of the fixmap's entry in the root of a 48-bit regime.
const ROOT_INDEX: u64 = FIXMAP_BASE >> 39;
const _: () = assert!(ROOT_INDEX == 256 && MAX_CPUS <= ENTRIES);

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; ENTRIES]>);

// SAFETY: levels 1 and 2 are written once at boot by the boot CPU; of level 3, CPU n accesses entry n alone;
// all through the volatile stores of `write`.
unsafe impl Sync for Table {}

impl Table {
    const fn new() -> Self {
        Self(UnsafeCell::new([0; ENTRIES]))
    }

    fn address(&self) -> u64 {
        self.0.get().addr() as u64
    }

    fn write(&self, index: usize, value: u64) {
        let entry = self.0.get().cast::<u64>().wrapping_add(index % ENTRIES);
        // SAFETY: the entry is inside the table, aligned, and no other CPU accesses it (see `Sync`).
        unsafe { entry.write_volatile(value) };
    }
}

static LEVEL_1: Table = Table::new();
static LEVEL_2: Table = Table::new();
static LEVEL_3: Table = Table::new();

/// Links the fixmap's tables. Returns the descriptor for entry [`ROOT_INDEX`] of the root, and its address.
pub fn root_entry(root: Pfn) -> (u64, u64) {
    LEVEL_1.write(0, LEVEL_2.address() | VALID_TABLE);
    LEVEL_2.write(0, LEVEL_3.address() | VALID_TABLE);
    (root.base().as_u64() + ROOT_INDEX * 8, LEVEL_1.address() | VALID_TABLE)
}

/// Runs `operation` with the address at which this CPU sees the page, read-write.
pub fn with_page<R>(page: Pfn, operation: impl FnOnce(u64) -> R) -> R {
    let slot = exceptions::this_cpu() % MAX_CPUS;
    let address = FIXMAP_BASE + slot as u64 * PAGE_SIZE;
    let mapped = Mapped { pfn: page, rights: Rights::ReadWrite };
    LEVEL_3.write(slot, HypStage1.encode(Some(mapped)));
    i::dsb_ishst();
    i::isb();
    let result = operation(address);
    LEVEL_3.write(slot, 0);
    i::dsb_ishst();
    i::tlbi_vae2is(address >> PAGE_SHIFT);
    i::dsb_ish();
    i::isb();
    result
}
