//! The host's power calls (PSCI 1.1, DEN 0022): answered here, or relayed. What turns the machine off or resets it is
//! relayed only after every page that a protected guest still owns is wiped (invariant I4); what starts a CPU, only with
//! an entry of EL2's own ([`crate::cpus`]).
//!
//! Pure decoding: [`answer`] says what is to be done, `arch` does it.

#![forbid(unsafe_code)]

use crate::cpus::Start;
use abi::{psci, smccc};

/// What a call amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Return this in x0.
    Value(u64),
    /// Ask the firmware in the host's stead, and return what comes of it.
    Power(Power),
    /// Call the firmware with the host's x0 to x3, and return the four that it leaves.
    Firmware,
    /// End of the machine's run: wipe, say the verdict, and relay. Does not return.
    End(End),
}

/// What the host wants of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// `CPU_ON`.
    On {
        /// Affinity of the CPU.
        target: u64,
        /// Where it is to begin.
        start: Start,
    },
    /// `CPU_OFF` of the calling CPU.
    Off,
    /// `CPU_SUSPEND` of the calling CPU.
    Suspend {
        /// How deep, in the firmware's own words.
        state: u32,
        /// Where it is to begin if its state is lost.
        start: Start,
    },
    /// `AFFINITY_INFO` of one CPU.
    Info {
        /// Its affinity.
        target: u64,
    },
    /// `PSCI_FEATURES` of `CPU_SUSPEND`.
    SuspendFeatures,
}

/// Whether a CPU loses its registers in a state of `CPU_SUSPEND`, so that it comes up anew: StateType, whose place the
/// flags say that `PSCI_FEATURES` returns for `CPU_SUSPEND` (DEN 0022, 5.4.2 and 5.15.2).
pub fn loses_registers(state: u32, flags: u64) -> bool {
    const EXTENDED_FORMAT: u64 = 1 << 1;
    let state_type = if flags & EXTENDED_FORMAT == 0 { 16 } else { 30 };
    state >> state_type & 1 != 0
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

/// Decodes a call in PSCI's range of the standard service calls. `None` means no such function, or none that the host
/// may have.
pub fn answer(function: u32, arguments: [u64; 3]) -> Option<Answer> {
    let [first, second, third] = arguments;
    let value = match function {
        psci::VERSION => psci::VERSION_1_1,
        psci::FEATURES => match first as u32 {
            psci::CPU_SUSPEND => return Some(Answer::Power(Power::SuspendFeatures)),
            function => features(function),
        },
        psci::MIGRATE_INFO_TYPE => psci::MIGRATE_NOT_REQUIRED,
        psci::CPU_ON => {
            let start = Start { entry: second, context: third };
            return Some(Answer::Power(Power::On { target: first, start }));
        }
        psci::CPU_OFF => return Some(Answer::Power(Power::Off)),
        psci::CPU_SUSPEND => {
            let start = Start { entry: second, context: third };
            return Some(Answer::Power(Power::Suspend { state: first as u32, start }));
        }
        // Whole clusters need not be known from PSCI 1.0 on.
        psci::AFFINITY_INFO if second != 0 => psci::INVALID_PARAMETERS,
        psci::AFFINITY_INFO => return Some(Answer::Power(Power::Info { target: first })),
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
        | psci::CPU_ON
        | psci::CPU_OFF
        | psci::AFFINITY_INFO
        | psci::SYSTEM_OFF
        | psci::SYSTEM_RESET
        | smccc::VERSION => psci::SUCCESS,
        _ => psci::NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Start = Start { entry: 0x4008_0000, context: 9 };

    #[test]
    fn features_lists_exactly_what_is_answered() {
        let numbers = (0x8400_0000..0x8400_0020).chain(0xc400_0000..0xc400_0020);
        for number in numbers {
            let answered = answer(number, [0; 3]).is_some();
            let listed = answer(psci::FEATURES, [number.into(), 0, 0]);
            let is_listed = match listed {
                Some(Answer::Value(value)) => value == psci::SUCCESS,
                // The firmware knows how it suspends.
                other => other == Some(Answer::Power(Power::SuspendFeatures)) && number == psci::CPU_SUSPEND,
            };
            assert_eq!(is_listed, answered, "{number:#x}");
        }
        assert_eq!(features(smccc::VERSION), psci::SUCCESS);
    }

    #[test]
    fn calls_that_start_a_cpu_name_it_and_where_it_begins() {
        let words = [0x1_0203, START.entry, START.context];
        let on = Power::On { target: 0x1_0203, start: START };
        assert_eq!(answer(psci::CPU_ON, words), Some(Answer::Power(on)));
        let suspend = Power::Suspend { state: 0x1_0203, start: START };
        assert_eq!(answer(psci::CPU_SUSPEND, words), Some(Answer::Power(suspend)));
        assert_eq!(answer(psci::CPU_OFF, words), Some(Answer::Power(Power::Off)));
    }

    #[test]
    fn the_type_of_a_suspended_state_stands_where_the_format_has_it() {
        for (state, original, extended) in
            [(0, false, false), (1 << 16, true, false), (1 << 30, false, true), (u32::MAX, true, true)]
        {
            assert_eq!(loses_registers(state, 0), original, "{state:#x}");
            // OS-initiated mode changes nothing.
            assert_eq!(loses_registers(state, 0b11), extended, "{state:#x}");
        }
    }

    #[test]
    fn functions_that_deed_does_not_relay_are_not_there() {
        // CPU_ON, CPU_SUSPEND and AFFINITY_INFO of 32 bits, SYSTEM_RESET2, SYSTEM_SUSPEND.
        for number in [0x8400_0001, 0x8400_0003, 0x8400_0004, psci::SYSTEM_RESET2, 0xc400_000e] {
            assert_eq!(answer(number, [0; 3]), None, "{number:#x}");
        }
    }

    #[test]
    fn the_affinity_of_one_cpu_can_be_asked_for_and_that_of_a_cluster_cannot() {
        let info = |target, level| answer(psci::AFFINITY_INFO, [target, level, 0]);
        assert_eq!(info(3, 0), Some(Answer::Power(Power::Info { target: 3 })));
        assert_eq!(info(3, 1), Some(Answer::Value(psci::INVALID_PARAMETERS)));
    }

    #[test]
    fn an_end_is_relayed_by_the_call_that_asked_for_it() {
        for (end, name) in [(End::Off, "off"), (End::Reset, "reset")] {
            assert_eq!(answer(end.function(), [0; 3]), Some(Answer::End(end)));
            assert_eq!(end.name(), name);
        }
    }

    #[test]
    fn off_and_reset_end_the_run() {
        assert_eq!(answer(psci::SYSTEM_OFF, [0; 3]), Some(Answer::End(End::Off)));
        assert_eq!(answer(psci::SYSTEM_RESET, [0; 3]), Some(Answer::End(End::Reset)));
    }
}
