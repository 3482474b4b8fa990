//! Who runs: the threads that wait for a CPU, those that wait for something else, and those that are out on a CPU.
//!
//! A thread is in one of these places, or is the one that is served ([`crate::process::Process::thread`]); from one to the
//! other it goes in its box. Ready threads run in turn.

#![expect(clippy::vec_box, reason = "a thread stays where it is while it goes from list to list")]

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::errno::Errno;
use crate::machine::TICK;
use crate::process::thread::Thread;
use crate::secondary::MAX_CPUS;

/// What a thread waits for. Times are those of [`crate::machine::Machine::now`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// `FUTEX_WAKE` of this address.
    Futex {
        /// Its address.
        address: u64,
        /// Until when.
        deadline: Option<u64>,
    },
    /// A time.
    Time(u64),
    /// A time at which what could not be done is tried again.
    Again(u64),
}

impl Wait {
    /// Tries again after a tick.
    pub fn a_tick(now: u64) -> Self {
        Self::Again(now.saturating_add(TICK))
    }

    /// What the system call returns if a signal ends the wait; `None`: it is made again, or has not ended.
    pub fn when_interrupted(&self) -> Option<Result<u64, Errno>> {
        (!matches!(self, Self::Again(_))).then_some(Err(Errno::EINTR))
    }
}

/// A CPU, and the thread that it runs.
#[derive(Debug, Default)]
struct Place {
    is_taken: bool,
    thread: Box<Thread>,
}

/// The threads of the program but the one that is served.
#[derive(Debug, Default)]
pub struct Threads {
    /// By CPU.
    running: Vec<Place>,
    ready: VecDeque<Box<Thread>>,
    waiting: Vec<(Box<Thread>, Wait)>,
    /// CPUs that have nothing to do.
    resting: u64,
}

impl Threads {
    /// Whether one waits for something else.
    pub fn is_one_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a CPU has one.
    pub fn is_one_running(&self) -> bool {
        self.running.iter().any(|place| place.is_taken)
    }

    /// Waits for a CPU.
    pub fn make_ready(&mut self, thread: Box<Thread>) {
        self.ready.push_back(thread);
    }

    /// How many wait for a CPU.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// A CPU that rests, and is to be called.
    pub fn take_resting(&mut self) -> Option<usize> {
        let cpu = self.resting.trailing_zeros() as usize;
        (cpu < MAX_CPUS).then(|| {
            self.resting &= !(1 << cpu);
            cpu
        })
    }

    /// The thread that has waited longest for a CPU.
    pub fn take_next(&mut self) -> Option<Box<Thread>> {
        self.ready.pop_front()
    }

    /// Waits for something.
    pub fn wait(&mut self, thread: Box<Thread>, wait: Wait) {
        self.waiting.push((thread, wait));
    }

    /// Goes out on a CPU; what is left in its place means nothing.
    pub fn put_on(&mut self, cpu: usize, thread: &mut Box<Thread>) {
        if self.running.len() <= cpu {
            self.running.resize_with(cpu.saturating_add(1), Place::default);
        }
        if let Some(place) = self.running.get_mut(cpu) {
            core::mem::swap(&mut place.thread, thread);
            place.is_taken = true;
        }
    }

    /// Comes back from a CPU, which is not resting any more. Returns whether the CPU had one.
    pub fn swap_back(&mut self, cpu: usize, thread: &mut Box<Thread>) -> bool {
        self.resting &= !(1 << cpu);
        match self.running.get_mut(cpu) {
            Some(place) if place.is_taken => {
                core::mem::swap(&mut place.thread, thread);
                place.is_taken = false;
                true
            }
            _ => false,
        }
    }

    /// A CPU has nothing to do.
    pub fn rests(&mut self, cpu: usize) {
        self.resting |= 1 << cpu;
    }

    /// Wakes the threads whose time has come.
    pub fn wake_due(&mut self, now: u64) -> Vec<Box<Thread>> {
        self.wake(usize::MAX, |_, wait| match wait {
            Wait::Futex { deadline, .. } => {
                deadline.is_some_and(|end| end <= now).then_some(Some(Err(Errno::ETIMEDOUT)))
            }
            Wait::Time(end) => (end <= now).then_some(Some(Ok(0))),
            Wait::Again(end) => (end <= now).then_some(None),
        })
    }

    /// Wakes as many threads that wait for this address.
    pub fn wake_futex(&mut self, futex: u64, most: usize) -> Vec<Box<Thread>> {
        self.wake(most, |_, wait| {
            matches!(wait, Wait::Futex { address, .. } if address == futex).then_some(Some(Ok(0)))
        })
    }

    /// Wakes a thread that waits, because of a signal.
    pub fn interrupt(&mut self, id: u64) -> Vec<Box<Thread>> {
        self.wake(1, |thread, wait| {
            (thread.id == id && thread.signals.has_deliverable()).then(|| wait.when_interrupted())
        })
    }

    /// Takes out at most so many threads of which `result` says that they wait no more, with what their system call
    /// returns, if it is not to be tried again.
    fn wake(
        &mut self,
        most: usize,
        result: impl Fn(&Thread, Wait) -> Option<Option<Result<u64, Errno>>>,
    ) -> Vec<Box<Thread>> {
        let mut woken = Vec::new();
        let mut at = 0;
        while let Some((thread, wait)) = self.waiting.get(at) {
            match result(thread, *wait) {
                Some(result) if woken.len() < most => {
                    let (mut thread, _) = self.waiting.remove(at);
                    if let Some(result) = result {
                        thread.set_result(result);
                    }
                    woken.push(thread);
                }
                _ => at = at.saturating_add(1),
            }
        }
        woken
    }

    /// Finds a thread, and the CPU that it is on.
    pub fn find(&mut self, id: u64) -> Option<(&mut Thread, Option<usize>)> {
        let running = self.running.iter_mut().enumerate().filter(|(_, place)| place.is_taken);
        let running = running.map(|(cpu, place)| (&mut *place.thread, Some(cpu)));
        let waiting = self.waiting.iter_mut().map(|(thread, _)| thread);
        let others = self.ready.iter_mut().chain(waiting).map(|thread| (&mut **thread, None));
        running.chain(others).find(|(thread, _)| thread.id == id)
    }

    /// Takes out all that no CPU has.
    pub fn take_idle(&mut self) -> Vec<Box<Thread>> {
        self.ready.drain(..).chain(self.waiting.drain(..).map(|(thread, _)| thread)).collect()
    }

    /// The CPUs that have one.
    pub fn cpus_with_one(&self) -> impl Iterator<Item = usize> {
        self.running.iter().enumerate().filter_map(|(cpu, place)| place.is_taken.then_some(cpu))
    }
}
