//! What this CPU has, read from its identification registers.

use super::id_registers::hidden;
use super::registers::{ID_AA64ISAR2_EL1, ID_AA64MMFR3_EL1, ID_AA64PFR2_EL1};
use crate::exception::StateFeatures;
use aarch64_cpu::registers::{
    ID_AA64DFR0_EL1, ID_AA64ISAR1_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, ID_AA64MMFR2_EL1, ID_AA64PFR0_EL1,
    ID_AA64PFR1_EL1, Readable,
};

/// Features that decide how the host is set up and what is switched.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Encoded width of a physical address (ID_AA64MMFR0_EL1.PARange).
    pub pa_range: u64,
    /// FEAT_S2FWB: stage 2 can force write-back memory.
    pub fwb: bool,
    /// Any algorithm of pointer authentication.
    pub pauth: bool,
    /// Scalable vectors: hidden from everybody.
    pub sve: bool,
    /// Scalable matrices: hidden from everybody.
    pub sme: bool,
    /// Memory tagging: hidden from everybody.
    pub mte: bool,
    /// System registers of a GICv3 or later.
    pub gic: bool,
    /// PMUv3.
    pub pmu: bool,
    /// FEAT_HCX.
    pub hcx: bool,
    /// FEAT_FGT.
    pub fgt: bool,
    /// FEAT_FGT2.
    pub fgt2: bool,
    /// FEAT_TRF: self-hosted trace.
    pub trace_filter: bool,
    /// FEAT_RAS.
    pub ras: bool,
    /// FEAT_MPAM.
    pub mpam: bool,
    /// FEAT_MOPS.
    pub mops: bool,
    /// FEAT_TCR2.
    pub tcr2: bool,
    /// FEAT_SCTLR2.
    pub sctlr2: bool,
    /// FEAT_S1PIE.
    pub s1pie: bool,
    /// FEAT_S1POE.
    pub s1poe: bool,
    /// The host must see identification registers with parts of them hidden.
    pub hides_something: bool,
    /// Bits of the processor state.
    pub state: StateFeatures,
}

/// A field of four bits of an identification register.
fn field(register: u64, shift: u32) -> u64 {
    register >> shift & 0xf
}

impl Features {
    /// Reads the registers of this CPU (Arm ARM, ID_AA64PFR0_EL1 and its like).
    pub fn probe() -> Self {
        let pfr0 = ID_AA64PFR0_EL1.get();
        let pfr1 = ID_AA64PFR1_EL1.get();
        let pfr2 = ID_AA64PFR2_EL1.get();
        let isar1 = ID_AA64ISAR1_EL1.get();
        let isar2 = ID_AA64ISAR2_EL1.get();
        let mmfr0 = ID_AA64MMFR0_EL1.get();
        let mmfr1 = ID_AA64MMFR1_EL1.get();
        let mmfr2 = ID_AA64MMFR2_EL1.get();
        let mmfr3 = ID_AA64MMFR3_EL1.get();
        let dfr0 = ID_AA64DFR0_EL1.get();
        let pmu = field(dfr0, 8);
        let pauth = [field(isar1, 4), field(isar1, 8), field(isar1, 24), field(isar1, 28)];
        let pauth_qarma3 = [field(isar2, 8), field(isar2, 12)];
        Self {
            pa_range: field(mmfr0, 0),
            fwb: field(mmfr2, 40) != 0,
            pauth: pauth.into_iter().chain(pauth_qarma3).any(|algorithm| algorithm != 0),
            sve: field(pfr0, 32) != 0,
            sme: field(pfr1, 24) != 0,
            mte: field(pfr1, 8) != 0,
            gic: field(pfr0, 24) != 0,
            pmu: pmu != 0 && pmu != 0xf,
            hcx: field(mmfr1, 40) != 0,
            fgt: field(mmfr0, 56) != 0,
            fgt2: field(mmfr0, 56) >= 2,
            trace_filter: field(dfr0, 40) != 0,
            ras: field(pfr0, 28) != 0,
            mpam: field(pfr0, 40) != 0 || field(pfr1, 16) != 0,
            mops: field(isar2, 16) != 0,
            tcr2: field(mmfr3, 0) != 0,
            sctlr2: field(mmfr3, 4) != 0,
            s1pie: field(mmfr3, 8) != 0,
            s1poe: field(mmfr3, 16) != 0,
            hides_something: pfr0 & const { hidden(4, 0) } != 0
                || pfr1 & const { hidden(4, 1) } != 0
                || pfr2 & const { hidden(4, 2) } != 0
                || isar1 & const { hidden(6, 1) } != 0
                || isar2 & const { hidden(6, 2) } != 0
                || mmfr3 & const { hidden(7, 3) } != 0,
            state: StateFeatures {
                pan: field(mmfr1, 20) != 0,
                ssbs: field(pfr1, 4) != 0,
                dit: field(pfr0, 48) != 0,
                tco: field(pfr1, 8) >= 2,
                nmi: field(pfr1, 36) != 0,
            },
        }
    }

    /// Bits of a physical address, at most the 48 that Deed uses.
    pub fn pa_bits(&self) -> u32 {
        match self.pa_range {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            _ => 48,
        }
    }
}
