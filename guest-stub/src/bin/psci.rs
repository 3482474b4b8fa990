//! Power states by the guest's own PSCI: the second vCPU goes on, off, on again, and turns the guest off. With
//! argument 1 the guest asks for a reset.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use abi::psci;
    use guest_stub::arch::{secondary_entry, wait_for_interrupt};
    use guest_stub::call::{call, system_off};
    use guest_stub::device::Device;
    use guest_stub::read_register;

    const FIRST_CONTEXT: u64 = 0x1111_2222_3333_4444;
    const SECOND_CONTEXT: u64 = 0x5555_6666_7777_8888;
    /// MPIDR_EL1's affinity fields.
    const AFFINITY: u64 = 0xff_00ff_ffff;

    fn psci(function: u32, arguments: [u64; 3]) -> u64 {
        let [a, b, c] = arguments;
        let [x0, ..] = call(function, a, b, c);
        x0
    }

    pub(super) fn main(argument: u64) {
        let mut device = Device::enrol();
        if argument == 1 {
            psci(psci::SYSTEM_RESET, [0; 3]);
            device.check("a-guest-that-asked-for-a-reset-does-not-run", 0, 1);
        }
        let entry = secondary_entry(second);
        discovery(&mut device);
        refusals(&mut device, entry);

        device.check(
            "cpu-on-of-a-vcpu-that-is-off-succeeds",
            0,
            psci(psci::CPU_ON, [1, entry, FIRST_CONTEXT]),
        );
        device.check("cpu-on-again-is-pending", psci::ON_PENDING, psci(psci::CPU_ON, [1, entry, 0]));
        device.check(
            "affinity-of-a-pending-vcpu",
            psci::AFFINITY_ON_PENDING,
            psci(psci::AFFINITY_INFO, [1, 0, 0]),
        );
        device.phase(1, &[]);
        device.check("affinity-of-a-vcpu-that-runs", psci::AFFINITY_ON, psci(psci::AFFINITY_INFO, [1, 0, 0]));
        device.check("cpu-on-of-a-vcpu-that-runs", psci::ALREADY_ON, psci(psci::CPU_ON, [1, entry, 0]));
        device.phase(2, &[]);
        device.check(
            "affinity-of-a-vcpu-that-turned-itself-off",
            psci::AFFINITY_OFF,
            psci(psci::AFFINITY_INFO, [1, 0, 0]),
        );
        device.check("cpu-on-after-cpu-off-succeeds", 0, psci(psci::CPU_ON, [1, entry, SECOND_CONTEXT]));
        device.check("cpu-suspend-is-a-standby", 0, psci(psci::CPU_SUSPEND, [0, 0, 0]));
        device.phase(3, &[]);
        // The second vCPU turns the guest off; this one never comes back here.
        device.check("a-guest-that-is-off-does-not-run", 0, 1);
    }

    fn discovery(device: &mut Device) {
        device.check("psci-version", psci::VERSION_1_1, psci(psci::VERSION, [0; 3]));
        device.check("psci-has-cpu-on", 0, psci(psci::FEATURES, [u64::from(psci::CPU_ON), 0, 0]));
        device.check("psci-has-smccc", 0, psci(psci::FEATURES, [u64::from(abi::smccc::VERSION), 0, 0]));
        device.check(
            "psci-has-no-unknown-function",
            psci::NOT_SUPPORTED,
            psci(psci::FEATURES, [0x8400_001f, 0, 0]),
        );
        device.check(
            "psci-needs-no-migration",
            psci::MIGRATE_NOT_REQUIRED,
            psci(psci::MIGRATE_INFO_TYPE, [0; 3]),
        );
    }

    fn refusals(device: &mut Device, entry: u64) {
        let affinity = |target, level| psci(psci::AFFINITY_INFO, [target, level, 0]);
        device.check("affinity-of-the-boot-vcpu", psci::AFFINITY_ON, affinity(0, 0));
        device.check("affinity-of-a-vcpu-that-was-never-on", psci::AFFINITY_OFF, affinity(1, 0));
        device.check("affinity-of-no-vcpu", psci::INVALID_PARAMETERS, affinity(9, 0));
        device.check("affinity-of-a-level-above", psci::INVALID_PARAMETERS, affinity(0, 1));
        let on = |target, entry| psci(psci::CPU_ON, [target, entry, 0]);
        device.check("cpu-on-of-the-caller", psci::ALREADY_ON, on(0, entry));
        device.check("cpu-on-of-no-vcpu", psci::INVALID_PARAMETERS, on(9, entry));
        device.check("cpu-on-of-an-absurd-affinity", psci::INVALID_PARAMETERS, on(u64::MAX, entry));
        device.check("cpu-on-at-an-unaligned-entry", psci::INVALID_ADDRESS, on(1, entry + 2));
    }

    fn second(context: u64) {
        let mut device = Device::unguarded();
        if context == SECOND_CONTEXT {
            device.check("second-vcpu-gets-its-second-context", SECOND_CONTEXT, context);
            system_off();
        }
        device.check("second-vcpu-gets-its-context", FIRST_CONTEXT, context);
        device.check("second-vcpu-has-affinity-1", 1, read_register!("mpidr_el1") & AFFINITY);
        device.phase(11, &[]);
        wait_for_interrupt();
        psci(psci::CPU_OFF, [0; 3]);
        device.check("a-vcpu-that-is-off-does-not-run", 0, 1);
    }
}
