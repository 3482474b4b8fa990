//! The kernel on several CPUs: one of them at a time is in it, and what they ask of each other.
//!
//! Requests are software-generated interrupts. A kick says nothing: it brings a CPU out of EL0, out of a guest or out of
//! its rest, and so into the kernel, where it finds what there is to do. A shoot-down names translations that each CPU
//! has to forget before the one that asks goes on; that one is in the kernel, so the others answer on their way there,
//! and as long as they wait for it.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use spin::{Mutex, MutexGuard, Once};

use super::hardware::Hardware;
use super::{gic, paging, timer};
use crate::cpus;
use crate::host::Host;
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::platform::Gic;
use crate::process::Ended;
use crate::schedule::{Job, work};

/// The kernel, on its way from CPU to CPU.
struct Shared(Kernel<'static>);

// SAFETY: what is in the kernel (counted references, cells) is reached through this value alone, which is behind a lock:
// jobs, which leave it, are plain data.
unsafe impl Send for Shared {}

static KERNEL: Mutex<Option<Shared>> = Mutex::new(None);
static CONTROLLER: Once<Gic> = Once::new();

/// CPUs that may hold translations of the program: from their first time in the kernel to their last. Bit by number.
static WORKING: AtomicU64 = AtomicU64::new(0);
/// The bit of the one that is in the kernel, or was last.
static INSIDE: AtomicU64 = AtomicU64::new(0);
/// What is to be forgotten: the argument of `TLBI VALE1`, or of `TLBI ASIDE1` where a whole address space is.
static FORGET: AtomicU64 = AtomicU64::new(0);
static WHOLE_SPACE: AtomicBool = AtomicBool::new(false);
/// CPUs that were asked to forget it and have not yet.
static ASKED: AtomicU64 = AtomicU64::new(0);
/// CPUs that have waited for the kernel for long, and rest.
static WAITING: AtomicU64 = AtomicU64::new(0);

/// How often a CPU tries to come into the kernel before it rests.
const TRIES: u32 = 100;

/// Starts this CPU's part of the interrupt controller, and its tick. Returns `false` if there is none.
#[must_use]
pub fn start_interrupts() -> bool {
    let started = CONTROLLER.get().is_some_and(gic::start_cpu);
    if started {
        timer::arm();
    }
    started
}

/// Ends what [`start_interrupts`] has begun: no interrupt comes any more.
pub fn stop_interrupts() {
    timer::disarm();
    Hardware.take_interrupts();
    gic::stop_cpu();
}

/// Notes the interrupt controller, and starts it.
#[must_use]
pub fn start_controller(gic: Gic) -> bool {
    let gic = CONTROLLER.call_once(|| gic);
    gic::start(gic) && start_interrupts()
}

/// Runs the program to its end, on this CPU and those that are called, which are off again then. Cleans up after it, but
/// not if a CPU does not leave: that is the error.
pub fn run(kernel: Kernel<'static>) -> Result<(Option<Ended>, Host<'static>), &'static str> {
    *KERNEL.lock() = Some(Shared(kernel));
    work_as(0);
    // One that does not leave may be in the kernel, or use what would be freed.
    cpus::wait_for_workers(&Hardware).map_err(|_| "a CPU does not leave")?;
    let Shared(kernel) = KERNEL.lock().take().ok_or("the kernel is gone")?;
    Ok(kernel.clean_up())
}

/// Works as CPU `number` until the program has ended.
pub fn work_as(number: usize) {
    let own = 1 << number;
    work(&Hardware, |done, context| {
        inside(own, |kernel| {
            WORKING.fetch_or(own, Ordering::Relaxed);
            match kernel {
                Some(Shared(kernel)) => kernel.next(number, done, context),
                None => Job::Leave,
            }
        })
    });
    // With the kernel held nobody asks, so no request can name this CPU once its bit is gone.
    inside(own, |_| WORKING.fetch_and(!own, Ordering::Relaxed));
    paging::leave_program();
}

/// Does something in the kernel, and calls one of those that wait for it.
fn inside<T>(own: u64, f: impl FnOnce(&mut Option<Shared>) -> T) -> T {
    let mut kernel = enter(own);
    INSIDE.store(own, Ordering::Relaxed);
    let result = f(&mut kernel);
    drop(kernel);
    // Either this CPU sees that one waits, or that one sees that the kernel is free.
    fence(Ordering::SeqCst);
    let waiting = WAITING.load(Ordering::Relaxed);
    if waiting != 0 {
        // The next one by number, so that each has its turn.
        let after = waiting & own.wrapping_neg() & !own;
        kick((if after != 0 { after } else { waiting }).trailing_zeros() as usize);
    }
    result
}

/// Waits for the kernel, and does meanwhile what the CPU in it asks for.
fn enter(own: u64) -> MutexGuard<'static, Option<Shared>> {
    loop {
        for _ in 0..TRIES {
            answer(own);
            if let Some(kernel) = KERNEL.try_lock() {
                WAITING.fetch_and(!own, Ordering::Relaxed);
                return kernel;
            }
            Hardware.relax();
        }
        WAITING.fetch_or(own, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        answer(own);
        if let Some(kernel) = KERNEL.try_lock() {
            WAITING.fetch_and(!own, Ordering::Relaxed);
            return kernel;
        }
        Hardware.idle();
    }
}

/// Forgets what this CPU is asked to forget.
fn answer(own: u64) {
    if ASKED.load(Ordering::Acquire) & own != 0 {
        forget(FORGET.load(Ordering::Relaxed), WHOLE_SPACE.load(Ordering::Relaxed));
        ASKED.fetch_and(!own, Ordering::Release);
    }
}

fn forget(argument: u64, whole_space: bool) {
    // What a walk could still find was made invalid before. Other CPUs have seen that: the request came after it.
    if whole_space {
        // SAFETY: forgetting translations of EL0 is always allowed.
        unsafe { asm!("dsb ishst", "tlbi aside1, {}", "dsb nsh", "isb", in(reg) argument, options(nostack)) };
    } else {
        // SAFETY: as above.
        unsafe { asm!("dsb ishst", "tlbi vale1, {}", "dsb nsh", "isb", in(reg) argument, options(nostack)) };
    }
}

/// Lets this CPU and all that work forget a page's translations, or those of an address space. The caller is in the
/// kernel, or no other CPU works.
pub fn shoot_down(argument: u64, whole_space: bool) {
    forget(argument, whole_space);
    let others = WORKING.load(Ordering::Relaxed) & !INSIDE.load(Ordering::Relaxed);
    if others == 0 {
        return;
    }
    FORGET.store(argument, Ordering::Relaxed);
    WHOLE_SPACE.store(whole_space, Ordering::Relaxed);
    ASKED.store(others, Ordering::Release);
    for cpu in (0..u64::BITS).filter(|cpu| others >> cpu & 1 != 0) {
        kick(cpu as usize);
    }
    while ASKED.load(Ordering::Acquire) != 0 {
        Hardware.relax();
    }
}

/// Interrupts a CPU.
pub fn kick(cpu: usize) {
    gic::send(super::secondaries::affinity_of(cpu));
}
