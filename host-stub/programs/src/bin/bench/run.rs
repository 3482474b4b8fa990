//! Calibration, and which part is asked for.

use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::failure;
use host_programs::play::{Entry, What, play};
use host_programs::steps::Steps;

use crate::{entries, guests, host, memfd, others};

/// Runs what the arguments name.
pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let deed = Deed::open()?;
    calibrate(&deed, steps)?;
    match arguments {
        [_, "boot"] => boot(&deed, steps),
        [_, "blocks", name] => host::blocks(&deed, name, steps),
        [_] => {
            boot(&deed, steps)?;
            host::calls(&deed, steps)?;
            host::guests_memory(&deed, steps)?;
            host::blocks(&deed, "-", steps)?;
            entries::rows(&deed, steps)?;
            guests::rows(steps)?;
            memfd::rows(steps)?;
            // Last, since it gives pages away for good.
            others::rows(&deed, steps)
        }
        _ => Err(failure!("which part?")),
    }
}

/// What the counter says of code whose length is known. Nothing is counted if it says something else.
fn calibrate(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let mut list = [What::Nothing, What::Nops, What::Loop].map(|what| Entry::new(what, [0; 7]));
    play(deed, &mut list, 1000)?;
    let [nothing, nops, passes] = list.map(|entry| entry.raw());
    let right = [
        steps.equal("an-empty-interval-counts-1", 1, nothing),
        steps.equal("100-instructions-count-101", 101, nops),
        steps.equal("a-loop-of-20000-counts-20001", 20_001, passes),
    ];
    match right {
        [true, true, true] => Ok(()),
        _ => Err(failure!("the counter does not count instructions")),
    }
}

/// From reset to the kernel's first instruction: the loader's stub of a few instructions, and EL2.
fn boot(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let count = deed.counter_at_entry()?;
    steps.row("EL2 initialisation", count, count, 1);
    Ok(())
}
