//! Guests that work on their memory and devices.

use abi::HostCall;
use guest_stub::protocol::{DEVICE_BASE, GREETING, PAGE_SIZE, RAM_BASE, RAM_SIZE, SCRATCH, STRANGER_BASE};
use host_programs::deed::{Deed, Touch};
use host_programs::kvm::Exit;
use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::{Hex, Steps};
use host_programs::uapi::{errno, kvm};
use host_programs::{Failure, failure};

use crate::run::ends;

/// The guest shares, unshares and relinquishes.
pub(crate) fn memory(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest shares, unshares and relinquishes pages, in good and in absurd ranges.");
    let deed = Deed::open()?;
    let mut machine = Machine::new(&Options::protected("memory", 0))?;
    let [phase, ipa, pages, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-has-relinquished-pages", 2, if phase == 2 { pages } else { 0 });
    let offset = ipa.wrapping_sub(RAM_BASE);
    let mut cleared = 0;
    for index in 0..2 {
        let pfn = deed.gmem_pfn(machine.memory_file(), offset + index * PAGE_SIZE)?;
        let word = machine.mapping().load(offset + index * PAGE_SIZE);
        steps.tell(format_args!("  page {index}: frame {:#x}", pfn.unwrap_or(0)));
        cleared += u64::from(word == Ok(0));
    }
    steps.equal("vmm-reads-zeros-in-relinquished-pages", 2, cleared);
    let stored = machine.mapping().store(offset + PAGE_SIZE, GREETING);
    steps.check("vmm-can-write-to-a-relinquished-page", "done", outcome(&stored), stored.is_ok());
    ends(&mut machine, "guest-runs-to-its-end", steps)?;
    drop(machine);

    steps.tell("A guest touches an address where it has no memory: the exit tells the page and no more.");
    let mut machine = Machine::new(&Options::protected("memory", 1))?;
    machine.run_to_phase(steps)?;
    no_memory_at(&mut machine, RAM_BASE + RAM_SIZE, "a-touch-beyond-memory-tells-its-page", steps)
}

/// The host takes a page of a running guest by force.
pub(crate) fn poison(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("The host takes a private page of a guest by force; the guest finds poison and goes on.");
    let deed = Deed::open()?;
    let mut machine = Machine::new(&Options::protected("memory", 2))?;
    let [phase, ipa, ..] = machine.run_to_phase(steps)?;
    let offset = ipa.wrapping_sub(RAM_BASE);
    let taken = deed.gmem_pfn(machine.memory_file(), offset)?;
    let Some(pfn) = taken.filter(|_| phase == 3) else {
        return Err(failure!("the guest is in phase {phase} and has no page at {ipa:#x}"));
    };
    let private = deed.load(pfn * PAGE_SIZE)?;
    let aborts = private.is_injected_abort(pfn * PAGE_SIZE);
    steps.check("before-it-is-taken-the-host-cannot-read-it", "abort", private, aborts);
    deed.must(HostCall::ForceReclaim { pfn, pages: 1 })?;
    let wiped = deed.load(pfn * PAGE_SIZE)?;
    steps.check("the-page-is-the-hosts-and-zeros", Touch::Done(0), wiped, wiped == Touch::Done(0));
    let again = deed.call(HostCall::ForceReclaim { pfn, pages: 1 })?;
    steps.check("a-second-time-it-is-the-hosts-already", "Again", again, again.is_error(abi::Error::Again));
    let vm = deed.vm_handle(machine.vm())?;
    let back = deed.call(HostCall::DonateGuest { vm, pfn, gfn: ipa / PAGE_SIZE, pages: 1 })?;
    steps.check("poison-is-no-place-for-memory", "Permission", back, back.is_error(abi::Error::Permission));
    ends(&mut machine, "guest-runs-to-its-end", steps)
}

fn outcome<T>(result: &Result<T, host_programs::arch::Signal>) -> &dyn core::fmt::Display {
    match result {
        Ok(_) => &"done",
        Err(signal) => signal,
    }
}

/// The next exit is a page that nobody can provide, at this address; and again if the guest is run again.
fn no_memory_at(machine: &mut Machine, page: u64, step: &str, steps: &mut Steps) -> Result<(), Failure> {
    let expected = Event::Exit(Exit::MemoryFault { address: page, errno: errno::EFAULT });
    let first = machine.run(0, steps)?;
    let second = machine.run(0, steps)?;
    steps.check(step, Hex(page), first, first == expected && second == expected);
    Ok(())
}

/// The guest accesses devices.
pub(crate) fn mmio(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest uses its device with loads and stores of every size and kind.");
    let mut machine = Machine::new(&Options::protected("mmio", 0))?;
    ends(&mut machine, "guest-runs-to-its-end", steps)?;
    let strange = machine.device(0)?.strange_accesses();
    steps.equal("vmm-saw-no-access-that-the-guest-did-not-mean", 0, strange);
    drop(machine);

    let denied = [
        (1, STRANGER_BASE, "a-page-that-is-not-enrolled-shows-no-data"),
        (2, DEVICE_BASE, "a-page-that-was-unmapped-shows-no-data"),
        (3, DEVICE_BASE, "a-guest-that-never-enrolled-shows-no-data"),
    ];
    for (argument, page, step) in denied {
        let mut machine = Machine::new(&Options::protected("mmio", argument))?;
        if argument != 3 {
            let [phase, told, ..] = machine.run_to_phase(steps)?;
            if (phase, told) != (1, page) {
                return Err(failure!("the guest is in phase {phase} with {told:#x}"));
            }
        }
        no_memory_at(&mut machine, page, step, steps)?;
        let touched = machine.device(0)?.scratch().iter().any(|byte| *byte != 0);
        if touched {
            return Err(failure!("the device's scratch register at {SCRATCH:#x} was written"));
        }
    }
    Ok(())
}

/// The same guest in a VM whose accesses are not guarded.
pub(crate) fn unguarded(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest that knows nothing of MMIO_GUARD, in a VM that shows every access without memory.");
    let machine_type = kvm::VM_TYPE_PROTECTED | kvm::DEED_VM_TYPE_MMIO_UNGUARDED;
    let mut machine = Machine::new(&Options { machine_type, ..Options::protected("mmio", 4) })?;
    ends(&mut machine, "unguarded-guest-runs-to-its-end", steps)
}

/// The `memory` guest in a VM whose unshare is immediate.
pub(crate) fn immediate(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell(
        "A guest in a VM whose pages are private at once when it unshares them; the host is not asked.",
    );
    let deed = Deed::open()?;
    let asked = deed.stats()?.unshares;
    let machine_type = kvm::VM_TYPE_PROTECTED | kvm::DEED_VM_TYPE_UNSHARE_IMMEDIATE;
    let mut machine = Machine::new(&Options { machine_type, ..Options::protected("memory", 0) })?;
    let [phase, ipa, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-has-unshared-what-it-shared", 2, phase);
    steps.equal("host-was-never-asked", asked, deed.stats()?.unshares);
    let stored = machine.mapping().store(ipa.wrapping_sub(RAM_BASE) + PAGE_SIZE, GREETING);
    steps.check("vmm-can-write-to-a-relinquished-page", "done", outcome(&stored), stored.is_ok());
    ends(&mut machine, "guest-runs-to-its-end", steps)
}
