//! The kernel as a whole: starts the first program, serves what its threads ask for and what they cause, and cleans up.
//!
//! One program at a time so far, with threads on all CPUs. What maps content everywhere is asked through
//! [`crate::gmem::fallocate::MapsContent`], so that more of them need no change in `gmem` or `kvm`.
//!
//! A CPU comes to the kernel with what its last [`Job`] has led to, and leaves with the next one ([`Kernel::next`]). That
//! is all that several CPUs need: one at a time is in the kernel, and what a CPU does outside of it, which is to run a
//! thread or a vCPU, or to rest, touches nothing of the kernel's.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;

use abi::host::{CALL_WORDS, HostResult, RESULT_WORDS};

use crate::errno::Errno;
use crate::fs::{Archive, File};
use crate::gmem::View;
use crate::host::Host;
use crate::kvm::memory::Caller;
use crate::kvm::run::{Entry, Step};
use crate::kvm::{self, Vm};
use crate::machine::Machine;
use crate::mm::space::Unmapped;
use crate::mm::{Backing, Fault, Holder, Pfn};
use crate::process::context::UserContext;
use crate::process::signal::Signal;
use crate::process::thread::Thread;
use crate::process::trap::Trap;
use crate::process::{Ended, Process};
use crate::syscall;
use crate::threads::{Threads, Wait};

/// Number of the first program.
const INIT: u64 = 1;

/// The kernel.
#[derive(Debug)]
pub struct Kernel<'m> {
    /// Machine, frames, counters.
    pub host: Host<'m>,
    /// The ramdisk.
    pub ramdisk: Archive<'static>,
    /// The program.
    pub process: Process,
    /// Its threads but the one that is served.
    pub threads: Threads,
    /// The CPU that is in the kernel.
    pub cpu: usize,
    /// How the program ended, from when on no thread runs.
    ended: Option<Ended>,
}

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

impl<'m> Kernel<'m> {
    /// Loads the first program from the ramdisk.
    pub fn new(
        mut host: Host<'m>,
        ramdisk: Archive<'static>,
        path: &[u8],
        arguments: &[&[u8]],
    ) -> Result<Self, Errno> {
        let entry = ramdisk.find(path).map_err(|error| {
            log::error!("ramdisk: {error}");
            Errno::EIO
        })?;
        let file = entry.ok_or(Errno::ENOENT)?.data;
        let mut process = Process::load(&mut host, INIT, file, arguments)?;
        let mut threads = Threads::default();
        threads.make_ready(core::mem::take(&mut process.thread));
        Ok(Self { host, ramdisk, process, threads, cpu: 0, ended: None })
    }

    /// Serves what has come of a CPU's last job, and finds it the next one. `context` is the CPU's own: the registers of
    /// the thread that it runs. CPU 0, which is the boot CPU, leaves as the last.
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
                // It was sent while the thread was on its way here.
                After::Wait(wait) if thread.mask.is_pending() => {
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
        if thread.mask.is_pending() {
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

    fn serve_trap(&mut self) -> Result<After, Ended> {
        let pc = self.process.thread.context.pc;
        let signal = match Trap::of(&self.process.thread.context) {
            Trap::SystemCall => return syscall::dispatch(self),
            Trap::Interrupt => {
                self.host.machine.take_interrupts();
                // It may have been the end of its turn.
                return Ok(After::Yield);
            }
            Trap::Fault { address, access } => {
                match self.process.space.fault_in(&mut self.host, address, access) {
                    Ok(_) => return Ok(After::GoOn),
                    Err(Fault::NoRegion) => Signal::no_mapping(address),
                    Err(Fault::Denied) => Signal::denied(address),
                    Err(Fault::NothingThere) => Signal::nothing_there(address),
                    Err(Fault::NoMemory) => {
                        log::error!("no memory for a page at {address:#x}");
                        Signal::nothing_there(address)
                    }
                }
            }
            Trap::External { address, marked } => {
                if marked {
                    let counters = &mut self.host.counters;
                    counters.marked_aborts = counters.marked_aborts.saturating_add(1);
                }
                Signal::refused(address)
            }
            Trap::Alignment { address } => Signal::unaligned(address),
            Trap::Undefined => Signal::undefined(pc),
            Trap::Breakpoint => Signal::breakpoint(pc),
            Trap::FloatingPoint => Signal::floating_point(pc),
            Trap::Unexpected => {
                log::error!("unexpected exception of a program: {:x?}", self.process.thread.context);
                return Err(Ended::Killed(Signal::undefined(pc)));
            }
        };
        self.process.deliver(&mut self.host, signal).map(|()| After::GoOn)
    }

    /// Lets go of everything that the program had; returns how it ended, and `None` if it has not.
    pub fn clean_up(mut self) -> (Option<Ended>, Host<'m>) {
        let vms = held_vms(&self.process);
        let (mut files, space, trampoline) = self.process.into_parts();
        for file in files.take_all() {
            release_file(&mut self.host, file);
        }
        let unmapped = space.destroy(&mut self.host);
        release_unmapped(&mut self.host, vms, unmapped);
        self.host.give_back(trampoline);
        (self.ended, self.host)
    }
}

/// Lets go of a file. The last reference to what it stands for ends that.
pub fn release_file(host: &mut Host, file: Rc<File>) {
    match Rc::into_inner(file) {
        Some(File::Vm(vm)) => release_vm(host, vm),
        Some(File::Vcpu(vcpu)) => release_vm(host, vcpu.into_vm()),
        Some(File::Gmem(view)) => release_view(host, view),
        Some(File::Console | File::Ramdisk { .. } | File::Kvm | File::Deed) | None => (),
    }
}

/// Lets go of what was mapped, and frees anonymous pages that a VM had. `vms` are those that the program
/// held before ([`held_vms`]).
pub fn release_unmapped(host: &mut Host, vms: Vec<Rc<Vm>>, unmapped: Unmapped) {
    for frame in unmapped.lent {
        take_page_back(host, &vms, frame);
    }
    for backing in unmapped.backings {
        match backing {
            Backing::Content { view, .. } => release_view(host, view),
            Backing::Run { vcpu, .. } => release_vm(host, vcpu.into_vm()),
            Backing::Anonymous | Backing::Kernel { .. } => (),
        }
    }
    for vm in vms {
        release_vm(host, vm);
    }
}

/// Takes an anonymous page, which its program no longer has, back from the VM that it was lent to.
fn take_page_back(host: &mut Host, vms: &[Rc<Vm>], frame: Pfn) {
    let Some(Holder::Lent { vm: handle, gfn }) = host.frames.holder(frame) else { return };
    if let Some(vm) = vms.iter().find(|vm| vm.handle() == handle) {
        for frame in kvm::memory::take_lent_back(host, vm, gfn.into()..u64::from(gfn).saturating_add(1)) {
            host.frames.taken_back(frame);
        }
    }
}

/// Lets go of a view. The last reference withdraws its pages from its VM, ends its inode, and lets go of the VM.
fn release_view(host: &mut Host, view: Rc<View>) {
    let Some(view) = Rc::into_inner(view) else { return };
    let all = 0..view.inode().pages();
    kvm::memory::withdraw(host, &view, &all);
    let (inode, vm) = view.into_parts();
    if let Some(inode) = Rc::into_inner(inode) {
        inode.destroy(host);
    }
    release_vm(host, vm);
}

/// Lets go of a VM. The last reference ends it.
pub fn release_vm(host: &mut Host, vm: Rc<Vm>) {
    if let Some(vm) = Rc::into_inner(vm) {
        kvm::teardown::destroy(host, vm);
    }
}

/// The VMs that a program holds by a file or a mapping, once each.
pub fn held_vms(process: &Process) -> Vec<Rc<Vm>> {
    let by_file = process.files.iter().filter_map(|file| match &**file {
        File::Vm(vm) => Some(vm),
        File::Vcpu(vcpu) => Some(vcpu.vm()),
        File::Gmem(view) => Some(view.vm()),
        _ => None,
    });
    let by_mapping = process.space.regions().iter().filter_map(|region| match &region.backing {
        Backing::Content { view, .. } => Some(view.vm()),
        Backing::Run { vcpu, .. } => Some(vcpu.vm()),
        Backing::Anonymous | Backing::Kernel { .. } => None,
    });
    let mut vms: Vec<Rc<Vm>> = Vec::new();
    for vm in by_file.chain(by_mapping) {
        if !vms.iter().any(|known| Rc::ptr_eq(known, vm)) {
            vms.push(vm.clone());
        }
    }
    vms
}
