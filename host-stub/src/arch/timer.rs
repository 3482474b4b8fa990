//! The tick: EL1's physical timer, the only one that a host of Deed is told of.

use aarch64_cpu::registers::{CNTFRQ_EL0, CNTP_CTL_EL0, CNTP_TVAL_EL0, CNTVCT_EL0, Readable, Writeable};

use crate::machine::TICK;

const NANOSECONDS: u64 = 1_000_000_000;

/// Arms the timer for the next tick. Ends the one that is due.
pub fn arm() {
    CNTP_TVAL_EL0.set(CNTFRQ_EL0.get() / (NANOSECONDS / TICK));
    CNTP_CTL_EL0.write(CNTP_CTL_EL0::ENABLE::SET);
}

/// No tick comes any more.
pub fn disarm() {
    CNTP_CTL_EL0.set(0);
}

/// Nanoseconds since the counter started.
pub fn now() -> u64 {
    aarch64_cpu::asm::barrier::isb(aarch64_cpu::asm::barrier::SY);
    let (count, frequency) = (CNTVCT_EL0.get(), CNTFRQ_EL0.get().max(1));
    let seconds = count / frequency;
    // The rest is below the frequency, which fits 32 bits, so the product fits 64.
    seconds
        .saturating_mul(NANOSECONDS)
        .saturating_add((count % frequency).saturating_mul(NANOSECONDS) / frequency)
}
