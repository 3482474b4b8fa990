//! Threads on two CPUs that come to the kernel in turn.

use super::super::nr;
use super::super::tests::kernel_at_start;
use super::*;
use crate::fs::File;
use crate::kvm::vm::TYPE_PROTECTED;
use crate::kvm::{VcpuRef, Vm};
use crate::machine::{Hypervisor, Machine};
use crate::process::context::UserContext;
use crate::process::signal::Action;
use crate::schedule::{Done, Job};
use crate::testing::{Event, FakeMachine};
use abi::Exit;
use alloc::rc::Rc;

const DATA: u64 = 0x41_0000;
/// Half of the program's stack.
const STACK: u64 = 0x7fff_fff8_0000;
const THREAD: u64 = CLONE_SHARED | CLONE_SETTLS | CLONE_CHILD_CLEARTID | CLONE_PARENT_SETTID;
const SIGUSR1: u64 = 10;

/// What a CPU was told to do, and the registers that it was given.
struct At {
    job: Job,
    context: UserContext,
}

impl Kernel<'_> {
    fn at(&mut self, cpu: usize, (done, mut context): (Done, UserContext)) -> At {
        let job = self.next(cpu, done, &mut context);
        At { job, context }
    }
}

fn nothing() -> (Done, UserContext) {
    (Done::Nothing, UserContext::default())
}

fn rested() -> (Done, UserContext) {
    (Done::Rest, UserContext::default())
}

fn context(at: &At) -> UserContext {
    assert!(matches!(at.job, Job::Run { .. }), "no thread runs: {:?}", at.job);
    at.context
}

/// The thread of a job makes a system call.
fn calls(at: &At, number: u64, arguments: &[u64]) -> (Done, UserContext) {
    let mut context = context(at);
    context.x[..6].fill(0);
    context.x[..arguments.len()].copy_from_slice(arguments);
    context.x[8] = number;
    (context.vector, context.esr) = (0, 0x5600_0000);
    (Done::Run, context)
}

fn interrupted(at: &At) -> (Done, UserContext) {
    (Done::Run, UserContext { vector: 1, ..context(at) })
}

fn result(at: &At) -> i64 {
    context(at).x[0] as i64
}

fn word(kernel: &mut Kernel<'_>, address: u64) -> u32 {
    let mut bytes = [0; 4];
    kernel.process.space.read(&mut kernel.host, address, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// A kernel with two threads, the first on CPU 0 and the second on CPU 1.
fn two<'m>(machine: &'m FakeMachine) -> (Kernel<'m>, At, At) {
    let mut kernel = kernel_at_start(machine);
    let first = kernel.at(0, nothing());
    let first = kernel.at(0, calls(&first, nr::CLONE, &[THREAD, STACK, DATA + 64, 0x77, DATA + 68]));
    let second = kernel.at(1, nothing());
    (kernel, first, second)
}

fn handles_sigusr1(kernel: &mut Kernel<'_>) {
    let action = Action { handler: 0x40_0008, ..Action::default() };
    kernel.process.actions.set_action(SIGUSR1, action).unwrap();
}

#[test]
fn a_new_thread_has_a_stack_a_pointer_and_a_number_of_its_own() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    assert_eq!((result(&first), result(&second)), (2, 0));
    let other = context(&second);
    assert_eq!((other.sp, other.tls, other.pc), (STACK, 0x77, context(&first).pc));
    assert_eq!(word(&mut kernel, DATA + 64), 2);
    assert!(matches!(kernel.at(2, nothing()).job, Job::Rest));
}

#[test]
fn only_threads_of_the_program_can_be_made() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel_at_start(&machine);
    let mut job = kernel.at(0, nothing());
    for flags in [0, CLONE_VM, THREAD | 1 << 31, THREAD & !CLONE_THREAD] {
        job = kernel.at(0, calls(&job, nr::CLONE, &[flags, DATA]));
        assert_eq!(result(&job), -22, "{flags:#x}");
    }
    for number in 2..=MAX_THREADS as i64 {
        job = kernel.at(0, calls(&job, nr::CLONE, &[CLONE_SHARED, DATA]));
        assert_eq!(result(&job), number);
    }
    job = kernel.at(0, calls(&job, nr::CLONE, &[CLONE_SHARED, DATA]));
    assert_eq!(result(&job), -11);
}

#[test]
fn threads_of_one_cpu_have_their_turns() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel_at_start(&machine);
    let job = kernel.at(0, nothing());
    let mut job = kernel.at(0, calls(&job, nr::CLONE, &[CLONE_SHARED, 0x1000]));
    let mut stacks = alloc::vec::Vec::new();
    for turn in 0..4 {
        job = match turn % 2 {
            0 => kernel.at(0, interrupted(&job)),
            _ => kernel.at(0, calls(&job, nr::SCHED_YIELD, &[])),
        };
        stacks.push(context(&job).sp);
    }
    assert_eq!(stacks[0], 0x1000);
    assert_eq!(stacks[0], stacks[2]);
    assert_ne!(stacks[0], stacks[1]);
    assert_eq!(stacks[1], stacks[3]);
}

#[test]
fn a_thread_that_ends_wakes_who_waits_for_it_and_the_last_ends_the_program() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    kernel.process.space.write(&mut kernel.host, DATA + 68, &2u32.to_le_bytes()).unwrap();
    let waits = calls(&first, nr::FUTEX, &[DATA + 68, FUTEX_WAIT | FUTEX_PRIVATE, 2]);
    assert!(matches!(kernel.at(0, waits).job, Job::Rest));
    machine.events();
    assert!(
        matches!(kernel.at(1, calls(&second, nr::EXIT, &[5])).job, Job::Run { .. }),
        "CPU 1 takes the waiter"
    );
    assert_eq!(word(&mut kernel, DATA + 68), 0);
    // Nobody else is called for it.
    assert_eq!(machine.events(), []);
    let job = kernel.at(0, rested());
    assert!(matches!(job.job, Job::Rest));
    let Some((thread, Some(1))) = kernel.threads.find(1) else { panic!("it is on CPU 1") };
    let context = thread.context;
    assert_eq!(context.x[0], 0);
    let last = At { job: Job::Run { root: crate::mm::Pfn(0), asid: 1 }, context };
    assert!(matches!(kernel.at(1, calls(&last, nr::EXIT, &[7])).job, Job::Leave));
    assert!(matches!(kernel.at(0, rested()).job, Job::Leave));
    assert_eq!(kernel.clean_up().0, Some(Ended::Exit(7)));
}

#[test]
fn a_wait_looks_at_the_word_and_has_an_end() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel_at_start(&machine);
    let job = kernel.at(0, nothing());
    let job = kernel.at(0, calls(&job, nr::FUTEX, &[DATA + 64, FUTEX_WAIT, 1]));
    assert_eq!(result(&job), -11);
    let mut job = kernel.at(0, calls(&job, nr::FUTEX, &[DATA + 65, FUTEX_WAIT, 0]));
    assert_eq!(result(&job), -22);
    let time = [0u64, 25_000_000].map(u64::to_le_bytes).concat();
    kernel.process.space.write(&mut kernel.host, DATA + 80, &time).unwrap();
    for (number, arguments, expected) in
        [(nr::FUTEX, [DATA + 64, FUTEX_WAIT, 0, DATA + 80], -110), (nr::NANOSLEEP, [DATA + 80, 0, 0, 0], 0)]
    {
        let start = kernel.host.machine.now();
        job = kernel.at(0, calls(&job, number, &arguments));
        while matches!(job.job, Job::Rest) {
            kernel.host.machine.idle();
            job = kernel.at(0, rested());
        }
        assert_eq!(result(&job), expected);
        assert!(kernel.host.machine.now() - start >= 25_000_000);
    }
}

#[test]
fn a_signal_brings_its_thread_into_the_kernel_and_to_its_handler() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    handles_sigusr1(&mut kernel);
    machine.events();
    let first = kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGUSR1]));
    assert_eq!((result(&first), machine.events()), (0, alloc::vec![Event::Kick(1)]));
    let second = kernel.at(1, interrupted(&second));
    assert_eq!((context(&second).pc, result(&first)), (0x40_0008, 0));
    for (arguments, error) in [([1, 9, SIGUSR1], -3), ([2, 2, SIGUSR1], -3), ([1, 2, 65], -22)] {
        let done = calls(&first, nr::TGKILL, &arguments);
        assert_eq!(result(&kernel.at(0, done)), error);
    }
}

#[test]
fn a_signal_that_is_ignored_interrupts_nothing() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    assert!(matches!(kernel.at(1, calls(&second, nr::FUTEX, &[DATA + 72, FUTEX_WAIT, 0])).job, Job::Rest));
    const SIGURG: u64 = 23;
    let first = kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGURG]));
    assert_eq!(result(&first), 0);
    assert!(matches!(kernel.at(1, rested()).job, Job::Rest));
}

#[test]
fn a_signal_that_comes_while_a_thread_is_on_its_way_to_wait_is_not_lost() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    handles_sigusr1(&mut kernel);
    kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGUSR1]));
    let woken = kernel.at(1, calls(&second, nr::FUTEX, &[DATA + 72, FUTEX_WAIT, 0]));
    assert_eq!(context(&woken).pc, 0x40_0008);
    let back = kernel.at(1, calls(&woken, nr::RT_SIGRETURN, &[]));
    assert_eq!(result(&back), Errno::EINTR.to_word() as i64);
}

#[test]
fn a_signal_ends_a_wait() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    handles_sigusr1(&mut kernel);
    assert!(matches!(kernel.at(1, calls(&second, nr::FUTEX, &[DATA + 72, FUTEX_WAIT, 0])).job, Job::Rest));
    let first = kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGUSR1]));
    assert_eq!(result(&first), 0);
    let woken = kernel.at(1, rested());
    assert_eq!(context(&woken).pc, 0x40_0008);
    let back = kernel.at(1, calls(&woken, nr::RT_SIGRETURN, &[]));
    assert_eq!(result(&back), Errno::EINTR.to_word() as i64);
}

const RUN: u64 = 0xae80;

/// A vCPU that the program has open; returns its descriptor.
fn vcpu(kernel: &mut Kernel<'_>) -> u64 {
    let vm = Rc::new(Vm::new(&mut kernel.host, TYPE_PROTECTED).unwrap());
    vm.create_vcpu(&mut kernel.host, 0).unwrap();
    let vcpu = VcpuRef::new(&vm, 0).unwrap();
    vcpu.with(|vcpu| vcpu.initialised.set(true)).unwrap();
    let slot = kernel.process.files.vacant().unwrap();
    kernel.process.files.put(slot, File::Vcpu(vcpu)).unwrap()
}

/// EL2 does what a job says.
fn runs(machine: &FakeMachine, at: &At) -> (Done, UserContext) {
    match &at.job {
        Job::Call(words) => (Done::Call(machine.call_words(words)), at.context),
        other => panic!("no vCPU runs: {other:?}"),
    }
}

#[test]
fn a_vcpu_that_a_thread_runs_is_waited_for() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    let vcpu = vcpu(&mut kernel);
    let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    assert!(matches!(kernel.at(0, calls(&first, nr::IOCTL, &[vcpu, RUN])).job, Job::Rest));
    assert!(matches!(kernel.at(0, rested()).job, Job::Rest));
    machine.idle();
    let again = kernel.at(0, rested());
    assert_eq!(context(&again).pc, context(&first).pc.wrapping_sub(4));
    assert!(matches!(kernel.at(0, calls(&first, nr::IOCTL, &[vcpu, RUN])).job, Job::Rest));
    machine.exits(&[Exit::SystemOff, Exit::SystemReset]);
    let second = kernel.at(1, runs(&machine, &second));
    assert_eq!(result(&second), 0);
    machine.idle();
    let first = kernel.at(0, rested());
    let first = kernel.at(0, calls(&first, nr::IOCTL, &[vcpu, RUN]));
    let first = kernel.at(0, runs(&machine, &first));
    assert_eq!(result(&first), 0);
}

#[test]
fn a_signal_calls_a_vcpu_back() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    handles_sigusr1(&mut kernel);
    let vcpu = vcpu(&mut kernel);
    let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    machine.exits(&[Exit::Interrupted, Exit::Interrupted, Exit::SystemOff]);
    let second = kernel.at(1, runs(&machine, &second));
    machine.events();
    kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGUSR1]));
    assert_eq!(machine.events(), [Event::Kick(1)]);
    let second = kernel.at(1, runs(&machine, &second));
    assert_eq!(context(&second).pc, 0x40_0008);
    let second = kernel.at(1, calls(&second, nr::RT_SIGRETURN, &[]));
    assert_eq!(result(&second), Errno::EINTR.to_word() as i64);
    let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    assert!(matches!(second.job, Job::Call(_)), "the vCPU is free again");
}

#[test]
fn a_signal_keeps_the_answer_to_a_guests_call() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    handles_sigusr1(&mut kernel);
    let vcpu = vcpu(&mut kernel);
    let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    kernel.at(0, calls(&first, nr::TGKILL, &[1, 2, SIGUSR1]));
    machine.exits(&[Exit::GuestCall { arguments: [0x8600_0001, 0, 0, 0, 0, 0, 0] }, Exit::SystemOff]);
    let second = kernel.at(1, runs(&machine, &second));
    assert_eq!(context(&second).pc, 0x40_0008);
    let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    machine.events();
    runs(&machine, &second);
    assert_eq!(machine.events(), [Event::Run(u64::MAX)]);
}

#[test]
fn a_vm_whose_vcpu_runs_ends_with_the_run_or_with_the_program() {
    for exits in [false, true] {
        let machine = FakeMachine::new(128);
        let (mut kernel, first, second) = two(&machine);
        let before = kernel.host.frames.census().vms;
        let vcpu = vcpu(&mut kernel);
        let second = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
        let first = kernel.at(0, calls(&first, nr::CLOSE, &[vcpu]));
        assert!(kernel.host.frames.census().vms > before);
        if exits {
            kernel.at(0, calls(&first, nr::EXIT_GROUP, &[0]));
            assert!(matches!(kernel.at(1, runs(&machine, &second)).job, Job::Leave));
            assert_eq!(kernel.clean_up().1.frames.free(), 128);
        } else {
            machine.exits(&[Exit::SystemOff]);
            assert_eq!(result(&kernel.at(1, runs(&machine, &second))), 0);
            assert_eq!(kernel.host.frames.census().vms, before);
        }
    }
}

#[test]
fn a_vcpu_that_is_off_is_tried_again_if_another_thread_can_turn_it_on() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    let vcpu = vcpu(&mut kernel);
    let run = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    assert!(matches!(kernel.at(1, runs(&machine, &run)).job, Job::Rest));
    machine.idle();
    let run = kernel.at(1, rested());
    machine.exits(&[Exit::SystemOff]);
    let second = kernel.at(1, runs(&machine, &run));
    assert_eq!(result(&second), 0);
    // The other thread ends: now nobody could.
    kernel.at(0, calls(&first, nr::EXIT, &[]));
    let run = kernel.at(1, calls(&second, nr::IOCTL, &[vcpu, RUN]));
    assert_eq!(result(&kernel.at(1, runs(&machine, &run))), Errno::EAGAIN.to_word() as i64);
}

#[test]
fn the_end_of_the_program_brings_all_cpus_back() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    machine.events();
    assert!(matches!(kernel.at(0, calls(&first, nr::EXIT_GROUP, &[4])).job, Job::Rest), "CPU 1 has a thread");
    assert_eq!(machine.events(), [Event::Kick(1)]);
    assert!(matches!(kernel.at(1, interrupted(&second)).job, Job::Leave));
    assert!(matches!(kernel.at(0, rested()).job, Job::Leave));
    let (ended, host) = kernel.clean_up();
    assert_eq!((ended, host.frames.free()), (Some(Ended::Exit(4)), 128));
}

#[test]
fn a_program_learns_which_cpus_there_are_and_on_which_it_is() {
    let machine = FakeMachine::new(128);
    let (mut kernel, first, second) = two(&machine);
    let first = kernel.at(0, calls(&first, nr::SCHED_GETAFFINITY, &[0, 8, DATA + 64]));
    assert_eq!((result(&first), word(&mut kernel, DATA + 64)), (8, 0b11));
    let second = kernel.at(1, calls(&second, nr::GETCPU, &[DATA + 64]));
    assert_eq!((result(&second), word(&mut kernel, DATA + 64)), (0, 1));
}
