//! Turning the other CPUs on and off, and waiting for them, but never for ever.

use abi::psci;

use crate::errno::Errno;
use crate::machine::Machine;
use crate::secondary::{Progress, Secondary, State};

/// Nanoseconds until a CPU that does not answer is given up: it is stuck in a call, or was never there.
const PATIENCE: u64 = 10_000_000_000;

/// CPU `number`: 1 is the first that is not the boot CPU. ENODEV if there is none.
pub fn secondary(machine: &dyn Machine, number: u64) -> Result<&Secondary, Errno> {
    machine.secondaries().get(index(number)?).ok_or(Errno::ENODEV)
}

fn index(number: u64) -> Result<usize, Errno> {
    number.checked_sub(1).and_then(|index| usize::try_from(index).ok()).ok_or(Errno::ENODEV)
}

/// Waits until something holds. ETIMEDOUT if it does not come to that.
fn wait(machine: &dyn Machine, holds: impl Fn() -> bool) -> Result<(), Errno> {
    let limit = machine.now().saturating_add(PATIENCE);
    while !holds() {
        if machine.now() > limit {
            return Err(Errno::ETIMEDOUT);
        }
        machine.relax();
    }
    Ok(())
}

/// Turns a CPU on and waits until it has arrived. EBUSY if it is on; EIO if the firmware refuses it.
pub fn turn_on(machine: &dyn Machine, number: u64) -> Result<(), Errno> {
    let cpu = secondary(machine, number)?;
    let index = index(number)?;
    // A CPU that has gone may still be on its way: it is off when the firmware says so.
    if cpu.progress().state == State::Off {
        wait(machine, || machine.is_off(index))?;
    }
    cpu.call_in()?;
    let answer = machine.turn_on(index);
    if answer != psci::SUCCESS {
        cpu.stays_off();
        log::error!("CPU {number} does not come: PSCI answers {}", answer.cast_signed());
        return Err(Errno::EIO);
    }
    wait(machine, || cpu.progress().state != State::Coming)
}

/// Turns a CPU off and waits until it is. EBUSY if it does not wait for work.
pub fn turn_off(machine: &dyn Machine, number: u64) -> Result<(), Errno> {
    let cpu = secondary(machine, number)?;
    let index = index(number)?;
    cpu.send_away()?;
    machine.wake();
    wait(machine, || machine.is_off(index))
}

/// Waits until a CPU has played its series, or, if not `all` of it, until it has ended its round.
pub fn end(machine: &dyn Machine, number: u64, all: bool) -> Result<Progress, Errno> {
    let cpu = secondary(machine, number)?;
    if !all {
        cpu.end();
    }
    wait(machine, || cpu.progress().state != State::Playing)?;
    Ok(cpu.progress())
}

/// Calls one more CPU to work, unless `wanted` of them (the boot CPU not counted) work already, or none is off.
pub fn call_for_work(machine: &dyn Machine, wanted: usize) {
    let state = |cpu: &Secondary| cpu.progress().state;
    let cpus = machine.secondaries();
    if cpus.iter().filter(|cpu| state(cpu) == State::Working).count() >= wanted {
        return;
    }
    let mut off = cpus.iter().enumerate().filter(|(_, cpu)| state(cpu) == State::Off);
    let Some((index, cpu)) = off.find(|(index, _)| machine.is_off(*index)) else { return };
    if cpu.call_to_work().is_ok() && machine.turn_on(index) != psci::SUCCESS {
        log::error!("CPU {} does not come", index.saturating_add(1));
        cpu.stays_off();
    }
}

/// Waits until the CPUs that work have gone. ETIMEDOUT if one does not.
pub fn wait_for_workers(machine: &dyn Machine) -> Result<(), Errno> {
    for (index, cpu) in machine.secondaries().iter().enumerate() {
        let state = || cpu.progress().state;
        // One that has gone may still be on its way.
        if matches!(state(), State::Working | State::Off) {
            wait(machine, || state() != State::Working && machine.is_off(index))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn a_cpu_is_turned_on_once_and_off_once() {
        let machine = FakeMachine::new(1);
        assert_eq!(turn_on(&machine, 0).err(), Some(Errno::ENODEV));
        assert_eq!(turn_on(&machine, 2).err(), Some(Errno::ENODEV));
        assert_eq!(turn_off(&machine, 1), Err(Errno::EBUSY));
        // Nobody plays the CPU: it is asked to come, and does not.
        assert_eq!(turn_on(&machine, 1), Err(Errno::ETIMEDOUT));
        assert_eq!(turn_on(&machine, 1), Err(Errno::EBUSY));
    }

    #[test]
    fn as_many_cpus_are_called_to_work_as_there_is_work_for() {
        let machine = FakeMachine::new(1);
        let state = || secondary(&machine, 1).unwrap().progress().state;
        call_for_work(&machine, 0);
        assert_eq!((state(), wait_for_workers(&machine)), (State::Off, Ok(())));
        call_for_work(&machine, 1);
        assert_eq!(state(), State::Working);
        // There is no other.
        call_for_work(&machine, 2);
        assert_eq!(turn_on(&machine, 1), Err(Errno::EBUSY));
        assert_eq!(wait_for_workers(&machine), Err(Errno::ETIMEDOUT));
        let machine = FakeMachine::new(1);
        machine.refuse_cpus();
        call_for_work(&machine, 1);
        assert_eq!(secondary(&machine, 1).unwrap().progress().state, State::Off);
    }

    #[test]
    fn a_cpu_that_the_firmware_refuses_stays_off() {
        let machine = FakeMachine::new(1);
        machine.refuse_cpus();
        assert_eq!(turn_on(&machine, 1), Err(Errno::EIO));
        assert_eq!(secondary(&machine, 1).unwrap().progress().state, State::Off);
    }
}
