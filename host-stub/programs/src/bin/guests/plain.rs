//! A guest that is not protected.

use guest_stub::protocol::{ANSWER, GREETING, PAGE_SIZE, Phase, RAM_BASE, RAM_SIZE};
use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::machine::{Machine, Options};
use host_programs::steps::{Hex, Steps};
use host_programs::uapi::kvm;

use crate::run::ends;

/// The VMM sees and changes everything of a guest without protection, as with KVM.
pub(crate) fn plain(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest without protection: the host lends it memory and keeps its own access.");
    let deed = Deed::open()?;
    let argument = 0x77;
    let options = Options { machine_type: 0, ..Options::protected("plain", argument) };
    let mut machine = Machine::new(&options)?;
    machine.vcpu(0)?.set_register(kvm::REG_X1, argument + 1)?;
    let [phase, ipa, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-without-protection-runs", Phase::Ready as u64, phase);
    let offset = ipa.wrapping_sub(RAM_BASE);
    let greeting = machine.mapping().load(offset).unwrap_or(0);
    steps.equal_hex("vmm-reads-the-guests-memory", GREETING, greeting);
    let stored = machine.mapping().store(offset + 8, ANSWER);
    steps.check("vmm-writes-to-the-guests-memory", "done", stored.is_ok(), stored.is_ok());
    let pc = machine.vcpu(0)?.register(kvm::REG_PC)?;
    let in_image = (RAM_BASE..RAM_BASE + RAM_SIZE).contains(&pc);
    steps.check("vmm-reads-the-guests-program-counter", "in guest RAM", Hex(pc), in_image);
    let pfn = deed.gmem_pfn(machine.memory_file(), offset)?.unwrap_or(0);
    let state = deed.query(pfn)?;
    let lent = state == Some(abi::HostState::SharedOwned);
    let shown = host_programs::steps::format(format_args!("{state:?}"));
    steps.check("the-guests-page-is-lent-by-the-host", "SharedOwned", shown, lent);
    ends(&mut machine, "guest-runs-to-its-end", steps)?;
    drop(machine);
    let back = deed.query(pfn)? == Some(abi::HostState::Owned);
    steps.check("the-page-is-the-hosts-alone-afterwards", "Owned", back, back);
    let loaded = deed.load(pfn * PAGE_SIZE)?;
    let done = matches!(loaded, host_programs::deed::Touch::Done(_));
    steps.check("the-kernel-can-touch-it", "done", loaded, done);
    Ok(())
}
