//! Entry, system calls, and accesses that survive a signal: the unsafe part of a program.
//!
//! Each thread has a probe's context of its own, to which TPIDR_EL0 points.

use core::arch::{asm, global_asm};
use core::mem::offset_of;

use crate::uapi::{nr, signal};

/// A thread's probe that is under way. Layout known to start.S.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub struct ProbeContext {
    saved: [u64; 12],
    sp: u64,
    armed: u64,
    code: u64,
    address: u64,
    mask: u64,
}

global_asm!(
    include_str!("start.S"),
    saved = const offset_of!(ProbeContext, saved),
    armed = const offset_of!(ProbeContext, armed),
    code = const offset_of!(ProbeContext, code),
    mask = const offset_of!(ProbeContext, mask),
    context_size = const size_of::<ProbeContext>(),
    sigprocmask = const nr::RT_SIGPROCMASK,
    sigreturn = const nr::RT_SIGRETURN,
    clone = const nr::CLONE,
    exit = const nr::EXIT,
);
const _: () = assert!(offset_of!(ProbeContext, sp) == 96 && offset_of!(ProbeContext, armed) == 104);

unsafe extern "C" {
    fn deed_probe_load(address: u64, value: *mut u64) -> u64;
    fn deed_probe_store(address: u64, value: u64) -> u64;
    static deed_signal_handler: u8;
    static deed_signal_restorer: u8;
    static deed_signal_nothing: u8;
    fn deed_spawn(flags: u64, stack: u64, id: *mut u32, context: *mut ProbeContext, end: *mut u32) -> i64;
}

/// Address of the signal handler.
pub fn signal_handler() -> u64 {
    &raw const deed_signal_handler as u64
}

/// Address of a handler that does nothing.
pub fn idle_handler() -> u64 {
    &raw const deed_signal_nothing as u64
}

/// Address of the code that a returning handler goes to.
pub fn signal_restorer() -> u64 {
    &raw const deed_signal_restorer as u64
}

/// A signal that an access raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// SIGBUS or SIGSEGV.
    pub number: u64,
    /// si_code.
    pub code: u32,
    /// si_addr.
    pub address: u64,
}

impl Signal {
    fn taken(number: u64) -> Self {
        let context: *const ProbeContext;
        // SAFETY: reads a register that is this thread's.
        unsafe { asm!("mrs {}, tpidr_el0", out(reg) context, options(nomem, nostack)) };
        // SAFETY: it points to this thread's context from its first instruction on. The handler has written code and
        // address before the probe returned, and nobody else writes there.
        let context = unsafe { context.read_volatile() };
        Self { number, code: context.code as u32, address: context.address }
    }

    /// Whether this is SIGBUS for exactly this address, as for an object's page that may not be touched.
    pub fn is_bus_error_at(&self, address: u64) -> bool {
        self.number == signal::SIGBUS
            && (self.code == signal::BUS_ADRERR || self.code == signal::BUS_OBJERR)
            && self.address == address
    }
}

impl core::fmt::Display for Signal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let name = match self.number {
            signal::SIGBUS => "SIGBUS",
            signal::SIGSEGV => "SIGSEGV",
            _ => "signal",
        };
        write!(f, "{name} code {} at {:#x}", self.code, self.address)
    }
}

/// Loads 8 bytes from any address; the signal handler must be installed.
pub fn probe_load(address: u64) -> Result<u64, Signal> {
    let mut value = 0;
    // SAFETY: the assembly keeps the C calling convention; a load that is not allowed ends in the handler,
    // which returns the signal as this call's result. What it reads is handed on as a number.
    match unsafe { deed_probe_load(address, &mut value) } {
        0 => Ok(value),
        number => Err(Signal::taken(number)),
    }
}

/// Stores 8 bytes to an address in a mapping; the signal handler must be installed.
///
/// # Safety
///
/// No Rust object may live at the address.
pub unsafe fn probe_store(address: u64, value: u64) -> Result<(), Signal> {
    // SAFETY: as for `probe_load`; the caller promises that nothing of Rust's is overwritten.
    match unsafe { deed_probe_store(address, value) } {
        0 => Ok(()),
        number => Err(Signal::taken(number)),
    }
}

/// Loads 8 bytes between two reads of the virtual counter; returns their difference.
///
/// # Safety
///
/// The address is in a mapping, in a page that the kernel provides.
pub unsafe fn timed_load(address: u64) -> u64 {
    let (begin, end): (u64, u64);
    // SAFETY: the load is the caller's claim; the counter changes nothing.
    unsafe {
        asm!("mrs {begin}, cntvct_el0", "ldr {value}, [{address}]", "mrs {end}, cntvct_el0",
             begin = out(reg) begin, end = out(reg) end, value = out(reg) _, address = in(reg) address,
             options(nostack))
    };
    end.wrapping_sub(begin)
}

/// What the virtual counter reads.
pub fn counter() -> u64 {
    let count: u64;
    // SAFETY: reads a counter. Without `nomem`, so that it keeps its place among system calls.
    unsafe { asm!("mrs {}, cntvct_el0", out(reg) count, options(nostack)) };
    count
}

/// Makes a thread that calls `function` with `argument` on a new stack; returns `clone`'s result. The words at `id` and
/// `end` get its number; a zero is written to `end` when it is gone.
///
/// # Safety
///
/// `stack` is the end of memory that is the thread's alone until then, aligned to 16 bytes; `context` is, too, and `id`
/// and `end` are words that others may read meanwhile. The function may be called with this argument on another thread.
pub unsafe fn spawn(
    stack: u64,
    context: *mut ProbeContext,
    end: *mut u32,
    function: extern "C" fn(u64),
    argument: u64,
) -> i64 {
    // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID.
    const FLAGS: u64 = 0x3d_0f00;
    let top = (stack - 16) as *mut u64;
    // SAFETY: the stack's last two words are the thread's, which does not run yet.
    unsafe { top.write(function as usize as u64) };
    // SAFETY: as above.
    unsafe { top.wrapping_add(1).write(argument) };
    // SAFETY: the new thread begins with its own stack and pointer, and runs what the caller allows it to run.
    unsafe { deed_spawn(FLAGS, top as u64, end, context, end) }
}

/// A system call.
///
/// # Safety
///
/// Pointers among the arguments must be valid for what the kernel does with them, and the call must not
/// take memory away that Rust uses.
pub unsafe fn syscall(number: u64, arguments: [u64; 6]) -> i64 {
    let [mut x0, x1, x2, x3, x4, x5] = arguments;
    // SAFETY: the kernel keeps all registers but x0; what it does with the arguments is the caller's claim.
    unsafe {
        asm!("svc #0", in("x8") number, inout("x0") x0, in("x1") x1, in("x2") x2, in("x3") x3, in("x4") x4,
             in("x5") x5, options(nostack))
    };
    x0 as i64
}
