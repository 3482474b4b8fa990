//! Registers of features that the hypervisor hides, read as a hostile kernel would.

use core::arch::asm;

use crate::machine::{Hidden, Undefined};

/// CPACR_EL1.FPEN, ZEN and SMEN: this kernel's own traps must not be what stops it.
const ALL_OPEN: u64 = 3 << 20 | 3 << 16 | 3 << 24;

macro_rules! read {
    ($register:expr) => {{
        let (value, esr): (u64, u64);
        // SAFETY: reads a register, or traps: then the handler leaves ESR in x1 and FAR in x2, and goes on behind the
        // instruction.
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
    }};
}

macro_rules! read_identification {
    ($crm:expr, $op2:expr, $($m:literal: $($o:literal)*;)*) => {
        match ($crm, $op2) {
            $($(($m, $o) => read!(concat!("s3_0_c0_c", $m, "_", $o)),)*)*
            // There is no such register.
            _ => Err(Undefined { esr: 0 }),
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
    let result = match which {
        Hidden::Identification { crm, op2 } => read_identification!(crm, op2,
            1: 0 1 2 3 4 5 6 7;
            2: 0 1 2 3 4 5 6 7;
            3: 0 1 2 3 4 5 6 7;
            4: 0 1 2 3 4 5 6 7;
            5: 0 1 2 3 4 5 6 7;
            6: 0 1 2 3 4 5 6 7;
            7: 0 1 2 3 4 5 6 7;
        ),
        Hidden::Gcr => read!("s3_0_c1_c0_6"),
        Hidden::Rgsr => read!("s3_0_c1_c0_5"),
        Hidden::Tfsr => read!("s3_0_c5_c6_0"),
        Hidden::Tfsre0 => read!("s3_0_c5_c6_1"),
        Hidden::Gmid => read!("s3_1_c0_c0_4"),
        Hidden::Zcr => read!("s3_0_c1_c2_0"),
        Hidden::Smcr => read!("s3_0_c1_c2_6"),
        Hidden::Svcr => read!("s3_3_c4_c2_2"),
    };
    // SAFETY: as above.
    unsafe { asm!("msr cpacr_el1, {}", "isb", in(reg) before, options(nostack)) };
    result
}
