//! The trap registers of EL2 while a guest runs. EL2 alone computes them: nothing here depends on what a host
//! or a guest wrote (architecture section 4).
//!
//! Together with the fields of [`El1`](crate::vm::context::El1) they uphold I10. What each trap hides:
//!
//! | what | where it is trapped |
//! |---|---|
//! | identification, AIDR, REVIDR, ACTLR, implementation defined registers | HCR.TID3, TID1, TACR, TIDCP |
//! | SMC, WFI, WFE, set/way maintenance, LORegions | HCR.TSC, TWI, TWE, TSW, TLOR |
//! | error records (FEAT_RAS) and external aborts | HCR.TERR, TEA |
//! | SCXTNUM (FEAT_CSV2_2), tags (FEAT_MTE) | HCR.EnSCXT = 0, ATA = 0, TID5 |
//! | debug, PMU, SPE, TRBE, self-hosted trace | MDCR |
//! | SVE, SME, AMU, trace registers | CPTR |
//! | physical timer | CNTHCTL |
//! | GIC CPU interface | ICH_HCR, ICC_SRE |
//! | TCR2, SCTLR2, PIE, POE, MOPS, LS64, GCS | HCRX = 0, and the fine-grained traps of negative polarity |
//! | MPAM | MPAM2 |

/// HCR_EL2 (Arm ARM D24.2.51).
pub mod hcr {
    /// Stage 2 is on.
    pub const VM: u64 = 1 << 0;
    /// Invalidation by set/way cleans too.
    pub const SWIO: u64 = 1 << 1;
    /// A stage-1 walk that meets device memory is a fault.
    pub const PTW: u64 = 1 << 2;
    /// FIQs go to EL2.
    pub const FMO: u64 = 1 << 3;
    /// IRQs go to EL2.
    pub const IMO: u64 = 1 << 4;
    /// SErrors go to EL2.
    pub const AMO: u64 = 1 << 5;
    /// A virtual SError is pending.
    pub const VSE: u64 = 1 << 8;
    /// TLB and instruction cache maintenance is broadcast.
    pub const FB: u64 = 1 << 9;
    /// Barriers reach at least the inner shareable domain.
    pub const BSU_INNER: u64 = 1 << 10;
    /// Traps WFI.
    pub const TWI: u64 = 1 << 13;
    /// Traps WFE.
    pub const TWE: u64 = 1 << 14;
    /// Traps REVIDR, AIDR.
    pub const TID1: u64 = 1 << 16;
    /// Traps identification registers.
    pub const TID3: u64 = 1 << 18;
    /// Traps SMC.
    pub const TSC: u64 = 1 << 19;
    /// Traps implementation defined registers.
    pub const TIDCP: u64 = 1 << 20;
    /// Traps ACTLR.
    pub const TACR: u64 = 1 << 21;
    /// Traps cache maintenance by set/way.
    pub const TSW: u64 = 1 << 22;
    /// EL1 is AArch64.
    pub const RW: u64 = 1 << 31;
    /// Traps LORegion registers.
    pub const TLOR: u64 = 1 << 35;
    /// Traps error record registers.
    pub const TERR: u64 = 1 << 36;
    /// External aborts go to EL2.
    pub const TEA: u64 = 1 << 37;
    /// The keys of pointer authentication are usable.
    pub const APK: u64 = 1 << 40;
    /// So are its instructions.
    pub const API: u64 = 1 << 41;
    /// Stage 2 decides the memory type.
    pub const FWB: u64 = 1 << 46;
    /// Traps GMID_EL1.
    pub const TID5: u64 = 1 << 58;
}

/// HCR_EL2 of every guest, without what depends on the CPU. E2H and TGE are 0.
const GUEST_HCR: u64 = hcr::VM
    | hcr::SWIO
    | hcr::PTW
    | hcr::FMO
    | hcr::IMO
    | hcr::AMO
    | hcr::FB
    | hcr::BSU_INNER
    | hcr::TWI
    | hcr::TWE
    | hcr::TID1
    | hcr::TID3
    | hcr::TSC
    | hcr::TIDCP
    | hcr::TACR
    | hcr::TSW
    | hcr::RW
    | hcr::TLOR
    | hcr::TERR
    | hcr::TEA
    | hcr::TID5;

/// HCR_EL2 of a guest on this CPU, whose host has `host`: what the CPU has (forced write-back, which the
/// tables are made for, and pointer authentication, whose keys are switched) is the same for both.
pub const fn guest_hcr(host: u64) -> u64 {
    GUEST_HCR | host & (hcr::FWB | hcr::API | hcr::APK)
}

/// CPTR_EL2 of a guest: RES1 bits, and traps of SVE (TZ, 8), SME (TSM, 12), trace (TTA, 20) and activity
/// monitors (TAM, 30). FP and Advanced SIMD are switched and do not trap.
pub const GUEST_CPTR: u64 = 0x33ff | 1 << 20 | 1 << 30;

/// CPTR_EL2 of the host: the bits that are 1 where SVE and SME are absent, which are their traps (TZ, TSM)
/// where they are there. FP, Advanced SIMD, trace and activity monitors are the host's.
pub const HOST_CPTR: u64 = 0x33ff;

/// MDCR_EL2.HPMN: how many counters are EL1's.
const MDCR_HPMN: u64 = 0x1f;

/// MDCR_EL2 of a guest: TPMCR, TPM, TDA, TDOSA, TDRA, TPMS, TTRF trap; the buffers of SPE (E2PB) and TRBE
/// (E2TB) are EL2's, that is off. TDE stays 0, so that a guest's BRK is its own. Counters stay divided as the
/// host has them; the world switch stops them.
pub const fn guest_mdcr(host: u64) -> u64 {
    1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 19 | host & MDCR_HPMN
}

/// CNTHCTL_EL2 of a guest: it reads the physical counter (EL1PCTEN), which is the virtual one, but the
/// physical timer is the host's and stays armed (EL1PCEN = 0).
pub const GUEST_CNTHCTL: u64 = 1 << 0;

/// CNTHCTL_EL2 of the host: it reads the physical counter and programs the physical timer.
pub const HOST_CNTHCTL: u64 = 0b11;

/// ICH_HCR_EL2 of a guest: TC, TALL0 and TALL1 trap every register of the CPU interface; no virtual
/// interrupts (En = 0).
pub const GUEST_ICH_HCR: u64 = 1 << 10 | 1 << 11 | 1 << 12;
/// ICC_SRE_EL2 of a guest: system registers, no bypass; Enable = 0 traps ICC_SRE_EL1.
pub const GUEST_ICC_SRE: u64 = 0b0111;
/// ICC_SRE_EL2 of the host.
pub const HOST_ICC_SRE: u64 = 0b1111;

/// MPAM2_EL2 of a guest: TRAPMPAM0EL1 and TRAPMPAM1EL1.
pub const GUEST_MPAM2: u64 = 1 << 48 | 1 << 49;

/// PMCR_EL0.E: the counters count.
pub const PMCR_ENABLE: u64 = 1 << 0;
