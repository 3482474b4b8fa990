//! Exceptions that EL2 hands to EL1: the state in which EL1 finds itself.
//!
//! Pure: the registers go in and come out as values, so that every rule is tested on the build machine.

#![forbid(unsafe_code)]

use crate::vm::context::pstate;

/// ESR_ELx.IL: the trapped instruction has 32 bits; 1 too for every class and abort that tells of no instruction
/// (Arm ARM, ESR_EL1), and EL2 injects no others.
const IL: u64 = 1 << 25;
/// ISS bit FnV of an external abort: FAR holds no address.
const FAR_NOT_VALID: u64 = 1 << 10;
const EC_SHIFT: u32 = 26;
const EC_UNKNOWN: u64 = 0x00;
const EC_INSTRUCTION_ABORT_LOWER: u64 = 0x20;
const EC_INSTRUCTION_ABORT_SAME: u64 = 0x21;
const EC_DATA_ABORT_LOWER: u64 = 0x24;
const EC_DATA_ABORT_SAME: u64 = 0x25;
const WNR: u64 = 1 << 6;
/// Set in every abort that EL2 injects: a host can tell it from one of its memory system.
pub const S1PTW: u64 = 1 << 7;
/// DFSC or IFSC: synchronous external abort, not on a table walk.
pub const SYNCHRONOUS_EXTERNAL_ABORT: u64 = 0b01_0000;

/// Where EL1's vectors are, from VBAR_EL1, for each origin of a synchronous exception.
const VECTOR_SP0: u64 = 0x000;
const VECTOR_SPX: u64 = 0x200;
const VECTOR_LOWER_AARCH64: u64 = 0x400;
const VECTOR_LOWER_AARCH32: u64 = 0x600;

/// Bits of SCTLR_EL1 that shape the processor state of an exception taken to EL1.
mod sctlr {
    pub(super) const SPAN: u64 = 1 << 23;
    pub(super) const DSSBS: u64 = 1 << 44;
    pub(super) const SPINTMASK: u64 = 1 << 62;
    pub(super) const NMI: u64 = 1 << 61;
}
/// PSTATE.ALLINT in SPSR_EL2 (FEAT_NMI).
const ALLINT: u64 = 1 << 13;
/// PSTATE.DIT in the SPSR of an exception from AArch32, where bit 24 is another's.
const AARCH32_DIT: u64 = 1 << 21;

/// Which bits of the processor state this CPU has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateFeatures {
    /// FEAT_PAN.
    pub pan: bool,
    /// FEAT_SSBS.
    pub ssbs: bool,
    /// FEAT_DIT.
    pub dit: bool,
    /// FEAT_MTE2.
    pub tco: bool,
    /// FEAT_NMI.
    pub nmi: bool,
}

/// What the exception finds.
#[derive(Clone, Copy, Debug)]
pub struct Interrupted {
    /// ELR_EL2: the preferred return address.
    pub pc: u64,
    /// SPSR_EL2.
    pub pstate: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// VBAR_EL1.
    pub vbar: u64,
}

impl Interrupted {
    /// Whether the exception comes from EL0.
    pub fn from_el0(&self) -> bool {
        // In AArch32 M[3:0] = 0 is User mode; the host's EL1 is AArch64, so there is no other.
        self.pstate & pstate::AARCH32 != 0 || self.pstate & pstate::MODE == pstate::EL0T
    }
}

/// What EL1 finds: values of its registers, and where it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// ELR_EL2: an address in EL1's vectors.
    pub pc: u64,
    /// SPSR_EL2.
    pub pstate: u64,
    /// ELR_EL1.
    pub elr_el1: u64,
    /// SPSR_EL1.
    pub spsr_el1: u64,
    /// ESR_EL1.
    pub esr_el1: u64,
}

/// Takes a synchronous exception to EL1 (Arm ARM, pseudocode `AArch64.TakeException`).
pub fn take(at: Interrupted, syndrome: u64, features: StateFeatures) -> Taken {
    let offset = if at.pstate & pstate::AARCH32 != 0 {
        VECTOR_LOWER_AARCH32
    } else {
        match at.pstate & pstate::MODE {
            pstate::EL0T => VECTOR_LOWER_AARCH64,
            pstate::EL1T => VECTOR_SP0,
            _ => VECTOR_SPX,
        }
    };
    Taken {
        pc: at.vbar.wrapping_add(offset),
        pstate: new_pstate(at, features),
        elr_el1: at.pc,
        spsr_el1: at.pstate,
        esr_el1: syndrome,
    }
}

/// Takes the synchronous external abort that answers an access to a page that is not the host's: origin,
/// direction and address as the access had them, S1PTW as EL2's mark
/// (docs/memory-ownership.md, What the host sees of an illegal access).
pub fn take_external_abort(at: Interrupted, esr_el2: u64, features: StateFeatures) -> Taken {
    let data = matches!(esr_el2 >> EC_SHIFT & 0x3f, EC_DATA_ABORT_LOWER | EC_DATA_ABORT_SAME);
    let class = match (data, at.from_el0()) {
        (true, true) => EC_DATA_ABORT_LOWER,
        (true, false) => EC_DATA_ABORT_SAME,
        (false, true) => EC_INSTRUCTION_ABORT_LOWER,
        (false, false) => EC_INSTRUCTION_ABORT_SAME,
    };
    let kept = esr_el2 & if data { WNR | FAR_NOT_VALID } else { FAR_NOT_VALID };
    take(at, class << EC_SHIFT | IL | kept | S1PTW | SYNCHRONOUS_EXTERNAL_ABORT, features)
}

/// Takes the exception of an instruction that does not exist for EL1.
pub fn take_undefined(at: Interrupted, features: StateFeatures) -> Taken {
    take(at, EC_UNKNOWN << EC_SHIFT | IL, features)
}

fn new_pstate(at: Interrupted, features: StateFeatures) -> u64 {
    let aarch32 = at.pstate & pstate::AARCH32 != 0;
    let mut new = pstate::EL1H | pstate::DAIF | at.pstate & pstate::NZCV;
    let dit = if aarch32 { AARCH32_DIT } else { pstate::DIT };
    if features.dit && at.pstate & dit != 0 {
        new |= pstate::DIT;
    }
    if features.pan && (at.pstate & pstate::PAN != 0 || at.sctlr & sctlr::SPAN == 0) {
        new |= pstate::PAN;
    }
    if features.ssbs && at.sctlr & sctlr::DSSBS != 0 {
        new |= pstate::SSBS;
    }
    if features.tco {
        new |= pstate::TCO;
    }
    if features.nmi && at.sctlr & sctlr::NMI != 0 && at.sctlr & sctlr::SPINTMASK == 0 {
        new |= ALLINT;
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: StateFeatures = StateFeatures { pan: true, ssbs: true, dit: true, tco: true, nmi: true };
    const VBAR: u64 = 0xffff_8000_0001_0800;
    const LOAD: u64 = EC_DATA_ABORT_LOWER << EC_SHIFT | IL | 0b00_0110;
    const FETCH: u64 = EC_INSTRUCTION_ABORT_LOWER << EC_SHIFT | IL | 0b00_0111;

    fn at(pstate: u64, sctlr: u64) -> Interrupted {
        Interrupted { pc: 0x40_1000, pstate, sctlr, vbar: VBAR }
    }

    #[test]
    fn an_abort_names_its_origin_in_class_and_vector() {
        let cases = [
            (pstate::EL0T, LOAD, 0x24, 0x400),
            (pstate::EL0T, FETCH, 0x20, 0x400),
            (pstate::EL1H, LOAD, 0x25, 0x200),
            (pstate::EL1H, FETCH, 0x21, 0x200),
            (pstate::EL1T, LOAD, 0x25, 0x000),
            (pstate::AARCH32 | pstate::EL0T, LOAD, 0x24, 0x600),
        ];
        for (state, esr, class, offset) in cases {
            let taken = take_external_abort(at(state, 0), esr, ALL);
            assert_eq!(taken.esr_el1 >> EC_SHIFT, class);
            assert_eq!(taken.pc, VBAR + offset);
            assert_eq!((taken.elr_el1, taken.spsr_el1), (0x40_1000, state));
            assert_eq!(taken.esr_el1 & 0x3f, SYNCHRONOUS_EXTERNAL_ABORT);
            assert_ne!(taken.esr_el1 & S1PTW, 0);
        }
    }

    #[test]
    fn an_abort_keeps_its_direction_and_nothing_else() {
        let syndrome_of_a_store = LOAD | WNR | 1 << 24 | 0b11 << 22 | 5 << 16;
        let taken = take_external_abort(at(pstate::EL1H, 0), syndrome_of_a_store, ALL);
        assert_eq!(taken.esr_el1, 0x25 << EC_SHIFT | IL | WNR | S1PTW | SYNCHRONOUS_EXTERNAL_ABORT);
        let load = take_external_abort(at(pstate::EL0T, 0), LOAD, ALL);
        assert_eq!(load.esr_el1 & WNR, 0);
    }

    #[test]
    fn what_is_injected_has_the_length_that_its_class_prescribes() {
        assert_eq!(take_undefined(at(pstate::EL1H, 0), ALL).esr_el1, EC_UNKNOWN << EC_SHIFT | IL);
        // A T32 instruction of 16 bits of an EL0 program in AArch32, and one of 32 bits.
        for length in [0, IL] {
            for trap in [LOAD, FETCH] {
                let abort = take_external_abort(at(pstate::AARCH32, 0), trap & !IL | length, ALL);
                assert_eq!(abort.esr_el1 & IL, IL, "an abort without instruction syndrome");
            }
        }
    }

    #[test]
    fn the_new_state_is_el1h_masked_and_keeps_flags_and_timing() {
        let flags = 0b1010 << 28;
        let old = flags | pstate::DIT | pstate::UAO | 1 << 21 | 1 << 20 | 0b11 << 10;
        let taken = take_undefined(at(old, sctlr::SPAN), StateFeatures { tco: false, ..ALL });
        assert_eq!(taken.pstate, pstate::EL1H | pstate::DAIF | flags | pstate::DIT);
    }

    #[test]
    fn pan_is_set_unless_span_says_to_keep_it() {
        let pan =
            |state, control, features| take_undefined(at(state, control), features).pstate & pstate::PAN;
        assert_ne!(pan(0, 0, ALL), 0);
        assert_eq!(pan(0, sctlr::SPAN, ALL), 0);
        assert_ne!(pan(pstate::PAN, sctlr::SPAN, ALL), 0);
        assert_eq!(pan(0, 0, StateFeatures { pan: false, ..ALL }), 0);
    }

    #[test]
    fn bits_of_absent_features_stay_zero() {
        let everything = sctlr::DSSBS | sctlr::NMI;
        let taken = take_undefined(at(!pstate::AARCH32, everything), StateFeatures::default());
        assert_eq!(taken.pstate, pstate::EL1H | pstate::DAIF | pstate::NZCV);
        let taken = take_undefined(at(0, everything), ALL);
        assert_eq!(taken.pstate & (pstate::SSBS | ALLINT | pstate::TCO), pstate::SSBS | ALLINT | pstate::TCO);
        let masked = take_undefined(at(0, everything | sctlr::SPINTMASK), ALL);
        assert_eq!(masked.pstate & ALLINT, 0);
    }

    #[test]
    fn timing_of_an_aarch32_program_is_found_where_aarch32_keeps_it() {
        let state = pstate::AARCH32 | AARCH32_DIT;
        assert_ne!(take_undefined(at(state, 0), ALL).pstate & pstate::DIT, 0);
        assert_eq!(take_undefined(at(pstate::AARCH32 | pstate::DIT, 0), ALL).pstate & pstate::DIT, 0);
    }
}
