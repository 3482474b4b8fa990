//! The story, in the order in which it happens.

extern crate alloc;

use alloc::vec::Vec;

use abi::HostState;
use guest_stub::protocol::{
    ANSWER, ARGUMENT_KEEP, ARGUMENT_LOOK, GREETING, PAGE_SIZE, Phase, RAM_BASE, RAM_SIZE,
};
use host_programs::arch::Signal;
use host_programs::census::{Census, check_unchanged};
use host_programs::deed::Deed;
use host_programs::kvm::Kvm;
use host_programs::machine::{Event, Machine, Options, secret_nonce};
use host_programs::steps::{Hex, Steps};
use host_programs::uapi::{deed as misbehaviour, errno, kvm};
use host_programs::{Failure, failure, sys};

use crate::hostility::{Targets, try_what_a_host_must_not_do};

/// The last page of guest RAM, which no guest uses.
const UNUSED: u64 = RAM_SIZE - PAGE_SIZE;

/// Tells the story.
pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let nonce = secret_nonce(arguments)?;
    let last_call = last_call(arguments);
    let deed = Deed::open()?;

    let before = census_at_start(&deed, steps)?;
    let hyp = deed.find_hypervisor_page()?;

    let mut machine = first_guest(&deed, steps, nonce)?;
    let first_page = pages_leave_when_used(&deed, steps, &mut machine)?;
    let secrets = host_pries(&deed, steps, &mut machine)?;
    let buffers = both_sides_talk(&deed, steps, &mut machine)?;
    host_keeps_its_mapping(&deed, steps, &mut machine)?;
    host_maps_without_asking(&deed, steps, &machine, &secrets)?;

    steps.tell("The host tries what it must not, with good and with absurd arguments.");
    let vm = deed.vm_handle(machine.vm())?;
    let [(secret_ipa, secret), ..] = secrets[..] else { return Err(failure!("no secret pages")) };
    let targets = Targets { vm, secret, secret_gfn: secret_ipa / PAGE_SIZE, hyp };
    try_what_a_host_must_not_do(&deed, steps, &targets)?;

    let [phase, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-reaches-its-last-phase", Phase::StillKept as u64, phase);
    if let Some(function) = last_call {
        return power_off_with_the_guest_alive(&deed, steps, function);
    }

    let pages = private_pages(&deed, &machine)?;
    let known = secrets.iter().chain(&buffers).map(|(_, pfn)| *pfn).chain([first_page]);
    steps.equal(
        "guests-pages-are-all-known",
        secrets.len() + buffers.len() + 1,
        known.filter(|pfn| pages.contains(pfn)).count(),
    );
    first_guest_ends(&deed, steps, machine, vm)?;
    pages_come_back(&deed, steps, &pages)?;
    second_guest_reads_zeros(&deed, steps, &pages)?;
    census_at_end(&deed, steps, before)
}

/// The power call with which a run ends that leaves the guest alive.
fn last_call(arguments: &[&str]) -> Option<u32> {
    arguments.iter().find_map(|argument| match *argument {
        "--leave-running" => Some(abi::psci::SYSTEM_OFF),
        "--reset-running" => Some(abi::psci::SYSTEM_RESET),
        _ => None,
    })
}

/// The kernel would end the VM with its program, so the program ends the machine.
fn power_off_with_the_guest_alive(deed: &Deed, steps: &mut Steps, function: u32) -> Result<(), Failure> {
    steps.tell(
        "The host powers off or resets with the guest alive: the hypervisor must wipe what the guest owns.",
    );
    Err(deed.end_machine(steps, function))
}

fn census_at_start(deed: &Deed, steps: &mut Steps) -> Result<Option<Census>, Failure> {
    steps.tell("The VMM asks who is there, and counts pages.");
    let [version, features, vms, vcpus, ipa_bits, ..] = deed.must(abi::HostCall::Version)?;
    steps.tell(format_args!(
        "  Deed's host interface {}.{}: {vms} VMs, {vcpus} vCPUs each, {ipa_bits}-bit guest addresses, features {features:#x}.",
        version >> 16,
        version & 0xffff,
    ));
    let expected = u64::from(abi::host::VERSION_MAJOR) << 16 | u64::from(abi::host::VERSION_MINOR);
    steps.equal_hex("hypervisor-tells-its-interfaces-version", expected, version);
    let census = deed.census()?;
    match &census {
        Some(census) => {
            steps.tell(format_args!("  {census}"));
            steps.equal("no-page-is-a-guests-at-the-start", 0, census.guest);
        }
        None => steps.skip("no-page-is-a-guests-at-the-start", NO_TEST_CALLS),
    }
    Ok(census)
}

const NO_TEST_CALLS: &str = "this build of the hypervisor has no test calls";

fn first_guest(deed: &Deed, steps: &mut Steps, nonce: u64) -> Result<Machine, Failure> {
    steps.tell(
        "The VMM makes a protected VM and a guest_memfd (MMAP, INIT_SHARED), and writes the guest's image.",
    );
    let device = Kvm::open()?;
    steps.equal("kvm-has-version-12", 12, device.version()?);
    let vm = device.create_vm(kvm::VM_TYPE_PROTECTED)?;
    let (memory, mapping) = Machine::memory(&vm)?;
    let image = Machine::load(&mapping, "secret")?;
    let first = image.iter().take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    steps.equal_hex("vmm-reads-the-image-back-through-its-mapping", first, mapping.load(0).unwrap_or(0));

    let bound = vm.bind(0, &memory, &mapping, RAM_BASE, RAM_SIZE);
    steps.check("vmm-binds-the-guest-memfd-to-a-slot", "done", outcome(&bound), bound.is_ok());
    let again = vm.bind(1, &memory, &mapping, RAM_BASE + RAM_SIZE, RAM_SIZE);
    steps.equal("the-same-pages-cannot-be-bound-twice", errno::EEXIST, sys::errno(&again));

    let pfn = backing(deed, &memory, 0)?;
    let state = deed.query(pfn)?;
    steps.check(
        "an-image-page-is-the-hosts-before-the-run",
        "Owned",
        Shown(state),
        state == Some(HostState::Owned),
    );

    let values = [nonce];
    let options = Options { values: &values, ..Options::protected("secret", ARGUMENT_KEEP) };
    Machine::assemble(&device, vm, memory, mapping, &options)
}

/// Returns the page behind the image's first.
fn pages_leave_when_used(deed: &Deed, steps: &mut Steps, machine: &mut Machine) -> Result<u64, Failure> {
    steps.tell("The guest starts. Each page leaves the host, mapping and all, when the guest first uses it.");
    let first_page = backing(deed, machine.memory_file(), 0)?;
    let [phase, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-starts-and-its-device-works", Phase::Ready as u64, phase);
    page_is_gone(
        deed,
        steps,
        machine,
        0,
        ["a-used-page-is-no-page-of-the-hosts", "vmm-touch-of-a-used-page-is-sigbus"],
    )?;

    let unused = machine.mapping().load(UNUSED);
    steps.check("an-unused-page-is-still-the-vmms", "value 0", Loaded(unused), unused == Ok(0));
    let pfn = backing(deed, machine.memory_file(), UNUSED)?;
    let state = deed.query(pfn)?;
    steps.check("an-unused-page-is-still-the-hosts", "Owned", Shown(state), state == Some(HostState::Owned));
    Ok(first_page)
}

/// Returns the secret's pages: guest address and page.
fn host_pries(deed: &Deed, steps: &mut Steps, machine: &mut Machine) -> Result<Vec<(u64, u64)>, Failure> {
    steps
        .tell("The guest makes a secret from the nonce and keeps it in three pages and in vector registers.");
    let [phase, a, b, c, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-keeps-its-secret", Phase::Kept as u64, phase);
    let secrets = [a, b, c]
        .into_iter()
        .map(|ipa| Ok((ipa, backing(deed, machine.memory_file(), ipa.wrapping_sub(RAM_BASE))?)))
        .collect::<Result<Vec<_>, Failure>>()?;

    steps.tell(
        "The VMM touches these pages and gets SIGBUS; the host's kernel touches them and gets an abort.",
    );
    let mapping = machine.mapping();
    let signals = secrets.iter().filter(|(ipa, _)| {
        let offset = ipa.wrapping_sub(RAM_BASE) + 16;
        matches!(mapping.load(offset), Err(signal) if signal.is_bus_error_at(mapping.address(offset)))
    });
    steps.equal("vmm-loads-from-the-secret-are-sigbus", secrets.len(), signals.count());
    let signals = secrets.iter().filter(|(ipa, _)| {
        let offset = ipa.wrapping_sub(RAM_BASE) + 24;
        matches!(mapping.store(offset, 1), Err(signal) if signal.is_bus_error_at(mapping.address(offset)))
    });
    steps.equal("vmm-stores-to-the-secret-are-sigbus", secrets.len(), signals.count());
    let written = secrets.iter().filter(|(ipa, _)| {
        let console = sys::File::from_raw(1);
        let written = console.write_from(mapping.address(ipa.wrapping_sub(RAM_BASE)));
        core::mem::forget(console);
        sys::errno(&written) == errno::EFAULT
    });
    steps.equal("printing-the-secret-is-efault", secrets.len(), written.count());
    host_kernel_pries(deed, steps, &secrets)?;
    Ok(secrets)
}

fn host_kernel_pries(deed: &Deed, steps: &mut Steps, secrets: &[(u64, u64)]) -> Result<(), Failure> {
    let counted = deed.injected_aborts()?;
    let taken = deed.stats()?.aborts;
    let (mut loads, mut stores) = (0, 0);
    for (_, pfn) in secrets {
        let at = pfn * PAGE_SIZE + 8;
        loads += usize::from(deed.load(at)?.is_injected_abort(at));
        stores += usize::from(deed.store(at, !0)?.is_injected_abort(at));
    }
    steps.equal("kernel-loads-from-the-secret-abort", secrets.len(), loads);
    steps.equal("kernel-stores-to-the-secret-abort", secrets.len(), stores);
    let expected = 2 * secrets.len() as u64;
    steps.equal("kernel-counts-these-aborts", expected, deed.stats()?.aborts - taken);
    match (counted, deed.injected_aborts()?) {
        (Some(before), Some(after)) => {
            steps.equal("hypervisor-counts-these-aborts", expected, after - before);
        }
        _ => steps.skip("hypervisor-counts-these-aborts", NO_TEST_CALLS),
    }
    Ok(())
}

/// Returns the buffer's pages.
fn both_sides_talk(
    deed: &Deed,
    steps: &mut Steps,
    machine: &mut Machine,
) -> Result<Vec<(u64, u64)>, Failure> {
    steps.tell("The guest shares a buffer; both sides write to it and read each other.");
    let [phase, ipa, pages, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-comes-to-share-its-buffer", Phase::Shared as u64, phase);
    let buffers = (0..pages.min(16))
        .map(|index| {
            let ipa = ipa + index * PAGE_SIZE;
            Ok((ipa, backing(deed, machine.memory_file(), ipa.wrapping_sub(RAM_BASE))?))
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    let mapping = machine.mapping();
    let (mut borrowed, mut read, mut answered, mut touched) = (0, 0, 0, 0);
    for (ipa, pfn) in &buffers {
        let offset = ipa.wrapping_sub(RAM_BASE);
        borrowed += usize::from(deed.query(*pfn)? == Some(HostState::SharedBorrowed));
        read += usize::from(mapping.load(offset) == Ok(GREETING));
        answered += usize::from(mapping.store(offset + 8, ANSWER).is_ok());
        touched += usize::from(deed.load(pfn * PAGE_SIZE)? == host_programs::deed::Touch::Done(GREETING));
    }
    steps.equal("shared-pages-are-lent-to-the-host", buffers.len(), borrowed);
    steps.equal("vmm-reads-the-guests-greeting-through-its-mapping", buffers.len(), read);
    steps.equal("kernel-reads-the-guests-greeting", buffers.len(), touched);
    steps.equal("vmm-writes-its-answer", buffers.len(), answered);

    steps.tell(
        "The guest takes the buffer back. The host is asked first and unmaps it; the next touch is SIGBUS.",
    );
    let asked = deed.stats()?.unshares;
    let [phase, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-has-its-buffer-back", Phase::Unshared as u64, phase);
    let asked = deed.stats()?.unshares - asked;
    steps.check("host-is-asked-before-the-pages-are-private", "at least 1 request", asked, asked >= 1);
    let [(ipa, _), ..] = buffers[..] else { return Err(failure!("the guest shares nothing")) };
    page_is_gone(
        deed,
        steps,
        machine,
        ipa.wrapping_sub(RAM_BASE),
        ["an-unshared-page-is-no-page-of-the-hosts", "vmm-touch-of-an-unshared-page-is-sigbus"],
    )?;
    kernel_touch_aborts(deed, steps, &buffers, "kernel-touch-of-unshared-pages-aborts")?;
    Ok(buffers)
}

fn host_keeps_its_mapping(deed: &Deed, steps: &mut Steps, machine: &mut Machine) -> Result<(), Failure> {
    steps.tell("A host that acknowledges without unmapping finds its mapping dead.");
    let [phase, ipa, ..] = machine.run_to_phase(steps)?;
    steps.equal("guest-comes-to-share-another-page", Phase::SharedAgain as u64, phase);
    let offset = ipa.wrapping_sub(RAM_BASE);
    let loaded = machine.mapping().load(offset);
    steps.check("vmm-has-the-page-mapped-and-used", Hex(GREETING), Loaded(loaded), loaded == Ok(GREETING));
    deed.misbehave(misbehaviour::ACKNOWLEDGE_WITHOUT_UNMAPPING)?;
    let result = machine.run_to_phase(steps);
    deed.misbehave(0)?;
    let [phase, ..] = result?;
    steps.equal("guest-has-that-page-back", Phase::UnsharedAgain as u64, phase);
    page_is_gone(
        deed,
        steps,
        machine,
        offset,
        ["a-page-taken-from-a-lying-host-is-no-page-of-the-hosts", "touch-through-a-kept-mapping-is-sigbus"],
    )
}

fn host_maps_without_asking(
    deed: &Deed,
    steps: &mut Steps,
    machine: &Machine,
    secrets: &[(u64, u64)],
) -> Result<(), Failure> {
    steps.tell(
        "A kernel that maps the guest's pages without asking the hypervisor gets SIGBUS for its program.",
    );
    deed.misbehave(misbehaviour::MAP_WITHOUT_ASKING)?;
    let fresh = machine.memory_file().map(RAM_SIZE)?;
    let signals = secrets.iter().filter(|(ipa, _)| {
        let offset = ipa.wrapping_sub(RAM_BASE) + 8;
        matches!(fresh.load(offset), Err(signal) if signal.is_bus_error_at(fresh.address(offset)))
    });
    steps.equal("touch-through-an-unasked-mapping-is-sigbus", secrets.len(), signals.count());
    deed.misbehave(0)
}

/// Pages behind guest RAM that are the guest's now.
fn private_pages(deed: &Deed, machine: &Machine) -> Result<Vec<u64>, Failure> {
    let mut pages = Vec::new();
    for offset in (0..RAM_SIZE).step_by(PAGE_SIZE as usize) {
        if let Some(pfn) = deed.gmem_pfn(machine.memory_file(), offset)?
            && !deed.accessible(pfn)?
        {
            pages.push(pfn);
        }
    }
    Ok(pages)
}

fn first_guest_ends(
    deed: &Deed,
    steps: &mut Steps,
    mut machine: Machine,
    vm: abi::VmHandle,
) -> Result<(), Failure> {
    steps.tell("The guest turns itself off; that is final. The VMM closes the VM.");
    let event = machine.run_to_end(steps)?;
    steps.check("guest-turns-itself-off", "off", event, event == Event::Off);
    let again = deed.call(abi::HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] })?;
    steps.check(
        "a-guest-that-is-off-cannot-be-run",
        "Permission",
        again,
        again.is_error(abi::Error::Permission),
    );
    drop(machine);
    let gone = deed.call(abi::HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] })?;
    steps.check(
        "the-handle-of-an-ended-vm-names-nothing",
        "NoEntry",
        gone,
        gone.is_error(abi::Error::NoEntry),
    );
    Ok(())
}

fn pages_come_back(deed: &Deed, steps: &mut Steps, pages: &[u64]) -> Result<(), Failure> {
    steps.tell("Teardown has returned every page, wiped.");
    let (mut owned, mut readable) = (0, 0);
    for pfn in pages {
        owned += usize::from(deed.query(*pfn)? == Some(HostState::Owned));
        readable += usize::from(matches!(deed.load(pfn * PAGE_SIZE)?, host_programs::deed::Touch::Done(_)));
    }
    steps.equal("pages-of-the-ended-guest-are-the-hosts", pages.len(), owned);
    steps.equal("kernel-can-touch-them-again", pages.len(), readable);
    // All of them were private at the end: the guest has taken back what it had shared.
    let mut filled = 0;
    for pfn in pages {
        for address in (pfn * PAGE_SIZE..(pfn + 1) * PAGE_SIZE).step_by(8) {
            filled += usize::from(deed.load(address)? != host_programs::deed::Touch::Done(0));
        }
    }
    steps.equal("kernel-reads-zeros-in-all-of-them", 0, filled);
    steps.equal("kernel-has-no-page-given-to-a-vm", 0, deed.stats()?.given_to_vms);
    Ok(())
}

fn second_guest_reads_zeros(deed: &Deed, steps: &mut Steps, pages: &[u64]) -> Result<(), Failure> {
    steps.tell("A second guest with the same addresses gets pages that the first one used, and reads zeros.");
    let mut machine = Machine::new(&Options::protected("secret", ARGUMENT_LOOK))?;
    let [phase, ..] = machine.run_to_phase(steps)?;
    steps.equal("second-guest-starts", Phase::Ready as u64, phase);
    let [phase, ..] = machine.run_to_phase(steps)?;
    steps.equal("second-guest-has-looked", Phase::Looked as u64, phase);
    let mut reused = 0;
    for offset in (0..RAM_SIZE).step_by(PAGE_SIZE as usize) {
        if let Some(pfn) = deed.gmem_pfn(machine.memory_file(), offset)? {
            reused += usize::from(pages.contains(&pfn));
        }
    }
    steps.check("second-guest-has-pages-of-the-first", "at least 1", reused, reused > 0);
    let event = machine.run_to_end(steps)?;
    steps.check("second-guest-turns-itself-off", "off", event, event == Event::Off);
    Ok(())
}

fn census_at_end(deed: &Deed, steps: &mut Steps, before: Option<Census>) -> Result<(), Failure> {
    steps.tell("The VMM counts pages again.");
    let stats = deed.stats()?;
    steps.tell(format_args!(
        "  The kernel: {} free, {} in use, {} given to the hypervisor's pools, {} given to VMs.",
        stats.free, stats.used, stats.given_to_pools, stats.given_to_vms
    ));
    check_unchanged(before, deed.census()?, steps);
    Ok(())
}

/// Two steps: the hypervisor says that the host has no access to a page of guest RAM, and the VMM's touch
/// is SIGBUS with the exact address.
fn page_is_gone(
    deed: &Deed,
    steps: &mut Steps,
    machine: &Machine,
    offset: u64,
    [state_step, touch_step]: [&str; 2],
) -> Result<(), Failure> {
    let state = deed.query(backing(deed, machine.memory_file(), offset)?)?;
    steps.check(state_step, "NoPage", Shown(state), state == Some(HostState::NoPage));
    let address = machine.mapping().address(offset + 8);
    let loaded = machine.mapping().load(offset + 8);
    let pass = matches!(loaded, Err(signal) if signal.is_bus_error_at(address));
    steps.check(touch_step, format_args!("SIGBUS at {address:#x}"), Loaded(loaded), pass);
    Ok(())
}

fn kernel_touch_aborts(
    deed: &Deed,
    steps: &mut Steps,
    pages: &[(u64, u64)],
    step: &str,
) -> Result<(), Failure> {
    let mut aborts = 0;
    for (_, pfn) in pages {
        aborts += usize::from(deed.load(pfn * PAGE_SIZE)?.is_injected_abort(0));
    }
    steps.equal(step, pages.len(), aborts);
    Ok(())
}

/// The page behind an offset of guest RAM.
fn backing(deed: &Deed, memory: &sys::File, offset: u64) -> Result<u64, Failure> {
    deed.gmem_pfn(memory, offset)?.ok_or_else(|| failure!("there is no page at offset {offset:#x}"))
}

fn outcome(result: &Result<u64, Failure>) -> &dyn core::fmt::Display {
    match result {
        Ok(_) => &"done",
        Err(failure) => failure,
    }
}

struct Shown(Option<HostState>);

impl core::fmt::Display for Shown {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Some(state) => write!(f, "{state:?}"),
            None => f.write_str("no answer"),
        }
    }
}

struct Loaded(Result<u64, Signal>);

impl core::fmt::Display for Loaded {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Ok(value) => write!(f, "value {value:#x}"),
            Err(signal) => write!(f, "{signal}"),
        }
    }
}
