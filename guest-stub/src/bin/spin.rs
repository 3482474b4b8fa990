//! Two vCPUs that never end and never exit by themselves: only the host's interrupts get the CPU back.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use guest_stub::arch::secondary_entry;
    use guest_stub::call::call;
    use guest_stub::device::Device;

    pub(super) fn main(_argument: u64) {
        let mut device = Device::enrol();
        let [on, ..] = call(abi::psci::CPU_ON, 1, secondary_entry(spin), 0);
        device.check("guest-turns-its-second-vcpu-on", abi::psci::SUCCESS, on);
        device.phase(1, &[]);
        spin(0);
    }

    fn spin(_context: u64) {
        loop {
            core::hint::spin_loop();
        }
    }
}
