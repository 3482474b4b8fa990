//! The host's power calls (PSCI 1.1, DEN 0022): answered here, and only what turns the machine off or resets
//! it is relayed, after every page that a protected guest still owns is wiped (invariant I4).
//!
//! Pure decoding: [`answer`] says what is to be done, `arch` does it.

#![forbid(unsafe_code)]

use abi::{psci, smccc};

/// What a call amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Return this in x0.
    Value(u64),
    /// End of the machine's run: wipe, say the verdict, and relay. Does not return.
    End(End),
}

/// How the machine's run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `SYSTEM_OFF`.
    Off,
    /// `SYSTEM_RESET`.
    Reset,
}

impl End {
    /// The function to relay.
    pub const fn function(self) -> u32 {
        match self {
            Self::Off => psci::SYSTEM_OFF,
            Self::Reset => psci::SYSTEM_RESET,
        }
    }

    /// Its name in the verdict line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Reset => "reset",
        }
    }
}

/// Affinity fields of MPIDR_EL1: Aff3 in bits 39:32, Aff2 to Aff0 in bits 23:0.
pub const AFFINITY: u64 = 0xff_00ff_ffff;

/// Decodes a call in PSCI's range of the standard service calls. `own` is MPIDR_EL1 of the calling CPU;
/// `None` means no such function, or none that the host may have.
pub fn answer(function: u32, arguments: [u64; 3], own: u64) -> Option<Answer> {
    let value = match function {
        psci::VERSION => psci::VERSION_1_1,
        psci::FEATURES => features(arguments[0] as u32),
        psci::MIGRATE_INFO_TYPE => psci::MIGRATE_NOT_REQUIRED,
        psci::AFFINITY_INFO => affinity_info(arguments[0], arguments[1], own),
        psci::SYSTEM_OFF => return Some(Answer::End(End::Off)),
        psci::SYSTEM_RESET => return Some(Answer::End(End::Reset)),
        _ => return None,
    };
    Some(Answer::Value(value))
}

/// `PSCI_FEATURES`: 0 for a function that is there and has no flags.
fn features(function: u32) -> u64 {
    match function {
        psci::VERSION
        | psci::FEATURES
        | psci::MIGRATE_INFO_TYPE
        | psci::AFFINITY_INFO
        | psci::SYSTEM_OFF
        | psci::SYSTEM_RESET
        | smccc::VERSION => psci::SUCCESS,
        _ => psci::NOT_SUPPORTED,
    }
}

/// `AFFINITY_INFO` of the only CPU that runs.
fn affinity_info(target: u64, lowest_level: u64, own: u64) -> u64 {
    if lowest_level == 0 && target == own & AFFINITY { psci::AFFINITY_ON } else { psci::INVALID_PARAMETERS }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u64 = 0x8000_0000;

    #[test]
    fn features_lists_exactly_what_is_answered() {
        let numbers = (0x8400_0000..0x8400_0020).chain(0xc400_0000..0xc400_0020);
        for number in numbers {
            let answered = answer(number, [0; 3], OWN).is_some();
            assert_eq!(features(number) == psci::SUCCESS, answered, "{number:#x}");
        }
        assert_eq!(features(smccc::VERSION), psci::SUCCESS);
    }

    #[test]
    fn functions_that_start_or_suspend_a_cpu_are_not_there() {
        for number in [psci::CPU_ON, psci::CPU_OFF, psci::CPU_SUSPEND, psci::SYSTEM_RESET2] {
            assert_eq!(answer(number, [0; 3], OWN), None, "{number:#x}");
        }
    }

    #[test]
    fn the_calling_cpu_is_on_and_no_other_is_known() {
        let info = |target, level| answer(psci::AFFINITY_INFO, [target, level, 0], OWN | 3);
        assert_eq!(info(3, 0), Some(Answer::Value(psci::AFFINITY_ON)));
        assert_eq!(info(2, 0), Some(Answer::Value(psci::INVALID_PARAMETERS)));
        assert_eq!(info(3, 1), Some(Answer::Value(psci::INVALID_PARAMETERS)));
    }

    #[test]
    fn an_end_is_relayed_by_the_call_that_asked_for_it() {
        for (end, name) in [(End::Off, "off"), (End::Reset, "reset")] {
            assert_eq!(answer(end.function(), [0; 3], OWN), Some(Answer::End(end)));
            assert_eq!(end.name(), name);
        }
    }

    #[test]
    fn off_and_reset_end_the_run() {
        assert_eq!(answer(psci::SYSTEM_OFF, [0; 3], OWN), Some(Answer::End(End::Off)));
        assert_eq!(answer(psci::SYSTEM_RESET, [0; 3], OWN), Some(Answer::End(End::Reset)));
    }
}
