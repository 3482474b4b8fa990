//! The other CPUs: where they begin, and how PSCI turns them on and off.
//!
//! A CPU that begins here has a stack of its own and the kernel's tables, and serves its mailbox ([`crate::secondary`]):
//! it plays series, with all interrupts masked, or works for the kernel ([`super::smp`]).

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use aarch64_cpu::registers::{MPIDR_EL1, Readable};
use abi::psci;

use super::hardware::{Hardware, psci_call};
use super::{paging, smp};
use crate::secondary::{MAX_CPUS, Secondary};

unsafe extern "C" {
    static secondary_start: [u32; 1];
}

static SECONDARIES: [Secondary; MAX_CPUS - 1] = [const { Secondary::new() }; MAX_CPUS - 1];
/// How many of them there are.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Affinity of the boot CPU.
static BOOT: AtomicU64 = AtomicU64::new(0);
/// The image's physical address.
static IMAGE: AtomicU64 = AtomicU64::new(0);

/// Affinity fields of `MPIDR_EL1`, as PSCI and the device tree use them.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// Notes the CPUs of the device tree; `image` is the image's physical address.
pub fn find(image: u64, affinities: &[u64]) {
    IMAGE.store(image, Ordering::Relaxed);
    let own = MPIDR_EL1.get() & AFFINITY;
    BOOT.store(own, Ordering::Relaxed);
    let others = affinities.iter().filter(|affinity| **affinity != own);
    let with_stack = SECONDARIES.iter().take(paging::stacks().saturating_sub(1));
    let count = with_stack.zip(others).map(|(cpu, affinity)| cpu.set_affinity(*affinity)).count();
    COUNT.store(count, Ordering::Relaxed);
}

/// Those that there are.
pub fn all() -> &'static [Secondary] {
    SECONDARIES.get(..COUNT.load(Ordering::Relaxed)).unwrap_or(&[])
}

/// The affinity of a CPU, by its number: 0 is the boot CPU.
pub fn affinity_of(number: usize) -> u64 {
    number.checked_sub(1).map_or_else(|| BOOT.load(Ordering::Relaxed), affinity)
}

fn affinity(index: usize) -> u64 {
    all().get(index).map_or(u64::MAX, Secondary::affinity)
}

/// Asks the firmware to turn one of them on; returns PSCI's answer.
pub fn turn_on(index: usize) -> u64 {
    let image = IMAGE.load(Ordering::Relaxed);
    let start = image.wrapping_add(paging::offset_of((&raw const secondary_start).cast()));
    psci_call(psci::CPU_ON, [affinity(index), start, (index as u64).wrapping_add(1)])
}

/// Whether the firmware knows it as off.
pub fn is_off(index: usize) -> bool {
    psci_call(psci::AFFINITY_INFO, [affinity(index), 0, 0]) == psci::AFFINITY_OFF
}

/// Called by `boot.S` on a CPU that has just come, with its number.
// SAFETY: the name is used by boot.S alone.
#[unsafe(no_mangle)]
extern "C" fn secondary_entry(number: u64) -> ! {
    paging::enter(IMAGE.load(Ordering::Relaxed));
    let cpu = (number as usize).checked_sub(1).and_then(|index| SECONDARIES.get(index));
    if let Some(cpu) = cpu {
        cpu.serve(&Hardware, aarch64_cpu::asm::wfe, || {
            if smp::start_interrupts() {
                smp::work_as(number as usize);
                smp::stop_interrupts();
            } else {
                log::error!("CPU {number} has no redistributor");
            }
        });
    }
    let answer = psci_call(psci::CPU_OFF, [0; 3]);
    panic!("CPU {number} cannot be turned off: PSCI answers {}", answer.cast_signed());
}
