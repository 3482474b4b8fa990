//! The linear map: all of RAM and the first GiB (devices) at a fixed distance in the upper half.
//!
//! Reserved memory is in it, too: what EL2 keeps for itself must fail by EL2's tables, not by this
//! kernel's good manners. Every access made here is one that may be refused.

use core::arch::asm;

use crate::machine::Abort;
use crate::mm::Pfn;

/// Virtual less physical address.
pub const OFFSET: u64 = 0xffff_0000_0000_0000;
/// Physical addresses that the map has room for.
pub const SIZE: u64 = 512 << 30;

unsafe extern "C" {
    fn probe_load();
    fn probe_store();
    fn probe_copy();
    fn probe_zero();
}

/// Virtual address of a byte of physical memory; beyond the map it is an abort without syndrome.
pub fn address(physical: u64) -> Result<u64, Abort> {
    if physical < SIZE { Ok(OFFSET | physical) } else { Err(Abort { esr: 0, far: physical }) }
}

/// Calls one of the assembly routines above. Returns its x0, or the abort that ended it.
///
/// # Safety
///
/// What the routine reads or writes at these addresses is nothing that Rust holds a reference to, or a
/// buffer that the caller borrows for it.
unsafe fn probe(routine: unsafe extern "C" fn(), arguments: [u64; 3]) -> Result<u64, Abort> {
    let [mut x0, mut esr, mut far] = arguments;
    // SAFETY: the routines change x0 to x5 only, touch no stack, and make only accesses that are in the
    // table of expected faults: one that is refused sets x1 and x2 and returns.
    unsafe {
        asm!(
            "blr {routine}",
            routine = in(reg) routine,
            inlateout("x0") x0,
            inlateout("x1") esr,
            inlateout("x2") far,
            lateout("x3") _,
            lateout("x4") _,
            lateout("x5") _,
            lateout("x30") _,
            options(nostack),
        );
    }
    if esr == 0 { Ok(x0) } else { Err(Abort { esr, far }) }
}

/// Loads a word of physical memory.
pub fn load(physical: u64) -> Result<u64, Abort> {
    let from = address(physical)?;
    // SAFETY: only reads; whatever is there comes back as a number.
    unsafe { probe(probe_load, [from, 0, 0]) }
}

/// Stores a word.
pub fn store(physical: u64, value: u64) -> Result<(), Abort> {
    let to = address(physical)?;
    // SAFETY: the callers own the frame, or are told by a program with the research device to write where
    // EL2 should refuse; Rust's own memory is not given to programs, and the frame table says so.
    unsafe { probe(probe_store, [to, value, 0]) }.map(drop)
}

/// Copies out of physical memory.
pub fn read(physical: u64, into: &mut [u8]) -> Result<(), Abort> {
    let from = address(physical)?;
    // SAFETY: writes to the borrowed buffer, within its length; the source is only read.
    unsafe { probe(probe_copy, [into.as_mut_ptr() as u64, from, into.len() as u64]) }.map(drop)
}

/// Copies into physical memory.
pub fn write(physical: u64, from: &[u8]) -> Result<(), Abort> {
    let to = address(physical)?;
    // SAFETY: reads the borrowed buffer, within its length; the target is a frame that the caller owns and
    // that Rust has no reference into.
    unsafe { probe(probe_copy, [to, from.as_ptr() as u64, from.len() as u64]) }.map(drop)
}

/// Fills a page with zeros.
pub fn zero(page: Pfn) -> Result<(), Abort> {
    let to = address(page.address())?;
    // SAFETY: the target is a frame that the caller has just taken from the free ones.
    unsafe { probe(probe_zero, [to, 0, 0]) }.map(drop)
}

/// Cleans a page to the point of unification and drops what instruction caches hold.
pub fn make_executable(page: Pfn) {
    let Ok(start) = address(page.address()) else { return };
    let type_register: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) type_register, options(nomem, nostack)) };
    let line = 4u64 << ((type_register >> 16) & 0xf);
    for address in (start..start.saturating_add(crate::mm::PAGE)).step_by(line as usize) {
        // SAFETY: cleaning a line of mapped memory changes no value.
        unsafe { asm!("dc cvau, {}", in(reg) address, options(nostack)) };
    }
    // SAFETY: barriers and the invalidation of instruction caches change no value.
    unsafe { asm!("dsb ish", "ic ialluis", "dsb ish", "isb", options(nostack)) };
}
