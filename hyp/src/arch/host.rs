//! The host at EL1: what EL2 sets up for it on a CPU, as Linux's booting document asks
//! (`Documentation/arch/arm64/booting.rst`), by probed feature; and the step into its first instruction.

use super::features::Features;
use super::instructions as i;
use super::registers::*;
use super::traps::{HOST_CNTHCTL, HOST_CPTR, HOST_ICC_SRE, PMCR_N_SHIFT, hcr, hcrx, hfg, mdcr};
use crate::machine::Stage2Id;
use crate::vm::context::{SCTLR_RESET, pstate};
use aarch64_cpu::registers::{
    CNTHCTL_EL2, CNTHP_CTL_EL2, CNTP_CTL_EL0, CNTV_CTL_EL0, CNTVOFF_EL2, CPTR_EL2, HCR_EL2, MDCR_EL2,
    MIDR_EL1, MPIDR_EL1, Readable, SCTLR_EL1, SP_EL1, VMPIDR_EL2, VTCR_EL2, VTTBR_EL2, Writeable,
};

/// VTCR_EL2 for stage 2 of `ipa_bits`, at most 40: 4 KiB granule, starting at level 1 (two concatenated
/// tables for 40 bits), tables in write-back inner-shareable memory, 8-bit VMIDs. HWU59 to HWU62 are 0: hardware
/// ignores bits 62:59 of a leaf, where the host's table counts loans (`pgtable/stage2.rs`).
pub fn vtcr(features: &Features, ipa_bits: u32) -> u64 {
    const RES1: u64 = 1 << 31;
    const START_LEVEL_1: u64 = 1 << 6;
    const WRITE_BACK_INNER_SHAREABLE: u64 = 1 << 8 | 1 << 10 | 3 << 12;
    let ps = features.pa_range.min(5);
    RES1 | START_LEVEL_1 | WRITE_BACK_INNER_SHAREABLE | ps << 16 | u64::from(64u32.saturating_sub(ipa_bits))
}

/// VTTBR_EL2 for a translation.
pub fn vttbr(id: Stage2Id) -> u64 {
    u64::from(id.vmid) << 48 | id.root.base().as_u64()
}

/// HCR_EL2 while the host runs. E2H is 0.
pub fn hcr(features: &Features) -> u64 {
    let when = |condition: bool, bits: u64| if condition { bits } else { 0 };
    hcr::VM
        | hcr::SWIO
        | hcr::TSC
        | hcr::RW
        | when(features.pauth, hcr::APK | hcr::API)
        | when(features.fwb, hcr::FWB)
        | when(features.hides_something, hcr::TID3)
        | when(features.mte, hcr::TID5)
}

/// ICH_VTR_EL2.ListRegs: the number of the last list register.
const ICH_VTR_LIST_REGS: u64 = 0x1f;

/// Sets up this CPU for the host, stage 2 included. The host does not run yet.
pub fn prepare(features: &Features, stage2: Stage2Id, ipa_bits: u32) {
    HCR_EL2.set(hcr(features));
    VTCR_EL2.set(vtcr(features, ipa_bits));
    VTTBR_EL2.set(vttbr(stage2));
    i::isb();

    CPTR_EL2.set(HOST_CPTR);
    HSTR_EL2.set(0);
    // All counters are the host's; everything else of MDCR_EL2 is 0: the host's debug registers do not trap,
    // profiling and trace buffers do.
    MDCR_EL2.set(if features.pmu { PMCR_EL0.get() >> PMCR_N_SHIFT & mdcr::HPMN } else { 0 });
    VPIDR_EL2.set(MIDR_EL1.get());
    VMPIDR_EL2.set(MPIDR_EL1.get());

    // EL1 reads the physical counter and programs the physical timer; the virtual counter is the same.
    CNTHCTL_EL2.set(HOST_CNTHCTL);
    CNTHP_CTL_EL2.set(0);
    CNTVOFF_EL2.set(0);
    CNTP_CTL_EL0.set(0);
    CNTV_CTL_EL0.set(0);

    if features.trace_filter {
        TRFCR_EL2.set(0);
        TRFCR_EL1.set(0);
    }
    if features.gic {
        ICC_SRE_EL2.set(HOST_ICC_SRE);
        i::isb();
        ICH_HCR_EL2.set(0);
        ICH_VMCR_EL2.set(0);
        for number in 0..=ICH_VTR_EL2.get() & ICH_VTR_LIST_REGS {
            write_list_register(number, 0);
        }
    }
    if features.mpam {
        MPAM2_EL2.set(0);
    }
    prepare_fine_grained(features);

    SCTLR_EL1.set(SCTLR_RESET);
    SP_EL1.set(0);
    i::isb();
}

/// Traps whose polarity is negative, or that a feature the host may use needs off: only for features that are
/// there and that Deed does not hide.
fn prepare_fine_grained(features: &Features) {
    if features.hcx {
        let mops = if features.mops { hcrx::MSCEN } else { 0 };
        let tcr2 = if features.tcr2 { hcrx::TCR2EN } else { 0 };
        let sctlr2 = if features.sctlr2 { hcrx::SCTLR2EN } else { 0 };
        HCRX_EL2.set(mops | tcr2 | sctlr2);
    }
    if features.fgt {
        let s1pie = if features.s1pie { hfg::N_PIRE0 | hfg::N_PIR } else { 0 };
        let s1poe = if features.s1poe { hfg::N_POR_EL0 | hfg::N_POR_EL1 } else { 0 };
        HFGRTR_EL2.set(s1pie | s1poe);
        HFGWTR_EL2.set(s1pie | s1poe);
        HFGITR_EL2.set(0);
        HDFGRTR_EL2.set(0);
        HDFGWTR_EL2.set(0);
    }
}

unsafe extern "C" {
    /// See vectors.S.
    fn enter_host(entry: u64, argument: u64, spsr: u64) -> !;
}

/// Leaves EL2 for the host's first instruction on this CPU, with `argument` in x0 and 0 in all other registers: the
/// device tree on the boot CPU, what the host asked for on another.
///
/// Call after [`prepare`]; the caller's stack frames are abandoned, so it must hold no lock.
pub fn enter(entry: u64, argument: u64) -> ! {
    // SAFETY: ERET to EL1 under stage 2 changes nothing of EL2's but its stack pointer, which goes back to
    // the top of this CPU's stack: no frame is returned to, since this function does not return.
    unsafe { enter_host(entry, argument, pstate::RESET) }
}
