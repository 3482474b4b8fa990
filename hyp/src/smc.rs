//! The host's SMCs: a closed list. What is not on it is answered NOT_SUPPORTED and never reaches EL3. What Deed has nothing
//! to do with, and neither names memory nor changes who runs, is the firmware's: its workarounds for the CPU, and its
//! random numbers.
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
    let function = FunctionId::from_x0(x0).number();
    let value = match function {
        smccc::VERSION => smccc::VERSION_1_1,
        smccc::ARCH_FEATURES if is_workaround(a as u32) => return Answer::Firmware,
        smccc::ARCH_FEATURES => arch_features(a as u32),
        _ => match psci::answer(function, [a, b, c]) {
            Some(answer) => return answer,
            None if is_workaround(function) || is_random(function) => return Answer::Firmware,
            None => smccc::NOT_SUPPORTED,
        },
    };
    Answer::Value(value)
}

/// What firmware does for CPUs with known weaknesses. Not inlined: two ask.
#[inline(never)]
fn is_workaround(function: u32) -> bool {
    matches!(function, smccc::ARCH_WORKAROUND_1 | smccc::ARCH_WORKAROUND_2 | smccc::ARCH_WORKAROUND_3)
}

/// Random numbers, in both forms: of those that have only one the firmware says so.
fn is_random(function: u32) -> bool {
    const SMC64: u32 = 1 << 30;
    matches!(function & !SMC64, smccc::TRNG_VERSION..=smccc::TRNG_RND)
}

/// `SMCCC_ARCH_FEATURES`: Deed itself has the two mandatory functions.
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
        // SDEI, FF-A, a vendor's service, a function behind TRNG's, and Deed's own host calls, which are HVCs.
        for function in [0x8400_0054, 0x8400_004f, 0xc400_0020, 0x8400_0063, 0x8200_0000, abi::host::FIRST] {
            assert_eq!(answer([u64::from(function), 0, 0, 0], 0), REFUSED, "{function:#x}");
        }
    }

    #[test]
    fn the_upper_half_of_x0_is_no_part_of_the_function() {
        let words = [0xffff_ffff_0000_0000 | u64::from(VERSION), 0, 0, 0];
        assert_eq!(answer(words, 0), Answer::Value(VERSION_1_1));
    }

    #[test]
    fn of_features_deed_has_the_two_discovery_calls_and_the_firmware_the_workarounds() {
        let features = |function: u32| answer([u64::from(smccc::ARCH_FEATURES), function.into(), 7, 7], 0);
        assert_eq!(features(smccc::VERSION), Answer::Value(smccc::SUCCESS));
        // SMCCC_ARCH_SOC_ID.
        assert_eq!(features(0x8000_0002), REFUSED);
        for function in [0x8000_8000, 0x8000_7fff, 0x8000_3fff] {
            assert_eq!(features(function), Answer::Firmware, "{function:#x}");
        }
    }

    #[test]
    fn workarounds_and_random_numbers_are_the_firmwares_and_no_call_with_an_immediate_is() {
        let functions = [
            0x8000_8000,
            0x8000_7fff,
            0x8000_3fff,
            0x8400_0050,
            0x8400_0051,
            0x8400_0052,
            0x8400_0053,
            0xc400_0053,
        ];
        for function in functions {
            let words = [0xffff_ffff_0000_0000 | function, 1, 2, 3];
            assert_eq!(answer(words, 0), Answer::Firmware, "{function:#x}");
            assert_eq!(answer(words, 1), REFUSED, "{function:#x}");
        }
    }
}
