//! Exceptions that EL2 delivers to a guest, at the moment when its EL1 registers are in memory.
//!
//! The rule is [`crate::exception`]; this applies it to a [`Context`], `arch::exceptions` to the host's
//! registers.

use crate::exception::{Interrupted, StateFeatures, take_external_abort, take_undefined};
use crate::machine::IdRegister;
use crate::vm::context::Context;

/// An exception for EL1, with what of the syndrome that EL2 saw (ESR_EL2) it depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// The instruction is UNDEFINED.
    Undefined,
    /// The access ended in a synchronous external abort.
    ExternalAbort {
        /// Tells fetch from access, and direction.
        esr: u64,
        /// The virtual address.
        far: u64,
    },
}

impl Exception {
    /// Makes the vCPU take it. The vCPU is not loaded: its registers are those in `context`.
    pub fn deliver(self, context: &mut Context, features: StateFeatures) {
        let at = Interrupted {
            pc: context.pc,
            pstate: context.pstate,
            sctlr: context.el1.sctlr_el1,
            vbar: context.el1.vbar_el1,
        };
        let taken = match self {
            Self::Undefined => take_undefined(at, features),
            Self::ExternalAbort { esr, far } => {
                context.el1.far_el1 = far;
                take_external_abort(at, esr, features)
            }
        };
        context.pc = taken.pc;
        context.pstate = taken.pstate;
        context.el1.elr_el1 = taken.elr_el1;
        context.el1.spsr_el1 = taken.spsr_el1;
        context.el1.esr_el1 = taken.esr_el1;
    }
}

/// Which bits of the processor state a guest has: the machine's, without memory tagging and NMIs, which
/// guests do not see.
pub fn guest_state(hardware: impl Fn(IdRegister) -> u64) -> StateFeatures {
    let has = |register, shift: u32| hardware(register) >> shift & 0xf != 0;
    StateFeatures {
        pan: has(IdRegister::Mmfr1, 20),
        ssbs: has(IdRegister::Pfr1, 4),
        dit: has(IdRegister::Pfr0, 48),
        tco: false,
        nmi: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::context::pstate;

    const IL: u64 = 1 << 25;

    fn guest(mode: u64) -> Context {
        let mut context = Context { pc: 0x8000_1234, pstate: mode | pstate::NZCV, ..Context::default() };
        context.el1.vbar_el1 = 0x8000_8000;
        context
    }

    #[test]
    fn an_undefined_instruction_enters_the_vector_of_its_level() {
        for (mode, offset) in [(pstate::EL1T, 0), (pstate::EL1H, 0x200), (pstate::EL0T, 0x400)] {
            let mut context = guest(mode);
            Exception::Undefined.deliver(&mut context, StateFeatures::default());
            assert_eq!(context.pc, 0x8000_8000 + offset);
            assert_eq!((context.el1.elr_el1, context.el1.spsr_el1), (0x8000_1234, mode | pstate::NZCV));
            assert_eq!(context.el1.esr_el1, IL);
            assert_eq!(context.pstate, pstate::NZCV | pstate::DAIF | pstate::EL1H);
        }
    }

    #[test]
    fn an_external_abort_names_its_address() {
        let mut context = guest(pstate::EL1H);
        let store = 0x24 << 26 | IL | 1 << 6 | 0b0111;
        Exception::ExternalAbort { esr: store, far: 0x55 }.deliver(&mut context, StateFeatures::default());
        assert_eq!((context.el1.esr_el1 >> 26, context.el1.esr_el1 & 0x3f), (0x25, 0b01_0000));
        assert_eq!(context.el1.far_el1, 0x55);
    }

    #[test]
    fn a_guest_has_no_tag_check_override() {
        let features = guest_state(|_| u64::MAX);
        assert!(features.pan && features.ssbs && features.dit && !features.tco && !features.nmi);
        assert_eq!(guest_state(|_| 0), StateFeatures::default());
    }
}
