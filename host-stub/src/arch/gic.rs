//! GICv3, as far as a tick and calls between CPUs need it: two private interrupts of each CPU, polled.

use core::arch::asm;

use aarch64_cpu::registers::MPIDR_EL1;
use tock_registers::interfaces::{ReadWriteable, Readable, Writeable};
use tock_registers::registers::{ReadOnly, ReadWrite};
use tock_registers::{register_bitfields, register_structs};

use super::linear;
use crate::platform::Gic;

/// Interrupt of the physical timer of EL1.
pub const TIMER: u32 = 30;
/// The software-generated interrupt by which CPUs call each other.
const CALL: u32 = 0;
/// Interrupt numbers from here on are no interrupts.
const SPECIAL: u32 = 1020;
const PRIORITY: u8 = 0x80;
const FRAMES: u64 = 0x2_0000;

register_bitfields! [u32,
    GICD_CTLR [
        ENABLE_GRP1 OFFSET(0) NUMBITS(1) [],
        ENABLE_GRP1A OFFSET(1) NUMBITS(1) [],
        ARE_NS OFFSET(4) NUMBITS(1) [],
        RWP OFFSET(31) NUMBITS(1) []
    ],
    GICR_WAKER [
        PROCESSOR_SLEEP OFFSET(1) NUMBITS(1) [],
        CHILDREN_ASLEEP OFFSET(2) NUMBITS(1) []
    ]
];

register_structs! {
    Distributor {
        (0x0000 => ctlr: ReadWrite<u32, GICD_CTLR::Register>),
        (0x0004 => @END),
    }
}

register_structs! {
    Redistributor {
        (0x00000 => _reserved0),
        (0x00008 => typer: ReadOnly<u64>),
        (0x00010 => _reserved1),
        (0x00014 => waker: ReadWrite<u32, GICR_WAKER::Register>),
        (0x00018 => _reserved2),
        (0x10080 => igroupr0: ReadWrite<u32>),
        (0x10084 => _reserved3),
        (0x10100 => isenabler0: ReadWrite<u32>),
        (0x10104 => _reserved4),
        (0x10400 => ipriorityr: [ReadWrite<u8>; 32]),
        (0x10420 => @END),
    }
}

/// Reads or writes a CPU interface register, which the assembler knows by its encoding only.
macro_rules! icc {
    (read $encoding:literal) => {{
        let value: u64;
        // SAFETY: the GIC system registers are on (`start_cpu` has set SRE before all else); acknowledging is meant.
        unsafe { asm!(concat!("mrs {}, ", $encoding), out(reg) value, options(nostack)) };
        value
    }};
    (write $encoding:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: acts on this CPU's own interface, with interrupts masked; ICC_SGI1R_EL1 only makes an interrupt pending
        // on a CPU that runs this kernel.
        unsafe { asm!(concat!("msr ", $encoding, ", {}"), "isb", in(reg) value, options(nostack)) };
    }};
}

/// Starts what all CPUs share. Returns `false` if it cannot be reached.
#[must_use]
pub fn start(gic: &Gic) -> bool {
    let Ok(distributor) = linear::address(gic.distributor) else { return false };
    // SAFETY: device memory named by the device tree, in the linear map's first GiB; this driver's alone.
    let distributor = unsafe { &*(distributor as *const Distributor) };
    distributor.ctlr.modify(GICD_CTLR::ARE_NS::SET);
    wait(|| !distributor.ctlr.is_set(GICD_CTLR::RWP));
    distributor.ctlr.modify(GICD_CTLR::ENABLE_GRP1::SET + GICD_CTLR::ENABLE_GRP1A::SET);
    wait(|| !distributor.ctlr.is_set(GICD_CTLR::RWP));
    true
}

/// Lets this CPU have the timer's interrupt and calls of others. Returns `false` if it has no redistributor.
#[must_use]
pub fn start_cpu(gic: &Gic) -> bool {
    let Some(redistributor) = find_redistributor(gic) else { return false };
    redistributor.waker.modify(GICR_WAKER::PROCESSOR_SLEEP::CLEAR);
    wait(|| !redistributor.waker.is_set(GICR_WAKER::CHILDREN_ASLEEP));
    redistributor.igroupr0.set(u32::MAX);
    for number in [TIMER, CALL] {
        if let Some(priority) = redistributor.ipriorityr.get(number as usize) {
            priority.set(PRIORITY);
        }
    }
    redistributor.isenabler0.set(1 << TIMER | 1 << CALL);

    icc!(write "S3_0_C12_C12_5", icc!(read "S3_0_C12_C12_5") | 1); // ICC_SRE_EL1
    icc!(write "S3_0_C4_C6_0", 0xff); // ICC_PMR_EL1
    icc!(write "S3_0_C12_C12_3", 0); // ICC_BPR1_EL1
    icc!(write "S3_0_C12_C12_4", 0); // ICC_CTLR_EL1: one write ends an interrupt
    icc!(write "S3_0_C12_C12_7", 1); // ICC_IGRPEN1_EL1
    true
}

/// Lets this CPU have no interrupts.
pub fn stop_cpu() {
    icc!(write "S3_0_C12_C12_7", 0); // ICC_IGRPEN1_EL1
}

/// Calls a CPU, by the affinity fields of its `MPIDR_EL1`. What was stored before is seen by it then.
pub fn send(affinity: u64) {
    let [aff0, aff1, aff2, _, aff3, ..] = affinity.to_le_bytes().map(u64::from);
    let target = 1 << (aff0 & 0xf) | (aff0 >> 4) << 44 | aff1 << 16 | aff2 << 32 | aff3 << 48;
    // SAFETY: a barrier changes no value.
    unsafe { asm!("dsb ishst", options(nostack)) };
    icc!(write "S3_0_C12_C11_5", target | u64::from(CALL) << 24); // ICC_SGI1R_EL1
}

/// Waits for the hardware, but not for ever: a device that does not answer shows as a missing tick.
fn wait(done: impl Fn() -> bool) {
    for _ in 0..1_000_000 {
        if done() {
            return;
        }
        core::hint::spin_loop();
    }
}

fn find_redistributor(gic: &Gic) -> Option<&'static Redistributor> {
    const LAST: u64 = 1 << 4;
    let affinity = MPIDR_EL1.get();
    let affinity = (affinity >> 8 & 0xff00_0000) | (affinity & 0x00ff_ffff);
    let (base, size) = gic.redistributors;
    for offset in (0..size).step_by(FRAMES as usize) {
        let address = linear::address(base.checked_add(offset)?).ok()?;
        // SAFETY: device memory named by the device tree, in the linear map's first GiB; read-only here.
        let frame = unsafe { &*(address as *const Redistributor) };
        let typer = frame.typer.get();
        if typer >> 32 == affinity {
            return Some(frame);
        }
        if typer & LAST != 0 {
            break;
        }
    }
    None
}

/// Takes a pending interrupt; `None` if there is none. [`end`] must follow.
pub fn acknowledge() -> Option<u32> {
    let number = icc!(read "S3_0_C12_C12_0") as u32 & 0xff_ffff; // ICC_IAR1_EL1
    (number < SPECIAL).then_some(number)
}

/// Ends an interrupt.
pub fn end(number: u32) {
    icc!(write "S3_0_C12_C12_1", number.into()); // ICC_EOIR1_EL1
}
