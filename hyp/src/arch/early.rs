//! The tables under which EL2 boots: they let Rust run with MMU and caches on from its first line, before the
//! device tree has been read and the final tables can be built.
//!
//! One level-1 table of 512 GiB and a few level-2 tables with 2 MiB blocks, one to one, readable, writable and
//! executable. Used by the boot CPU alone, until [`super::mmu::enter_final`].

use super::console::UART_BASE;
use super::layout;
use super::mmu;
use crate::pgtable::hyp_stage1::{MAIR_DEVICE, MAIR_NORMAL};
use aarch64_cpu::registers::{MAIR_EL2, TCR_EL2, TTBR0_EL2, Writeable};
use core::cell::UnsafeCell;

const ENTRIES: usize = 512;
/// Level-2 tables: the GiBs of the UART, the image, the device tree and two boot modules.
const LEVEL_2_TABLES: usize = 5;
const BLOCK_SHIFT: u32 = 21;
/// Bytes of a block.
pub const BLOCK_SIZE: u64 = 1 << BLOCK_SHIFT;
const GIB_SHIFT: u32 = 30;
/// A 39-bit space starts at level 1.
const ADDRESS_BITS: u64 = 39;

const VALID: u64 = 1 << 0;
const TABLE: u64 = 1 << 1;
const ATTRIBUTES_SHIFT: u32 = 2;
const ACCESS_RES1: u64 = 1 << 6;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const EXECUTE_NEVER: u64 = 1 << 54;
const TABLE_ADDRESS: u64 = 0x0000_ffff_ffff_f000;

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; ENTRIES]>);

// SAFETY: only the boot CPU uses the tables, through the volatile accesses of `read` and `write`.
unsafe impl Sync for Table {}

static LEVEL_1: Table = Table(UnsafeCell::new([0; ENTRIES]));
static LEVEL_2: [Table; LEVEL_2_TABLES] = [const { Table(UnsafeCell::new([0; ENTRIES])) }; LEVEL_2_TABLES];

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Normal write-back memory.
    Memory,
    /// Device registers.
    Device,
}

impl Table {
    fn entry(&self, index: usize) -> *mut u64 {
        self.0.get().cast::<u64>().wrapping_add(index % ENTRIES)
    }

    fn read(&self, index: usize) -> u64 {
        // SAFETY: `entry` stays inside the table, which is aligned and lives for ever.
        unsafe { self.entry(index).read_volatile() }
    }

    fn write(&self, index: usize, value: u64) {
        // SAFETY: as in `read`; the boot CPU is the only one that runs, so nothing races with the store.
        unsafe { self.entry(index).write_volatile(value) };
    }

    fn address(&self) -> u64 {
        self.0.get().addr() as u64
    }
}

/// The block that an address lies in cannot be mapped: it is beyond 512 GiB, or the tables are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfReach;

/// Maps the 2 MiB block that an address lies in. Mapping a block again changes nothing.
///
/// The new translation is usable after [`super::instructions::dsb_ishst`] and an ISB.
#[inline(never)]
pub fn map(address: u64, kind: Kind) -> Result<(), OutOfReach> {
    if address >> ADDRESS_BITS != 0 {
        return Err(OutOfReach);
    }
    let table = level_2((address >> GIB_SHIFT) as usize)?;
    let index = (address >> BLOCK_SHIFT) as usize;
    let attributes = match kind {
        Kind::Memory => MAIR_NORMAL << ATTRIBUTES_SHIFT,
        Kind::Device => MAIR_DEVICE << ATTRIBUTES_SHIFT | EXECUTE_NEVER,
    };
    let block = address & !(BLOCK_SIZE - 1);
    if table.read(index) == 0 {
        table.write(index, block | attributes | ACCESS_RES1 | INNER_SHAREABLE | ACCESSED | VALID);
    }
    Ok(())
}

/// The level-2 table of a GiB, linked if it is new.
fn level_2(gib: usize) -> Result<&'static Table, OutOfReach> {
    let linked = LEVEL_1.read(gib);
    if linked != 0 {
        return LEVEL_2.iter().find(|table| table.address() == linked & TABLE_ADDRESS).ok_or(OutOfReach);
    }
    let in_use = (0..ENTRIES).filter(|&gib| LEVEL_1.read(gib) != 0).count();
    let table = LEVEL_2.get(in_use).ok_or(OutOfReach)?;
    LEVEL_1.write(gib, table.address() | TABLE | VALID);
    Ok(table)
}

/// Maps the image, the UART and the device tree, and loads the registers of EL2's translation. Called by
/// boot.S with the MMU off: no exclusives, no console.
pub(super) extern "C" fn early_map(tree: u64) {
    let image = layout::image().start().base().as_u64();
    // A block that is out of reach stays unmapped. The UART is always within reach; without the image the
    // CPU stops here and now, and a device tree that cannot be mapped is reported by whoever reads it.
    let _ = map(UART_BASE, Kind::Device);
    let _ = map(image, Kind::Memory);
    if is_reachable_tree(tree) {
        let _ = map(tree, Kind::Memory);
        let _ = map(tree.wrapping_add(BLOCK_SIZE), Kind::Memory);
    }
    MAIR_EL2.set(mmu::MAIR);
    TCR_EL2.set(mmu::tcr(ADDRESS_BITS));
    TTBR0_EL2.set(LEVEL_1.address());
}

/// Whether the early tables show a device tree at this address: its first 2 MiB, that is.
pub fn is_reachable_tree(tree: u64) -> bool {
    let uart_block = UART_BASE >> BLOCK_SHIFT;
    let blocks = [tree >> BLOCK_SHIFT, tree.wrapping_add(BLOCK_SIZE) >> BLOCK_SHIFT];
    tree.is_multiple_of(8)
        && tree.wrapping_add(BLOCK_SIZE) >> ADDRESS_BITS == 0
        && !blocks.contains(&uart_block)
}
