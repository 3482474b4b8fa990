//! Who runs: the threads that wait for a CPU, those that wait for something else, and those that are out on a CPU.
//!
//! A thread is in one of these places, or is the one that is served ([`crate::process::Process::thread`]). Ready
//! threads run in turn.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::errno::Errno;
use crate::process::thread::Thread;
use crate::secondary::MAX_CPUS;

/// What a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// `FUTEX_WAKE` of this address, until a time of [`crate::machine::Machine::now`].
    Futex {
        /// Its address.
        address: u64,
        /// Until when.
        deadline: Option<u64>,
    },
    /// A time.
    Time(u64),
    /// The next interrupt of any CPU: then what could not be done is tried again.
    Interrupt,
}

/// The threads of the program but the one that is served.
#[derive(Debug, Default)]
pub struct Threads {
    /// By CPU. On the heap, as all of them: a kernel that is made is moved, and its stack is small.
    running: Vec<Option<Thread>>,
    ready: VecDeque<Thread>,
    waiting: Vec<(Thread, Wait)>,
    /// CPUs that have nothing to do.
    resting: u64,
}

impl Threads {
    /// Whether one waits for a CPU.
    pub fn is_one_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether a CPU has one.
    pub fn is_one_running(&self) -> bool {
        self.running.iter().any(Option::is_some)
    }

    /// Waits for a CPU. Returns a CPU that has nothing to do, which is to be told.
    #[must_use]
    pub fn make_ready(&mut self, thread: Thread) -> Option<usize> {
        self.ready.push_back(thread);
        let cpu = self.resting.trailing_zeros() as usize;
        (cpu < MAX_CPUS).then(|| {
            self.resting &= !(1 << cpu);
            cpu
        })
    }

    /// The thread that has waited longest for a CPU.
    pub fn take_next(&mut self) -> Option<Thread> {
        self.ready.pop_front()
    }

    /// Waits for something.
    pub fn wait(&mut self, thread: Thread, wait: Wait) {
        self.waiting.push((thread, wait));
    }

    /// Goes out on a CPU.
    pub fn put_on(&mut self, cpu: usize, thread: Thread) {
        if self.running.len() <= cpu {
            self.running.resize_with(cpu.saturating_add(1), || None);
        }
        if let Some(place) = self.running.get_mut(cpu) {
            *place = Some(thread);
        }
    }

    /// Comes back from a CPU, which is not resting any more.
    pub fn take_from(&mut self, cpu: usize) -> Option<Thread> {
        self.resting &= !(1 << cpu);
        self.running.get_mut(cpu)?.take()
    }

    /// A CPU has nothing to do.
    pub fn rests(&mut self, cpu: usize) {
        self.resting |= 1 << cpu;
    }

    /// Wakes the threads whose time has come, and, after an interrupt, those that wait for one.
    pub fn wake_due(&mut self, now: u64, interrupt: bool) -> Vec<Thread> {
        self.wake(usize::MAX, |_, wait| match wait {
            Wait::Futex { deadline, .. } => {
                deadline.is_some_and(|end| end <= now).then_some(Some(Err(Errno::ETIMEDOUT)))
            }
            Wait::Time(end) => (end <= now).then_some(Some(Ok(0))),
            Wait::Interrupt => interrupt.then_some(None),
        })
    }

    /// Wakes as many threads that wait for this address.
    pub fn wake_futex(&mut self, futex: u64, most: usize) -> Vec<Thread> {
        self.wake(most, |_, wait| {
            matches!(wait, Wait::Futex { address, .. } if address == futex).then_some(Some(Ok(0)))
        })
    }

    /// Wakes a thread that waits, because of a signal.
    pub fn interrupt(&mut self, id: u64) -> Vec<Thread> {
        self.wake(1, |thread, wait| {
            let result = if wait == Wait::Interrupt { None } else { Some(Err(Errno::EINTR)) };
            (thread.id == id && thread.mask.is_pending()).then_some(result)
        })
    }

    /// Takes out at most so many threads of which `result` says that they wait no more, with what their system call
    /// returns, if it is not to be tried again.
    fn wake(
        &mut self,
        most: usize,
        result: impl Fn(&Thread, Wait) -> Option<Option<Result<u64, Errno>>>,
    ) -> Vec<Thread> {
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
        let running = self.running.iter_mut().enumerate();
        let running = running.filter_map(|(cpu, thread)| Some((thread.as_mut()?, Some(cpu))));
        let others = self.ready.iter_mut().chain(self.waiting.iter_mut().map(|(thread, _)| thread));
        running.chain(others.map(|thread| (thread, None))).find(|(thread, _)| thread.id == id)
    }

    /// Forgets all that no CPU has; returns the CPUs that have one.
    pub fn end_all(&mut self) -> impl Iterator<Item = usize> {
        self.ready.clear();
        self.waiting.clear();
        self.running.iter().enumerate().filter_map(|(cpu, thread)| thread.is_some().then_some(cpu))
    }
}
