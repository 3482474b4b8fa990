//! The firmware below: PSCI calls by SMC, and the end of the machine's run.

use super::instructions as i;
use crate::psci::End;

/// Calls the firmware. Only functions that do not return to another context and touch no memory are called.
fn firmware_call(function: u32) -> u64 {
    let result;
    // SAFETY: SMCCC 1.1: the firmware may change x0 to x3 and nothing else that Rust counts on; the
    // functions that Deed calls take no address.
    unsafe {
        core::arch::asm!(
            "smc #0",
            inout("x0") u64::from(function) => result,
            inout("x1") 0u64 => _, inout("x2") 0u64 => _, inout("x3") 0u64 => _,
            options(nostack)
        );
    }
    result
}

/// Turns the machine off or resets it.
pub fn end(end: End) -> ! {
    i::dsb_sy();
    // PSCI does not return from either; if this firmware does, there is nothing left to do.
    firmware_call(end.function());
    park()
}

/// Stops this CPU.
pub fn park() -> ! {
    loop {
        i::wfe();
    }
}
