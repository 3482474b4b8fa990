//! Identification registers as the host sees them: the CPU's, without the features that Deed hides from
//! everybody because nobody switches their state (SVE, SME, MTE).

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

/// All registers of that space.
pub type All = [[u64; 8]; 7];

/// Reads all of them as the CPU has them, hiding nothing: what makes two CPUs of one kind.
pub fn all() -> All {
    let mut all = All::default();
    for (crm, row) in (1..).zip(&mut all) {
        for (op2, value) in (0..).zip(row) {
            *value = read(crm, op2);
        }
    }
    all
}

macro_rules! read_any {
    ($crm:expr, $op2:expr, $($m:literal: $($o:literal)*;)*) => {
        match ($crm, $op2) {
            $($(($m, $o) => {
                let value: u64;
                // SAFETY: identification registers are read-only and, at EL2, all encodings of this space
                // can be read: unallocated ones as zero (Arm ARM, identification registers).
                unsafe {
                    core::arch::asm!(
                        concat!("mrs {}, S3_0_C0_C", $m, "_", $o), out(reg) value, options(nomem, nostack)
                    );
                }
                value
            })*)*
            _ => 0,
        }
    };
}

/// Reads the CPU's register.
fn read(crm: u64, op2: u64) -> u64 {
    read_any!(crm, op2,
        1: 0 1 2 3 4 5 6 7;
        2: 0 1 2 3 4 5 6 7;
        3: 0 1 2 3 4 5 6 7;
        4: 0 1 2 3 4 5 6 7;
        5: 0 1 2 3 4 5 6 7;
        6: 0 1 2 3 4 5 6 7;
        7: 0 1 2 3 4 5 6 7;
    )
}
