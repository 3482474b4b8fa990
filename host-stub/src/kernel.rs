//! The kernel as a whole: starts the first program, serves what its threads ask for and what they cause, and cleans up.
//!
//! One program at a time so far, with threads on all CPUs. What maps content everywhere is asked through
//! [`crate::gmem::fallocate::MapsContent`], so that more of them need no change in `gmem` or `kvm`.

use alloc::rc::Rc;
use alloc::vec::Vec;

use crate::errno::Errno;
use crate::fs::{Archive, File};
use crate::gmem::View;
use crate::host::Host;
use crate::kvm::{self, Vm};
use crate::mm::space::Unmapped;
use crate::mm::{Backing, Fault, Holder, Pfn};
use crate::process::signal::Signal;
use crate::process::trap::Trap;
use crate::process::{Ended, Process};
use crate::schedule::After;
use crate::syscall;
use crate::threads::Threads;

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
    pub(crate) ended: Option<Ended>,
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

    /// Serves the exception that the thread has caused.
    pub(crate) fn serve_trap(&mut self) -> Result<After, Ended> {
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
