//! EL2's own translation regime: its control registers, and the step from the early tables to the final ones.

use super::features::Features;
use crate::addr::Pfn;
use crate::pgtable::hyp_stage1::{MAIR_DEVICE, MAIR_NORMAL, VA_BITS};
use aarch64_cpu::registers::TCR_EL2;

const NORMAL_WRITE_BACK: u64 = 0xff;
const DEVICE_NGNRE: u64 = 0x04;
/// MAIR_EL2: the attributes that the descriptors name by index.
pub const MAIR: u64 = NORMAL_WRITE_BACK << (8 * MAIR_NORMAL) | DEVICE_NGNRE << (8 * MAIR_DEVICE);

/// Bits of SCTLR_EL2 that are 1 in Armv8.0 (Arm ARM, SCTLR_EL2).
const SCTLR_RES1: u64 = 1 << 4 | 1 << 5 | 1 << 11 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 28 | 1 << 29;
/// MMU on.
pub const SCTLR_M: u64 = 1 << 0;
const SCTLR_A: u64 = 1 << 1;
const SCTLR_C: u64 = 1 << 2;
const SCTLR_SA: u64 = 1 << 3;
const SCTLR_I: u64 = 1 << 12;
const SCTLR_WXN: u64 = 1 << 19;
/// SCTLR_EL2 as boot.S sets it first: MMU and caches off.
pub const SCTLR_OFF: u64 = SCTLR_RES1;
/// Bits that boot.S adds for the early tables.
pub const SCTLR_EARLY: u64 = SCTLR_M | SCTLR_C | SCTLR_I;
/// SCTLR_EL2 from the final tables on: alignment checked, nothing writable executable.
pub const SCTLR_FINAL: u64 = SCTLR_RES1 | SCTLR_M | SCTLR_A | SCTLR_C | SCTLR_SA | SCTLR_I | SCTLR_WXN;

/// PS: the width of physical addresses, at most 48 bits.
fn ps(features: &Features) -> u64 {
    features.pa_range.min(5)
}

/// TCR_EL2 for addresses of `bits` bits: 4 KiB granule, tables in write-back inner-shareable memory.
pub fn tcr(bits: u64) -> u64 {
    let fields = TCR_EL2::T0SZ.val(64 - bits)
        + TCR_EL2::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
        + TCR_EL2::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
        + TCR_EL2::SH0::Inner
        + TCR_EL2::TG0::KiB_4
        + TCR_EL2::PS.val(ps(&Features::probe()));
    fields.value | TCR_RES1
}

/// Bits 31 and 23 of TCR_EL2 are 1 where E2H is 0.
const TCR_RES1: u64 = 1 << 31 | 1 << 23;

/// TCR_EL2 for the final tables.
pub fn final_tcr() -> u64 {
    tcr(u64::from(VA_BITS))
}

unsafe extern "C" {
    /// See boot.S. The new tables must map the code, the data and the stack of the caller one to one.
    fn switch_space(ttbr0: u64, tcr: u64, sctlr: u64);
}

/// Leaves the early tables for the final ones.
///
/// # Safety
///
/// `root` is the root of a 48-bit EL2 regime in memory that EL2 owns, in which every address that EL2 code
/// uses from now on is mapped as the code uses it: the image and the UART, one to one.
pub unsafe fn enter_final(root: Pfn) {
    // SAFETY: the caller vouches for the tables; code and stack stay where they are.
    unsafe { switch_space(root.base().as_u64(), final_tcr(), SCTLR_FINAL) };
}
