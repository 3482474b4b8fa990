//! The firmware below: PSCI calls by SMC, and the end of the machine's run.

use super::instructions as i;
use crate::psci::End;

/// Calls the firmware with three arguments; returns x0.
#[inline(never)]
pub fn call(function: u32, x1: u64, x2: u64, x3: u64) -> u64 {
    let [x0, ..] = firmware([function.into(), x1, x2, x3]);
    x0
}

/// Calls the firmware with x0 to x3; returns what it leaves there.
///
/// Of the functions that Deed calls, those that start a CPU get an address of EL2's own code; the others, and those of the
/// host's that are relayed ([`crate::smc`]), take none. A call
/// that does not return abandons what is on the stack: the caller holds no lock.
pub fn firmware([mut x0, mut x1, mut x2, mut x3]: [u64; 4]) -> [u64; 4] {
    // SAFETY: by SMCCC 1.0 the firmware may change x0 to x17 and nothing else. The functions change no memory; what runs at
    // the address that they are given is `secondary_entry`, on a CPU and a stack of its own.
    unsafe {
        core::arch::asm!(
            "smc #0",
            inout("x0") x0,
            inout("x1") x1,
            inout("x2") x2,
            inout("x3") x3,
            clobber_abi("C"),
            options(nostack)
        );
    }
    [x0, x1, x2, x3]
}

/// Turns the machine off or resets it.
pub fn end(end: End) -> ! {
    i::dsb_sy();
    // PSCI does not return from either; if this firmware does, there is nothing left to do.
    call(end.function(), 0, 0, 0);
    park()
}

/// Stops this CPU.
pub fn park() -> ! {
    loop {
        i::wfe();
    }
}
