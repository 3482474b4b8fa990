//! The kernel's own tables, from where `boot.S` has brought them.
//!
//! Adds RAM to the linear map (entries go from invalid to valid only) and narrows the permissions of the
//! image's window (same frames, fewer rights: no break-before-make is needed, Arm ARM D8.16.1), before another CPU
//! runs.

use core::arch::{asm, global_asm};
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::registers::{CNTKCTL_EL1, CPACR_EL1, TTBR0_EL1, Writeable};

use super::exception::STACK_SHIFT;
use super::linear;

/// Physical addresses below this are devices.
pub const DEVICES_END: u64 = 1 << 30;
/// Size of the image's window.
const WINDOW_SIZE: u64 = 2 << 20;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Second-level tables of the linear map: GiBs that are not all RAM. The first is boot.S's.
const LINEAR_L2_TABLES: usize = 8;

const VALID: u64 = 1 << 0;
const TABLE: u64 = VALID | 1 << 1;
const BLOCK: u64 = VALID;
const DEVICE: u64 = 0 << 2;
const NORMAL: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 7;
const SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const RIGHTS: u64 = READ_ONLY | PXN | UXN;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

const MEMORY: u64 = NORMAL | SHAREABLE | ACCESSED | PXN | UXN;

/// Attribute 0: Device-nGnRE. Attribute 1: Normal, write-back, allocating.
const MAIR: u64 = 0xff04;
/// 48-bit halves, 4 KiB granule, walks inner-shareable write-back; the physical size is filled in.
const TCR: u64 = {
    let half = 16 | 1 << 8 | 1 << 10 | 3 << 12;
    half | half << 16 | 2 << 30
};
/// MMU and caches on, stack alignment checked, EL0 may maintain caches, read CTR and wait; RES1 of Armv8.0.
const SCTLR: u64 = {
    let (m, c, sa, sa0, i) = (1 << 0, 1 << 2, 1 << 3, 1 << 4, 1 << 12);
    let (dze, uct, ntwi, ntwe, uci) = (1 << 14, 1 << 15, 1 << 16, 1 << 18, 1 << 26);
    0x30d0_0800 | m | c | sa | sa0 | i | dze | uct | ntwi | ntwe | uci
};

global_asm!(
    include_str!("boot.S"),
    table = const TABLE,
    executable_block = const BLOCK | NORMAL | SHAREABLE | ACCESSED | READ_ONLY,
    window_page = const TABLE | NORMAL | SHAREABLE | ACCESSED,
    device_block = const BLOCK | DEVICE | ACCESSED | PXN | UXN,
    memory_block = const BLOCK | MEMORY,
    mair = const MAIR,
    tcr = const TCR,
    sctlr = const SCTLR,
    linear_l2_tables = const LINEAR_L2_TABLES,
    stack_shift = const STACK_SHIFT,
);

unsafe extern "C" {
    static mut linear_l1: [u64; ENTRIES];
    static mut linear_l2: [[u64; ENTRIES]; LINEAR_L2_TABLES];
    static mut window_l3: [u64; ENTRIES];
    static no_program_l0: [u64; ENTRIES];
    static _start_of_image: u8;
    static _end_of_text: u8;
    static _end_of_rodata: u8;
    static _start_of_stacks: u8;
    static _end_of_stacks: u8;
    static _end_of_image: u8;
}

/// Where the image is: the symbol's address in the window, as an offset from its start.
pub fn offset_of(symbol: *const u8) -> u64 {
    (symbol as u64).wrapping_sub(&raw const _start_of_image as u64)
}

/// CPUs for which the image has a stack.
pub fn stacks() -> usize {
    let size = offset_of(&raw const _end_of_stacks).wrapping_sub(offset_of(&raw const _start_of_stacks));
    (size >> (STACK_SHIFT + 1)) as usize
}

/// Physical addresses of the image, with its stack and `.bss`.
pub fn image(base: u64) -> Range<u64> {
    base..base.saturating_add(offset_of(&raw const _end_of_image))
}

/// Writes an entry of a table of the kernel.
fn set(entry: *mut u64, value: u64) {
    // SAFETY: the callers pass a place in one of the statics above, in bounds; only the boot CPU runs, and nothing
    // holds references into the tables. Volatile, since the table walker reads them, too.
    unsafe { entry.write_volatile(value) };
}

fn get(entry: *mut u64) -> u64 {
    // SAFETY: as for `set`.
    unsafe { entry.read_volatile() }
}

/// The place of an entry in a table.
fn entry(table: *mut [u64; ENTRIES], index: u64) -> *mut u64 {
    table.cast::<u64>().wrapping_add(index as usize % ENTRIES)
}

/// The linear map, while RAM is added to it.
#[derive(Debug)]
pub struct LinearMap {
    image: u64,
    used: usize,
}

impl LinearMap {
    /// As `boot.S` left it; `image` is the image's physical address.
    pub fn new(image: u64) -> Self {
        Self { image, used: 1 }
    }

    /// Adds RAM: whole GiBs as blocks, the rest in blocks of 2 MiB. Returns `false` where there is no room.
    #[must_use]
    pub fn add(&mut self, ram: &Range<u64>) -> bool {
        let end = ram.end.next_multiple_of(MIB2);
        let mut address = ram.start & !(MIB2 - 1);
        while address < end {
            if !(DEVICES_END..linear::SIZE).contains(&address) {
                return false;
            }
            let top = entry(&raw mut linear_l1, address / GIB);
            if get(top) & TABLE == 0 && address.is_multiple_of(GIB) && end - address >= GIB {
                set(top, address | BLOCK | MEMORY);
                address += GIB;
                continue;
            }
            let Some(table) = self.second_level(top) else { return false };
            let place = entry(table, address / MIB2);
            if get(place) & VALID == 0 {
                set(place, address | BLOCK | MEMORY);
            }
            address += MIB2;
        }
        barrier();
        true
    }

    fn second_level(&mut self, top: *mut u64) -> Option<*mut [u64; ENTRIES]> {
        let first = (&raw mut linear_l2).cast::<[u64; ENTRIES]>();
        let physical = |index: usize| {
            let table = first.wrapping_add(index);
            self.image.wrapping_add(offset_of(table.cast_const().cast()))
        };
        let present = get(top);
        if present & TABLE == TABLE {
            let index = (0..self.used).find(|index| physical(*index) == present & ADDRESS)?;
            return Some(first.wrapping_add(index));
        }
        if self.used >= LINEAR_L2_TABLES {
            return None;
        }
        set(top, physical(self.used) | TABLE);
        self.used += 1;
        Some(first.wrapping_add(self.used - 1))
    }
}

fn barrier() {
    // SAFETY: barriers change no value.
    unsafe { asm!("dsb ishst", "isb", options(nostack)) };
}

/// Narrows the window's rights, takes away the pages below each stack and what is behind the image, and leaves the
/// identity map. `image` is the image's physical address.
pub fn protect(image: u64) {
    let text = 0..offset_of(&raw const _end_of_text);
    let rodata = text.end..offset_of(&raw const _end_of_rodata);
    let stacks = offset_of(&raw const _start_of_stacks)..offset_of(&raw const _end_of_stacks);
    // The lower half of each stack's room.
    let is_guard = |offset: u64| stacks.contains(&offset) && offset & 1 << STACK_SHIFT == 0;
    let end = offset_of(&raw const _end_of_image);
    for offset in (0..WINDOW_SIZE).step_by(PAGE as usize) {
        let place = entry(&raw mut window_l3, offset / PAGE);
        let page = get(place) & !RIGHTS;
        let value = match offset {
            offset if text.contains(&offset) => page | READ_ONLY | UXN,
            offset if rodata.contains(&offset) => page | READ_ONLY | UXN | PXN,
            offset if is_guard(offset) || offset >= end => 0,
            _ => page | UXN | PXN,
        };
        set(place, value);
    }
    barrier();
    enter(image);
}

/// What each CPU does when it has reached the upper half: it lets EL0 use FP/SIMD and the counters, leaves the identity
/// map, through which it came, and forgets what it has seen of it.
pub fn enter(image: u64) {
    CPACR_EL1.write(CPACR_EL1::FPEN::TrapNothing);
    CNTKCTL_EL1.write(CNTKCTL_EL1::EL0VCTEN::SET + CNTKCTL_EL1::EL0PCTEN::SET);
    NO_PROGRAM.store(image.wrapping_add(offset_of((&raw const no_program_l0).cast())), Ordering::Relaxed);
    leave_program();
    // SAFETY: what the kernel uses stays mapped to the same frames with the rights that it needs; stale
    // entries, which grant more, are dropped.
    unsafe { asm!("isb", "tlbi vmalle1", "dsb nsh", "isb", options(nostack)) };
}

/// Physical address of tables that map nothing.
static NO_PROGRAM: AtomicU64 = AtomicU64::new(0);

/// Leaves a program's tables, which are freed next: this CPU's walker does not come there any more.
pub fn leave_program() {
    TTBR0_EL1.set(NO_PROGRAM.load(Ordering::Relaxed));
    aarch64_cpu::asm::barrier::isb(aarch64_cpu::asm::barrier::SY);
}
