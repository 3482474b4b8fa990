//! Power states of vCPUs, and a guest's PSCI (DEN 0022, version 1.1) over them.
//!
//! The states live in the VM and are guarded by its lock. Together with the entry points that a guest gives
//! in `CPU_ON` they decide where a vCPU starts: the host chooses the entry of one boot vCPU, once, and no
//! other (docs/hypercalls.md, PSCI for guests). That a VM has been booted can be told from the states
//! themselves, since a vCPU that was ever on never returns to [`Power::Off`].

use abi::psci;

/// Whether a vCPU may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Power {
    /// It has never been on.
    #[default]
    Off,
    /// It turned itself off. To the guest there is no difference to [`Power::Off`].
    Stopped,
    /// It was given a [`Start`] and has not run since.
    Pending,
    /// It runs, or could.
    On,
}

/// Where a vCPU starts that the guest has turned on. A register of the guest's, and zeroed like one when it has been used
/// or the machine goes down: so it is not in the state, of which nobody could say that nothing is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Its first instruction.
    pub pc: u64,
    /// Its x0.
    pub context_id: u64,
}

/// Whether the boot vCPU may still be chosen: nothing of this VM was ever on.
pub fn is_fresh(states: &[Power]) -> bool {
    states.iter().all(|power| *power == Power::Off)
}

/// What a PSCI call means for the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The call returns this.
    Return(u64),
    /// The call returns success, and the host should run this vCPU, from there.
    TurnedOn(u64, Start),
    /// The calling vCPU is off.
    TurnedOff,
    /// The calling vCPU waits for an interrupt; then the call returns success.
    Standby,
    /// The VM ends.
    SystemOff,
    /// The VM ends, and the guest had wished for a new start.
    SystemReset,
}

/// What MPIDR_EL1 reads as on the vCPU with this index: bit 31 is RES1, affinity level 0 is the index.
pub const fn mpidr(index: u64) -> u64 {
    super::context::MPIDR_RES1 | index
}

/// The index of the vCPU that an affinity names, if there is one, in the format of MPIDR_EL1 without its flags.
fn target(affinity: u64) -> usize {
    usize::try_from(affinity).unwrap_or(usize::MAX)
}

/// Serves a PSCI call of vCPU `caller`. `states` are those of the vCPUs that exist, by index. `None` if the
/// function is none that Deed offers to guests.
pub fn call(function: u32, arguments: [u64; 3], caller: usize, states: &mut [Power]) -> Option<Outcome> {
    let [first, second, third] = arguments;
    Some(match function {
        psci::VERSION => Outcome::Return(psci::VERSION_1_1),
        psci::FEATURES => Outcome::Return(features(first as u32)),
        psci::MIGRATE_INFO_TYPE => Outcome::Return(psci::MIGRATE_NOT_REQUIRED),
        psci::CPU_ON => cpu_on(first, second, third, states),
        psci::CPU_OFF => {
            if let Some(state) = states.get_mut(caller) {
                *state = Power::Stopped;
            }
            Outcome::TurnedOff
        }
        // No power-down state exists: whatever state is asked for is a standby, which loses nothing.
        psci::CPU_SUSPEND => Outcome::Standby,
        psci::AFFINITY_INFO => Outcome::Return(affinity_info(first, second, states)),
        psci::SYSTEM_OFF => Outcome::SystemOff,
        psci::SYSTEM_RESET | psci::SYSTEM_RESET2 => Outcome::SystemReset,
        _ => return None,
    })
}

fn cpu_on(affinity: u64, pc: u64, context_id: u64, states: &mut [Power]) -> Outcome {
    let index = target(affinity);
    match states.get_mut(index) {
        None => Outcome::Return(psci::INVALID_PARAMETERS),
        Some(Power::On) => Outcome::Return(psci::ALREADY_ON),
        Some(Power::Pending) => Outcome::Return(psci::ON_PENDING),
        Some(_) if pc & 3 != 0 => Outcome::Return(psci::INVALID_ADDRESS),
        Some(state) => {
            *state = Power::Pending;
            Outcome::TurnedOn(index as u64, Start { pc, context_id })
        }
    }
}

fn affinity_info(affinity: u64, lowest_level: u64, states: &[Power]) -> u64 {
    // Affinity levels above 0 need not be supported from PSCI 1.0 on.
    if lowest_level != 0 {
        return psci::INVALID_PARAMETERS;
    }
    match states.get(target(affinity)) {
        None => psci::INVALID_PARAMETERS,
        Some(Power::On) => psci::AFFINITY_ON,
        Some(Power::Pending) => psci::AFFINITY_ON_PENDING,
        Some(Power::Off | Power::Stopped) => psci::AFFINITY_OFF,
    }
}

fn features(function: u32) -> u64 {
    match function {
        psci::VERSION
        | psci::FEATURES
        | psci::MIGRATE_INFO_TYPE
        | psci::CPU_ON
        | psci::CPU_OFF
        | psci::CPU_SUSPEND
        | psci::AFFINITY_INFO
        | psci::SYSTEM_OFF
        | psci::SYSTEM_RESET
        | psci::SYSTEM_RESET2
        | abi::smccc::VERSION => psci::SUCCESS,
        _ => psci::NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTED: [Power; 2] = [Power::On, Power::Off];

    #[test]
    fn a_second_cpu_on_finds_the_first_pending_and_then_on() {
        let mut states = BOOTED;
        let mut on = || call(psci::CPU_ON, [1, 0x8000_1000, 9], 0, &mut states);
        assert_eq!(on(), Some(Outcome::TurnedOn(1, Start { pc: 0x8000_1000, context_id: 9 })));
        assert_eq!(on(), Some(Outcome::Return(psci::ON_PENDING)));
        assert_eq!(states[1], Power::Pending);
        states[1] = Power::On;
        assert_eq!(call(psci::CPU_ON, [1, 0, 0], 0, &mut states), Some(Outcome::Return(psci::ALREADY_ON)));
    }

    #[test]
    fn cpu_on_of_an_affinity_that_names_no_vcpu_changes_nothing() {
        for affinity in [2, 0x100, 1 << 32, 1 << 31 | 1, u64::MAX] {
            let mut states = BOOTED;
            let outcome = call(psci::CPU_ON, [affinity, 0x8000_0000, 0], 0, &mut states);
            assert_eq!(outcome, Some(Outcome::Return(psci::INVALID_PARAMETERS)), "{affinity:#x}");
            assert_eq!(states, BOOTED);
        }
    }

    #[test]
    fn a_vcpu_that_was_on_never_counts_as_fresh_again() {
        let mut states = [Power::Off; 2];
        assert!(is_fresh(&states));
        states[0] = Power::On;
        assert_eq!(call(psci::CPU_OFF, [0; 3], 0, &mut states), Some(Outcome::TurnedOff));
        assert!(!is_fresh(&states));
        let info = call(psci::AFFINITY_INFO, [0; 3], 0, &mut states);
        assert_eq!(info, Some(Outcome::Return(psci::AFFINITY_OFF)));
    }

    #[test]
    fn features_names_exactly_what_is_served() {
        for function in (0x8400_0000..0x8400_0020).chain(0xc400_0000..0xc400_0020) {
            let served = call(function, [0; 3], 0, &mut BOOTED.clone()).is_some();
            assert_eq!(features(function) == psci::SUCCESS, served, "{function:#x}");
        }
    }

    #[test]
    fn affinity_levels_above_zero_are_refused() {
        let info = call(psci::AFFINITY_INFO, [0, 1, 0], 0, &mut BOOTED.clone());
        assert_eq!(info, Some(Outcome::Return(psci::INVALID_PARAMETERS)));
    }

    #[test]
    fn an_entry_that_is_no_instruction_address_turns_nothing_on() {
        for pc in [0x8000_0001, 0x8000_0002] {
            let mut states = BOOTED;
            let outcome = call(psci::CPU_ON, [1, pc, 0], 0, &mut states);
            assert_eq!(outcome, Some(Outcome::Return(psci::INVALID_ADDRESS)));
            assert_eq!(states, BOOTED);
        }
    }

    #[test]
    fn affinity_info_tells_on_off_pending_and_unknown_apart() {
        let mut states = [Power::On, Power::Off, Power::Pending, Power::Stopped];
        let expected = [
            psci::AFFINITY_ON,
            psci::AFFINITY_OFF,
            psci::AFFINITY_ON_PENDING,
            psci::AFFINITY_OFF,
            psci::INVALID_PARAMETERS,
        ];
        for (affinity, expected) in (0..).zip(expected) {
            let info = call(psci::AFFINITY_INFO, [affinity, 0, 0], 0, &mut states);
            assert_eq!(info, Some(Outcome::Return(expected)), "{affinity}");
        }
    }
}
