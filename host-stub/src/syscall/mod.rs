//! System calls: Linux's numbers for arm64 (`asm-generic/unistd.h`), arguments in x0 to x5, result in x0.

pub mod file;
pub mod memory;
pub mod signals;
pub mod thread;
pub mod time;

use crate::errno::Errno;
use crate::kernel::Kernel;
use crate::process::Ended;
use crate::schedule::After;
use crate::threads::Wait;
use thread::Futex;

/// Numbers.
#[expect(missing_docs, reason = "Linux's own names")]
pub mod nr {
    pub const IOCTL: u64 = 29;
    pub const FALLOCATE: u64 = 47;
    pub const OPENAT: u64 = 56;
    pub const CLOSE: u64 = 57;
    pub const LSEEK: u64 = 62;
    pub const READ: u64 = 63;
    pub const WRITE: u64 = 64;
    pub const WRITEV: u64 = 66;
    pub const FSTAT: u64 = 80;
    pub const EXIT: u64 = 93;
    pub const EXIT_GROUP: u64 = 94;
    pub const SET_TID_ADDRESS: u64 = 96;
    pub const FUTEX: u64 = 98;
    pub const NANOSLEEP: u64 = 101;
    pub const CLOCK_GETTIME: u64 = 113;
    pub const SCHED_GETAFFINITY: u64 = 123;
    pub const SCHED_YIELD: u64 = 124;
    pub const TGKILL: u64 = 131;
    pub const RT_SIGACTION: u64 = 134;
    pub const RT_SIGPROCMASK: u64 = 135;
    pub const RT_SIGRETURN: u64 = 139;
    pub const GETCPU: u64 = 168;
    pub const GETPID: u64 = 172;
    pub const GETTID: u64 = 178;
    pub const BRK: u64 = 214;
    pub const MUNMAP: u64 = 215;
    pub const CLONE: u64 = 220;
    pub const MMAP: u64 = 222;
}

/// Serves the system call that the thread has just made. Its result is in x0 unless the thread waits for it.
pub fn dispatch(kernel: &mut Kernel<'_>) -> Result<After, Ended> {
    let [a, b, c, d, e, f, ..] = kernel.process.thread.context.x;
    let number = kernel.process.thread.context.x[8];
    let result = match number {
        nr::IOCTL if file::is_vcpu_in_use(kernel, a) => {
            // As KVM's lock of a vCPU would: the call is made again.
            let context = &mut kernel.process.thread.context;
            context.pc = context.pc.wrapping_sub(4);
            return Ok(After::Wait(Wait::a_tick(kernel.host.machine.now())));
        }
        nr::IOCTL => file::ioctl(kernel, a, b as u32, c),
        nr::FALLOCATE => file::fallocate(kernel, a, b, c, d),
        nr::OPENAT => file::openat(kernel, b, c),
        nr::CLOSE => file::close(kernel, a),
        nr::LSEEK => file::lseek(kernel, a, b, c),
        nr::READ => file::read(kernel, a, b, c),
        nr::WRITE => file::write(kernel, a, b, c),
        nr::WRITEV => file::writev(kernel, a, b, c),
        nr::FSTAT => file::fstat(kernel, a, b),
        nr::EXIT => return thread::exit(kernel, a as i32),
        nr::EXIT_GROUP => return Err(Ended::Exit(a as i32)),
        nr::SET_TID_ADDRESS => thread::set_tid_address(kernel, a),
        nr::FUTEX => match thread::futex(kernel, [a, b, c, d, e, f]) {
            Ok(Futex::Wait(wait)) => return Ok(After::Wait(wait)),
            Ok(Futex::Woken(count)) => Ok(count),
            Err(error) => Err(error),
        },
        nr::GETPID => Ok(kernel.process.id),
        nr::GETTID => Ok(kernel.process.thread.id),
        nr::NANOSLEEP => match time::nanosleep(kernel, a) {
            Ok(wait) => return Ok(After::Wait(wait)),
            Err(error) => Err(error),
        },
        nr::SCHED_GETAFFINITY => thread::sched_getaffinity(kernel, b, c),
        nr::SCHED_YIELD => {
            kernel.process.thread.set_result(Ok(0));
            return Ok(After::Yield);
        }
        nr::TGKILL => thread::tgkill(kernel, a, b, c),
        nr::GETCPU => thread::getcpu(kernel, a, b),
        nr::CLONE => thread::clone(kernel, [a, b, c, d, e, f]),
        nr::CLOCK_GETTIME => time::clock_gettime(kernel, a, b),
        nr::RT_SIGACTION => signals::rt_sigaction(kernel, a, b, c, d),
        nr::RT_SIGPROCMASK => signals::rt_sigprocmask(kernel, a, b, c, d),
        // It sets all registers itself.
        nr::RT_SIGRETURN => {
            return match kernel.process.return_from_signal(&mut kernel.host) {
                Ok(()) => Ok(After::GoOn),
                Err(signal) => kernel.process.deliver(&mut kernel.host, signal).map(|()| After::GoOn),
            };
        }
        nr::BRK => memory::brk(kernel, a),
        nr::MUNMAP => memory::munmap(kernel, a, b),
        nr::MMAP => memory::mmap(
            kernel,
            memory::Request { address: a, length: b, prot: c, flags: d, file: e, offset: f },
        ),
        _ => Err(Errno::ENOSYS),
    };
    // A `KVM_RUN` has its result when the vCPU comes back.
    if kernel.process.thread.entry.is_none() {
        kernel.process.thread.set_result(result);
    }
    Ok(After::GoOn)
}

#[cfg(test)]
mod tests;
