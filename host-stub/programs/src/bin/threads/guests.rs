//! Guests and vCPUs on all CPUs.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_stub::protocol::{ANSWER, ARGUMENT_HOLD, BUFFER, GREETING, PAGE_SIZE, Phase, RAM_BASE};
use host_programs::deed::Deed;
use host_programs::kvm::Exit;
use host_programs::machine::{Event, Machine, Options};
use host_programs::steps::Steps;
use host_programs::thread::{self, Thread};
use host_programs::uapi::signal;
use host_programs::{Failure, failure, sys};

use crate::memory::Watch;
use crate::run::{for_each_other_cpu, wait_until};

/// Steps that the guest `memory` checks.
const STEPS_OF_MEMORY: u64 = 30;
/// Guests that each thread runs, one after the other.
const GUESTS: u64 = 3;

fn quiet(_: &str) {}

/// A guest that shares, unshares and relinquishes pages, to its end.
fn one(steps: &mut Steps) -> Result<Event, Failure> {
    let mut machine = Machine::new(&Options::protected("memory", 0))?;
    let [_, relinquished, ..] = machine.run_to_phase(steps)?;
    let second = relinquished.wrapping_sub(RAM_BASE) + PAGE_SIZE;
    machine.mapping().store(second, GREETING).map_err(|signal| failure!("a relinquished page: {signal}"))?;
    machine.run_to_end(steps)
}

/// Each thread makes guests of its own and runs them.
pub(crate) fn many(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell(format_args!(
        "A thread for each CPU makes {GUESTS} protected guests, one after the other, which share and unshare pages."
    ));
    let results = Arc::new([const { AtomicU64::new(0) }; 4]);
    let run = |results: &[AtomicU64; 4]| {
        let [ended, passed, failed, cpus] = results;
        for _ in 0..GUESTS {
            let mut own = Steps::new(quiet);
            let event = one(&mut own);
            ended.fetch_add(u64::from(event == Ok(Event::Off)), Ordering::Relaxed);
            passed.fetch_add(own.passed() as u64, Ordering::Relaxed);
            failed.fetch_add(own.failed() as u64, Ordering::Relaxed);
            cpus.fetch_or(1 << thread::cpu(), Ordering::Relaxed);
        }
    };
    let threads = for_each_other_cpu(|| {
        let results = results.clone();
        Thread::spawn(move || run(&results))
    })?;
    let guests = (threads.len() as u64 + 1) * GUESTS;
    run(&results);
    threads.into_iter().for_each(Thread::join);
    let [ended, passed, failed, cpus] = results.each_ref().map(|result| result.load(Ordering::Relaxed));
    steps.equal("every-guest-runs-to-its-end", guests, ended);
    steps.equal("and-checks-all-its-steps", guests * STEPS_OF_MEMORY, passed);
    steps.equal("none-of-which-fails", 0, failed);
    steps.tell(format_args!("  They ran on CPUs {cpus:#b}."));
    Ok(())
}

/// Nanoseconds that a vCPU stays in its guest: several ticks of the host's.
const STAY: u64 = 100_000_000;

/// Two vCPUs that never end, on CPUs of their own, and are called back.
pub(crate) fn kick(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("Two threads run the vCPUs of a guest that never exits, until a signal calls each back.");
    let mut machine = Machine::new(&Options { vcpus: 2, ..Options::protected("spin", 0) })?;
    while machine.run(0, steps)? == Event::Exit(Exit::Interrupted) {}
    let machine = Arc::new(machine);
    let back = Arc::new([const { AtomicU64::new(0) }; 2]);
    let mut threads = alloc::vec::Vec::new();
    for index in 0..2 {
        let (machine, back) = (machine.clone(), back.clone());
        threads.push(Thread::spawn(move || {
            let Ok(vcpu) = machine.vcpu(index) else { return };
            let outcome = if vcpu.run() == Exit::Interrupted { 1 } else { 2 };
            if let Some(place) = back.get(index) {
                place.store(outcome, Ordering::Release);
            }
        })?);
    }
    let outcomes = || back.each_ref().map(|back| back.load(Ordering::Acquire));
    sys::sleep(STAY);
    let before = outcomes();
    steps.check(
        "vcpus-stay-in-their-guest-over-ticks",
        "[0, 0]",
        format_args!("{before:?}"),
        before == [0, 0],
    );
    for (index, name) in
        [(0, "a-signal-calls-the-first-vcpu-back"), (1, "a-signal-calls-the-second-vcpu-back")]
    {
        if let Some(thread) = threads.get(index) {
            thread.kill(signal::SIGUSR1)?;
        }
        wait_until(|| outcomes().get(index) != Some(&0));
        let now = outcomes();
        let others_stay = index == 1 || now == [1, 0];
        steps.check(name, "EINTR", format_args!("{now:?}"), now.get(index) == Some(&1) && others_stay);
    }
    threads.into_iter().for_each(Thread::join);
    Ok(())
}

/// A guest takes a shared page back that threads of its VMM use on all CPUs.
pub(crate) fn unshare(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell(
        "A guest shares pages, threads of its VMM read one on all CPUs, and the guest takes them back.",
    );
    let mut machine = Machine::new(&Options { values: &[0x5eed], ..Options::protected("secret", 0) })?;
    for expected in [Phase::Ready, Phase::Kept, Phase::Shared] {
        let [phase, ..] = machine.run_to_phase(steps)?;
        if phase != expected as u64 {
            return Err(failure!("the guest is in phase {phase}"));
        }
    }
    let offset = BUFFER - RAM_BASE;
    for page in 0..2 {
        let stored = machine.mapping().store(offset + page * PAGE_SIZE + 8, ANSWER);
        stored.map_err(|signal| failure!("a shared page: {signal}"))?;
    }
    // The kernel's own word for a page that it does not map: EL2's would be BUS_OBJERR.
    let gone = (signal::SIGBUS, signal::BUS_ADRERR);
    let (watch, threads) = Watch::begin(machine.mapping().address(offset), GREETING, gone)?;
    let count = threads.len() as u64;
    let asked = deed.stats()?.unshares;
    let [phase, ..] = machine.run_to_phase(steps)?;
    watch.is_gone();
    threads.into_iter().for_each(Thread::join);
    steps.equal("the-guest-has-its-pages-back", Phase::Unshared as u64, phase);
    steps.equal("the-host-was-asked-once", 1, deed.stats()?.unshares - asked);
    steps.equal("every-thread-loses-a-page-that-is-unshared", count, watch.lost.load(Ordering::Relaxed));
    steps.equal("and-none-reads-what-the-guest-keeps-there", 0, watch.wrong.load(Ordering::Relaxed));
    let event = machine.run_to_end(steps)?;
    steps.check("guest-turns-itself-off", "off", event, event == Event::Off);
    Ok(())
}

/// A guest holds a secret in its registers on another CPU, and the machine is reset.
pub(crate) fn reset(deed: &Deed, steps: &mut Steps, nonce: u64) -> Result<(), Failure> {
    steps.tell("A thread runs a guest that holds a secret in its registers; the host resets the machine.");
    let options = Options { values: &[nonce], ..Options::protected("secret", ARGUMENT_HOLD) };
    let mut machine = Machine::new(&options)?;
    for expected in [Phase::Ready, Phase::Kept] {
        let [phase, ..] = machine.run_to_phase(steps)?;
        if phase != expected as u64 {
            return Err(failure!("the guest is in phase {phase}"));
        }
    }
    let back = Arc::new(AtomicU64::new(0));
    let seen = back.clone();
    let _guest = Thread::spawn(move || {
        if let Ok(vcpu) = machine.vcpu(0) {
            vcpu.run();
        }
        seen.store(1, Ordering::Release);
    })?;
    // No rest, which would leave this CPU to the guest.
    let end = sys::now() + STAY;
    while sys::now() < end {
        core::hint::spin_loop();
    }
    steps.equal("the-guest-holds-its-secret-over-ticks", 0, back.load(Ordering::Acquire));
    Err(deed.end_machine(steps, abi::psci::SYSTEM_RESET))
}
