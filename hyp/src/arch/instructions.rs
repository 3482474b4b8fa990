//! Wrappers of one instruction each: barriers, TLB, cache and address translation maintenance.
//!
//! None is declared `nomem`: the compiler keeps memory accesses on their side of each.

use core::arch::asm;

macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() {
            // SAFETY: a barrier, or an invalidation of copies that hardware can read again from memory and
            // tables. It changes no memory and no register.
            unsafe { asm!($instruction, options(nostack, preserves_flags)) };
        }
    )*};
}

macro_rules! with_register {
    ($($(#[$doc:meta])* $name:ident $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(operand: u64) {
            // SAFETY: an invalidation of TLB entries: hardware walks the tables again. It changes no memory.
            unsafe { asm!(concat!($instruction, ", {}"), in(reg) operand, options(nostack, preserves_flags)) };
        }
    )*};
}

plain! {
    /// Instruction synchronisation barrier.
    isb "isb";
    /// Waits for memory accesses and maintenance, inner shareable.
    dsb_ish "dsb ish";
    /// Waits for stores, inner shareable.
    dsb_ishst "dsb ishst";
    /// Waits for memory accesses and maintenance of this CPU.
    dsb_nsh "dsb nsh";
    /// Waits for memory accesses and maintenance, whole system.
    dsb_sy "dsb sy";
    /// Waits for an event, for parking a CPU.
    wfe "wfe";
    /// Says that this CPU waits for another.
    yield_to_others "yield";
    /// Drops all translations of EL1 and EL0 under the current VMID on all CPUs, stage 1 and combined.
    tlbi_vmalle1is "tlbi vmalle1is";
    /// The same on this CPU.
    tlbi_vmalle1 "tlbi vmalle1";
    /// Drops all translations of EL1 and EL0 under the current VMID on all CPUs, both stages.
    tlbi_vmalls12e1is "tlbi vmalls12e1is";
    /// Drops all translations of EL2 on all CPUs.
    tlbi_alle2is "tlbi alle2is";
    /// Drops instruction caches of all CPUs.
    ic_ialluis "ic ialluis";
    /// Drops the instruction cache of this CPU.
    ic_iallu "ic iallu";
}

with_register! {
    /// Drops stage-2 translations of an IPA (bits 35:0 of the operand: IPA >> 12) under the current VMID on
    /// all CPUs.
    tlbi_ipas2e1is "tlbi ipas2e1is";
    /// Drops EL2's translations of an address (bits 43:0 of the operand: VA >> 12) on all CPUs.
    tlbi_vae2is "tlbi vae2is";
}

/// Translates as EL1 would for a read (stage 1 alone) and returns PAR_EL1, which is kept for the host.
#[inline]
pub fn translate_el1_read(address: u64) -> u64 {
    use aarch64_cpu::registers::{PAR_EL1, Readable, Writeable};
    let kept = PAR_EL1.get();
    // SAFETY: the instruction reads tables of EL1 and writes PAR_EL1, which is put back below.
    unsafe { asm!("at s1e1r, {}", in(reg) address, options(nostack, preserves_flags)) };
    isb();
    let result = PAR_EL1.get();
    PAR_EL1.set(kept);
    result
}
