//! Registers of EL0, laid out as the assembly in `arch` saves them.

/// General registers and what the exception that ended the last stay in EL0 left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct UserContext {
    /// x0 to x30.
    pub x: [u64; 31],
    /// Stack pointer.
    pub sp: u64,
    /// Program counter.
    pub pc: u64,
    /// Processor state (SPSR_EL1).
    pub pstate: u64,
    /// Syndrome of the exception (ESR_EL1).
    pub esr: u64,
    /// Faulting address, where the syndrome says that there is one (FAR_EL1).
    pub far: u64,
    /// Which vector was taken: 0 synchronous, 1 IRQ, 2 FIQ, 3 SError, 4 to 7 the same from AArch32.
    pub vector: u64,
    /// The thread's own pointer (TPIDR_EL0).
    pub tls: u64,
}

const _: () = {
    assert!(core::mem::offset_of!(UserContext, sp) == 248);
    assert!(core::mem::offset_of!(UserContext, pc) == 256);
    assert!(core::mem::offset_of!(UserContext, pstate) == 264);
    assert!(core::mem::offset_of!(UserContext, esr) == 272);
    assert!(core::mem::offset_of!(UserContext, far) == 280);
    assert!(core::mem::offset_of!(UserContext, vector) == 288);
    assert!(core::mem::offset_of!(UserContext, tls) == 296);
};

impl UserContext {
    /// Begins a program: EL0, AArch64, interrupts unmasked.
    pub fn new(pc: u64, sp: u64) -> Self {
        Self { pc, sp, ..Self::default() }
    }

    /// The processor state that a program may choose for itself, out of one that it gives: the flags. All
    /// else would be a state that it could not reach.
    pub const fn sanitised_pstate(pstate: u64) -> Option<u64> {
        const FLAGS: u64 = 0xf << 28;
        const MODE_AND_MASKS: u64 = 0x3df;
        if pstate & MODE_AND_MASKS != 0 { None } else { Some(pstate & FLAGS) }
    }
}

/// FP/SIMD registers of EL0. The kernel has no use for them and never changes them by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct FpState {
    /// v0 to v31.
    pub v: [[u8; 16]; 32],
    /// FPSR.
    pub fpsr: u64,
    /// FPCR.
    pub fpcr: u64,
}

const _: () = assert!(core::mem::offset_of!(FpState, fpsr) == 512);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_cannot_choose_el1_or_mask_interrupts() {
        assert_eq!(UserContext::sanitised_pstate(0x6000_0000), Some(0x6000_0000));
        for bad in [0b0101, 0b0100, 1 << 4, 1 << 7, 0x3c0] {
            assert_eq!(UserContext::sanitised_pstate(bad), None);
        }
        assert_eq!(UserContext::sanitised_pstate(1 << 21), Some(0));
    }
}
