//! Calls to EL2 and EL3.

use core::arch::asm;

use abi::host::{CALL_WORDS, RESULT_WORDS};

use crate::machine::OddCall;
use crate::platform::Conduit;

/// Makes a call with this instruction: x0 to x6 in, x0 to x9 out.
macro_rules! call {
    ($instruction:literal, $words:expr) => {{
        let [mut x0, mut x1, mut x2, mut x3, mut x4, mut x5, mut x6]: [u64; CALL_WORDS] = $words;
        let (x7, x8, x9): (u64, u64, u64);
        // SAFETY: by SMCCC the callee changes at most x0 to x17. It may take pages away from the kernel;
        // which of them is decided by the callers, out of frames that Rust has no reference into.
        unsafe {
            asm!(
                $instruction,
                inlateout("x0") x0,
                inlateout("x1") x1,
                inlateout("x2") x2,
                inlateout("x3") x3,
                inlateout("x4") x4,
                inlateout("x5") x5,
                inlateout("x6") x6,
                inlateout("x7") 0u64 => x7,
                inlateout("x8") 0u64 => x8,
                inlateout("x9") 0u64 => x9,
                lateout("x10") _,
                lateout("x11") _,
                lateout("x12") _,
                lateout("x13") _,
                lateout("x14") _,
                lateout("x15") _,
                lateout("x16") _,
                lateout("x17") _,
                options(nostack),
            );
        }
        [x0, x1, x2, x3, x4, x5, x6, x7, x8, x9]
    }};
}

/// `HVC #0`.
pub fn hvc(words: &[u64; CALL_WORDS]) -> [u64; RESULT_WORDS] {
    call!("hvc #0", *words)
}

/// `SMC #0`.
pub fn smc(words: [u64; 4]) -> [u64; 4] {
    let [a, b, c, d] = words;
    let [x0, x1, x2, x3, ..] = call!("smc #0", [a, b, c, d, 0, 0, 0]);
    [x0, x1, x2, x3]
}

/// A call with an immediate that is not 0.
pub fn odd(which: OddCall, words: &[u64; CALL_WORDS]) -> u64 {
    let [x0, ..] = match which {
        OddCall::Hvc1 => call!("hvc #1", *words),
        OddCall::Smc1 => call!("smc #1", *words),
    };
    x0
}

/// Makes a PSCI call.
pub fn psci(conduit: Conduit, function: u32, [a, b, c]: [u64; 3]) -> u64 {
    let function = function.into();
    let [x0, ..] = match conduit {
        Conduit::Smc => call!("smc #0", [function, a, b, c, 0, 0, 0]),
        Conduit::Hvc => call!("hvc #0", [function, a, b, c, 0, 0, 0]),
    };
    x0
}
