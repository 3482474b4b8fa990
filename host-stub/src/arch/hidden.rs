//! Registers of features that the hypervisor hides, read as a hostile kernel would.

use core::arch::asm;

use crate::machine::{Hidden, Undefined};

/// CPACR_EL1.FPEN, ZEN and SMEN: this kernel's own traps must not be what stops it.
const ALL_OPEN: u64 = 3 << 20 | 3 << 16 | 3 << 24;

macro_rules! read {
    ($which:expr, $($name:ident $register:literal,)*) => {
        match $which {
            $(Hidden::$name => {
                let (value, esr): (u64, u64);
                // SAFETY: reads a register, or traps: then the handler leaves ESR in x1 and FAR in x2, and goes on
                // behind the instruction.
                unsafe {
                    asm!(
                        concat!("2: mrs x0, ", $register),
                        "3:",
                        ".pushsection .fixups, \"a\"",
                        ".balign 8",
                        ".quad 2b, 3b",
                        ".popsection",
                        inlateout("x0") 0u64 => value,
                        inlateout("x1") 0u64 => esr,
                        lateout("x2") _,
                    );
                }
                if esr == 0 { Ok(value) } else { Err(Undefined { esr }) }
            })*
        }
    };
}

/// Reads one.
pub fn read(which: Hidden) -> Result<u64, Undefined> {
    let before: u64;
    // SAFETY: what EL0 and EL1 may use of FP and vectors is put back below; nothing runs in between.
    unsafe {
        asm!(
            "mrs {before}, cpacr_el1",
            "msr cpacr_el1, {open}",
            "isb",
            before = out(reg) before,
            open = in(reg) ALL_OPEN,
            options(nostack)
        );
    }
    let result = read!(which,
        Pfr0 "id_aa64pfr0_el1",
        Pfr1 "id_aa64pfr1_el1",
        Gcr "s3_0_c1_c0_6",
        Rgsr "s3_0_c1_c0_5",
        Tfsr "s3_0_c5_c6_0",
        Tfsre0 "s3_0_c5_c6_1",
        Gmid "s3_1_c0_c0_4",
        Zcr "s3_0_c1_c2_0",
        Smcr "s3_0_c1_c2_6",
        Svcr "s3_3_c4_c2_2",
    );
    // SAFETY: as above.
    unsafe { asm!("msr cpacr_el1, {}", "isb", in(reg) before, options(nostack)) };
    result
}
