//! Threads of a program, by Linux's calls.

use alloc::boxed::Box;
use core::mem::{ManuallyDrop, offset_of};
use core::sync::atomic::{AtomicU32, Ordering};

use crate::arch::{self, ProbeContext};
use crate::sys::{Mapping, result};
use crate::uapi::nr;
use crate::{Failure, failure};

const STACK_SIZE: u64 = 64 << 10;
const FUTEX_WAIT_PRIVATE: u64 = 128;

/// A thread. One that is not joined keeps its stack for ever.
#[derive(Debug)]
#[must_use]
pub struct Thread {
    id: u64,
    stack: ManuallyDrop<Mapping>,
}

/// What stands above a thread's stack.
#[repr(C, align(16))]
struct Top {
    /// First, where the thread's pointer points.
    context: ProbeContext,
    /// The thread's number while it lives; then 0.
    end: AtomicU32,
}

impl Thread {
    /// Makes one.
    pub fn spawn(work: impl FnOnce() + Send + 'static) -> Result<Self, Failure> {
        let stack = Mapping::anonymous(STACK_SIZE)?;
        let top = top_of(&stack);
        let work: Box<Work> = Box::new(Box::new(work));
        let argument = Box::into_raw(work) as u64;
        // SAFETY: the mapping is of zeros, which is a `Top`, is aligned to pages, and stays until `join` has seen the
        // thread's end. `run` gets the box that was just given up, which may go to another thread.
        let id = unsafe { arch::spawn(top as u64, top.cast(), end_of(top), run, argument) };
        result("clone", id).map(|id| Self { id, stack: ManuallyDrop::new(stack) })
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Waits for its end.
    pub fn join(mut self) {
        // SAFETY: the mapping is there as long as this value, and all accesses to this word are atomic.
        let end = unsafe { AtomicU32::from_ptr(end_of(top_of(&self.stack))) };
        loop {
            match end.load(Ordering::Acquire) {
                0 => break,
                id => {
                    let arguments = [end.as_ptr() as u64, FUTEX_WAIT_PRIVATE, id.into(), 0, 0, 0];
                    // SAFETY: the kernel reads the word.
                    unsafe { arch::syscall(nr::FUTEX, arguments) };
                }
            }
        }
        // SAFETY: the thread has ended, and this value goes: nothing uses the stack any more.
        unsafe { ManuallyDrop::drop(&mut self.stack) };
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: u64) -> Result<u64, Failure> {
        // SAFETY: no pointer is passed; the program has a handler, or means to end.
        let group = unsafe { arch::syscall(nr::GETPID, [0; 6]) } as u64;
        // SAFETY: as above.
        result("tgkill", unsafe { arch::syscall(nr::TGKILL, [group, self.id, signal, 0, 0, 0]) })
    }
}

type Work = Box<dyn FnOnce() + Send>;

fn top_of(stack: &Mapping) -> *mut Top {
    stack.address(STACK_SIZE - size_of::<Top>() as u64) as *mut Top
}

/// The word that tells a thread's end.
fn end_of(top: *mut Top) -> *mut u32 {
    top.cast::<u32>().wrapping_byte_add(offset_of!(Top, end))
}

extern "C" fn run(argument: u64) {
    // SAFETY: `spawn` made the box and has given it to this thread alone.
    let work = unsafe { Box::from_raw(argument as *mut Work) };
    work();
}

/// The number of the CPU that this thread is on.
pub fn cpu() -> u64 {
    let mut number = 0u32;
    // SAFETY: the kernel writes the word.
    unsafe { arch::syscall(nr::GETCPU, [&raw mut number as u64, 0, 0, 0, 0, 0]) };
    core::hint::black_box(number).into()
}

/// Number of CPUs on which threads may run.
pub fn cpus() -> Result<u64, Failure> {
    let mut mask = 0u64;
    let arguments = [0, size_of::<u64>() as u64, &raw mut mask as u64, 0, 0, 0];
    // SAFETY: the kernel writes the word.
    result("sched_getaffinity", unsafe { arch::syscall(nr::SCHED_GETAFFINITY, arguments) })?;
    match core::hint::black_box(mask).count_ones() {
        0 => Err(failure!("there is no CPU")),
        count => Ok(count.into()),
    }
}

/// Lets other threads run.
pub fn give_way() {
    // SAFETY: no memory is involved.
    unsafe { arch::syscall(nr::SCHED_YIELD, [0; 6]) };
}
