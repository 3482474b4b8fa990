//! The firmware below: PSCI calls by SMC, and the end of the machine's run.

use super::instructions as i;
use crate::psci::End;

/// Calls the firmware with three arguments.
///
/// Of the functions that Deed calls, those that start a CPU get an address of EL2's own code; the others take none. A call
/// that does not return abandons what is on the stack: the caller holds no lock.
pub fn call(function: u32, arguments: [u64; 3]) -> u64 {
    let [x1, x2, x3] = arguments;
    let result;
    // SAFETY: SMCCC 1.1: the firmware may change x0 to x3 and nothing else that Rust counts on. The functions change no
    // memory; what runs at the address that they are given is `secondary_entry`, on a CPU and a stack of its own.
    unsafe {
        core::arch::asm!(
            "smc #0",
            inout("x0") u64::from(function) => result,
            inout("x1") x1 => _, inout("x2") x2 => _, inout("x3") x3 => _,
            options(nostack)
        );
    }
    result
}

/// Turns the machine off or resets it.
pub fn end(end: End) -> ! {
    i::dsb_sy();
    // PSCI does not return from either; if this firmware does, there is nothing left to do.
    call(end.function(), [0; 3]);
    park()
}

/// Stops this CPU.
pub fn park() -> ! {
    loop {
        i::wfe();
    }
}
