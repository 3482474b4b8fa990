//! A guest that somebody else has written: protected, with one vCPU, and served as far as a VMM can that knows nothing of
//! it.

use host_programs::Failure;
use host_programs::kvm::Exit;
use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::Steps;

/// Runs it until it turns itself off, and tells of everything that it does on the way.
pub(crate) fn own(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A protected guest of your own.");
    let mut machine = Machine::new(&Options::protected("own", 0))?;
    let last = loop {
        match machine.run(0, steps)? {
            Event::Phase([phase, words @ ..]) => {
                steps.tell(format_args!("  guest: phase {phase} {words:x?}"))
            }
            Event::Exit(Exit::Interrupted) => {}
            other => break other,
        }
    };
    steps.tell(format_args!("The host's interrupts found it running {} times.", machine.interruptions()));
    steps.check("guest-turns-itself-off", "off", last, last == Event::Off);
    Ok(())
}
