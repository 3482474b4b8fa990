//! System registers that `aarch64-cpu` lacks, in its style. Writes have no effect on ordering: callers pair
//! them with the barriers of [`super::instructions`].

use aarch64_cpu::registers::{Readable, Writeable};

macro_rules! system_registers {
    ($($(#[$doc:meta])* $module:ident $name:ident $encoding:literal;)*) => {$(
        mod $module {
            use super::{Readable, Writeable};

            /// A system register.
            #[derive(Clone, Copy, Debug)]
            pub struct Register;

            impl Readable for Register {
                type T = u64;
                type R = ();

                #[inline]
                fn get(&self) -> u64 {
                    let value;
                    // SAFETY: reading this register has no side effect on memory or on Rust's state. Where
                    // a feature is needed for it to exist, its doc comment says so and callers have probed.
                    unsafe {
                        core::arch::asm!(
                            concat!("mrs {}, ", $encoding), out(reg) value, options(nomem, nostack)
                        );
                    }
                    value
                }
            }

            impl Writeable for Register {
                type T = u64;
                type R = ();

                #[inline]
                fn set(&self, value: u64) {
                    // SAFETY: none of the registers listed here maps or unmaps memory of EL2, moves its
                    // stack or its vectors; they configure EL1, its traps, timers and interrupts.
                    unsafe {
                        core::arch::asm!(
                            concat!("msr ", $encoding, ", {}"), in(reg) value, options(nomem, nostack)
                        );
                    }
                }
            }
        }
        $(#[$doc])*
        pub const $name: $module::Register = $module::Register;
    )*};
}

system_registers! {
    /// What MIDR_EL1 reads as at EL1.
    vpidr_el2 VPIDR_EL2 "vpidr_el2";
    /// Traps of AArch32 system registers.
    hstr_el2 HSTR_EL2 "hstr_el2";
    /// Cache type: line sizes.
    ctr_el0 CTR_EL0 "ctr_el0";
    /// Block size of `DC ZVA`.
    dczid_el0 DCZID_EL0 "dczid_el0";
    /// Control of the performance counters (any PMUv3).
    pmcr_el0 PMCR_EL0 "pmcr_el0";
    /// Which counters EL0 may use (any PMUv3).
    pmuserenr_el0 PMUSERENR_EL0 "pmuserenr_el0";
    /// Selected counter (any PMUv3).
    pmselr_el0 PMSELR_EL0 "pmselr_el0";
    /// Extended hypervisor configuration (FEAT_HCX).
    hcrx_el2 HCRX_EL2 "S3_4_C1_C2_2";
    /// Fine-grained traps of register reads (FEAT_FGT).
    hfgrtr_el2 HFGRTR_EL2 "S3_4_C1_C1_4";
    /// Fine-grained traps of register writes (FEAT_FGT).
    hfgwtr_el2 HFGWTR_EL2 "S3_4_C1_C1_5";
    /// Fine-grained traps of instructions (FEAT_FGT).
    hfgitr_el2 HFGITR_EL2 "S3_4_C1_C1_6";
    /// Fine-grained traps of debug register reads (FEAT_FGT).
    hdfgrtr_el2 HDFGRTR_EL2 "S3_4_C3_C1_4";
    /// Fine-grained traps of debug register writes (FEAT_FGT).
    hdfgwtr_el2 HDFGWTR_EL2 "S3_4_C3_C1_5";
    /// Memory partitioning of EL2 and traps of it (FEAT_MPAM).
    mpam2_el2 MPAM2_EL2 "S3_4_C10_C5_0";
    /// Second thread pointer of EL0 (FEAT_SME); EL1 reaches it where there are no fine-grained traps.
    tpidr2_el0 TPIDR2_EL0 "S3_3_C13_C0_5";
    /// System register interface of the GIC for EL2 and below (GICv3).
    icc_sre_el2 ICC_SRE_EL2 "S3_4_C12_C9_5";
    /// Virtual interrupts (GICv3).
    ich_hcr_el2 ICH_HCR_EL2 "S3_4_C12_C11_0";
    /// What the virtual CPU interface has (GICv3).
    ich_vtr_el2 ICH_VTR_EL2 "S3_4_C12_C11_1";
    /// Virtual machine control (GICv3).
    ich_vmcr_el2 ICH_VMCR_EL2 "S3_4_C12_C11_7";
    /// Memory model features, fourth register.
    id_aa64mmfr3_el1 ID_AA64MMFR3_EL1 "S3_0_C0_C7_3";
    /// Processor features, third register.
    id_aa64pfr2_el1 ID_AA64PFR2_EL1 "S3_0_C0_C4_2";
    /// Instruction features, third register.
    id_aa64isar2_el1 ID_AA64ISAR2_EL1 "S3_0_C0_C6_2";
    /// Fault address of an abort at stage 2.
    hpfar_el2 HPFAR_EL2 "hpfar_el2";
    /// What DISR_EL1 names while SErrors are routed to EL2 (FEAT_RAS).
    vdisr_el2 VDISR_EL2 "S3_4_C12_C1_1";
    /// Syndrome of a virtual SError (FEAT_RAS).
    vsesr_el2 VSESR_EL2 "S3_4_C5_C2_3";
    /// Whether EL2 is traced (FEAT_TRF).
    trfcr_el2 TRFCR_EL2 "S3_4_C1_C2_1";
    /// Which levels are traced below EL2 (FEAT_TRF).
    trfcr_el1 TRFCR_EL1 "S3_0_C1_C2_1";
    /// More fine-grained traps of register reads (FEAT_FGT2).
    hfgrtr2_el2 HFGRTR2_EL2 "S3_4_C3_C1_2";
    /// More fine-grained traps of register writes (FEAT_FGT2).
    hfgwtr2_el2 HFGWTR2_EL2 "S3_4_C3_C1_3";
    /// More fine-grained traps of instructions (FEAT_FGT2).
    hfgitr2_el2 HFGITR2_EL2 "S3_4_C3_C1_7";
    /// More fine-grained traps of debug register reads (FEAT_FGT2).
    hdfgrtr2_el2 HDFGRTR2_EL2 "S3_4_C3_C1_0";
    /// More fine-grained traps of debug register writes (FEAT_FGT2).
    hdfgwtr2_el2 HDFGWTR2_EL2 "S3_4_C3_C1_1";
}

macro_rules! numbered {
    ($number:expr, $value:expr, $($n:literal $encoding:literal)*) => {
        match $number {
            $($n => {
                // SAFETY: a list register of the GIC's virtual interface; while ICH_HCR_EL2.En is 0 it has
                // no effect, and it holds no address.
                unsafe {
                    core::arch::asm!(
                        concat!("msr ", $encoding, ", {}"), in(reg) $value, options(nomem, nostack)
                    );
                }
            })*
            _ => {}
        }
    };
}

/// Writes ICH_LR<`number`>_EL2 (GICv3; `number` at most ICH_VTR_EL2.ListRegs). A number beyond 15 is no
/// register, and nothing happens.
pub fn write_list_register(number: u64, value: u64) {
    numbered!(number, value,
        0 "S3_4_C12_C12_0" 1 "S3_4_C12_C12_1" 2 "S3_4_C12_C12_2" 3 "S3_4_C12_C12_3"
        4 "S3_4_C12_C12_4" 5 "S3_4_C12_C12_5" 6 "S3_4_C12_C12_6" 7 "S3_4_C12_C12_7"
        8 "S3_4_C12_C13_0" 9 "S3_4_C12_C13_1" 10 "S3_4_C12_C13_2" 11 "S3_4_C12_C13_3"
        12 "S3_4_C12_C13_4" 13 "S3_4_C12_C13_5" 14 "S3_4_C12_C13_6" 15 "S3_4_C12_C13_7"
    );
}
