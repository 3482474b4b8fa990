//! Who is served when a CPU comes to the kernel, and what the CPU does next.
//!
//! A CPU comes with what its last [`Job`] has led to, and leaves with the next one ([`Kernel::next`]). That is all that
//! several CPUs need: one at a time is in the kernel, and what a CPU does outside of it, which is to run a thread or a
//! vCPU, or to rest, touches nothing of the kernel's.

use alloc::boxed::Box;

use abi::host::{CALL_WORDS, HostResult, RESULT_WORDS};

use crate::errno::Errno;
use crate::kernel::{Kernel, release_vm};
use crate::kvm::memory::Caller;
use crate::kvm::run::{Entry, Step};
use crate::machine::Machine;
use crate::mm::Pfn;
use crate::process::Ended;
use crate::process::context::UserContext;
use crate::process::thread::Thread;
use crate::threads::Wait;

/// What a CPU does outside the kernel.
#[derive(Debug)]
pub enum Job {
    /// Run the thread whose registers the CPU was given, until its next exception.
    Run {
        /// Its tables.
        root: Pfn,
        /// Their name in the TLB.
        asid: u16,
    },
    /// Make this call, which runs a vCPU.
    Call([u64; CALL_WORDS]),
    /// Wait for an interrupt.
    Rest,
    /// Nothing any more: the program has ended.
    Leave,
}

/// What a job has led to.
#[derive(Debug)]
pub enum Done {
    /// The CPU had none.
    Nothing,
    /// An exception, which the registers tell.
    Run,
    /// An answer.
    Call([u64; RESULT_WORDS]),
    /// An interrupt, which was taken.
    Rest,
}

/// What the thread that is served does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// It goes on.
    GoOn,
    /// It goes on when the others have had their turn.
    Yield,
    /// It waits.
    Wait(Wait),
    /// It is no more.
    Exit,
}

/// What a CPU does from the first job to the last. `next` is [`Kernel::next`], with the kernel for this CPU alone
/// meanwhile.
pub fn work(machine: &dyn Machine, mut next: impl FnMut(Done, &mut UserContext) -> Job) {
    let mut context = UserContext::default();
    let mut done = Done::Nothing;
    loop {
        done = match next(done, &mut context) {
            Job::Run { root, asid } => {
                machine.run_user(&mut context, root, asid);
                Done::Run
            }
            Job::Call(words) => Done::Call(machine.call_words(&words)),
            Job::Rest => {
                machine.idle();
                Done::Rest
            }
            Job::Leave => return,
        };
    }
}

impl Kernel<'_> {
    /// Serves what has come of a CPU's last job, and finds it the next one. `context` is the CPU's own: the registers of
    /// the thread that it runs. CPU 0, the boot CPU, leaves when no CPU has a thread any more; others may still rest, for
    /// which [`crate::cpus::wait_for_workers`] waits.
    pub fn next(&mut self, cpu: usize, done: Done, context: &mut UserContext) -> Job {
        self.cpu = cpu;
        self.wake_due();
        let had_one = self.threads.swap_back(cpu, &mut self.process.thread);
        let mut goes_on = had_one;
        if had_one && self.ended.is_none() {
            let after = self.serve(done, context).unwrap_or_else(|ended| self.end(ended));
            goes_on = self.put_away(after);
        }
        if self.ended.is_none() {
            match self.job(goes_on, context) {
                Ok(Some(job)) => {
                    self.call_others();
                    return job;
                }
                Ok(None) => (),
                Err(ended) => {
                    self.end(ended);
                }
            }
        }
        if self.ended.is_some() {
            let thread = core::mem::take(&mut self.process.thread);
            self.forget(thread);
            if cpu != 0 || !self.threads.is_one_running() {
                return Job::Leave;
            }
        }
        self.threads.rests(cpu);
        Job::Rest
    }

    /// Wakes the threads whose time has come.
    fn wake_due(&mut self) {
        if self.threads.is_one_waiting() {
            let woken = self.threads.wake_due(self.host.machine.now());
            woken.into_iter().for_each(|thread| self.threads.make_ready(thread));
        }
    }

    /// Calls CPUs that rest, if there are threads for them.
    fn call_others(&mut self) {
        for _ in 0..self.threads.ready() {
            let Some(cpu) = self.threads.take_resting() else { return };
            self.host.machine.kick(cpu);
        }
    }

    /// A thread is no more.
    fn forget(&mut self, mut thread: Box<Thread>) {
        if let Some(entry) = thread.entry.take() {
            let vm = entry.vm().clone();
            drop(entry);
            release_vm(&mut self.host, vm);
        }
    }

    /// The program ends: no thread goes on.
    fn end(&mut self, ended: Ended) -> After {
        self.ended = Some(ended);
        for thread in self.threads.take_idle() {
            self.forget(thread);
        }
        for cpu in self.threads.cpus_with_one() {
            self.host.machine.kick(cpu);
        }
        After::Exit
    }

    /// Where the thread that was served belongs now. Returns whether it goes on here at once.
    fn put_away(&mut self, after: After) -> bool {
        let goes_on = match after {
            After::GoOn => true,
            After::Yield => self.threads.ready() == 0,
            After::Wait(_) | After::Exit => false,
        };
        if !goes_on {
            let mut thread = core::mem::take(&mut self.process.thread);
            self.host.machine.save_fp(&mut thread.fp);
            match after {
                After::Exit => self.forget(thread),
                // A signal that came while the thread was on its way here ends the wait before it begins.
                After::Wait(wait) if thread.signals.has_deliverable() => {
                    if let Some(result) = wait.when_interrupted() {
                        thread.set_result(result);
                    }
                    self.threads.make_ready(thread);
                }
                After::Wait(wait) => self.threads.wait(thread, wait),
                After::GoOn | After::Yield => self.threads.make_ready(thread),
            }
        }
        goes_on
    }

    /// The job of the thread that goes on, or else of the next one; `None` if there is none.
    fn job(&mut self, goes_on: bool, context: &mut UserContext) -> Result<Option<Job>, Ended> {
        if !goes_on {
            let Some(thread) = self.threads.take_next() else { return Ok(None) };
            self.host.machine.restore_fp(&thread.fp);
            self.process.thread = thread;
        }
        let thread = &mut self.process.thread;
        if thread.signals.has_deliverable() {
            if let Some(entry) = thread.entry.take() {
                let vm = entry.vm().clone();
                thread.set_result(entry.interrupted(&self.host));
                release_vm(&mut self.host, vm);
            }
            self.process.deliver_sent(&mut self.host)?;
        }
        let job = match &self.process.thread.entry {
            Some(entry) => Job::Call(entry.call().encode()),
            None => {
                let (root, asid) = self.process.space.root();
                *context = self.process.thread.context;
                Job::Run { root, asid }
            }
        };
        self.threads.put_on(self.cpu, &mut self.process.thread);
        Ok(Some(job))
    }

    fn serve(&mut self, done: Done, context: &UserContext) -> Result<After, Ended> {
        match done {
            Done::Run => {
                self.process.thread.context = *context;
                self.serve_trap()
            }
            Done::Call(words) => Ok(self.serve_exit(HostResult::from_words(&words))),
            Done::Nothing | Done::Rest => Ok(After::GoOn),
        }
    }

    fn serve_exit(&mut self, result: Option<HostResult>) -> After {
        let Some(entry) = self.process.thread.entry.take() else { return After::GoOn };
        // The program may have let go of all else that holds it.
        let vm = entry.vm().clone();
        let after = match entry.end(&mut self.host, &mut self.process, result) {
            Step::Enter(entry) => {
                self.process.thread.entry = Some(entry);
                After::GoOn
            }
            Step::Yield(entry) => {
                self.process.thread.entry = Some(entry);
                After::Yield
            }
            Step::Wait(entry) => self.try_later(entry),
            // KVM waits until the vCPU is on. With one thread nobody could turn it on then.
            Step::Off(entry) if !self.process.is_single_threaded() => self.try_later(entry),
            Step::Off(entry) => {
                drop(entry);
                self.process.thread.set_result(Err(Errno::EAGAIN));
                After::GoOn
            }
            Step::Return(result) => {
                self.process.thread.set_result(result);
                After::GoOn
            }
        };
        release_vm(&mut self.host, vm);
        after
    }

    fn try_later(&mut self, entry: Entry) -> After {
        self.process.thread.entry = Some(entry);
        After::Wait(Wait::a_tick(self.host.machine.now()))
    }
}
