//! CPUs that come up after the boot CPU: from the firmware, at EL2 with the MMU off (boot.S, `secondary_entry`), to where
//! the host wants them. The firmware learns no address of the host's, and no CPU enters the host before its stage 2 is on.
//!
//! Owns the machine's [`Cpus`], which have a lock of their own, and the words by which a CPU finds EL2's tables, which the
//! boot CPU writes before the host runs.

use super::boot::hypervisor;
use super::features::Features;
use super::panic::is_panicking;
use super::{cache, exceptions, host, id_registers, mmu, power};
use crate::addr::Pfn;
use crate::cpus::{AFFINITY, Cpus, Start};
use crate::psci::{Power, loses_registers};
use aarch64_cpu::registers::{MPIDR_EL1, Readable};
use abi::psci;
use core::mem::size_of_val;
use core::sync::atomic::{AtomicU64, Ordering};

static CPUS: Cpus = Cpus::none();

/// TCR_EL2 and TTBR0_EL2 of the final tables, for a CPU whose MMU is off: cleaned to the point of coherency when they are
/// written, and never written again.
pub(super) static TRANSLATION: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

unsafe extern "C" {
    /// Where the firmware starts a CPU, with its index in x0 (boot.S).
    safe static secondary_entry: [u8; 0];
}

/// Keeps which CPUs there are. Returns `false` if the calling one is not among them, or one is there twice.
pub fn set_cpus(affinities: &[u64]) -> bool {
    CPUS.name(affinities, MPIDR_EL1.get() & AFFINITY)
}

/// Whether one CPU runs the host.
#[cfg(feature = "oracle")]
pub fn is_alone() -> bool {
    CPUS.one_is_on()
}

/// Keeps what other CPUs need to come up under the final tables, and what they are compared with.
pub fn publish(root: Pfn) {
    id_registers::keep();
    let [tcr, ttbr0] = &TRANSLATION;
    tcr.store(mmu::final_tcr(), Ordering::Relaxed);
    ttbr0.store(root.base().as_u64(), Ordering::Relaxed);
    cache::clean_and_invalidate((&raw const TRANSLATION).addr() as u64, size_of_val(&TRANSLATION) as u64);
}

/// Does what the host asks of a CPU by PSCI. Returns what the host gets in x0.
#[inline(never)]
pub fn host_power(power: Power) -> u64 {
    let own = exceptions::this_cpu();
    let may_begin = |start: &Start| hypervisor().host_may_begin_at(start.entry);
    let entry = (&raw const secondary_entry).addr() as u64;
    match power {
        Power::On { start, .. } if !may_begin(&start) => psci::INVALID_ADDRESS,
        // Whoever keeps its registers goes on behind its call, and need not say where else.
        Power::Suspend { state, start }
            if !may_begin(&start) && loses_registers(state, suspend_features()) =>
        {
            psci::INVALID_ADDRESS
        }
        Power::On { target, start } => {
            CPUS.turn_on(target, start, |index| power::call(psci::CPU_ON, target, entry, index as u64))
        }
        Power::Off => turn_off(own),
        Power::Suspend { state, start } => {
            CPUS.suspend(own, start, || power::call(psci::CPU_SUSPEND, state.into(), entry, own as u64))
        }
        Power::Info { target } => CPUS.info(target, || power::call(psci::AFFINITY_INFO, target, 0, 0)),
        Power::SuspendFeatures => suspend_features(),
    }
}

/// Turns this CPU off; returns only if the firmware refuses.
fn turn_off(cpu: usize) -> u64 {
    CPUS.turn_off(cpu, || power::call(psci::CPU_OFF, 0, 0, 0))
}

/// What the firmware says of its `CPU_SUSPEND`.
fn suspend_features() -> u64 {
    power::call(psci::FEATURES, psci::CPU_SUSPEND.into(), 0, 0)
}

/// Called by boot.S on a CPU that has come up, under the final tables, on its own stack.
pub(super) extern "C" fn secondary_start(cpu: usize) -> ! {
    if is_panicking() {
        power::park();
    }
    if let Some(start) = CPUS.arrive(cpu) {
        if id_registers::are_those_kept() {
            let hypervisor = hypervisor();
            host::prepare(&Features::probe(), hypervisor.host_stage2(), hypervisor.host_ipa_bits());
            host::enter(start.entry, start.context);
        }
        // What EL2 has probed on the boot CPU, and what the host's stage 2 counts on, would not hold on this one.
        log::warn!("CPU {cpu} is not of the boot CPU's kind: it stays off");
        turn_off(cpu);
    }
    power::park()
}
