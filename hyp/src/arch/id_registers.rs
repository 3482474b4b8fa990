//! Identification registers as the host sees them: the CPU's, without the features that Deed hides from
//! everybody because nobody switches their state (SVE, SME, MTE).

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// Fields of ID_AA64PFR0_EL1 and ID_AA64PFR1_EL1, four bits each, by their lowest bit.
const PFR0_SVE: u32 = 32;
const PFR1_MTE: u32 = 8;
const PFR1_SME: u32 = 24;
const PFR1_MTE_FRAC: u32 = 40;
const PFR1_MTEX: u32 = 52;

/// What a register in the space Op0=3, Op1=0, CRn=0, CRm 1 to 7 reads as.
pub fn value(crm: u64, op2: u64) -> u64 {
    let real = read(crm, op2);
    let hidden: &[u32] = match (crm, op2) {
        (4, 0) => &[PFR0_SVE],
        (4, 1) => &[PFR1_MTE, PFR1_SME, PFR1_MTE_FRAC, PFR1_MTEX],
        // ID_AA64ZFR0_EL1 and ID_AA64SMFR0_EL1 describe what is hidden.
        (4, 4 | 5) => return 0,
        _ => &[],
    };
    hidden.iter().fold(real, |value, shift| value & !(0xf << shift))
}

/// The registers of that space on the boot CPU, as it has them, hiding nothing.
static KEPT: [[AtomicU64; 8]; 7] = [const { [const { AtomicU64::new(0) }; 8] }; 7];

/// Keeps this CPU's registers, for others to be compared with.
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
    registers.all(|(crm, op2, kept)| visit(kept, read(crm, op2)))
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
