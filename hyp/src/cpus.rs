//! The machine's CPUs, as the host turns them on and off (PSCI 1.1, DEN 0022, 5.4 to 5.7).
//!
//! Owns for each CPU whether it runs the host, and where the host wants it to begin. The firmware is asked to start a CPU
//! at EL2, never at the host's entry; a CPU that comes up takes the host's entry from here.
//!
//! Invariant: a CPU begins in the host only where the host asked for it, and once for each time that it asked.
//!
//! One lock guards all of it, [`Lock::Cpus`], the last in the order. Firmware is called with it open, since the CPU that
//! firmware starts takes it.

#![forbid(unsafe_code)]

use crate::sync::{Lock, Mutex};
use abi::psci;
use arrayvec::ArrayVec;
use core::iter;

/// CPUs that Deed has stacks and fixmap slots for.
pub const MAX_CPUS: usize = 8;

/// Affinity fields of MPIDR_EL1: Aff3 in bits 39:32, Aff2 to Aff0 in bits 23:0.
pub const AFFINITY: u64 = 0xff_00ff_ffff;

/// Where a CPU begins in the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first instruction, a physical address of the host's.
    pub entry: u64,
    /// What x0 holds.
    pub context: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    /// The firmware has been asked to start it.
    OnPending(Start),
    On,
    /// It has asked to sleep, and begins anew if it loses its state meanwhile.
    Suspended(Start),
}

#[derive(Clone, Copy, Debug)]
struct Cpu {
    affinity: u64,
    state: State,
    /// How many times somebody has begun to turn it on: whose request a pending one is.
    requests: u64,
}

/// All CPUs. A CPU's index is the same for ever; that of the boot CPU is 0.
#[derive(Debug)]
pub struct Cpus {
    cpus: Mutex<ArrayVec<Cpu, MAX_CPUS>>,
}

impl Cpus {
    /// No CPUs: [`name`](Self::name) them before anything else.
    pub const fn none() -> Self {
        Self { cpus: Mutex::new(Lock::Cpus, ArrayVec::new_const()) }
    }

    /// Names the CPUs by their affinities: all are off but `boot`. Returns `false` if `boot` is none of them, or one is
    /// there twice, or there are more than [`MAX_CPUS`].
    pub fn name(&self, affinities: &[u64], boot: u64) -> bool {
        let mut cpus = self.cpus.lock();
        cpus.clear();
        let others = affinities.iter().copied().filter(|affinity| *affinity != boot);
        for affinity in iter::once(boot).chain(others) {
            let state = if affinity == boot { State::On } else { State::Off };
            let is_there = cpus.iter().any(|cpu| cpu.affinity == affinity);
            if is_there || cpus.try_push(Cpu { affinity, state, requests: 0 }).is_err() {
                return false;
            }
        }
        cpus.len() == affinities.len()
    }

    /// `CPU_ON`: notes where the CPU is to begin, and has `firmware` start the one with this index. Returns what the host
    /// gets.
    ///
    /// If the firmware refuses, the note goes, unless the CPU has come up all the same.
    pub fn turn_on(&self, target: u64, start: Start, firmware: impl FnOnce(usize) -> u64) -> u64 {
        let mut cpus = self.cpus.lock();
        let Some(index) = cpus.iter().position(|cpu| cpu.affinity == target) else {
            return psci::INVALID_PARAMETERS;
        };
        let Some(cpu) = cpus.get_mut(index) else { return psci::INTERNAL_FAILURE };
        match cpu.state {
            State::Off => {}
            State::OnPending(_) => return psci::ON_PENDING,
            State::On | State::Suspended(_) => return psci::ALREADY_ON,
        }
        cpu.requests = cpu.requests.wrapping_add(1);
        cpu.state = State::OnPending(start);
        let request = cpu.requests;
        drop(cpus);

        let result = firmware(index);
        if result != psci::SUCCESS {
            self.change(index, |cpu| {
                if cpu.requests == request && matches!(cpu.state, State::OnPending(_)) {
                    cpu.state = State::Off;
                }
            });
        }
        result
    }

    /// `CPU_OFF` of the calling CPU. `firmware` returns only if it refuses; then the CPU is still on.
    pub fn turn_off(&self, cpu: usize, firmware: impl FnOnce() -> u64) -> u64 {
        self.set(cpu, State::Off);
        let result = firmware();
        self.set(cpu, State::On);
        result
    }

    /// `CPU_SUSPEND` of the calling CPU. `firmware` returns if the CPU kept its state or was not suspended; otherwise it
    /// comes up anew, at `start`.
    pub fn suspend(&self, cpu: usize, start: Start, firmware: impl FnOnce() -> u64) -> u64 {
        self.set(cpu, State::Suspended(start));
        let result = firmware();
        self.set(cpu, State::On);
        result
    }

    /// `AFFINITY_INFO` of one CPU. That a CPU is off, only `firmware` knows: it says so here before it is.
    pub fn info(&self, target: u64, firmware: impl FnOnce() -> u64) -> u64 {
        let state = self.cpus.lock().iter().find(|cpu| cpu.affinity == target).map(|cpu| cpu.state);
        match state {
            None => psci::INVALID_PARAMETERS,
            Some(State::Off) => firmware(),
            Some(State::OnPending(_)) => psci::AFFINITY_ON_PENDING,
            Some(State::On | State::Suspended(_)) => psci::AFFINITY_ON,
        }
    }

    /// Takes the place where a CPU that has come up is to begin. `None` if nobody asked for it.
    pub fn arrive(&self, cpu: usize) -> Option<Start> {
        self.change(cpu, |cpu| match cpu.state {
            State::OnPending(start) | State::Suspended(start) => {
                cpu.state = State::On;
                Some(start)
            }
            State::Off | State::On => None,
        })?
    }

    /// Whether no CPU but one has been turned on.
    #[cfg(any(test, feature = "oracle"))]
    pub fn one_is_on(&self) -> bool {
        self.cpus.lock().iter().filter(|cpu| cpu.state != State::Off).count() == 1
    }

    #[inline(never)]
    fn set(&self, cpu: usize, state: State) {
        self.change(cpu, |cpu| cpu.state = state);
    }

    fn change<R>(&self, cpu: usize, change: impl FnOnce(&mut Cpu) -> R) -> Option<R> {
        self.cpus.lock().get_mut(cpu).map(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const START: Start = Start { entry: 0x4000_0000, context: 7 };
    const OTHER: Start = Start { entry: 0x5000_0000, context: 8 };

    /// Three CPUs; the second of the device tree booted.
    fn cpus() -> Cpus {
        let cpus = Cpus::none();
        assert!(cpus.name(&[0, 1, 0x100], 1));
        cpus
    }

    fn is_not_asked<T>() -> T {
        panic!("the firmware was asked")
    }

    fn info(cpus: &Cpus, target: u64) -> u64 {
        cpus.info(target, || psci::AFFINITY_OFF)
    }

    #[test]
    fn the_boot_cpu_is_the_first_and_the_only_one_that_is_on() {
        let cpus = cpus();
        assert_eq!([1, 0, 0x100].map(|target| info(&cpus, target)), [0, 1, 1]);
        assert!(cpus.one_is_on());
        let seen = Cell::new([0; 2]);
        for (place, target) in [0, 0x100].into_iter().enumerate() {
            let mut indices = seen.get();
            assert_eq!(
                cpus.turn_on(target, START, |index| {
                    indices[place] = index;
                    0
                }),
                psci::SUCCESS
            );
            seen.set(indices);
        }
        assert_eq!(seen.get(), [1, 2]);
        assert!(!cpus.one_is_on());
    }

    #[test]
    fn a_machine_without_its_boot_cpu_or_with_one_twice_or_too_many_is_none() {
        assert!(!Cpus::none().name(&[0, 2], 1));
        assert!(!Cpus::none().name(&[], 0));
        assert!(!Cpus::none().name(&[0, 1, 1], 0));
        assert!(!Cpus::none().name(&[0, 1, 0], 0));
        let many: Vec<u64> = (0..=MAX_CPUS as u64).collect();
        assert!(!Cpus::none().name(&many, 0));
        assert!(Cpus::none().name(&many[..MAX_CPUS], 0));
    }

    #[test]
    fn a_cpu_comes_up_where_the_host_asked_for_it_and_only_once() {
        let cpus = cpus();
        assert_eq!(cpus.arrive(1), None);
        let arrived = cpus.turn_on(0, START, |_| {
            assert_eq!(info(&cpus, 0), psci::AFFINITY_ON_PENDING);
            assert_eq!(cpus.turn_on(0, OTHER, |_| is_not_asked()), psci::ON_PENDING);
            psci::SUCCESS
        });
        assert_eq!(arrived, psci::SUCCESS);
        assert_eq!(cpus.arrive(1), Some(START));
        assert_eq!(cpus.arrive(1), None);
        assert_eq!(info(&cpus, 0), psci::AFFINITY_ON);
        assert_eq!(cpus.turn_on(0, OTHER, |_| is_not_asked()), psci::ALREADY_ON);
    }

    #[test]
    fn only_cpus_of_the_device_tree_can_be_turned_on_and_asked_about() {
        let cpus = cpus();
        for target in [2, 0x8000_0000, 0x1_0000_0000, u64::MAX] {
            assert_eq!(cpus.turn_on(target, START, |_| is_not_asked()), psci::INVALID_PARAMETERS);
            assert_eq!(cpus.info(target, is_not_asked), psci::INVALID_PARAMETERS);
        }
    }

    #[test]
    fn a_cpu_that_the_firmware_does_not_start_is_off_again() {
        let cpus = cpus();
        assert_eq!(cpus.turn_on(0, START, |_| psci::INTERNAL_FAILURE), psci::INTERNAL_FAILURE);
        assert_eq!(cpus.arrive(1), None);
        assert_eq!(info(&cpus, 0), psci::AFFINITY_OFF);
        assert_eq!(cpus.turn_on(0, OTHER, |_| psci::SUCCESS), psci::SUCCESS);
        assert_eq!(cpus.arrive(1), Some(OTHER));
    }

    #[test]
    fn a_cpu_that_has_come_up_stays_on_whatever_the_firmware_says() {
        let cpus = cpus();
        let result = cpus.turn_on(0, START, |index| {
            assert_eq!(cpus.arrive(index), Some(START));
            psci::INTERNAL_FAILURE
        });
        assert_eq!(result, psci::INTERNAL_FAILURE);
        assert_eq!(info(&cpus, 0), psci::AFFINITY_ON);
    }

    #[test]
    fn a_refusal_takes_back_its_own_request_and_no_later_one() {
        let cpus = cpus();
        let result = cpus.turn_on(0, START, |index| {
            // It comes up, goes off, and somebody else turns it on.
            assert_eq!(cpus.arrive(index), Some(START));
            cpus.turn_off(index, || {
                assert_eq!(cpus.turn_on(0, OTHER, |_| psci::SUCCESS), psci::SUCCESS);
                assert_eq!(cpus.arrive(index), Some(OTHER));
                psci::DENIED
            });
            cpus.turn_off(index, || psci::DENIED);
            cpus.set(index, State::Off);
            assert_eq!(cpus.turn_on(0, OTHER, |_| psci::SUCCESS), psci::SUCCESS);
            psci::ALREADY_ON
        });
        assert_eq!(result, psci::ALREADY_ON);
        assert_eq!(cpus.arrive(1), Some(OTHER));
    }

    #[test]
    fn whether_a_cpu_is_off_is_the_firmwares_to_say() {
        let cpus = cpus();
        let result = cpus.turn_off(0, || {
            assert_eq!(cpus.info(1, || psci::AFFINITY_ON), psci::AFFINITY_ON, "not yet");
            assert_eq!(cpus.info(1, || psci::AFFINITY_OFF), psci::AFFINITY_OFF);
            psci::DENIED
        });
        assert_eq!(result, psci::DENIED);
        assert_eq!(cpus.info(1, is_not_asked), psci::AFFINITY_ON, "the firmware refused");
    }

    #[test]
    fn a_suspended_cpu_begins_anew_or_goes_on() {
        let cpus = cpus();
        let result = cpus.suspend(0, START, || {
            assert_eq!(cpus.info(1, is_not_asked), psci::AFFINITY_ON);
            assert_eq!(cpus.turn_on(1, OTHER, |_| is_not_asked()), psci::ALREADY_ON);
            psci::SUCCESS
        });
        assert_eq!(result, psci::SUCCESS);
        assert_eq!(cpus.arrive(0), None, "it kept its state");
        cpus.suspend(0, OTHER, || {
            assert_eq!(cpus.arrive(0), Some(OTHER));
            assert_eq!(cpus.arrive(0), None);
            psci::SUCCESS
        });
    }
}
