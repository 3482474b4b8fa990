//! Guests with a neighbour, and guests with two vCPUs.

use host_programs::deed::Deed;
use host_programs::kvm::Exit;
use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::Steps;
use host_programs::uapi::errno;
use host_programs::{Failure, failure, sys};

use crate::run::ends;

/// Two guests fill all their registers and run in turns.
pub(crate) fn registers(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("Two guests fill every register that they can reach, and take turns on the CPU.");
    let values = [[0x1111_0000_5eed_0001], [0x2222_0000_5eed_0002]];
    let mut first = Machine::new(&Options { values: &values[0], ..Options::protected("registers", 0) })?;
    first.run_to_phase(steps)?;
    // The second guest begins while the first one's registers are full, and looks at what it finds. Its steps
    // have the same names, so they are counted apart.
    let mut second_steps = Steps::new(quiet);
    let mut second = Machine::new(&Options { values: &values[1], ..Options::protected("registers", 0) })?;
    for round in 2..=3 {
        second.run_to_phase(&mut second_steps)?;
        let [phase, ..] = first.run_to_phase(steps)?;
        if phase != round {
            return Err(failure!("the first guest is in phase {phase}, not {round}"));
        }
    }
    second.run_to_phase(&mut second_steps)?;
    ends(&mut first, "first-guest-runs-to-its-end", steps)?;
    let event = second.run_to_end(&mut second_steps)?;
    steps.check("second-guest-runs-to-its-end", "off", event, event == Event::Off);
    let failed = second_steps.failed();
    steps.equal("second-guest-found-none-of-the-firsts-registers", 0, failed);
    steps.check("second-guest-checked-all-its-steps", 10, second_steps.passed(), second_steps.passed() == 10);
    Ok(())
}

/// Registers that keep what is written to them on any CPU: fewer would mean that the survey saw nothing.
const KEPT_AT_LEAST: u64 = 12;

/// Two guests write to every register that there can be.
pub(crate) fn survey(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("Two guests write to every system register that there can be, known or not, and look again.");
    let values = [[0x1111_0000_5eed_0001], [0x2222_0000_5eed_0002]];
    let mut first = Machine::new(&Options { values: &values[0], ..Options::protected("survey", 0) })?;
    let [_, count, ..] = first.run_to_phase(steps)?;
    let many = format_args!("at least {KEPT_AT_LEAST}");
    steps.check("guest-has-registers-of-its-own", many, count, count >= KEPT_AT_LEAST);
    let mut second_steps = Steps::new(quiet);
    let mut second = Machine::new(&Options { values: &values[1], ..Options::protected("survey", 0) })?;
    let [_, second_count, ..] = second.run_to_phase(&mut second_steps)?;
    steps.equal("second-guest-has-as-many", count, second_count);
    ends(&mut first, "first-guest-runs-to-its-end", steps)?;
    let event = second.run_to_end(&mut second_steps)?;
    steps.check("second-guest-runs-to-its-end", "off", event, event == Event::Off);
    let kept = (second_steps.passed(), second_steps.failed()) == (1, 0);
    steps.check("second-guest-keeps-its-registers", true, kept, kept);
    Ok(())
}

/// A line of the second guest: printed as prose.
fn quiet(line: &str) {
    let text = host_programs::steps::format(format_args!("  second guest: {line}"));
    host_programs::runtime::print(&text);
}

/// The guest turns its second vCPU on and off.
pub(crate) fn psci(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest with two vCPUs turns them on and off by its own PSCI.");
    let deed = Deed::open()?;
    let mut machine = Machine::new(&Options { vcpus: 2, ..Options::protected("psci", 0) })?;
    let refused = machine.run(1, steps)?;
    let off = |event| matches!(event, Event::Exit(Exit::Error(_)));
    steps.check("host-cannot-start-a-vcpu-that-the-guest-has-not", "an error", refused, off(refused));

    expect_phase(&mut machine, 0, 1, steps)?;
    expect_phase(&mut machine, 1, 11, steps)?;
    expect_phase(&mut machine, 0, 2, steps)?;
    let event = run(&mut machine, 1, steps)?;
    let expected = Event::Exit(Exit::Error(errno::EAGAIN));
    steps.check("second-vcpu-turns-itself-off", expected, event, event == expected);
    let event = run(&mut machine, 1, steps)?;
    steps.check("host-cannot-run-a-vcpu-that-is-off", "an error", event, off(event));
    expect_phase(&mut machine, 0, 3, steps)?;
    let event = run(&mut machine, 1, steps)?;
    steps.check("second-vcpu-turns-the-guest-off", "off", event, event == Event::Off);
    let vm = deed.vm_handle(machine.vm())?;
    for (vcpu, step) in [(0, "first-vcpu-of-a-guest-that-is-off"), (1, "second-vcpu-of-a-guest-that-is-off")]
    {
        let answer = deed.call(abi::HostCall::VcpuRun { vm, vcpu, values: [0; 4] })?;
        steps.check(step, "Permission", answer, answer.is_error(abi::Error::Permission));
    }
    drop(machine);

    let mut machine = Machine::new(&Options::protected("psci", 1))?;
    let event = machine.run(0, steps)?;
    steps.check("a-guest-that-asks-for-a-reset-tells-its-vmm", "reset", event, event == Event::Reset);
    let vm = deed.vm_handle(machine.vm())?;
    let answer = deed.call(abi::HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] })?;
    let refused = answer.is_error(abi::Error::Permission);
    steps.check("and-is-at-its-end", "Permission", answer, refused);
    Ok(())
}

/// Runs a vCPU, passing over interruptions.
fn run(machine: &mut Machine, vcpu: usize, steps: &mut Steps) -> Result<Event, Failure> {
    loop {
        match machine.run(vcpu, steps)? {
            Event::Exit(Exit::Interrupted) => {}
            event => return Ok(event),
        }
    }
}

fn expect_phase(machine: &mut Machine, vcpu: usize, phase: u64, steps: &mut Steps) -> Result<(), Failure> {
    match run(machine, vcpu, steps)? {
        Event::Phase([reached, ..]) if reached == phase => Ok(()),
        event => Err(failure!("vCPU {vcpu} should reach phase {phase}, but: {event}")),
    }
}

/// Interruptions that each vCPU of the spinning guest must take.
const INTERRUPTIONS: usize = 5;

/// Two vCPUs that never exit by themselves.
pub(crate) fn spin(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A guest with two vCPUs that loop for ever: the host's interrupts get the CPU back.");
    let deed = Deed::open()?;
    let mut machine = Machine::new(&Options { vcpus: 2, ..Options::protected("spin", 0) })?;
    expect_phase(&mut machine, 0, 1, steps)?;
    let started = sys::now();
    for (vcpu, step) in [
        (0, "host-gets-the-cpu-back-from-the-first-vcpu"),
        (1, "host-gets-the-cpu-back-from-the-second-vcpu"),
    ] {
        let mut interrupted = 0;
        for _ in 0..INTERRUPTIONS {
            interrupted += usize::from(machine.run(vcpu, steps)? == Event::Exit(Exit::Interrupted));
        }
        steps.equal(step, INTERRUPTIONS, interrupted);
    }
    let passed = sys::now().saturating_sub(started);
    steps.check("the-hosts-clock-went-on", "more than 0 ns", passed, passed > 0);
    let vm = deed.vm_handle(machine.vm())?;
    drop(machine);
    let answer = deed.call(abi::HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] })?;
    steps.check("a-spinning-guest-can-be-ended", "NoEntry", answer, answer.is_error(abi::Error::NoEntry));
    Ok(())
}
