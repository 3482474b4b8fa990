//! Exceptions taken from EL1: expected faults go on at their fix-up, all others end the kernel.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use super::hardware;

global_asm!(
    include_str!("vectors.S"),
    frame_size = const size_of::<KernelFrame>(),
    stack_shift = const STACK_SHIFT,
);

/// The stack's size is one bit of its addresses (see the linker script).
pub const STACK_SHIFT: u32 = 16;

/// Registers at an exception from EL1, as `vectors.S` saves them.
#[repr(C)]
#[derive(Debug)]
struct KernelFrame {
    x: [u64; 31],
    sp: u64,
    elr: u64,
    spsr: u64,
    esr: u64,
    far: u64,
}

const _: () = assert!(size_of::<KernelFrame>() == 288 && core::mem::offset_of!(KernelFrame, elr) == 256);

unsafe extern "C" {
    static _start_of_fixups: [u64; 2];
    static _end_of_fixups: [u64; 2];
}

/// The instruction and where to go on after its fault.
fn fixup(elr: u64) -> Option<u64> {
    let start = &raw const _start_of_fixups;
    let count = (&raw const _end_of_fixups as usize).wrapping_sub(start as usize) / size_of::<[u64; 2]>();
    // SAFETY: the linker script puts the pairs of section .fixups, 8-byte aligned and read-only, between
    // the two symbols.
    let table = unsafe { core::slice::from_raw_parts(start, count) };
    table.iter().find(|[from, _]| *from == elr).map(|[_, to]| *to)
}

/// Synchronous exception from EL1 with its own stack pointer.
const SYNCHRONOUS: u64 = 4;
const EC_DATA_ABORT_SAME: u64 = 0x25;
const EC_UNKNOWN: u64 = 0x00;

/// Called by `vectors.S` for every exception taken from EL1.
// SAFETY: the name is used by vectors.S alone.
#[unsafe(no_mangle)]
extern "C" fn kernel_exception(vector: u64, frame: &mut KernelFrame) {
    if vector == SYNCHRONOUS
        && matches!(frame.esr >> 26, EC_DATA_ABORT_SAME | EC_UNKNOWN)
        && let Some(next) = fixup(frame.elr)
    {
        frame.x[1] = frame.esr;
        frame.x[2] = frame.far;
        frame.elr = next;
        return;
    }
    end_once();
    let kind = match vector % 4 {
        0 => "synchronous exception",
        1 => "IRQ",
        2 => "FIQ",
        _ => "SError",
    };
    dump(kind, frame);
    hardware::power_off();
}

static ENDING: AtomicBool = AtomicBool::new(false);

/// Stops this CPU if the kernel is ending already: then what went wrong is the ending itself.
fn end_once() {
    if ENDING.swap(true, Ordering::Relaxed) {
        loop {
            aarch64_cpu::asm::wfe();
        }
    }
}

fn dump(kind: &str, frame: &KernelFrame) {
    super::console::force(format_args!("unexpected {kind} in the kernel"));
    super::console::force(format_args!(
        "ESR {:#x} FAR {:#018x} ELR {:#018x} SPSR {:#x} SP {:#018x}",
        frame.esr, frame.far, frame.elr, frame.spsr, frame.sp
    ));
    for (index, registers) in frame.x.chunks(4).enumerate() {
        super::console::force(format_args!("x{:<2} {registers:016x?}", index * 4));
    }
}

/// Called by `vectors.S`, on the emergency stack, when the kernel's stack has run out.
// SAFETY: the name is used by vectors.S alone.
#[unsafe(no_mangle)]
extern "C" fn kernel_stack_overflow(elr: u64, esr: u64, far: u64) -> ! {
    end_once();
    super::console::force(format_args!("kernel stack overflow: ELR {elr:#x} ESR {esr:#x} FAR {far:#x}"));
    hardware::power_off();
}
