//! Data cache maintenance to the point of coherency.

use super::instructions as i;
use super::registers::{CTR_EL0, DCZID_EL0};
use crate::addr::PAGE_SIZE;
use aarch64_cpu::registers::Readable;
use core::arch::asm;

/// Bytes of the smallest data cache line of any level.
fn line_size() -> u64 {
    4 << (CTR_EL0.get() >> 16 & 0xf)
}

/// Cleans and invalidates the lines of `[start, start + size)`, which EL2 maps. Not inlined: it has several callers, and
/// none is in a hurry.
#[inline(never)]
pub fn clean_and_invalidate(start: u64, size: u64) {
    let line = line_size();
    let mut at = start & !(line - 1);
    while at < start + size {
        // SAFETY: the range is mapped; cleaning and invalidating a line loses nothing that was written.
        unsafe { asm!("dc civac, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += line;
    }
    i::dsb_sy();
}

/// Cleans and invalidates a page that EL2 maps at `start`.
pub fn clean_page(start: u64) {
    let line = line_size();
    // SAFETY: the page is mapped, and cleaning and invalidating loses nothing that was written. A line is a
    // power of two of 16 to 2048 bytes (CTR_EL0.DminLine), two of which fit a page exactly.
    unsafe {
        asm!(
            "2: dc civac, {at}",
            "add {at}, {at}, {line}",
            "dc civac, {at}",
            "add {at}, {at}, {line}",
            "cmp {at}, {end}",
            "b.lo 2b",
            "dsb sy",
            at = inout(reg) start => _,
            line = in(reg) line,
            end = in(reg) start + PAGE_SIZE,
            options(nostack)
        );
    }
}

/// Whether every byte of a page that EL2 maps at `start` reads as zero.
#[cfg(feature = "oracle")]
pub fn is_zeros(start: u64) -> bool {
    let words = (start..start + PAGE_SIZE).step_by(size_of::<u64>());
    // SAFETY: the page is mapped, and the address is that of an aligned word of it. Whoever else may write to it,
    // no Rust reference to its bytes exists.
    words.map(|at| unsafe { (at as *const u64).read_volatile() }).all(|word| word == 0)
}

/// Zeroes a page that EL2 maps writable at `start`, and cleans and invalidates it.
///
/// # Safety
///
/// Nobody else uses the page, and no Rust reference to its bytes exists.
pub unsafe fn wipe_page(start: u64) {
    const PROHIBITED: u64 = 1 << 4;
    let zero_block = DCZID_EL0.get();
    let line = line_size();
    if zero_block & PROHIBITED == 0 && 4 << (zero_block & 0xf) == line {
        // SAFETY: the page is the caller's. `DC ZVA` zeroes one line, and cleaning the same line comes after
        // it in program order (Arm ARM, B2.7.3 and D7.5.9). Of each line of the page, once.
        unsafe {
            asm!(
                "2: dc zva, {at}",
                "dc civac, {at}",
                "add {at}, {at}, {line}",
                "dc zva, {at}",
                "dc civac, {at}",
                "add {at}, {at}, {line}",
                "cmp {at}, {end}",
                "b.lo 2b",
                "dsb sy",
                at = inout(reg) start => _,
                line = in(reg) line,
                end = in(reg) start + PAGE_SIZE,
                options(nostack)
            );
        }
    } else {
        // SAFETY: the page is the caller's; each four words of it are written once.
        unsafe {
            asm!(
                "2: stp xzr, xzr, [{at}], #16",
                "stp xzr, xzr, [{at}], #16",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _,
                end = in(reg) start + PAGE_SIZE,
                options(nostack)
            );
        }
        clean_page(start);
    }
}
