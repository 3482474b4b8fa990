//! The choice of the story, and what the stories have in common.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use host_programs::census::check_unchanged;
use host_programs::deed::Deed;
use host_programs::machine::secret_nonce;
use host_programs::steps::Steps;
use host_programs::thread::{self, Thread};
use host_programs::{Failure, failure, sys};

use crate::{guests, memory};

/// Nanoseconds in which a thread must notice what has happened.
const PATIENCE: u64 = 30_000_000_000;

/// Tells one story, and compares the census.
pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let deed = Deed::open()?;
    let before = deed.census()?;
    match arguments {
        [_, "work"] => work(steps)?,
        [_, "memory"] => memory::unmap(steps)?,
        [_, "guests"] => guests::many(steps)?,
        [_, "vcpus"] => guests::kick(steps)?,
        [_, "unshare"] => guests::unshare(&deed, steps)?,
        [_, "reset", ..] => return guests::reset(&deed, steps, secret_nonce(arguments)?),
        _ => return Err(failure!("there is no story {arguments:?}")),
    }
    check_unchanged(before, deed.census()?, steps);
    Ok(())
}

/// One thread for each CPU but this one's, or one if there is no other.
pub(crate) fn for_each_other_cpu(
    mut spawn: impl FnMut() -> Result<Thread, Failure>,
) -> Result<Vec<Thread>, Failure> {
    (1..thread::cpus()?.max(2)).map(|_| spawn()).collect()
}

/// Waits until something holds; whether it came to that. Gives way at first, and lets the CPU rest then.
pub(crate) fn wait_until(holds: impl Fn() -> bool) -> bool {
    const SHORT: u64 = 1_000_000;
    let start = sys::now();
    while !holds() {
        let waited = sys::now() - start;
        if waited > PATIENCE {
            return false;
        }
        if waited > SHORT { sys::sleep(SHORT) } else { thread::give_way() }
    }
    true
}

static SEEN: AtomicU64 = AtomicU64::new(0);
static ROUNDS: AtomicU64 = AtomicU64::new(0);

/// Rounds in which threads wait for each other.
const MEETINGS: u64 = 50;

/// Notes where this thread is; whether one was on every CPU.
fn all_seen(cpus: u64) -> bool {
    SEEN.fetch_or(1 << thread::cpu(), Ordering::Relaxed);
    u64::from(SEEN.load(Ordering::Relaxed).count_ones()) == cpus
}

/// Threads run on all CPUs, and wait for each other.
fn work(steps: &mut Steps) -> Result<(), Failure> {
    let cpus = thread::cpus()?;
    steps.tell(format_args!("There are {cpus} CPUs, and a thread for each, which note where they are."));
    let threads = for_each_other_cpu(|| {
        Thread::spawn(move || {
            wait_until(|| all_seen(cpus));
        })
    })?;
    let all = wait_until(|| all_seen(cpus));
    threads.into_iter().for_each(Thread::join);
    let seen = SEEN.load(Ordering::Relaxed);
    steps.check("threads-run-on-all-cpus", format_args!("{cpus} CPUs"), format_args!("CPUs {seen:#b}"), all);

    let others = cpus.max(2) - 1;
    let threads = for_each_other_cpu(|| {
        Thread::spawn(move || {
            for round in 1..=MEETINGS {
                ROUNDS.fetch_add(1, Ordering::Relaxed);
                if !wait_until(|| ROUNDS.load(Ordering::Relaxed) >= round * others) {
                    return;
                }
            }
        })
    })?;
    let ids = threads.iter().map(Thread::id).collect::<Vec<_>>();
    let differ = ids.iter().all(|id| *id > 1 && ids.iter().filter(|other| *other == id).count() == 1);
    steps.check("each-thread-has-a-number-of-its-own", "distinct", format_args!("{ids:?}"), differ);
    threads.into_iter().for_each(Thread::join);
    steps.equal("threads-meet-as-often-as-they-should", MEETINGS * others, ROUNDS.load(Ordering::Relaxed));
    Ok(())
}
