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

/// Cleans and invalidates the lines of `[start, start + size)`, which EL2 maps.
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
    // SAFETY: as in `clean_and_invalidate`. A line is a power of two of at most 2 KiB (CTR_EL0.DminLine), so
    // the loop meets the end of the page exactly when lines are at most a page; `end` is compared with b.lo.
    unsafe {
        asm!(
            "2: dc civac, {at}",
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

/// Zeroes a page that EL2 maps writable at `start`.
///
/// # Safety
///
/// Nobody else uses the page, and no Rust reference to its bytes exists.
pub unsafe fn zero_page(start: u64) {
    const PROHIBITED: u64 = 1 << 4;
    let zero_block = DCZID_EL0.get();
    let end = start + PAGE_SIZE;
    if zero_block & PROHIBITED == 0 {
        let block = 4u64 << (zero_block & 0xf);
        // SAFETY: the page is the caller's; `DC ZVA` zeroes one naturally aligned block of at most 2 KiB,
        // and the loop takes each block of the page once.
        unsafe {
            asm!(
                "2: dc zva, {at}",
                "add {at}, {at}, {block}",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _,
                block = in(reg) block,
                end = in(reg) end,
                options(nostack)
            );
        }
    } else {
        // SAFETY: the page is the caller's; each pair of words is written once.
        unsafe {
            asm!(
                "2: stp xzr, xzr, [{at}], #16",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _,
                end = in(reg) end,
                options(nostack)
            );
        }
    }
}
