//! Every pair of operations on one page, at the same time, from every state in which that can matter, under many
//! schedules (`cargo xtask test --threads`).
//!
//! Pages 2 and 3 are neighbours in a block of the host's; guest pages 0 and 1 are neighbours in a table. VM 0 is
//! protected, VM 1 is not.

#![cfg(deed_shuttle)]

use abi::page::{Permissions, Pool};
use abi::{Error, HostCall};
use deed_tests::calls_of_the_core;
use deed_tests::threads::{Op, Pair, Start, explore, turn_a_cpu_on_from_two, under_schedules};
use hyp::ownership::query::Census;
use hyp::testing::{PROTECTED, World, become_cpu};
use spec::{Call, Run};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Schedules of a pair on a push, in each of its states; `DEED_SCHEDULES` asks for another number.
const SCHEDULES: usize = 200;

const READ_WRITE: Permissions = Permissions { write: true, execute: false };
const X: Run = Run { first: 2, count: 1 };
const Y: Run = Run { first: 3, count: 1 };
/// The guest page that page X is at, and that with its neighbour.
const AT: Run = Run { first: 0, count: 1 };
const BOTH: Run = Run { first: 0, count: 2 };

/// What is done.
const OPS: [Op; 39] = [
    Op::Call(Call::ShareHyp { pfns: X }),
    Op::Call(Call::UnshareHyp { pfns: X }),
    Op::Call(Call::Pin { pfn: 2 }),
    Op::Call(Call::Unpin { pfn: 2 }),
    Op::Call(Call::DonateGuest { vm: 0, pfn: 2, gfn: 0, count: 1 }),
    Op::Call(Call::DonateGuest { vm: 0, pfn: 2, gfn: 0, count: 2 }),
    Op::Call(Call::DonateGuest { vm: 0, pfn: 3, gfn: 1, count: 1 }),
    Op::Call(Call::ShareGuest { vm: 1, pfn: 2, gfn: 0, count: 1, permissions: READ_WRITE }),
    Op::Call(Call::UnshareGuest { vm: 1, gfns: AT }),
    Op::Call(Call::ReclaimGuest { vm: 0, gfns: AT }),
    Op::Call(Call::ReclaimGuest { vm: 0, gfns: BOTH }),
    Op::Call(Call::QueryPage { pfn: 2 }),
    Op::Call(Call::VmTopUp { vm: 0, pfns: X }),
    Op::Call(Call::PoolTopUp { pool: Pool::Tables, pfns: X }),
    Op::Call(Call::PoolTopUp { pool: Pool::Metadata, pfns: X }),
    Op::Call(Call::VmCreate { protected: true, immediate: true, root: 2 }),
    Op::Call(Call::UnshareAck { vm: 0, vcpu: 0 }),
    Op::Call(Call::VmTeardownStart { vm: 0 }),
    Op::Call(Call::VmTeardownFinish { vm: 0 }),
    Op::Call(Call::VmTeardownStart { vm: 1 }),
    Op::Call(Call::VmTeardownFinish { vm: 1 }),
    Op::Call(Call::HostStore { pfn: 2 }),
    Op::Call(Call::ShareHyp { pfns: Y }),
    Op::Call(Call::Share { vm: 0, gfns: AT }),
    Op::Call(Call::Share { vm: 0, gfns: BOTH }),
    Op::Call(Call::Unshare { vm: 0, vcpu: 0, gfns: AT }),
    Op::Call(Call::Relinquish { vm: 0, gfns: AT }),
    Op::Call(Call::GuardMap { vm: 0, gfns: AT }),
    Op::Call(Call::GuardUnmap { vm: 0, gfns: AT }),
    Op::Call(Call::GuestStore { vm: 0, gfn: 0 }),
    Op::Call(Call::GuestStore { vm: 1, gfn: 0 }),
    Op::Enter { vm: 0, vcpu: 0 },
    Op::Call(Call::VmCreate { protected: true, immediate: true, root: 0 }),
    // The host guesses the handle that a VM will have.
    Op::Call(Call::DonateGuest { vm: 2, pfn: 2, gfn: 0, count: 1 }),
    Op::Call(Call::VmTopUp { vm: 2, pfns: X }),
    Op::Call(Call::ForceReclaim { pfns: X }),
    Op::Call(Call::ForceReclaim { pfns: Run { first: 2, count: 2 } }),
    // Page X once more, at the next guest page, and that loan's end.
    Op::Call(LEND_AGAIN),
    Op::Call(Call::UnshareGuest { vm: 1, gfns: Run { first: 1, count: 1 } }),
];

const VM: Call = Call::VmCreate { protected: true, immediate: false, root: 16 };
const VM_AT_ONCE: Call = Call::VmCreate { protected: true, immediate: true, root: 16 };
const OPEN_VM: Call = Call::VmCreate { protected: false, immediate: false, root: 18 };
const DONATE: Call = Call::DonateGuest { vm: 0, pfn: 2, gfn: 0, count: 2 };
const SECRET: Call = Call::GuestStore { vm: 0, gfn: 0 };
const SHARE: Call = Call::Share { vm: 0, gfns: BOTH };
const LEND: Call = Call::ShareGuest { vm: 1, pfn: 2, gfn: 0, count: 1, permissions: READ_WRITE };
const LEND_AGAIN: Call = Call::ShareGuest { vm: 1, pfn: 2, gfn: 1, count: 1, permissions: READ_WRITE };
const FORCE: Call = Call::ForceReclaim { pfns: X };
const END: Call = Call::VmTeardownStart { vm: 0 };

const fn start(name: &'static str, calls: &'static [Call]) -> Start {
    Start { name, calls, vcpus: [0, 1] }
}

/// Where they start.
const STARTS: [Start; 16] = [
    start("the-hosts", &[VM, OPEN_VM]),
    start("lent-to-hyp", &[VM, OPEN_VM, Call::ShareHyp { pfns: X }]),
    start("pinned", &[VM, OPEN_VM, Call::ShareHyp { pfns: X }, Call::Pin { pfn: 2 }]),
    start("private", &[VM, OPEN_VM, DONATE, SECRET]),
    start("shared", &[VM, OPEN_VM, DONATE, SECRET, SHARE]),
    start("shared-until-called-back", &[VM_AT_ONCE, OPEN_VM, DONATE, SECRET, SHARE]),
    // vCPU 0 waits, so guests run on the other one.
    Start {
        name: "asked-for",
        calls: &[VM, OPEN_VM, DONATE, SECRET, SHARE, Call::Unshare { vm: 0, vcpu: 0, gfns: AT }],
        vcpus: [1, 1],
    },
    start("lent-to-a-guest", &[VM, OPEN_VM, LEND]),
    start("lent-to-a-guest-twice", &[VM, OPEN_VM, LEND, LEND_AGAIN]),
    start("poisoned", &[VM, OPEN_VM, DONATE, SECRET, FORCE]),
    start("poisoned-of-the-dying", &[VM, OPEN_VM, DONATE, SECRET, FORCE, END]),
    start("a-device", &[VM, OPEN_VM, Call::GuardMap { vm: 0, gfns: AT }]),
    start("private-of-the-dying", &[VM, OPEN_VM, DONATE, SECRET, END]),
    start("shared-by-the-dying", &[VM, OPEN_VM, DONATE, SECRET, SHARE, END]),
    start("left-by-the-dying", &[VM, OPEN_VM, END]),
    start("lent-to-the-dying", &[VM, OPEN_VM, LEND, Call::VmTeardownStart { vm: 1 }]),
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

/// All pairs that a start is for. Those that are for none are tried from the first.
fn pairs(start: &Start) -> Vec<Pair> {
    let state = start.state();
    let mut pairs = Vec::new();
    for (a, one) in OPS.iter().enumerate() {
        for (b, two) in OPS.iter().enumerate().skip(a) {
            let of = |start: &Start, state| Pair { number: (a, b), start: *start, state, ops: [*one, *two] };
            let pair = of(start, state);
            let elsewhere = || STARTS.iter().any(|start| of(start, start.state()).is_relevant());
            if pair.is_relevant() || start.name == STARTS[0].name && !elsewhere() {
                pairs.push(pair);
            }
        }
    }
    pairs
}

fn explore_all(name: &str) {
    let start = STARTS.iter().find(|start| start.name == name).expect("a start");
    let schedules = number("DEED_SCHEDULES").map_or(SCHEDULES, |schedules| schedules as usize);
    let first = number("DEED_SEED");
    let wanted = std::env::var("DEED_PAIR").ok();
    let mut count = 0;
    let began = std::time::Instant::now();
    for (seed, pair) in (1..).zip(pairs(start)) {
        if wanted.as_ref().is_some_and(|wanted| *wanted != pair.name()) {
            continue;
        }
        count += 1;
        if let Err(story) = explore(&pair, schedules, first.unwrap_or(seed)) {
            panic!("{story}");
        }
    }
    println!("{name}: {count} pairs, {schedules} schedules each, in {:.1} s", began.elapsed().as_secs_f64());
}

macro_rules! starts {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                explore_all($name);
            }
        )*

        #[test]
        fn every_start_has_its_test() {
            assert_eq!([$($name),*], STARTS.map(|start| start.name));
            let names: Vec<String> = STARTS.iter().flat_map(pairs).map(|pair| pair.name()).collect();
            // Fewer mean that pairs are not found to matter any more.
            assert!(names.len() >= 1_500, "{} pairs", names.len());
            if let Ok(wanted) = std::env::var("DEED_PAIR") {
                assert!(names.contains(&wanted), "there is no pair {wanted}");
            }
        }
    };
}

starts! {
    two_calls_on_a_page_of_the_hosts_are_in_order: "the-hosts",
    two_calls_on_a_page_lent_to_the_hypervisor_are_in_order: "lent-to-hyp",
    two_calls_on_a_pinned_page_are_in_order: "pinned",
    two_calls_on_a_private_page_are_in_order: "private",
    two_calls_on_a_shared_page_are_in_order: "shared",
    two_calls_on_a_page_shared_by_a_guest_that_asks_nobody_are_in_order: "shared-until-called-back",
    two_calls_on_a_page_that_the_host_is_asked_for_are_in_order: "asked-for",
    two_calls_on_a_page_lent_to_a_guest_are_in_order: "lent-to-a-guest",
    two_calls_on_a_page_lent_to_a_guest_twice_are_in_order: "lent-to-a-guest-twice",
    two_calls_on_a_poisoned_page_are_in_order: "poisoned",
    two_calls_on_a_poisoned_page_of_a_dying_guest_are_in_order: "poisoned-of-the-dying",
    two_calls_on_a_device_are_in_order: "a-device",
    two_calls_on_a_private_page_of_a_dying_guest_are_in_order: "private-of-the-dying",
    two_calls_on_a_page_that_a_dying_guest_shares_are_in_order: "shared-by-the-dying",
    two_calls_about_a_dying_guest_without_pages_are_in_order: "left-by-the-dying",
    two_calls_on_a_page_lent_to_a_dying_guest_are_in_order: "lent-to-the-dying",
}

/// One CPU makes the first vCPU of a protected VM while another asks for a register of it, starts it and runs it.
fn make_a_vcpu_and_use_it() {
    const ENTRY: u64 = 0x8000_0040;
    become_cpu(0);
    let world = Arc::new(World::cold(0x40));
    let vm = world.vm(PROTECTED, 0x1000, 2);
    world.hyp.machine().interleave(true);
    let other = Arc::clone(&world);
    let used = shuttle::thread::spawn(move || {
        become_cpu(1);
        other.hyp.machine().push_step(|context| {
            assert_eq!((context.pc, context.x(0), context.x(1)), (ENTRY, 7, 0));
            hyp::vm::context::Trap::Irq
        });
        [
            HostCall::VcpuGetReg { vm, vcpu: 0, register: 0 },
            HostCall::VcpuSetBoot { vm, vcpu: 0, pc: ENTRY, x0: 7 },
            HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] },
        ]
        .map(|call| other.call(call).outcome)
    });
    assert_eq!(world.call(HostCall::VcpuCreate { vm, vcpu: 0 }).outcome, Ok(()));
    let used = used.join().expect("a CPU that fails has ended the execution");
    world.hyp.machine().interleave(false);
    let [register, boot, run] = used;
    let absent = Err(Error::NoEntry);
    assert!(register == absent || register == Err(Error::Permission), "{used:?}");
    let in_order = match (register, boot) {
        (Err(Error::NoEntry), Err(Error::NoEntry)) => run == absent || run == Err(Error::Again),
        (_, Ok(())) => run == Ok(()),
        _ => false,
    };
    assert!(in_order, "{used:?}");
    world.check();
}

/// Pages by owner, bytes of records, and VMs: what must be as before when a VM has ended. (A block of the host's
/// that was split for it stays split.)
fn held(world: &World) -> (Census, u64, usize) {
    let pools = world.pools();
    (world.census(), pools.records, pools.vms.len())
}

/// Two CPUs make the first vCPU of a VM: one of them does, and the other is told that it is there.
fn make_one_vcpu_from_two() {
    become_cpu(0);
    let world = Arc::new(World::cold(0x40));
    let before = held(&world);
    let vm = world.vm(PROTECTED, 0x1000, 2);
    let records = || world.pools().records;
    let without = records();
    world.hyp.machine().interleave(true);
    let other = Arc::clone(&world);
    let made = shuttle::thread::spawn(move || {
        become_cpu(1);
        other.call(HostCall::VcpuCreate { vm, vcpu: 0 }).outcome
    });
    let mine = world.call(HostCall::VcpuCreate { vm, vcpu: 0 }).outcome;
    let made = [mine, made.join().expect("a CPU that fails has ended the execution")];
    world.hyp.machine().interleave(false);
    let exists = Err(Error::Exists);
    assert!(made == [Ok(()), exists] || made == [exists, Ok(())], "{made:?}");
    let one = records() - without;
    // There is one, so number 1 is the next, and its record is of the same size.
    assert_eq!(world.call(HostCall::VcpuCreate { vm, vcpu: 2 }).outcome, Err(Error::Invalid));
    world.ok(HostCall::VcpuCreate { vm, vcpu: 1 });
    assert_eq!(records(), without + 2 * one, "records of two vCPUs");
    world.ok(HostCall::VmTeardownStart { vm });
    world.finish(vm);
    assert_eq!(held(&world), before);
    world.check();
}

/// One CPU makes vCPUs of a VM while another ends it.
fn make_vcpus_while_their_vm_ends() {
    become_cpu(0);
    let world = Arc::new(World::cold(0x40));
    let before = held(&world);
    let vm = world.vm(PROTECTED, 0x1000, 2);
    // What has happened to it for certain: 1, its end has begun; 2, it is gone. (No CPU stops at an atomic of `std`.)
    let phase = Arc::new(AtomicU8::new(0));
    world.hyp.machine().interleave(true);
    let (other, reached) = (Arc::clone(&world), Arc::clone(&phase));
    let ended = shuttle::thread::spawn(move || {
        become_cpu(1);
        other.ok(HostCall::VmTeardownStart { vm });
        reached.store(1, Ordering::SeqCst);
        other.finish(vm);
        reached.store(2, Ordering::SeqCst);
    });
    // A vCPU is made, or refused by what the VM is by then; and it never becomes again what it was.
    let mut least = 0;
    let answers = [Ok(()), Err(Error::Permission), Err(Error::NoEntry)];
    for vcpu in 0..2 {
        least = least.max(phase.load(Ordering::SeqCst).into());
        let outcome = world.call(HostCall::VcpuCreate { vm, vcpu }).outcome;
        let found = answers.iter().position(|answer| *answer == outcome);
        assert!(
            found.is_some_and(|found| found >= least),
            "vCPU {vcpu}: {outcome:?} after {:?}",
            answers[least]
        );
        least = found.unwrap_or(least);
    }
    ended.join().expect("a CPU that fails has ended the execution");
    world.hyp.machine().interleave(false);
    assert_eq!(held(&world), before);
    world.check();
}

#[test]
fn every_call_of_the_core_meets_every_other() {
    let is_there = |name: &str| {
        OPS.iter().any(|op| matches!(op, Op::Call(call) if spec::call::CALLS[call.kind()] == name))
    };
    let missing: Vec<&str> = calls_of_the_core().filter(|name| !is_there(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Plays a story of its own under schedules.
fn explore_story(play: fn()) {
    let schedules = number("DEED_SCHEDULES").map_or(SCHEDULES, |schedules| schedules as usize);
    let seed = number("DEED_SEED").unwrap_or(1);
    if let Err(what) = under_schedules(play, 10 * schedules, seed) {
        panic!("{what}");
    }
}

#[test]
fn a_vcpu_that_is_being_made_is_there_whole_or_not_at_all() {
    explore_story(make_a_vcpu_and_use_it);
}

#[test]
fn a_vcpu_that_two_make_at_once_is_made_once() {
    explore_story(make_one_vcpu_from_two);
}

#[test]
fn a_vcpu_that_is_made_while_its_vm_ends_goes_with_it() {
    explore_story(make_vcpus_while_their_vm_ends);
}

#[test]
fn a_cpu_that_two_turn_on_begins_as_often_as_they_are_told_and_where_they_asked() {
    explore_story(turn_a_cpu_on_from_two);
}
