//! Identification registers as the host sees them: the CPU's, without the features that Deed hides from everybody,
//! because nobody switches their state or lets EL1 have their registers.

use super::registers::CTR_EL0;
use aarch64_cpu::registers::Readable;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// What is hidden of a register in the space Op0=3, Op1=0, CRn=0, CRm 1 to 7 (Arm ARM, D24.2: fields have four bits).
/// `Features::hides_something` must know of each.
pub const fn hidden(crm: u64, op2: u64) -> u64 {
    match (crm, op2) {
        // ID_AA64PFR0_EL1: SVE.
        (4, 0) => 0xf << 32,
        // ID_AA64PFR1_EL1: MTE, SME, MTE_frac, GCS, THE, MTEX.
        (4, 1) => 0xf << 8 | 0xf << 24 | 0xfff << 40 | 0xf << 52,
        // ID_AA64PFR2_EL1 (more of MTE; FPMR, which needs HCRX_EL2.EnFPM; and whatever it will name), ID_AA64ZFR0_EL1 and
        // ID_AA64SMFR0_EL1, which describe what is hidden, ID_AA64FPFR0_EL1 (what FPMR is for).
        (4, 2 | 4 | 5 | 7) => u64::MAX,
        // ID_AA64ISAR1_EL1: LS64.
        (6, 1) => 0xf << 60,
        // ID_AA64ISAR2_EL1: SYSREG_128, SYSINSTR_128. ID_AA64MMFR3_EL1: D128, D128_2.
        (6, 2) | (7, 3) => 0xff << 32,
        _ => 0,
    }
}

/// What a register of that space reads as.
pub fn value(crm: u64, op2: u64) -> u64 {
    read(crm, op2) & !hidden(crm, op2)
}

/// The registers of that space on the boot CPU, as it has them, hiding nothing.
static KEPT: [[AtomicU64; 8]; 7] = [const { [const { AtomicU64::new(0) }; 8] }; 7];

/// CTR_EL0 of the boot CPU. A CPU steps through memory by its own smallest line when it cleans, and the caches of the others
/// must have no smaller ones; what else the register tells, the host takes to be alike.
static KEPT_CACHE_TYPE: AtomicU64 = AtomicU64::new(0);

/// Keeps this CPU's registers and its CTR_EL0, for others to be compared with.
pub fn keep() {
    all(|kept, value| {
        kept.store(value, Ordering::Relaxed);
        true
    });
}

/// Whether this CPU is of the kind of the one whose registers were kept.
pub fn are_those_kept() -> bool {
    all(|kept, value| kept.load(Ordering::Relaxed) == value)
}

fn all(mut visit: impl FnMut(&AtomicU64, u64) -> bool) -> bool {
    let rows = (1..).zip(&KEPT);
    let mut registers = rows.flat_map(|(crm, row)| (0..).zip(row).map(move |(op2, kept)| (crm, op2, kept)));
    visit(&KEPT_CACHE_TYPE, CTR_EL0.get()) && registers.all(|(crm, op2, kept)| visit(kept, read(crm, op2)))
}

/// Reads the CPU's register; 0 for one that is not in the space.
///
/// MRS names its register in the instruction, so there is one for each, and the right one is jumped to.
#[inline(never)]
fn read(crm: u64, op2: u64) -> u64 {
    let (row, column) = (crm.wrapping_sub(1), op2);
    if row >= 7 || column >= 8 {
        return 0;
    }
    let value: u64;
    // SAFETY: the jump goes to one of the 56 pairs of instructions, each of which ends behind the last: `row * 8 + column`
    // is less than 56. Identification registers are read-only and, at EL2, all encodings of this space can be read:
    // unallocated ones as zero (Arm ARM, identification registers).
    unsafe {
        asm!(
            "adr {at}, 2f",
            "add {at}, {at}, {index}, lsl #3",
            "br {at}",
            "2:",
            ".irp m, 1, 2, 3, 4, 5, 6, 7",
            ".irp o, 0, 1, 2, 3, 4, 5, 6, 7",
            "mrs {value}, s3_0_c0_c\\m\\()_\\o",
            "b 3f",
            ".endr",
            ".endr",
            "3:",
            at = out(reg) _,
            index = in(reg) row * 8 + column,
            value = out(reg) value,
            options(nomem, nostack, preserves_flags)
        );
    }
    value
}
