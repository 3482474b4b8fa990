//! The order of the attempts.

use host_programs::Failure;
use host_programs::census::check_unchanged;
use host_programs::deed::Deed;
use host_programs::steps::Steps;

use crate::{absurd, conduits, cpus, life};

/// Makes all attempts and compares the census.
pub(crate) fn main(_: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let deed = Deed::open()?;
    let hyp = deed.find_hypervisor_page()?;
    let before = deed.census()?;

    steps.tell("The host calls with numbers that are no calls, and by conduits that are none.");
    conduits::try_all(&deed, steps)?;
    steps.tell("It starts CPUs that are not there, or where it has no memory.");
    cpus::try_all(&deed, steps)?;
    steps.tell("The host makes every call with absurd pages, counts, handles and flags.");
    absurd::try_all(&deed, steps, hyp)?;
    steps.tell("The host shares pages with the hypervisor and takes them back, in the wrong order.");
    life::shares(&deed, steps)?;
    steps.tell("The host gives a page to a pool, and cannot have it any more.");
    life::pools(&deed, steps)?;
    steps.tell("The host makes a protected VM and does everything in the wrong order.");
    life::protected_vm(&deed, steps)?;
    steps.tell("The host lends pages to VMs without protection, in the wrong order.");
    life::plain_vms(&deed, steps)?;

    check_unchanged(before, deed.census()?, steps);
    Ok(())
}
