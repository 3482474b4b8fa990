//! The trap registers of EL2 while a guest runs. EL2 alone computes them: nothing here depends on what a host
//! or a guest wrote (docs/architecture.md, Running a vCPU).
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

/// Bits of HCR_EL2, by their names in the Arm ARM.
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

/// Bits of CPTR_EL2 while E2H is 0.
pub mod cptr {
    /// Bits 13, 9 and 7 to 0.
    pub const RES1: u64 = 0x22ff;
    /// Traps SVE; 1 where it is absent.
    pub const TZ: u64 = 1 << 8;
    /// Traps SME; 1 where it is absent.
    pub const TSM: u64 = 1 << 12;
    /// Traps trace registers.
    pub const TTA: u64 = 1 << 20;
    /// Traps activity monitors.
    pub const TAM: u64 = 1 << 30;
}

/// Bits of MDCR_EL2.
pub mod mdcr {
    /// How many counters are EL1's.
    pub const HPMN: u64 = 0x1f;
    /// Traps PMCR_EL0.
    pub const TPMCR: u64 = 1 << 5;
    /// Traps the performance monitors.
    pub const TPM: u64 = 1 << 6;
    /// Traps debug registers.
    pub const TDA: u64 = 1 << 9;
    /// Traps the registers of the OS lock and of power-down.
    pub const TDOSA: u64 = 1 << 10;
    /// Traps the registers that tell where the debug ROM is.
    pub const TDRA: u64 = 1 << 11;
    /// Traps statistical profiling.
    pub const TPMS: u64 = 1 << 14;
    /// Traps the filters of self-hosted trace.
    pub const TTRF: u64 = 1 << 19;
}

/// Bits of HCRX_EL2 (FEAT_HCX).
pub mod hcrx {
    /// EL1 and EL0 have the instructions of FEAT_MOPS.
    pub const MSCEN: u64 = 1 << 11;
    /// EL1 has TCR2_EL1.
    pub const TCR2EN: u64 = 1 << 14;
    /// EL1 has SCTLR2_EL1.
    pub const SCTLR2EN: u64 = 1 << 15;
}

/// Bits of HFGRTR_EL2 and HFGWTR_EL2 (FEAT_FGT), of negative polarity: 1 does not trap.
pub mod hfg {
    /// PIRE0_EL1 (FEAT_S1PIE).
    pub const N_PIRE0: u64 = 1 << 57;
    /// PIR_EL1 (FEAT_S1PIE).
    pub const N_PIR: u64 = 1 << 58;
    /// POR_EL0 (FEAT_S1POE).
    pub const N_POR_EL0: u64 = 1 << 59;
    /// POR_EL1 (FEAT_S1POE).
    pub const N_POR_EL1: u64 = 1 << 60;
}

/// Bits of CNTHCTL_EL2 while E2H is 0.
mod cnthctl {
    /// EL1 and EL0 read the physical counter.
    pub(super) const EL1PCTEN: u64 = 1 << 0;
    /// EL1 and EL0 program the physical timer.
    pub(super) const EL1PCEN: u64 = 1 << 1;
}

/// Bits of ICH_HCR_EL2.
mod ich_hcr {
    /// Traps registers common to both groups.
    pub(super) const TC: u64 = 1 << 10;
    /// Traps those of group 0.
    pub(super) const TALL0: u64 = 1 << 11;
    /// Traps those of group 1.
    pub(super) const TALL1: u64 = 1 << 12;
}

/// Bits of ICC_SRE_EL2.
mod icc_sre {
    /// System registers.
    pub(super) const SRE: u64 = 1 << 0;
    /// No bypass of FIQs.
    pub(super) const DFB: u64 = 1 << 1;
    /// No bypass of IRQs.
    pub(super) const DIB: u64 = 1 << 2;
    /// ICC_SRE_EL1 does not trap.
    pub(super) const ENABLE: u64 = 1 << 3;
}

/// Bits of MPAM2_EL2.
mod mpam2 {
    /// Traps MPAM1_EL1.
    pub(super) const TRAPMPAM1EL1: u64 = 1 << 48;
    /// Traps MPAM0_EL1.
    pub(super) const TRAPMPAM0EL1: u64 = 1 << 49;
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

/// CPTR_EL2 of a guest: SVE, SME, trace and activity monitors trap. FP and Advanced SIMD are switched and do
/// not trap.
pub const GUEST_CPTR: u64 = cptr::RES1 | cptr::TZ | cptr::TSM | cptr::TTA | cptr::TAM;

/// CPTR_EL2 of the host: the bits that are 1 where SVE and SME are absent, which are their traps (TZ, TSM)
/// where they are there. FP, Advanced SIMD, trace and activity monitors are the host's.
pub const HOST_CPTR: u64 = cptr::RES1 | cptr::TZ | cptr::TSM;

/// MDCR_EL2 of a guest: TPMCR, TPM, TDA, TDOSA, TDRA, TPMS, TTRF trap; the buffers of SPE (E2PB) and TRBE
/// (E2TB) are EL2's, that is off. TDE stays 0, so that a guest's BRK is its own. Counters stay divided as the
/// host has them; the world switch stops them.
pub const fn guest_mdcr(host: u64) -> u64 {
    mdcr::TPMCR
        | mdcr::TPM
        | mdcr::TDA
        | mdcr::TDOSA
        | mdcr::TDRA
        | mdcr::TPMS
        | mdcr::TTRF
        | host & mdcr::HPMN
}

/// CNTHCTL_EL2 of a guest: it reads the physical counter (EL1PCTEN), which is the virtual one, but the
/// physical timer is the host's and stays armed (EL1PCEN = 0).
pub const GUEST_CNTHCTL: u64 = cnthctl::EL1PCTEN;

/// CNTHCTL_EL2 of the host: it reads the physical counter and programs the physical timer.
pub const HOST_CNTHCTL: u64 = cnthctl::EL1PCTEN | cnthctl::EL1PCEN;

/// ICH_HCR_EL2 of a guest: TC, TALL0 and TALL1 trap every register of the CPU interface; no virtual
/// interrupts (En = 0).
pub const GUEST_ICH_HCR: u64 = ich_hcr::TC | ich_hcr::TALL0 | ich_hcr::TALL1;
/// ICC_SRE_EL2 of a guest: system registers, no bypass; Enable = 0 traps ICC_SRE_EL1.
pub const GUEST_ICC_SRE: u64 = icc_sre::SRE | icc_sre::DFB | icc_sre::DIB;
/// ICC_SRE_EL2 of the host.
pub const HOST_ICC_SRE: u64 = GUEST_ICC_SRE | icc_sre::ENABLE;

/// MPAM2_EL2 of a guest: TRAPMPAM0EL1 and TRAPMPAM1EL1.
pub const GUEST_MPAM2: u64 = mpam2::TRAPMPAM0EL1 | mpam2::TRAPMPAM1EL1;

/// PMUSERENR_EL0: EN, SW, CR and ER, everything open to EL0.
pub const PMUSERENR_ALL: u64 = 0xf;
/// PMCR_EL0.E: the counters count.
pub const PMCR_ENABLE: u64 = 1 << 0;
/// PMCR_EL0.N: how many counters there are.
pub const PMCR_N_SHIFT: u32 = 11;

// The values, written out: a name with a wrong bit must not pass unseen.
const _: () = {
    assert!(HOST_CPTR == 0x33ff && GUEST_CPTR == 0x4010_33ff);
    assert!(guest_mdcr(0) == 0x8_4e60 && guest_mdcr(u64::MAX) == 0x8_4e7f);
    assert!(GUEST_CNTHCTL == 0b01 && HOST_CNTHCTL == 0b11);
    assert!(GUEST_ICH_HCR == 0x1c00 && GUEST_ICC_SRE == 0b0111 && HOST_ICC_SRE == 0b1111);
    assert!(GUEST_MPAM2 == 0b11 << 48);
    assert!(hcrx::MSCEN == 1 << 11 && hcrx::TCR2EN == 1 << 14 && hcrx::SCTLR2EN == 1 << 15);
    assert!(hfg::N_PIRE0 | hfg::N_PIR == 0b11 << 57 && hfg::N_POR_EL0 | hfg::N_POR_EL1 == 0b11 << 59);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits of HCR_EL2 that no guest has.
    const E2H: u64 = 1 << 34;
    const TGE: u64 = 1 << 27;
    const NV: u64 = 1 << 42 | 1 << 43 | 1 << 45;
    const EN_SCXT: u64 = 1 << 53;
    const ATA: u64 = 1 << 56;

    #[test]
    fn nothing_that_the_host_has_relaxes_a_trap_of_a_guest() {
        for bit in 0..64 {
            let host = 1 << bit;
            assert_eq!(guest_hcr(host) & !guest_hcr(0) & !(hcr::FWB | hcr::API | hcr::APK), 0, "bit {bit}");
            assert_eq!(guest_hcr(host) & guest_hcr(0), guest_hcr(0), "bit {bit}");
            assert_eq!(guest_mdcr(host) & !mdcr::HPMN, guest_mdcr(0), "bit {bit}");
        }
    }

    #[test]
    fn an_serror_that_is_pending_for_the_host_is_no_guests() {
        assert_eq!(guest_hcr(u64::MAX) & hcr::VSE, 0);
    }

    #[test]
    fn a_guest_is_aarch64_at_el1_under_el2_and_has_no_tags() {
        let guest = guest_hcr(u64::MAX);
        assert_eq!(guest & (hcr::RW | hcr::VM | hcr::TID5), hcr::RW | hcr::VM | hcr::TID5);
        assert_eq!(guest & (E2H | TGE | NV | EN_SCXT | ATA), 0);
    }

    #[test]
    fn the_buffers_of_profiling_and_trace_are_out_of_a_guests_reach() {
        const E2PB: u64 = 0b11 << 12;
        const E2TB: u64 = 0b11 << 24;
        // 0b00: the buffer is EL2's, and its registers trap at EL1.
        assert_eq!(guest_mdcr(u64::MAX) & (E2PB | E2TB), 0);
        assert_eq!(guest_mdcr(0) & (mdcr::TPMS | mdcr::TTRF), mdcr::TPMS | mdcr::TTRF);
        assert_eq!(GUEST_CPTR & cptr::TTA, cptr::TTA);
    }
}
