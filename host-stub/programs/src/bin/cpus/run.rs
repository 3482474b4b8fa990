//! The choice of the story, and what holds after each.

use host_programs::census::check_unchanged;
use host_programs::cpu::Cpu;
use host_programs::deed::Deed;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

use crate::{blocks, ends, guests, pages, power, stress};

/// Tells one story, and compares the census.
pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let deed = Deed::open()?;
    let before = deed.census()?;
    let cpus = Cpu::count(&deed)?;
    if cpus < 2 {
        return Err(failure!("this machine has one CPU"));
    }
    match arguments {
        [_, "pages"] => pages::leave(&deed, steps)?,
        [_, "blocks"] => blocks::split(&deed, steps)?,
        [_, "guests"] => guests::lose(&deed, steps)?,
        [_, "unshare"] => guests::unshare(&deed, steps)?,
        [_, "stress"] => stress::contend(&deed, steps)?,
        [_, "vms"] => ends::begin(&deed, steps)?,
        [_, "end"] => return power::end_together(&deed, steps),
        [_, "power"] => power::go_and_come(&deed, steps)?,
        _ => return Err(failure!("there is no story {arguments:?}")),
    }
    check_unchanged(before, deed.census()?, steps);
    Ok(())
}
