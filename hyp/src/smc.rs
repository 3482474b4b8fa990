//! The host's SMCs: a closed list. What is not on it is answered NOT_SUPPORTED and never reaches EL3.
//!
//! Pure decoding; see [`crate::psci`] for the power calls.

#![forbid(unsafe_code)]

use crate::psci::{self, Answer};
use abi::smccc::{self, FunctionId};

/// Registers of a call that any function on the list looks at: x0 to x3.
pub type Words = [u64; 4];

/// Decodes an SMC of the host. `immediate` is that of the instruction.
pub fn answer(words: Words, immediate: u16) -> Answer {
    let [x0, a, b, c] = words;
    if immediate != 0 {
        return Answer::Value(smccc::NOT_SUPPORTED);
    }
    let value = match FunctionId::from_x0(x0).number() {
        smccc::VERSION => smccc::VERSION_1_1,
        smccc::ARCH_FEATURES => arch_features(a as u32),
        function => {
            return psci::answer(function, [a, b, c]).unwrap_or(Answer::Value(smccc::NOT_SUPPORTED));
        }
    };
    Answer::Value(value)
}

/// `SMCCC_ARCH_FEATURES`: Deed has the two mandatory functions and no workaround to offer.
fn arch_features(function: u32) -> u64 {
    match function {
        smccc::VERSION | smccc::ARCH_FEATURES => smccc::SUCCESS,
        _ => smccc::NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi::psci::{SYSTEM_OFF, VERSION, VERSION_1_1};

    const REFUSED: Answer = Answer::Value(smccc::NOT_SUPPORTED);

    #[test]
    fn a_call_with_an_immediate_is_no_call() {
        let words = [u64::from(SYSTEM_OFF), 0, 0, 0];
        assert_eq!(answer(words, 1), REFUSED);
        assert_ne!(answer(words, 0), REFUSED);
    }

    #[test]
    fn what_is_not_on_the_list_is_not_supported() {
        // TRNG, SDEI, FF-A, a vendor's service, and Deed's own host calls, which are HVCs.
        for function in [0x8400_0050, 0xc400_0020, 0x8400_0063, 0x8200_0000, abi::host::FIRST] {
            assert_eq!(answer([u64::from(function), 0, 0, 0], 0), REFUSED, "{function:#x}");
        }
    }

    #[test]
    fn the_upper_half_of_x0_is_no_part_of_the_function() {
        let words = [0xffff_ffff_0000_0000 | u64::from(VERSION), 0, 0, 0];
        assert_eq!(answer(words, 0), Answer::Value(VERSION_1_1));
    }

    #[test]
    fn only_the_two_discovery_calls_are_architectural_features() {
        let features = |function: u32| answer([u64::from(smccc::ARCH_FEATURES), function.into(), 0, 0], 0);
        assert_eq!(features(smccc::VERSION), Answer::Value(smccc::SUCCESS));
        // ARCH_WORKAROUND_1 to 3.
        for function in [0x8000_8000, 0x8000_7fff, 0x8000_3fff] {
            assert_eq!(features(function), REFUSED);
        }
    }
}
