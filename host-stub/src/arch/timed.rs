//! Instructions between two reads of the virtual counter.
//!
//! Under QEMU's `-icount shift=0` with a counter of 1 GHz, one tick is one instruction; the interval then
//! counts what stands between the two reads, and one for the first of them.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use abi::host::{CALL_WORDS, RESULT_WORDS};

use super::{linear, timer};
use crate::machine::Timed;

/// Reads the counter, does this, reads it again; x0 to x6 in, the interval and x0 to x9 out.
macro_rules! timed {
    ($words:expr, $($line:literal),+) => {{
        let [mut x0, mut x1, mut x2, mut x3, mut x4, mut x5, mut x6]: [u64; CALL_WORDS] = $words;
        let (x7, x8, x9): (u64, u64, u64);
        let (begin, end): (u64, u64);
        // SAFETY: by SMCCC a callee changes at most x0 to x17, so x20 outlives it; the lines that are no call
        // change x10 alone. Pages that a call takes away are chosen by the callers, out of frames that Rust
        // has no reference into.
        unsafe {
            asm!(
                "mov x10, #10000",
                "isb",
                "mrs x20, cntvct_el0",
                $($line,)+
                "mrs x21, cntvct_el0",
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
                out("x10") _,
                lateout("x11") _,
                lateout("x12") _,
                lateout("x13") _,
                lateout("x14") _,
                lateout("x15") _,
                lateout("x16") _,
                lateout("x17") _,
                out("x20") begin,
                out("x21") end,
                options(nostack),
            );
        }
        (end.wrapping_sub(begin), [x0, x1, x2, x3, x4, x5, x6, x7, x8, x9])
    }};
}

/// Does one thing and returns its interval and x0 to x9. The next tick of the host is a whole period away, so
/// that no interrupt falls into the interval.
pub fn timed(what: Timed, words: &[u64; CALL_WORDS]) -> (u64, [u64; RESULT_WORDS]) {
    timer::arm();
    let nothing = [0; RESULT_WORDS];
    match what {
        Timed::Nothing => (timed!(*words, "").0, nothing),
        Timed::Nops => (timed!(*words, ".rept 100", "nop", ".endr").0, nothing),
        Timed::Loop => (timed!(*words, "2: subs x10, x10, #1", "b.ne 2b").0, nothing),
        Timed::Hvc => timed!(*words, "hvc #0"),
        Timed::Smc => timed!(*words, "smc #0"),
        Timed::Load => {
            let [address, ..] = *words;
            let begin = counter();
            let loaded = linear::load(address);
            let interval = counter().wrapping_sub(begin);
            let mut results = nothing;
            let [x0, x1, ..] = &mut results;
            match loaded {
                Ok(_) => *x0 = abi::smccc::SUCCESS,
                Err(abort) => (*x0, *x1) = (abi::smccc::NOT_SUPPORTED, abort.esr),
            }
            (interval, results)
        }
    }
}

fn counter() -> u64 {
    let value: u64;
    // SAFETY: reads a counter. Without `nomem`, so that it keeps its place among accesses to memory.
    unsafe { asm!("mrs {}, cntvct_el0", out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// What the counter read at the first instruction of this kernel.
static AT_ENTRY: AtomicU64 = AtomicU64::new(0);

/// Keeps what boot.S read.
pub fn set_at_entry(count: u64) {
    AT_ENTRY.store(count, Ordering::Relaxed);
}

/// What the counter read at the first instruction of this kernel.
pub fn at_entry() -> u64 {
    AT_ENTRY.load(Ordering::Relaxed)
}
