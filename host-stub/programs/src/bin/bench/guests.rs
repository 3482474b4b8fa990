//! What a guest counts itself: its calls, and its waits for the host and its VMM.

use guest_stub::protocol::RAM_BASE;
use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::Steps;
use host_programs::uapi::kvm;
use host_programs::{Failure, failure};

/// Runs the counting guest in a VM that asks the host before it unshares, and in one that does not.
pub(crate) fn rows(steps: &mut Steps) -> Result<(), Failure> {
    let mut machine = Machine::new(&Options::protected("counts", 0))?;
    serve(&mut machine, steps)?;
    drop(machine);
    let machine_type = kvm::VM_TYPE_PROTECTED | kvm::DEED_VM_TYPE_UNSHARE_IMMEDIATE;
    let options = Options { machine_type, ..Options::protected("counts", 1) };
    serve(&mut Machine::new(&options)?, steps)
}

/// Runs the guest to its end; at each phase the VMM touches the page that the guest has shared.
fn serve(machine: &mut Machine, steps: &mut Steps) -> Result<(), Failure> {
    loop {
        match machine.run(0, steps)? {
            Event::Phase([_, ipa, ..]) => {
                let loaded = machine.mapping().load(ipa.wrapping_sub(RAM_BASE));
                loaded.map_err(|signal| failure!("the shared page: {signal}"))?;
            }
            Event::Exit(host_programs::kvm::Exit::Interrupted) => {}
            Event::Off => return Ok(()),
            other => return Err(failure!("the counting guest: {other}")),
        }
    }
}
