//! The end of a hypervisor that has found itself broken: say why once, on one line with a fixed prefix, then
//! what is known, then turn the machine off. Every entry to EL2 looks at [`PANICKING`] first and parks.

use super::{boot, console, layout, power};
use crate::addr::{PAGE_SIZE, Pfn, PhysAddr};
use crate::psci::End;
use aarch64_cpu::registers::{ELR_EL2, ESR_EL2, FAR_EL2, Readable, SPSR_EL2};
use core::cell::UnsafeCell;
use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

/// Not 0 once a CPU has begun to panic.
pub static PANICKING: AtomicU32 = AtomicU32::new(0);

/// Whether some CPU is, so that this one must do nothing any more.
pub fn is_panicking() -> bool {
    PANICKING.load(Ordering::Acquire) != 0
}
/// Not 0 once a CPU has taken the emergency stack; only vectors.S uses it.
pub(super) static FATAL: AtomicU32 = AtomicU32::new(0);

/// Bytes of the emergency stack.
pub(super) const EMERGENCY_STACK_SIZE: usize = 8 * 1024;

/// The stack for reports of exceptions at EL2, whose own stack may be what broke.
#[repr(C, align(16))]
pub(super) struct EmergencyStack(UnsafeCell<[u8; EMERGENCY_STACK_SIZE]>);

// SAFETY: no Rust code refers to its bytes; the CPU that has set `FATAL` uses it, through SP.
unsafe impl Sync for EmergencyStack {}

pub(super) static EMERGENCY_STACK: EmergencyStack =
    EmergencyStack(UnsafeCell::new([0; EMERGENCY_STACK_SIZE]));

/// Registers at an exception that EL2 did not expect, as vectors.S leaves them.
#[derive(Debug)]
#[repr(C)]
pub struct FatalFrame {
    x: [u64; 31],
    sp: u64,
    vector: u64,
    _padding: u64,
}

const VECTORS: [&str; 16] = [
    "synchronous, EL2 on SP_EL0",
    "IRQ, EL2 on SP_EL0",
    "FIQ, EL2 on SP_EL0",
    "SError, EL2 on SP_EL0",
    "synchronous, EL2",
    "IRQ, EL2",
    "FIQ, EL2",
    "SError, EL2",
    "synchronous, host",
    "IRQ, host",
    "FIQ, host",
    "SError, host",
    "synchronous, host in AArch32",
    "IRQ, host in AArch32",
    "FIQ, host in AArch32",
    "SError, host in AArch32",
];

/// Registers in a line of the report.
const REGISTERS_IN_ROW: usize = 4;

/// Values of registers, side by side.
struct Row<'a>(&'a [u64]);

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|value| write!(f, " {value:016x}"))
    }
}

/// Code addresses that a stack is searched for: how many are printed, and over how many words.
const BACKTRACE_LINES: usize = 16;
const BACKTRACE_WORDS: u64 = 1024;

/// Reports a Rust panic and turns the machine off.
pub fn on_panic(info: &PanicInfo<'_>) -> ! {
    begin();
    match info.location() {
        Some(location) => {
            say_panic(format_args!("{} at {}:{}", info.message(), location.file(), location.line()))
        }
        None => say_panic(format_args!("{}", info.message())),
    }
    say_exception_registers();
    let here = 0u64;
    say_backtrace((&raw const here).addr() as u64);
    power::end(End::Off)
}

/// Reports an exception that EL2 took from itself, or that the host cannot cause, and turns the machine off.
pub(super) extern "C" fn report_fatal(frame: &FatalFrame) -> ! {
    begin();
    let vector = VECTORS.get(frame.vector as usize).copied().unwrap_or("unknown vector");
    let overflow = layout::in_guard_page(FAR_EL2.get()) || layout::in_guard_page(frame.sp);
    let what = if overflow { "stack overflow" } else { "unexpected exception" };
    say_panic(format_args!("{what} ({vector})"));
    say_exception_registers();
    for (row, values) in frame.x.chunks(REGISTERS_IN_ROW).enumerate() {
        console::emergency_line(format_args!("  x{:<2}{}", row * REGISTERS_IN_ROW, Row(values)));
    }
    console::emergency_line(format_args!("  sp  {:#018x}", frame.sp));
    say_ownership(FAR_EL2.get());
    say_backtrace(frame.sp);
    power::end(End::Off)
}

/// Makes sure that one CPU reports, once.
fn begin() {
    if PANICKING.swap(1, Ordering::AcqRel) != 0 {
        // A panic while panicking, or another CPU is at it: either way the first report is the one to read.
        power::end(End::Off);
    }
}

fn say_panic(what: fmt::Arguments<'_>) {
    console::emergency_line(format_args!("PANIC {what}"));
}

fn say_exception_registers() {
    console::emergency_line(format_args!(
        "  ESR_EL2 {:#x}  ELR_EL2 {:#x}  FAR_EL2 {:#x}  SPSR_EL2 {:#x}  image base {:#x}",
        ESR_EL2.get(),
        ELR_EL2.get(),
        FAR_EL2.get(),
        SPSR_EL2.get(),
        layout::image().start().base().as_u64(),
    ));
}

/// Says whose page an address lies in, if the tables can be asked now. EL2's addresses are physical ones.
fn say_ownership(address: u64) {
    let Some(page) = PhysAddr::new(address).map(Pfn::containing) else { return };
    let Some(hypervisor) = boot::try_hypervisor() else { return };
    if let Some(host) = hypervisor.host.try_lock() {
        let page_number = page.as_u64();
        match host.table.entry(&hypervisor.machine, page.identity()) {
            Some(entry) => console::emergency_line(format_args!("  page {page_number:#x}: {entry}")),
            None => console::emergency_line(format_args!("  page {page_number:#x}: beyond the host")),
        }
    }
}

/// Prints what looks like return addresses on a stack: the code is built without frame pointers, so some of
/// these are left over from calls that have returned.
fn say_backtrace(sp: u64) {
    let text = layout::text();
    let Some(stack) = layout::STACKS
        .iter()
        .map(layout::stack)
        .find(|stack| PhysAddr::new(sp).is_some_and(|sp| stack.contains(Pfn::containing(sp))))
    else {
        return;
    };
    let end = stack.end() * PAGE_SIZE;
    let start = sp & !7;
    let words = (start..end).step_by(8).take(BACKTRACE_WORDS as usize);
    let looks_like_code = |value: &u64| {
        value.is_multiple_of(4) && PhysAddr::new(*value).is_some_and(|at| text.contains(Pfn::containing(at)))
    };
    for value in words.map(read_stack_word).filter(looks_like_code).take(BACKTRACE_LINES) {
        console::emergency_line(format_args!("  on the stack: {value:#x}"));
    }
}

fn read_stack_word(address: u64) -> u64 {
    // SAFETY: the caller passes aligned addresses inside the mapped part of a stack, above its guard page;
    // whatever the words are, they are read as integers.
    unsafe { (address as *const u64).read_volatile() }
}
