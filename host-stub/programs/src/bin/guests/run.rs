//! Chooses by the argument; the guests that need nothing but their device.

use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

use crate::{memory, own, plain, several};

/// Runs what the argument names.
pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    match arguments {
        [_, "smccc", ..] => {
            alone("smccc", "A guest makes every call, with good and absurd arguments.", steps)
        }
        [_, "traps", ..] => alone("traps", "A guest reaches for what it must not reach.", steps),
        [_, "memory", ..] => memory::memory(steps),
        [_, "poison", ..] => memory::poison(steps),
        [_, "mmio", ..] => memory::mmio(steps),
        [_, "unguarded", ..] => memory::unguarded(steps),
        [_, "immediate", ..] => memory::immediate(steps),
        [_, "registers", ..] => several::registers(steps),
        [_, "survey", ..] => several::survey(steps),
        [_, "psci", ..] => several::psci(steps),
        [_, "spin", ..] => several::spin(steps),
        [_, "plain", ..] => plain::plain(steps),
        [_, "own", ..] => own::own(steps),
        _ => Err(failure!("which guest?")),
    }
}

/// A guest that checks its steps and turns itself off.
fn alone(image: &str, what: &str, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell(what);
    let mut machine = Machine::new(&Options::protected(image, 0))?;
    ends(&mut machine, "guest-runs-to-its-end", steps)
}

/// The guest turns itself off.
pub(crate) fn ends(machine: &mut Machine, step: &str, steps: &mut Steps) -> Result<(), Failure> {
    let event = machine.run_to_end(steps)?;
    steps.check(step, "off", event, event == Event::Off);
    Ok(())
}
