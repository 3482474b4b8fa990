//! Threads: `clone`, `futex`, `tgkill` and what goes with them.

use alloc::boxed::Box;

use crate::cpus;
use crate::errno::Errno;
use crate::kernel::Kernel;
use crate::kvm::memory::Caller;
use crate::process::Ended;
use crate::process::thread::Thread;
use crate::schedule::After;
use crate::threads::Wait;

const CLONE_VM: u64 = 0x100;
const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_SIGHAND: u64 = 0x800;
const CLONE_THREAD: u64 = 0x1_0000;
const CLONE_SYSVSEM: u64 = 0x4_0000;
const CLONE_SETTLS: u64 = 0x8_0000;
const CLONE_PARENT_SETTID: u64 = 0x10_0000;
const CLONE_CHILD_CLEARTID: u64 = 0x20_0000;
/// Of no meaning any more, but C libraries set it.
const CLONE_DETACHED: u64 = 0x40_0000;
const CLONE_CHILD_SETTID: u64 = 0x100_0000;
/// Without these it would be another process.
const CLONE_SHARED: u64 = CLONE_VM | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;
const CLONE_KNOWN: u64 = CLONE_SHARED
    | CLONE_FS
    | CLONE_SYSVSEM
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID
    | CLONE_DETACHED
    | CLONE_CHILD_SETTID;

const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
const FUTEX_PRIVATE: u64 = 128;

/// Threads that a program may have.
const MAX_THREADS: usize = 64;

/// `clone`, for threads of the program alone: EINVAL for anything else, EAGAIN if there are too many, EFAULT
/// if its number cannot be written.
pub fn clone(
    kernel: &mut Kernel<'_>,
    [flags, stack, parent, tls, child, ..]: [u64; 6],
) -> Result<u64, Errno> {
    if flags & CLONE_SHARED != CLONE_SHARED || flags & !CLONE_KNOWN != 0 || !stack.is_multiple_of(16) {
        return Err(Errno::EINVAL);
    }
    if kernel.process.threads >= MAX_THREADS {
        return Err(Errno::EAGAIN);
    }
    let id = kernel.process.new_thread_id();
    for (flag, address) in [(CLONE_PARENT_SETTID, parent), (CLONE_CHILD_SETTID, child)] {
        if flags & flag != 0 {
            kernel.process.space.write(&mut kernel.host, address, &(id as u32).to_le_bytes())?;
        }
    }
    let caller = &kernel.process.thread;
    let mut thread = Box::new(Thread {
        id,
        signals: caller.signals.inherited(),
        context: caller.context,
        ..Thread::default()
    });
    kernel.host.machine.save_fp(&mut thread.fp);
    thread.set_result(Ok(0));
    if stack != 0 {
        thread.context.sp = stack;
    }
    if flags & CLONE_SETTLS != 0 {
        thread.context.tls = tls;
    }
    if flags & CLONE_CHILD_CLEARTID != 0 {
        thread.clear_at_end = child;
    }
    kernel.threads.make_ready(thread);
    kernel.process.threads = kernel.process.threads.saturating_add(1);
    cpus::call_for_work(kernel.host.machine, kernel.process.threads.saturating_sub(1));
    Ok(id)
}

/// `set_tid_address`.
pub fn set_tid_address(kernel: &mut Kernel<'_>, address: u64) -> Result<u64, Errno> {
    kernel.process.thread.clear_at_end = address;
    Ok(kernel.process.thread.id)
}

/// `exit`: the thread ends, and with the last one the program.
pub fn exit(kernel: &mut Kernel<'_>, code: i32) -> Result<After, Ended> {
    let address = kernel.process.thread.clear_at_end;
    // Where the program cannot have a zero, nobody can wait for it.
    if address != 0 && kernel.process.space.write(&mut kernel.host, address, &[0; 4]).is_ok() {
        wake(kernel, address, 1);
    }
    if kernel.process.is_single_threaded() {
        return Err(Ended::Exit(code));
    }
    kernel.process.threads = kernel.process.threads.saturating_sub(1);
    Ok(After::Exit)
}

/// What a `futex` has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Futex {
    /// It has woken so many.
    Woken(u64),
    /// The thread waits.
    Wait(Wait),
}

/// `futex`: `FUTEX_WAIT` (EAGAIN if the word is another) and `FUTEX_WAKE`. EINVAL for an unaligned address, EFAULT for one
/// that cannot be read, ENOSYS for all other operations.
pub fn futex(
    kernel: &mut Kernel<'_>,
    [address, operation, value, timeout, ..]: [u64; 6],
) -> Result<Futex, Errno> {
    if !address.is_multiple_of(4) {
        return Err(Errno::EINVAL);
    }
    match operation & !FUTEX_PRIVATE {
        FUTEX_WAIT => {
            let deadline = match timeout {
                0 => None,
                timeout => Some(super::time::deadline(kernel, timeout)?),
            };
            let mut bytes = [0; 4];
            kernel.process.space.read(&mut kernel.host, address, &mut bytes)?;
            if u32::from_le_bytes(bytes) != value as u32 {
                return Err(Errno::EAGAIN);
            }
            Ok(Futex::Wait(Wait::Futex { address, deadline }))
        }
        FUTEX_WAKE => Ok(Futex::Woken(wake(kernel, address, value as u32 as usize))),
        _ => Err(Errno::ENOSYS),
    }
}

fn wake(kernel: &mut Kernel<'_>, address: u64, most: usize) -> u64 {
    let woken = kernel.threads.wake_futex(address, most);
    let count = woken.len() as u64;
    woken.into_iter().for_each(|thread| kernel.threads.make_ready(thread));
    count
}

/// `tgkill`: ESRCH if there is no such thread, EINVAL if there is no such signal.
pub fn tgkill(kernel: &mut Kernel<'_>, group: u64, id: u64, number: u64) -> Result<u64, Errno> {
    let mut kick = None;
    let thread = if id == kernel.process.thread.id {
        Some(&mut *kernel.process.thread)
    } else {
        kernel.threads.find(id).map(|(thread, cpu)| {
            kick = cpu;
            thread
        })
    };
    let thread = thread.filter(|_| group == kernel.process.id).ok_or(Errno::ESRCH)?;
    if number == 0 {
        return Ok(0);
    }
    // As in Linux, what is ignored is forgotten at once, and interrupts nothing.
    if kernel.process.actions.ignores(number) && !thread.signals.blocks(number) {
        return Ok(0);
    }
    thread.signals.send(number)?;
    if let Some(cpu) = kick {
        kernel.host.machine.kick(cpu);
    }
    let woken = kernel.threads.interrupt(id);
    woken.into_iter().for_each(|thread| kernel.threads.make_ready(thread));
    Ok(0)
}

/// `getcpu`; there is one node. EFAULT.
pub fn getcpu(kernel: &mut Kernel<'_>, cpu: u64, node: u64) -> Result<u64, Errno> {
    let number = kernel.cpu as u32;
    for (address, value) in [(cpu, number), (node, 0)] {
        if address != 0 {
            kernel.process.space.write(&mut kernel.host, address, &value.to_le_bytes())?;
        }
    }
    Ok(0)
}

/// `sched_getaffinity`: a thread may run on every CPU that there is. EINVAL for a size that has no room for them, EFAULT.
pub fn sched_getaffinity(kernel: &mut Kernel<'_>, size: u64, mask: u64) -> Result<u64, Errno> {
    const SIZE: u64 = 8;
    if size < SIZE || !size.is_multiple_of(SIZE) {
        return Err(Errno::EINVAL);
    }
    let others = kernel.host.machine.secondaries().len() as u32;
    let all = (2u64 << others).wrapping_sub(1);
    kernel.process.space.write(&mut kernel.host, mask, &all.to_le_bytes())?;
    Ok(SIZE)
}

#[cfg(test)]
mod tests;
