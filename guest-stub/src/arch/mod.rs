//! Entry, exception vectors, stage-1 tables and single instructions: the unsafe part of a guest.
//!
//! Two things are shared between vCPUs: the [`Fault`] record, which only one vCPU may use at a time (the
//! one that calls [`attempt`]), and the function of the second vCPU, written before that is turned on.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

mod instructions;
mod record;

pub use instructions::*;
pub use record::{EntryRecord, SYSTEM_COUNT, SYSTEM_REGISTERS, entry_record, system_registers};

/// Bytes of each vCPU's stack.
pub const STACK_SIZE: usize = 16 << 10;

const DESCRIPTOR_BLOCK: u64 = 1;
/// Stage-1 table descriptor.
pub const DESCRIPTOR_TABLE: u64 = 3;
const DESCRIPTOR_AF: u64 = 1 << 10;
const DESCRIPTOR_SH_INNER: u64 = 3 << 8;
const DESCRIPTOR_UXN: u64 = 1 << 54;
const DESCRIPTOR_PXN: u64 = 1 << 53;
const ATTRIBUTES_DEVICE: u64 = 0 << 2;
const ATTRIBUTES_NORMAL: u64 = 1 << 2;

/// Bytes of a level-2 block.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// Level-2 block descriptor of devices, less the address.
pub const DEVICE_BLOCK: u64 =
    DESCRIPTOR_BLOCK | DESCRIPTOR_AF | DESCRIPTOR_UXN | DESCRIPTOR_PXN | ATTRIBUTES_DEVICE;
/// Level-2 block descriptor of RAM, less the address.
pub const NORMAL_BLOCK: u64 = DESCRIPTOR_BLOCK | DESCRIPTOR_AF | DESCRIPTOR_SH_INNER | ATTRIBUTES_NORMAL;

/// MAIR_EL1: 0 is Device-nGnRE, 1 is Normal write-back.
pub const MAIR: u64 = 0x04 | 0xff << 8;
/// TCR_EL1: T0SZ 25 (39 bits), write-back inner-shareable walks, 4 KiB, no walks by TTBR1.
pub const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23;
/// SCTLR_EL1: its RES1 bits, M, C and I.
pub const SCTLR: u64 = 0x30d0_0800 | 1 << 0 | 1 << 2 | 1 << 12;

/// Expands to the entry code, in the binary that [`crate::guest!`] is used in: a program of the host that uses
/// this package for its protocol alone must not get a second entry.
#[macro_export]
macro_rules! guest_entry {
    () => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/arch/entry.S")),
            stack_size = const $crate::arch::STACK_SIZE,
            mair = const $crate::arch::MAIR,
            tcr = const $crate::arch::TCR,
            sctlr = const $crate::arch::SCTLR,
            table = const $crate::arch::DESCRIPTOR_TABLE,
            block = const $crate::arch::BLOCK_SIZE,
            device_base = const $crate::protocol::DEVICE_BASE,
            ram_base = const $crate::protocol::RAM_BASE,
            device = const $crate::arch::DEVICE_BLOCK,
            normal = const $crate::arch::NORMAL_BLOCK,
            record_size = const size_of::<$crate::arch::EntryRecord>(),
        );
    };
}

// SAFETY: `guest!` defines the function with this signature, once, in every binary of this package.
unsafe extern "C" {
    safe fn deed_guest_main(argument: u64);
}

unsafe extern "C" {
    static deed_guest_secondary: u8;
}

/// Entry of the Rust part on the boot vCPU.
// SAFETY: called by entry.S alone, with this signature.
#[unsafe(no_mangle)]
extern "C" fn deed_guest_start(argument: u64) -> ! {
    deed_guest_main(argument);
    crate::call::system_off()
}

static SECONDARY: AtomicUsize = AtomicUsize::new(0);

/// Entry of the Rust part on another vCPU.
// SAFETY: called by entry.S alone, with this signature.
#[unsafe(no_mangle)]
extern "C" fn deed_guest_secondary_start(context: u64) {
    let address = SECONDARY.load(Ordering::Acquire);
    // SAFETY: `secondary_entry` is the only writer and stores a `fn(u64)`; it returns the entry address
    // only after that, so no vCPU comes here before.
    let function: fn(u64) = unsafe { core::mem::transmute::<usize, fn(u64)>(address) };
    function(context);
}

/// Says what the second vCPU will run; returns the entry address for `CPU_ON`.
pub fn secondary_entry(function: fn(u64)) -> u64 {
    SECONDARY.store(function as usize, Ordering::Release);
    &raw const deed_guest_secondary as u64
}

/// What the vectors save: layout known to entry.S.
#[repr(C)]
#[derive(Debug)]
struct ExceptionFrame {
    x: [u64; 31],
    elr: u64,
    spsr: u64,
    _align: u64,
}
const _: () = assert!(size_of::<ExceptionFrame>() == 272);

/// An exception that a guest took on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// ESR_EL1.
    pub syndrome: u64,
    /// FAR_EL1; meaningful for aborts.
    pub address: u64,
}

impl Fault {
    /// ESR_EL1.EC.
    pub fn class(self) -> u64 {
        self.syndrome >> 26 & 0x3f
    }

    /// Fault status code of an abort.
    pub fn status(self) -> u64 {
        self.syndrome & 0x3f
    }
}

/// Exception class of an UNDEFINED instruction.
pub const CLASS_UNKNOWN: u64 = 0;
/// Exception class of an instruction abort at the same level.
pub const CLASS_INSTRUCTION_ABORT: u64 = 0x21;
/// Exception class of a data abort at the same level.
pub const CLASS_DATA_ABORT: u64 = 0x25;
/// Fault status code of a synchronous external abort.
pub const STATUS_EXTERNAL: u64 = 0x10;

/// What a vCPU's handler and the code that it interrupts say to each other.
struct Attempt {
    expected: AtomicBool,
    taken: AtomicBool,
    syndrome: AtomicU64,
    address: AtomicU64,
}

/// vCPUs that Deed gives a VM at the most.
const VCPUS: usize = 8;

/// By affinity, which is the vCPU's index.
static ATTEMPTS: [Attempt; VCPUS] = [const {
    Attempt {
        expected: AtomicBool::new(false),
        taken: AtomicBool::new(false),
        syndrome: AtomicU64::new(0),
        address: AtomicU64::new(0),
    }
}; VCPUS];

/// This vCPU's part.
fn attempt_here() -> &'static Attempt {
    &ATTEMPTS[crate::read_register!("mpidr_el1") as usize % VCPUS]
}

/// Runs `action`, in which one instruction may take a synchronous exception: it is then skipped, and the
/// exception is the result.
pub fn attempt<T>(action: impl FnOnce() -> T) -> Result<T, Fault> {
    let attempt = attempt_here();
    attempt.taken.store(false, Ordering::SeqCst);
    attempt.expected.store(true, Ordering::SeqCst);
    let value = action();
    attempt.expected.store(false, Ordering::SeqCst);
    if attempt.taken.load(Ordering::SeqCst) {
        return Err(Fault {
            syndrome: attempt.syndrome.load(Ordering::SeqCst),
            address: attempt.address.load(Ordering::SeqCst),
        });
    }
    Ok(value)
}

/// Number of the vector of a synchronous exception taken from EL1 with SP_EL1.
const VECTOR_SYNCHRONOUS: u64 = 4;

/// Serves an exception: skips an expected one, reports any other.
// SAFETY: called by entry.S alone, with this signature.
#[unsafe(no_mangle)]
extern "C" fn deed_guest_exception(vector: u64, frame: &mut ExceptionFrame) {
    let syndrome = crate::read_register!("esr_el1");
    let address = crate::read_register!("far_el1");
    let attempt = attempt_here();
    if vector == VECTOR_SYNCHRONOUS && attempt.expected.swap(false, Ordering::SeqCst) {
        attempt.syndrome.store(syndrome, Ordering::SeqCst);
        attempt.address.store(address, Ordering::SeqCst);
        attempt.taken.store(true, Ordering::SeqCst);
        // An instruction that cannot be fetched was called: its caller goes on.
        let fetched = syndrome >> 26 & 0x3f != CLASS_INSTRUCTION_ABORT;
        let [.., link] = frame.x;
        frame.elr = if fetched { frame.elr.wrapping_add(4) } else { link };
        return;
    }
    panic!("exception {vector}: ESR {syndrome:#x} FAR {address:#x} ELR {:#x}", frame.elr);
}

/// Reports through the device, which it enrols itself: the panic may be the first thing that happens.
pub fn report_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let (mut device, _) = crate::device::Device::enrol_with_status();
    device.give_up(format_args!("{info}"));
    crate::call::system_off()
}

/// Waits for an event.
pub fn wait_for_event() {
    // SAFETY: WFE changes no register and no memory.
    unsafe { asm!("wfe", options(nomem, nostack, preserves_flags)) }
}

/// Waits for an interrupt.
pub fn wait_for_interrupt() {
    // SAFETY: WFI changes no register and no memory.
    unsafe { asm!("wfi", options(nomem, nostack, preserves_flags)) }
}
