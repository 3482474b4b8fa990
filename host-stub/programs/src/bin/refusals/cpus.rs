//! What a host may not do with CPUs: start one that is not there or not off, or where it has no memory.

use abi::psci;
use host_programs::Failure;
use host_programs::cpu::Cpu;
use host_programs::deed::Deed;
use host_programs::steps::Steps;

/// Affinities on QEMU's `virt` machine: the boot CPU, one that this host never starts, and none.
const BOOT: u64 = 0;
const OTHER: u64 = 1;
const NONE: u64 = 0x80;
/// The first page of RAM, which is the host's.
const RAM: u64 = 0x4000_0000;
/// Where QEMU puts the hypervisor.
const HYPERVISOR: u64 = 0x4020_0000;
const UART: u64 = 0x0900_0000;
/// `CPU_SUSPEND`, original format: the CPU loses its state.
const POWER_DOWN: u64 = 1 << 16;
/// The same for a whole cluster, which QEMU's firmware does not do.
const CLUSTER: u64 = 1 << 24;

pub(crate) fn try_all(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    // A machine with one CPU knows no other.
    let other = if Cpu::count(deed)? > 1 { psci::AFFINITY_OFF } else { psci::INVALID_PARAMETERS };
    let calls = [
        ("cpu-on-of-no-cpu-is-refused", psci::CPU_ON, [NONE, RAM, 0], psci::INVALID_PARAMETERS),
        ("cpu-on-of-oneself-is-already-on", psci::CPU_ON, [BOOT, RAM, 0], psci::ALREADY_ON),
        ("cpu-on-in-the-hypervisor-is-refused", psci::CPU_ON, [OTHER, HYPERVISOR, 0], psci::INVALID_ADDRESS),
        ("cpu-on-in-a-device-is-refused", psci::CPU_ON, [OTHER, UART, 0], psci::INVALID_ADDRESS),
        ("cpu-on-beyond-memory-is-refused", psci::CPU_ON, [OTHER, u64::MAX, 0], psci::INVALID_ADDRESS),
        (
            "cpu-suspend-that-ends-in-the-hypervisor-is-refused",
            psci::CPU_SUSPEND,
            [POWER_DOWN, HYPERVISOR, 0],
            psci::INVALID_ADDRESS,
        ),
        (
            "cpu-suspend-that-the-firmware-refuses-returns",
            psci::CPU_SUSPEND,
            [CLUSTER, RAM, 0],
            psci::INVALID_PARAMETERS,
        ),
        ("the-cpu-that-runs-is-on", psci::AFFINITY_INFO, [BOOT, 0, 0], psci::AFFINITY_ON),
        ("a-cpu-that-was-never-started-is-off", psci::AFFINITY_INFO, [OTHER, 0, 0], other),
        ("nothing-is-known-of-no-cpu", psci::AFFINITY_INFO, [NONE, 0, 0], psci::INVALID_PARAMETERS),
        ("nothing-is-known-of-a-cluster", psci::AFFINITY_INFO, [BOOT, 1, 0], psci::INVALID_PARAMETERS),
    ];
    for (name, function, [x1, x2, x3], expected) in calls {
        let [x0, ..] = deed.smc([u64::from(function), x1, x2, x3])?;
        steps.equal_hex(name, expected, x0);
    }
    Ok(())
}
